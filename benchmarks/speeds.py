"""Times in every runtime at 416 × 416: float and 8 bits, before and after pruning; no look at accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks import goals, suite
from benchmarks.suite import RUNS, Document, Finished, Section
from utils.report.tables import Column

SIDE = 416
RUNTIMES = {
    "opencv": "OpenCV dnn",
    "torch": "PyTorch",
    "onnxruntime": "onnxruntime",
    "ncnn": "ncnn",
    "openvino": "OpenVINO",
}


@dataclass(frozen=True)
class Speeds:
    """A network, and what recipe balanced makes of it."""

    goal: goals.Goal

    @property
    def what(self) -> str:
        """Its name."""
        return f"{self.goal.network}, times in every runtime"

    def finish(self, name: str) -> Finished:
        """Write the int8 files, and time all in all runtimes.

        Raises:
            InputError: the goal row is missing.
        """
        goal, folder = f"goal-{self.goal.data.key}", RUNS / name
        files = {"unpruned": suite.weights_of(self.goal.source), "pruned": suite.tuned(goal)}
        quantized = {"unpruned": "rounded/model.pt", "pruned": "balanced/quantize/model.pt"}
        size = ("--img_size", str(SIDE))
        for network, weights in quantized.items():
            path = folder / f"{network}-int8.onnx"
            suite.once(
                path, "export.py", "--weights", str(RUNS / goal / weights), "--int8", *size, "--output", str(path)
            )
            files[f"{network}, int8"] = path
        named = [f"{network}={path}" for network, path in files.items()]
        return Finished(json.loads(suite.python("-m", "benchmarks.latency", *named, *size, "--json")))


ROWS = {f"speeds-{goal.network}": Speeds(goal) for goal in goals.GOALS[:2]}


def sections(stored: Mapping[str, Document]) -> Iterator[Section]:
    """One table of all networks."""
    documents = {name: stored[name] for name in ROWS if name in stored}
    if not documents:
        return
    lines, laps = [], []
    for name, document in documents.items():
        laps = document["rows"]
        for network in dict.fromkeys(lap["network"] for lap in laps):
            times = {lap["runtime"]: lap["ms"] for lap in laps if lap["network"] == network}
            macs = next(lap["macs"] for lap in laps if lap["network"] == network)
            label = f"{name.removeprefix('speeds-')}, {network}"
            lines.append([label, macs / 1e9, *(times.get(runtime) for runtime in RUNTIMES)])
    engines = ", ".join(dict.fromkeys(lap["engine"].split(",")[0] for lap in laps))
    yield Section(
        "speeds",
        f"Milliseconds of a picture, {SIDE} × {SIDE}, {laps[0]['threads']} threads (rows {', '.join(documents)}).",
        ("ms", "GMACs", *(Column(title, ".1f") for title in RUNTIMES.values())),
        lines,
        note=f"Medians, all networks and runtimes of a row in turn; {document['machine']}, {engines}, commit "
        f"{document['commit'][:9]}.",
    )
