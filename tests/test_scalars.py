"""TensorBoard's own reader finds what results.csv holds; what fails in writing is told once and stops nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from utils.errors import InputError
from utils.report.run_dir import read_results
from utils.training.workflow import TAGS, Scalars

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) pairs of every curve that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@needs_tensorboard
def test_values_read_back(tmp_path):
    written = Scalars(tmp_path)
    written.append(1, {"box_loss": 0.5, "map50": None, "lr": 1})
    written.append(2, {"box_loss": 0.25, "map50": 0.75})
    assert curves(tmp_path) == {"loss/box": [(1, 0.5), (2, 0.25)], "run/lr": [(1, 1.0)], "score/AP50": [(2, 0.75)]}


@needs_tensorboard
def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    before = Scalars(tmp_path)
    for epoch in (1, 2, 3):
        before.append(epoch, {"f1": epoch})
    Scalars(tmp_path, first=3).append(3, {"f1": 7.0})
    assert len(list(tmp_path.iterdir())) == 2
    assert curves(tmp_path) == {"score/f1": [(1, 1.0), (2, 2.0), (3, 7.0)]}


def histograms(folder: Path, tag: str) -> list:
    """What TensorBoard's reader finds under a tag: events with `step` and `histogram_value`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Histograms(tag) if tag in events.Tags()["histograms"] else []


@needs_tensorboard
def test_what_is_not_finite_is_left_out_of_histograms(tmp_path):
    written = Scalars(tmp_path)
    written.histogram(1, "gamma/all", [float("nan"), float("inf"), 1.0])
    written.histogram(2, "gamma/all", [float("nan")])
    written.histogram(3, "gamma/all", [])
    (event,) = histograms(tmp_path, "gamma/all")
    assert (event.step, event.histogram_value.num, event.histogram_value.sum) == (1, 1, 1.0)


@needs_tensorboard
def test_a_failing_write_is_told_once(tmp_path, capsys):
    written = Scalars(tmp_path)
    written.path.unlink()
    written.path.mkdir()
    for epoch in (1, 2):
        written.append(epoch, {"f1": 1.0})
        written.histogram(epoch, "gamma/all", [1.0])
    assert capsys.readouterr().err == (
        f"warning: {written.path}: Is a directory; the run goes on without TensorBoard's events\n"
    )


@needs_tensorboard
def test_a_run_leaves_the_columns_of_its_table(run, no_plots):
    directory = Path(run("--epochs", "2", "--tensorboard")["run_dir"])
    table = read_results(directory / "results.csv")
    found = curves(directory)
    assert found.keys() == {TAGS.get(column, f"run/{column}") for column in table if column != "epoch"}
    for column, tag in TAGS.items():
        assert found[tag] == [(1, pytest.approx(table[column][0], 1e-4)), (2, pytest.approx(table[column][1], 1e-4))]


def test_without_the_package_the_flag_is_refused_before_torch_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "utils.training.workflow", None)
    with pytest.raises(InputError, match=r"--tensorboard: needs .*pip install -r requirements-dev"):
        run("--epochs", "1", "--tensorboard")
    assert not (tmp_path / "runs").exists()
