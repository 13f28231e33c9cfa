"""Darknet cfg text ⇄ frozen blocks.

`parse(format_network(network)) == network` for every network that `parse` returns. Comments are not kept; keys the
suite does not use are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import log, one_line
from utils.darknet.blocks import ALIASES, SECTIONS, UNSUPPORTED, Block, Net, Network, Shape
from utils.darknet.blocks.block import IMAGE, REQUIRED, Key, Position, Trail
from utils.darknet.blocks.values import Kind, Number, SectionError, nearest, shown
from utils.darknet.network import check_network, trace
from utils.errors import CfgError
from utils.files import read_text

MAX_BYTES = 500_000
"""Largest cfg; those of the Darknet repository have up to 31 000."""
MAX_SECTIONS = 4096
"""Ten times the deepest networks in use."""
MAX_UNKNOWN_KEYS = 64
"""A file with more of them is no cfg."""
NET_NAMES = ("net", "network")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_CONFLICT = re.compile(r"(<{7}|\|{7}|={7}|>{7})( |$)")


def load(path: Path | str, warn: Callable[[str], None] = log) -> Network:
    """Network of a cfg file.

    Args:
        path: a regular UTF-8 file.
        warn: gets one line for each note, e.g. on an unknown key that is kept.

    Raises:
        CfgError: the file cannot be read, or it is not the cfg of a detector this suite can run. The message is one
            line `FILE:LINE: what, value, what is allowed, way out`.
    """
    try:
        text = read_text(path, CfgError, MAX_BYTES)
    except CfgError as error:
        what = str(error).removeprefix(f"{path}: ")
        at_line_1 = what != str(error) and os.path.lexists(path)
        raise CfgError(one_line(f"{path}:1: {what}" if at_line_1 else str(error))) from None
    return parse(text, str(path), warn)


def parse(text: str, path: str = "<text>", warn: Callable[[str], None] = log) -> Network:
    """Network of a cfg text; like `load`, with `path` for the messages only."""
    return _Reader(path, warn).network(text)


def format_network(network: Network) -> str:
    """Text of a network: `[net]` and its blocks, keys in a fixed order, the kept ones last.

    Defaults are left out unless the reader of another program needs the key. Sums and nearby routes are written
    relative (`-3`), other routes absolute (`61`).

    Raises:
        CfgError: the blocks do not fit together.
    """
    channels = [network.net.channels, *(shape.channels for shape in trace(network))]
    positions = [Position(index, channels[max(0, index)]) for index in range(-1, len(network.blocks))]
    return "\n".join(map(_format_block, (network.net, *network.blocks), positions))


def _format_block(block: Block, position: Position) -> str:
    values = block.key_values(position)
    lines = [f"[{block.SECTION}]"]
    for name, key in block.KEYS.items():
        value = values.get(name)
        if value is not None and not (key.optional and value == key.default):
            lines.append(f"{name}={key.kind.write(value)}")
    lines.extend(f"{name}={text}" for name, text in block.extra)
    return "\n".join(lines) + "\n"


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
    """First value of each key, which is the one that Darknet takes (src/option_list.c, `option_find`)."""
    repeats: list[tuple[str, Entry]] = field(default_factory=list)
    """Further values."""


def read_sections(text: str, path: str) -> list[Section]:
    """Split a cfg into sections.

    Lines end in LF, CRLF or CR. `#` and `;` start comments anywhere. Blanks around names, `=` and values mean nothing.

    Raises:
        CfgError: a line that is none of section, `key=value`, comment and blank; control characters; a text or number
            of sections over its cap.
    """
    sections: list[Section] = []
    for number, raw in enumerate(_lines(text, path), 1):
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
        entry = Entry(value, number)
        if sections[-1].entries.setdefault(key, entry) is not entry:
            sections[-1].repeats.append((key, entry))
    if not sections:
        raise CfgError(f"{path}:1: no section in the file; a Darknet cfg starts with [net]")
    return sections


def _lines(text: str, path: str) -> list[str]:
    """Lines of a text that can be a cfg: not empty, not too large, no control characters."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise CfgError(f"{path}:1: the file is empty; a Darknet cfg starts with [net]")
    if len(text) > MAX_BYTES:
        raise CfgError(f"{path}:1: more than {MAX_BYTES} characters; no network needs so many")
    lines = text.split("\n")
    if match := _CONTROL.search(text):
        number = text.count("\n", 0, match.start())
        column = match.start() - text.rfind("\n", 0, match.start()) - 1
        context = lines[number][max(0, column - 20) : column + 20]
        raise CfgError(f"{path}:{number + 1}: control character in {shown(context)}; a cfg is plain text")
    return lines


def _uncommented(line: str) -> str:
    return re.split("[#;]", line, maxsplit=1)[0].rstrip()


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


def _same_value(kind: Kind, text: str, other: str) -> bool:
    """Whether two texts mean the same value; False if one of them means none."""
    try:
        return kind.read(text) == kind.read(other)
    except SectionError:
        return False


class _Reader:
    """Reads one cfg: knows its name and collects what to warn of.

    Its methods raise SectionError for what is wrong in the section they read; `network` adds the position.
    """

    def __init__(self, file: str, warn: Callable[[str], None]) -> None:
        self.file = file
        self.path = one_line(file)
        self.warn = lambda text: warn(f"warning: {text}")
        self.unknown: list[str] = []

    def network(self, text: str) -> Network:
        """Network of the text; CfgError at the first thing that is wrong."""
        first, *rest = every = read_sections(text, self.path)
        section = first
        try:
            if first.name not in NET_NAMES:
                raise SectionError("a cfg starts with [net], which gives width, height and channels")
            net = self.block(first, Net, Position(IMAGE, 0))
            trail = Trail(Shape(net.channels, net.height, net.width))
            for section in rest:
                position = Position(len(trail.blocks), trail.before.channels)
                trail.add(self.block(section, self.kind(section.name), position))
            network = Network(net, tuple(trail.blocks), self.file)
            check_network(network, trail.shapes)
        except SectionError as fault:
            raise CfgError(self.message(fault, section if fault.block is None else every[fault.block + 1])) from None
        if self.unknown:
            self.warn(f"{self.path}: unknown keys are kept, but not used: {', '.join(self.unknown)}")
        return network

    def message(self, fault: SectionError, section: Section) -> str:
        """One line for a fault: `FILE:LINE: [section] key=value: what is allowed`."""
        name, key = shown(section.name), shown(fault.key or "")
        entry = section.entries.get(fault.key or "")
        if entry is None:
            return f"{self.path}:{section.line}: [{name}] {key}{': ' * bool(key)}{fault}"
        return f"{self.path}:{entry.line}: [{name}] {key}={shown(entry.text)}: {fault}"

    def kind(self, name: str) -> type[Block]:
        """The kind of block that a section becomes."""
        name = ALIASES.get(name, name)
        if name in SECTIONS:
            return SECTIONS[name]
        if name in NET_NAMES:
            raise SectionError("the input is described once, by the first section; delete this one")
        if name in UNSUPPORTED:
            raise SectionError(f"this section is not supported; supported are {', '.join(SECTIONS)}")
        near = nearest(name.lower(), SECTIONS)
        hint = f"did you mean [{near}]?" if near else f"there are {', '.join(SECTIONS)}"
        raise SectionError(f"no such section; {hint}")

    def block(self, section: Section, kind: type[Block], position: Position) -> Any:
        """Block of a section."""
        for name, entry in section.repeats:
            self.check_repeat(section, kind, name, entry)
        extra = tuple((name, entry.text) for name, entry in section.entries.items() if name not in kind.KEYS)
        for name, _ in extra:
            self.check_extra(section, kind, name)
        values = {name: self.value(section, name, key) for name, key in kind.KEYS.items()}
        return kind.read(values | {"extra": extra, "line": section.line}, position)

    def check_repeat(self, section: Section, kind: type[Block], name: str, entry: Entry) -> None:
        """Note that the first value of a key is taken; refuse another one of a key that the suite uses."""
        first = section.entries[name]
        where = f"{self.path}:{entry.line}: [{shown(section.name)}] {shown(name)}"
        if entry.text == first.text:
            self.warn(f"{where} is repeated (line {first.line} says the same)")
        elif name in kind.KEYS and not _same_value(kind.KEYS[name].kind, entry.text, first.text):
            said = f"{where}={shown(entry.text)}, but line {first.line} says {shown(first.text)}"
            raise CfgError(f"{said}; keep one of them")
        else:
            self.warn(f"{where} is repeated; {shown(first.text)} of line {first.line} counts, as in Darknet")

    def value(self, section: Section, name: str, key: Key) -> Any:
        """Value of a key, or its default."""
        entry = section.entries.get(name)
        if entry is not None:
            return self.parsed(section, name, key, entry)
        if key.default is REQUIRED:
            raise SectionError(f"{name} is missing and has no default; add a line {name}=...")
        if key.told:
            default = key.kind.write(key.default)
            self.warn(f"{self.path}:{section.line}: [{section.name}] has no {name}; Darknet's default is {default}")
        return key.default

    def parsed(self, section: Section, name: str, key: Key, entry: Entry) -> Any:
        """Value of a key that is there."""
        try:
            return key.kind.read(entry.text)
        except SectionError as fault:
            where = f"{self.path}:{entry.line}: [{section.name}] {name}={shown(entry.text)}"
            if name == "batch_normalize" and entry.text == "2":
                self.warn(f"{where} (statistics over several batches) is read as 1")
                return True
            if name == "nms_kind":
                self.warn(f"{where} is read as default, as Darknet does; {fault}")
                return key.default
            raise SectionError(str(fault), name) from None

    def check_extra(self, section: Section, kind: type[Block], name: str) -> None:
        """Refuse a key that makes no field and must not be there; note a key nobody knows."""
        silent, fixed = kind.silent(), kind.fixed()
        if name in silent:
            return
        if name in fixed:
            self.check_fixed(section, name, fixed[name])
            return
        if near := nearest(name, silent | fixed.keys() | kind.KEYS.keys()):
            raise SectionError(f"no such key; did you mean {near}?", name)
        self.unknown.append(f"{shown(name)} of [{section.name}] in line {section.entries[name].line}")
        if len(self.unknown) > MAX_UNKNOWN_KEYS:
            raise SectionError(f"unknown key, and {MAX_UNKNOWN_KEYS} more before it; this is no Darknet cfg", name)

    def check_fixed(self, section: Section, name: str, allowed: float | None) -> None:
        """Refuse a key that changes the computation to one this suite does not have."""
        if allowed is None:
            raise SectionError("not supported, and without the key it is another network", name)
        try:
            supported = Number().read(section.entries[name].text) == allowed
        except SectionError:
            supported = False
        if not supported:
            raise SectionError(f"not supported; only {allowed:g} is", name)
