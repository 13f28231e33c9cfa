"""What 8 bits cost and gain: a trained network quantized after training and in training, run as integers.

Both are measured twice, simulated in PyTorch and as int8 files in onnxruntime; the first is what the training believes,
the second what a user gets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import journeys
from benchmarks.compare import signed
from benchmarks.trainings import RUNS, Finished, python, shared
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.report.tables import Column, markdown_table


@dataclass(frozen=True)
class Integers:
    """One network that is quantized: what a journey pruned and taught."""

    what: str
    journey: str
    """Row of the journey, whose stage `tune` is the float network, and `aware` the one quantized in training."""


CALIBRATED = {
    "quantized after training": (),
    "partly quantized after training": ("--quant-heads", "float", "--keep-float", "2"),
}
"""Flags of quantize.py. Boxes, objectness and classes share the tensor of a head and differ in range."""
DIFFERENCES = ("map50_difference", "map50_95_difference")
ROWS = {
    "bccd-int8": Integers("bccd (3 classes), yolov4-tiny, pruned and taught", "bccd-journey"),
    "roadsigns-int8": Integers("roadsigns (21 classes), yolov3-tiny, pruned and taught", "roadsigns-journey"),
}


def finish(name: str, row: Integers) -> Finished:
    """Quantize after training, export, and compare, with what was quantized in training, too.

    Raises:
        InputError: the row of the journey is missing.
    """
    journey = journeys.ROWS[row.journey]
    folder, data, size = RUNS / name, journey.data.format(shared=shared()), ("--img_size", str(journey.size))
    stages = {"float": "tune", "quantized in training": "aware"}
    networks = {label: RUNS / row.journey / stage / "weights" / "best.pt" for label, stage in stages.items()}
    if missing := next((path for path in networks.values() if not path.is_file()), None):
        raise InputError(f"{missing}: is missing; run the row {row.journey} first")
    commands = []
    for label, flags in CALIBRATED.items():
        run = label.split()[0]
        command = ["quantize.py", "--data", data, *size, "--project", str(folder), "--weights", str(networks["float"]),
                   "--name", run, *flags]  # fmt: skip
        if not (found := folder / f"{run}.json").exists():
            atomic_write_text(found, python(*command, "--json"))
        networks[label] = Path(json.loads(found.read_text())["weights"])
        commands.append(command)
    exports: dict[str, Any] = {}
    for label, weights in networks.items():
        path = folder / f"{label.replace(' ', '-')}.onnx"
        flags = ["--weights", str(weights), *size, "--data", data, *([] if label == "float" else ["--int8"])]
        path.unlink(missing_ok=True)
        exports[label] = json.loads(python("export.py", *flags, "--output", str(path), "--json"))
    files = [f"{label}, PyTorch={weights}" for label, weights in networks.items()]
    files += [f"{label}, onnxruntime={document['path']}" for label, document in exports.items()]
    files.sort(key=lambda file: list(networks).index(file.split(",")[0]))
    compared = json.loads(python("-m", "benchmarks.compare", "--data", data, *size, "--time", *files, "--json"))
    document = {
        "commands": [" ".join(["python", *command]).replace(shared(), "../shared") for command in commands],
        **compared,
        "data": journey.data.format(shared="../shared"),
        "layers": {
            label: {key: exports[label][key] for key in ("layers", "steps", "share", "error")}
            for label in exports if label != "float"
        },
    }  # fmt: skip
    return Finished(document)


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """Lines of docs/results.md for a row."""
    row = ROWS[name]
    size = journeys.ROWS[row.journey].size
    columns = ("", Column("AP50", ".3f"), "to the first", Column("AP50-95", ".3f"), "to the first",
               Column("MB", ".2f"), Column("ms", ".1f"))  # fmt: skip
    rows = [
        (n["network"], n["map50"], signed(n["map50_difference"]) if number else None, n["map50_95"],
         signed(n["map50_95_difference"]) if number else None, n["bytes"] / 1e6, n["ms"])
        for number, n in enumerate(document["networks"])
    ]  # fmt: skip
    proofs = [
        f"{label}: each of {found['layers']} layers differs by {found['steps']} step at most on the same integers, "
        f"{found['share']:.2%} of the values; the heads by {found['error']:.2g} of the largest value"
        for label, found in document["layers"].items()
    ]
    return [
        f"## {name}", "",
        f"{row.what}; 8-bit activations, 7-bit weights (--target cpu). The float network and the one quantized in "
        f"training are the stages tune and aware of row {row.journey}.", "",
        markdown_table(columns, rows), "", *(f"    {command}" for command in document["commands"]), "",
        f"int8 files against their simulation: {'; '.join(proofs)}. {document['images']} pictures, {size} × "
        f"{size}; {100 * document['share']:g} % intervals of a bootstrap over the pictures, {document['draws']} "
        f"draws, seed {document['seed']}. Milliseconds: median of forward passes of one picture, all networks in turn. "
        f"MB of the file; a .pt holds float weights. {document['machine']}, {document['threads']} threads, PyTorch "
        f"{document['torch']}, commit {(document['commit'] or 'unknown')[:9]}.", "",
    ]  # fmt: skip


def mean_section(stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of docs/results.md for the mean over all rows, when these are there."""
    if any(name not in stored for name in ROWS):
        return []
    documents = [stored[name]["networks"] for name in ROWS]
    rows = []
    for networks in zip(*documents, strict=True):
        figures = [mean_difference([network[key] for network in networks]) for key in DIFFERENCES]
        rows.append((networks[0]["network"], *(signed(figure) if any(figure) else None for figure in figures)))
    what = ("Differences to the float network, mean of both sets. Their bootstraps are independent: the distances "
            "from a mean to the ends of its interval are the roots of the sums of squares, over 2.")  # fmt: skip
    return ["## int8: mean of the data sets", "", what, "", markdown_table(("", "AP50", "AP50-95"), rows), ""]


def mean_difference(differences: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of independent figures [value, low, high], and its interval."""
    count = len(differences)
    value = sum(difference[0] for difference in differences) / count
    below, above = (
        math.hypot(*(difference[end] - difference[0] for difference in differences)) / count for end in (1, 2)
    )
    return value, value - below, value + above
