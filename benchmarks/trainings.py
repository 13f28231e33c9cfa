"""Trainings that stand alone, and the same pruned network fine-tuned with each distillation strategy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from benchmarks import suite
from benchmarks.suite import BCCD, BF16, CHESS, ROADSIGNS, RUNS, SEEDS, TRAIN, DataSet, Document, Finished, PageSection
from utils.files import read_text
from utils.report.run_dir import read_results
from utils.report.tables import Column

FIGURES = ("map50", "map50_95", "precision", "recall", "f1", "parameters", "macs")


@dataclass(frozen=True)
class Training:
    """One training."""

    what: str
    cfg: str
    data: DataSet
    epochs: int
    seed: int = 0
    size: int = 256
    flags: tuple[str, ...] = ()
    """Of train.py, beside the above."""

    def finish(self, name: str) -> Finished:
        """Train, or go on, and measure the best weights."""
        folder, start = RUNS / name, ["--cfg", self.cfg, "--data", self.data.file, *self.flags, "--img_size", self.size]
        lasts = ["--epochs", self.epochs, "--seed", self.seed, *TRAIN, "--project", RUNS, "--name", name]
        command = suite.train(folder, "train.py", *start, *lasts)
        tested = [*self.data.flags(self.size), "--json", "--weights", folder / "weights" / "best.pt"]
        figures = json.loads(suite.python("test.py", *tested))
        document = {
            "command": command,
            "seed": self.seed,
            **suite.machine(json.loads(read_text(folder / "env.json"))),
            "train_minutes": round(sum(read_results(folder / "results.csv")["seconds"]) / 60, 1),
            **{key: figures[key] for key in FIGURES},
        }
        return Finished(document, folder / "val_batch0_pred.jpg" if name == PICTURED else None)


def seeded(name: str, seed: int) -> str:
    """The row of another seed."""
    return f"{name}-seed{seed}" if seed else name


PICTURED = "bccd-yolov4-tiny"
"""The row whose picture is in docs/images; its data's licence allows it."""
V4, V3 = "cfg/yolov4-tiny.cfg", "cfg/yolov3-tiny.cfg"
COCO = ("-pt", "--weights", "{shared}/data/weights/yolov3-tiny.weights", *BF16)
BEGUN = {
    "bccd-yolov4-tiny": Training("from scratch", V4, BCCD, 60),
    "roadsigns-yolov3-tiny-33": Training(
        "from COCO weights, no flips", V3, ROADSIGNS, 33, size=224, flags=("--no-flip", *COCO)
    ),
    "chess-yolov3-tiny": Training("from COCO weights", V3, CHESS, 60, flags=COCO),
}
SPARSE = ("-sr", "--prune", "1", "--s", "auto", "--weights", f"{RUNS}/chess-yolov3-tiny/weights/best.pt", *BF16)
RATIO = ("--hyp", "benchmarks/hyp/ratio.yaml")
ALONE = {
    **{seeded(name, seed): replace(row, seed=seed) for name, row in BEGUN.items() for seed in SEEDS},
    "bccd-yolov4-tiny-seed2": replace(BEGUN[PICTURED], what="from scratch, in bfloat16", seed=2, flags=BF16),
    "chess-yolov3-tiny-sparse": Training("after it, sparse training", V3, CHESS, 80, flags=SPARSE),
    "bccd-assignment-darknet": Training("assignment: darknet, older rules", V4, BCCD, 20),
    "bccd-assignment-ratio": Training("assignment: ratio, older rules", V4, BCCD, 20, flags=RATIO),
}

STRATEGIES: dict[str, tuple[str, ...]] = {
    "plain": (),
    **{f"kd{name}": ("--KDstr", name) for name in ("1", "2", "3", "4", "5")},
    **{f"at{name}": ("--AT_str", name) for name in ("1", "2", "3")},
    "at2x10": ("--AT_str", "2", "--kd-weight", "10"),
}


def _distilled(
    key: str, student: str, teacher: str, epochs: int, seeds: Mapping[str, int], *flags: str
) -> dict[str, Training]:
    """The pruned network of a row, fine-tuned with and without the network before.

    Args:
        key: the rows begin with it.
        student: row of the pruned network.
        teacher: row of the network before.
        epochs: of each.
        seeds: how many seeds each strategy has.
        flags: more of train.py.
    """
    pruned, best = RUNS / student / "pruned", str(RUNS / teacher / "weights" / "best.pt")
    start = ("--weights", str(pruned / "model.pt"), "--hyp", "data/hyp.finetune.yaml", *flags)
    base = replace(BEGUN[teacher], what="distillation", cfg=str(pruned / "model.cfg"), epochs=epochs)
    rows = {}
    for strategy, count in seeds.items():
        teaching = ("--t_weights", best, *STRATEGIES[strategy]) if STRATEGIES[strategy] else ()
        for seed in SEEDS[:count]:
            rows[seeded(f"{key}-{strategy}", seed)] = replace(base, seed=seed, flags=(*start, *teaching))
    return rows


BCCD_SEEDS = dict.fromkeys(STRATEGIES, 1) | {"plain": 3, "kd3": 3, "kd4": 3, "at3": 3}
ROADSIGNS_SEEDS = {"plain": 3, "kd3": 1, "kd4": 3}
DISTILLED = {
    "bccd": _distilled("bccd", "bccd-yolov4-tiny-slim", "bccd-yolov4-tiny", 10, BCCD_SEEDS),
    "roadsigns": _distilled(
        "roadsigns", "roadsigns-yolov3-tiny-33-gentle", "roadsigns-yolov3-tiny-33", 8, ROADSIGNS_SEEDS, "--no-flip"
    ),
}
ROWS = {**ALONE, **DISTILLED["bccd"], **DISTILLED["roadsigns"]}


def sections(stored: Mapping[str, Document]) -> Iterator[PageSection]:
    """The trainings in one table, the distillations in another."""
    lines, alone = [], {name: stored[name] for name in ALONE if name in stored}
    for name, document in alone.items():
        accuracy = [document[key] for key in ("map50", "map50_95", "precision", "recall", "parameters")]
        costs = (document["macs"] / 1e9, document["train_minutes"], document["threads"])
        lines.append([name, ALONE[name].what, ALONE[name].epochs, *accuracy, *costs])
    columns = ["row", "what", "epochs", "AP50", "AP50-95", "P", "R", "parameters", "GMACs"]
    yield PageSection(
        "Trainings",
        "Best epoch, of the sparse training the last one, averaged weights; minutes are those of the training steps.",
        [*columns, Column("train min", ".1f"), "threads"],
        lines,
        commands=[document["command"] for document in alone.values() if not document["seed"]],
        note=f"Other seeds alike, with --seed. {suite.place(*alone.values())}",
        picture=("boxes found in validation images", f"{PICTURED}_val_batch0_pred.jpg"),
    )
    lines = [_strategy(name, stored) for name in STRATEGIES]
    columns = ("", "flags", *(f"{key} {figure}" for key in DISTILLED for figure in ("seeds", "AP50", "AP50-95")))
    all_of_it = [stored[name] for rows in DISTILLED.values() for name in rows if name in stored]
    yield PageSection(
        "Distillation",
        "A pruned network, fine-tuned without a teacher and with the network before. ± is the standard deviation over "
        "the seeds; the mean is over both data sets.",
        (*columns, "mean AP50", "AP50-95"),
        lines,
        commands=[stored[f"{key}-plain"]["command"] for key in DISTILLED],
        note=f"The others with the flags of the table and --t_weights. {suite.place(*all_of_it)}",
    )


def _strategy(name: str, stored: Mapping[str, Document]) -> list[Any]:
    """The line of a strategy: its figures on each data set, and their mean where all seeds are there."""
    line: list[Any] = [name, " ".join(STRATEGIES[name]) or "no teacher"]
    sets = []
    for key in DISTILLED:
        names = [seeded(f"{key}-{name}", seed) for seed in SEEDS]
        sets.append([stored[row] for row in names if row in stored])
        line += [len(sets[-1]) or None, *accuracies(sets[-1])]
    if any(len(documents) < len(SEEDS) for documents in sets):
        return [*line, None, None]
    means = []
    for pair in zip(*sets, strict=True):
        means.append({key: mean(document[key] for document in pair) for key in ("map50", "map50_95")})
    return [*line, *accuracies(means)]


def accuracies(documents: Sequence[Document]) -> list[str | None]:
    """AP50 and AP50-95 over seeds: the mean, and the standard deviation where there are several."""
    cells: list[str | None] = []
    for key in ("map50", "map50_95"):
        values = [document[key] for document in documents]
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.3f}{spread}" if values else None)
    return cells
