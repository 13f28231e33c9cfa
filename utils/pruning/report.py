"""What came of a pruning, for people: the table, what is proved, what is advised, and pictures.

Texts are made from the document of --json, so that both say the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.data.draw import GAP, draw_grid
from utils.data.images import write_image
from utils.pruning.advice import FREE_SHARE
from utils.pruning.measure import Comparison
from utils.pruning.plan import Plan
from utils.pruning.policy import Importance
from utils.pruning.units import residual_units
from utils.report.pruning_plots import LayerBar, plot_channels, plot_threshold
from utils.report.run_dir import RunDirectory
from utils.report.tables import Cell, Column, markdown_table, text_table

Document = Mapping[str, Any]
MORE = "accuracy drops until the network is fine-tuned; sparse training makes more channels weak: python train.py -sr"
COSTS = (Column("parameters"), Column("GMACs"), Column(".weights MB", ".2f"))
COLUMNS = (
    *(Column(title) for title in ("network", "AP50", "AP50-95")),
    *COSTS,
    *(Column(title, ".2f") for title in ("ms median", "ms p90")),
)

GROUP_COLUMNS = (
    *(Column(title) for title in ("group", "blocks", "convolutions", "channels")),
    *(Column(title, "g") for title in ("percent", "advised")),
    *(Column(title, ".1f") for title in ("kept", "% of parameters", "after", "% of MACs", "after")),
)
"""The last four are shares of the whole network, before and after."""


def table(document: Document) -> tuple[list[Column], list[tuple[Cell, ...]]]:
    """Columns and rows; columns of what was not measured are left out."""
    lines = list(_rows(document))
    used = [any(line[place] is not None for line in lines) for place in range(len(COLUMNS))]
    return list(compress(COLUMNS, used)), [tuple(compress(line, used)) for line in lines]


def _rows(document: Document) -> Iterator[tuple[Cell, ...]]:
    """The network before, the networks of full size, the one that is left."""
    latency = document["latency"] or {}
    after = "compact, reconstructed" if document["reconstructed"] else "compact"
    for title, key, costs, timed in (
        ("original", "before", "before", "original"),
        ("silenced", "silenced", "before", None),
        ("absorbed", "absorbed", "before", None),
        (after, "after", "after", "compact"),
    ):
        if document[key] is not None:
            ms = latency.get(timed, {})
            accuracy = (document[key]["map50"], document[key]["map50_95"])
            yield (title, *accuracy, *_costs(document[costs]), ms.get("median"), ms.get("p90"))


def _costs(figures: Mapping[str, Any]) -> tuple[Cell, ...]:
    return figures["parameters"], figures["macs"] / 1e9, figures["weights_bytes"] / 1e6


def text(document: Document) -> str:
    """All there is to say at the end of a run."""
    groups = (f"\n{shown}\n" for shown in _group_tables(document, text_table))
    return "\n".join([text_table(*table(document)), *groups, *remarks(document)])


def markdown(document: Document) -> str:
    """The same as report.md."""
    title = f"# {document['strategy']} pruning\n"
    found = "" if document["latency"] is None else (
        "\nIn detections.jpg every picture is there twice: left what the original finds, right what is left of it.\n"
    )  # fmt: skip
    notes = "\n\n".join(remarks(document))
    tables = "\n\n".join([markdown_table(*table(document)), *_group_tables(document, markdown_table)])
    return f"{title}\n{tables}\n\n{notes}\n{found}"


def _group_tables(document: Document, shown: Callable[..., str]) -> Iterator[str]:
    """The table of the groups, if there are."""
    if groups := document.get("groups"):
        yield shown(GROUP_COLUMNS, [_group_row(number, groups) for number in range(len(groups))])


def _group_row(number: int, groups: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    group = groups[number]
    shares = (
        100 * group[when][key] / max(1, sum(other[when][key] for other in groups))
        for key in ("parameters", "macs")
        for when in ("before", "after")
    )
    chosen = (group["percent"], group["advised_percent"], group["kept"]) if group["candidates"] else (None, None, None)
    makers = group["convolutions"]
    blocks = f"{makers[0]}–{makers[-1]}"
    return f"{number + 1} {group['name']}", blocks, len(makers), group["candidates"], *chosen, *shares


def remarks(document: Document) -> Iterator[str]:
    """Lines below the table."""
    if (latency := document["latency"]) is not None:
        yield (
            f"ms: forward pass of one picture, {latency['height']} × {latency['width']}, batch normalisation folded, "
            f"channels-last; {latency['original']['rounds']} rounds in turn; {latency['runtime']}; "
            + efficiency(document)
        )
    proof = document["certificate"]
    yield (
        f"certificate: compact = silenced to {proof['compact_vs_silenced']:.0e}, = keep-size to "
        f"{proof['compact_vs_keep_size']:.0e}"
        + (f"; border {proof['border']:.2g}" if proof["border"] is not None else "")
    )
    yield from target_remark(document)
    if document["groups"]:
        yield from group_advice(document["groups"])
    else:
        yield from advice(document["percent"], document["advised_percent"])
    yield f"next: {next_command(document)}"


def efficiency(document: Document) -> str:
    """How much of the time went with the multiply-adds."""
    before, after = document["before"], document["after"]
    faster, less = (before[key] / after[key] for key in ("ms", "macs"))
    return f"efficiency {document['efficiency']:.2f}: time ÷ {faster:.2f}, multiply-adds ÷ {less:.2f}"


def target_remark(document: Document) -> Iterator[str]:
    """What a target led to, if one was given."""
    if (target := document["target"]) is None:
        return
    reached = f"{target['reached']:.2f} points" if target["flag"] == "--max-drop" else f"{target['reached']:.4f}"
    words = [f"--{key} {target[key]}" for key in ("percent", "shortcut") if target[key] is not None]
    if rounds := target.get("rounds"):
        words.append(f"{rounds} rounds")
    how = f"by {' '.join(words)}; networks tried: {target['tried']}"
    yield f"target {target['flag']} {target['bound']:g}: {reached}, {how}"


def free_of(which: str) -> str:
    """What may go, in words."""
    return f"{100 * FREE_SHARE:.0f} % of {which} layer's Σ |γ|"


def advice(percent: float | None, advised: float | None) -> Iterator[str]:
    """How much can go, if channels were chosen; more than that is a warning."""
    if advised is None:
        return
    if advised:
        share = f"{100 * advised:.0f} %"
        yield f"advised: --percent {advised:g}; the weakest {share} of the channels hold at most {free_of('any')}"
    else:
        yield f"advised: no pruning yet; the weakest 1 % of the channels hold more than {free_of('a')} already"
    if percent is not None and percent > advised:
        yield f"--percent {percent:g} is more: {MORE}"


def group_advice(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How much of every group can go; more than that is a warning."""
    advised = [group["advised_percent"] or 0.0 for group in groups]
    percents = " ".join(f"{percent:g}" for percent in advised)
    if any(advised):
        yield f"advised: --group-percent {percents}; so many of a group's weakest hold at most {free_of('any')}"
    else:
        yield f"advised: no pruning yet; the weakest 1 % of the channels hold more than {free_of('a')} already"
    more = [str(number) for number, group in enumerate(groups, 1) if group["percent"] > advised[number - 1]]
    if more:
        yield f"more goes from group {', '.join(more)}: {MORE}"


def next_command(document: Document) -> str:
    """What to call now."""
    data = document["data"] or "DATA.data"
    words = ("--cfg", document["cfg"], "--weights", document["weights"], "--data", data)
    return f"python train.py {shlex.join(words)}"


def grid_text(document: Document) -> str:
    """A dry run: a row for each amount."""
    keys = {key: Column(f"--{key}", "g") for key in ("percent", "shortcut") if document["grid"][0][key] is not None}
    none = (None,) * len(keys)
    lines = [(*none, *_costs(document["before"]), "before")]
    for row in document["grid"]:
        costs = (None,) * len(COSTS) if row["after"] is None else _costs(row["after"])
        lines.append((*(row[key] for key in keys), *costs, "infeasible" if row["after"] is None else ""))
    reasons = dict.fromkeys(row["infeasible"] for row in document["grid"] if row["infeasible"])
    groups = (f"\n{shown}\n" for shown in _group_tables(document, text_table))
    rows = text_table((*keys.values(), *COSTS, Column("")), lines)
    return "\n".join([rows, *groups, *reasons, *_limits(document)])


def _limits(document: Document) -> Iterator[str]:
    yield from target_remark(document)
    if document["max_percent"] is not None:
        yield f"the largest percent that works is {document['max_percent']:.4f}"
        if groups := document.get("groups"):
            yield next(group_advice(groups))
        else:
            yield from advice(None, document["advised_percent"])
    if document["residual_units"] is not None:
        yield f"residual units: {document['residual_units']}"


def layer_bars(plan: Plan, importance: Importance) -> list[LayerBar]:
    """What every convolution that makes channels keeps."""
    graph, removal = plan.graph, plan.removal
    chains = {i: number for number, chain in enumerate(graph.chains()) for i in chain}
    may_go = set(plan.choice.layers) if plan.choice is not None else set()
    if plan.amount.shortcut is not None:
        may_go |= {i for unit in residual_units(graph.network) for i in unit.blocks}
    bars = []
    for i in graph.makers():
        labels, removed = graph.labels[i], i in removal.blocks
        after = 0 if removed else int(removal.keep[labels].sum())
        bars.append(LayerBar(i, len(labels), after, chains.get(i), i in may_go, removed))
    return bars


def draw(run: RunDirectory, plan: Plan, bars: Sequence[LayerBar], comparison: Comparison | None) -> None:
    """Pictures: channels.png, importance.png of what is ranked together, detections.jpg where accuracy was measured."""
    plot_channels(bars, run.file("channels.png"))
    if plan.choice is not None and not plan.in_rounds:
        for number, part in enumerate(plan.choice.parts, 1):
            if part.ranked:
                name = "importance.png" if part.group is None else f"importance_{number}.png"
                plot_threshold(part.ranking.ordered, part.removed, run.file(name))
    if comparison is not None:
        write_image(run.file("detections.jpg"), side_by_side(comparison))


def side_by_side(comparison: Comparison) -> NDArray[np.uint8]:
    """A row for each picture: left what is found before, right what is found after; uint8 [H, W, 3], RGB."""
    lines = []
    for picture, *found in zip(comparison.pictures, comparison.before, comparison.after, strict=True):
        pair = [draw_grid(picture[None], [boxes], comparison.names) for boxes in found]
        lines.append(np.hstack([np.pad(half, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for half in pair]))
    return np.vstack(lines)
