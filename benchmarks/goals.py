"""The same recipes on three data sets, three seeds each; what 8 bits and runtimes make of their networks.

Every goal begins with a finished network. It is compared with that network trained on for as many epochs as the recipe
trains (the honest reference), with half of its multiply-adds without any training, with smaller pictures, and with
plain quantize.py. Int8 networks are measured in onnxruntime, the others in PyTorch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import mean, stdev

from benchmarks import latency, peers, suite
from benchmarks.compare import signed, table
from benchmarks.suite import BCCD, BF16, CHESS, ROADSIGNS, RUNS, SEEDS, TRAIN, DataSet, Document, Finished, PageSection
from benchmarks.trainings import seeded
from utils.checkpoint import read_checkpoint
from utils.cli import require
from utils.files import atomic_write_bytes, read_text
from utils.report.tables import Column

RECIPES = ("balanced", "smallest")


@dataclass(frozen=True)
class Goal:
    """One finished network, compressed by the recipes."""

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

    @property
    def name(self) -> str:
        """Row of this goal."""
        return seeded(f"goal-{self.data.key}", self.seed)

    def finish(self, name: str) -> Finished:
        """Compress by both recipes, make the references, compare all; what is done of it is kept.

        Raises:
            InputError: the row of the finished network is missing.
        """
        source, folder = suite.weights_of(self.source), RUNS / name
        start, project = [*self.data.flags(self.size), "--weights", source], ["--project", folder, "--name"]
        changes = ["all.amp=bf16", "all.workers=1", "all.cache-images=true", f"all.seed={self.seed}"]
        commands, epochs = {}, 0
        for recipe in RECIPES:
            file = f"data/recipes/{recipe}.yaml"
            commands[recipe] = ["compress.py", *start, "--recipe", file, *project, recipe, "--set", *changes]
            suite.python(*commands[recipe])
            stages = json.loads(read_text(folder / recipe / "journey.json"))["stages"]
            trainings = [stage["document"] for stage in stages if "best_epoch" in (stage["document"] or {})]
            epochs = max(epochs, sum(training["epochs"] for training in trainings))
        trained_on = ["--epochs", epochs, "--seed", self.seed, *TRAIN, *BF16]
        suite.train(folder / "on", "train.py", *start, *trained_on, *project, "on")
        half = ("--target-macs", 0.5, "--multiple-of", 8, "--no-test")
        suite.once(folder / "half", "slim_prune.py", *start, *half, *project, "half")
        suite.once(folder / "rounded", "quantize.py", *start, *project, "rounded")
        rounded = ("--weights", folder / "rounded/model.pt", "--int8")
        suite.once(folder / "plain", "export.py", *rounded, *project, "plain")
        plan = json.loads(read_text(folder / "balanced/prune/plan.json"))
        # The side whose share of the multiply-adds comes next to that of the pruned network; 32 is the largest stride.
        side = round(self.size * math.sqrt(plan["after"]["macs"] / plan["before"]["macs"]) / 32) * 32
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
            **suite.compare(self.data.flags(self.size), files),
            "command": suite.shown(commands["balanced"]),
            "epochs": epochs,
            "original_epochs": int(read_checkpoint(source)["args"]["epochs"]),
        }
        return Finished(document, None if self.seed else folder / "balanced/prune/detections.jpg")


GOALS = (
    Goal("yolov3-tiny", "roadsigns-yolov3-tiny-33", ROADSIGNS, 224),
    Goal("yolov4-tiny", "bccd-yolov4-tiny", BCCD, 256),
    Goal("yolov3-tiny", "chess-yolov3-tiny", CHESS, 256),
)
"""Of the first seed."""
CALIBRATED = {
    "quantize.py": (),
    "quantize.py, 8-bit weights": ("--target", "cpu-vnni"),
    "quantize.py, heads and two layers float": ("--quant-heads", "float", "--keep-float", "2"),
}
"""Flags of quantize.py. Boxes, objectness and classes share the tensor of a head and differ in range."""
TRAINED = "train.py --quantized 1"
AWARE = ("--quantized", "1", "--BN_Fold", "--KDstr", "4", "--epochs", "5", "--hyp", "data/hyp.quantize.yaml")


@dataclass(frozen=True)
class Quantization:
    """A float network of a goal, quantized in our ways and by the peers; onnxruntime runs all of them."""

    goal: Goal

    def finish(self, name: str) -> Finished:
        """Quantize in every way what is not quantized yet, then compare.

        Raises:
            InputError: the row of the float network, or a peer's package, is missing.
        """
        require(name, "onnx", "onnxruntime", "nncf")
        goal, folder, weights = self.goal, RUNS / name, suite.tuned(self.goal.name)
        common, networks, commands = goal.data.flags(goal.size), {"float": weights}, []
        start = [*common, "--weights", weights, "--project", folder, "--name"]
        for label, flags in CALIBRATED.items():
            networks[label] = folder / _slug(label) / "model.pt"
            commands.append(suite.once(networks[label], "quantize.py", *start, _slug(label), *flags))
        aware = [_slug(TRAINED), "--t_weights", suite.weights_of(goal.source), *AWARE, *TRAIN]
        commands.append(suite.train(folder / _slug(TRAINED), "train.py", *start, *aware))
        networks[TRAINED] = folder / _slug(TRAINED) / "weights" / "best.pt"
        files = {label: folder / f"{_slug(label)}.onnx" for label in (*networks, *peers.QUANTIZERS)}
        for label, path in networks.items():
            flags = ["--output", files[label], *["--int8"] * (label != "float")]
            suite.once(files[label], "export.py", "--weights", path, *common, *flags)
        if missing := [label for label in peers.QUANTIZERS if not files[label].exists()]:
            images = peers.calibration_images(suite.shared(goal.data.file), weights, goal.size)
            for label in missing:
                model = peers.QUANTIZERS[label](files["float"], images)
                atomic_write_bytes(files[label], peers.with_metadata(model, files["float"]))
        document = {
            "commands": commands,
            **suite.compare(common, files, "--time"),
            "peers": {package: version(package) for package in ("onnxruntime", "nncf")},
            "vnni": peers.has_vnni(),
        }
        return Finished(document)


def _slug(label: str) -> str:
    return "-".join(label.replace(".py", "").replace(",", "").replace("--", "").split())


@dataclass(frozen=True)
class Speeds:
    """The network before and after recipe balanced, float and int8, timed in every runtime at 416 × 416."""

    goal: Goal

    def finish(self, name: str) -> Finished:
        """Write the int8 files, and time all in all runtimes.

        Raises:
            InputError: the goal row is missing.
        """
        files = {"unpruned": suite.weights_of(self.goal.source), "pruned": suite.tuned(self.goal.name)}
        quantized = {"unpruned": "rounded/model.pt", "pruned": "balanced/quantize/model.pt"}
        size = ("--img_size", "416")
        for network, weights in quantized.items():
            path, source = RUNS / name / f"{network}-int8.onnx", RUNS / self.goal.name / weights
            suite.once(path, "export.py", "--weights", source, "--int8", *size, "--output", path)
            files[f"{network}, int8"] = path
        named = [f"{network}={path}" for network, path in files.items()]
        return Finished(json.loads(suite.python("-m", "benchmarks.latency", *named, *size, "--json")))


QUANTIZED = {f"{goal.data.key}-int8": Quantization(goal) for goal in GOALS}
SPEEDS = {f"speeds-{goal.network}": Speeds(goal) for goal in GOALS[:2]}
SEEDED = [replace(goal, source=seeded(goal.source, seed), seed=seed) for goal in GOALS for seed in SEEDS]
ROWS = {**{goal.name: goal for goal in SEEDED}, **QUANTIZED, **SPEEDS}


def sections(stored: Mapping[str, Document]) -> Iterator[PageSection]:
    """A table for each data set over its seeds, one for each float network that is quantized, and one of times."""
    for goal in GOALS:
        documents = [stored[row] for row in (seeded(goal.name, seed) for seed in SEEDS) if row in stored]
        if goal.name in stored:
            yield _goal_section(goal, documents)
    for name in [name for name in QUANTIZED if name in stored]:
        document = stored[name]
        yield PageSection(
            name,
            f"{QUANTIZED[name].goal.what}, pruned and distilled; the float network is --weights of the commands. 8-bit "
            "activations, 7-bit weights (--target cpu) where nothing else is said.",
            *table(document),
            commands=document["commands"],
            note=f"{_peers(document)}{document['images']} images, {document['draws']} draws. {suite.place(document)}",
        )
    for name in [name for name in SPEEDS if name in stored]:
        what = f"{SPEEDS[name].goal.network} before and after pruning in every runtime at 416 × 416."
        yield PageSection(name, what, *latency.table(stored[name]), note=f"{latency.measured(stored[name])}.")


def _goal_section(goal: Goal, documents: Sequence[Document]) -> PageSection:
    """A line for each network, the mean over the seeds."""
    lines, first = [], documents[0]
    for networks in zip(*(document["networks"] for document in documents), strict=True):
        line = [networks[0]["network"]]
        for figure in ("map50", "map50_95"):
            difference = _joined([network[f"{figure}_difference"] for network in networks])
            line += [mean(network[figure] for network in networks), signed(difference) if lines else None]
        for cost in ("parameters", "macs", "bytes"):
            originals = [document["networks"][0][cost] for document in documents]
            line.append(mean(o / network[cost] for o, network in zip(originals, networks, strict=True)))
        lines.append(line)
    seeds = "one seed" if len(documents) == 1 else f"the mean of {len(documents)} seeds"
    ratios = [Column(f"{cost} ÷", ".1f") for cost in ("parameters", "multiply-adds", "file")]
    return PageSection(
        goal.name,
        f"{goal.what}: {seeds}. The original was trained for {first['original_epochs']} "
        f"epochs; each recipe trains for {first['epochs']} at most. Intervals hold the images and the seeds: the "
        "mean half width of the paired bootstraps, and 1.96 standard errors of the seeds, as a root of the sum of "
        "squares.",
        ("", "AP50", "to the original", "AP50-95", "to the original", *ratios),
        lines,
        commands=[first["command"]],
        note=f"{first['images']} images, {first['draws']} draws. {suite.place(*documents)}",
        picture=("detections before and after pruning", f"{goal.name}_detections.jpg"),
    )


def _joined(differences: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean difference over the seeds, and the interval that `_goal_section` explains."""
    values = [value for value, *_ in differences]
    pictures = mean((high - low) / 2 for _, low, high in differences)
    seeds = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    half = math.hypot(pictures, seeds)
    return mean(values), mean(values) - half, mean(values) + half


def _peers(document: Document) -> str:
    """Versions and settings of the peers."""
    bits = "8-bit weights, as the processor has VNNI" if document["vnni"] else "7-bit weights, without VNNI"
    names = " and ".join(f"{package} {number}" for package, number in document["peers"].items())
    return f"{names}: the same float file and calibration images; {bits}. "
