"""Runs that are killed, stopped or cannot write: nothing is lost, and the rest is bit for bit what it would have been.

Batches are accumulated, sizes vary and γ are pressed on in all of them, with mosaics and averaged weights.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
from tests.nets import csv_rows, refused
from utils.checkpoint import load_model, read_checkpoint
from utils.errors import CheckpointError, InputError, Interrupted, NumericsError, ResourceError
from utils.flags import choose_model
from utils.training import loop

pytestmark = pytest.mark.usefixtures("no_plots", "accumulating")
ROOT = Path(__file__).resolve().parent.parent
SIZES = ("--img_size", "32", "64", "64", "--batch-size", "2")
SEED = str(2**63 - 1)
FLAGS = ("--epochs", "4", *SIZES, "--seed", SEED, "--auto-anchors", "-sr", "--prune", "1", "--s", "auto")
"""Four batches in two steps an epoch: three batches and one; γ under pressure, whose rate turns after two epochs."""
CLOCKS = {"seconds", "loading", "test_seconds"}
"""Columns of results.csv that differ from run to run."""
KILLED = """
import os, signal, sys
import utils.training.loop as loop, utils.training.optimizer as optimizer
import utils.report.plots as plots
optimizer.LEAST_STEPS, optimizer.NOMINAL_BATCH = 1, 6
kind, wanted = sys.argv.pop(1).split(":")
calls = 0
def counted(real):
    def call(*args, **more):
        global calls
        calls += 1
        if calls == int(wanted):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    return call
if kind == "loss":
    loop.detection_loss = counted(loop.detection_loss)
else:
    setattr(os, kind, counted(getattr(os, kind)))
for name in [name for name in vars(plots) if name.startswith("plot_")]:
    setattr(plots, name, lambda *_: None)
import train
train.main()
"""
"""A training that kills itself at a call of the loss, or of one of the functions of `os` that a save consists of."""


@pytest.fixture(scope="module")
def once() -> list[Path]:
    """Run directory of the training that nothing interrupted, once it has been trained."""
    return []


@pytest.fixture
def straight(run, once) -> Path:
    """The last checkpoint of a run that nothing interrupted."""
    if not once:
        once.append(Path(run(*FLAGS, "--name", "straight")["last"]))
    return once[0]


def state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint that a training goes on from."""
    checkpoint = read_checkpoint(path)
    control = torch.tensor([value or 0.0 for value in (checkpoint["progress"]["control"] or {}).values()])
    buffers = {f"optimizer {i}": part for i, part in checkpoint["optimizer"]["state"].items()}
    parts = {"model": checkpoint["model"], "ema": checkpoint["ema"], **buffers}
    tensors = {f"{name} {key}": value for name, part in parts.items() for key, value in part.items()}
    return {"control": control, **tensors}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def at_call(monkeypatch, number: int, act, name: str = "detection_loss") -> None:
    """Do something at a call of a function that the training loop uses, before that call is made."""
    real, calls = getattr(loop, name), []

    def call(*args, **more):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(*args, **more)

    monkeypatch.setattr(loop, name, call)


def test_killed_four_times_and_resumed_is_bit_identical(run, straight, toy, tmp_path):
    """In an accumulated step, while a checkpoint is flushed, before it is renamed, and just after a resume."""
    begin = (*toy, "--workers", "0", "--device", "cpu", "--project", f"{tmp_path}/runs", "--name", "cut", *FLAGS)
    directory = tmp_path / "runs" / "cut"
    epochs = []
    for number, place in enumerate(("loss:9", "fsync:4", "replace:5", "loss:1")):
        flags = begin if number == 0 else ("--resume", str(directory))
        done = subprocess.run([sys.executable, "-c", KILLED, place, *flags], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        epochs.append(read_checkpoint(directory / "weights" / "last.pt")["progress"]["epoch"])
    assert epochs == sorted(epochs)
    assert epochs[0] >= 1 and epochs[-1] < 4
    resumed = run("--resume", str(directory))
    assert_same(state(Path(resumed["last"])), state(straight))
    assert [path.name for path in directory.rglob("*.tmp")] == []


@pytest.mark.parametrize(
    ("number", "place", "reached"),
    [
        *((number, "detection_loss:6", (1, 3, 3)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
        (signal.SIGTERM, "evaluate:3", (1, 4, 4)),
        (signal.SIGTERM, "fitness:4", (4, 0, 8)),
    ],
)
def test_a_signal_saves_as_soon_as_it_can_and_all_is_bit_identical(
    run, straight, tmp_path, monkeypatch, number, place, reached
):
    """At the end of a step; in an evaluation, which is made again; while the last epoch is saved."""
    name, _, call = place.partition(":")
    at_call(monkeypatch, int(call), lambda: os.kill(os.getpid(), number), name)
    epoch, batch, _ = reached
    message = rf"{number.name} after epoch {epoch}, batch {batch}: saved; --resume .*cut goes on"
    with refused(Interrupted, message, 128 + number):
        run(*FLAGS, "--name", "cut")
    directory = tmp_path / "runs" / "cut"
    progress = read_checkpoint(directory / "weights" / "last.pt")["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == reached
    assert_same(state(Path(run("--resume", str(directory))["last"])), state(straight))
    cut, whole = (csv_rows(of / "results.csv") for of in (directory, straight.parent.parent))
    assert all(one[key] == other[key] for one, other in zip(cut, whole, strict=True) for key in one.keys() - CLOCKS)


def test_a_terminal_that_nohup_outlives_stops_no_training(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_call(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert run(*FLAGS)["epochs"] == 4
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_at_once(run, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)  # os.kill might be answered by another thread, later
        signal.raise_signal(signal.SIGINT)

    at_call(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run(*FLAGS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_damaged_last_checkpoint_is_told_and_the_one_before_it_taken(straight, tmp_path):
    weights = shutil.copytree(straight.parent.parent, tmp_path / "cut") / "weights"
    data = bytearray((weights / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (weights / "last.pt").write_bytes(data)
    train.main(["--resume", str(weights.parent)])
    assert_same(state(weights / "last.pt"), state(straight))
    assert (weights / "damaged.pt").read_bytes() == bytes(data)
    for name in ("last.pt", "prev.pt"):
        (weights / name).write_bytes(data[:-30])
    with pytest.raises(CheckpointError, match=r"last\.pt: .*; and .*prev\.pt: "):
        train.main(["--resume", str(weights.parent)])


def test_a_failed_write_leaves_the_checkpoint_as_it_was(run, tmp_path, monkeypatch):
    """The limit on the size of a file stands for a full disk: the same error from the same call."""
    weights = tmp_path / "runs" / "cut" / "weights"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = []

    def fill():
        kept.append(digest(weights / "last.pt"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    at_call(monkeypatch, 7, fill)
    try:
        too_large = r"(best|last)\.pt: cannot be written: File too large; \d+ bytes"
        with refused(ResourceError, too_large, 5):
            run(*FLAGS, "--name", "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [digest(weights / "last.pt")] == kept
    assert not list(weights.glob(".*"))


def test_a_table_that_another_program_has_changed_does_not_end_the_training(run, tmp_path, monkeypatch):
    """A spreadsheet has saved it with semicolons while the second epoch was under way."""
    folder = tmp_path / "runs" / "exp"
    at_call(monkeypatch, 3, lambda: (folder / "results.csv").write_text("epoch;box_loss\n1;2.5\n"))
    with pytest.raises(InputError, match=r"results\.csv:2: '1;2\.5' is not a number"):
        run("--epochs", "3")
    assert read_checkpoint(folder / "weights" / "last.pt")["progress"]["epoch"] == 3


def test_a_weight_that_is_not_finite_is_never_written(run, tmp_path, monkeypatch):
    real = loop.AveragedModel.update

    def spoil(self):
        real(self)
        if self.updates == 5:
            next(self.model.parameters()).data[0] = float("nan")

    monkeypatch.setattr(loop.AveragedModel, "update", spoil)
    with pytest.raises(NumericsError, match=r"returns NaN|not finite"):
        run(*FLAGS)
    assert read_checkpoint(tmp_path / "runs" / "exp" / "weights" / "last.pt")["progress"]["epoch"] == 2


def test_other_pictures_cannot_be_resumed(run, folder, tmp_path):
    directory = Path(run("--epochs", "1")["run_dir"])
    label = folder / "labels" / "1.txt"
    text = label.read_text()
    try:
        label.write_text("0 0.5 0.5 0.25 0.25\n")
        with pytest.raises(InputError, match="labels were changed"):
            run("--resume", str(directory))
    finally:
        label.write_text(text)


@pytest.mark.slow
def test_killed_at_random_instants_with_workers_it_is_bit_identical(toy, tmp_path):
    """Eight times kill -9 of the whole group, wherever the run then is: starting, loading, saving, evaluating."""
    common = [sys.executable, "train.py", "--workers", "2", "--device", "cpu"]
    begin = [*common, *toy, *FLAGS, "--epochs", "40", "--project", f"{tmp_path}/runs"]
    subprocess.run([*begin, "--name", "straight"], cwd=ROOT, check=True, capture_output=True)
    rng = random.Random(1000)
    last = tmp_path / "runs" / "cut" / "weights" / "last.pt"
    reached = []
    for _ in range(8):
        again = [*common, "--resume", str(last.parent.parent)]
        flags = again if last.exists() else [*begin, "--name", "cut", "--exist-ok"]
        with subprocess.Popen(flags, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120  # the first has to come as far as a checkpoint, however busy the machine
            while not last.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 9))
            os.killpg(process.pid, signal.SIGKILL)
        reached.append(read_checkpoint(last)["progress"]["step"] if last.exists() else 0)
    assert reached == sorted(reached)
    assert any(reached)
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True)
    assert_same(state(last), state(tmp_path / "runs" / "straight" / "weights" / "last.pt"))


OLDER = Path(__file__).resolve().parent / "files" / "older"


@pytest.mark.parametrize("name", ["pruned", "quantized"])
def test_a_network_computes_what_it_did(name):
    model = load_model(choose_model(None, str(OLDER / f"{name}.pt"))).model.eval()
    picture = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    heads = np.load(OLDER / "heads.npz")
    with torch.no_grad():
        for number, head in enumerate(model(picture).heads):
            assert np.abs(head.numpy() - heads[f"{name}{number}"]).max() < 1e-4


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("patience", [None, 3])
def test_a_sparse_training_goes_on(patience, tmp_path):
    """Also one that --patience could never end: without valid images it was not refused."""
    run = Path(shutil.copytree(OLDER / "run", tmp_path / "runs" / "sparse"))
    args = yaml.safe_load((run / "args.yaml").read_text())
    data = OLDER / "data/d.data"
    if patience:
        lines = [line for line in data.read_text().splitlines() if not line.startswith("valid")]
        data = Path(shutil.copytree(data.parent, tmp_path / "data")) / "d.data"
        data.write_text("\n".join(lines))
    args |= {"cfg": str(run / "model.cfg"), "data": str(data), "project": str(run.parent), "patience": patience}
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    assert read_checkpoint(run / "weights/last.pt")["progress"]["epoch"] == 1
    train.main(["--resume", str(run)])
    assert read_checkpoint(run / "weights/last.pt")["progress"]["epoch"] == 2
    assert len((run / "results.csv").read_text().splitlines()) == 3
