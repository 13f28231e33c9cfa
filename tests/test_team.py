"""Processes that train together, started by torchrun on the CPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import step
from models import Darknet, fuse
from tests.nets import TINY, conv, tiny
from tests.test_resume import CLOCKS, assert_same, state
from utils.checkpoint import load_model, read_checkpoint
from utils.data.datasets import DetectionDataset, cut_batches, make_loader
from utils.data.index import index
from utils.detection.evaluate import evaluate
from utils.errors import InputError
from utils.flags import ModelFiles
from utils.report.run_dir import read_results
from utils.training.distributed import Team, joined

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--epochs", "2", "--workers", "0", "--device", "cpu", "--seed", "3", "--json")
SPARSE = ("-sr", "--prune", "1", "--s-rate", "auto")
"""--s-rate is --s, which torchrun takes for one of its own flags."""

WATCHED = """
import atexit, runpy, sys
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel

exchanges = []
exchange = DistributedDataParallel._sync_buffers
DistributedDataParallel._sync_buffers = lambda self: exchanges.append(exchange(self))

def show():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print("of the group are left:", sum("gloo" in name for name in names), file=sys.stderr)
    print("exchanges of buffers:", len(exchanges), file=sys.stderr)

atexit.register(show)
runpy.run_path("train.py", run_name="__main__")
"""
"""train.py, which says how many threads of the process group are left at its end, and how often it sent buffers."""
STOPPED = """
import os, runpy, signal
from utils.detection import evaluate
suppressed = evaluate.suppressed
calls = []

def stopped(rows, settings):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 1:
        os.kill(os.getpid(), getattr(signal, os.environ.get("SIGNAL", "SIGINT")))
    return suppressed(rows, settings)

evaluate.suppressed = stopped
runpy.run_path("train.py", run_name="__main__")
"""
"""train.py, whose second process gets Ctrl-C, or $SIGNAL, while all evaluate after the first epoch."""
FULL = """
import os, runpy
from unittest.mock import Mock
from utils.training import loop

if os.environ["RANK"] == "1":
    loop.detection_loss = Mock(side_effect=RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."))
runpy.run_path("train.py", run_name="__main__")
"""
"""train.py, whose second process runs out of memory in its first batch."""


def torchrun(
    *flags: str, program: str = "", environment: Mapping[str, str] = os.environ, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """train.py, or a program that calls it, in two processes of one thread each; it ends well unless it is to fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--no-python", sys.executable, "-c", program] if program else ["train.py"]
    variables = {**environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=300
    )
    assert bool(done.returncode) == fails, done.stderr
    return done


def test_two_processes_are_one_with_twice_the_batch(run, folder, tmp_path, no_plots):
    """Without batch normalisation, whose statistics are those of a process's own pictures, to rounding.

    Two steps, with frozen blocks and one that no head reads: an exchange that waits for gradients that never come fails
    at the second.
    """
    route = "[route]\nlayers=7\n"
    (tmp_path / "plain.cfg").write_text(TINY.replace(route, route + conv(6) + route).replace("batch_normalize=1\n", ""))
    files = ["--cfg", str(tmp_path / "plain.cfg"), "--data", str(folder / "d.data"), "--freeze", "2"]
    done = torchrun(*files, *FLAGS, "--batch-size", "2", "--cache", "ram", "--project", str(tmp_path / "two"))
    two = json.loads(done.stdout)
    one = run(*files, *FLAGS, "--batch-size", "4")
    ours, theirs = (read_checkpoint(Path(document["last"]))["model"] for document in (one, two))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5
    assert two["map50_95"] == pytest.approx(one["map50_95"], abs=1e-3)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["exp"]
    assert done.stderr.count("epoch 2/2") == 1


@pytest.mark.slow
def test_processes_stopped_while_they_evaluate_go_on_as_if_nothing_had_been(toy, folder, tmp_path, run, no_plots):
    """One gets Ctrl-C; weights and results.csv are those of a run without. The last score is that of one process.

    Running statistics are not exchanged. γ go as they go in one process. A thread of the process group that lets go of
    a tensor while the interpreter ends aborts the process, now and then: none may be left.
    """
    flags = (*toy, *FLAGS, *SPARSE, "--batch-size", "2", "--project", str(tmp_path / "two"))

    straight = torchrun(*flags, program=WATCHED)
    assert straight.stderr.count("of the group are left: 0") == 2, straight.stderr
    assert straight.stderr.count("exchanges of buffers: 0") == 2, straight.stderr
    assert straight.stderr.count("channels are to be weak") == 1
    document = json.loads(straight.stdout)
    stopped = torchrun(*flags, "--name", "stopped", program=STOPPED, fails=True)
    assert "SIGINT after epoch 0, batch 2: saved; --resume" in stopped.stderr
    resumed = torchrun("--resume", str(tmp_path / "two" / "stopped"), "--json")
    assert_same(state(Path(json.loads(resumed.stdout)["last"])), state(Path(document["last"])))
    ours, theirs = (read_results(tmp_path / "two" / name / "results.csv") for name in ("stopped", "exp"))
    assert all(ours[key] == theirs[key] for key in theirs.keys() - CLOCKS) and ours.keys() == theirs.keys()

    environment = {**os.environ, "SIGNAL": "SIGKILL"}
    killed = torchrun(*flags, "--name", "killed", program=STOPPED, environment=environment, fails=True)
    assert "Signal 9 (SIGKILL)" in killed.stderr and "utils/training" not in killed.stderr, killed.stderr
    resumed = torchrun("--resume", str(tmp_path / "two" / "killed"), "--json")
    assert_same(state(Path(json.loads(resumed.stdout)["last"])), state(Path(document["last"])))

    loaded = load_model(ModelFiles(None, Path(document["best"]), True))
    pictures = DetectionDataset(index(folder / "val.txt", ("a", "b")), size=(64, 64))
    alone = evaluate(fuse(loaded.model), make_loader(pictures, 2), ("a", "b"), device="cpu").metrics
    assert (document["map50"], document["map50_95"]) == (alone.map50, alone.map50_95)

    two, one = (read_checkpoint(Path(last)) for last in (document["last"], run(*flags, "--batch-size", "4")["last"]))
    assert two["progress"]["control"]["fair"] == one["progress"]["control"]["fair"]
    means = [
        torch.cat([value for key, value in found["model"].items() if key.endswith("bn.weight")]).abs().mean().item()
        for found in (one, two)
    ]
    assert means[1] == pytest.approx(means[0], rel=0.1)
    assert two["progress"]["control"]["s"] == pytest.approx(one["progress"]["control"]["s"], rel=0.1) and means[0] < 1


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_says_so_and_ends_all(toy, tmp_path):
    flags = (*toy, *FLAGS, "--batch-size", "2", "--project", str(tmp_path / "two"))
    done = torchrun(*flags, program=FULL, fails=True)
    assert "error: process 1: out of memory with --batch-size 2; try --batch-size 1 (CUDA" in done.stderr
    assert "utils/training" not in done.stderr, "a traceback"


@pytest.mark.slow
def test_two_processes_round_alike(toy, tmp_path):
    """Bounds and statistics are the first one's, which writes them; the other has the same before every step."""
    quantized = ("--quantized", "1", "--BN_Fold", "--target", "arm")
    flags = (*toy, *FLAGS, *quantized, "--batch-size", "2", "--project", str(tmp_path / "two"))
    done = torchrun(*flags, program=WATCHED)
    assert done.stderr.count("exchanges of buffers: 4") == 2, "one before every step"
    checkpoint = read_checkpoint(Path(json.loads(done.stdout)["last"]))
    assert checkpoint["quantization"]["target"] == "arm"
    bounds = [value for key, value in checkpoint["model"].items() if key.endswith((".low", ".high"))]
    assert all(value.isfinite() for value in bounds) and any(value != 0 for value in bounds)


def test_synchronised_batch_normalisation_changes_training_only():
    """Tensors, evaluation and folding are those of the plain model."""
    torch.manual_seed(0)
    model, images = Darknet(tiny()).eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("bn.weight", "running_mean")):
                value.uniform_(0.5, 1)
    team = Team(torch.device("cuda", 0), 0, 2)
    changed = team.synchronised(copy.deepcopy(model))
    pairs = [(a.bn, b.bn) for a, b in zip(model.layers, changed.layers, strict=True) if getattr(a, "bn", None)]
    assert {type(b) for _, b in pairs} == {torch.nn.SyncBatchNorm}
    assert all((b.eps, b.momentum) == (a.eps, a.momentum) for a, b in pairs)
    ours, theirs = changed.state_dict(), model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for one, other in ((changed, model), (fuse(changed), fuse(model))):
        assert all(torch.equal(a, b) for a, b in zip(one(images).heads, other(images).heads, strict=True))
    with pytest.raises(InputError, match="works on GPUs only; leave it out"):
        Team(torch.device("cpu"), 0, 2).synchronised(model)


def test_a_step_exchanges_the_count_of_positives_and_one_vector(monkeypatch):
    """Beside the gradient, which DistributedDataParallel exchanges: the loss, and whether a signal came."""
    lengths: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda values: lengths.append(values.numel()))
    monkeypatch.setattr(Team, "parallel", lambda self, model, **_: model)
    monkeypatch.setattr(step, "Team", lambda device: Team(device, 0, 2))
    step.TimedTraining(Darknet(tiny()), 64, 2).step()
    assert lengths == [1, 2]


def test_processes_with_gpus_are_joined_by_nccl_which_knows_the_gpu_of_each(monkeypatch):
    """They wait for one another as long as the first one decodes the pictures of a large set."""
    joined_with = {}
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("utils.training.distributed.select_device", lambda text: torch.device("cuda", int(text)))
    monkeypatch.setattr(dist, "init_process_group", lambda kind, **how: joined_with.update(how, kind=kind))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with joined("") as team:
        assert (team.rank, team.size, team.device) == (1, 2, torch.device("cuda", 1))
    assert joined_with.pop("timeout") >= timedelta(hours=1)
    assert joined_with == {"kind": "nccl", "device_id": torch.device("cuda", 1)}


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for device in ("0", "cuda:0"):
        with pytest.raises(InputError, match="with torchrun each process takes a GPU of its own"), joined(device):
            pass


def test_every_process_gets_a_picture_of_every_batch():
    assert cut_batches(list(range(9)), 4, least=2) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert cut_batches(list(range(10)), 8, least=4) == [list(range(10))]
