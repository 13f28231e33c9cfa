"""One network of a recipe as files for every runtime, and the AP50 that each runtime gets from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks import suite
from benchmarks.compare import signed
from benchmarks.suite import BCCD, ROADSIGNS, RUNS, DataSet, Document, Finished, PageSection

TARGETS = ("cpu", "cpu-vnni", "arm")
RUNTIMES = ("onnxruntime", "openvino", "opencv", "ncnn", "litert")
FILES = {
    "float": ("", "float.onnx", ""),
    "float, --decode": ("", "rows.onnx", "--decode"),
    "float, ncnn": ("", "float.ncnn.param", "--format ncnn"),
    "float, OpenVINO": ("", "float.xml", "--format openvino"),
    "float, tflite": ("", "float.tflite", "--format tflite"),
    **{f"int8, {target}": (target, f"{target}.onnx", "--int8") for target in TARGETS},
    "int8, arm, --decode": ("arm", "arm_rows.onnx", "--int8 --decode"),
    "int8, arm, tflite": ("arm", "arm.tflite", "--format tflite --int8"),
}
"""Files of a network, with the first of which the others are compared: --target, name, and flags of export.py."""


@dataclass(frozen=True)
class InRuntimes:
    """The files of one network, each in all runtimes that read it."""

    data: DataSet
    size: int
    goal: str
    """Row whose pruned network is taken."""

    def finish(self, name: str) -> Finished:
        """Quantize for each target, export, and compare.

        Raises:
            InputError: the row to begin with is missing.
        """
        folder, common = RUNS / name, self.data.flags(self.size)
        sources = {"": suite.tuned(self.goal), **{target: folder / target / "model.pt" for target in TARGETS}}
        for target in TARGETS:
            out = ("--target", target, "--project", folder, "--name", target)
            suite.once(sources[target], "quantize.py", *common, "--weights", sources[""], *out)
        files = {key: folder / file for key, (_, file, _) in FILES.items()}
        for key, (target, _, flags) in FILES.items():
            size = ("--img_size", self.size, "--output", files[key])
            suite.once(files[key], "export.py", "--weights", sources[target], *flags.split(), *size)
        return Finished(suite.compare(common, files, "--runtimes", *RUNTIMES))


ROWS = {
    "runtimes-bccd": InRuntimes(BCCD, 256, "goal-bccd"),
    "runtimes-roadsigns": InRuntimes(ROADSIGNS, 224, "goal-roadsigns"),
}


def sections(stored: Mapping[str, Document]) -> Iterator[PageSection]:
    """A table of files and runtimes for each network."""
    for name in [name for name in ROWS if name in stored]:
        row, networks = ROWS[name], stored[name]["networks"]
        lines = []
        for network in networks:
            file, _, _ = network["network"].rpartition(", ")
            change = signed(network["map50_difference"]) if lines else None
            lines.append([file, network["runtime"], network["map50"], change, network["bytes"] / 1e6])
        what = f"{row.data.what} @{row.size}: the pruned network of {row.goal} as files of export.py."
        columns = ("file", "runtime", "AP50", "change", "MB")
        yield PageSection(name, what, columns, lines, note=suite.place(stored[name]))
