"""The same recipes on three data sets, three seeds each, beside what a network gets without them.

Every row begins with a finished network. It is compared with that network trained on for as many epochs as the recipe
trains (the honest reference), with half of its multiply-adds without any training, with smaller pictures, and with
plain quantize.py. Int8 networks are measured in onnxruntime, the others in PyTorch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import suite
from benchmarks.compare import signed
from benchmarks.suite import BCCD, BF16, CHESS, ROADSIGNS, RUNS, SEEDS, TRAIN, DataSet, Document, Finished, Section
from benchmarks.trainings import seeded
from utils.checkpoint import read_checkpoint
from utils.files import read_text
from utils.report.tables import Column

RECIPES = ("balanced", "smallest")
DIFFERENCES = ("map50_difference", "map50_95_difference")


@dataclass(frozen=True)
class Goal:
    """One finished network."""

    network: str
    source: str
    """Row of the network."""
    data: DataSet
    size: int
    seed: int = 0

    @property
    def what(self) -> str:
        """Data set and network."""
        return f"{self.data.what}, {self.network} @{self.size}"

    def finish(self, name: str) -> Finished:
        """Compress by both recipes, make the references, compare all; what is done of it is kept.

        Raises:
            InputError: the row of the finished network is missing.
        """
        source, folder = suite.weights_of(self.source), RUNS / name
        common = ["--data", self.data.file, "--img_size", str(self.size)]
        start, project = [*common, "--weights", str(source)], ["--project", str(folder), "--name"]
        for recipe in RECIPES:
            suite.python(*self.command(name, recipe))
        epochs = max(_epochs(folder / recipe) for recipe in RECIPES)
        trained_on = ["--epochs", str(epochs), "--seed", str(self.seed), *TRAIN, *BF16]
        suite.train(folder / "on", "train.py", *start, *trained_on, *project, "on")
        half = ("--target-macs", "0.5", "--multiple-of", "8", "--no-test")
        suite.once(folder / "half", "slim_prune.py", *start, *half, *project, "half")
        suite.once(folder / "rounded", "quantize.py", *start, *project, "rounded")
        rounded = str(folder / "rounded/model.pt")
        suite.once(folder / "plain", "export.py", "--weights", rounded, "--int8", *project, "plain")
        plan = json.loads(read_text(folder / "balanced/prune/plan.json"))
        side = _smaller(self.size, plan["after"]["macs"] / plan["before"]["macs"])
        files: dict[str, object] = {
            "original": source,
            f"trained on, {epochs} epochs": folder / "on/weights/best.pt",
            "half of the multiply-adds, no training": folder / "half/model.pt",
            f"original @{side}": f"{source}@{side}",
            "original, 8 bits": folder / "plain/model.onnx",
        }
        for recipe in RECIPES:
            files[f"{recipe}, float"] = suite.tuned(name, recipe)
            files[f"{recipe}, 8 bits"] = folder / recipe / "int8/model.onnx"
        document = {
            **suite.compare(common, files),
            "command": suite.shown(self.command(name, RECIPES[0])),
            "epochs": epochs,
            "original_epochs": int(read_checkpoint(source)["args"]["epochs"]),
        }
        return Finished(document, None if self.seed else folder / "balanced/prune/detections.jpg")

    def command(self, name: str, recipe: str) -> list[str]:
        """Arguments of python for a recipe."""
        command = ["compress.py", "--data", self.data.file, "--img_size", str(self.size)]
        command += ["--weights", str(suite.weights_of(self.source)), "--recipe", f"data/recipes/{recipe}.yaml"]
        changes = ["all.amp=bf16", "all.workers=1", "all.cache-images=true", f"all.seed={self.seed}"]
        return [*command, "--project", str(RUNS / name), "--name", recipe, "--set", *changes]


GOALS = (
    Goal("yolov3-tiny", "roadsigns-yolov3-tiny-33", ROADSIGNS, 224),
    Goal("yolov4-tiny", "bccd-yolov4-tiny", BCCD, 256),
    Goal("yolov3-tiny", "chess-yolov3-tiny", CHESS, 256),
)
"""Of the first seed."""
ROWS = {
    seeded(f"goal-{goal.data.key}", seed): Goal(goal.network, seeded(goal.source, seed), goal.data, goal.size, seed)
    for goal in GOALS
    for seed in SEEDS
}


def _epochs(folder: Path) -> int:
    """Epochs of all trainings of a recipe."""
    stages = [stage["document"] or {} for stage in json.loads(read_text(folder / "journey.json"))["stages"]]
    return sum(stage["epochs"] for stage in stages if "best_epoch" in stage)


def _smaller(side: int, share: float, stride: int = 32) -> int:
    """The side whose share of the multiply-adds comes next to `share`."""
    return round(side * math.sqrt(share) / stride) * stride


def sections(stored: Mapping[str, Document]) -> Iterator[Section]:
    """A table for each data set that has its first seed."""
    ratios = [Column(f"{cost} ÷", ".1f") for cost in ("parameters", "multiply-adds", "file")]
    columns = ("", "AP50", "to the original", "AP50-95", "to the original", *ratios)
    for goal in GOALS:
        name = f"goal-{goal.data.key}"
        documents = [stored[row] for row in (seeded(name, seed) for seed in SEEDS) if row in stored]
        if name not in stored:
            continue
        first = documents[0]
        yield Section(
            name,
            f"{goal.what}: the mean of {len(documents)} seeds. The original was trained for "
            f"{first['original_epochs']} epochs; each recipe trains for {first['epochs']} at most. Intervals hold the "
            "pictures and the seeds: the mean half width of the paired bootstraps, and 1.96 standard errors of the "
            "seeds, as a root of the sum of squares.",
            columns,
            _means(documents),
            commands=[first["command"]],
            note=f"{first['images']} pictures, {first['draws']} draws. {suite.place(first)}",
            picture=("detections before and after pruning", f"{name}_detections.jpg"),
        )


def _means(documents: Sequence[Document]) -> list[list[Any]]:
    """A line for each network, the mean over the seeds."""
    lines = []
    for networks in zip(*(document["networks"] for document in documents), strict=True):
        line: list[Any] = [networks[0]["network"]]
        for figure in ("map50", "map50_95"):
            differences = [network[f"{figure}_difference"] for network in networks]
            line += [mean(network[figure] for network in networks), signed(_joined(differences)) if lines else None]
        for cost in ("parameters", "macs", "bytes"):
            ratios = [
                document["networks"][0][cost] / network[cost]
                for document, network in zip(documents, networks, strict=True)
            ]
            line.append(mean(ratios))
        lines.append(line)
    return lines


def _joined(differences: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean difference over the seeds, and the interval that `sections` explains."""
    values = [value for value, *_ in differences]
    pictures = mean((high - low) / 2 for _, low, high in differences)
    seeds = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    half = math.hypot(pictures, seeds)
    return mean(values), mean(values) - half, mean(values) + half
