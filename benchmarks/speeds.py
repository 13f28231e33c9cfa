"""One network in float and in 8 bits, before and after pruning, in every runtime at 416 × 416; no look at accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.journeys import ROWS as JOURNEYS
from benchmarks.journeys import RUNTIMES
from benchmarks.trainings import RUNS, Finished, python, shared
from utils.errors import InputError
from utils.report.tables import Column, markdown_table

SIDE = 416


@dataclass(frozen=True)
class Speeds:
    """A network and its journey."""

    what: str
    journey: str
    """Row of benchmarks.journeys."""


ROWS = {
    "speeds-yolov4-tiny": Speeds("yolov4-tiny (bccd, 3 classes)", "bccd-journey"),
    "speeds-yolov3-tiny": Speeds("yolov3-tiny (roadsigns, 21 classes)", "roadsigns-journey"),
}


def finish(name: str, row: Speeds) -> Finished:
    """Make the int8 files, and time all in all runtimes.

    Raises:
        InputError: the row of the journey is missing.
    """
    journey, folder = JOURNEYS[row.journey], RUNS / name
    source, small = RUNS / journey.source / "weights" / "best.pt", RUNS / row.journey
    if not (small / "int8" / "model.onnx").is_file():
        raise InputError(f"{small}: is not finished; run the row {row.journey} first")
    data, size = journey.data.format(shared=shared()), ("--img_size", str(SIDE))
    python("quantize.py", "--weights", str(source), "--data", data, *size, "--calib", "16", "--no-test",
           "--project", str(folder), "--name", "whole", "--exist-ok")  # fmt: skip
    files = {"unpruned": source, "pruned": small / "tune" / "weights" / "best.pt"}
    quantized = {"unpruned": folder / "whole" / "model.pt", "pruned": small / "aware" / "weights" / "best.pt"}
    for network, weights in quantized.items():
        files[f"{network}, int8"] = _int8(folder, network, weights, size)
    named = [f"{network}={path}" for network, path in files.items()]
    return Finished(json.loads(python("-m", "benchmarks.latency", *named, *size, "--json")))


def _int8(folder: Path, network: str, weights: Path, size: tuple[str, str]) -> Path:
    path = folder / f"{network}-int8.onnx"
    path.unlink(missing_ok=True)
    python("export.py", "--weights", str(weights), "--int8", *size, "--output", str(path))
    return path


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """Lines of docs/results.md for a row."""
    laps = {(lap["network"], lap["runtime"]): lap for lap in document["rows"]}
    networks = list(dict.fromkeys(network for network, _ in laps))
    start = laps["unpruned", "opencv"]["ms"]
    rows = []
    for network in networks:
        own = {runtime: laps.get((network, runtime), {}).get("ms") for runtime in RUNTIMES}
        best = min(value for value in own.values() if value is not None)
        rows.append((network, *own.values(), start / best))
    columns = ("ms", *(Column(title, ".1f") for title in RUNTIMES.values()), Column("best × OpenCV, unpruned", ".1f"))
    engines = ", ".join(dict.fromkeys(lap["engine"].split(",")[0] for lap in document["rows"]))
    return [
        f"## {name}",
        "",
        f"{ROWS[name].what} and what its journey (row {ROWS[name].journey}) made of it, {SIDE} × {SIDE}, "
        f"{document['rows'][0]['threads']} threads.",
        "",
        markdown_table(columns, rows),
        "",
        f"Medians of one picture, all in turn; {document['machine']}, {engines}, commit {document['commit'][:9]}.",
        "",
    ]
