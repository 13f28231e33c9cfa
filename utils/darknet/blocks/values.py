"""Values of cfg keys: how each kind is read, checked and written.

Numbers are read by their own ASCII grammar, because `int()` and `float()` also take `1_000`, Arabic-Indic digits, `nan`
and `inf`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.cli import one_line

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
LARGEST_INT = 2**31 - 1
"""Darknet's own integers are C ints."""
LONGEST_LIST = 1000
"""Most entries of a list, e.g. of anchors."""


class SectionError(Exception):
    """What is wrong, without its place; whoever knows file and line makes a CfgError of it.

    Args:
        text: value, what is allowed, way out.
        key: the guilty key; None for the section itself.
        block: the guilty block when it is not the one being read.
    """

    def __init__(self, text: str, key: str | None = None, block: int | None = None) -> None:
        super().__init__(text)
        self.key = key
        self.block = block


class Kind:
    """A kind of value."""

    def read(self, text: str) -> Any:
        """Value of a text without surrounding blanks; SectionError says what is allowed."""
        raise NotImplementedError

    def write(self, value: Any) -> str:
        """Text that `read` turns into an equal value."""
        return str(value)


def shown(text: str) -> str:
    """Part of a file as it appears in a message: escaped, at most 60 characters."""
    return one_line(text if len(text) <= 60 else text[:57] + "...")


@dataclass(frozen=True)
class Integer(Kind):
    """A whole number in low..high."""

    low: int = 0
    high: int = LARGEST_INT

    def read(self, text: str) -> int:
        """Value, or what is allowed."""
        if _INTEGER.fullmatch(text) and self.low <= (value := int(text)) <= self.high:
            return value
        raise SectionError(f"a whole number in {self.low}..{self.high} is allowed")


@dataclass(frozen=True)
class Number(Kind):
    """A finite decimal number in low..high; with `above`, low itself is excluded."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def read(self, text: str) -> float:
        """Value, or what is allowed."""
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if self.low <= value <= self.high and math.isfinite(value) and not (self.above and value == self.low):
            return value
        raise SectionError(f"a number {self._range()} is allowed")

    def write(self, value: float) -> str:
        """Shortest text with the same value: 10, 0.07, 1e-05."""
        return repr(float(value)).removesuffix(".0")

    def _range(self) -> str:
        low = f"{'above' if self.above else 'of at least'} {self.low:g}"
        if self.high < math.inf:
            return f"{low} and at most {self.high:g}"
        return low if self.low > -math.inf else "that is finite"


@dataclass(frozen=True)
class Flag(Kind):
    """0 or 1; with `any_number`, any number above 0 is true, as in C."""

    any_number: bool = False

    def read(self, text: str) -> bool:
        """Value, or what is allowed."""
        if text in ("0", "1"):
            return text == "1"
        if self.any_number and _INTEGER.fullmatch(text) and int(text) >= 0:
            return int(text) > 0
        raise SectionError("0 or 1 is allowed")

    def write(self, value: bool) -> str:
        """0 or 1."""
        return str(int(value))


@dataclass(frozen=True)
class Choice(Kind):
    """One of some words, in any case; `aliases` are other words for them."""

    words: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def read(self, text: str) -> str:
        """Word, or what is allowed."""
        if text in self.words:
            return text
        word = self.aliases.get(text.lower(), text.lower())
        if word in self.words:
            return word
        near = nearest(word, self.words)
        raise SectionError(f"allowed are {', '.join(self.words)}" + (f"; did you mean {near}?" if near else ""))


@dataclass(frozen=True)
class List(Kind):
    """Values of one kind between commas."""

    kind: Kind
    longest: int = LONGEST_LIST

    def read(self, text: str) -> tuple[Any, ...]:
        """Values, or what is wrong with the first bad one."""
        entries = [entry.strip() for entry in text.split(",")]
        if len(entries) > self.longest:
            raise SectionError(f"{len(entries)} entries; at most {self.longest} are allowed")
        return tuple(self._entry(number, entry) for number, entry in enumerate(entries, 1))

    def write(self, values: tuple[Any, ...]) -> str:
        """Values between commas."""
        return ", ".join(self.kind.write(value) for value in values)

    def _entry(self, number: int, text: str) -> Any:
        if not text:
            raise SectionError(f"entry {number} is empty; write numbers between single commas")
        try:
            return self.kind.read(text)
        except SectionError as fault:
            raise SectionError(f"entry {number} ({shown(text)}): {fault}") from None


@dataclass(frozen=True)
class Pairs(Kind):
    """An even list of numbers, taken two by two."""

    numbers: List

    def read(self, text: str) -> tuple[tuple[float, float], ...]:
        """Pairs, or what is wrong."""
        values = self.numbers.read(text)
        if len(values) % 2:
            raise SectionError(f"{len(values)} numbers; pairs of width and height are allowed, so an even count")
        return tuple(zip(values[::2], values[1::2], strict=True))

    def write(self, pairs: tuple[tuple[float, float], ...]) -> str:
        """Pairs with more space between than within."""
        write = self.numbers.kind.write
        return ",  ".join(f"{write(width)},{write(height)}" for width, height in pairs)


@dataclass(frozen=True)
class Reference(Kind):
    """Where a block reads: -N counts back from the block itself, N is block N of the file (the first one is 0)."""

    allow_zero: bool = True
    """Darknet takes 0 as block 0, the PyTorch suites take it as the block itself."""

    def read(self, text: str) -> int:
        """Number as written, or what is allowed."""
        if text.startswith("+") or not _INTEGER.fullmatch(text):
            raise SectionError("-N (N blocks back) or a block number is allowed")
        if abs(int(text)) > LARGEST_INT:
            raise SectionError("no network has so many blocks")
        if int(text) == 0 and not self.allow_zero:
            raise SectionError("0 is block 0 for Darknet and the block itself for others; write -N to count back")
        return int(text)


COUNT = Integer(1, 65536)
"""Of channels and groups."""
SIZE = Integer(1, 1024)
"""Of kernels, strides, dilations."""
PADDING = Integer(0, 1024)
SOURCE = Reference(allow_zero=False)
LONGEST_READ = 256
"""Most blocks that one block reads."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is a letter or two off, or None."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.8)), None)
