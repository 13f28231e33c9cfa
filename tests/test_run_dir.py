"""Run directories: names, files, tables, and the events that TensorBoard reads."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from utils.errors import InputError
from utils.report.run_dir import Results, RunDirectory, git_commit, last_epochs, plain, read_results
from utils.training.workflow import TAGS, Scalars


def test_a_run_never_takes_a_folder_that_exists(tmp_path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "kept.txt").write_text("mine")
    (tmp_path / "exp2").write_text("a file")
    (tmp_path / "exp3").symlink_to(tmp_path / "nowhere")
    assert [RunDirectory.create(tmp_path).path.name for _ in range(2)] == ["exp4", "exp5"]
    assert [RunDirectory.create(tmp_path / "runs" / "train").path.name for _ in range(2)] == ["exp", "exp2"]
    assert (tmp_path / "exp" / "kept.txt").read_text() == "mine"


def test_runs_started_at_once_get_different_folders(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: RunDirectory.create(tmp_path).path, range(16)))
    assert len(set(made)) == 16


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/", "a\0b"])
def test_a_name_is_one_folder(tmp_path, name):
    with pytest.raises(InputError, match=r"--name .*--project"):
        RunDirectory.create(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("project", "flags", "match"),
    [
        ("file", {}, "is no folder that can be written; choose another"),
        ("file/below", {}, "is no folder that can be written; choose another"),
        ("", {"name": "file", "exist_ok": True}, "file: exists and is no folder"),
    ],
)
def test_a_file_is_no_folder_of_runs(tmp_path, project, flags, match):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=match):
        RunDirectory.create(tmp_path / project, **flags)
    assert (tmp_path / "file").read_text() == "mine"


def test_describe_writes_what_can_be_read_back(tmp_path):
    run = RunDirectory.create(tmp_path)
    args = {"cfg": Path("cfg/a.cfg"), "img_size": (320, 416), "lr0": np.float32(0.5), "weights": None, "adam": False}
    run.describe(args=args, hyp={"lr0": 0.01}, cfg="[net]\n", data={"nc": 1, "names": ["雪"]})
    read = yaml.safe_load(run.file("args.yaml").read_text())
    assert read == {"cfg": "cfg/a.cfg", "img_size": [320, 416], "lr0": 0.5, "weights": None, "adam": False}
    assert list(read) == list(args)
    assert yaml.safe_load(run.file("hyp.yaml").read_text()) == {"lr0": 0.01}
    assert yaml.safe_load(run.file("data.yaml").read_text())["names"] == ["雪"]
    assert run.file("model.cfg").read_text() == "[net]\n"
    assert json.loads(run.file("env.json").read_text())["packages"]["numpy"] == np.__version__
    assert not list(run.path.glob(".*"))


def test_plain_values_hold_nothing_but_plain_types():
    @dataclass
    class Policy:
        percent: float
        layers: frozenset[int]

    values = plain({"policy": Policy(0.5, frozenset({3, 1})), "array": np.arange(2), 7: np.bool_(True)})
    assert values == {"policy": {"percent": 0.5, "layers": [1, 3]}, "array": [0, 1], "7": True}
    assert type(values["7"]) is bool


def test_a_run_says_how_it_was_called(tmp_path, root, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(root / "train.py"), "--no-ema", "--name", "a b"])
    RunDirectory(tmp_path).describe(args={})
    assert json.loads((tmp_path / "env.json").read_text())["command"] == ["train.py", "--no-ema", "--name", "a b"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-q"])
    RunDirectory(tmp_path).describe(args={})
    assert json.loads((tmp_path / "env.json").read_text())["command"] is None


def test_the_commit_is_that_of_the_folder_itself(tmp_path):
    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, *words], capture_output=True, text=True, check=True).stdout

    assert git_commit(tmp_path) is None
    git("init", "-q")
    assert git_commit(tmp_path) is None
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    git(*name, "commit", "-q", "--allow-empty", "-m", "first")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD").strip()
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") is None
    git("worktree", "add", "-q", str(tmp_path / "side"))
    assert git_commit(tmp_path / "side") == git_commit(tmp_path)


def test_results_read_back_what_was_written(tmp_path):
    results = Results(tmp_path / "results.csv", ["loss", "map50"])
    results.append(0, {"loss": 1.23456789, "map50": None})
    results.append(1, {"loss": 2, "map50": 1e-9})
    assert results.path.read_text() == "epoch,loss,map50\n0,1.23457,\n1,2,1e-09\n"
    read = read_results(results.path)
    assert read["epoch"] == [0, 1] and read["loss"] == [1.23457, 2]
    assert np.isnan(read["map50"][0]) and read["map50"][1] == 1e-9


@pytest.mark.parametrize(
    ("map50", "count", "median"),
    [
        ([], 0, None),
        ([float("nan")] * 3, 0, None),
        ([0.5], 1, 0.5),
        ([0.1, 0.9, 0.2, 0.3], 3, 0.3),
        ([0.1, 0.9, 0.2, 0.3, float("nan")], 3, 0.3),
        ([0.0] * 16 + [0.1, 0.2, 0.4, 0.9], 4, 0.3),
        ([0.0] * 16 + [0.1, 0.2, 0.4, 0.9, 0.5], 5, 0.4),
    ],
)
def test_the_median_is_that_of_the_last_fifth_of_the_epochs_and_at_least_three(map50, count, median):
    found = last_epochs({"map50": map50, "map50_95": [value / 2 for value in map50]})
    assert found["median_epochs"] == count
    assert found["median_map50"] == (None if median is None else pytest.approx(median))
    assert found["median_map50_95"] == (None if median is None else pytest.approx(median / 2))
    assert last_epochs({})["median_map50"] is None


def test_a_resumed_run_leaves_the_same_table(tmp_path):
    for name, parts in (("whole", [range(4)]), ("broken", [range(3), range(1, 4)])):
        for epochs in parts:
            results = Results(tmp_path / f"{name}.csv", ["loss"])
            for epoch in epochs:
                results.append(epoch, {"loss": epoch / 3})
    assert (tmp_path / "broken.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    with pytest.raises(InputError, match=r"whole.csv:1: columns epoch, loss; this run writes epoch, map50"):
        Results(tmp_path / "whole.csv", ["map50"])
    with pytest.raises(ValueError, match="no column 'gain'; there are epoch, loss"):
        results.append(0, {"gain": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [("epoch,loss\n0,1,2\n", ":2: 3 cells; the header has 2"), ("epoch,loss\n0,x\n", ":2: 'x' is not a number")],
)
def test_a_damaged_table_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_results(tmp_path / "results.csv")


def events(folder: Path, kind: str) -> dict[str, list]:
    """What TensorBoard's reader finds: events of every tag of `scalars` or `histograms`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: getattr(reader, kind.title())(tag) for tag in reader.Tags()[kind]}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) pairs of every curve that TensorBoard would show."""
    return {tag: [(event.step, event.value) for event in values] for tag, values in events(folder, "scalars").items()}


def test_values_read_back(tmp_path):
    written = Scalars(tmp_path)
    written.append(1, {"box_loss": 0.5, "map50": None, "lr": 1})
    written.append(2, {"box_loss": 0.25, "map50": 0.75})
    assert curves(tmp_path) == {"loss/box": [(1, 0.5), (2, 0.25)], "run/lr": [(1, 1.0)], "score/AP50": [(2, 0.75)]}


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    before = Scalars(tmp_path)
    for epoch in (1, 2, 3):
        before.append(epoch, {"f1": epoch})
    Scalars(tmp_path, first=3).append(3, {"f1": 7.0})
    assert len(list(tmp_path.iterdir())) == 2
    assert curves(tmp_path) == {"score/f1": [(1, 1.0), (2, 2.0), (3, 7.0)]}


def test_what_is_not_finite_is_left_out_of_histograms(tmp_path):
    written = Scalars(tmp_path)
    written.histogram(1, "gamma/all", [float("nan"), float("inf"), 1.0])
    written.histogram(2, "gamma/all", [float("nan")])
    written.histogram(3, "gamma/all", [])
    (event,) = events(tmp_path, "histograms")["gamma/all"]
    assert (event.step, event.histogram_value.num, event.histogram_value.sum) == (1, 1, 1.0)


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


def test_a_run_leaves_the_columns_of_its_table(run, no_plots):
    directory = Path(run("--epochs", "2", "--tensorboard")["run_dir"])
    table = read_results(directory / "results.csv")
    found = curves(directory)
    assert found.keys() == {TAGS.get(column, f"run/{column}") for column in table if column != "epoch"}
    for column, tag in TAGS.items():
        assert found[tag] == [(1, pytest.approx(table[column][0], 1e-4)), (2, pytest.approx(table[column][1], 1e-4))]
