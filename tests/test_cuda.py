"""The scripts on a pretend GPU: PyTorch's own code for CUDA, with the CPU's kernels on memory that begins as NaN.

tests/pretend_cuda says what that shows and what it cannot. A process that has the device keeps it, so that scripts run
in one of their own, which imports torch once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from tests.nets import TINY, csv_rows
from tests.test_team import torchrun
from utils.checkpoint import read_checkpoint

QUICK = """
from utils.checkpoint import write_checkpoint
from utils.compress import measure
from utils.pruning import report
from utils.quantization import workflow
from utils.report import plots

from utils.training.checkpointing import State

measure.SECONDS = measure.LEAST_SECONDS = 0.1

def nothing(*_):
    pass

write_last = State.write_last

def write_epoch(state, run, source):
    write_last(state, run, source)
    write_checkpoint(run.weights / f"epoch{state.progress.epoch}.pt", state.complete(source))

State.write_last = write_epoch

for module in (plots, report, workflow):
    for name in vars(module):
        if name.startswith("plot_") and name not in ("plot_course", "plot_pareto"):
            setattr(module, name, nothing)
"""
"""Plots and timings take longer than a tiny run; the plots of the report page are drawn."""


class Gpu:
    """A process with pretend GPUs that runs scripts one after the other."""

    def __init__(self, library: Path, root: Path) -> None:
        paths = os.pathsep.join(map(str, (root / "tests/pretend_cuda", root)))
        more = {"PYTHONPATH": paths, "PRETEND_CUDA": str(library), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **more}
        self.root, self.log, self.kernels, self.pinnings = root, "", 0, 0
        self.process = subprocess.Popen(
            [sys.executable, root / "tests/pretend_cuda/serve.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            env=self.environment,
            text=True,
        )
        self.library = library
        self.execute(QUICK)

    def __call__(self, *command: object, status: int = 0) -> Any:
        """Run a script, which has to end with `status`; returns the JSON document that it printed.

        With --device cpu nothing may run on a GPU, and no memory may be pinned for one.
        """
        print(json.dumps([str(part) for part in command]), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.log, self.kernels, self.pinnings = (answer[key] for key in ("stderr", "kernels", "pinnings"))
        assert answer["status"] == status, self.log
        assert "cpu" not in command or self.kernels == self.pinnings == 0
        return json.loads(answer["stdout"]) if "--json" in command else None

    def execute(self, *lines: str, flags: tuple[str, ...] = ()) -> Any:
        """Run Python code there, as a script with flags."""
        path = self.library.with_name(f"code{os.getpid()}.py")
        path.write_text("\n".join(lines))
        return self(path, *flags)

    def close(self) -> None:
        self.process.communicate(timeout=60)


class Run(NamedTuple):
    """What a training left."""

    document: dict[str, Any]
    last: dict[str, Any]
    """The last checkpoint."""
    losses: list[float]
    """Box loss of each epoch."""


@pytest.fixture(scope="session")
def library(tmp_path_factory, root) -> Path:
    """The pretend device, compiled by the first of the processes that run tests."""
    pinned = next(Requirement(line) for line in (root / "constraints.txt").read_text().splitlines() if "torch=" in line)
    if not pinned.specifier.contains(Version(torch.__version__).public) or torch.version.cuda is None:
        pytest.skip(f"the pretend GPU is made for {pinned} with CUDA; this is torch {torch.__version__}")
    if shutil.which("g++") is None:
        pytest.skip("the pretend GPU is compiled by g++, which is not there; on Debian and Ubuntu: apt install g++")
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "libpretend.so"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            compile_device(root / "tests/pretend_cuda/device.cpp", path)
    return path


def compile_device(source: Path, library: Path) -> None:
    parts = Path(torch.__file__).parent
    folders = [f"-I{parts / folder}" for folder in ("include", "include/torch/csrc/api/include")]
    torch_libraries = [f"-L{parts / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = ["g++", "-O0", "-w", "-std=c++20", "-fPIC", "-shared", abi, *folders, source, *torch_libraries]
    done = subprocess.run([*command, "-o", library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def gpu(library, root):
    """A process with two pretend GPUs."""
    process = Gpu(library, root)
    yield process
    process.close()


def run_training(gpu: Gpu, toy: tuple[str, ...], project: Path, *flags: object) -> Run:
    quick = ("--workers", "0", "--project", project, "--json")
    files = (*toy, "--batch-size", "4", "--epochs", "2")
    document = gpu("train.py", *quick, *(() if "--resume" in flags else files), *flags)
    losses = [float(row["box_loss"]) for row in csv_rows(f"{document['run_dir']}/results.csv")]
    return Run(document, read_checkpoint(Path(document["last"])), losses)


@pytest.fixture
def train(gpu, toy, tmp_path):
    """Train the network of tests/nets.py."""
    return partial(run_training, gpu, toy, tmp_path)


@pytest.fixture(scope="module")
def counts(gpu) -> dict[str, dict[str, int]]:
    """What is done on the device; `pytest -s` prints it."""
    counts = gpu("tests/pretend_cuda/counts.py", "--json")
    print("", *(f"{name}: {values}" for name, values in counts.items()), sep="\n")
    return counts


MOST = {
    "plain yolov4-tiny": {"waits": 1, "pageable": 0},
    "sparse yolov4-tiny": {"waits": 1, "pageable": 0},
    "proximal yolov4-tiny": {"waits": 1, "pageable": 0},
    "distilled": {"waits": 1, "pageable": 0},
    "loss yolov4-tiny": {"kernels": 150, "waits": 0, "pageable": 0},
    "loss yolov4": {"kernels": 300, "waits": 0, "pageable": 0},
    "evaluation": {"waits": 1, "pageable": 0},
}
"""What the second training step, loss or evaluation of a batch may do at most; docs/performance.md has the figures."""


@pytest.mark.parametrize("name", MOST)
def test_a_gpu_is_not_waited_for(counts, name):
    assert {key: counts[name][key] for key, most in MOST[name].items() if counts[name][key] > most} == {}


@pytest.mark.slow
def test_processes_that_train_together_wait_as_one_alone(counts, gpu, root):
    """Beside the gradient they exchange the number of positives, and one vector, which is waited for."""
    program = (root / "tests/pretend_cuda/counts.py").read_text(encoding="utf-8")
    done = torchrun(program=program, environment=gpu.environment)
    print(done.stdout)
    alone = counts["plain yolov4-tiny"]
    for process in json.loads(done.stdout):
        assert process["exchanged"] == [1, 2]
        assert [process[key] for key in ("waits", "pageable")] == [alone[key] for key in ("waits", "pageable")]


def test_kernels_of_sparse_training_and_averaging_do_not_grow_with_the_layers(counts):
    """A network of 3 convolutions and one of 21."""
    for kind in ("sparse", "proximal"):
        surplus = [
            counts[f"{kind} {name}"]["kernels"] - counts[f"plain {name}"]["kernels"] for name in ("tiny", "yolov4-tiny")
        ]
        assert surplus[0] == surplus[1]
    assert counts["average tiny"]["kernels"] == counts["average yolov4-tiny"]["kernels"]


def test_half_precision_adds_the_casts_of_the_picture_and_of_what_heads_read(counts):
    assert counts["forward --half"]["kernels"] == counts["forward"]["kernels"] + 3


@pytest.fixture(scope="module")
def trained(gpu, toy, tmp_path_factory) -> tuple[object, ...]:
    """A trained network and the pictures, as flags."""
    run = run_training(gpu, toy, tmp_path_factory.mktemp("trained"), "--device", "0")
    assert run.document["map50"] > 0.1
    return ("--weights", run.document["best"], *toy[2:], "--json")


def momentum(run: Run) -> list[torch.Tensor]:
    """Of SGD, or of Adam."""
    states = [state for _, state in sorted(run.last["optimizer"]["state"].items())]
    return [state["exp_avg" if "exp_avg" in state else "momentum_buffer"] for state in states]


def assert_same(one: Run, other: Run, tolerance: float) -> None:
    """Weights, averaged weights and momentum agree to `tolerance` of the largest value of a tensor, or of 1."""
    pairs = [(one.last[part][key], other.last[part][key]) for part in ("model", "ema") for key in one.last["model"]]
    for ours, theirs in (*pairs, *zip(momentum(one), momentum(other), strict=True)):
        difference = (ours.double() - theirs.double()).abs().max()
        assert difference <= tolerance * max(1.0, theirs.abs().max())  # false for NaN, too


@pytest.mark.parametrize(
    "flags",
    [
        ("--amp", "off"),
        ("--amp", "off", "--adam"),
        ("--amp", "off", "-sr", "--prune", "1", "--s", "auto"),
        ("--amp", "off", "--multi-scale"),
        ("--amp", "off", "--KDstr", "4"),
        ("--quantized", "1", "--a_bit", "14"),
        ("--quantized", "1", "--BN_Fold"),
        ("--quantized", "1", "--FPGA"),
    ],
    ids=["plain", "adam", "sparse", "sizes", "distilled", "quantized", "folded", "fpga"],
)
def test_in_float32_a_gpu_trains_what_the_cpu_trains(train, gpu, files, folder, flags):
    """Quantized training is in float32 whatever --amp says: what it rounds are the grids of the evaluation."""
    if "--KDstr" in flags:
        flags += ("--t_cfg", files[1], "--t_weights", files[3])
    if "--FPGA" in flags:
        (folder / "leaky.cfg").write_text(TINY.replace("mish", "leaky"))
        flags += ("--cfg", folder / "leaky.cfg")
    one = train("--device", "cpu", *flags)
    other = train("--device", "1", *flags)
    assert gpu.kernels > 1000 and gpu.pinnings > 0
    assert_same(other, one, 0)
    assert other.document["map50_95"] == one.document["map50_95"]


def test_sixteen_bits_train_nearly_what_float32_trains(train):
    """bfloat16 needs no scaler. Losses of an epoch differ by its 8 bits, or the 11 of float16, in every product."""
    whole, half, brain = (train("--device", "0", "--amp", kind) for kind in ("off", "fp16", "bf16"))
    assert not whole.last["scaler"] and not brain.last["scaler"] and half.last["scaler"]["scale"] > 0
    for run in (half, brain):
        assert run.losses == pytest.approx(whole.losses, rel=0.05)
        assert run.losses != whole.losses
        assert all(buffer.isfinite().all() for buffer in momentum(run))


def test_auto_takes_bfloat16_where_the_gpu_computes_it_and_float16_where_not(train, gpu):
    """PyTorch says of older GPUs, too, that they support bfloat16: they emulate it."""
    assert_same(train("--device", "0"), train("--device", "0", "--amp", "bf16"), 0)
    gpu.execute("import torch", "torch.cuda.pretend.capability = (7, 5)")
    try:
        assert_same(train("--device", "0"), train("--device", "0", "--amp", "fp16"), 0)
    finally:
        gpu.execute("import torch", "torch.cuda.pretend.capability = (8, 0)")


@pytest.fixture
def overflowing(tmp_path):
    """Flags of float16 whose gradients do not fit it at the first scales; the gain of the boxes is 5 otherwise."""

    def flags(gain: int) -> tuple[object, ...]:
        (tmp_path / "hyp.yaml").write_text(f"box_gain: {gain}")
        return ("--amp", "fp16", "--hyp", tmp_path / "hyp.yaml", "--notest")

    return flags


def vector(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def test_a_step_that_overflows_is_not_taken_and_leaves_nothing_behind(train, gpu, overflowing):
    """One step an epoch, at scales from 65536 down. The first that is taken is that of an untouched run.

    Momentum is then the gradient. A CPU that goes on from the checkpoint before computes it in float32.
    """
    flags = ("--batch-size", "9", "--epochs", "6")
    run = Path(train("--device", "0", *overflowing(1000), *flags).document["run_dir"])
    assert "skipped" in gpu.log
    epochs = {epoch: read_checkpoint(run / f"weights/epoch{epoch}.pt") for epoch in range(1, 7)}
    taken = next(epoch for epoch, checkpoint in epochs.items() if checkpoint["progress"]["step"])
    assert taken > 1
    before, after = epochs[taken - 1], epochs[taken]
    assert (before["ema_updates"], after["ema_updates"], after["progress"]["step"]) == (0, 1, 1)
    assert after["scaler"]["scale"] == 2 ** (17 - taken)
    weights = [key for key in before["model"] if key.endswith("weight")]
    assert all(torch.equal(before["model"][key], epochs[1]["model"][key]) for key in weights)
    shutil.copy(run / f"weights/epoch{taken - 1}.pt", run / "weights/last.pt")
    train("--resume", run, "--device", "cpu")
    expected = read_checkpoint(run / f"weights/epoch{taken}.pt")
    ours, theirs = (
        vector(state["momentum_buffer"] for _, state in sorted(checkpoint["optimizer"]["state"].items()))
        for checkpoint in (after, expected)
    )
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_a_run_moves_between_devices(train, tmp_path):
    """After each epoch to another device: CPU, GPU, CPU, GPU. The weights are those of a run that stayed."""
    flags = ("--amp", "off", "--epochs", "4")
    whole = train("--device", "cpu", *flags)
    run = tmp_path / "moved"
    shutil.copytree(whole.document["run_dir"], run)
    for epoch, device in ((1, "0"), (2, "cpu"), (3, "1")):
        shutil.copy(run / f"weights/epoch{epoch}.pt", run / "weights/last.pt")
        moved = train("--resume", run, "--device", device)
    assert_same(moved, whole, 1e-5)


def test_the_scale_of_gradients_survives_a_stretch_on_a_cpu(train, overflowing):
    """Epochs on GPU, CPU, GPU: the last one goes on with the scale that the first one left."""
    first = train("--device", "0", *overflowing(1000), "--epochs", "3")
    run = Path(first.document["run_dir"])
    scaler = read_checkpoint(run / "weights/epoch1.pt")["scaler"]
    for epoch, device in ((1, "cpu"), (2, "0")):
        shutil.copy(run / f"weights/epoch{epoch}.pt", run / "weights/last.pt")
        last = train("--resume", run, "--device", device).last
        assert read_checkpoint(run / "weights/epoch2.pt")["scaler"] == scaler
    assert scaler["scale"] < 65536 and last["scaler"] != scaler


@pytest.mark.slow
def test_two_gpus_train_what_one_does(gpu, train, toy, tmp_path):
    """With the statistics of all pictures in batch normalisation; the evaluation is shared.

    The batch is what the smaller one has memory for.
    """
    flags = ("--amp", "off", "--seed", "4")  # with seed 3 rounding decides whether a negative is spared
    one = train("--device", "0", *flags)
    options = ("--epochs", "2", "--workers", "0", "--json", "--batch-size", "auto", "--sync-bn")
    environment = {**gpu.environment, "PRETEND_MEMORY": "700000,400000"}  # for batches of 4 and 2
    done = torchrun(*toy, *flags, *options, "--project", str(tmp_path / "two"), environment=environment)
    assert "--batch-size auto: 2, of at most 16" in done.stderr
    document = json.loads(done.stdout)
    two = Run(document, read_checkpoint(Path(document["last"])), [])
    assert_same(two, one, 1e-4)
    assert document["map50_95"] == pytest.approx(one.document["map50_95"], abs=1e-3)


@pytest.fixture
def memory(gpu):
    """Sets what the GPUs have free, in bytes, until the test ends."""
    limit = "import gc, torch; gc.collect(); gpu = torch.cuda.pretend.library; gpu.pretend_limit({})"
    yield lambda free: gpu.execute(limit.format(f"gpu.pretend_held() + {free}"))
    gpu.execute(limit.format(1 << 34))


def test_a_gpu_that_is_too_small_is_told_in_one_line(gpu, toy, tmp_path, memory):
    """Room for the network, and not for a batch of 4 · 3 · 64 · 64 values."""
    memory(150_000)
    gpu("train.py", *toy, "--workers", "0", "--project", tmp_path, "--batch-size", "4", "--device", "0", status=5)
    assert gpu.log.splitlines()[-1].startswith("error: ") and "--batch-size 2" in gpu.log


@pytest.mark.parametrize(
    ("free", "count", "flags"),
    [
        (250_000, 1, ()),
        (1_100_000, 4, ("--amp", "fp16")),
        (700_000, 4, ("--amp", "fp16", "-sr", "--prune", "1", "--s", "auto", "--adam")),
        (1_000_000, 4, ("--multi-scale", "--KDstr", "5")),
        (700_000, 4, ("--quantized", "1", "--BN_Fold")),
        (1 << 30, 16, ()),
    ],
    ids=["none", "more than 80 %", "sparse", "distilled", "quantized", "steps"],
)
def test_a_batch_size_that_the_gpu_chooses_trains_as_the_same_number(train, gpu, memory, files, free, count, flags):
    """Nothing is left of the steps that tried it; a run that goes on where there is more memory keeps the number."""
    if "--KDstr" in flags:
        flags += ("--t_cfg", files[1], "--t_weights", files[3])
    memory(free)
    auto = train("--device", "0", "--batch-size", "auto", *flags)
    assert f"--batch-size auto: {count}, of at most 16" in gpu.log.splitlines()
    memory(1 << 30)
    assert_same(train("--device", "0", "--batch-size", str(count), *flags), auto, 0)
    run = Path(auto.document["run_dir"])
    (run / "weights/epoch1.pt").rename(run / "weights/last.pt")
    resumed = train("--resume", run, "--device", "0")
    assert resumed.last["plan"]["batch"] == count
    assert_same(resumed, auto, 0)


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_measures_trainings_an_evaluation_and_a_picture_alone(gpu, folder):
    """At a tiny size, without --compile, whose compiler finds no GPU here; the page has a line of each."""
    document = gpu.execute(
        "import json",
        "from benchmarks import gpu",
        "gpu.STEPS.pop('--compile')",
        f"row = gpu.GpuRow(['{folder}/n.cfg'], img_size=64, batch_size=2, rounds=1, pictures=2).finish('').document",
        "row['page'] = [part.markdown() for part in gpu.sections({'gpu': row})]",
        "print(json.dumps(row))",
        flags=("--json",),
    )
    steps = [f"step, {name}" for name in ("--amp bf16", "--amp fp16", "--amp off", "--KDstr 4", "-sr")]
    alone = [f"an image alone, {name}" for name in ("float32", "float16")]
    assert [line[1] for line in document["lines"]] == [*steps, "train.py", "evaluation", *alone]
    assert all(figure is None or figure >= 0 for line in document["lines"] for figure in line[2:])
    assert all(f"| {line[1]} " in document["page"][0] for line in document["lines"]) and document["gpus"]


@pytest.mark.parametrize("flags", [(), ("--augment",)], ids=["plain", "augmented"])
def test_a_gpu_measures_what_the_cpu_measures(gpu, trained, flags):
    """With --half, weights have 16 bits, too."""
    cpu, whole, half = (
        gpu("test.py", *trained, *flags, "--device", *device) for device in (("cpu",), ("cuda:1",), ("1", "--half"))
    )
    assert gpu.kernels > 100
    for key in ("map50", "map50_95", "precision", "recall"):
        assert whole[key] == cpu[key]
        assert half[key] == pytest.approx(cpu[key], abs=0.05)


def test_a_gpu_detects_what_the_cpu_detects(gpu, trained, folder, tmp_path):
    call = ("detect.py", *trained[:2], "--source", folder / "images", "--conf-thres", "0.001", "--json", "--nosave")
    call += ("--project", tmp_path)
    cpu, whole, half = (gpu(*call, "--device", *device) for device in (("cpu",), ("0",), ("cuda:0", "--half")))
    assert gpu.kernels > 100
    assert whole == cpu
    for frame, near in zip(cpu, half, strict=True):
        best, other = frame["detections"][0], near["detections"][0]
        assert other["confidence"] == pytest.approx(best["confidence"], rel=0.05)


@pytest.mark.parametrize(
    ("script", "flags"),
    [("slim_prune.py", ("--percent", "0.3", "--reconstruct", "4")), ("quantize.py", ("--calib", "8"))],
)
def test_a_gpu_writes_the_network_that_the_cpu_writes(gpu, trained, tmp_path, script, flags):
    call = (script, *trained, "--project", tmp_path, *flags)
    runs = [Path(gpu(*call, "--device", device)["run_dir"]) for device in ("cpu", "1")]
    assert gpu.kernels > 100
    cpu, cuda = (read_checkpoint(run / "model.pt")["model"] for run in runs)
    assert cpu.keys() == cuda.keys() and all(torch.equal(cpu[key], cuda[key]) for key in cpu)


def test_a_compression_runs_on_the_gpu(gpu, toy, tmp_path):
    """Its stages are processes of their own."""
    stages = "train: {script: train, epochs: 1, workers: 0}", "quantize: {script: quantize, calib: 4}"
    (tmp_path / "recipe.yaml").write_text("stages:\n" + "".join(f"  {stage}\n" for stage in stages))
    recipe = ("--recipe", tmp_path / "recipe.yaml")
    document = gpu("compress.py", *toy, *recipe, "--project", tmp_path / "runs", "--json")
    run = Path(document["run_dir"])
    for stage in ("train", "quantize"):
        assert json.loads((run / stage / "env.json").read_text())["gpus"] == ["pretend GPU"] * 2
    assert "pretend GPU" in (run / "report/report.html").read_text()
