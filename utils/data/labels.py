"""One label file: `class cx cy w h` a line, the box as shares of the picture's width and height."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = tuple[float, float, float, float, float]


class Flaw(NamedTuple):
    """What is wrong in one line of a label file."""

    kind: str
    """A key of `findings.KINDS`."""
    line: int
    detail: str


class Labels(NamedTuple):
    """What one label file says."""

    boxes: NDArray[np.float32]
    """[n, 5]: class, cx, cy, w, h, the last four in 0..1; the rows without a flaw."""
    flaws: tuple[Flaw, ...]


def parse_labels(data: bytes, classes: int) -> Labels:
    """Read the bytes of a label file; every line that cannot be used is named.

    A box may reach beyond the picture by its size, but its centre may not lie outside. Rows that say the same as an
    earlier row are duplicates.

    Args:
        data: the whole file; UTF-8 with or without a byte order mark.
        classes: number of classes; ids count from 0.
    """
    if b"\0" in data:
        return Labels(np.zeros((0, 5), np.float32), (Flaw("not a text file", 1, "holds zero bytes; UTF-16?"),))
    rows: dict[Row, int] = {}
    flaws = []
    for line, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        fields = text.split()
        if not fields:
            continue
        row = None if b"_" in text else _numbers(fields)  # Python would read 1_0 as 10
        kind, detail = _flaw(fields, row, classes)
        if kind is None and row in rows:
            kind, detail = "duplicate row", f"the same as line {rows[row]}"
        if kind is None:
            rows[row] = line
        else:
            flaws.append(Flaw(kind, line, detail))
    return Labels(np.array(list(rows), np.float32).reshape(-1, 5), tuple(flaws))


def _numbers(fields: list[bytes]) -> Row | None:
    """The fields as numbers, or None if one is none."""
    try:
        return tuple(map(float, fields))
    except ValueError:
        return None


def _flaw(fields: list[bytes], row: Row | None, classes: int) -> tuple[str | None, str]:
    """Kind and detail of what is wrong with one row; the kind is None if nothing is."""
    if len(fields) != 5:
        return "wrong column count", f"{len(fields)} columns; a row is: class cx cy w h"
    if row is None or not all(map(math.isfinite, row)):
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
