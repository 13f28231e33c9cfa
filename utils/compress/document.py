"""Run directories of a compression as one document, in the order in which one network was made from another.

Lineage proves the order: a file names the sha256 of the files that it was made from. Values are plain, fractions 0…1.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils.cli import flag, image_side, non_negative_int, positive_int, random_seed
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.darknet.network import file_bytes
from utils.errors import InputError, SuiteError
from utils.export.settings import COMPANIONS, PAIRS, SUFFIXES
from utils.files import read_text, reading_yaml, regular_file, sha256
from utils.model_files import cfg_of
from utils.report.cost import network_cost
from utils.report.run_dir import last_epochs, read_results
from utils.runtime.choice import KINDS
from utils.runtime.exported import ExportedFile
from utils.training.hyperparameters import fitness
from utils.training.settings import OFF

FPGA = f"model{SUFFIXES['fpga']}"
"""Folder that export.py makes in place of a file."""
WEIGHTS = (
    "weights/best.pt",
    "weights/last.pt",
    "model.pt",
    *(f"model{suffix}" for kind, suffix in SUFFIXES.items() if kind != "fpga"),
)
"""Files that a run can have made; the first one that exists counts."""
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
"""Kinds of runs."""
TRAININGS = ("train", "sparse", "tune", "distil", "qat")
CERTIFICATE = ("compact_vs_silenced", "compact_vs_silenced_float64", "compact_vs_keep_size", "border", "side")
SQNR = {
    "block": "block",
    "name": "name",
    "bits": "bits",
    "activation_bits": "activation_bits",
    "decibels": "sqnr_db",
    "alone": "alone_db",
}
"""Names of the report for what quantize.json has of a layer."""
LARGEST_FILE = 16 << 20
"""Largest text file of a run that is read, in bytes."""
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, LookupError, RecursionError)
"""Failures of reading a file that this suite has not written like that."""
BASELINE = ("network", "map50", "map50_interval", "map50_95", "parameters", "macs", "ms")
"""Keys of a network in the document of `benchmarks.compare --json --time`."""

Run = dict[str, Any]
"""Entry of `runs` in the document."""


@dataclass(frozen=True)
class MeasureSettings:
    """Settings of the measurement of a report's networks."""

    batch_size: int = flag(16, "pictures at a time", type=positive_int, metavar="N")
    draws: int = flag(1000, "data sets drawn for the intervals", type=positive_int, metavar="N")
    seed: int = flag(0, "of the draws", type=random_seed, metavar="N")
    pictures: int = flag(6, "most pictures shown with lost and gained objects", type=non_negative_int, metavar="N")


class Named(NamedTuple):
    """A network of the command line, [NAME=]FILE[@SIDE]."""

    name: str
    file: str
    """.pt, a file of export.py, .weights with its cfg beside it, or in the benchmarks CFG:WEIGHTS."""
    side: int | None
    """Of the network input; None: the network's own."""


def gather(paths: Sequence[Path | str], title: str | None = None) -> dict[str, Any]:
    """Return the document of run directories; runs that do not come from one another keep their order.

    Raises:
        InputError: one is given twice, or cannot be read.
    """
    folders = [Path(path) for path in paths]
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(f"{folders[number]}: is given twice")
    runs = [read_run(folder) for folder in folders]
    for run, name in zip(runs, _names(places), strict=True):
        run["name"] = name
    runs = _ordered(runs)
    _link(runs)
    goal = max(reversed(runs), key=lambda run: len(ancestors(run)))
    same_folder = len(places) > 1 and len({place.parent for place in places}) == 1
    return {
        "schema": 1,
        "title": title or (places[0].parent.name if same_folder else places[0].name),
        "goal": goal["name"],
        "runs": runs,
        "measurement": None,
        "baselines": [],
    }


def read_run(path: Path) -> Run:
    """Return what a run directory tells.

    Raises:
        InputError: no run directory, or one of its files is damaged.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no folder; a run directory is wanted, such as runs/train/exp")
    try:
        return _read_run(path)
    except SuiteError:
        raise
    except DAMAGED as failure:
        raise InputError(f"{path}: not as this suite writes it ({type(failure).__name__}: {failure})") from None


def _read_run(path: Path) -> Run:
    args, env, plan = (read_mapping(path / name) for name in ("args.yaml", "env.json", "plan.json"))
    document = read_mapping(path / "quantize.json") or read_mapping(path / "export.json")
    kind = _kind(path, args, plan, document)
    results = read_results(path / "results.csv") if kind in TRAININGS and (path / "results.csv").is_file() else {}
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    best = best_epoch(results, sparse=bool(args.get("sr")))
    figures = _figures(path, kind, weights, args, plan or document)
    if best is not None:
        row = results["epoch"].index(best)
        figures |= {key: results[key][row] for key in ("map50", "map50_95")}
    digest, lineage = _lineage(weights)
    return {
        "kind": kind,
        "title": f"{plan['strategy']} pruning" if "strategy" in plan else TITLES[kind],
        "run_dir": str(path),
        "command": shlex.join(["python", *env["command"]]) if env.get("command") else "",
        "git_commit": env.get("git_commit"),
        "time": env.get("time"),
        "machine": env.get("cpu"),
        "torch": env.get("packages", {}).get("torch"),
        "data": args.get("data"),
        "weights": None if weights is None else str(weights),
        "sha256": digest,
        "lineage": lineage,
        "figures": figures,
        "reported": dict(figures),
        "measured": None,
        "before_ms": _figures_of(plan, "before")["ms"] if kind == "prune" else {},
        "best_epoch": best,
        **last_epochs(results),
        "epochs": {key: _finite(results[key]) for key in ("epoch", "map50", "map50_95") if key in results},
        "channels": read_channels(path / "channels.csv") if kind == "prune" else [],
        "certificate": {key: plan["certificate"][key] for key in CERTIFICATE if key in plan["certificate"]}
        if "certificate" in plan
        else None,
        "sqnr": [{key: layer.get(name) for key, name in SQNR.items()} for layer in document.get("layers", ())],
    }


def _kind(path: Path, args: Mapping[str, Any], plan: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return the kind of a run, which its files tell, and the flags of a training."""
    if "strategy" in plan:
        return "prune"
    if "layers" in document:
        return "quantize"
    if (path / "results.csv").is_file() or (path / "weights" / "best.pt").is_file():
        if args.get("quantized") not in (None, *OFF):
            return "qat"
        if args.get("sr"):
            return "sparse"
        return "distil" if any(args.get(flag) for flag in ("KDstr", "AT_str", "t_weights")) else "train"
    if "format" in args and any((path / name).exists() for name in (*WEIGHTS, FPGA)):
        return "export"
    raise InputError(
        f"{path}: no run directory of train.py, *_prune.py, quantize.py or export.py: it has no results.csv, "
        "plan.json, layers with sqnr_db, or exported file"
    )


def _figures(
    path: Path, kind: str, weights: Path | None, args: Mapping[str, Any], document: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures of the network that a run made, as its files have them; None: not known."""
    figures = _figures_of(document, "after")
    if kind == "prune":
        return figures
    if (path / "model.cfg").is_file():
        network = cfg_file.load(path / "model.cfg")
        # Rounded weights are small once they are exported; until then a .weights file says nothing of them.
        size = None if kind in ("quantize", "qat") else file_bytes(network)
        figures |= _costs(network) | {"bytes": size}
    if (file := exported(weights)) is not None:
        figures |= _costs(file.metadata.network)
    if kind == "export":
        companions = () if args["format"] in PAIRS else COMPANIONS.get(args["format"], ())
        files = (path / FPGA).rglob("*") if weights is None else [weights, *map(weights.with_suffix, companions)]
        figures["bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    return figures


def _costs(network: Network) -> dict[str, Any]:
    cost = network_cost(network)
    return {"parameters": cost.parameters, "macs": cost.macs, "size": [network.net.height, network.net.width]}


def _figures_of(document: Mapping[str, Any], when: str) -> dict[str, Any]:
    """Return the figures under `before` or `after` in a document of a pruning or quantization."""
    values = document.get(when) or {}
    both = document.get("map50")
    latency = document.get("latency") or {}
    runtime = latency.get("runtime") or document.get("runtime") or "PyTorch"
    ms = values.get("ms")
    return {
        "map50": values.get("map50", both.get(when) if isinstance(both, Mapping) else None),
        "map50_95": values.get("map50_95"),
        "parameters": values.get("parameters"),
        "macs": values.get("macs"),
        "bytes": values.get("weights_bytes", document.get("bytes")),
        "ms": {} if ms is None else {f"PyTorch, {runtime}" if runtime.startswith("CPU") else runtime: ms},
        "size": [latency["height"], latency["width"]] if latency else None,
    }


def best_epoch(results: Mapping[str, Sequence[float]], *, sparse: bool) -> int | None:
    """Return the epoch that train.py keeps as best.pt: the fittest, or of a sparse training the last evaluated."""
    scores = zip(*(results.get(key, ()) for key in ("epoch", "map50", "map50_95")), strict=True)
    known = {int(epoch): fitness(*pair) for epoch, *pair in scores if all(map(math.isfinite, pair))}
    if not known:
        return None
    return list(known)[-1] if sparse else max(known, key=known.__getitem__)


def _finite(values: Sequence[float]) -> list[float | None]:
    """Return values as JSON has them, None for an epoch without one."""
    return [value if math.isfinite(value) else None for value in values]


def exported(weights: Path | str | None) -> ExportedFile | None:
    """Return what a file for another runtime says of itself; None for another file."""
    kind = KINDS.get(Path(weights).suffix) if weights is not None else None
    return None if kind is None or weights is None else kind.read(Path(weights))


def _lineage(weights: Path | None) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the sha256 of a file and the lineage inside it; a .weights or .torchscript file has none."""
    if weights is None:
        return None, []
    if weights.suffix == ".pt":
        from utils.checkpoint import read_checkpoint  # torch

        entries = read_checkpoint(weights).get("lineage", ())
    else:
        file = exported(weights)
        entries = () if file is None else file.metadata.lineage
    return sha256(weights), [
        {"path": str(entry["path"]), "sha256": str(entry["sha256"]), "teacher": entry.get("teacher")}
        for entry in entries
        if {"path", "sha256"} <= set(entry)
    ]


def _ordered(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each after those it was made from."""
    makers = {run["sha256"]: run for run in runs if run["sha256"]}
    done: list[Run] = []

    def visit(run: Run) -> None:
        if run in done:
            return
        for entry in run["lineage"]:
            if entry["sha256"] in makers:
                visit(makers[entry["sha256"]])
        done.append(run)

    for run in runs:
        visit(run)
    return done


def _link(runs: Sequence[Run]) -> None:
    """Name the run that each lineage entry comes from, and take from it what it tells of the other run."""
    makers = {run["sha256"]: run["name"] for run in runs if run["sha256"]}
    files = {Path(run["weights"]).resolve() for run in runs if run["weights"]}
    named = {run["name"]: run for run in runs}
    for run in runs:
        for entry in run["lineage"]:
            entry["run"] = makers.get(entry["sha256"])
            entry["changed"] = entry["run"] is None and Path(entry["path"]).resolve() in files
        parent = named.get((parent_of(run) or {}).get("run"))
        if parent is None and run["kind"] == "export" and Path(run["weights"] or "").suffix == ".pt":
            run |= {"kind": "original", "title": TITLES["original"]}
        elif parent is not None and parent["kind"] == "prune" and run["kind"] == "train":
            run |= {"kind": "tune", "title": TITLES["tune"]}
        if parent is not None and not parent["figures"]["ms"]:  # a pruning has timed the network before it
            parent["figures"]["ms"] = parent["reported"]["ms"] = run["before_ms"]


def parent_of(run: Run) -> dict[str, Any] | None:
    """Return the lineage entry of the network that a run began with."""
    return next((entry for entry in reversed(run["lineage"]) if entry["teacher"] is None), None)


def ancestors(run: Run) -> set[str]:
    """Return the names of the runs that a run was made from."""
    return {entry["run"] for entry in run["lineage"] if entry["run"] and entry["teacher"] is None}


def _names(places: Sequence[Path]) -> list[str]:
    """Return names that differ, with as many folders above as it takes."""
    depth, names = 1, [place.name for place in places]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(place.parts[-depth:]) for place in places]
    return names


def read_channels(path: Path) -> list[dict[str, int]]:
    """Return the channels of every convolution before and after a pruning, as channels.csv has them."""
    if not path.is_file():
        return []
    rows = csv.DictReader(io.StringIO(read_text(path, max_bytes=LARGEST_FILE)))
    return [
        {
            "block": int(row["block"]),
            "before": int(row["before"]),
            "after": int(row["after"] if row["new_block"] else 0),
        }
        for row in rows
    ]


def read_mapping(path: Path) -> dict[str, Any]:
    """Return a YAML mapping or a JSON object; empty where there is no such file.

    Raises:
        InputError: the file holds something else.
    """
    if not path.is_file():
        return {}
    text = read_text(path, max_bytes=LARGEST_FILE)
    if path.suffix == ".yaml":
        with reading_yaml(path):
            content = yaml.safe_load(text)
    else:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as failure:
            raise InputError(f"{path}: no JSON ({failure})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: names and their values were expected")
    return content


def named(text: str) -> Named:
    """Return a network of the command line; an existing path is a path whatever its characters. Argparse type."""
    name, _, rest = ("", "", text) if Path(text).exists() else text.rpartition("=")
    file, at, side = ("", "", rest) if Path(rest).exists() else rest.rpartition("@")
    return Named(name or rest, file, image_side(side)) if at else Named(name or rest, rest, None)


def baseline_network(text: str) -> Named:
    """Return the network that --baselines names.

    Raises:
        InputError: no such file, or no side of an input.
    """
    try:
        network = named(text)
    except argparse.ArgumentTypeError as failure:
        raise InputError(f"--baselines {text}: {failure}") from None
    regular_file(network.file, InputError)
    if (cfg := cfg_of(Path(network.file))) is not None and not cfg.is_file():
        raise InputError(f"--baselines {text}: a Darknet .weights file does not say its network; {cfg} is not there")
    return network


def read_baselines(path: Path) -> list[dict[str, Any]]:
    """Return the networks in a document of `benchmarks.compare --json --time`.

    Raises:
        InputError: no such document, or without times.
    """
    regular_file(path, InputError)
    document = read_mapping(path)
    try:
        return [_baseline(row) for row in document["networks"]]
    except DAMAGED as failure:
        raise InputError(
            f"--baselines {path}: {type(failure).__name__}: {failure}; a document of `python -m benchmarks.compare "
            "--json --time` is wanted"
        ) from None


def _baseline(row: Mapping[str, Any]) -> dict[str, Any]:
    name, map50, (low, high), map50_95, parameters, macs, ms = (row[key] for key in BASELINE)
    accuracy = {"map50": float(map50), "low": float(low), "high": float(high), "map50_95": float(map50_95)}
    costs = {"parameters": int(parameters), "macs": int(macs), "ms": float(ms), "size": row.get("size")}
    return {"name": str(name), **accuracy, **costs}
