"""What an annotated data set says, whatever its format: pictures with boxes in pixels, and what was left out.

A reader makes an `Annotated` of a format; `picture_set.write_set` makes label files and lists of any `Annotated`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.cli import one_line
from utils.errors import DataError, InputError

EXAMPLES = 3
"""Places named for each kind of note."""


class Box(NamedTuple):
    """One object. x runs from 0 at the outer edge of the first pixel to the picture's width at that of the last."""

    name: str
    """Its class."""
    x1: float
    y1: float
    x2: float
    y2: float
    ignored: bool = False
    """A crowd or a difficult object: what is detected in it is neither right nor wrong."""


class Note(NamedTuple):
    """One thing that was left out or changed on the way."""

    kind: str
    place: str
    """File, or FILE:LINE."""


@dataclass(frozen=True)
class Picture:
    """A picture and its objects."""

    path: Path
    size: tuple[int, int] | None
    """Height and width as annotated; None if the annotation does not say."""
    boxes: tuple[Box, ...]
    place: str
    """Where the annotation is."""


@dataclass(frozen=True)
class Annotated:
    """A whole data set."""

    train: tuple[Picture, ...]
    val: tuple[Picture, ...] | None
    """None if the set has no such split."""
    names: tuple[str, ...] | None = None
    """Classes in the order of the format; None if it has none, and they are sorted."""
    notes: tuple[Note, ...] = ()
    folders: tuple[str, str] = ("train", "val")
    """Folders of the two splits below images/ and labels/."""

    def used_names(self) -> tuple[str, ...]:
        """Classes in the order of the format, or those of all boxes, sorted."""
        found = {box.name for picture in (*self.train, *(self.val or ())) for box in picture.boxes}
        return tuple(sorted(found)) if self.names is None else self.names


def with_split(annotated: Annotated, share: float, seed: int) -> Annotated:
    """A share of the training pictures, drawn at random, as the validation pictures.

    Args:
        annotated: without validation pictures.
        share: 0 < share < 1; at least one picture stays on either side.
        seed: another one draws another split.

    Raises:
        InputError: there are fewer than two pictures.
    """
    count = len(annotated.train)
    if count < 2:
        raise InputError(f"--val-share {share}: {count} pictures cannot be split; at least 2 are needed")
    order = np.random.default_rng(seed).permutation(count).tolist()
    drawn = set(order[: min(count - 1, max(1, round(count * share)))])
    parts = [tuple(p for at, p in enumerate(annotated.train) if (at in drawn) is wanted) for wanted in (False, True)]
    return replace(annotated, train=parts[0], val=parts[1], folders=(annotated.folders[0], "val"))


def selected_names(own: Sequence[str], wanted: Sequence[str], path: str, *, ordered: bool) -> dict[str, str]:
    """Own name of a class → its name in the result, for the classes that a `--names` file wants.

    Names that are all among the set's own select classes, in the order of the file. A file of as many names as an
    ordered set has classes may call them otherwise, as Darknet's coco.names does (`motorbike` for `motorcycle`).

    Args:
        own: classes of the data set.
        wanted: names of the file, in the order of the class numbers.
        path: the file, for messages.
        ordered: the order of `own` is that of the format.

    Raises:
        DataError: a name is said twice, or is none of the set's.
    """
    if len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if list(wanted).count(name) > 1)
        raise DataError(f"{path}: the name {twice!r} is there twice; every class needs a name of its own")
    strange = [name for name in wanted if name not in own]
    if not strange or not ordered:
        return {name: name for name in wanted}
    pairs = list(zip(own, wanted, strict=False))
    if len(own) == len(wanted) and all(name == mine or name not in own for mine, name in pairs):
        return dict(pairs)
    raise DataError(f"{path}: {strange[0]!r} is no class of the data set, which has: {', '.join(own)[:300]}")


def note_lines(notes: Iterable[Note]) -> list[str]:
    """A line for each kind of note, in order of appearance, with its count and the first places."""
    places: dict[str, list[str]] = {}
    for note in notes:
        places.setdefault(note.kind, []).append(note.place)
    return [f"  {kind}: {len(found)}: {first_places(found)}" for kind, found in places.items()]


def first_places(places: Sequence[str]) -> str:
    """The first places, and how many more there are."""
    more = f" and {len(places) - EXAMPLES} more" if len(places) > EXAMPLES else ""
    return ", ".join(map(one_line, places[:EXAMPLES])) + more
