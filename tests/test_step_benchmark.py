"""The benchmarks of a training step."""

from __future__ import annotations

import argparse

from benchmarks import memory, step
from tests.nets import TINY


def test_every_part_of_a_step_can_be_measured(tmp_path):
    (tmp_path / "n.cfg").write_text(TINY)
    args = argparse.Namespace(img_size=64, batch_size=2, rounds=1)
    stack, model, whole, *ratios = step.measure(str(tmp_path / "n.cfg"), args)
    assert min(stack, model, whole) > 0
    assert ratios == [model / stack, whole / stack]


def test_one_process_tells_its_step_and_its_peak(tmp_path):
    (tmp_path / "n.cfg").write_text(TINY)
    milliseconds, peak = memory.measure(memory.parse_args(
        ["--one", "--cfg", str(tmp_path / "n.cfg"), "--img_size", "64", "--batch-size", "2", "--steps", "2"]
    ))  # fmt: skip
    assert milliseconds > 0
    assert peak > 50
