"""A report as one HTML page: no script, nothing from elsewhere, all text escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from utils import __version__
from utils.cli import one_line
from utils.report.journey.content import (
    Block,
    Code,
    Drawing,
    Folded,
    Headline,
    Pictures,
    Section,
    Table,
    Text,
)
from utils.report.tables import shown_cells

STYLE = "page.css"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page."""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    style = Path(__file__).with_name(STYLE).read_text(encoding="utf-8")
    names = [(f"s{number}", section) for number, section in enumerate(sections, 1)]
    contents = "".join(f'<li><a href="#{name}">{_text(section.title)}</a></li>' for name, section in names)
    body = "\n".join(line for name, section in names for line in _section(name, section))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p class="lead">{_text(lead)}</p>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>Written by python -m utils.report, version {_text(__version__)}.</p></footer>
</body>
</html>
"""


def _section(name: str, section: Section) -> Iterator[str]:
    yield f'<section id="{name}" aria-labelledby="{name}-title">'
    yield f'<h2 id="{name}-title">{_text(section.title)}</h2>'
    for block in section.blocks:
        yield from _block(block)
    yield "</section>"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Text(words):
            yield f"<p>{_text(words)}</p>"
        case Code(lines):
            yield f"<pre><code>{escape(chr(10).join(map(one_line, lines)))}</code></pre>"
        case Headline(cards):
            yield from _headline(cards)
        case Table():
            yield from _table(block)
        case Drawing():
            yield from _drawing(block)
        case Pictures():
            yield from _pictures(block)
        case Folded(title, blocks):
            inner = [line for each in blocks for line in _block(each)]
            yield from (f"<details><summary>{_text(title)}</summary>", *inner, "</details>")


def _headline(cards: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    yield '<dl class="cards">'
    for title, value, before in cards:
        shown = f"<strong>{_text(value)}</strong> <span>{_text(before)}</span>"
        yield f"<div><dt>{_text(title)}</dt><dd>{shown}</dd></div>"
    yield "</dl>"


def _drawing(drawing: Drawing) -> Iterator[str]:
    """A plot; where the page is narrow it is scrolled."""
    svg = drawing.svg.replace('aria-label=""', f'aria-label="{_text(drawing.words)}"', 1)
    svg = svg.replace('style="', f'style="min-width: {drawing.least_width}px; ', 1)
    caption = _text(drawing.caption)
    yield f"<figure>{_scrolled(caption)}{svg}</div><figcaption>{caption}</figcaption></figure>"


def _pictures(pictures: Pictures) -> Iterator[str]:
    yield f'<div class="pictures" tabindex="0" role="group" aria-label="{_text(pictures.title)}">'
    for data, words, caption in pictures.row:
        source = f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
        yield f'<figure><img src="{source}" alt="{_text(words)}">'
        yield f"<figcaption>{_text(caption)}</figcaption></figure>"
    yield "</div>"


def _table(table: Table) -> Iterator[str]:
    """Numbers to the right; the first cell of a row is its heading."""
    cells, numeric = shown_cells(table.columns, table.rows)
    kinds = [' class="n"' if right else "" for right in numeric]
    caption = _text(table.caption)
    yield _scrolled(caption)
    kind = ' class="wide"' if table.prose else ""
    yield f"<table{kind}><caption>{caption}</caption>"
    yield "<thead><tr>"
    for column, kind in zip(table.columns, kinds, strict=True):
        yield f'<th scope="col"{kind}>{_text(column.title)}</th>'
    yield "</tr></thead><tbody>"
    for first, *rest in cells:
        others = (f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        yield f'<tr><th scope="row"{kinds[0]}>{_text(first)}</th>{"".join(others)}</tr>'
    yield "</tbody></table></div>"


def _scrolled(name: str) -> str:
    """Start of what is scrolled sideways where it is too wide, by keyboard, too."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{name}">'


def _text(words: str) -> str:
    """Escaped for an element or an attribute, control characters shown."""
    return escape(one_line(words))
