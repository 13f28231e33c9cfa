"""A network with mish, rewritten with leaky and trained again: what that costs in AP, and gains in time with int8."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import compare, latency, suite
from benchmarks.suite import BCCD, BF16, RUNS, TRAIN, DataSet, Document, Finished, PageSection
from utils.runtime.choice import PACKAGES

RUNTIMES = ("onnxruntime", "openvino", "litert")
"""Those with integer kernels; what is not installed is left out."""


@dataclass(frozen=True)
class Swap:
    """Another activation in a network that is trained first."""

    cfg: str
    data: DataSet
    size: int
    epochs: int
    """Of the first training."""
    recovery: int
    """Epochs of the training after the rewrite, and of the original's going on, which is the fair reference."""
    activation: tuple[str, str] = ("mish", "leaky")

    def finish(self, name: str) -> Finished:
        """Train, rewrite, train again, quantize; what is done of it is kept."""
        folder, flags, commands = RUNS / name, self.data.flags(self.size), []
        old, new = self.activation

        def train(stage: str, epochs: int, *start: object) -> Path:
            words = [*flags, *start, "--epochs", epochs, *TRAIN, *BF16, "--project", folder, "--name", stage]
            commands.append(suite.train(folder / stage, "train.py", *words))
            return folder / stage / "weights" / "best.pt"

        first, cfg = train("original", self.epochs, "--cfg", self.cfg), folder / f"{new}.cfg"
        rewrite = ["-m", "utils.darknet.rewrite", folder / "original/model.cfg", "--weights", first]
        commands.append(suite.once(cfg, *rewrite, "--activation", f"{old}={new}", "--output", cfg))
        swapped = cfg.with_suffix(".pt")
        networks = {
            old: train("on", self.recovery, "--weights", first),
            new: train("recovered", self.recovery, "--weights", swapped, "--t_weights", first, "--KDstr", "4"),
        }
        files = {f"{old}, {self.epochs} epochs": first, f"{old}, {self.recovery} more": networks[old]}
        files |= {f"{new} in place of {old}": swapped, f"{new}, {self.recovery} distilled": networks[new]}
        timed = dict(networks)
        for key, weights in networks.items():
            quantized = folder / f"{key}-int8" / "model.pt"
            project = ["--project", folder, "--name", quantized.parent.name]
            suite.once(quantized, "quantize.py", *flags, "--weights", weights, *project)
            for kind in ("onnx", "tflite"):
                path = timed[f"{key}, int8 {kind}"] = quantized.with_suffix(f".{kind}")
                export = ["--format", kind, "--int8", "--output", path]
                suite.once(path, "export.py", "--weights", quantized, *export)
            files[f"{key}, int8"] = timed[f"{key}, int8 onnx"]
        speeds = [f"{key}={file}" for key, file in timed.items()]
        document = {"commands": commands, **suite.compare(flags, files)}
        speeds += ["--runtimes", *(name for name in RUNTIMES if importlib.util.find_spec(PACKAGES[name]))]
        return Finished(document | {"speeds": json.loads(suite.python("-m", "benchmarks.latency", *speeds, "--json"))})


ROWS = {"bccd-yolov4-quarter-leaky": Swap("benchmarks/cfg/yolov4-quarter.cfg", BCCD, 224, 60, 20)}


def sections(stored: Mapping[str, Document]) -> Iterator[PageSection]:
    """A table of AP for each row, and one of times."""
    for name in [name for name in ROWS if name in stored]:
        row, document = ROWS[name], stored[name]
        what = f"yolov4 with a quarter of its widths, {row.data.what} @{row.size}: leaky in place of mish."
        yield PageSection(name, what, *compare.table(document), document["commands"], suite.place(document))
        speeds = document["speeds"]
        yield PageSection(f"{name}, times", what, *latency.table(speeds), note=f"{latency.measured(speeds)}.")
