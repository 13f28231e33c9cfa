"""What a report is made of, whatever it is written as: sections of texts, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.report.tables import Cell, Column


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str


@dataclass(frozen=True)
class Code:
    """A command, a line each."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row names it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Sequence[Cell], ...]
    prose: bool = False
    """Its cells are long texts, which are broken into lines."""


@dataclass(frozen=True)
class Headline:
    """The few numbers that matter."""

    cards: tuple[tuple[str, str, str], ...]
    """What it is, its value, and how it was before."""


@dataclass(frozen=True)
class Drawing:
    """A plot as <svg>, in colours that follow the page."""

    svg: str
    words: str
    """What is seen, for who does not see it."""
    caption: str
    least_width: int = 560
    """Pixels below which it is scrolled, not shrunk."""


@dataclass(frozen=True)
class Pictures:
    """Photographs side by side: JPEG bytes, what is seen, and a caption each."""

    title: str
    row: tuple[tuple[bytes, str, str], ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown when asked for."""

    title: str
    blocks: tuple[Block, ...]


Block = Text | Code | Table | Headline | Drawing | Pictures | Folded


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; without blocks it is left out."""

    title: str
    blocks: tuple[Block, ...]


def without_empty(caption: str, columns: Sequence[Column], lines: Sequence[Sequence[Cell]]) -> Table:
    """A table without the columns that no row has anything for."""
    used = [place for place in range(len(columns)) if any(line[place] is not None for line in lines)]
    rows = tuple(tuple(line[place] for place in used) for line in lines)
    return Table(caption, tuple(columns[place] for place in used), rows)
