"""The one journey on real data: from a trained network to 8 bits by compress.py, and every runtime on the way.

Accuracy is that of the file that is named; times are of one picture, all files and runtimes in turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compare import signed
from benchmarks.rows import BCCD, ROADSIGNS
from benchmarks.trainings import PICTURES, RUNS, STORED, publish, python, shared
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.report.tables import Column, markdown_table

SECONDS = 60.0
"""Spent on times, at most."""
PAUSE = 0.1
"""Seconds before each run, in which the threads of the one before go to sleep."""


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


class Place(NamedTuple):
    """A file of a journey and what runs it."""

    network: str
    runtime: str
    file: str
    """Below the journey's folder; empty: the trained network itself."""


ROWS = {
    "bccd-journey": Journey(
        "bccd (3 classes), yolov4-tiny", BCCD, 256, "bccd-yolov4-tiny", "benchmarks/recipes/bccd.yaml"
    ),
    "roadsigns-journey": Journey(
        "roadsigns (21 classes), yolov3-tiny", ROADSIGNS, 224, "roadsigns-yolov3-tiny-33",
        "benchmarks/recipes/roadsigns.yaml",
    ),
}  # fmt: skip
ORIGINAL, TUNED, SMALL = "original", "pruned, taught", "8 bits"
RUNTIMES = {
    "torch": "PyTorch",
    "opencv": "OpenCV",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "ncnn": "ncnn",
}
PLACES = (
    *(
        Place(network, runtime, file.format(stage))
        for network, stage in ((ORIGINAL, "original"), (TUNED, "tuned"))
        for runtime, file in (
            ("opencv", "{}-darknet/model.weights"),
            ("onnxruntime", "{}-onnx/model.onnx"),
            ("openvino", "{}-onnx/model.onnx"),
            ("ncnn", "{}-ncnn/model.ncnn.param"),
        )
    ),
    Place(ORIGINAL, "torch", ""),
    Place(TUNED, "torch", "tune/weights/best.pt"),
    Place(SMALL, "onnxruntime", "int8/model.onnx"),
    Place(SMALL, "openvino", "int8/model.onnx"),
)


def finish(name: str, row: Journey) -> None:
    """Compress, measure accuracy, measure times.

    Raises:
        InputError: the row of the trained network is missing.
    """
    source, data = RUNS / row.source / "weights" / "best.pt", row.data.format(shared=shared())
    if not source.is_file():
        raise InputError(f"{source}: is missing; run the row {row.source} first")
    size = ("--img_size", str(row.size))
    command = ["compress.py", "--data", data, "--weights", str(source), *size, "--recipe", row.recipe,
               "--project", str(RUNS), "--name", name]  # fmt: skip
    python(*command)
    folder = RUNS / name
    files = {ORIGINAL: source, TUNED: folder / "tune/weights/best.pt", SMALL: folder / "int8/model.onnx"}
    named = [f"{network}={file}" for network, file in files.items()]
    compared = json.loads(python("-m", "benchmarks.compare", "--data", data, *size, *named, "--json"))
    sizes = {
        ORIGINAL: "original-darknet/model.weights",
        TUNED: "tuned-darknet/model.weights",
        SMALL: "int8/model.onnx",
    }
    for found in compared["networks"]:
        found["bytes"] = (folder / sizes[found["network"]]).stat().st_size
        found["ms"] = {}
    for place, milliseconds in times(folder, source, row.size).items():
        next(n for n in compared["networks"] if n["network"] == place.network)["ms"][place.runtime] = milliseconds
    document = {"row": name, "command": " ".join(["python", *command]).replace(shared(), "../shared"), **compared,
                "data": row.data.format(shared="../shared")}  # fmt: skip
    STORED.mkdir(exist_ok=True)
    atomic_write_text(STORED / f"{name}.json", json.dumps(document, indent=2) + "\n")
    publish(folder / "prune" / "detections.jpg", PICTURES / f"{name}_detections.jpg")


def times(folder: Path, source: Path, side: int) -> dict[Place, float]:
    """Median milliseconds of a forward pass of one picture, all places in turn."""
    import torch

    from utils.report.latency import interleaved

    runs = {str(number): _forward(folder / place.file if place.file else source, place.runtime, side)
            for number, place in enumerate(PLACES)}  # fmt: skip
    with torch.inference_mode():
        laps = interleaved(runs, seconds=SECONDS, pause=PAUSE)
    return {place: laps[str(number)].median for number, place in enumerate(PLACES)}


def _forward(file: Path, runtime: str, side: int) -> Callable[[], object]:
    import torch

    from utils.darknet import cfg as cfg_file
    from utils.runtime.choice import choose_runtime
    from utils.runtime.load import load

    network = cfg_file.load(file.with_suffix(".cfg")) if file.suffix == ".weights" else None
    loaded = load(choose_runtime(network, str(file), runtime), torch.device("cpu"), (side, side))
    image = torch.rand(1, loaded.network.net.channels, side, side).contiguous(memory_format=torch.channels_last)
    return lambda: loaded.model(image)


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
    bootstrap = f"bootstrap over the pictures, {document['draws']} draws, seed {document['seed']}"
    return [
        f"## {name}",
        "",
        f"{row.what} @{row.size}; begins with row {row.source}, widths in multiples of 8.",
        "",
        markdown_table(columns, rows),
        "",
        f"    {document['command']}",
        "",
        "MB: Darknet's .weights, and the int8 ONNX file. AP of the first two in PyTorch, of the last in onnxruntime. "
        f"{document['images']} pictures; {100 * document['share']:g} % intervals of a {bootstrap}. Milliseconds: "
        f"medians of forward passes of one picture, all files and runtimes in turn. {document['machine']}, "
        f"{document['threads']} threads, PyTorch {document['torch']}, commit {(document['commit'] or 'unknown')[:9]}.",
        "",
        f"![detections before and after pruning](images/{name}_detections.jpg)",
        "",
    ]
