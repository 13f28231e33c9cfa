"""A journey as the document of report.json: plain values, fractions 0…1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from utils.report.journey.gather import Ancestor, Journey
from utils.report.journey.stages import Figures, Stage
from utils.report.run_dir import last_epochs

if TYPE_CHECKING:
    from utils.report.journey.lost import Comparison
    from utils.report.journey.measure import Measured, Measurement

CERTIFICATE = ("compact_vs_silenced", "compact_vs_silenced_float64", "compact_vs_keep_size", "border", "side")


def document(journey: Journey) -> dict[str, Any]:
    """Everything the report tells in numbers."""
    measured = journey.measurement
    return {
        "schema": 1,
        "title": journey.title,
        "runs": [_run(journey, place) for place in range(len(journey.stages))],
        "measurement": None if measured is None else _measurement(measured),
        "baselines": [asdict(baseline) for baseline in journey.baselines],
    }


def _run(journey: Journey, place: int) -> dict[str, Any]:
    stage, link = journey.stages[place], journey.links[place]
    row = None if journey.measurement is None else journey.measurement.stages.get(place)
    return {
        "name": stage.name,
        "kind": stage.kind,
        "title": stage.title,
        "run_dir": str(stage.path),
        "command": stage.command,
        "git_commit": stage.env.get("git_commit"),
        "time": stage.env.get("time"),
        "weights": None if stage.weights is None else str(stage.weights),
        "sha256": link.sha256,
        "lineage": [_ancestor(journey, ancestor) for ancestor in link.ancestors],
        "figures": _figures(journey.figures(place)),
        "reported": _figures(stage.figures),
        "measured": None if row is None else _measured(row),
        "best_epoch": stage.best_epoch,
        **last_epochs(stage.results),
        "epochs": {key: list(stage.results[key]) for key in ("epoch", "map50", "map50_95") if key in stage.results},
        "channels": [{"block": bar.block, "before": bar.before, "after": bar.kept} for bar in stage.channels],
        "certificate": certificate(stage),
        "sqnr": [asdict(row) for row in stage.sqnr],
    }


def certificate(stage: Stage) -> dict[str, Any] | None:
    """What was proved when the network was pruned, as far as plan.json has it."""
    proof = (stage.plan or {}).get("certificate")
    return {key: proof[key] for key in CERTIFICATE if key in proof} if isinstance(proof, Mapping) else None


def _figures(figures: Figures) -> dict[str, Any]:
    values = asdict(figures)
    return values | {"size": None if figures.size is None else list(figures.size)}


def _ancestor(journey: Journey, ancestor: Ancestor) -> dict[str, Any]:
    name = None if ancestor.stage is None else journey.stages[ancestor.stage].name
    return {"path": ancestor.path, "sha256": ancestor.sha256, "teacher": ancestor.teacher, "run": name,
            "changed": ancestor.changed}  # fmt: skip


def _measured(row: Measured) -> dict[str, Any]:
    """Intervals and differences are [value, low, high]."""
    return {
        "map50": list(row.map50),
        "map50_95": list(row.map50_95),
        "map50_difference": list(row.gain50),
        "map50_95_difference": list(row.gain50_95),
        "ms": row.ms,
        "ms_p90": row.p90,
        "runtime": row.runtime,
        "size": list(row.size),
    }


def _measurement(measured: Measurement) -> dict[str, Any]:
    keys = ("data", "images", "draws", "seed", "share", "rounds", "machine")
    found = {key: getattr(measured, key) for key in keys}
    return found | {"objects": None if measured.comparison is None else _comparison(measured.comparison)}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    """Objects found by the first network and by the last."""
    keys = ("objects", "before", "after", "lost", "gained")
    return {key: getattr(comparison, key) for key in keys}
