"""What becomes of freed memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from utils.memory import LARGE_PAGES

FAULTS = """
import resource
from utils.memory import keep_freed_memory
print(keep_freed_memory())
import numpy
for number in range(12):
    if number == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(64 << 20, numpy.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Page faults of ten arrays of 64 MiB, one after the other."""


def faults(root, **environment: str) -> tuple[str, int]:
    kept = {k: v for k, v in os.environ.items() if k != LARGE_PAGES and not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        cwd=root,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer, count = done.stdout.split()
    return answer, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is done with glibc only")
def test_memory_is_paid_for_once_unless_the_user_has_his_own_way(root):
    answer, count = faults(root)
    assert answer == "True"
    assert count < 100
    answer, usual = faults(root, MALLOC_PERTURB_="0")
    assert answer == "False"
    assert usual > 10 * max(1, count)
