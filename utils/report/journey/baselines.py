"""Cheap ways to a smaller or faster network that a compression has to beat: a smaller picture, a narrower net, PTQ."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import image_side
from utils.errors import InputError
from utils.files import read_text, regular_file
from utils.model_files import cfg_of

LARGEST_FILE = 16 << 20
KEYS = ("network", "map50", "map50_interval", "map50_95", "parameters", "macs", "ms")
"""Of a network in the document of `benchmarks.compare --json --time`."""


@dataclass(frozen=True)
class Baseline:
    """A network beside the journey."""

    name: str
    map50: float
    """0…1, as the other accuracies."""
    low: float
    """Ends of the interval of `map50`."""
    high: float
    map50_95: float
    parameters: int
    macs: int
    ms: float
    """Milliseconds of a picture."""
    size: tuple[int, int] | None = None
    """Height and width of the input."""


class Named(NamedTuple):
    """A network of the command line that is to be measured."""

    name: str
    file: str
    side: int | None
    """Of the network input; None: the network's own."""


def split(given: Sequence[str]) -> tuple[list[Path], list[Named]]:
    """Files of figures and networks to be measured, told apart by .json."""
    files = [Path(text) for text in given if text.endswith(".json")]
    return files, [named(text) for text in given if not text.endswith(".json")]


def named(text: str) -> Named:
    """`[NAME=]FILE[@SIDE]`; a path that exists is a path, whatever characters it has.

    Raises:
        InputError: no such file, or no side of an input.
    """
    name, _, rest = ("", "", text) if Path(text).exists() else text.rpartition("=")
    file, at, side = ("", "", rest) if Path(rest).exists() else rest.rpartition("@")
    found = Named(name or rest, file if at else rest, _side(text, side) if at else None)
    regular_file(found.file, InputError)
    if (cfg := cfg_of(Path(found.file))) is not None and not cfg.is_file():
        raise InputError(f"--baselines {text}: a Darknet .weights file does not say its network; {cfg} is not there")
    return found


def _side(text: str, side: str) -> int:
    try:
        return image_side(side)
    except argparse.ArgumentTypeError as failure:
        raise InputError(f"--baselines {text}: {failure}") from None


def read_baselines(path: Path) -> Iterator[Baseline]:
    """Networks in a document of `benchmarks.compare --json --time`.

    Raises:
        InputError: no such document, or without times.
    """
    try:
        document = json.loads(read_text(path, max_bytes=LARGEST_FILE))
        for row in document["networks"]:
            yield _baseline(row)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as failure:
        raise InputError(f"--baselines {path}: {type(failure).__name__}: {failure}; a document of `python -m "
                         f"benchmarks.compare --json --time` is wanted") from None  # fmt: skip


def _baseline(row: Mapping[str, Any]) -> Baseline:
    name, map50, (low, high), map50_95, parameters, macs, ms = (row[key] for key in KEYS)
    size = tuple(map(int, row["size"])) if row.get("size") else None
    numbers = map(float, (map50, low, high, map50_95))
    return Baseline(str(name), *numbers, int(parameters), int(macs), float(ms), size)
