"""Compressions by recipes in benchmarks/recipes; the networks of their stages are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks import suite
from benchmarks.compare import table
from benchmarks.suite import BCCD, ROADSIGNS, RUNS, DataSet, Document, Finished, PageSection

STAGES = ("base", "original", "sparse", "pruned", "tuned", "trained-on")
"""Of the recipes; `original` is the network of another row."""


@dataclass(frozen=True)
class Compression:
    """A recipe on one network."""

    what: str
    data: DataSet
    size: int
    recipe: str
    source: str
    """Cfg that is trained first, or row, or ROW/STAGE, of the network to begin with."""

    def finish(self, name: str) -> Finished:
        """Run what is left of the recipe, and compare the networks.

        Raises:
            InputError: the row to begin with is missing.
        """
        common, cfg = self.data.flags(self.size), self.source.endswith(".cfg")
        start = ["--cfg", self.source] if cfg else ["--weights", suite.weights_of(self.source)]
        recipe = f"benchmarks/recipes/{self.recipe}.yaml"
        command = ["compress.py", *common, *start, "--recipe", recipe, "--project", RUNS, "--name", name]
        suite.python(*command)
        paths = [(stage, RUNS / name / stage / file) for stage in STAGES for file in ("model.pt", "weights/best.pt")]
        files = {stage: path for stage, path in paths if path.exists()}
        return Finished({"commands": [suite.shown(command)], **suite.compare(common, files, "--time")})


PAPER = "roadsigns-yolov4-quarter"
"""Rows in the setting of Chu et al. (arXiv:2306.01526), with a quarter of yolov4's widths."""
ROWS = {
    "bccd-yolov4-tiny-slim": Compression("student of the distillation", BCCD, 256, "slim", "bccd-yolov4-tiny"),
    "roadsigns-yolov3-tiny-33-gentle": Compression(
        "student of the distillation", ROADSIGNS, 224, "gentle", "roadsigns-yolov3-tiny-33"
    ),
    "bccd-yolov4-tiny-dynamic": Compression("dynamic s", BCCD, 192, "dynamic", "bccd-yolov4-tiny"),
    "bccd-yolov4-tiny-constant": Compression("constant s", BCCD, 192, "constant", "bccd-yolov4-tiny"),
    PAPER: Compression("groups by taylor", ROADSIGNS, 160, "groups", "benchmarks/cfg/yolov4-quarter.cfg"),
    f"{PAPER}-dynamic": Compression(
        "groups by γ after sparse training", ROADSIGNS, 160, "groups-sparse", f"{PAPER}/base"
    ),
}


def sections(stored: Mapping[str, Document]) -> Iterator[PageSection]:
    """A section for each compression."""
    for name in [name for name in ROWS if name in stored]:
        row, commands, note = ROWS[name], stored[name]["commands"], suite.place(stored[name])
        yield PageSection(name, f"{row.what}; {row.data.what} @{row.size}.", *table(stored[name]), commands, note)
