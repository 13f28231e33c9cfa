"""Writer of a data set as train.py reads it: images/, labels/, ignored/, train.txt, val.txt, NAME.names, NAME.data."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from utils.data.annotations import Annotated, Box, Note, Picture
from utils.data.headers import HeaderError, picture_size
from utils.data.images import MAX_PIXELS, PictureError, Shrink, read_image
from utils.data.index import IGNORED
from utils.errors import DataError

HEAD = 1 << 16
"""Bytes in which the size of nearly every picture and its Exif block lie."""
DIGITS = 6
"""Decimals of a label: 0.01 pixel in a picture of 10 000."""
LEAST = 10.0**-DIGITS / 2
"""A box whose width or height is written as 0 has no area."""
CUT = 1.0
"""Pixels that a box may reach beyond its picture before that is said; it is cut in any case."""
_PLAIN_NAME = re.compile(r"[\w.+-]{1,80}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff/\\]")


@dataclass(frozen=True)
class Split:
    """How much of a split was written."""

    pictures: int
    boxes: int
    backgrounds: int
    """Pictures without a box."""
    ignored: int
    """Boxes that evaluation and training ignore; not among `boxes`."""


@dataclass(frozen=True)
class PictureSet:
    """A set on the disk."""

    data: Path
    """The .data file to train with."""
    names: tuple[str, ...]
    splits: Mapping[str, Split]
    """"train", and "val" if there is one."""
    notes: tuple[Note, ...]
    """What was left out or changed."""


def write_set(
    output: Path, annotated: Annotated, classes: Mapping[str, str], *, name: str | None = None, copy: bool = False
) -> PictureSet:
    """Write a data set into the folder `output`; what is converted is not touched.

    The set is made beside `output` and moved there in one step, so the folder holds all of it or nothing. Pictures are
    links to the originals, or copies.

    Args:
        output: new or empty.
        annotated: pictures and boxes.
        classes: name in `annotated` → name to be written, in the order of the class numbers; other boxes are left out.
        name: of the .names and .data file; the folder's by default.
        copy: copy the pictures.

    Raises:
        DataError: `output` holds something, no training picture is left, or a name cannot be written.
    """
    check_output(output)
    name = name or (output.name if _PLAIN_NAME.match(output.name) else "data")
    if not _PLAIN_NAME.match(name):
        raise DataError(f"--name {name!r}: letters, digits, '.', '_', '+' and '-' are allowed")
    for text in classes.values():
        if not text.strip() or text != text.strip() or re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text):
            raise DataError(f"class name {text!r}: a name is not empty, on one line and without blanks at its ends")
    notes = list(annotated.notes)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=output.parent) as scratch:
        folder = Path(scratch) / "set"
        writer = _Writer(folder, {own: number for number, own in enumerate(classes)}, copy, notes)
        splits = {"train": writer.split("train", annotated.folders[0], annotated.train)}
        if annotated.val is not None:
            splits["val"] = writer.split("val", annotated.folders[1], annotated.val)
        if not splits["train"].pictures:
            first = f"; the first: {notes[0].place}: {notes[0].kind}" if notes else ""
            raise DataError(f"none of {len(annotated.train)} training pictures can be used{first}")
        (folder / f"{name}.names").write_text("".join(f"{text}\n" for text in classes.values()), encoding="utf-8")
        lines = [f"classes={len(classes)}", "train=train.txt", f"names={name}.names"]
        lines[2:2] = ["valid=val.txt"] if "val" in splits else []
        (folder / f"{name}.data").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        try:
            os.rename(folder, output)  # replaces an empty folder, fails on any other
        except OSError as failure:
            raise DataError(f"{output}: {failure.strerror}; name a new folder with --output") from None
    return PictureSet(output / f"{name}.data", tuple(classes.values()), splits, tuple(notes))


def check_output(output: Path) -> None:
    """Raise DataError unless `output` is new or an empty folder."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise DataError(f"{output}: holds other files or is no folder; name a new folder with --output")


def shown_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as it is shown, by its header; with Exif data it is decoded to see if it is turned.

    Raises:
        PictureError: missing, no picture, or damaged.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        height, width = picture_size(head)
    except (OSError, ValueError, HeaderError):
        return _decoded_size(path, 1)  # names what is wrong, and reads headers of any length
    if b"Exif" not in head or height == width:
        return height, width
    rows, columns = _decoded_size(path, 8)
    if (rows > columns) == (rows < columns):  # so near a square that an eighth does not tell
        rows, columns = _decoded_size(path, 1)
    return (height, width) if (rows > columns) == (height > width) else (width, height)


def _decoded_size(path: Path, shrink: Shrink) -> tuple[int, int]:
    height, width = read_image(path, 1, MAX_PIXELS, shrink=shrink).shape[:2]
    return height, width


class _Writer:
    """Pictures, labels and lists of a set in the making."""

    def __init__(self, folder: Path, classes: Mapping[str, int], copy: bool, notes: list[Note]) -> None:
        self.folder, self.classes, self.copy, self.notes = folder, classes, copy, notes
        self.taken: set[tuple[str, str]] = set()
        """Split folders and lower-case stems that are in use: a.jpg and a.png would share a label file."""
        folder.mkdir()

    def split(self, name: str, part: str, pictures: Sequence[Picture]) -> Split:
        """Write one split into images/PART, labels/PART and, where boxes are ignored, ignored/PART; and its list."""
        for top in ("images", "labels"):
            (self.folder / top / part).mkdir(parents=True, exist_ok=True)
        entries, counts, ignored = [], [], 0
        seen: set[str] = set()
        for picture in tqdm(pictures, f"writing {name}", delay=2, disable=None):
            source = os.path.abspath(picture.path)
            if source in seen:
                self.notes.append(Note("picture listed twice, used once", str(picture.path)))
                continue
            seen.add(source)
            size = self._size(picture)
            if size is None:
                continue
            rows, passed = (self._rows(picture, size, ignored=kind) for kind in (False, True))
            target = self._target(part, picture.path)
            (self.folder / "labels" / part / f"{target.stem}.txt").write_text("".join(rows))
            if passed:
                (self.folder / IGNORED / part).mkdir(parents=True, exist_ok=True)
                (self.folder / IGNORED / part / f"{target.stem}.txt").write_text("".join(passed))
            self._place(source, self.folder / "images" / part / target)
            entries.append(f"images/{part}/{target}\n")
            counts.append(len(rows))
            ignored += len(passed)
        (self.folder / f"{name}.txt").write_bytes(os.fsencode("".join(entries)))
        return Split(len(counts), sum(counts), counts.count(0), ignored)

    def _size(self, picture: Picture) -> tuple[int, int] | None:
        """Size of a picture; None if it cannot be used, which is noted."""
        try:
            size = shown_size(picture.path)
        except PictureError as failure:
            kind = "not found" if failure.kind == "missing image" else "cannot be read"
            self.notes.append(Note(f"picture {kind}, left out", str(picture.path)))
            return None
        if picture.size not in (None, size):
            self.notes.append(Note("picture of another size than annotated, left out", picture.place))
            return None
        return size

    def _rows(self, picture: Picture, size: tuple[int, int], *, ignored: bool) -> list[str]:
        """Lines of the label file, or of the one of ignored boxes; each box is cut to the picture."""
        rows: dict[str, None] = {}
        for box in (box for box in picture.boxes if box.ignored is ignored):
            if box.name not in self.classes:
                self.notes.append(Note("class not in --names, box left out", f"{picture.place}: {box.name}"))
                continue
            shares, beyond = _shares(box, size)
            if min(shares[2:]) < LEAST:
                self.notes.append(Note("box without an area, left out", f"{picture.place}: {box.name}"))
                continue
            if beyond > CUT:
                self.notes.append(Note("box beyond the picture, cut", f"{picture.place}: {box.name}"))
            row = f"{self.classes[box.name]} " + " ".join(f"{share:.{DIGITS}f}" for share in shares) + "\n"
            if row in rows:
                self.notes.append(Note("same box twice, used once", f"{picture.place}: {box.name}"))
            rows[row] = None
        return list(rows)

    def _target(self, part: str, source: Path) -> Path:
        """File name of a picture in the set: its own, without control characters and numbered where it is taken."""
        stem, suffix = _CONTROL.sub("_", source.stem).strip() or "picture", _CONTROL.sub("_", source.suffix)
        name, number = stem, 1
        while (part, name.lower()) in self.taken:
            number += 1
            name = f"{stem}-{number}"
        self.taken.add((part, name.lower()))
        return Path(name + suffix)

    def _place(self, source: str, target: Path) -> None:
        if self.copy:
            shutil.copyfile(source, target)
            return
        try:
            os.symlink(source, target)
        except OSError as failure:
            raise DataError(f"{target.name}: no link can be made ({failure.strerror}); copy with --copy") from None


def _shares(box: Box, size: tuple[int, int]) -> tuple[tuple[float, float, float, float], float]:
    """A box cut to a picture of `size` (height, width) as cx, cy, w, h in shares of it, and the pixels cut off."""
    height, width = size
    x1, x2 = (min(max(x, 0.0), float(width)) for x in (box.x1, box.x2))
    y1, y2 = (min(max(y, 0.0), float(height)) for y in (box.y1, box.y2))
    beyond = max(x1 - box.x1, y1 - box.y1, box.x2 - x2, box.y2 - y2)
    return ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height), beyond
