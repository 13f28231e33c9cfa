"""Label files, and what was found in a data set: every flaw counted and named, in one summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.cli import one_line

EXAMPLES = 3
"""Files named for each kind in the summary."""


class Effect(Enum):
    """What follows from a finding."""

    NOTED = "used"
    """Nothing is wrong."""
    ROW = "row left out"
    IMAGE = "image left out"


KINDS: Mapping[str, Effect] = {
    "missing image": Effect.IMAGE,
    "not a file": Effect.IMAGE,
    "unreadable image": Effect.IMAGE,
    "empty image": Effect.IMAGE,
    "unknown image format": Effect.IMAGE,
    "oversized image": Effect.IMAGE,
    "damaged image": Effect.IMAGE,
    "listed twice": Effect.IMAGE,
    "no label file": Effect.NOTED,
    "empty label file": Effect.NOTED,
    "unreadable label file": Effect.IMAGE,
    "not a text file": Effect.IMAGE,
    "wrong column count": Effect.IMAGE,
    "not a number": Effect.IMAGE,
    "fractional class": Effect.IMAGE,
    "negative class": Effect.IMAGE,
    "class beyond names": Effect.IMAGE,
    "out of range": Effect.IMAGE,
    "negative size": Effect.IMAGE,
    "zero-size box": Effect.ROW,
    "duplicate row": Effect.ROW,
}
"""Every kind of finding. A label that says something else than it means leaves its image out: the picture without that
box would teach that there is nothing. A row that says nothing (zero size, said before) only leaves itself out."""


@dataclass(frozen=True)
class Finding:
    """One thing found in a data set."""

    kind: str
    """A key of `KINDS`."""
    place: str
    """File, or FILE:LINE."""
    detail: str = ""


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
        """Where findings of one kind are, in the order of the source."""
        return tuple(finding.place for finding in self.findings if finding.kind == kind)

    def counts(self) -> dict[str, int]:
        """How many findings there are of each kind that was found."""
        found = [finding.kind for finding in self.findings]
        return {kind: found.count(kind) for kind in KINDS if kind in found}

    def flaws(self) -> tuple[Finding, ...]:
        """The findings because of which an image or a row was left out."""
        return tuple(finding for finding in self.findings if KINDS[finding.kind] is not Effect.NOTED)

    def totals(self) -> str:
        """Line for people: how many images and boxes there are."""
        ignored = f"{self.ignored} ignored ones, " if self.ignored else ""
        return (
            f"{self.usable} of {self.listed} images usable, {self.boxes} boxes, {ignored}"
            f"{self.backgrounds} images without a box"
        )

    def summary(self) -> str:
        """Lines for people: the totals, then each kind with its count, its effect and the first places."""
        lines = [self.totals()]
        for kind, count in self.counts().items():
            places = self.places(kind)
            more = f" and {count - EXAMPLES} more" if count > EXAMPLES else ""
            names = ", ".join(one_line(place) for place in places[:EXAMPLES])
            lines.append(f"  {kind}: {count} ({KINDS[kind].value}): {names}{more}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The same for machines: totals, and `findings` {kind: [place, …]}."""
        findings = {kind: list(self.places(kind)) for kind in self.counts()}
        totals = {name: getattr(self, name) for name in ("listed", "usable", "backgrounds", "boxes", "ignored")}
        return {**totals, "findings": findings}


Row = tuple[float, float, float, float, float]


class Flaw(NamedTuple):
    """What is wrong in one line of a label file."""

    kind: str
    """A key of `labels.KINDS`."""
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
