"""Trainings that stand alone; one row of the first table of docs/results.md each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trainings import RUNS, TRAIN, Finished, describe_environment, measure, shared, train
from utils.report.run_dir import read_results
from utils.report.tables import Column, markdown_table


@dataclass(frozen=True)
class Row:
    """One training."""

    what: str
    """The question it answers."""
    cfg: str
    """`{shared}` in it is the folder of the real data, as in `data` and `flags`."""
    data: str
    epochs: int
    seed: int = 0
    size: int = 256
    flags: tuple[str, ...] = ()
    """Of train.py, beside the above."""
    publish: bool = False
    """Copy its pictures into docs/images; only for data whose licence allows it."""

    def command(self, name: str, data: str) -> list[str]:
        """The arguments of python for the training."""
        arguments = ["train.py", "--cfg", self.cfg, "--data", self.data, *self.flags, "--img_size", str(self.size),
                     "--epochs", str(self.epochs), "--seed", str(self.seed), *TRAIN,
                     "--project", str(RUNS), "--name", name]  # fmt: skip
        return [argument.format(shared=data) for argument in arguments]


BCCD, ROADSIGNS = "{shared}/data/bccd/bccd.data", "{shared}/data/roadsigns/roadsigns.data"
CHESS = "{shared}/data/chess/chess.data"
V4, V3 = "cfg/yolov4-tiny.cfg", "cfg/yolov3-tiny.cfg"
FASTEST = "{shared}/data/weights/yolo-fastest-1.1-xl"
FROM_COCO = ("-pt", "--no-flip", "--weights")
TINY_COCO = "{shared}/data/weights/yolov3-tiny.weights"
BF16 = ("--amp", "bf16")
"""Half the time on a CPU with AMX."""
ROWS = {
    "bccd-yolov4-tiny": Row("from scratch", V4, BCCD, 60, publish=True),
    "bccd-yolov4-tiny-seed1": Row("from scratch, another seed", V4, BCCD, 60, 1),
    "bccd-yolov4-tiny-seed2": Row("from scratch, a third seed, in bfloat16", V4, BCCD, 60, 2, flags=BF16),
    "bccd-yolov4-tiny-before": Row("older rules: one head for a shared anchor, ε 1e-6", V4, BCCD, 60),
    "bccd-yolov4-tiny-before-seed1": Row("older rules, another seed", V4, BCCD, 60, 1),
    "bccd-yolov4-tiny-416": Row("at 416 × 416, where most objects are of the shared anchor", V4, BCCD, 12, size=416),
    "bccd-yolov4-tiny-416-before": Row("the same by the older rules", V4, BCCD, 12, size=416),
    "roadsigns-yolov3-tiny": Row(
        "from COCO weights, no flips", V3, ROADSIGNS, 15,
        flags=(*FROM_COCO, TINY_COCO), publish=True,
    ),
    "bccd-yolov3-tiny": Row("from scratch", V3, BCCD, 60),
    "roadsigns-yolo-fastest-xl": Row(
        "from COCO weights, no flips", f"{FASTEST}.cfg", ROADSIGNS, 15, size=224,
        flags=(*FROM_COCO, f"{FASTEST}.weights"),
    ),
    "roadsigns-yolov3-tiny-33": Row(
        "from COCO weights, no flips, 224 × 224", V3, ROADSIGNS, 33, size=224, flags=(*FROM_COCO, TINY_COCO, *BF16)
    ),
    "roadsigns-yolov3-tiny-33-seed1": Row(
        "the same, another seed", V3, ROADSIGNS, 33, 1, size=224, flags=(*FROM_COCO, TINY_COCO, *BF16)
    ),
    "roadsigns-yolov3-tiny-33-seed2": Row(
        "the same, a third seed", V3, ROADSIGNS, 33, 2, size=224, flags=(*FROM_COCO, TINY_COCO, *BF16)
    ),
    **{
        f"chess-yolov3-tiny{name}": Row(what, V3, CHESS, 60, seed, flags=("-pt", "--weights", TINY_COCO, *BF16))
        for seed, (name, what) in enumerate((
            ("", "from COCO weights"), ("-seed1", "the same, another seed"), ("-seed2", "the same, a third seed")
        ))
    },
    "roadsigns-slim-scratch": Row(
        "the slim network of roadsigns-yolov3-tiny-slim from new weights, for as many epochs",
        "runs/results/roadsigns-yolov3-tiny-slim/pruned/model.cfg", ROADSIGNS, 33, size=224, flags=("--no-flip",),
    ),
    "bccd-assignment-darknet": Row("assignment: darknet (the default), older rules", V4, BCCD, 20),
    "bccd-assignment-ratio": Row(
        "assignment: ratio, older rules", V4, BCCD, 20, flags=("--hyp", "benchmarks/hyp/ratio.yaml")
    ),
}  # fmt: skip


def finish(name: str, row: Row) -> Finished:
    """Train a row, or go on with it, and measure its best weights."""
    folder = RUNS / name
    train(folder, row.command(name, shared()))
    measured = measure(row.data.format(shared=shared()), row.size, folder / "weights" / "best.pt")
    shown = ("val_batch0_pred.jpg", "results.png") if row.publish else ()
    return Finished(describe(name, row, folder, measured), {f"{name}_{picture}": folder / picture for picture in shown})


def describe(name: str, row: Row, folder: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a finished row."""
    results = read_results(folder / "results.csv")
    return {
        "command": " ".join(["python", *row.command(name, "../shared")]),
        "seed": row.seed,
        **describe_environment(folder),
        "train_minutes": round(sum(results["seconds"]) / 60, 1),
        **{key: measured[key] for key in ("map50", "map50_95", "precision", "recall", "f1", "parameters", "macs")},
        "per_class": [{key: entry[key] for key in ("name", "ap50", "ap50_95")} for entry in measured["per_class"]],
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows in one table."""
    columns = (
        "row", "what", Column("epochs"), Column("AP50", ".3f"), Column("AP50-95", ".3f"), Column("P", ".3f"),
        Column("R", ".3f"), "parameters", Column("GMACs", ".3f"), Column("train min", ".1f"),
    )  # fmt: skip
    rows = [
        (name, ROWS[name].what, ROWS[name].epochs, d["map50"], d["map50_95"], d["precision"], d["recall"],
         d["parameters"], d["macs"] / 1e9, d["train_minutes"])
        for name, d in found.items()
    ]  # fmt: skip
    return markdown_table(columns, rows)


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """Lines of docs/results.md for a training."""
    d = document
    classes = ", ".join(f"{c['name']} {c['ap50']:.3f} / {c['ap50_95']:.3f}" for c in d["per_class"])
    lines = [f"## {name}", "", f"    {d['command']}", "",
             f"Seed {d['seed']}; {d['machine']}, {d['threads']} threads, PyTorch {d['torch']}, commit "
             f"{(d['commit'] or 'unknown')[:9]}. AP50 / AP50-95 of the classes: {classes}.", ""]  # fmt: skip
    if ROWS[name].publish:
        lines += [f"![boxes found in validation pictures](images/{name}_val_batch0_pred.jpg)", "",
                  f"![course of the training](images/{name}_results.png)", ""]  # fmt: skip
    return lines
