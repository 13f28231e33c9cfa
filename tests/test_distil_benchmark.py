"""The table of what a distillation costs."""

from __future__ import annotations

import pytest

from benchmarks import distil


def test_a_row_a_strategy_with_the_ratio_of_its_times(root, capsys):
    flags = ["--KDstr", "3", "cwd", "--AT_str", "2", "--img_size", "64", "--batch-size", "2", "--rounds", "2"]
    distil.main(["--cfg", str(root / "cfg/yolov4-tiny.cfg"), *flags])
    _, _, *lines, footer = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["--KDstr 3", "--KDstr cwd", "--AT_str 2"]
    for _, step, teacher, taught, ratio, _, _ in rows:
        assert float(ratio) == pytest.approx(float(taught) / (float(step) + float(teacher)), rel=0.02)
    assert [row[5] for row in rows][1] == "cwd"
    assert "64 × 64, batch 2" in footer and "seed 0" in footer


def test_without_a_strategy_all_are_measured():
    args = distil.parse_args([])
    assert args.KDstr == list(distil.KD) and args.AT_str == list(distil.AT)
    args = distil.parse_args(["--AT_str", "1"])
    assert args.KDstr == [] and args.AT_str == ["1"]
