"""The same recipes on three data sets, three seeds each, beside what a network gets without them.

Every row begins with a finished network. It is compared with that network trained on for as many epochs as the journey
trains (the honest reference), with half of its multiply-adds without any training, with smaller pictures, and with
plain quantize.py. Int8 networks are measured in onnxruntime, the others in PyTorch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.compare import signed
from benchmarks.rows import BCCD, BF16, CHESS, ROADSIGNS
from benchmarks.trainings import RUNS, STORED, TRAIN, Finished, python, shared, train, weights_of
from utils.checkpoint import read_checkpoint
from utils.files import read_text
from utils.report.tables import Column, markdown_table

RECIPES = ("balanced", "smallest")
SEEDS = (0, 1, 2)
DIFFERENCES = ("map50_difference", "map50_95_difference")


@dataclass(frozen=True)
class Goal:
    """One finished network."""

    what: str
    source: str
    """Row of the network."""
    data: str
    """`{shared}` in it is the folder of the real data."""
    size: int
    seed: int


SETS = {
    "roadsigns": ("roadsigns (21 classes), yolov3-tiny", "roadsigns-yolov3-tiny-33", ROADSIGNS, 224),
    "bccd": ("bccd (3 classes), yolov4-tiny", "bccd-yolov4-tiny", BCCD, 256),
    "chess": ("chess (13 classes), yolov3-tiny", "chess-yolov3-tiny", CHESS, 256),
}
ROWS = {
    f"goal-{key}{suffix}": Goal(what, f"{source}{suffix}", data, size, seed)
    for key, (what, source, data, size) in SETS.items()
    for seed, suffix in ((seed, f"-seed{seed}" if seed else "") for seed in SEEDS)
}


def finish(name: str, row: Goal) -> Finished:
    """Compress by both recipes, make the references, compare all; what is done of it is kept.

    Raises:
        InputError: the row of the finished network is missing.
    """
    source, folder, data = weights_of(row.source), RUNS / name, row.data.format(shared=shared())
    common = ["--data", data, "--img_size", str(row.size)]
    commands = []
    for recipe in RECIPES:
        changes = ["--set", "all.amp=bf16", "all.workers=1", "all.cache-images=true", f"all.seed={row.seed}"]
        commands.append(["compress.py", *common, "--weights", str(source), "--recipe", f"data/recipes/{recipe}.yaml",
                         "--project", str(folder), "--name", recipe, *changes])  # fmt: skip
        python(*commands[-1])
    epochs = max(sum(_epochs(folder / recipe)) for recipe in RECIPES)
    train(folder / "on", ["train.py", *common, "--weights", str(source), "--epochs", str(epochs), "--seed",
                          str(row.seed), *TRAIN, *BF16, "--project", str(folder), "--name", "on"])  # fmt: skip
    _once(folder / "half", "slim_prune.py", *common, "--weights", str(source), "--target-macs", "0.5", "--multiple-of",
          "8", "--no-test", "--project", str(folder), "--name", "half")  # fmt: skip
    _once(folder / "rounded", "quantize.py", *common, "--weights", str(source), "--project", str(folder), "--name",
          "rounded")  # fmt: skip
    _once(folder / "plain", "export.py", "--weights", str(folder / "rounded/model.pt"), "--int8", "--project",
          str(folder), "--name", "plain")  # fmt: skip
    side = _smaller(
        row.size, _cost(folder / "balanced/prune")["macs"], _cost(folder / "balanced/prune", "before")["macs"]
    )
    files = {
        "original": source,
        f"trained on, {epochs} epochs": folder / "on/weights/best.pt",
        "half of the multiply-adds, no training": folder / "half/model.pt",
        f"original @{side}": f"{source}@{side}",
        "original, 8 bits": folder / "plain/model.onnx",
    }
    for recipe in RECIPES:
        tuned = sorted((folder / recipe).glob("tune*/weights/best.pt"))[-1]
        files |= {f"{recipe}, float": tuned, f"{recipe}, 8 bits": folder / recipe / "int8/model.onnx"}
    compared = json.loads(
        python("-m", "benchmarks.compare", *common, *(f"{key}={file}" for key, file in files.items()), "--json")
    )
    document = {
        **compared,
        "command": " ".join(["python", *commands[0]]).replace(shared(), "../shared"),
        "epochs": epochs,
        "original_epochs": int(read_checkpoint(source)["args"]["epochs"]),
        "data": row.data.format(shared="../shared"),
    }
    return Finished(document, {} if row.seed else {f"{name}_detections.jpg": folder / "balanced/prune/detections.jpg"})


def _once(made: Path, *command: str) -> None:
    if not made.exists():
        python(*command)


def _epochs(journey: Path) -> list[int]:
    """Epochs of the trainings of a journey."""
    stages = json.loads(read_text(journey / "journey.json"))["stages"]
    return [stage["document"]["epochs"] for stage in stages if stage["document"] and "best_epoch" in stage["document"]]


def _cost(pruning: Path, when: str = "after") -> Mapping[str, Any]:
    return json.loads(read_text(pruning / "plan.json"))[when]


def _smaller(side: int, after: int, before: int, stride: int = 32) -> int:
    """The side whose multiply-adds come next to those of the pruned network."""
    return round(side * math.sqrt(after / before) / stride) * stride


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """Lines of docs/results.md: one table a data set, written with its first seed."""
    row = ROWS[name]
    if row.seed:
        return []
    names = [other for other, one in ROWS.items() if one.what == row.what and (STORED / f"{other}.json").exists()]
    documents = [json.loads(read_text(STORED / f"{other}.json")) for other in names]
    columns = ("", Column("AP50", ".3f"), "to the original", Column("AP50-95", ".3f"), "to the original",
               Column("parameters ÷", ".1f"), Column("multiply-adds ÷", ".1f"), Column("file ÷", ".1f"))  # fmt: skip
    d = document
    return [
        f"## {name}",
        "",
        f"{row.what} @{row.size}: the mean of {len(documents)} seeds. The original was trained for "
        f"{d['original_epochs']} epochs; each recipe trains for {d['epochs']} at most. Intervals hold the pictures and "
        "the seeds: the mean half width of the paired bootstraps, and 1.96 standard errors of the seeds, as a root of "
        "the sum of squares.",
        "",
        markdown_table(columns, list(_means(documents))),
        "",
        f"    {d['command']}",
        "",
        f"{d['images']} pictures, {d['draws']} draws. {d['machine']}, {d['threads']} threads, PyTorch {d['torch']}, "
        f"commit {(d['commit'] or 'unknown')[:9]}.",
        "",
    ]


def _means(documents: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for every network, over the seeds."""
    rows = []
    for place, first in enumerate(documents[0]["networks"]):
        networks = [document["networks"][place] for document in documents]
        originals = [document["networks"][0] for document in documents]
        smaller = [mean(o[key] / n[key] for o, n in zip(originals, networks, strict=True))
                   for key in ("parameters", "macs", "bytes")]  # fmt: skip
        gains = [signed(_joined([n[key] for n in networks])) if place else None for key in DIFFERENCES]
        accuracies = [mean(n[key] for n in networks) for key in ("map50", "map50_95")]
        rows.append((first["network"], accuracies[0], gains[0], accuracies[1], gains[1], *smaller))
    return rows


def _joined(differences: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean difference over the seeds, and the interval that `section` explains."""
    values = [value for value, *_ in differences]
    pictures = mean((high - low) / 2 for _, low, high in differences)
    seeds = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    half = math.hypot(pictures, seeds)
    return mean(values), mean(values) - half, mean(values) + half
