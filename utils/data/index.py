"""Which pictures and labels a data set has, each checked once; nothing of the data set is written or changed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from utils.data.images import MAX_PIXELS, SUFFIXES, PictureError, check_image
from utils.data.labels import KINDS, Effect, Finding, Report, parse_labels
from utils.errors import DataError
from utils.files import atomic_write_bytes, regular_file

FORMAT = 1
FOLDER = "darknet-compression"
LARGEST = 1 << 30
"""Bytes of a cache file that is still read; a million pictures take about 150 MB."""


class Verdict(NamedTuple):
    """Result of checking one picture: its size, or what is wrong with it."""

    height: int
    width: int
    kind: str = ""
    """A key of `labels.KINDS`; empty if the picture is good."""
    detail: str = ""


Stamp = tuple[int, int, int, int]
"""Size, modification time, change time (which no program can set back) and inode number of a file."""


def default_folder() -> Path | None:
    """$XDG_CACHE_HOME/darknet-compression, by default under ~/.cache; None if there is no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / FOLDER
    except RuntimeError:
        return None


def stamp(path: str) -> Stamp | None:
    """What changes when a file does; None if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class VerdictCache:
    """Verdicts on the pictures of one source, in one file of the cache folder.

    Args:
        folder: the cache folder, made when something is stored; None keeps nothing.
        source: names the data set, and with it the file.
        max_pixels: part of the key, as are the versions of this format and of OpenCV, since verdicts depend on them.
    """

    def __init__(self, folder: Path | None, source: str, max_pixels: int) -> None:
        self._key = [FORMAT, cv2.__version__, max_pixels]
        digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:32]
        self._path = folder / f"pictures-{digest}.json" if folder else None

    def load(self) -> dict[str, tuple[Stamp, Verdict]]:
        """Path → the file's stamp when it was checked, and the verdict. Empty if there is nothing usable."""
        with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            if self._path and self._path.is_file() and self._path.stat().st_size <= LARGEST:
                document = json.loads(self._path.read_bytes())
                if document["key"] == self._key:
                    return dict(_entries(document["pictures"]))
        return {}

    def store(self, entries: Mapping[str, tuple[Stamp, Verdict]]) -> None:
        """Replace the file atomically; silently does nothing where that is impossible."""
        if self._path is None:
            return
        pictures = {path: [*stamp, *verdict] for path, (stamp, verdict) in entries.items()}
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(self._path, json.dumps({"key": self._key, "pictures": pictures}).encode("ascii"))


def _entries(pictures: Mapping[str, list]) -> Iterable[tuple[str, tuple[Stamp, Verdict]]]:
    """The pictures of a cache document.

    Raises:
        ValueError: something is not of the kind that `VerdictCache.store` writes.
    """
    for path, values in pictures.items():
        *stamp, height, width, kind, detail = values
        numbers = (*stamp, height, width)
        if len(stamp) != 4 or any(type(number) is not int for number in numbers) or min(height, width) < 0:
            raise ValueError("a cache entry has other fields")
        yield path, (tuple(stamp), Verdict(height, width, str(kind), str(detail)))


Source = str | Path
"""A picture, a list file (.txt), a folder (searched with its subfolders) or a glob."""
IMAGE_FOLDERS = frozenset({"images", "JPEGImages"})
"""Folders that have a folder `labels` beside them; the second is that of Pascal VOC."""
IGNORED = "ignored"
"""Folder beside `labels` with the boxes that are ignored: crowds and difficult objects."""
LARGEST_LIST = 1 << 28
LARGEST_LABEL = 1 << 24
"""Largest list and label file read, in bytes."""


@dataclass(frozen=True)
class Index:
    """The usable pictures of a data set, in the order of its source."""

    images: tuple[Path, ...]
    labels: tuple[NDArray[np.float32], ...]
    """For each picture [n, 5]: class, cx, cy, w, h; the last four as shares of the picture."""
    ignored: tuple[NDArray[np.float32], ...]
    """The same of the boxes that evaluation and training ignore."""
    shapes: NDArray[np.int64]
    """[N, 2], height and width of each picture as decoded."""
    report: Report
    max_pixels: int = MAX_PIXELS
    """Larger pictures are not decoded, should one have changed."""

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and labels; not of the folder that the pictures lie in, and not of their bytes."""
        digest = hashlib.sha256(np.ascontiguousarray(self.shapes).tobytes())
        for image, rows in zip(self.images, self.labels, strict=True):
            digest.update(os.fsencode(image.name) + b"\0" + rows.tobytes() + b"\0")
        for place, rows in enumerate(self.ignored):
            digest.update(b"ignored %d\0" % place + rows.tobytes() if len(rows) else b"")
        return digest.hexdigest()

    def subset(self, places: Sequence[int]) -> Index:
        """The same data set with some of its pictures only."""
        chosen = {
            name: tuple(getattr(self, name)[place] for place in places) for name in ("images", "labels", "ignored")
        }
        return replace(self, **chosen, shapes=self.shapes[list(places)])

    def single_class(self) -> Index:
        """The same data set with class 0 for every box."""
        labels, ignored = (
            tuple(np.concatenate([np.zeros_like(rows[:, :1]), rows[:, 1:]], 1) for rows in part)
            for part in (self.labels, self.ignored)
        )
        return replace(self, labels=labels, ignored=ignored)


def index(
    source: Source | Sequence[Source],
    names: Sequence[str],
    *,
    strict: bool = False,
    max_pixels: int = MAX_PIXELS,
    cache_dir: Path | Literal["default"] | None = "default",
    require: bool = True,
) -> Index:
    """Find and check the pictures and labels of a data set.

    The label file of a picture is told by `label_path`; if there is none, or an empty one, the picture is a background.
    Where `images` becomes `ignored` in place of `labels`, a file of the same kind may hold boxes that are ignored.

    Args:
        source: a picture, list file, folder or glob, or several of them. The paths in a list file are relative to the
            folder that it lies in.
        names: names of the classes; only their number matters here.
        strict: refuse the data set if anything but a background was found.
        max_pixels: larger pictures are refused before they are decoded.
        cache_dir: where verdicts on pictures are kept; "default" is the user's cache folder, None keeps nothing.
        require: refuse a data set without a usable picture.

    Raises:
        DataError: the source cannot be read; nothing usable is left; or `strict` and something was found.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    listed = [path for one in sources for path in list_images(one)]
    paths = list(dict.fromkeys(listed))
    findings = [Finding("listed twice", path, "used once") for path in _repeated(listed)]
    folder = default_folder() if cache_dir == "default" else cache_dir
    cache = VerdictCache(folder, "\n".join(os.path.abspath(one) for one in sources), max_pixels)
    images, labels, ignored, shapes = [], [], [], []
    for path, verdict in zip(paths, _verdicts(paths, cache, max_pixels), strict=True):
        if verdict.kind:
            findings.append(Finding(verdict.kind, path, verdict.detail))
            continue
        rows, found = _read_labels(label_path(path), len(names))
        passed, more = _read_ignored(path, len(names))
        found += more
        findings += found
        if all(KINDS[finding.kind] is not Effect.IMAGE for finding in found):
            images.append(Path(path))
            labels.append(rows)
            ignored.append(passed)
            shapes.append((verdict.height, verdict.width))
    backgrounds = sum(not len(rows) for rows in labels)
    counts = sum(map(len, labels)), tuple(findings), sum(map(len, ignored))
    report = Report(len(listed), len(images), backgrounds, *counts)
    _refuse(report, sources, strict=strict, require=require)
    sizes = np.array(shapes, np.int64).reshape(-1, 2)
    return Index(tuple(images), tuple(labels), tuple(ignored), sizes, report, max_pixels)


def list_images(source: Source) -> list[str]:
    """Paths of the pictures that one source names, as yet unchecked; a folder and a glob give them sorted.

    Raises:
        DataError: there is no such file or folder, or a list file cannot be read.
    """
    text = os.fspath(source)
    if os.path.isdir(text):
        return sorted(_walk(text))
    if not os.path.lexists(text) and glob.has_magic(text):
        return sorted(path for path in glob.iglob(text, recursive=True) if _is_picture_name(path))
    regular_file(text, DataError)
    return list(_read_list(text)) if text.lower().endswith(".txt") else [text]


def label_path(image: str, kind: str = "labels") -> str:
    """The label file of a picture: the same path with the suffix .txt and `kind` for the last folder `images`.

    `JPEGImages` counts as `images`. Where the path has neither, the label file lies beside the picture.
    """
    folder, name = os.path.split(image)
    parts = folder.split(os.sep)
    for place in reversed(range(len(parts))):
        if parts[place] in IMAGE_FOLDERS:
            parts[place] = kind
            break
    return os.path.join(os.sep.join(parts), os.path.splitext(name)[0] + ".txt")


def _walk(folder: str) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        yield from (os.path.join(parent, name) for name in names if _is_picture_name(name))


def _is_picture_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _read_list(path: str) -> Iterator[str]:
    """The paths in a list file. They may hold any byte but a line end; nothing in them is expanded."""
    size = os.path.getsize(path)
    if size > LARGEST_LIST:
        raise DataError(f"{path}: {size} bytes; a list file of at most {LARGEST_LIST} bytes was expected")
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as failure:
        raise DataError(f"{path}: {(failure.strerror or 'cannot be read').lower()}") from None
    if b"\0" in data:
        raise DataError(f"{path}: holds zero bytes; a list file is UTF-8 text with one path a line")
    folder = os.path.dirname(path)
    for line in data.splitlines():
        if line.strip():
            entry = os.path.join(folder, os.fsdecode(line))
            stripped = os.path.join(folder, os.fsdecode(line.strip()))
            yield os.path.normpath(entry if entry == stripped or os.path.exists(entry) else stripped)


def _repeated(listed: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [path for path in listed if path in seen or seen.add(path)]


def _verdicts(paths: Sequence[str], cache: VerdictCache, max_pixels: int) -> list[Verdict]:
    """One verdict a picture: from the cache where its stamp is unchanged, else by decoding it."""
    known = cache.load()
    stamps = {path: stamp(path) for path in paths}
    results: dict[str, tuple[Stamp | None, Verdict]] = {
        path: known[path] for path in paths if path in known and known[path][0] == stamps[path]
    }
    unknown = [path for path in paths if path not in results]
    with _quiet_opencv(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
        checked = pool.map(lambda path: _check(path, max_pixels), unknown)
        progress = tqdm(checked, "checking pictures", len(unknown), delay=2, disable=None)
        results |= {path: (stamps[path], verdict) for path, verdict in zip(unknown, progress, strict=True)}
    if unknown:
        cache.store({path: entry for path, entry in results.items() if entry[0] is not None})
    return [results[path][1] for path in paths]


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Without OpenCV's own log lines on damaged pictures: each of them is reported here, with its name."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def _check(path: str, max_pixels: int) -> Verdict:
    try:
        return Verdict(*check_image(path, max_pixels))
    except PictureError as failure:
        return Verdict(0, 0, failure.kind, str(failure).removeprefix(f"{path}: "))


def _read_labels(path: str, classes: int) -> tuple[NDArray[np.float32], list[Finding]]:
    """Boxes of one label file [n, 5], and what was found in it."""
    nothing = np.zeros((0, 5), np.float32)
    if not os.path.lexists(path):
        return nothing, [Finding("no label file", path)]
    try:
        size = regular_file(path, DataError).st_size
        if size > LARGEST_LABEL:
            return nothing, [Finding("unreadable label file", path, f"{size} bytes")]
        with open(path, "rb") as file:
            data = file.read()
    except (DataError, OSError) as failure:
        return nothing, [Finding("unreadable label file", path, str(failure).removeprefix(f"{path}: "))]
    if not data.strip():
        return nothing, [Finding("empty label file", path)]
    boxes, flaws = parse_labels(data, classes)
    return boxes, [Finding(flaw.kind, f"{path}:{flaw.line}", flaw.detail) for flaw in flaws]


def _read_ignored(image: str, classes: int) -> tuple[NDArray[np.float32], list[Finding]]:
    """Ignored boxes of a picture [n, 5], and what is wrong with them; a picture without a file has none."""
    path = label_path(image, IGNORED)
    if path == label_path(image) or not os.path.lexists(path):  # the first: labels lie beside the pictures
        return np.zeros((0, 5), np.float32), []
    rows, found = _read_labels(path, classes)
    return rows, [finding for finding in found if KINDS[finding.kind] is not Effect.NOTED]


def _refuse(report: Report, sources: Sequence[Source], *, strict: bool, require: bool) -> None:
    where = ", ".join(map(str, sources[:3])) + (", …" if len(sources) > 3 else "")
    flaws = report.flaws()
    counts = ", ".join(f"{count} {kind}" for kind, count in report.counts().items())
    if require and not report.usable:
        reason = f"found: {counts}" if counts else "it names no picture"
        raise DataError(f"{where}: none of {report.listed} images can be used; {reason}")
    if strict and flaws:
        first = flaws[0]
        raise DataError(
            f"{where}: {len(flaws)} flaws and --strict-data; the first is {first.place}: {first.kind}: {first.detail}"
        )
