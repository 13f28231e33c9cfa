"""Darknet cfg text ⇄ frozen blocks.

`parse(format_network(network)) == network` for every network that `parse` returns. Comments are not kept; keys the
suite does not use are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from utils.cli import log, one_line
from utils.darknet import sections
from utils.darknet.blocks import Block, Net, Network, Shape
from utils.darknet.conversions import Place
from utils.darknet.keys import ALIASES, BY_BLOCK, BY_NAME, NET, NET_NAMES, REQUIRED, UNSUPPORTED, Key, SectionKind
from utils.darknet.sections import Entry, Section
from utils.darknet.shapes import Trail, trace
from utils.darknet.validate import check_network
from utils.darknet.values import Number, SectionError, nearest, shown
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
    try:
        text = read_text(path, CfgError, sections.MAX_BYTES)
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
    places = [Place(index, channels[max(0, index)]) for index in range(-1, len(network.blocks))]
    return "\n".join(map(_format_block, (network.net, *network.blocks), places))


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
    """Reads one cfg: knows its name and collects what to warn of.

    Its methods raise SectionError for what is wrong in the section they read; `network` adds the place.
    """

    def __init__(self, file: str, warn: Callable[[str], None]) -> None:
        self.file = file
        self.path = one_line(file)
        self.warn = lambda text: warn(f"warning: {text}")
        self.unknown: list[str] = []

    def network(self, text: str) -> Network:
        """Network of the text; CfgError at the first thing that is wrong."""
        first, *rest = every = sections.read_sections(text, self.path, self.warn)
        section = first
        try:
            net = self.net(first)
            trail = Trail(Shape(net.channels, net.height, net.width))
            for section in rest:
                trail.add(self.block(section, self.kind(section), Place(len(trail.blocks), trail.before.channels)))
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

    def net(self, section: Section) -> Net:
        """`[net]`, which must be the first section."""
        if section.name not in NET_NAMES:
            raise SectionError("a cfg starts with [net], which gives width, height and channels")
        return cast(Net, self.block(section, NET, Place(-1, 0)))

    def kind(self, section: Section) -> SectionKind:
        """What kind of section it is."""
        name = ALIASES.get(section.name, section.name)
        if name in BY_NAME:
            return BY_NAME[name]
        if name in NET_NAMES:
            raise SectionError("the input is described once, by the first section; delete this one")
        if name in UNSUPPORTED:
            raise SectionError(f"this section is not supported; supported are {', '.join(BY_NAME)}")
        near = nearest(name.lower(), BY_NAME)
        hint = f"did you mean [{near}]?" if near else f"there are {', '.join(BY_NAME)}"
        raise SectionError(f"no such section; {hint}")

    def block(self, section: Section, kind: SectionKind, place: Place) -> Block:
        """Block of a section."""
        extra = tuple((name, entry.text) for name, entry in section.entries.items() if name not in kind.used)
        for name, _ in extra:
            self.check_extra(section, kind, name)
        values = {key.name: self.value(section, key) for key in kind.keys}
        return kind.block(extra=extra, line=section.line, **kind.fields(values, place))

    def value(self, section: Section, key: Key) -> Any:
        """Value of a key, or its default."""
        entry = section.entries.get(key.name)
        if entry is not None:
            return self.read(section, key, entry)
        if key.default is REQUIRED:
            raise SectionError(f"{key.name} is missing and has no default; add a line {key.name}=...")
        if key.told:
            default = key.kind.write(key.default)
            self.warn(f"{self.path}:{section.line}: [{section.name}] has no {key.name}; Darknet's default is {default}")
        return key.default

    def read(self, section: Section, key: Key, entry: Entry) -> Any:
        """Value of a key that is there."""
        try:
            return key.kind.read(entry.text)
        except SectionError as fault:
            where = f"{self.path}:{entry.line}: [{section.name}] {key.name}={shown(entry.text)}"
            if key.name == "batch_normalize" and entry.text == "2":
                self.warn(f"{where} (statistics over several batches) is read as 1")
                return True
            if key.name == "nms_kind":
                self.warn(f"{where} is read as default, as Darknet does; {fault}")
                return key.default
            raise SectionError(str(fault), key.name) from None

    def check_extra(self, section: Section, kind: SectionKind, name: str) -> None:
        """Refuse a key that makes no field and must not be there; note a key nobody knows."""
        if name in kind.silent:
            return
        if name in kind.fixed:
            self.check_fixed(section, name, kind.fixed[name])
            return
        if near := nearest(name, kind.known):
            raise SectionError(f"no such key; did you mean {near}?", name)
        self.unknown.append(f"{shown(name)} of [{section.name}] in line {section.entries[name].line}")
        if len(self.unknown) > MAX_UNKNOWN_KEYS:
            raise SectionError(f"unknown key, and {MAX_UNKNOWN_KEYS} more before it; this is no Darknet cfg", name)

    def check_fixed(self, section: Section, name: str, allowed: float | None) -> None:
        """Refuse a key that changes the computation to one this suite does not have."""
        if allowed is None:
            raise SectionError("not supported; delete the key", name)
        try:
            supported = Number().read(section.entries[name].text) == allowed
        except SectionError:
            supported = False
        if not supported:
            raise SectionError(f"not supported; only {allowed:g} is", name)
