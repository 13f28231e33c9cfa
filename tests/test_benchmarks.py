"""Programs of benchmarks/: latency, ratios of docs/training.md, and the one that damages files and stops scripts."""

from __future__ import annotations

import json
import re
from random import Random

import cv2
import pytest
import torch

import export
from benchmarks import faults, latency, ratios, step
from benchmarks.mutations import damaged, hostile_bytes, mutated, rules
from models import Darknet
from tests.nets import TINY, printed
from utils.checkpoint import write_darknet
from utils.compress.recipe import read_recipe
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import load_data
from utils.errors import InputError, SuiteError

QUICK = ("--threads", "1", "--rounds", "1")


@pytest.fixture
def call(folder, tmp_path, monkeypatch, capsys):
    """Call the benchmark beside n.cfg and d.data of conftest.py, without rests; returns its document."""
    pytest.importorskip("ncnn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "PAUSE", 0.0)
    (tmp_path / "n.cfg").write_text(TINY)

    return lambda *flags: printed(capsys, latency.main, *flags, *QUICK)


@pytest.mark.skipif(not hasattr(cv2.dnn, "readNetFromDarknet"), reason="OpenCV 5 reads no Darknet files")
def test_a_cfg_is_timed_in_every_runtime(call, tmp_path):
    """A quarter of the pixels is a quarter of the multiply-adds."""
    runtimes = ("opencv", "torch", "onnxruntime", "ncnn")
    rows = call("n.cfg", "small=n.cfg@32", "--runtimes", *runtimes)["rows"]
    assert [(row["height"], row["runtime"]) for row in rows] == [(side, name) for side in (64, 32) for name in runtimes]
    assert all(0 < row["ms"] <= row["p90"] for row in rows)
    assert rows[0]["faster"] == 1
    assert rows[3]["faster"] == pytest.approx(rows[0]["ms"] / rows[3]["ms"])
    assert rows[0]["macs"] == pytest.approx(4 * rows[4]["macs"])
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"n.cfg"}


def test_a_file_of_export_py_is_run_as_it_is_and_only_where_it_can_be(call, tmp_path):
    torch.manual_seed(0)
    write_darknet(tmp_path / "n.weights", Darknet(cfg_file.load(tmp_path / "n.cfg")))
    export.main(["--cfg", "n.cfg", "--weights", "n.weights", "--format", "ncnn", "--output", "a.ncnn.param"])
    rows = call("small=a.ncnn.param", "n.cfg", "--runtimes", "torch", "ncnn")["rows"]
    expected = [("small", "ncnn"), ("n.cfg", "torch"), ("n.cfg", "ncnn")]
    assert [(row["network"], row["runtime"]) for row in rows] == expected and rows[1]["faster"] is None
    assert rows[0]["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("a.ncnn.*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("n.cfg", "n.cfg"), "two networks have one name"),
        (("none.cfg",), r"none\.cfg: no such file"),
        (("none.onnx",), r"none\.onnx"),
        (("n.cfg", "--plot", "p.png"), "unknown flag --plot"),
        (("n.cfg", "--img_size", "50"), "none of these networks runs"),
    ],
)
def test_what_cannot_be_timed_is_refused(call, flags, message):
    with pytest.raises(InputError, match=message):
        call(*flags, "--runtimes", "opencv")


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


def test_the_table_has_a_line_a_ratio_and_a_process_tells_its_step_and_its_peak(settings, capsys):
    ratios.main(["step", "--cfg", *settings.cfg, "--img_size", "64", "--batch-size", "2", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:4]] == ["model + loss", "step"]
    assert lines[-1].startswith("medians of 1 rounds")
    step.measure(settings.cfg[0], 64, 2, 1)
    milliseconds, peak = json.loads(capsys.readouterr().out)
    assert milliseconds > 0 and peak > 50


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("print('well')", ""),
        ("print('error: no file', file=sys.stderr); sys.exit(2)", ""),
        ("sys.exit(2)", "status 2, 0 errors"),
        ("print('error: a', 'error: b', sep=chr(10)); sys.exit(2)", "status 2, 2 errors"),
        ("1 / 0", r"(?s)status 1, 0 errors.*ZeroDivisionError"),
        ("os.kill(os.getpid(), 9)", "status -9"),
        ("time.sleep(60)", "hangs"),
        ("subprocess.Popen(['sleep', '60'])", "1 processes are left"),
        ("subprocess.Popen(['sleep', '60'], start_new_session=True)", "1 processes are left"),
    ],
)
def test_an_end_that_is_not_well_is_noticed(code, problem, tmp_path, monkeypatch):
    (tmp_path / "tried.py").write_text(f"import os, subprocess, sys, time\ndef main():\n    {code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(faults, "LEFT", 0.5)
    monkeypatch.delitem(faults.sys.modules, "tried", raising=False)
    end = faults.Script("-m tried", tmp_path).problem(*faults.STATUSES, seconds=5)
    assert re.search(problem, end) and bool(end) == bool(problem)


def test_a_file_that_a_script_may_not_change_is_noticed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "new").mkdir()
    before = faults.untouchable(tmp_path / "a")
    (tmp_path / "a" / "new" / "free").touch()
    assert faults.untouchable(tmp_path / "a") == before
    (tmp_path / "a" / "canary").touch()
    (tmp_path / "beside").touch()
    assert len(faults.untouchable(tmp_path / "a") ^ before) == 2


def test_the_rules_apply_to_their_files_and_change_them():
    texts = {"set/train.txt": "a.jpg", "set/toy.names": "a", "set/toy.data": "a=b", "set/labels/*": "0 1 1"}
    texts |= rules()["texts"]
    texts["runs/a/model.cfg"] = texts["net.cfg"]
    for name, file in rules()["read"].items():
        for change in rules()["hostile"].get(file.get("kind"), ()):
            assert re.search(change["at"], texts[name]), (name, change)
    rng, text = Random(0), texts["net.cfg"]
    assert sum(mutated(text, rng) != text for _ in range(100)) > 80
    assert sum(damaged(text.encode(), rng) != text.encode() for _ in range(100)) > 80
    assert sum(hostile_bytes(text.encode(), "cfg", rng) != text.encode() for _ in range(100)) > 80


@pytest.mark.slow
def test_every_script_that_gets_a_damaged_file_takes_the_sound_one(python):
    """The program tries all commands before it damages anything."""
    done = python("-m", "benchmarks.faults", "--hours", "0", "--only", "random")
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 5000, "a\0b", "."], ids=["long", "deep", "zero", "folder"])
@pytest.mark.parametrize(
    ("file", "text", "read"),
    [
        ("a.data", "train = {}\nvalid = {}\nnames = {}\n", load_data),
        ("a.data", "train = {}\nclasses = 1\n", load_data),
        ("a.yaml", 'train: "{}"\nval: "{}"\nnames: [a]\n', load_data),
        ("r.yaml", 'stages: {{a: {{script: train, hyp: "{}"}}}}', lambda path: read_recipe(path, lambda _, flag: flag)),
    ],
)
def test_names_that_no_file_can_have_raise_no_other_error(file, text, read, name, tmp_path):
    (tmp_path / file).write_text(text.replace("{}", name).replace("{{", "{").replace("}}", "}"))
    try:
        read(tmp_path / file)
    except SuiteError as failure:
        assert str(tmp_path / file) in str(failure)
