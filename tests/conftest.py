"""What several test modules use."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import compress
import train
from tests.nets import TINY, printed, tiny

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("same")  # the same examples in every run, however slow the machine is


class Source(NamedTuple):
    """One Python file of the project."""

    module: str
    """Dotted name, e.g. `utils.darknet.cfg`."""
    path: str
    """Relative to the project, with `/`."""
    text: str
    tree: ast.Module

    def __repr__(self) -> str:
        return self.path

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """What runs in the background ignores Ctrl-C, and so do its children; some tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def script():
    """test.py as a module; `import test` would give the standard library's package."""
    return compress.script_module("test")


REFUSALS = """
import json, runpy, sys
sys.modules["torch"] = None
from utils import cli
for script, *flags in json.loads(sys.argv[1]):
    sys.argv[:] = [script]
    try:
        cli.run(lambda: runpy.run_path(script)["main"](flags))
    except SystemExit as stop:
        print(stop.code, flush=True)
"""


@pytest.fixture(scope="session")
def refusals(root):
    """Call scripts where torch cannot be imported; each ends with status 2 and one line, which is returned."""

    def call(*commands: Sequence[str], prints: bool = False) -> list[str]:
        command = [sys.executable, "-c", REFUSALS, json.dumps([(str(root / name), *rest) for name, *rest in commands])]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.stdout.endswith("2\n" * len(commands)), done.stderr
        assert prints or done.stdout == "2\n" * len(commands)
        lines = done.stderr.splitlines()
        assert len(lines) == len(commands) and all(line.startswith("error: ") for line in lines)
        return lines

    return call


@pytest.fixture(scope="session")
def root() -> Path:
    """Folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def python(root):
    """Run Python in the folder of the project, with the given arguments; returns the process that ended."""

    def call(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, **{"cwd": root, "capture_output": True, "text": True, "check": False, **more})

    return call


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data, weights and reference cfgs: $DARKNET_SHARED, or `shared` beside the project."""
    folder = Path(os.environ.get("DARKNET_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set DARKNET_SHARED to run the tests that need real data")
    return folder


@pytest.fixture(scope="session")
def sources() -> tuple[Source, ...]:
    """Every Python file of the project: scripts, utils, benchmarks and tests."""
    files = [
        *ROOT.glob("*.py"),
        *(path for room in ("utils", "benchmarks", "tests") for path in ROOT.glob(f"{room}/**/*.py")),
    ]
    return tuple(_source(path) for path in sorted(files))


def _source(path: Path) -> Source:
    relative = path.relative_to(ROOT)
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    text = path.read_text(encoding="utf-8")
    return Source(module, relative.as_posix(), text, ast.parse(text, str(relative)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cfg, and a data set of nine pictures with one or two boxes each: bright blocks (a) and bars (b)."""
    from tests.media import labelled

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(9):
        image = rng.integers(0, 60, (64, 64, 3)).astype(np.uint8)
        rows = []
        for kind, (width, height) in enumerate(((12 + number, 14), (30 - number, 10))[: 1 + number % 2]):
            x, y = rng.integers(0, 64 - width), rng.integers(0, 64 - height)
            image[y : y + height, x : x + width] = (220, 220 * kind, 90)
            rows.append(f"{kind} {(x + width / 2) / 64} {(y + height / 2) / 64} {width / 64} {height / 64}")
        labelled(folder, f"{number}.png", image, "\n".join(rows) + "\n")
    names = [f"images/{number}.png\n" for number in range(9)]
    (folder / "train.txt").write_text("".join(names))
    (folder / "val.txt").write_text("".join(names[:3]))
    (folder / "d.names").write_text("a\nb\n")
    (folder / "d.data").write_text("classes=2\ntrain=train.txt\nvalid=val.txt\nnames=d.names\n")
    (folder / "n.cfg").write_text(TINY)
    return folder


@pytest.fixture(scope="module")
def toy(folder) -> tuple[str, ...]:
    """The network and the pictures of `folder`, as flags."""
    return ("--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"))


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take longer than a tiny run; those of the report page are drawn."""
    from utils.report import plots

    for name in vars(plots):
        if name.startswith("plot_") and name not in ("plot_course", "plot_pareto"):
            monkeypatch.setattr(plots, name, lambda *_: None)


@pytest.fixture
def short_timings(monkeypatch):
    """Networks of a page are timed for a tenth of a second each, not for ten."""
    from utils.compress import measure

    for name in ("SECONDS", "LEAST_SECONDS"):
        monkeypatch.setattr(measure, name, 0.1)


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What a training says beside its epochs."""
    said: list[str] = []
    for module in ("train", *(f"utils.training.{name}" for name in ("checkpointing", "sparsity", "workflow"))):
        monkeypatch.setattr(f"{module}.log", lambda *texts: said.extend(texts))
    return said


@pytest.fixture
def accumulating(monkeypatch):
    """Steps of six pictures; so short a run would accumulate nothing."""
    from utils.training import optimizer

    monkeypatch.setattr(optimizer, "LEAST_STEPS", 1)
    monkeypatch.setattr(optimizer, "NOMINAL_BATCH", 6)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in their order."""
    from utils.report import plots

    figures, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


@pytest.fixture
def run(toy, tmp_path, capsys):
    """Call train.py in this process with fast settings; returns its JSON document."""

    def call(*flags: str):
        defaults = ["--workers", "0", "--device", "cpu", "--project", str(tmp_path / "runs")]
        new = () if "--resume" in flags else (*toy, "--batch-size", "4")
        return printed(capsys, train.main, *defaults, *new, *flags)

    return call


@pytest.fixture
def files(tmp_path) -> list[str]:
    """The network of tests/nets.py with γ and β that differ, as --cfg and --weights of a pruning script."""
    import torch

    from models import Darknet
    from utils.checkpoint import write_darknet

    torch.manual_seed(0)
    model = Darknet(tiny())
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith(("bn.weight", "bn.bias")):
            value.copy_(torch.rand(value.shape, generator=generator))
    (tmp_path / "n.cfg").write_text(TINY)
    write_darknet(tmp_path / "n.weights", model)
    return ["--cfg", str(tmp_path / "n.cfg"), "--weights", str(tmp_path / "n.weights")]


@pytest.fixture
def prune(files, tmp_path, capsys, monkeypatch):
    """Call a script on the network; without pictures, which take longer than all else. Returns its JSON document."""
    from utils.pruning import report

    for name in ("plot_channels", "plot_threshold"):
        monkeypatch.setattr(report, name, lambda *_: None)

    def call(name: str, *flags: str) -> dict:
        main = importlib.import_module(f"{name}_prune").main
        return printed(capsys, main, *files, "--project", str(tmp_path / "runs"), "--device", "cpu", *flags)

    return call
