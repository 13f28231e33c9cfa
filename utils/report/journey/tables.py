"""The tables and documents in a run directory, each checked as it is read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from utils.errors import InputError
from utils.files import read_text
from utils.report.pruning_plots import LayerBar
from utils.report.run_dir import read_results

T = TypeVar("T")

LARGEST_FILE = 16 << 20
"""Largest text file of a run that is read, in bytes."""


@dataclass(frozen=True)
class Sqnr:
    """What quantization left of one convolution's signal."""

    block: str
    """Its number."""
    name: str
    bits: int | None
    """Of its weights."""
    activation_bits: int | None
    """Of its outputs."""
    decibels: float | None
    """None: nothing was changed."""
    alone: float | None
    """dB of the heads when it alone is rounded; None: not measured."""


def read_gammas(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """First and last row of gamma_histogram.csv; the top of the last bin is as far as the table goes."""
    if not path.is_file():
        return None
    columns = read_results(path)
    table = np.array([values for name, values in columns.items() if name != "epoch"]).T
    try:
        lower = [float(name) for name in columns if name != "epoch"]
    except ValueError:
        raise InputError(f"{path}:1: columns are named by the lower edges of the bins") from None
    if not len(table) or len(lower) < 3:
        return None
    return np.array([*lower, lower[-1] ** 2 / lower[-2]]), table[0], table[-1]


def read_bars(path: Path) -> tuple[LayerBar, ...]:
    """Rows of channels.csv."""

    def bar(row: Mapping[str, str]) -> LayerBar:
        chain = int(row["chain"]) if row["chain"] else None
        return LayerBar(int(row["block"]), int(row["before"]), int(row["after"]), chain, row["candidate"] == "1",
                        row["new_block"] == "")  # fmt: skip

    return tuple(_rows(path, bar))


def _rows(path: Path, read: Callable[[Mapping[str, str]], T]) -> Iterator[T]:
    """Every row of a CSV as `read` makes it of a mapping."""
    if not path.is_file():
        return
    for line, row in enumerate(csv.DictReader(io.StringIO(read_text(path, max_bytes=LARGEST_FILE))), 2):
        try:
            yield read(row)
        except (KeyError, TypeError, ValueError) as failure:
            raise InputError(f"{path}:{line}: not as this suite writes it ({failure})") from None


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path, max_bytes=LARGEST_FILE))
    except (ValueError, RecursionError) as failure:
        if isinstance(failure, InputError):
            raise
        raise InputError(f"{path}: no JSON ({failure})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON object was expected")
    return found


def read_yaml(path: Path) -> Mapping[str, Any]:
    """A YAML mapping; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(read_text(path, max_bytes=1 << 20))
    except (yaml.YAMLError, RecursionError) as failure:
        raise InputError(f"{path}: no YAML ({str(failure).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: flags and their values were expected")
    return found


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric and np.isfinite(value) else None


def integer(value: Any) -> int | None:
    """An integer; None for anything else."""
    return value if isinstance(value, int) else None
