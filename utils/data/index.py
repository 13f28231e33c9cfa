"""Pictures and labels of a data set, each checked once; nothing of the data set is written or changed.

Sizes, boxes and flaws of every picture are cached, so that a large data set is decoded once and not at every start,
even if a script was killed. An entry is valid as long as path, size, times and inode number of the picture and of its
label files stay the same. A file that could not be read is tried again. The cache file holds NumPy arrays, and lies in
the user's cache folder, never in the data set. A file that is missing, damaged or made by another version counts as
empty. A folder that cannot be written is no error.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import cache, lru_cache
from itertools import islice, pairwise
from pathlib import Path
from time import monotonic
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray

from utils.cli import ProgressBar, log
from utils.data.findings import EFFECTS, KINDS, Finding, first_places
from utils.data.images import MAX_PIXELS, SUFFIXES, PackedBoxes, PackedPaths, PictureError, check_image, lower_suffix
from utils.errors import DataError
from utils.files import atomic_path, foreign_errors, matches, read_bytes, regular_file, starting_points

Source = str | Path
"""A picture, a list file (.txt), a folder (searched with its subfolders) or a glob."""
Stamp = tuple[int, int, int, int]
"""Size, modification time, change time (which no program can set back) and inode number of a file."""
IMAGE_FOLDERS = frozenset({"images", "JPEGImages"})
"""Folders that have a folder `labels` beside them; the second is that of Pascal VOC."""
IGNORED = "ignored"
"""Folder beside `labels` with the boxes that are ignored: crowds and difficult objects."""
LARGEST_LIST = 1 << 28
"""Largest list file read, in bytes."""
CACHE_FOLDER = "darknet-compression"
CACHE_KEY = [4, cv2.__version__, PIL.__version__, MAX_PIXELS]
"""Version of the format, and what else a cached verdict on a picture depends on."""
UNCERTAIN = frozenset({"unreadable image", "unreadable label file"})
"""Findings that are not cached: who reads the files, and when, decides, and not the files alone."""
STORED_EVERY = 20.0
"""Seconds of checking that a kill may cost; storing what is known of 118 000 pictures takes a second."""
LARGEST_CACHE = 1 << 30
"""Bytes of a cache file that is still read; a million pictures take about 300 MB."""
UNREAD, NO_FILE = (-1,) * 8, (0,) * 4
"""Stamps of two label files that were not read yet, and of one that is not there."""
NO_BOXES = np.zeros((0, 5), np.float32)


Boxes = NDArray[np.float32]
"""[n, 5]: class, cx, cy, w, h; the last four as shares of the picture's width and height, 0..1."""
LARGEST_LABEL = 1 << 24
"""Largest label file read, in bytes."""
DIGITS = 6
"""Decimals of a label that is written: 0.01 pixel in a picture of 10 000."""
ROUNDING = 1e-3
"""Label values this far outside 0..1 come from rounding, and are clipped."""
SAMPLE = 20
"""Relative entries of a list that are tried to find out which folder its paths start from."""


def totals_text(counts: Mapping[str, Any]) -> str:
    """Line for people on how many images and boxes there are; takes `Index.totals`."""
    ignored = f"{counts['ignored']} ignored ones, " if counts["ignored"] else ""
    return (
        f"{counts['usable']} of {counts['listed']} images usable, {counts['boxes']} boxes, {ignored}"
        f"{counts['backgrounds']} images without a box"
    )


class Record(NamedTuple):
    """What is known of one picture and its label files."""

    height: int = 0
    """0 if the picture cannot be used."""
    width: int = 0
    boxes: Boxes = NO_BOXES
    ignored: Boxes = NO_BOXES
    flaws: Sequence[Finding] = ()
    """What is wrong with the picture, or else with its label files."""


@dataclass(frozen=True)
class Index:
    """The usable pictures of a data set, in the order of its source."""

    images: PackedPaths
    labels: PackedBoxes
    """Boxes of each picture."""
    ignored: PackedBoxes
    """The same of the boxes that evaluation and training ignore."""
    shapes: NDArray[np.int64]
    """[N, 2], height and width of each picture as decoded."""
    listed: int
    """Pictures that the source names, duplicates included."""
    findings: tuple[Finding, ...]
    """All that was found when the data set was indexed."""

    def __len__(self) -> int:
        return len(self.images)

    def totals(self) -> dict[str, int]:
        """Numbers of pictures listed, usable and without a box, and of boxes and ignored boxes in the usable ones."""
        return {
            "listed": self.listed,
            "usable": len(self),
            "backgrounds": int((self.labels.counts == 0).sum()),
            "boxes": len(self.labels.rows),
            "ignored": len(self.ignored.rows),
        }

    def places(self, kind: str) -> tuple[str, ...]:
        """Places of the findings of one kind, in the order of the source."""
        return tuple(finding.place for finding in self.findings if finding.kind == kind)

    def counts(self) -> dict[str, int]:
        """Number of findings of each kind that occurs."""
        kinds = [finding.kind for finding in self.findings]
        return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}

    def flaws(self) -> tuple[Finding, ...]:
        """The findings because of which a picture or a row was left out."""
        return tuple(finding for finding in self.findings if finding.severity != "note")

    def summary(self) -> str:
        """Lines for people: the totals, then each kind with its count, its effect and the first places."""
        lines = [totals_text(self.totals())]
        for kind, count in self.counts().items():
            effect = EFFECTS[KINDS[kind].severity]
            lines.append(f"  {kind}: {count} ({effect}): {first_places(self.places(kind))}")
        return "\n".join(lines)

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and labels; not of the folder that the pictures lie in, and not of their bytes."""
        digest = hashlib.sha256(np.ascontiguousarray(self.shapes).tobytes())
        for image, boxes in zip(self.images, self.labels, strict=True):
            digest.update(os.fsencode(image.name) + b"\0" + boxes.tobytes() + b"\0")
        for position, boxes in enumerate(self.ignored):
            if len(boxes):
                digest.update(b"ignored %d\0" % position + boxes.tobytes())
        return digest.hexdigest()

    def subset(self, positions: Sequence[int]) -> Index:
        """The same data set with some of its pictures only."""
        images = PackedPaths(self.images[position] for position in positions)
        labels, ignored = (PackedBoxes([part[at] for at in positions]) for part in (self.labels, self.ignored))
        return replace(self, images=images, labels=labels, ignored=ignored, shapes=self.shapes[list(positions)])

    def single_class(self) -> Index:
        """The same data set with class 0 for every box."""
        factors = np.array([0, 1, 1, 1, 1], np.float32)
        labels, ignored = (PackedBoxes([boxes * factors for boxes in part]) for part in (self.labels, self.ignored))
        return replace(self, labels=labels, ignored=ignored)


def index(
    source: Source | Sequence[Source],
    names: Sequence[str],
    *,
    strict: bool = False,
    cache_dir: Path | Literal["default"] | None = "default",
    require: bool = True,
) -> Index:
    """Find and check the pictures and labels of a data set.

    The label file of a picture is told by `label_path`; if there is none, or an empty one, the picture is a background.
    Where no picture has one there, labels beside the pictures are taken.
    Where `images` becomes `ignored` in place of `labels`, a file of the same kind may hold boxes that are ignored.

    Args:
        source: a picture, list file, folder or glob, or several of them. The paths in a list file are relative to the
            folder that it lies in, or else to the working directory or a folder above the list.
        names: names of the classes; only their number matters here.
        strict: refuse the data set if anything but a background was found.
        cache_dir: where what is found is kept; "default" is the user's cache folder, None keeps nothing.
        require: refuse a data set without a usable picture.

    Raises:
        DataError: the source cannot be read; nothing usable is left; or `strict` and something was found.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    listed = [path for one in sources for path in list_images(one)]
    paths, repeated = _different(listed)
    findings = [Finding("listed twice", path, "used once") for path in repeated]
    usable: dict[str, Record] = {}
    records = _records(paths, _labels_lie_beside(paths), len(names), _cache_file(cache_dir, sources))
    for path, record in zip(paths, records, strict=True):
        findings += record.flaws
        if all(finding.severity != "fatal" for finding in record.flaws):
            usable[path] = record
    sizes = np.array([record[:2] for record in usable.values()], np.int64).reshape(-1, 2)
    pictures = Index(PackedPaths(usable), *_packed(usable.values()), sizes, len(listed), tuple(findings))
    _refuse(pictures, sources, strict=strict, require=require)
    return pictures


def _different(listed: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths, and those that name the file of an earlier one; a folder may have several names, as `.` has."""
    real_folder = cache(os.path.realpath)
    first: dict[tuple[str, str], str] = {}
    repeated = []
    for path in listed:
        folder, name = os.path.split(path)
        key = real_folder(folder), name
        if key in first:
            repeated.append(path)
        first.setdefault(key, path)
    return list(first.values()), repeated


def list_images(source: Source) -> list[str]:
    """Paths of the pictures that one source names, as yet unchecked; a folder and a glob give them sorted.

    Raises:
        DataError: there is no such file or folder, or a list file cannot be read.
    """
    text = os.fspath(source)
    if os.path.isdir(text):
        return sorted(_walk(text, set()))
    if not os.path.lexists(text) and glob.has_magic(text):
        return sorted(path for path in matches(text) if lower_suffix(path) in SUFFIXES)
    regular_file(text, DataError)
    return [path for _, path in read_list(text)] if text.lower().endswith(".txt") else [text]


def label_path(image: str, kind: str = "labels") -> str:
    """The label file of a picture: the same path with the suffix .txt and `kind` for the last folder `images`.

    `JPEGImages` counts as `images`. Where the absolute path has neither, the label file lies beside the picture.
    """
    folder, name = os.path.split(image)
    return os.path.join(_label_folder(folder, kind), os.path.splitext(name)[0] + ".txt")


def _label_folder(folder: str, kind: str) -> str:
    """The folder of labels; the absolute path is looked at where a script runs in the folder `images` or below."""
    return _replaced(folder, kind) or _replaced(os.path.abspath(folder), kind) or folder


@lru_cache(1 << 16)
def _replaced(folder: str, kind: str) -> str:
    """The path with `kind` for the last folder `images`; empty if there is none."""
    parts = folder.split(os.sep)
    for position in reversed(range(len(parts))):
        if parts[position] in IMAGE_FOLDERS:
            parts[position] = kind
            return os.sep.join(parts)
    return ""


def _beside(image: str) -> str:
    return os.path.splitext(image)[0] + ".txt"


def _labels_lie_beside(images: Sequence[str]) -> bool:
    """Whether no picture has a label file in the folder of labels, but one has it beside itself."""
    if any(os.path.lexists(label_path(image)) for image in images):
        return False
    first = next((image for image in images if os.path.lexists(_beside(image))), None)
    if first is not None:
        log(f"labels are taken from beside the images, as {_beside(first)}; there is no {label_path(first)}")
    return first is not None


def _walk(folder: str, searched: set[str]) -> Iterator[str]:
    """Pictures below a folder, each folder once: by a link only if it is in none that was searched before."""
    links = []
    for parent, folders, names in os.walk(folder):
        if (real := os.path.realpath(parent)) in searched:
            folders.clear()
            continue
        searched.add(real)
        links += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
        yield from (os.path.join(parent, name) for name in names if lower_suffix(name) in SUFFIXES)
    for link in sorted(links):
        yield from _walk(link, searched)


def read_list(path: str) -> Iterator[tuple[int, str]]:
    """Line number and path of each entry of a list file. A path may hold any byte but a line end; none is expanded."""
    data = read_bytes(path, DataError, LARGEST_LIST).removeprefix(b"\xef\xbb\xbf")
    if b"\0" in data:
        raise DataError(f"{path}: holds zero bytes; a list file is UTF-8 text with one path a line")
    lines = [(number, os.fsdecode(line)) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    relative = (entry for _, line in lines if not os.path.isabs(entry := line.strip()))
    folder, slashes = _base(path, list(islice(relative, SAMPLE)))
    folders: dict[str, str] = {}
    for number, line in lines:
        line = line.replace("\\", "/") if slashes else line
        stripped = line.strip()
        entry = os.path.join(folder, stripped)
        if line != stripped and os.path.exists(os.path.join(folder, line)):
            entry = os.path.join(folder, line)
        place, name = os.path.split(entry)
        if place not in folders:  # a folder is looked at once, however many images it has
            folders[place] = _normal(place)
        yield number, os.path.join(folders[place], name)


def _normal(folder: str) -> str:
    """The folder without `.` and `..`; as it is where that would be another one, since a part of it is a link."""
    normal = os.path.normpath(os.path.join(folder, "_"))[:-1]  # "" for the working directory
    if ".." not in folder or not os.path.exists(folder):
        return normal
    same = os.path.exists(normal or ".") and os.path.samefile(folder, normal or ".")
    return normal if same else folder


_log_once = cache(log)
"""A list is read once for every stage of a script."""


def _base(path: str, sample: Sequence[str]) -> tuple[str, bool]:
    """The folder that entries of a list are relative to, and whether their backslashes stand for slashes.

    The first reading is taken under which one of the sample exists; without any, entries are relative to the list.
    """
    folder = Path(path).parent
    for slashes in (False, True):
        entries = [entry.replace("\\", "/") if slashes else entry for entry in sample]
        for base in starting_points(folder):
            if any(os.path.exists(base / entry) for entry in entries):
                if base != folder:
                    _log_once(f"{path}: its paths are relative to {base.absolute()}, not to the list")
                return str(base), slashes
    return str(folder), False


def default_folder() -> Path | None:
    """$XDG_CACHE_HOME/darknet-compression, by default under ~/.cache; None if there is no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / CACHE_FOLDER
    except RuntimeError:
        return None


def stamp(path: str) -> Stamp | None:
    """Numbers that change when a file does; None if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    limit = 1 << 63  # the cache has int64: inode numbers may be unsigned, and times may be after the year 2262
    return status.st_size, status.st_mtime_ns % limit, status.st_ctime_ns % limit, status.st_ino % limit


def _cache_file(folder: Path | Literal["default"] | None, sources: Sequence[Source]) -> Path | None:
    """File of what is known of a data set; None keeps nothing."""
    folder = default_folder() if folder == "default" else folder
    digest = hashlib.sha256(os.fsencode("\n".join(map(os.path.abspath, sources)))).hexdigest()[:32]
    return folder / f"pictures-{digest}.npz" if folder else None


def _records(paths: Sequence[str], beside: bool, classes: int, cache: Path | None) -> list[Record]:
    """What is known of each picture: from the cache where no file has changed, else by decoding and reading."""
    how = [classes, beside]  # labels were read
    kept = _load_records(cache, how) if cache else {}
    stamps = dict(zip(paths, _stamps(paths, beside), strict=True))
    known = {path: kept[path] for path in paths if path in kept and kept[path][0][:4] == stamps[path][:4]}
    unknown, stored = [path for path in paths if path not in known], monotonic()
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoding releases the GIL
    progress = ProgressBar("checking images", pool.map(_check, unknown), len(unknown), "images")
    changed = [path for path in paths if path not in known or known[path][0] != stamps[path]]
    try:
        for path, record in zip(unknown, progress, strict=True):
            known[path] = stamps[path][:4] + UNREAD, record
            if cache and monotonic() > stored + STORED_EVERY:
                _store_records(cache, how, known)
                stored = monotonic()
        for path in changed:
            record = known[path][1]
            if record.height:
                boxes, flaws = read_labels(_beside(path) if beside else label_path(path), classes)
                ignored, ignored_flaws = _read_ignored(path, classes, beside)
                record = Record(*record[:2], boxes, ignored, flaws + ignored_flaws)
            known[path] = stamps[path], record
    finally:
        pool.shutdown(cancel_futures=True)
        if changed and cache:
            _store_records(cache, how, known)
    return [known[path][1] for path in paths]


def _stamps(paths: Sequence[str], beside: bool) -> Iterator[tuple[int, ...]]:
    """Stamps of each picture, its label file and the one of ignored boxes; empty if there is no such picture."""
    folders: dict[str, tuple[str, str]] = {}  # of label files, and of those with ignored boxes where it exists
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            ignored = _label_folder(folder, IGNORED)
            labels = folder if beside else _label_folder(folder, "labels")
            folders[folder] = labels, ignored if not beside and os.path.isdir(ignored) else ""
        labels, ignored = folders[folder]
        name = os.path.splitext(name)[0] + ".txt"
        label = stamp(os.path.join(labels, name)) or NO_FILE
        picture = stamp(path)
        yield picture + label + ((ignored and stamp(os.path.join(ignored, name))) or NO_FILE) if picture else ()


def _load_records(cache: Path, how: list[int]) -> dict[str, tuple[tuple[int, ...], Record]]:
    """Stamps and record of each path. Empty if there is nothing usable."""
    if not os.path.isfile(cache) or os.path.getsize(cache) > LARGEST_CACHE:
        return {}
    with suppress(DataError), foreign_errors(cache, "nothing that is known", DataError), np.load(cache) as arrays:
        key, earlier, flaws = json.loads(arrays["text"].tobytes())
        if key == CACHE_KEY:
            by_picture: dict[int, list[Finding]] = defaultdict(list)
            for number, *flaw in flaws:
                by_picture[number].append(Finding(*flaw))
            stamps = arrays["stamps"].astype(np.int64, casting="safe")
            if earlier != how:
                stamps[:, 4:] = UNREAD
            boxes = [_parts(arrays[name], arrays[f"{name} bounds"]) for name in ("boxes", "ignored")]
            records = []
            for number, (size, *of_labels) in enumerate(zip(arrays["sizes"].tolist(), *boxes, strict=True)):
                records.append(Record._make((*size, *of_labels, by_picture.get(number, ()))))
            paths = os.fsdecode(arrays["paths"].tobytes()).split("\0")
            return dict(zip(paths, zip(map(tuple, stamps.tolist()), records, strict=True), strict=True))
    return {}


def _parts(rows: Boxes, bounds: NDArray[np.int64]) -> list[Boxes]:
    return [rows[start:end] for start, end in pairwise(bounds.tolist())]


def _store_records(cache: Path, how: list[int], known: Mapping[str, tuple[tuple[int, ...], Record]]) -> None:
    """Replace the file atomically; silently does nothing where that is impossible."""
    paths = [
        path
        for path, (marks, record) in known.items()
        if len(marks) == 12 and UNCERTAIN.isdisjoint(flaw.kind for flaw in record.flaws)
    ]
    records = [known[path][1] for path in paths]
    flaws = [[number, *astuple(flaw)] for number, record in enumerate(records) for flaw in record.flaws]
    boxes, ignored = _packed(records)
    text = json.dumps([CACHE_KEY, how, flaws]).encode("ascii")
    arrays = {
        "paths": np.frombuffer(os.fsencode("\0".join(paths)), np.uint8),
        "stamps": np.array([known[path][0] for path in paths], np.int64),
        "sizes": np.array([record[:2] for record in records], np.int64),
        "boxes": boxes.rows,
        "boxes bounds": boxes.bounds,
        "ignored": ignored.rows,
        "ignored bounds": ignored.bounds,
        "text": np.frombuffer(text, np.uint8),
    }
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle


def _packed(records: Collection[Record]) -> tuple[PackedBoxes, PackedBoxes]:
    """The boxes of all pictures, and the ignored ones."""
    return PackedBoxes(record.boxes for record in records), PackedBoxes(record.ignored for record in records)


def _check(path: str) -> Record:
    try:
        return Record(*check_image(path))
    except PictureError as failure:
        return Record(flaws=[Finding(failure.kind, path, str(failure).removeprefix(f"{path}: "))])


def _read_ignored(image: str, classes: int, beside: bool) -> tuple[Boxes, list[Finding]]:
    """Ignored boxes of a picture, and what is wrong with them; none without a file, or if labels lie beside it."""
    path = label_path(image, IGNORED)
    if beside or path == label_path(image):  # the latter: no folder `images`
        return NO_BOXES, []
    boxes, findings = read_labels(path, classes)
    return boxes, [finding for finding in findings if finding.severity != "note"]


def _refuse(pictures: Index, sources: Sequence[Source], *, strict: bool, require: bool) -> None:
    where = ", ".join(map(str, sources[:3])) + (", …" if len(sources) > 3 else "")
    flaws = pictures.flaws()
    counts = ", ".join(f"{count} {kind}" for kind, count in pictures.counts().items())
    if require and not len(pictures):
        reason = f"found: {counts}" if counts else "it names no image"
        raise DataError(f"{where}: none of {pictures.listed} images can be used; {reason}")
    if strict and flaws:
        first = flaws[0]
        raise DataError(
            f"{where}: {len(flaws)} flaws and --strict-data; the first is {first.place}: {first.kind}: {first.detail}"
        )


def read_labels(path: str, classes: int) -> tuple[Boxes, list[Finding]]:
    """Boxes of one label file, and what was found in it."""
    if not os.path.lexists(path):
        return NO_BOXES, [Finding("no label file", path)]
    try:
        data = read_bytes(path, DataError, LARGEST_LABEL)
    except DataError as failure:
        return NO_BOXES, [Finding("unreadable label file", path, str(failure).removeprefix(f"{path}: "))]
    if not data.strip():
        return NO_BOXES, [Finding("empty label file", path)]
    if b"\0" in data:
        return NO_BOXES, [Finding("not a text file", f"{path}:1", "holds zero bytes; UTF-16?")]
    return parse_labels(data, path, classes)


def parse_labels(data: bytes, path: str, classes: int) -> tuple[Boxes, list[Finding]]:
    """Read the bytes of a label file; every line that cannot be used is named.

    A box may reach beyond the picture by its size, but its centre may not lie outside. Rows that say the same as an
    earlier row are duplicates.

    Args:
        data: the whole file; UTF-8 with or without a byte order mark.
        path: of the file, for the findings.
        classes: number of classes; ids count from 0.
    """
    lines: dict[tuple[float, ...], int] = {}
    findings = []
    for number, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not text.strip():
            continue
        row, rounded = _clipped(_numbers(text))
        kind, detail = _flaw(text, row, classes)
        if rounded and not kind:
            findings.append(Finding("rounded label", f"{path}:{number}", rounded))
        if not kind and row in lines:
            kind, detail = "duplicate row", f"the same as line {lines[row]}"
        if kind:
            findings.append(Finding(kind, f"{path}:{number}", detail))
        else:
            lines[row] = number
    return np.array(list(lines), np.float32).reshape(-1, 5), findings


def _numbers(text: bytes) -> tuple[float, ...]:
    """The fields of a line as finite numbers; empty if one is none."""
    try:
        row = tuple(map(float, text.split()))
    except ValueError:
        return ()
    return row if all(map(math.isfinite, row)) and b"_" not in text else ()  # Python would read 1_0 as 10


def _clipped(row: tuple[float, ...]) -> tuple[tuple[float, ...], str]:
    """A row whose shares are in 0..1 where they were outside by rounding only, and what was clipped."""
    if len(row) != 5:
        return row, ""
    shares = [min(max(share, 0.0), 1.0) for share in row[1:]]
    off = [share for share, clipped in zip(row[1:], shares, strict=True) if share != clipped]
    if not off or any(min(abs(share), abs(share - 1)) > ROUNDING for share in off) or min(row[3:]) < 0:
        return row, ""
    return (row[0], *shares), f"{off[0]}; 0..1 is allowed"


def _flaw(text: bytes, row: tuple[float, ...], classes: int) -> tuple[str, str]:
    """Kind and detail of what is wrong with one row; both are empty if nothing is."""
    fields = text.split()
    if len(fields) != 5:
        return "wrong column count", f"{len(fields)} columns; a row is: class cx cy w h{_cause(len(fields))}"
    if not row:
        return "not a number", f"{b' '.join(fields)[:60]!r}"
    label, cx, cy, width, height = row
    if label != int(label):
        return "fractional class", f"class {label}; classes are whole numbers"
    if label < 0:
        return "negative class", f"class {label:g}; classes are 0..{classes - 1}"
    if label >= classes:
        return "class beyond names", f"class {label:g}; the {classes} names have the classes 0..{classes - 1}"
    if width < 0 or height < 0:
        return "negative size", f"a box of {width} x {height}"
    if not (0 <= cx <= 1 and 0 <= cy <= 1 and width <= 1 and height <= 1):
        return "out of range", f"{cx} {cy} {width} {height}; a box is given as shares of the image, 0..1"
    if np.float32(width) == 0 or np.float32(height) == 0:
        return "zero-size box", f"a box of {width} x {height}"
    return "", ""


def _cause(columns: int) -> str:
    """Where rows of another number of columns come from."""
    if columns == 6:
        return "; the sixth is the confidence of a detection?"
    return "; a polygon? write the box around its points" if columns >= 7 and columns % 2 else ""


def label_line(number: int, shares: Sequence[float]) -> str:
    """Line of a label file: a class, and cx, cy, w, h as shares of the picture; in files of detections, confidence."""
    return f"{number} " + " ".join(f"{share:.{DIGITS}f}" for share in shares) + "\n"
