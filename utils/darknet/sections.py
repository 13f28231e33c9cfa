"""Text of a cfg → its sections, with the line of every key. Knows nothing of what sections mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from utils.darknet.blocks.values import shown
from utils.errors import CfgError

MAX_BYTES = 2_000_000
"""Largest file that is looked at."""
MAX_CHARACTERS = 500_000
"""Largest cfg, ten times those of the Darknet repositories."""
MAX_LINES = 50_000
MAX_LINE = 16_384
"""Longest line, in characters."""
MAX_SECTIONS = 4096
"""Ten times the deepest networks in use."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_LONG = re.compile(rf"[^\n]{{{MAX_LINE + 1}}}")
_CONFLICT = re.compile(r"(<{7}|\|{7}|={7}|>{7})( |$)")


class Entry(NamedTuple):
    """Value of a key as written, and its line."""

    text: str
    line: int


@dataclass
class Section:
    """`[name]` and its keys, in file order."""

    name: str
    line: int
    entries: dict[str, Entry] = field(default_factory=dict)


def read_sections(text: str, path: str, warn: Callable[[str], None]) -> list[Section]:
    """Split a cfg into sections.

    Lines end in LF, CRLF or CR. `#` and `;` start comments anywhere. Blanks around names, `=` and values mean nothing.
    A key that is repeated with an equal value gives one warning.

    Raises:
        CfgError: a line that is none of section, `key=value`, comment and blank; a key repeated with another value;
            control characters; a file, line or number of sections over its cap.
    """
    lines = _lines(text, path)
    sections: list[Section] = []
    for number, raw in enumerate(lines[:MAX_LINES], 1):
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            sections.append(Section(_section_name(line, f"{path}:{number}"), number))
            if len(sections) > MAX_SECTIONS:
                raise CfgError(f"{path}:{number}: more than {MAX_SECTIONS} sections; no network is that deep")
            continue
        key, value = _key_value(line, f"{path}:{number}")
        if not sections:
            raise CfgError(f"{path}:{number}: {shown(key)} stands before any section; a cfg starts with [net]")
        _add(sections[-1], key, Entry(value, number), path, warn)
    if len(lines) > MAX_LINES:
        raise CfgError(f"{path}:{MAX_LINES + 1}: more than {MAX_LINES} lines; no network needs so many")
    if not sections:
        raise CfgError(f"{path}:1: no section in the file; a Darknet cfg starts with [net]")
    return sections


def _lines(text: str, path: str) -> list[str]:
    """Lines of a text that can be a cfg: not empty, not too large, no control characters."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise CfgError(f"{path}:1: the file is empty; a Darknet cfg starts with [net]")
    if match := _CONTROL.search(text):
        line, column = _position(text, match.start())
        context = text.split("\n", line)[line - 1][max(0, column - 20) : column + 20]
        raise CfgError(f"{path}:{line}: control character in {shown(context)}; a cfg is plain text")
    if match := _LONG.search(text):
        line, _ = _position(text, match.start())
        raise CfgError(f"{path}:{line}: more than {MAX_LINE} characters in a line; no value is that long")
    if len(text) > MAX_CHARACTERS:
        line, _ = _position(text, MAX_CHARACTERS)
        raise CfgError(f"{path}:{line}: more than {MAX_CHARACTERS} characters; no network needs so many")
    return text.split("\n")


def _position(text: str, offset: int) -> tuple[int, int]:
    """Line, counted from 1, and column, counted from 0."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset) - 1


def _uncommented(line: str) -> str:
    if "#" in line:
        line = line[: line.index("#")]
    if ";" in line:
        line = line[: line.index(";")]
    return line.rstrip()


def _section_name(line: str, where: str) -> str:
    name, bracket, rest = _uncommented(line)[1:].partition("]")
    if not bracket:
        raise CfgError(f"{where}: section {shown(line)} is not closed; write [{shown(name.strip()) or 'net'}]")
    if rest:
        raise CfgError(f"{where}: {shown(rest.strip())} after [{shown(name.strip())}]; a section has a line of its own")
    if not name.strip():
        raise CfgError(f"{where}: section {shown(line)} has no name; write e.g. [convolutional]")
    return name.strip()


def _key_value(line: str, where: str) -> tuple[str, str]:
    if _CONFLICT.match(line):
        raise CfgError(f"{where}: {shown(line)} is a merge conflict marker; resolve the conflict first")
    text = _uncommented(line)
    key, equals, value = text.partition("=")
    key, value = key.rstrip(), value.lstrip()
    if not equals:
        raise CfgError(f"{where}: {shown(text)} is neither [section] nor key=value; start comments with #")
    if not key:
        raise CfgError(f"{where}: no key before {shown(text)}; write key=value")
    if not value:
        raise CfgError(f"{where}: {shown(key)} has no value; write {shown(key)}=value or delete the line")
    if "=" in value:
        raise CfgError(f"{where}: {shown(text)} has more than one =; one key=value on a line")
    return key, value


def _add(section: Section, key: str, entry: Entry, path: str, warn: Callable[[str], None]) -> None:
    first = section.entries.setdefault(key, entry)
    if first is entry:
        return
    if first.text != entry.text:
        raise CfgError(
            f"{path}:{entry.line}: [{shown(section.name)}] {shown(key)}={shown(entry.text)}, "
            f"but line {first.line} says {shown(first.text)}; keep one of them"
        )
    warn(f"{path}:{entry.line}: [{shown(section.name)}] {shown(key)} is repeated (line {first.line} says the same)")
