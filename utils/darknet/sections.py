"""Text of a cfg → its sections, with the line of every key. Knows nothing of what sections mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from utils.cli import one_line
from utils.darknet.values import shown
from utils.errors import CfgError

MAX_BYTES = 2_000_000
"""Largest cfg; the largest in the Darknet repositories have 40 kB."""
MAX_LINES = 100_000
MAX_LINE = 16_384
"""Longest line, in characters."""
MAX_SECTIONS = 4096
"""Ten times the deepest networks in use."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
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
    for number, raw in enumerate(lines, 1):
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
    if not sections:
        raise CfgError(f"{path}:1: no section in the file; a Darknet cfg starts with [net]")
    return sections


def _lines(text: str, path: str) -> list[str]:
    if len(text) > MAX_BYTES:
        raise CfgError(f"{path}:1: {len(text)} characters; a cfg has at most {MAX_BYTES}")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise CfgError(f"{path}:1: the file is empty; a Darknet cfg starts with [net]")
    if text.count("\n") > MAX_LINES:
        raise CfgError(f"{path}:{MAX_LINES + 1}: a cfg has at most {MAX_LINES} lines")
    if match := _CONTROL.search(text):
        line = text.count("\n", 0, match.start()) + 1
        start = text.rfind("\n", 0, match.start()) + 1
        where = shown(text[max(start, match.start() - 20) : match.end() + 20].partition("\n")[0])
        raise CfgError(f"{path}:{line}: control character {one_line(match[0])} in {where!s}; a cfg is plain text")
    lines = text.split("\n")
    if max(map(len, lines)) > MAX_LINE:
        number, long = next((i, line) for i, line in enumerate(lines, 1) if len(line) > MAX_LINE)
        raise CfgError(f"{path}:{number}: a line of {len(long)} characters; at most {MAX_LINE} are allowed")
    return lines


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
