"""One run directory as a stage of a compression: what kind it is, what it was started with, what it wrote down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.darknet import cfg as cfg_file
from utils.darknet.network import file_bytes
from utils.errors import InputError
from utils.export.request import COMPANIONS, PAIRS, SUFFIXES
from utils.report.cost import network_cost
from utils.report.journey.command import shown_command
from utils.report.journey.tables import (
    Sqnr,
    integer,
    number,
    read_bars,
    read_gammas,
    read_json,
    read_yaml,
)
from utils.report.pruning_plots import LayerBar
from utils.report.run_dir import read_results
from utils.training.quant_flags import OFF
from utils.training.settings import fitness

WEIGHTS = ("weights/best.pt", "weights/last.pt", "model.pt",
           *(f"model{suffix}" for format, suffix in SUFFIXES.items() if format != "fpga"))  # fmt: skip
"""Where a run keeps what it made; the first one that there is counts."""
FPGA = f"model{SUFFIXES['fpga']}"
"""Folder that export.py makes in place of a file."""
TITLES = {
    "original": "original network",
    "train": "training",
    "sparse": "sparse training",
    "prune": "pruning",
    "tune": "fine-tuning",
    "distil": "distillation",
    "qat": "quantization-aware training",
    "quantize": "quantization",
    "export": "export",
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
            Sqnr(str(row.get("block", row.get("name"))), str(row.get("name")), integer(row.get("bits")),
                 integer(row.get("activation_bits")), number(row.get("sqnr_db")), number(row.get("alone_db")))
            for row in rows
        )  # fmt: skip


def read_stage(path: Path) -> Stage:
    """What a run directory tells without its weights.

    Raises:
        InputError: no run directory, or one of its files is damaged; names it.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no folder; a run directory is wanted, such as runs/train/exp")
    args = read_yaml(path / "args.yaml")
    document = _written_document(path)
    plan = read_json(path / "plan.json")
    kind = _kind(path, args, plan, document)
    if kind is None:
        raise InputError(f"{path}: no run directory of train.py, *_prune.py, quantize.py or export.py: it has no "
                         "results.csv, plan.json, layers with sqnr_db, or exported file")  # fmt: skip
    env = read_json(path / "env.json")
    results = read_results(path / "results.csv") if kind in TRAININGS and (path / "results.csv").is_file() else {}
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    command = shown_command(kind, args, _called(path, env), plan)
    stage = Stage(path, kind, path.resolve().name, args, env, command, Figures(), weights,
                  results, plan=plan or None, channels=read_bars(path / "channels.csv") if kind == "prune" else (),
                  document=document)  # fmt: skip
    if kind in TRAININGS:
        stage = replace(stage, best_epoch=_best_epoch(results, args), gammas=read_gammas(path / "gamma_histogram.csv"))
    return replace(stage, figures=_figures(stage))


def _called(path: Path, env: Mapping[str, Any]) -> Sequence[str]:
    """Script and flags, where env.json has them, or journey.json of compress.py in the folder above; else nothing."""
    stages = read_json(path.resolve().parent / "journey.json").get("stages")
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
    if (path / "results.csv").is_file() or (path / "weights" / "best.pt").is_file():
        if args.get("quantized") not in (None, *OFF):
            return "qat"
        for flag, kind in (("sr", "sparse"), ("KDstr", "distil"), ("AT_str", "distil")):
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
        companions = COMPANIONS.get(stage.args.get("format"), ()) if stage.args.get("format") not in PAIRS else ()
        files = (stage.path / FPGA).rglob("*") if stage.weights is None else [
            stage.weights, *(stage.weights.with_suffix(suffix) for suffix in companions)]  # fmt: skip
        found = replace(found, bytes=sum(file.stat().st_size for file in files if file.is_file()))
    if stage.best_epoch is not None:
        row = list(stage.results["epoch"]).index(stage.best_epoch)
        scores = (number(stage.results.get(key, {row: None})[row]) for key in ("map50", "map50_95"))
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
    ms = number(row.get("ms"))
    sides = (latency.get("height"), latency.get("width"))
    whole = {"parameters": row.get("parameters"), "macs": row.get("macs"),
             "bytes": row.get("weights_bytes", row.get("bytes", document.get("bytes")))}  # fmt: skip
    return Figures(
        number(row.get("map50")),
        number(row.get("map50_95")),
        **{key: int(value) if number(value) is not None else None for key, value in whole.items()},
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


def _written_document(path: Path) -> Mapping[str, Any]:
    """What quantize.py or export.py printed with --json and left in the run."""
    for name in ("quantize.json", "export.json"):
        if found := read_json(path / name):
            return found
    return {}
