"""Comparisons of networks that the rows of docs/results.md left, with intervals; a section of that page each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import signed
from benchmarks.lessons import PLAIN, STRATEGIES
from benchmarks.trainings import RUNS, Finished, python, shared
from utils.errors import InputError
from utils.report.tables import Column, markdown_table

BEST = "weights/best.pt"


@dataclass(frozen=True)
class Comparison:
    """Networks on the validation pictures of one data set; the first is what the others are compared with."""

    what: str
    data: str
    """`{shared}` in it is the folder of the real data."""
    size: int
    networks: Mapping[str, str]
    """File of each below the folder of the rows; `@SIDE` behind it is another size of the input."""
    plot: bool = False
    """Draw AP50 over parameters, multiply-adds and time."""


def best(row: str) -> str:
    """The best weights of a row, or of a step of a chain."""
    return f"{row}/{BEST}"


ROADSIGNS, BCCD = "{shared}/data/roadsigns/roadsigns.data", "{shared}/data/bccd/bccd.data"
TINY3, NANO = "roadsigns-yolov3-tiny", "roadsigns-nano"
COMPARISONS = {
    "roadsigns-pareto": Comparison(
        "What pruning is worth beside a smaller input for the unpruned network, which costs no training. regular, slim "
        "and group 0.3 and slim 0.51 start from 10 epochs of training, 15 sparse ones and 8 of fine-tuning, 33 as the "
        "unpruned network has. The others start from the unpruned network itself: slim longer (row …-33-slim), slim "
        "gentle (…-33-gentle: less pressure, smaller steps of fine-tuning), slim half (…-33-half: 24 epochs of "
        "fine-tuning) and slim taught (roadsigns-kd4).",
        ROADSIGNS, 224,
        {
            "unpruned": best(f"{TINY3}-33"),
            **{f"unpruned @{side}": f"{best(f'{TINY3}-33')}@{side}" for side in (192, 160, 128)},
            "regular 0.3": best(f"{TINY3}-regular-30/tuned"),
            "slim 0.3": best(f"{TINY3}-slim-30/tuned"),
            "group 0.3": best(f"{TINY3}-group-30/tuned"),
            "slim 0.51": best(f"{TINY3}-slim/tuned"),
            "slim longer": best(f"{TINY3}-33-slim/tuned"),
            "slim gentle": best(f"{TINY3}-33-gentle/tuned"),
            "slim half": best(f"{TINY3}-33-half/tuned"),
            "slim taught": best("roadsigns-kd4"),
        },
        plot=True,
    ),
    "roadsigns-controls": Comparison(
        "What sparse training and the inherited weights are worth: half of the channels taken out without sparse "
        "training, and slim 0.51's widths trained from new weights for as many epochs (33).",
        ROADSIGNS, 224,
        {
            "slim 0.51": best(f"{TINY3}-slim/tuned"),
            "slim 0.5, never sparse": best(f"{TINY3}-slim-dense/tuned"),
            "from new weights": best("roadsigns-slim-scratch"),
        },
    ),
    "roadsigns-nano-strategies": Comparison(
        "One network with residual units, several strategies.", ROADSIGNS, 224,
        {
            "trained": best(f"{NANO}-slim/base"),
            "sparse-trained": best(f"{NANO}-slim/sparse"),
            "slim, fine-tuned": best(f"{NANO}-slim/tuned"),
            "layer_channel, fine-tuned": best(f"{NANO}-layer_channel/tuned"),
            "shortcut 0.3": f"{NANO}-shortcut/pruned/model.pt",
            "layer, 3 units": f"{NANO}-layer/pruned/model.pt",
        },
    ),
    "bccd-distillation": Comparison(
        "One pruned network, fine-tuned without and with a teacher (seed 0).", BCCD, 256,
        {
            "plain": best("bccd-plain"),
            **{name: best(f"bccd-{name}") for name in STRATEGIES if name != PLAIN},
            "teacher": best("bccd-yolov4-tiny"),
        },
    ),
    "roadsigns-distillation": Comparison(
        "One pruned network, fine-tuned without and with a teacher (seed 0).", ROADSIGNS, 224,
        {
            "plain": best("roadsigns-plain"),
            "kd3": best("roadsigns-kd3"),
            "kd4": best("roadsigns-kd4"),
            "fine-tuned for 15 epochs, no teacher": best(f"{TINY3}-33-gentle/tuned"),
            "teacher": best(f"{TINY3}-33"),
        },
    ),
    "bccd-schedules": Comparison(
        "Right after slim pruning at 0.5: dynamic against constant s.", BCCD, 192,
        {
            "constant": "bccd-yolov4-tiny-constant/pruned/model.pt",
            "dynamic": "bccd-yolov4-tiny-dynamic/pruned/model.pt",
        },
    ),
}  # fmt: skip


def finish(name: str, comparison: Comparison) -> Finished:
    """Measure the networks.

    Raises:
        InputError: a row that it needs is not there.
    """
    files = []
    for label, place in comparison.networks.items():
        path = RUNS / place.rpartition("@")[0] if "@" in place else RUNS / place
        if not path.is_file():
            raise InputError(f"{path}: is missing; run the row {place.split('/')[0]} first")
        files.append(f"{label}={RUNS / place}")
    picture = RUNS / f"{name}.png"
    plot = ["--plot", str(picture)] if comparison.plot else []
    data = comparison.data.format(shared=shared())
    command = ["-m", "benchmarks.compare", "--data", data, "--img_size", str(comparison.size), *plot, *files]
    document = json.loads(python(*command, "--json"))
    document = {
        "command": " ".join(["python", *command]).replace(shared(), "../shared"),
        **document,
        "data": comparison.data.format(shared="../shared"),
    }
    return Finished(document, {f"{name}.png": picture} if comparison.plot else {})


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """Lines of docs/results.md for a comparison."""
    comparison = COMPARISONS[name]
    timed = "ms" in document["networks"][0]
    columns = ("", Column("AP50", ".3f"), "to the first", Column("AP50-95", ".3f"), "to the first", "parameters",
               Column("GMACs", ".3f"), *((Column("ms", ".1f"),) if timed else ()))  # fmt: skip
    rows = [
        (n["network"], n["map50"], signed(n["map50_difference"]) if number else None, n["map50_95"],
         signed(n["map50_95_difference"]) if number else None, n["parameters"], n["macs"] / 1e9,
         *((n["ms"],) if timed else ()))
        for number, n in enumerate(document["networks"])
    ]  # fmt: skip
    lines = [f"## {name}", "", comparison.what, "", markdown_table(columns, rows), ""]
    lines += [
        f"{document['images']} pictures of {Path(document['data']).name}, {comparison.size} × {comparison.size} unless "
        f"said; {100 * document['share']:g} % intervals of a bootstrap over the pictures, {document['draws']} draws, "
        f"seed {document['seed']}: one that holds 0 shows no difference, and none tells what another seed of a "
        f"training would give. {document['machine']}, {document['threads']} threads, PyTorch {document['torch']}, "
        f"commit {(document['commit'] or 'unknown')[:9]}.",
        "",
    ]
    return [*lines, f"![AP50 over costs](images/{name}.png)", ""] if comparison.plot else lines
