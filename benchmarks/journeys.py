"""The one journey on real data: from a trained network to 8 bits by compress.py, and every runtime on the way.

Accuracy is that of the file that is named, as `benchmarks.compare` finds it, times are those of `benchmarks.latency`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.compare import signed
from benchmarks.rows import BCCD, ROADSIGNS
from benchmarks.trainings import RUNS, STORED, Finished, python, shared, weights_of
from utils.files import read_text
from utils.report.tables import Column, markdown_table


@dataclass(frozen=True)
class Journey:
    """A network that is compressed."""

    what: str
    data: str
    """`{shared}` in it is the folder of the real data."""
    size: int
    source: str
    """Row of the trained network."""
    recipe: str


ROWS = {
    "bccd-journey": Journey(
        "bccd (3 classes), yolov4-tiny", BCCD, 256, "bccd-yolov4-tiny", "benchmarks/recipes/bccd.yaml"
    ),
    "roadsigns-journey": Journey(
        "roadsigns (21 classes), yolov3-tiny", ROADSIGNS, 224, "roadsigns-yolov3-tiny-33",
        "benchmarks/recipes/roadsigns.yaml",
    ),
}  # fmt: skip
ORIGINAL, PRUNED, TUNED, SMALL = "original", "pruned", "pruned, taught", "8 bits"
RUNTIMES = {
    "torch": "PyTorch",
    "opencv": "OpenCV",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "ncnn": "ncnn",
}


def finish(name: str, row: Journey) -> Finished:
    """Compress, measure accuracy, measure times.

    Raises:
        InputError: the row of the trained network is missing.
    """
    source, data = weights_of(row.source), row.data.format(shared=shared())
    size = ("--img_size", str(row.size))
    command = ["compress.py", "--data", data, "--weights", str(source), *size, "--recipe", row.recipe,
               "--project", str(RUNS), "--name", name]  # fmt: skip
    python(*command)
    folder = RUNS / name
    files = {ORIGINAL: source, PRUNED: folder / "prune/model.pt", TUNED: folder / "tune/weights/best.pt",
             SMALL: folder / "int8/model.onnx"}  # fmt: skip
    named = [f"{network}={file}" for network, file in files.items()]
    compared = json.loads(python("-m", "benchmarks.compare", "--data", data, *size, *named, "--json"))
    timed = json.loads(python("-m", "benchmarks.latency", *named, *size, "--json"))
    for found in compared["networks"]:
        own = [lap for lap in timed["rows"] if lap["network"] == found["network"]]
        found["ms"] = {lap["runtime"]: lap["ms"] for lap in own}
        found["bytes"] = next(lap["bytes"] for lap in own if lap["runtime"] in ("opencv", "onnxruntime"))
        found["engines"] = {lap["runtime"]: lap["engine"] for lap in own}
    document = {"command": " ".join(["python", *command]).replace(shared(), "../shared"), **compared,
                "data": row.data.format(shared="../shared")}  # fmt: skip
    return Finished(document, {f"{name}_detections.jpg": folder / "prune" / "detections.jpg"})


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """Lines of docs/results.md for a journey."""
    row = ROWS[name]
    columns = ("", Column("AP50", ".3f"), "to the first", Column("AP50-95", ".3f"), "to the first", Column("MB", ".2f"),
               Column("GMACs", ".3f"), *(Column(f"ms, {title}", ".1f") for title in RUNTIMES.values()))  # fmt: skip
    rows = [
        (n["network"], n["map50"], signed(n["map50_difference"]) if number else None, n["map50_95"],
         signed(n["map50_95_difference"]) if number else None, n["bytes"] / 1e6, n["macs"] / 1e9,
         *(n["ms"].get(runtime) for runtime in RUNTIMES))
        for number, n in enumerate(document["networks"])
    ]  # fmt: skip
    trained = json.loads(read_text(STORED / f"{row.source}.json"))["map50"]
    original = document["networks"][0]["map50"]
    anew = f" That row was trained anew for it, with AP50 {original:.3f} where it has {trained:.3f}."
    bootstrap = f"bootstrap over the pictures, {document['draws']} draws, seed {document['seed']}"
    return [
        f"## {name}",
        "",
        f"{row.what} @{row.size}; begins with row {row.source}, widths in multiples of 8."
        f"{anew if original != trained else ''}",
        "",
        markdown_table(columns, rows),
        "",
        f"    {document['command']}",
        "",
        "MB: Darknet's .weights, and the int8 ONNX file. AP of the last in onnxruntime, of the others in PyTorch. "
        f"{document['images']} pictures; {100 * document['share']:g} % intervals of a {bootstrap}. Milliseconds: "
        f"medians of forward passes of one picture, all files and runtimes in turn. {document['machine']}, "
        f"{document['threads']} threads, PyTorch {document['torch']}, commit {(document['commit'] or 'unknown')[:9]}.",
        "",
        f"![detections before and after pruning](images/{name}_detections.jpg)",
        "",
    ]
