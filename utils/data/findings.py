"""What was found in a data set: every flaw counted and named, in one summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

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
