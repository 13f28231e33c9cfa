"""How memory is taken from the system and given back; no torch."""

from __future__ import annotations

import ctypes
import os
import platform

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
