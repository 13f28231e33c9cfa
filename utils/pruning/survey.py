"""A sensitivity analysis from a request to its files: what each layer and group is worth; no network is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from utils.cli import print_json
from utils.pruning.policy import Importance
from utils.pruning.sensitivity import SHARES, Curve, curve_table, group_parts, layer_parts, measure_part
from utils.pruning.trials import Trials
from utils.report.run_dir import RunDirectory
from utils.report.sensitivity_plots import plot_sensitivity
from utils.report.tables import Column, text_table

MOST_LAYERS = 10
"""Of the layers that are printed, those that lose most; the files have all."""


def survey(trials: Trials, importance: Importance) -> None:
    """Measure the parts of a network one by one, write sensitivity.csv and .png, print what matters.

    Raises:
        InfeasibleError: no convolution can be pruned.
        InputError: the network finds nothing in the pictures.
    """
    asked, graph = trials.asked, trials.graph
    quick = replace(trials, pictures=asked.sensitivity_pictures)
    map50, channels = quick.map50, asked.channels
    parts = [*group_parts(graph, importance, channels), *layer_parts(graph, importance, channels)]
    curves = [measure_part(graph, part, quick.drop, trials.size) for part in parts]
    with RunDirectory.create(asked.project, asked.name, exist_ok=asked.exist_ok).until() as run:
        run.describe(args=asked.flags)
        run.write_text("sensitivity.csv", curve_table(curves, map50))
    kinds = {kind: [curve for curve in curves if curve.part.kind == kind] for kind in ("group", "layer")}
    drawn = [{_title(curve): curve.drops for curve in of} for of in kinds.values()]
    plot_sensitivity(SHARES, *drawn, map50, run.file("sensitivity.png"))
    document = {"strategy": asked.strategy, "map50": map50, "pictures": len(quick.bench.loader.dataset),
                "shares": list(SHARES), "groups": [_entry(curve) for curve in kinds["group"]],
                "layers": [_entry(curve) for curve in kinds["layer"]], "run_dir": str(run.path)}  # fmt: skip
    print_json(document) if asked.as_json else print("\n".join(_lines(document, kinds)))


def _title(curve: Curve) -> str:
    return f"{curve.part.number} {curve.part.name}" if curve.part.kind == "group" else curve.part.name


def _entry(curve: Curve) -> dict[str, Any]:
    part = curve.part
    return {"number": part.number, "name": part.name, "layers": list(part.layers), "channels": part.channels,
            "removed": list(curve.removed), "drop": list(curve.drops), "parameters": list(curve.parameters),
            "macs": list(curve.macs)}  # fmt: skip


def _lines(document: dict[str, Any], kinds: dict[str, Sequence[Curve]]) -> Iterator[str]:
    worst = sorted(kinds["layer"], key=lambda curve: -sum(curve.drops))[:MOST_LAYERS]
    percents = [Column(f"{100 * share:.0f} %", ".2f") for share in SHARES]
    for title, curves in (("group", kinds["group"]), ("most sensitive layers", worst)):
        rows = [(_title(curve), curve.part.channels, *curve.drops) for curve in curves]
        yield text_table((Column(title), Column("channels"), *percents), rows) + "\n"
    yield "points of AP50 lost when such a share of the weakest channels goes, from this part only"
    yield f"AP50 before: {document['map50']:.3f}, in {document['pictures']} pictures"
    yield f"written: {document['run_dir']}"
