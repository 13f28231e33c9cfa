"""The ratios of docs/training.md."""

from __future__ import annotations

import json

import pytest

from benchmarks import ratios, step
from tests.nets import TINY


@pytest.fixture
def settings(tmp_path):
    """One round on a small network."""
    (tmp_path / "n.cfg").write_text(TINY)
    return ratios.Settings((str(tmp_path / "n.cfg"),), 64, 2, 1)


PARTS = {
    "step": ["bare stack", "model + loss", "step"],
    "distil": ["step + teacher", "--KDstr 1"],
    "loader": ["imread + resize", "mosaic, decoded each time", "mosaic, cached", "mosaic, cached, no colours"],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_benchmark_times_all_parts_in_turn(name, settings):
    _, laps = next({**step.STEPS, "loader": ratios.loader}[name](settings))
    assert list(laps) == PARTS[name]
    assert all(len(times) == 1 and times[0] > 0 for times in laps.values())


def test_the_ratio_is_that_of_the_rounds():
    """Rounds 2 / 1, 6 / 2 and 4 / 4: the median ratio is 2."""
    ((name, unit, ms, base, long, fast),) = ratios.compared({"unit": [1, 2, 4], "work": [2, 6, 4]})
    assert (name, unit, ms, base, long, fast) == ("work", "unit", 4, 2, 2, 0.5)


def test_everything_is_run_in_turn_and_the_first_round_does_not_count():
    calls = []
    laps = ratios.paired({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == list("ababab") and [len(times) for times in laps.values()] == [2, 2]


def test_a_process_tells_its_step_and_its_peak(settings, capsys):
    step.measure(settings.cfg[0], 64, 2, 1)
    milliseconds, peak = json.loads(capsys.readouterr().out)
    assert milliseconds > 0 and peak > 50


def test_the_table_has_a_line_a_ratio(settings, capsys):
    ratios.main(["step", "--cfg", *settings.cfg, "--img_size", "64", "--batch-size", "2", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:4]] == ["model + loss", "step"]
    assert lines[-1].startswith("medians of 1 rounds")
