"""A report as Markdown; plots and pictures are on the page only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from utils.cli import one_line
from utils.report.journey.content import Block, Code, Folded, Headline, Section, Table, Text
from utils.report.tables import markdown_table

_SPECIAL = re.compile(r"([\\`*_{}<>#~]|\](?=[(\[:]))")


def markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole document; a section that holds plots only is left out."""
    lines = [f"# {_plain(title)}", _plain(lead)]
    for section in sections:
        blocks = [text for block in section.blocks for text in _block(block, 3)]
        lines += [f"## {_plain(section.title)}", *blocks] if blocks else []
    return "\n\n".join(lines) + "\n"


def _block(block: Block, level: int) -> Iterator[str]:
    match block:
        case Text(words):
            yield _plain(words)
        case Code(lines):
            yield "\n".join(f"    {one_line(line)}" for line in lines)
        case Headline(cards):
            yield "\n".join(f"* {_plain(title)}: {_plain(value)} ({_plain(before)})" for title, value, before in cards)
        case Table():
            rows = [[_plain(cell) if isinstance(cell, str) else cell for cell in row] for row in block.rows]
            yield f"{_plain(block.caption)}:"
            yield markdown_table(block.columns, rows)
        case Folded(title, blocks):
            inner = [text for each in blocks for text in _block(each, level + 1)]
            if inner:
                yield f"{'#' * level} {_plain(title)}"
                yield from inner


def _plain(words: str) -> str:
    """Text that Markdown takes as it is."""
    return _SPECIAL.sub(r"\\\1", one_line(words))
