"""One run directory as a stage of a compression: what kind it is, what it was started with, what it wrote down."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from utils.darknet import cfg as cfg_file
from utils.darknet.layout import file_bytes
from utils.errors import InputError
from utils.files import read_text
from utils.report.cost import network_cost
from utils.report.journey.command import shown_command
from utils.report.pruning_plots import LayerBar
from utils.report.run_dir import read_results
from utils.training.settings import fitness

LARGEST_FILE = 16 << 20
"""Largest text file of a run that is read, in bytes."""
WEIGHTS = ("weights/best.pt", "weights/last.pt", "model.pt", "model.onnx", "model.torchscript", "model.weights")
"""Where a run keeps what it made; the first one that there is counts."""
FPGA = "model.fpga"
"""Folder that export.py makes in place of a file."""
TITLES = {
    "train": "training",
    "sparse": "sparse training",
    "prune": "pruning",
    "tune": "fine-tuning",
    "distil": "distillation",
    "qat": "quantization-aware training",
    "quantize": "quantization",
    "export": "export",
    "sensitivity": "sensitivity analysis",
}
"""Kinds of stages."""
TRAININGS = ("train", "sparse", "tune", "distil", "qat")
"""Those of train.py."""


@dataclass(frozen=True)
class Figures:
    """What is known of the network that a stage made; None: not known."""

    map50: float | None = None
    """0…1, as AP50-95."""
    map50_95: float | None = None
    parameters: int | None = None
    macs: int | None = None
    bytes: int | None = None
    """Of what was exported, else of a .weights file; None for rounded weights, which are small once exported."""
    ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds of a picture by what runs the network."""
    size: tuple[int, int] | None = None
    """Height and width of the input."""


@dataclass(frozen=True)
class Sqnr:
    """What quantization left of one convolution's signal."""

    block: str
    """Its number."""
    name: str
    bits: int | None
    """Of its weights."""
    activation_bits: int | None
    """Of its outputs."""
    decibels: float | None
    """None: nothing was changed."""
    alone: float | None
    """dB of the heads when it alone is rounded; None: not measured."""


@dataclass(frozen=True)
class Sensitivity:
    """What parts of a network are worth: points of AP50 lost at each share of removed channels."""

    map50: float
    shares: tuple[float, ...]
    groups: Mapping[str, Sequence[float]]
    layers: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Stage:
    """One run directory."""

    path: Path
    kind: str
    """A key of TITLES."""
    name: str
    """Folder's name, with the one above where two are alike."""
    args: Mapping[str, Any]
    """args.yaml."""
    env: Mapping[str, Any]
    """env.json."""
    command: str
    figures: Figures
    weights: Path | None
    """File of the network that it made."""
    results: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Columns of results.csv."""
    best_epoch: int | None = None
    """Epoch of `weights`, as far as results.csv tells."""
    gammas: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None = None
    """Edges [B + 1] of bins of |γ|, channels in them before [B] and after [B]."""
    plan: Mapping[str, Any] | None = None
    """plan.json."""
    channels: tuple[LayerBar, ...] = ()
    sensitivity: Sensitivity | None = None
    document: Mapping[str, Any] = field(default_factory=dict)
    """What quantize.py or export.py wrote down."""

    @property
    def title(self) -> str:
        """What was done, in words."""
        strategy = f"{self.plan['strategy']} " if self.plan and isinstance(self.plan.get("strategy"), str) else ""
        return strategy + TITLES[self.kind]

    @property
    def sqnr(self) -> tuple[Sqnr, ...]:
        """Of every layer of a quantized network."""
        rows = self.document.get("layers")
        rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
        return tuple(
            Sqnr(str(row.get("block", row.get("name"))), str(row.get("name")), _integer(row.get("bits")),
                 _integer(row.get("activation_bits")), _number(row.get("sqnr_db")), _number(row.get("alone_db")))
            for row in rows
        )  # fmt: skip


def read_stage(path: Path) -> Stage:
    """What a run directory tells without its weights.

    Raises:
        InputError: no run directory, or one of its files is damaged; names it.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no folder; a run directory is wanted, such as runs/train/exp")
    args = _yaml(path / "args.yaml")
    document = _written_document(path)
    plan = _json(path / "plan.json")
    kind = _kind(path, args, plan, document)
    if kind is None:
        raise InputError(f"{path}: no run directory of train.py, *_prune.py, quantize.py or export.py: it has no "
                         "results.csv, plan.json, layers with sqnr_db, or exported file")  # fmt: skip
    env = _json(path / "env.json")
    results = read_results(path / "results.csv") if kind in TRAININGS and (path / "results.csv").is_file() else {}
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    command = shown_command(kind, args, _called(path, env), plan)
    stage = Stage(path, kind, path.resolve().name, args, env, command, Figures(), weights,
                  results, plan=plan or None, channels=_bars(path / "channels.csv") if kind == "prune" else (),
                  document=document)  # fmt: skip
    if kind in TRAININGS:
        stage = replace(stage, best_epoch=_best_epoch(results, args), gammas=_gammas(path / "gamma_histogram.csv"))
    if kind == "sensitivity":
        stage = replace(stage, sensitivity=_sensitivity(path / "sensitivity.csv"))
    return replace(stage, figures=_figures(stage))


def _called(path: Path, env: Mapping[str, Any]) -> Sequence[str]:
    """Script and flags, where env.json has them, or journey.json of compress.py in the folder above; else nothing."""
    stages = _json(path.resolve().parent / "journey.json").get("stages")
    entries = [entry for entry in stages if isinstance(entry, Mapping)] if isinstance(stages, list) else []
    named = (entry.get("command") for entry in entries if entry.get("name") == path.resolve().name)
    found = env.get("command") or next(named, None)
    return [str(word) for word in found] if isinstance(found, list) else []


def _kind(path: Path, args: Mapping[str, Any], plan: Mapping[str, Any], document: Mapping[str, Any]) -> str | None:
    """What a run is told by: its files, and for a training its flags."""
    if "certificate" in plan or "strategy" in plan:
        return "prune"
    if isinstance(document.get("layers"), list):
        return "quantize"
    if (path / "sensitivity.csv").is_file():
        return "sensitivity"
    if (path / "results.csv").is_file() or (path / "weights" / "best.pt").is_file():
        for flag, kind in (("quantized", "qat"), ("sr", "sparse"), ("KDstr", "distil"), ("AT_str", "distil")):
            if args.get(flag):
                return kind
        return "distil" if args.get("t_weights") else "train"
    return "export" if "format" in args and any((path / name).exists() for name in (*WEIGHTS, FPGA)) else None


def _figures(stage: Stage) -> Figures:
    """What the run's own files say."""
    if stage.plan is not None and stage.kind == "prune":
        return figures_of(stage.plan, "after")
    found = figures_of(stage.document, "after") if stage.document else Figures()
    cfg = stage.path / "model.cfg"
    if cfg.is_file():
        network = cfg_file.load(cfg)
        cost, net = network_cost(network), network.net
        found = replace(found, parameters=cost.parameters, macs=cost.macs, size=(net.height, net.width),
                        bytes=None if stage.kind in ("quantize", "qat") else file_bytes(network))  # fmt: skip
    if stage.kind == "export":
        files = [stage.weights] if stage.weights is not None else (stage.path / FPGA).rglob("*")
        found = replace(found, bytes=sum(file.stat().st_size for file in files if file.is_file()))
    if stage.best_epoch is not None:
        row = list(stage.results["epoch"]).index(stage.best_epoch)
        scores = (_number(stage.results.get(key, {row: None})[row]) for key in ("map50", "map50_95"))
        return replace(found, **dict(zip(("map50", "map50_95"), scores, strict=True)))
    return found


def figures_of(document: Mapping[str, Any], when: str) -> Figures:
    """Those under `before` or `after` in the document of a pruning or quantization."""
    row = document.get(when)
    row = dict(row) if isinstance(row, Mapping) else {}
    if isinstance(document.get("map50"), Mapping):
        row.setdefault("map50", document["map50"].get(when))
    latency = document.get("latency")
    latency = latency if isinstance(latency, Mapping) else {}
    runtime = str(latency.get("runtime", document.get("runtime", "PyTorch")))
    runtime = f"PyTorch, {runtime}" if runtime.startswith("CPU") else runtime
    ms = _number(row.get("ms"))
    sides = (latency.get("height"), latency.get("width"))
    whole = {"parameters": row.get("parameters"), "macs": row.get("macs"),
             "bytes": row.get("weights_bytes", row.get("bytes", document.get("bytes")))}  # fmt: skip
    return Figures(
        _number(row.get("map50")),
        _number(row.get("map50_95")),
        **{key: int(value) if _number(value) is not None else None for key, value in whole.items()},
        ms={} if ms is None else {runtime: ms},
        size=tuple(map(int, sides)) if all(isinstance(side, int) for side in sides) else None,
    )


def _best_epoch(results: Mapping[str, Sequence[float]], args: Mapping[str, Any]) -> int | None:
    """Epoch that train.py keeps as best.pt: the fittest; of a sparse training the last one."""
    if not all(results.get(key) for key in ("epoch", "map50", "map50_95")):
        return None
    values = [fitness(*row) for row in zip(results["map50"], results["map50_95"], strict=True)]
    known = [row for row, value in enumerate(values) if np.isfinite(value)]
    if not known:
        return None
    return int(results["epoch"][known[-1] if args.get("sr") else max(known, key=lambda row: values[row])])


def _gammas(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """First and last row of gamma_histogram.csv; the top of the last bin is as far as the table goes."""
    if not path.is_file():
        return None
    columns = read_results(path)
    table = np.array([values for name, values in columns.items() if name != "epoch"]).T
    try:
        lower = [float(name) for name in columns if name != "epoch"]
    except ValueError:
        raise InputError(f"{path}:1: columns are named by the lower edges of the bins") from None
    if not len(table) or len(lower) < 3:
        return None
    return np.array([*lower, lower[-1] ** 2 / lower[-2]]), table[0], table[-1]


def _bars(path: Path) -> tuple[LayerBar, ...]:
    """Rows of channels.csv."""

    def bar(row: Mapping[str, str]) -> LayerBar:
        chain = int(row["chain"]) if row["chain"] else None
        return LayerBar(int(row["block"]), int(row["before"]), int(row["after"]), chain, row["candidate"] == "1",
                        row["new_block"] == "")  # fmt: skip

    return tuple(_rows(path, bar))


def _sensitivity(path: Path) -> Sensitivity:
    """What sensitivity.csv says."""
    rows = tuple(_rows(path, lambda row: (row["kind"], f"{row['number']} {row['name']}".strip(), row["name"],
                                          float(row["share"]), float(row["drop"]), float(row["map50"]))))  # fmt: skip
    if not rows:
        raise InputError(f"{path}: holds no rows")
    parts: dict[str, dict[str, list[float]]] = {"group": {}, "layer": {}}
    shares: dict[float, None] = {}
    for kind, title, name, share, drop, _ in rows:
        if kind in parts:
            parts[kind].setdefault(title if kind == "group" else name, []).append(drop)
            shares[share] = None
    whole = {kind: {name: drops for name, drops in of.items() if len(drops) == len(shares)}
             for kind, of in parts.items()}  # fmt: skip
    return Sensitivity(rows[0][-1], tuple(shares), whole["group"], whole["layer"])


def _rows(path: Path, read: Any) -> Iterator[Any]:
    """Every row of a CSV as `read` makes it of a mapping."""
    if not path.is_file():
        return
    for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path, max_bytes=LARGEST_FILE))), 2):
        try:
            yield read(row)
        except (KeyError, TypeError, ValueError) as failure:
            raise InputError(f"{path}:{number}: not as this suite writes it ({failure})") from None


def _written_document(path: Path) -> Mapping[str, Any]:
    """What quantize.py or export.py printed with --json and left in the run."""
    for name in ("quantize.json", "export.json"):
        if found := _json(path / name):
            return found
    return {}


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path, max_bytes=LARGEST_FILE))
    except (ValueError, RecursionError) as failure:
        if isinstance(failure, InputError):
            raise
        raise InputError(f"{path}: no JSON ({failure})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON object was expected")
    return found


def _yaml(path: Path) -> Mapping[str, Any]:
    """A YAML mapping; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(read_text(path, max_bytes=1 << 20))
    except (yaml.YAMLError, RecursionError) as failure:
        raise InputError(f"{path}: no YAML ({str(failure).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: flags and their values were expected")
    return found


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric and np.isfinite(value) else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None
