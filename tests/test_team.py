"""Processes that train together, started by torchrun on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.nets import TINY
from utils.checkpoint import read_checkpoint
from utils.data.sampling import cut_batches
from utils.errors import InputError
from utils.training.team import Team, joined

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--epochs", "2", "--workers", "0", "--device", "cpu", "--seed", "3", "--json")


WATCHED = f"""
import atexit, runpy, sys
from pathlib import Path

def show():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print("of the group are left:", sum("gloo" in name for name in names), file=sys.stderr)

atexit.register(show)
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path("train.py", run_name="__main__")
"""
"""train.py, and how many threads of the process group are there when the interpreter ends."""


def torchrun(*flags: str, script: Path | str = "train.py") -> subprocess.CompletedProcess[str]:
    """The script in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_two_processes_are_one_with_twice_the_batch(run, folder, tmp_path, no_plots):
    """Without batch normalisation, whose statistics are those of a process's own pictures, to rounding."""
    (tmp_path / "plain.cfg").write_text(TINY.replace("batch_normalize=1\n", ""))
    files = ["--cfg", str(tmp_path / "plain.cfg"), "--data", str(folder / "d.data")]
    done = torchrun(*files, *FLAGS, "--batch-size", "2", "--cache", "ram", "--project", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    one = run(*files, *FLAGS, "--batch-size", "4")
    ours, theirs = (read_checkpoint(Path(document["last"]))["model"] for document in (one, two))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5
    assert two["map50_95"] == pytest.approx(one["map50_95"], abs=1e-3)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["exp"]
    assert done.stderr.count("epoch 2/2") == 1


def test_two_processes_press_on_gamma_as_one(run, folder, tmp_path, no_plots):
    """Once a step, in both alike; --s-rate is --s, which torchrun takes for one of its own flags."""
    files = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data")]
    sparse = ("-sr", "--prune", "1", "--s-rate", "auto", "--s-solver", "proximal")
    done = torchrun(*files, *FLAGS, *sparse, "--batch-size", "2", "--project", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a γ can travel") == 1
    two = read_checkpoint(Path(json.loads(done.stdout)["last"]))
    one = read_checkpoint(Path(run(*files, *FLAGS, *sparse, "--batch-size", "4")["last"]))
    assert two["plan"]["s"] == one["plan"]["s"]
    means = [
        torch.cat([value for key, value in found["model"].items() if key.endswith("bn.weight")]).abs().mean().item()
        for found in (one, two)
    ]
    assert means[1] == pytest.approx(means[0], rel=0.1)
    assert max(means) < 0.7


@pytest.mark.slow
def test_two_processes_round_alike(folder, tmp_path):
    """Bounds and statistics are the first one's, which writes them; the other has the same before every step."""
    files = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data")]
    quantized = ("--quantized", "1", "--BN_Fold", "--target", "arm")
    done = torchrun(*files, *FLAGS, *quantized, "--batch-size", "2", "--project", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    checkpoint = read_checkpoint(Path(json.loads(done.stdout)["last"]))
    assert checkpoint["quantization"]["target"] == "arm"
    bounds = [value for key, value in checkpoint["model"].items() if key.endswith((".low", ".high"))]
    assert all(value.isfinite() for value in bounds) and any(value != 0 for value in bounds)


def test_a_process_alone_is_a_team_of_one():
    with joined("cpu") as team:
        assert (team.rank, team.size, team.leads) == (0, 1, True)
        assert team.total(2, 3) == [2, 3]
        assert team.any(False, True) == [False, True]
        assert [team.positives(count) for count in (0, 5)] == [1, 5]
        assert team.share("a\udcff") == "a\udcff"
        model = torch.nn.Linear(1, 1)
        assert team.parallel(model) is model


def test_positives_of_all_processes_are_counted(monkeypatch):
    monkeypatch.setattr(Team, "total", lambda self, count: [count + 6])
    assert Team(torch.device("cpu"), 1, 2).positives(4) == 5


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="with torchrun each process takes a GPU of its own"), joined("0"):
        pass


def test_every_process_gets_a_picture_of_every_batch():
    assert cut_batches(list(range(9)), 4, least=2) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert cut_batches(list(range(10)), 8, least=4) == [list(range(10))]


def test_frozen_blocks_are_left_out_of_what_processes_exchange(folder, tmp_path):
    """Two steps: an exchange that waits for gradients that never come fails at the second.

    A thread of the process group that lets go of a tensor while the interpreter ends aborts the process, now and
    then: none may be left.
    """
    files = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data")]
    (tmp_path / "watched.py").write_text(WATCHED)
    flags = (*files, *FLAGS, "--batch-size", "2", "--freeze", "4", "--project", str(tmp_path / "two"))
    done = torchrun(*flags, script=tmp_path / "watched.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("of the group are left: 0") == 2, done.stderr
