"""What a pruning leaves in its run directory, and the tables and pictures that people read.

Texts are made from the document of --json, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch

from utils.checkpoint import model_document, write_checkpoint
from utils.cli import log
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.network import file_bytes, opencv_warning
from utils.pruning.channel_graph import Importance, numbers, residual_units, unit_scores
from utils.pruning.policy import FREE_SHARE, advised_percent
from utils.pruning.surgery import PrunedNetwork
from utils.pruning.target import Plan
from utils.report.plots import LayerBar, plot_channels, plot_threshold
from utils.report.run_dir import RunDirectory
from utils.report.tables import (
    Cell,
    Column,
    Cost,
    block_costs,
    csv_table,
    markdown_table,
    network_cost,
    text_table,
    total,
)

Document = Mapping[str, Any]
Size = tuple[int, int]
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


def figures(network: Network, size: Size) -> dict[str, Any]:
    """Cost of a network, by the keys of --json; accuracy and time are filled in when measured."""
    cost = network_cost(network, *size)
    return {
        "map50": None,
        "map50_95": None,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "weights_bytes": file_bytes(network),
        "ms": None,
    }


def group_figures(plan: Plan, size: Size, *, by_gamma: bool) -> list[dict[str, Any]] | None:
    """Channels that go from every group and its cost before and after, by the keys of --json; None without groups.

    A share is advised only where γ ranked the channels.

    A block that is no convolution, or a depthwise one, is counted with the convolution before it, so that the groups
    add up to the network. Blocks before the first convolution are in that one's group.
    """
    if (choice := plan.choice) is None or not (groups := [part.group for part in choice.parts if part.group]):
        return None
    group_of = {block: place for place, group in enumerate(groups) for block in group.layers}
    number = numbers(plan.graph.network, plan.removal)
    old, new = (block_costs(network, *size) for network in (plan.graph.network, plan.after()))
    before: list[list[Cost]] = [[] for _ in groups]
    after: list[list[Cost]] = [[] for _ in groups]
    place = group_of[min(group_of)]
    for block, cost in enumerate(old):
        place = group_of.get(block, place)
        before[place].append(cost)
        if block in number:
            after[place].append(new[number[block]])
    return [
        {
            "name": group.name,
            "convolutions": list(group.layers),
            "candidates": part.ranked,
            "percent": part.percent,
            "advised_percent": advised_percent(part.scores, choice.max_percent) if by_gamma and part.ranked else None,
            "removed": part.removed,
            "threshold": part.threshold,
            "kept": sum(int(plan.removal.keep[plan.graph.labels[layer]].sum()) for layer in part.ranks),
            "before": _cost(total(before[place])),
            "after": _cost(total(after[place])),
        }
        for place, (group, part) in enumerate(zip(groups, choice.parts, strict=True))
    ]


def _cost(cost: Cost) -> dict[str, int]:
    return {"parameters": cost.parameters, "macs": cost.macs}


def plan_document(plan: Plan, policy: Any, importance: Importance, document: Document) -> dict[str, Any]:
    """plan.json: the policy and how it was decided, what goes, and the figures of --json."""
    choice, removal = plan.choice, plan.removal
    scores = unit_scores(plan.graph, importance, removal.keep, removal.units)
    units = [
        {"source": unit.source, "blocks": list(unit.blocks), "mean_importance": float(score)}
        for unit, score in zip(removal.units, scores, strict=True)
    ]
    channels = None
    if choice is not None:
        gone = int((~removal.keep).sum())
        channels = {
            "candidates": choice.ranked,
            "removed": gone if plan.in_rounds else choice.removed,
            "threshold": None if plan.in_rounds else choice.threshold,
            "limiting": None if plan.in_rounds else choice.limiting,
        }
    return {"policy": policy, "channels": channels, "units": units, **document}


def channel_table(plan: Plan, bars: Sequence[LayerBar], importance: Importance) -> str:
    """CSV, a row for each convolution that makes channels: its channels before and after, and their mean importance.

    `new_block` is empty for what goes, `unit` is the shortcut of the residual unit with which it goes.
    """
    network = plan.graph.network
    number = numbers(network, plan.removal)
    unit_of = {block: unit.shortcut for unit in plan.removal.units for block in unit.blocks}
    lines = []
    for bar in bars:
        i = bar.block
        mean = f"{np.abs(importance[i]).mean():.6g}" if i in importance else ""
        widths = (bar.before, bar.after, int(bar.candidate), bar.chain)
        lines.append([i, number.get(i), network.blocks[i].line, *widths, unit_of.get(i), mean])
    titles = "block new_block line before after candidate chain unit mean_importance"
    return csv_table(titles.split(), lines)


def write_network(
    run: RunDirectory, pruned: PrunedNetwork, names: Sequence[str], lineage: Sequence[Mapping[str, Any]]
) -> None:
    """Write the pruned network for Darknet and for this suite; model.cfg comes last, as it is useless without weights.

    Args:
        run: its directory.
        pruned: the network.
        names: of the classes.
        lineage: files that it was made from.
    """
    network, arrays = pruned
    text = format_network(network)
    run.file("model.cfg").unlink(missing_ok=True)  # of an earlier pruning, with --exist-ok
    weights_file.write(run.file("model.weights"), network, arrays)
    state = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    write_checkpoint(run.file("model.pt"), model_document(state, network, names, lineage))
    run.write_text("model.cfg", text)
    if warning := opencv_warning(network):
        log(f"{run.path}: {warning}")


def table(document: Document) -> tuple[list[Column], list[tuple[Cell, ...]]]:
    """Columns and rows; columns of what was not measured are left out."""
    rows = list(_network_rows(document))
    used = [any(row[place] is not None for row in rows) for place in range(len(COLUMNS))]
    return list(compress(COLUMNS, used)), [tuple(compress(row, used)) for row in rows]


def _network_rows(document: Document) -> Iterator[tuple[Cell, ...]]:
    """The network before, the networks of full size, the one that is left."""
    latency = document["latency"] or {}
    for title, key, costs, timed in (
        ("original", "before", "before", "original"),
        ("masked", "silenced", "before", None),
        ("constants folded", "absorbed", "before", None),
        ("pruned, readers fitted" if document["reconstructed"] else "pruned", "after", "after", "compact"),
    ):
        if document[key] is not None:
            ms = latency.get(timed, {})
            accuracy = (document[key]["map50"], document[key]["map50_95"])
            yield (title, *accuracy, *_costs(document[costs]), ms.get("median"), ms.get("p90"))


def _costs(figures: Mapping[str, Any]) -> tuple[Cell, ...]:
    return figures["parameters"], figures["macs"] / 1e9, figures["weights_bytes"] / 1e6


def text(document: Document) -> str:
    """The summary that is printed at the end of a run."""
    return "\n".join([text_table(*table(document)), *_group_tables(document, text_table), *remarks(document)])


def markdown(document: Document) -> str:
    """The same as report.md."""
    parts = [f"# {document['strategy']} pruning", markdown_table(*table(document))]
    parts += [shown.strip() for shown in _group_tables(document, markdown_table)]
    parts += remarks(document)
    if document["latency"] is not None:
        parts.append("detections.jpg has detections before (left) and after (right); boxes that differ are marked.")
    return "\n\n".join(parts) + "\n"


def _group_tables(document: Document, shown: Callable[..., str]) -> Iterator[str]:
    """The table of the groups, if there are."""
    if groups := document.get("groups"):
        rows = [_group_row(f"{number} {group['name']}", group, groups) for number, group in enumerate(groups, 1)]
        yield f"\n{shown(GROUP_COLUMNS, rows)}\n"


def _group_row(title: str, group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    shares = [
        100 * group[when][key] / max(1, sum(other[when][key] for other in groups))
        for key in ("parameters", "macs")
        for when in ("before", "after")
    ]
    chosen = (group["percent"], group["advised_percent"], group["kept"]) if group["candidates"] else (None, None, None)
    makers = group["convolutions"]
    return title, f"{makers[0]}–{makers[-1]}", len(makers), group["candidates"], *chosen, *shares


def remarks(document: Document) -> Iterator[str]:
    """Lines below the table."""
    if (latency := document["latency"]) is not None:
        faster, less = (document["before"][key] / document["after"][key] for key in ("ms", "macs"))
        yield (
            f"ms: forward pass of one image, {latency['height']} × {latency['width']}, batch normalisation folded, "
            f"channels-last; {latency['original']['rounds']} rounds in turn; {latency['runtime']}; "
            f"efficiency {document['efficiency']:.2f}: time ÷ {faster:.2f}, multiply-adds ÷ {less:.2f}"
        )
    proof = document["certificate"]
    border = "" if proof["border"] is None else f"; border {proof['border']:.2g}"
    yield (
        f"certificate: pruned = masked to {proof['compact_vs_silenced']:.0e}, = full size to "
        f"{proof['compact_vs_keep_size']:.0e}{border}"
    )
    yield from target_remark(document)
    yield from advice(document)
    yield f"next: {document['next']}"


def target_remark(document: Document) -> Iterator[str]:
    """Amount that a target led to, if one was given."""
    if (target := document["target"]) is None:
        return
    reached = f"{target['reached']:.2f} points" if target["flag"] == "--max-drop" else f"{target['reached']:.4f}"
    words = [f"--{key} {target[key]}" for key in ("percent", "shortcut") if target[key] is not None]
    if "rounds" in target:
        words.append(f"{target['rounds']} rounds")
    yield (
        f"target {target['flag']} {target['bound']:g}: {reached}, by {' '.join(words)}; networks tried: "
        f"{target['tried']}"
    )


def advice(document: Document) -> Iterator[str]:
    """Percentages that cost little, if γ ranked the channels; a larger one is a warning."""
    if document["advised_percent"] is None:
        return
    if groups := document.get("groups"):
        name, subject = "--group-percent", "so many of a group's weakest"
        advised = [group["advised_percent"] or 0.0 for group in groups]
        more = [str(number) for number, group in enumerate(groups, 1) if group["percent"] > advised[number - 1]]
        warning = f"more goes from group {', '.join(more)}" if more else ""
    else:
        advised, percent = [document["advised_percent"]], document.get("percent") or 0.0
        name, subject = "--percent", f"the weakest {100 * advised[0]:.0f} % of the channels"
        warning = f"--percent {percent:g} is more" if percent > advised[0] else ""
    free = f"{100 * FREE_SHARE:.0f} % of"
    if any(advised):
        percents = " ".join(f"{value:g}" for value in advised)
        exception = "layers that are weak as a whole left out"
        yield f"advised: {name} {percents}; {subject} hold at most {free} any layer's Σ |γ|, {exception}"
    else:
        yield f"advised: no pruning yet; the weakest 1 % of the channels hold more than {free} a layer's Σ |γ| already"
    if warning:
        yield f"{warning}: {MORE}"


def grid_text(document: Document) -> str:
    """A dry run: a row for each amount."""
    rows = document["grid"]
    keys = {key: Column(f"--{key}", "g") for key in ("percent", "shortcut") if rows[0][key] is not None}
    cells = [(*(None,) * len(keys), *_costs(document["before"]), "before")]
    for row in rows:
        costs = (None,) * len(COSTS) if row["after"] is None else _costs(row["after"])
        cells.append((*(row[key] for key in keys), *costs, "infeasible" if row["after"] is None else ""))
    lines = [text_table((*keys.values(), *COSTS, Column("")), cells), *_group_tables(document, text_table)]
    lines += dict.fromkeys(row["infeasible"] for row in rows if row["infeasible"])
    lines += target_remark(document)
    if document["max_percent"] is not None:
        lines.append(f"the largest percent that works is {document['max_percent']:.4f}")
        lines += list(advice(document))[:1]
    if document["residual_units"] is not None:
        lines.append(f"residual units: {document['residual_units']}")
    return "\n".join(lines)


def layer_bars(plan: Plan) -> list[LayerBar]:
    """Channels that every convolution which makes channels keeps."""
    graph, removal = plan.graph, plan.removal
    chains = {i: number for number, chain in enumerate(graph.chains()) for i in chain}
    may_go = set() if plan.choice is None else set(plan.choice.scores)
    if plan.amount.shortcut is not None:
        may_go |= {i for unit in residual_units(graph.network) for i in unit.blocks}
    bars = []
    for i in graph.makers():
        labels, removed = graph.labels[i], i in removal.blocks
        after = 0 if removed else int(removal.keep[labels].sum())
        bars.append(LayerBar(i, len(labels), after, chains.get(i), i in may_go, removed))
    return bars


def draw(run: RunDirectory, plan: Plan, bars: Sequence[LayerBar]) -> None:
    """Draw channels.png, and importance.png of what is ranked together."""
    plot_channels(bars, run.file("channels.png"))
    if plan.choice is not None and not plan.in_rounds:
        for number, part in enumerate(plan.choice.parts, 1):
            if part.ranked:
                name = "importance.png" if part.group is None else f"importance_{number}.png"
                plot_threshold(part.ordered, part.removed, run.file(name))
