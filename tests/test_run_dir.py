from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from utils.errors import InputError
from utils.report.run_dir import Results, RunDirectory, git_commit, last_epochs, plain, read_results


def test_names_are_numbered_from_the_second_run_on(tmp_path):
    made = [RunDirectory.create(tmp_path / "runs" / "train").path.name for _ in range(3)]
    assert made == ["exp", "exp2", "exp3"]


def test_a_run_never_takes_a_folder_that_exists(tmp_path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "kept.txt").write_text("mine")
    (tmp_path / "exp2").write_text("a file")
    (tmp_path / "exp3").symlink_to(tmp_path / "nowhere")
    assert RunDirectory.create(tmp_path).path == tmp_path / "exp4"
    assert (tmp_path / "exp" / "kept.txt").read_text() == "mine"


def test_exist_ok_uses_the_folder_and_keeps_its_files(tmp_path):
    first = RunDirectory.create(tmp_path, "a")
    first.write_text("kept.txt", "mine")
    again = RunDirectory.create(tmp_path, "a", exist_ok=True)
    again.describe(args={"epochs": 3})
    assert again == first
    assert first.file("kept.txt").read_text() == "mine"


def test_runs_started_at_once_get_different_folders(tmp_path):
    made: list[Path] = []
    starts = [threading.Thread(target=lambda: made.append(RunDirectory.create(tmp_path).path)) for _ in range(16)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(set(made)) == 16


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/", "a\0b"])
def test_a_name_is_one_folder(tmp_path, name):
    with pytest.raises(InputError, match=r"--name .*--project"):
        RunDirectory.create(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["-rf", "über uns", "雪🙂", "'\"$(x)`"])
def test_any_plain_name_works(tmp_path, name):
    run = RunDirectory.create(tmp_path, name)
    assert run.write_text("model.cfg", "[net]\n").read_text() == "[net]\n"


@pytest.mark.parametrize("project", ["file", "file/below"])
def test_a_project_that_is_a_file_is_refused(tmp_path, project):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no folder that can be written; choose another"):
        RunDirectory.create(tmp_path / project)


def test_exist_ok_refuses_a_file(tmp_path):
    (tmp_path / "exp").write_text("mine")
    with pytest.raises(InputError, match="exp: exists and is no folder"):
        RunDirectory.create(tmp_path, exist_ok=True)
    assert (tmp_path / "exp").read_text() == "mine"


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

    got = plain({"policy": Policy(0.5, frozenset({3, 1})), "array": np.arange(2), 7: np.bool_(True)})
    assert got == {"policy": {"percent": 0.5, "layers": [1, 3]}, "array": [0, 1], "7": True}
    assert type(got["7"]) is bool


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
    whole = Results(tmp_path / "whole.csv", ["loss"])
    for epoch in range(4):
        whole.append(epoch, {"loss": epoch / 3})
    broken = Results(tmp_path / "broken.csv", ["loss"])
    for epoch in range(3):
        broken.append(epoch, {"loss": epoch / 3})
    resumed = Results(tmp_path / "broken.csv", ["loss"])
    for epoch in range(1, 4):
        resumed.append(epoch, {"loss": epoch / 3})
    assert broken.path.read_bytes() == whole.path.read_bytes()


def test_other_columns_are_refused(tmp_path):
    results = Results(tmp_path / "results.csv", ["loss"])
    results.append(0, {"loss": 1})
    with pytest.raises(InputError, match=r"results.csv:1: columns epoch, loss; this run writes epoch, map50"):
        Results(tmp_path / "results.csv", ["map50"])
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
