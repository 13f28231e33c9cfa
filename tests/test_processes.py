"""Processes that are killed, fail, work at once, or lack what they need: nothing is lost, and one line says why."""

from __future__ import annotations

import ast
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

import compress
import train
from tests.test_compress import Interrupted, Scripts, journey_of
from tests.test_resume import assert_same, state
from utils.device import LARGE_PAGES
from utils.errors import InputError
from utils.report import run_dir
from utils.report.run_dir import RunDirectory


class Broken(Exception):  # noqa: N818
    """A failure that no script expects."""


fails = Mock(side_effect=Broken)
"""Stands in for a function."""


def test_a_new_folder_goes_unless_it_has_a_result(tmp_path):
    def run(name: str, *files: str, until: tuple[str, ...] = (), exist_ok: bool = False) -> list[str]:
        with pytest.raises(Broken), RunDirectory.create(tmp_path, name, exist_ok=exist_ok).until(*until) as made:
            made.describe(args={}, hyp={}, cfg="", data={})
            for file in files:
                made.file(file).parent.mkdir(exist_ok=True)
                made.write_text(file, "")
            raise Broken
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(f"{name}*"))

    assert run("a") == []
    assert run("b", "gamma/0.png", "labels.jpg", until=("results.csv", "weights/*.pt")) == []
    assert run("c", "weights/last.pt", until=("results.csv", "weights/*.pt")) == ["c"]
    assert run("d", "0.jpg") == ["d"]
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine").write_text("")
    assert run("e", exist_ok=True) == ["e"]
    assert (tmp_path / "e" / "mine").exists()


TRAIN = ["--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.mark.parametrize(
    ("function", "flags"),
    [("Trainer", []), ("_draw_start", []), ("Trainer.train_batch", []), ("Trainer.train", ["--evolve", "2"])],
)
def test_a_training_that_does_not_begin_leaves_no_folder(toy, tmp_path, monkeypatch, no_plots, function, flags):
    """Out of memory while the model is built, a picture that cannot be read, a first step or trial that fails, …"""
    if flags:
        pytest.importorskip("optuna")
    monkeypatch.setattr(f"utils.training.workflow.{function}", fails)
    with pytest.raises(Broken):
        train.main([*toy, *TRAIN, "--project", str(tmp_path / "r"), *flags])
    assert list((tmp_path / "r").iterdir()) == []


def test_a_training_that_fails_in_its_second_epoch_stays(toy, tmp_path, monkeypatch, no_plots):
    from utils.training.workflow import Trainer

    epoch = Trainer._train_epoch
    monkeypatch.setattr(Trainer, "_train_epoch", lambda self: fails() if self.progress.epoch else epoch(self))
    with pytest.raises(Broken):
        train.main([*toy, *TRAIN, "--project", str(tmp_path), "--epochs", "2", "--nosave"])
    assert (tmp_path / "exp" / "results.csv").is_file()


SCRIPTS = {
    "slim_prune": (["--percent", "0.3", "--no-test"], "utils.pruning.report.write_network"),
    "layer_prune": (["--shortcut", "1", "--no-test"], "utils.pruning.report.write_network"),
    "quantize": (["--no-test", "--calib", "2", "--observer", "minmax"], "utils.quantization.workflow.write_checkpoint"),
    "export": (["--format", "pt"], "utils.export.workflow.write_checkpoint"),
    "detect": (["--save-txt"], "utils.report.detections.atomic_write_text"),
    "test": (["--save-json"], "utils.detection.evaluate.coco_results"),
}


def script_flags(name: str, folder: Path, files: list[str]) -> list[str]:
    """Return the flags of a script of the table, without those of its run directory."""
    flags = [*SCRIPTS[name][0], "--data", str(folder / "d.data"), *files]
    flags += ["--device", "cpu"] if name != "export" else []
    return flags + (["--source", str(folder / "images"), "--nosave"] if name == "detect" else [])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_cannot_write_its_result_leaves_no_folder(folder, files, tmp_path, monkeypatch, no_plots, name):
    monkeypatch.setattr(SCRIPTS[name][1], fails)
    with pytest.raises(Broken):
        compress.script_module(name).main([*script_flags(name, folder, files), "--project", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists() or list((tmp_path / "r").iterdir()) == []


def test_a_journey_whose_first_stage_fails_leaves_no_folder(tmp_path):
    journey = journey_of(tmp_path)
    with pytest.raises(Broken):
        journey.finish(fails)
    assert not journey.folder.exists()
    with pytest.raises(Interrupted):
        journey.finish(Scripts(kill_at=0))
    assert (journey.folder / "journey.json").is_file()
    assert (journey.folder / "train" / "weights" / "last.pt").is_file()


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
    flags = script_flags(name, folder, files) if name in SCRIPTS else [*toy, *TRAIN]
    flags += ["--project", str(project), "--name", "a", "--exist-ok"]
    calls = {
        "journey": lambda: replace(journey_of(tmp_path), folder=project / "a").finish(Scripts()),
        "train": lambda: train.main(flags),
        "search": lambda: train.main([*flags, "--evolve", "1"]),
        "resume": lambda: train.main(["--resume", str(project / "a")]),
    }
    kept = sorted(project.rglob("*"))
    with pytest.raises(InputError, match=rf"a: process {process.pid} on \S+ is at work in it"):
        calls.get(name, lambda: compress.script_module(name).main(flags))()
    assert sorted(project.rglob("*")) == kept


SURROUNDINGS = {
    "no standard output": ("{command} >&-", (0,)),
    "no standard streams": ("{command} <&- >&- 2>&-", (0,)),
    "a full disk behind the progress": ("{command} 2>/dev/full", (0,)),
    "a full disk behind the output": ("{command} >/dev/full", (5,)),
    "no folder of TMPDIR": ("TMPDIR=/none {command}", (0,)),
    "memory for Python alone": ("ulimit -v 60000; {command}", (5,)),
    "memory without torch": ("ulimit -v 600000; {command}", (0, 5)),
}
"""A shell's line around a command, and the exit statuses that are right. All scripts run in every second one."""
PRINTS = """
import sys
from utils import cli

def main():
    with open(sys.argv[1], "w") as file:
        cli.log("note")
        print("kept", file=file, flush=True)
        print("result")

import numpy
cli.run(main)
"""


def surrounded(name: str, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    line = SURROUNDINGS[name][0].format(command=shlex.join([sys.executable, *command]))
    done = subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    return done


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_a_script_lacks_is_one_line_or_nothing(name, root, tmp_path):
    """A file that is opened where standard output was closed holds what is written to it, and no more."""
    done = surrounded(name, ["-c", PRINTS, str(tmp_path / "file")], root)
    assert done.returncode in SURROUNDINGS[name][1], done.stderr
    if done.returncode == 0 or "full" in name:
        assert (tmp_path / "file").read_text() == "kept\n"
    else:
        assert done.stderr.splitlines()[-1].startswith("error: out of memory; a library takes more (")


def test_a_machine_without_a_folder_for_temporary_files_is_told_of_tmpdir(python):
    """As in a container whose disk is read-only."""
    code = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/none']\n"
    code += "from utils import cli; cli.run(tempfile.TemporaryDirectory)"
    done = python("-c", code)
    message = r"error: no room .*; set TMPDIR to .* \(.*No usable temporary directory.*\)\n"
    assert done.returncode == 5 and re.fullmatch(message, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SCRIPTS, "train", "compress"])
@pytest.mark.parametrize("name", list(SURROUNDINGS)[::2])
def test_every_script_ends_well_whatever_it_lacks(name, script, root, folder, files, toy, tmp_path):
    project = ["--project", str(tmp_path / "runs")]
    if script == "compress":
        (tmp_path / "r.yaml").write_text("stages: {prune: {script: slim_prune, percent: 0.3, no-test: true}}")
        flags = [*files, "--data", str(folder / "d.data"), "--recipe", str(tmp_path / "r.yaml")]
    else:
        flags = [*toy, *TRAIN, "--epochs", "1"] if script == "train" else script_flags(script, folder, files)
    done = surrounded(name, [f"{script}.py", *flags, *project], root)
    assert done.returncode in SURROUNDINGS[name][1], done.stderr


@pytest.fixture
def clone(root, tmp_path) -> Iterator[Path]:
    """A copy of the project whose path has a space and in which nobody may write."""
    clone = tmp_path / "my clone"
    shutil.copytree(root / "utils", clone / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    for path in root.glob("*.py"):
        shutil.copy(path, clone)
    for path in [clone, *clone.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    yield clone
    for path in [clone, *clone.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.parametrize("script", ["slim_prune", pytest.param("compress", marks=pytest.mark.slow)])
def test_a_clone_in_which_nobody_may_write_runs_from_elsewhere(script, clone, folder, files, tmp_path):
    """With a space in its path; where the working directory cannot be written, one line says so."""
    root = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if root and not shutil.which("setpriv"):
        pytest.skip("root may write everywhere")
    (tmp_path / "r.yaml").write_text("stages: {prune: {script: slim_prune, percent: 0.3, no-test: true}}")
    flags = ["--recipe", str(tmp_path / "r.yaml")] if script == "compress" else ["--percent", "0.3", "--no-test"]
    command = [*root, sys.executable, str(clone / f"{script}.py"), *files, "--data", str(folder / "d.data"), *flags]
    refused = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert "my clone is no folder that can be written; choose another one" in refused.stderr
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").glob("*/*/**/model.cfg"))
    if script == "compress":
        done = subprocess.run([*command, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    told = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: "))
    assert (tmp_path / told[1]).is_file(), "a command that is told works where the script was called"


CLOCKS = {
    "utils/cli.py": "lines about work under way",
    "utils/compress/journey.py": "seconds of a stage",
    "utils/data/index.py": "when what was checked is kept",
    "utils/data/sources.py": "streams: frames that are late, --max-seconds",
    "utils/data/store.py": "age of what a killed process has left",
    "utils/detection/evaluate.py": "milliseconds of an image",
    "utils/report/tables.py": "latency, which --target-latency prunes to",
    "utils/report/run_dir.py": "the start of a run in env.json; how long a lock is waited for",
    "utils/training/loop.py": "seconds of an epoch",
    "utils/training/workflow.py": "TensorBoard's events",
}
"""Files of the product that look at a clock, and for what. No other number follows from a time."""
NAMES_OF_CLOCKS = {"time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "process_time", "now", "clock"}


def test_clocks_are_looked_at_for_reports_and_waiting_only(sources):
    paths = {
        source.path
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in NAMES_OF_CLOCKS
    }
    assert {path for path in paths if not path.startswith(("tests/", "benchmarks/"))} == set(CLOCKS)


def test_a_training_on_a_busy_machine_with_a_wild_clock_has_the_same_numbers(run, monkeypatch):
    """A neighbour with more threads than cores; clocks that stand still, jump and go back, but for monotonic ones."""
    flags = ("--epochs", "2", "--workers", "2", "--multi-scale", "-sr", "--prune", "1", "--s", "auto")
    quiet = state(Path(run(*flags)["last"]))
    busy = "import threading\nfor _ in range(8): threading.Thread(target=sum, args=[iter(int, 1)]).start()"
    neighbour = subprocess.Popen([sys.executable, "-c", busy])
    draw = random.Random(0)
    for name in ("time", "time_ns", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: draw.choice((0, 1 << 30, draw.randrange(-999, 999))))
    try:
        assert_same(state(Path(run(*flags)["last"])), quiet)
    finally:
        neighbour.kill()
        neighbour.wait()


PAGE_FAULTS = """
import resource
from utils.device import keep_freed_memory
print(keep_freed_memory())
import numpy
for number in range(12):
    if number == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(64 << 20, numpy.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Page faults of ten arrays of 64 MiB, one after the other."""


def page_faults(python, **environment: str) -> tuple[str, int]:
    kept = {k: v for k, v in os.environ.items() if k != LARGE_PAGES and not k.startswith(("MALLOC_", "GLIBC_"))}
    done = python("-c", PAGE_FAULTS, env={**kept, **environment})
    assert done.returncode == 0, done.stderr
    answer, count = done.stdout.split()
    return answer, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is done with glibc only")
def test_memory_is_paid_for_once_unless_the_user_has_his_own_way(python):
    answer, count = page_faults(python)
    assert answer == "True"
    assert count < 100
    answer, usual = page_faults(python, MALLOC_PERTURB_="0")
    assert answer == "False"
    assert usual > 10 * max(1, count)
