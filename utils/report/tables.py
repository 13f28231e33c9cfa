"""Tables of results as aligned text, Markdown or CSV, from the same rows."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

from utils.cli import one_line

Cell: TypeAlias = str | int | float | None
"""None is shown as a dash."""


@dataclass(frozen=True)
class Column:
    """How one column is shown."""

    title: str
    spec: str = ".3f"
    """Format of the floats in it, e.g. `.1f`; integers get thousands apart, text stays as it is."""


def text_table(columns: Iterable[Column | str], rows: Iterable[Sequence[Cell]], gap: str = "  ") -> str:
    """Aligned plain text: titles, a rule, one line a row; numbers to the right, text to the left.

    Args:
        columns: a bare string is a Column with the default format.
        rows: as many cells each as there are columns.
        gap: what stands between two columns.

    Returns:
        lines without trailing blanks, joined by newlines, no newline at the end.
    """
    columns = _columns(columns)
    shown, numeric = shown_cells(columns, rows)
    lines = [[column.title for column in columns], *shown]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["─" * width for width in widths])
    return "\n".join(gap.join(map(_pad, line, widths, numeric)).rstrip() for line in lines)


def markdown_table(columns: Iterable[Column | str], rows: Iterable[Sequence[Cell]]) -> str:
    """The same table in Markdown, padded so that its source is readable, too."""
    columns = _columns(columns)
    shown, numeric = shown_cells(columns, rows)
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [[column.title for column in columns], *shown]]
    widths = [max(3, *map(_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)])
    return "\n".join("| " + " | ".join(map(_pad, line, widths, numeric)) + " |" for line in lines)


def csv_table(titles: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """CSV with a line of titles; cells as they are, None is an empty one."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([titles, *rows])
    return out.getvalue()


def _columns(columns: Iterable[Column | str]) -> list[Column]:
    return [column if isinstance(column, Column) else Column(column) for column in columns]


def shown_cells(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> tuple[list[list[str]], list[bool]]:
    """Cells as text, and for each column whether it holds nothing but numbers and dashes, and one number at least."""
    rows = list(rows)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {row!r} has {len(row)} cells; the table has {len(columns)} columns")
    shown = [[_text(cell, column.spec) for cell, column in zip(row, columns, strict=True)] for row in rows]
    numeric = [
        bool(cells) and not any(isinstance(cell, str) for cell in cells)
        for cells in ([row[place] for row in rows if row[place] is not None] for place in range(len(columns)))
    ]
    return shown, numeric


def _text(cell: Cell, spec: str) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return one_line(cell)
    return f"{cell:,}".replace(",", " ") if isinstance(cell, Integral) else format(cell, spec)


def _width(text: str) -> int:
    """Columns a terminal needs: none for combining marks, two for wide East Asian characters."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _pad(text: str, width: int, right: bool) -> str:
    blanks = " " * (width - _width(text))
    return blanks + text if right else text + blanks
