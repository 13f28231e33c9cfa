"""Compressions by recipes in benchmarks/recipes; their networks are compared right after each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks import suite
from benchmarks.compare import table
from benchmarks.suite import BCCD, ROADSIGNS, RUNS, DataSet, Document, Finished, Section

STAGES = ("base", "original", "sparse", "pruned", "tuned")
"""Of the recipes; `original` is the network of another row."""


@dataclass(frozen=True)
class Compression:
    """A recipe on one network."""

    what: str
    data: DataSet
    size: int
    recipe: str
    source: str = ""
    """Row of the network to begin with; empty: the recipe trains the cfg."""
    stage: str = ""
    """Of that row, where it is a compression."""
    cfg: str = ""
    changes: tuple[str, ...] = ()
    """Of flags in the recipe."""

    def finish(self, name: str) -> Finished:
        """Run what is left of the recipe, and compare the networks.

        Raises:
            InputError: the row to begin with is missing.
        """
        common = ["--data", self.data.file, "--img_size", str(self.size)]
        start = ["--cfg", self.cfg] if self.cfg else ["--weights", str(suite.weights_of(self.source, self.stage))]
        command = ["compress.py", *common, *start, "--recipe", f"benchmarks/recipes/{self.recipe}.yaml"]
        command += ["--project", str(RUNS), "--name", name, *(["--set", *self.changes] if self.changes else [])]
        suite.python(*command)
        files: dict[str, object] = {}
        for stage in STAGES:
            for file in ("model.pt", "weights/best.pt"):
                if (RUNS / name / stage / file).exists():
                    files[stage] = RUNS / name / stage / file
        return Finished({"commands": [suite.shown(command)], **suite.compare(common, files, "--time")})


GENTLE = ("all.no-flip=true", "sparse.epochs=15", "sparse.s-share=0.35", "pruned.percent=0.3")
ROWS = {
    "bccd-yolov4-tiny-slim": Compression("student of the distillation on bccd", BCCD, 256, "slim", "bccd-yolov4-tiny"),
    "roadsigns-yolov3-tiny-33-gentle": Compression(
        "student of the distillation on roadsigns",
        ROADSIGNS,
        224,
        "slim",
        "roadsigns-yolov3-tiny-33",
        changes=(*GENTLE, "tuned.hyp=data/hyp.finetune.yaml"),
    ),
    "bccd-yolov4-tiny-dynamic": Compression("dynamic s", BCCD, 192, "schedule", "bccd-yolov4-tiny"),
    "bccd-yolov4-tiny-constant": Compression(
        "constant s", BCCD, 192, "schedule", "bccd-yolov4-tiny", changes=("sparse.s-schedule=constant",)
    ),
    "roadsigns-yolov4-quarter": Compression(
        "yolov4 with a quarter of its widths, group_prune.py by taylor, KDstr 4 and AT 2",
        ROADSIGNS,
        224,
        "groups",
        cfg="benchmarks/cfg/yolov4-quarter.cfg",
    ),
    "roadsigns-yolov4-quarter-dynamic": Compression(
        "the same by γ after sparse training, for as many epochs",
        ROADSIGNS,
        224,
        "groups-sparse",
        "roadsigns-yolov4-quarter",
        "base",
    ),
}


def sections(stored: Mapping[str, Document]) -> Iterator[Section]:
    """A section for each compression."""
    for name in [name for name in ROWS if name in stored]:
        row, document = ROWS[name], stored[name]
        yield Section(
            name,
            f"{row.what}; {row.data.what} @{row.size}.",
            *table(document),
            commands=document["commands"],
            note=suite.place(document),
        )
