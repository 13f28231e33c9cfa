"""Darknet cfg text ⇄ frozen blocks.

`parse(format_network(network)) == network` for every network that `parse` returns. Comments are not kept; keys the
suite does not use are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.cli import log, one_line
from utils.darknet import sections as lexer
from utils.darknet.blocks import Block, Net, Network, Shape
from utils.darknet.keys import (
    ALIASES,
    BY_BLOCK,
    BY_NAME,
    EVERYWHERE,
    FIXED_EVERYWHERE,
    NET,
    NET_NAMES,
    REQUIRED,
    UNSUPPORTED,
    Key,
    Place,
    SectionKind,
)
from utils.darknet.sections import Entry, Section
from utils.darknet.shapes import Trail, trace
from utils.darknet.validate import check_network
from utils.darknet.values import Fault, Number, nearest, shown
from utils.errors import CfgError
from utils.files import read_text

MAX_UNKNOWN_KEYS = 64
"""A file with more of them is no cfg."""


def load(path: Path | str, warn: Callable[[str], None] = log) -> Network:
    """Network of a cfg file.

    Args:
        path: a regular UTF-8 file.
        warn: gets one line for each note, e.g. on an unknown key that is kept.

    Raises:
        CfgError: the file cannot be read, or it is not the cfg of a detector this suite can run. The message is one
            line `FILE:LINE: what, value, what is allowed, way out`.
    """
    return parse(read_text(path, CfgError, lexer.MAX_BYTES), str(path), warn)


def parse(text: str, path: str = "<text>", warn: Callable[[str], None] = log) -> Network:
    """Network of a cfg text; like `load`, with `path` for the messages only."""
    return _Reader(one_line(path), warn).network(text, path)


def format_network(network: Network) -> str:
    """Text of a network: `[net]` and its blocks, keys in a fixed order, the kept ones last.

    Defaults are left out unless the reader of another program needs the key. Sums and nearby routes are written
    relative (`-3`), other routes absolute (`61`).
    """
    shapes = trace(network)
    inputs = [Shape(network.net.channels, network.net.height, network.net.width), *shapes]
    parts = [_format_block(network.net, Place(-1, inputs[0]))]
    for index, block in enumerate(network.blocks):
        parts.append(_format_block(block, Place(index, inputs[index])))
    return "\n".join(parts)


def _format_block(block: Block, place: Place) -> str:
    kind = BY_BLOCK[type(block)]
    values = kind.values(block, place)
    lines = [f"[{kind.name}]"]
    for key in kind.keys:
        value = values.get(key.name)
        if value is not None and not (key.optional and value == key.default):
            lines.append(f"{key.name}={key.kind.write(value)}")
    lines.extend(f"{key}={text}" for key, text in block.extra)
    return "\n".join(lines) + "\n"


class _Reader:
    """Reads one cfg; knows its name and collects what to warn of."""

    def __init__(self, path: str, warn: Callable[[str], None]) -> None:
        self.path = path
        self.warn = lambda text: warn(f"warning: {text}")
        self.unknown: list[str] = []

    def network(self, text: str, path: str) -> Network:
        """Network of the text; CfgError at the first thing that is wrong."""
        sections = lexer.read_sections(text, self.path, self.warn)
        section = sections[0]
        try:
            net = self.net(section)
            trail = Trail(Shape(net.channels, net.height, net.width))
            for section in sections[1:]:
                place = Place(len(trail.blocks), trail.before)
                trail.add(self.block(section, self.kind(section), place))
            network = Network(net, tuple(trail.blocks), path)
            check_network(network, trail.shapes)
        except Fault as fault:
            guilty = section if fault.block is None else sections[fault.block + 1]
            raise CfgError(self.message(fault, guilty)) from None
        if self.unknown:
            self.warn(f"{self.path}: unknown keys are kept and not used: {', '.join(self.unknown)}")
        return network

    def message(self, fault: Fault, section: Section) -> str:
        """One line for a fault: `FILE:LINE: [section] key=value: what is allowed`."""
        what = f"[{shown(section.name)}]"
        entry = section.entries.get(fault.key or "")
        if entry is None:
            return f"{self.path}:{section.line}: {what} {fault.key + ': ' if fault.key else ''}{fault}"
        return f"{self.path}:{entry.line}: {what} {shown(fault.key or '')}={shown(entry.text)}: {fault}"

    def net(self, section: Section) -> Net:
        """`[net]`, which must be the first section."""
        if section.name not in NET_NAMES:
            raise Fault("a cfg starts with [net], which gives width, height and channels")
        block = self.block(section, NET, Place(-1, Shape(0, 0, 0)))
        assert isinstance(block, Net)
        return block

    def kind(self, section: Section) -> SectionKind:
        """What kind of section it is; Fault when the suite has none of that name."""
        name = ALIASES.get(section.name, section.name)
        if name in BY_NAME:
            return BY_NAME[name]
        if name in NET_NAMES:
            raise Fault("only the first section is the input; delete this one")
        if name in UNSUPPORTED:
            raise Fault(f"this section is not supported; supported are {', '.join(BY_NAME)}")
        near = nearest(name.lower(), tuple(BY_NAME))
        raise Fault("no such section; " + (f"did you mean [{near}]?" if near else f"there are {', '.join(BY_NAME)}"))

    def block(self, section: Section, kind: SectionKind, place: Place) -> Block:
        """Block of a section."""
        extra = [(name, entry.text) for name, entry in section.entries.items() if self.is_extra(kind, section, name)]
        values = {key.name: self.value(section, kind, key) for key in kind.keys}
        return kind.block(extra=tuple(extra), line=section.line, **kind.fields(values, place))

    def value(self, section: Section, kind: SectionKind, key: Key) -> Any:
        """Value of a key, or its default."""
        entry = section.entries.get(key.name)
        if entry is not None:
            return self.read(section, key, entry)
        if key.default is REQUIRED:
            raise Fault(f"{key.name} is missing, and there is no default; add a line {key.name}=...")
        if key.told:
            default = key.kind.write(key.default)
            self.warn(f"{self.path}:{section.line}: [{section.name}] has no {key.name}; Darknet's default is {default}")
        return key.default

    def read(self, section: Section, key: Key, entry: Entry) -> Any:
        """Value of a key that is there."""
        where = f"{self.path}:{entry.line}: [{section.name}]"
        if key.name == "batch_normalize" and entry.text == "2":
            self.warn(f"{where} batch_normalize=2 (over several batches) is read as 1")
            return True
        if key.name == "nms_kind" and entry.text.lower() not in key.kind.words:
            self.warn(f"{where} nms_kind={shown(entry.text)} is read as default, as Darknet does")
            return key.default
        try:
            return key.kind.read(entry.text)
        except Fault as fault:
            raise Fault(str(fault), key.name) from None

    def is_extra(self, kind: SectionKind, section: Section, name: str) -> bool:
        """Whether a key is kept without being used; Fault when it must not be there."""
        if kind.key(name) is not None:
            return False
        if name in kind.silent or name in EVERYWHERE:
            return True
        if name in kind.fixed or name in FIXED_EVERYWHERE:
            self.check_fixed(section, name, kind.fixed[name] if name in kind.fixed else FIXED_EVERYWHERE[name])
            return True
        if near := nearest(name, kind.known):
            raise Fault(f"no such key; did you mean {near}?", name)
        line = section.entries[name].line
        self.unknown.append(f"[{shown(section.name)}] {shown(name)} (line {line})")
        if len(self.unknown) > MAX_UNKNOWN_KEYS:
            raise Fault(f"more than {MAX_UNKNOWN_KEYS} unknown keys; this is no Darknet cfg", name)
        return True

    def check_fixed(self, section: Section, name: str, allowed: float | None) -> None:
        """Fault when a key that changes the computation has a value this suite cannot compute."""
        if allowed is None:
            raise Fault("not supported; delete the key", name)
        try:
            value = Number().read(section.entries[name].text)
        except Fault as fault:
            raise Fault(str(fault), name) from None
        if value != allowed:
            raise Fault(f"not supported; only {allowed:g} is", name)
