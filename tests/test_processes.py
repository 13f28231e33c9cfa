"""Processes that are killed, work at once, or lack what they need: nothing is lost, and one line says why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

import compress
import train
from tests.test_compress import Scripts, journey_of
from tests.test_failed_starts import SCRIPTS, TRAIN
from utils.errors import InputError
from utils.report import run_dir
from utils.report.run_dir import RunDirectory

HOLDS = """
import sys
from pathlib import Path
from utils.report.run_dir import locked

with locked(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def at_work(root, tmp_path, monkeypatch) -> Iterator[subprocess.Popen]:
    """Another process that works in the run `a`, which exists."""
    monkeypatch.setattr(run_dir, "LOCK_WAIT", 0.2)
    (tmp_path / "runs" / "a").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "runs" / "a")]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    process.stdout.readline()
    yield process
    process.kill()
    for pipe in (process.stdin, process.stdout):
        pipe.close()
    process.wait()


def test_a_run_belongs_to_one_process_at_a_time_and_a_killed_one_leaves_no_lock(at_work, tmp_path):
    """One that finds its new folder taken leaves it as it is."""
    run = RunDirectory(tmp_path / "runs" / "a", new=True)
    message = rf"a: process {at_work.pid} on \S+ is at work in it; wait .* --name"
    with pytest.raises(InputError, match=message), run.until("model.cfg"):
        pass
    at_work.kill()
    with run.until():
        assert run.file(run_dir.LOCK).read_text().startswith(f"{os.getpid()} on ")


@pytest.mark.parametrize("name", [*SCRIPTS, "train", "search", "resume", "journey"])
def test_every_script_is_refused_where_another_process_is_at_work(
    name, folder, files, tmp_path, no_plots, request, toy, run
):
    if name == "search":
        pytest.importorskip("optuna")
    if name == "resume":
        run("--epochs", "1", "--notest", "--name", "a")
    process, project = request.getfixturevalue("at_work"), tmp_path / "runs"
    flags = ["--data", str(folder / "d.data"), *files, "--project", str(project), "--name", "a", "--exist-ok"]
    if name in SCRIPTS:
        flags += SCRIPTS[name][0]
        flags += ["--device", "cpu"] if name != "export" else []
        flags += ["--source", str(folder / "images"), "--nosave"] if name == "detect" else []
    calls = {
        "journey": lambda: replace(journey_of(tmp_path), folder=project / "a").finish(Scripts()),
        "train": lambda: train.main([*flags, *TRAIN]),
        "search": lambda: train.main([*flags, *TRAIN, "--evolve", "1"]),
        "resume": lambda: train.main(["--resume", str(project / "a")]),
    }
    kept = sorted(project.rglob("*"))
    with pytest.raises(InputError, match=rf"a: process {process.pid} on \S+ is at work in it"):
        calls.get(name, lambda: compress.script_module(name).main(flags))()
    assert sorted(project.rglob("*")) == kept
