"""The program that damages files and stops scripts: it notices what is not well, and its rules apply to its files."""

from __future__ import annotations

import re
from random import Random

import pytest

from benchmarks import faults
from benchmarks.mutations import damaged, hostile_bytes, mutated, rules
from utils.compress.recipe import read_recipe
from utils.darknet.data_file import load_data
from utils.errors import SuiteError


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
    texts = {
        **rules()["texts"],
        "set/train.txt": "a.jpg",
        "set/toy.names": "a",
        "set/toy.data": "a=b",
        "set/labels/*": "0 1 1",
    }
    texts["runs/a/model.cfg"] = texts["net.cfg"]
    for name, file in rules()["read"].items():
        for change in rules()["hostile"].get(file.get("kind"), ()):
            assert re.search(change["at"], texts[name]), (name, change)
    rng, text = Random(0), texts["net.cfg"]
    assert sum(mutated(text, rng) != text for _ in range(100)) > 80
    assert sum(damaged(text.encode(), rng) != text.encode() for _ in range(100)) > 80
    assert sum(hostile_bytes(text.encode(), "cfg", rng) != text.encode() for _ in range(100)) > 80


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 5000, "a\0b", "."], ids=["long", "deep", "zero", "folder"])
@pytest.mark.parametrize(
    ("file", "text", "read"),
    [
        ("a.data", "train = {}\nvalid = {}\nnames = {}\n", load_data),
        ("a.data", "train = {}\nclasses = 1\n", load_data),
        ("a.yaml", 'train: "{}"\nval: "{}"\nnames: [a]\n', load_data),
        ("r.yaml", 'stages: {{a: {{script: train, hyp: "{}"}}}}', lambda path: read_recipe(path, lambda *_: True)),
    ],
)
def test_names_that_no_file_can_have_raise_no_other_error(file, text, read, name, tmp_path):
    (tmp_path / file).write_text(text.replace("{}", name).replace("{{", "{").replace("}}", "}"))
    try:
        read(tmp_path / file)
    except SuiteError as failure:
        assert str(tmp_path / file) in str(failure)
