"""Label files, one `class cx cy w h` a line, and the table of all that can be wrong with a data set."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.cli import one_line
from utils.errors import DataError
from utils.files import regular_file

Boxes = NDArray[np.float32]
"""[n, 5]: class, cx, cy, w, h; the last four as shares of the picture's width and height, 0..1."""
Severity = Literal["fatal", "warning", "note"]
EFFECTS: Mapping[Severity, str] = {"fatal": "image left out", "warning": "left out", "note": "used"}
"""Severities from the worst, and the effect on what was found."""
EXAMPLES = 3
"""Places named for each kind of finding."""
LARGEST_LABEL = 1 << 24
"""Largest label file read, in bytes."""
DIGITS = 6
"""Decimals of a label that is written: 0.01 pixel in a picture of 10 000."""
TWIN_IOU = 0.95
"""Two boxes of a class that overlap by more are one object labelled twice."""
LONG = 4.0
"""Ratio of the sides of a picture from which a letterbox leaves less than a quarter of the input to it."""


class Advice(NamedTuple):
    """Severity of a kind of finding, and the way out as a text."""

    severity: Severity
    text: str


_WRONG_LABEL = "correct the line: a wrong label leaves its whole picture out"
_BAD_PICTURE = "save or fetch the picture again, or take it off the list"
KINDS: Mapping[str, Advice] = {
    "wrong path": Advice("fatal", "paths are relative to the file that names them"),
    "no pictures": Advice("fatal", "name pictures in the list, folder or pattern"),
    "nothing usable": Advice("fatal", "correct what is found below"),
    "no boxes": Advice("fatal", "labels lie in `labels` beside `images`, one .txt a picture"),
    "same file in train and val": Advice("fatal", "take it off one list: results on it say nothing"),
    "identical pictures in train and val": Advice("fatal", "take one off its list: results on it say nothing"),
    "missing image": Advice("fatal", "paths in a list are relative to the list"),
    "not a file": Advice("fatal", "take it off the list"),
    "unreadable image": Advice("fatal", "look at the file's permissions"),
    "empty image": Advice("fatal", _BAD_PICTURE),
    "unknown image format": Advice("fatal", "save it as PNG, JPEG, BMP, WebP, GIF or TIFF"),
    "oversized image": Advice("fatal", "scale it down"),
    "damaged image": Advice("fatal", _BAD_PICTURE),
    "unreadable label file": Advice("fatal", "look at the file's permissions and size"),
    "not a text file": Advice("fatal", "save it as UTF-8"),
    "wrong column count": Advice("fatal", _WRONG_LABEL),
    "not a number": Advice("fatal", _WRONG_LABEL),
    "fractional class": Advice("fatal", _WRONG_LABEL),
    "negative class": Advice("fatal", "classes count from 0"),
    "class beyond names": Advice("fatal", "add the name, or correct the class; classes count from 0"),
    "out of range": Advice("fatal", "boxes are shares of the picture, 0..1, not pixels"),
    "negative size": Advice("fatal", _WRONG_LABEL),
    "listed twice": Advice("warning", "it is used once"),
    "zero-size box": Advice("warning", "the row is left out"),
    "duplicate row": Advice("warning", "the second is left out"),
    "no validation pictures": Advice("warning", "nothing is evaluated, and best.pt is the last epoch"),
    "identical pictures in one split": Advice("warning", "they count twice; take one off the list"),
    "most label files missing": Advice("warning", "these pictures teach that nothing is there; look where labels lie"),
    "class without a box in train": Advice("warning", "it cannot be learnt"),
    "class without a box in val": Advice("warning", "it is not measured; mAP is the mean over the others"),
    "object labelled twice": Advice("warning", f"boxes of a class that overlap by more than {TWIN_IOU:g}; delete one"),
    "box beyond the picture": Advice("warning", "it is cut to the picture; look whether boxes are of another size"),
    "many boxes smaller than a cell": Advice("warning", "train at a larger --img_size, or with a head of finer stride"),
    "anchors do not fit": Advice("warning", "train.py --auto-anchors clusters them again"),
    "very long picture": Advice("warning", f"sides over {LONG:g} : 1; cut it, or most of the input is border"),
    "boxes smaller than a cell": Advice("note", "expect to miss them"),
    "other class count": Advice("note", "train.py adapts the heads"),
    "no label file": Advice("note", "a picture without objects"),
    "empty label file": Advice("note", "a picture without objects"),
}
"""Every kind of finding of `index` and of the doctor, the worst first.

A label that says something else than it means is fatal to its image: the picture without that box would teach that
there is nothing. A row that says nothing (zero size, a duplicate) only leaves itself out.
"""


@dataclass(frozen=True)
class Finding:
    """Something found in a data set."""

    kind: str
    """A key of `KINDS`."""
    place: str
    """File, or FILE:LINE."""
    detail: str = ""

    @property
    def severity(self) -> Severity:
        """Severity of its kind."""
        return KINDS[self.kind].severity


@dataclass(frozen=True)
class Report:
    """All that was found when a data set was indexed."""

    listed: int
    """Images that the source names, duplicates included."""
    usable: int
    backgrounds: int
    """Usable images without a box."""
    boxes: int
    """Boxes in the usable images."""
    findings: tuple[Finding, ...]
    ignored: int = 0
    """Ignored boxes in the usable images."""

    def places(self, kind: str) -> tuple[str, ...]:
        """Places of the findings of one kind, in the order of the source."""
        return tuple(finding.place for finding in self.findings if finding.kind == kind)

    def counts(self) -> dict[str, int]:
        """Number of findings of each kind that occurs."""
        kinds = [finding.kind for finding in self.findings]
        return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}

    def flaws(self) -> tuple[Finding, ...]:
        """The findings because of which an image or a row was left out."""
        return tuple(finding for finding in self.findings if finding.severity != "note")

    def summary(self) -> str:
        """Lines for people: the totals, then each kind with its count, its effect and the first places."""
        lines = [totals(vars(self))]
        for kind, count in self.counts().items():
            effect = EFFECTS[KINDS[kind].severity]
            lines.append(f"  {kind}: {count} ({effect}): {first_places(self.places(kind))}")
        return "\n".join(lines)


def totals(counts: Mapping[str, Any]) -> str:
    """Line for people on how many images and boxes there are; takes the fields of a `Report`."""
    ignored = f"{counts['ignored']} ignored ones, " if counts["ignored"] else ""
    return (
        f"{counts['usable']} of {counts['listed']} images usable, {counts['boxes']} boxes, {ignored}"
        f"{counts['backgrounds']} images without a box"
    )


def first_places(places: Sequence[str]) -> str:
    """The first places, and how many more there are."""
    more = f" and {len(places) - EXAMPLES} more" if len(places) > EXAMPLES else ""
    return ", ".join(map(one_line, places[:EXAMPLES])) + more


def read_labels(path: str, classes: int) -> tuple[Boxes, list[Finding]]:
    """Boxes of one label file, and what was found in it."""
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
    if b"\0" in data:
        return np.zeros((0, 5), np.float32), [Finding("not a text file", f"{path}:1", "holds zero bytes; UTF-16?")]
    lines: dict[tuple[float, ...], int] = {}
    findings = []
    for number, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not text.strip():
            continue
        row = _numbers(text)
        kind, detail = _flaw(text, row, classes)
        if kind is None and row in lines:
            kind, detail = "duplicate row", f"the same as line {lines[row]}"
        if kind is None:
            assert row is not None  # its kind would be "not a number"
            lines[row] = number
        else:
            findings.append(Finding(kind, f"{path}:{number}", detail))
    return np.array(list(lines), np.float32).reshape(-1, 5), findings


def _numbers(text: bytes) -> tuple[float, ...] | None:
    """The fields of a line as finite numbers, or None if one is none."""
    try:
        row = tuple(map(float, text.split()))
    except ValueError:
        return None
    return row if all(map(math.isfinite, row)) and b"_" not in text else None  # Python would read 1_0 as 10


def _flaw(text: bytes, row: tuple[float, ...] | None, classes: int) -> tuple[str | None, str]:
    """Kind and detail of what is wrong with one row; the kind is None if nothing is."""
    fields = text.split()
    if len(fields) != 5:
        return "wrong column count", f"{len(fields)} columns; a row is: class cx cy w h"
    if row is None:
        return "not a number", f"{b' '.join(fields)[:60]!r}"
    index, cx, cy, width, height = row
    if index != int(index):
        return "fractional class", f"class {index}; classes are whole numbers"
    if index < 0:
        return "negative class", f"class {index:g}; classes are 0..{classes - 1}"
    if index >= classes:
        return "class beyond names", f"class {index:g}; the {classes} names have the classes 0..{classes - 1}"
    if width < 0 or height < 0:
        return "negative size", f"a box of {width} x {height}"
    if not (0 <= cx <= 1 and 0 <= cy <= 1 and width <= 1 and height <= 1):
        return "out of range", f"{cx} {cy} {width} {height}; a box is given as shares of the picture, 0..1"
    if width == 0 or height == 0:
        return "zero-size box", f"a box of {width} x {height}"
    return None, ""


def label_line(number: int, shares: Sequence[float]) -> str:
    """Line of a label file: a class, and cx, cy, w, h as shares of the picture; in files of detections, confidence."""
    return f"{number} " + " ".join(f"{share:.{DIGITS}f}" for share in shares) + "\n"


def write_data_file(folder: Path, name: str, names: Sequence[str], *, valid: bool) -> None:
    """Write NAME.names, and NAME.data with the lists train.txt and, if `valid`, val.txt.

    Args:
        folder: of the data set.
        name: of both files.
        names: of the classes.
        valid: there is a list of validation pictures.
    """
    (folder / f"{name}.names").write_text("".join(f"{text}\n" for text in names), encoding="utf-8")
    lines = [f"classes={len(names)}", "train=train.txt", *(["valid=val.txt"] if valid else []), f"names={name}.names"]
    (folder / f"{name}.data").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
