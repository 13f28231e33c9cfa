"""How memory is taken from the system and given back, and many small values packed into little of it; no torch."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Lets PyTorch ask for pages of 2 MiB; read when torch allocates first."""
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let what is freed stay with the process for the next allocation, and come in large pages.

    glibc gives blocks of more than 32 MiB back to the system at once, and the next feature map of a training step pays
    for all its pages anew: a sixth to a quarter of the step. What is kept makes the peak a fifth to a third higher
    (`python -m benchmarks.ratios memory`). To be called before torch allocates. Whoever has set up glibc's allocator by
    its environment variables (MALLOC_*, GLIBC_TUNABLES) is not overruled.

    Returns:
        Whether it was done: with glibc only.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    os.environ.setdefault(LARGE_PAGES, "1")
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))


class Packed(Sequence[Any]):
    """Arrays of many pictures, one after the other in one array.

    A million Python objects would take more memory than their content, and workers would copy them: who reads an
    object changes its reference count, and so the page of memory that it lies in.
    """

    empty: NDArray[Any]
    """Array without rows, of the shape and type of all others."""

    def __init__(self, parts: Iterable[NDArray[Any]]) -> None:
        parts = list(parts)
        self.rows = np.concatenate([self.empty, *parts])
        """All of them."""
        self.bounds = np.cumsum([0, *map(len, parts)])
        """[N + 1]: start of each array in the rows, and the end of the last one."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, position: int) -> Any:  # type: ignore[override]  # no slices
        start, stop = self.bounds[range(len(self))[position] :][:2].tolist()
        return self.rows[start:stop]


class PackedBoxes(Packed):
    """Boxes [n, 5] of each picture."""

    empty = np.zeros((0, 5), np.float32)

    @property
    def counts(self) -> NDArray[np.int64]:
        """[N]: number of boxes of each picture."""
        return np.diff(self.bounds)

    def gather(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Copy of the boxes [n, 5] of some pictures, and for each box the number [n] of its picture among them."""
        starts = self.bounds[positions]
        counts = self.bounds[positions + 1] - starts
        owners = np.repeat(np.arange(len(positions)), counts)
        return self.rows[np.arange(len(owners)) + (starts + counts - np.cumsum(counts))[owners]], owners


class PackedPaths(Packed):
    """Path of each picture, as bytes."""

    empty = np.zeros(0, np.uint8)

    def __init__(self, paths: Iterable[Path | str]) -> None:
        super().__init__(np.frombuffer(os.fsencode(path), np.uint8) for path in paths)

    def __getitem__(self, position: int) -> Path:  # type: ignore[override]
        return Path(os.fsdecode(super().__getitem__(position).tobytes()))
