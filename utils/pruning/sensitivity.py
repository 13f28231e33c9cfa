"""What each layer and each group is worth: accuracy when it alone loses channels; no torch.

The analysis of Li et al. ("Pruning Filters for Efficient ConvNets", arXiv:1608.08710, 3.2), with the importance for the
order and families of tied layers as one layer, and of the groups of `pruning_groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.graph import ChannelGraph
from utils.pruning.candidates import candidates
from utils.pruning.groups import pruning_groups
from utils.pruning.plan import Size
from utils.pruning.policy import ChannelPolicy, Importance, channel_scores, choose, families_of
from utils.pruning.ranking import Family
from utils.pruning.removal import Keep, Removal
from utils.pruning.shares import keep_shares
from utils.pruning.surgery import compact_network
from utils.report.cost import network_cost
from utils.report.tables import csv_table

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the channels of a layer or group, the weakest first."""


@dataclass(frozen=True, eq=False)
class Part:
    """What loses channels while all else stays."""

    kind: str
    """`layer`, a family of tied layers, or `group`."""
    number: int
    """Block of the layer, or of the first of its family; number of the group, from 1."""
    name: str
    layers: Family
    """The candidates in it."""
    channels: int
    """Different ones: those that a shortcut ties are one."""
    keeps: tuple[Keep, ...]
    """[L], the labels that stay, for each of SHARES."""


@dataclass(frozen=True, eq=False)
class Curve:
    """AP50 of a network against the share that one part lost."""

    part: Part
    removed: tuple[int, ...]
    """Channels that went for each of SHARES; the widths and floors of the policy hold, and in a group its merge."""
    drops: tuple[float, ...]
    """Points of AP50 that were lost; below 0 where it rose."""
    parameters: tuple[float, ...]
    """Share of the network's that is left."""
    macs: tuple[float, ...]


def layer_parts(graph: ChannelGraph, importance: Importance, policy: ChannelPolicy) -> Iterator[Part]:
    """The families of a policy's candidates, in the order of the network."""
    layers = candidates(graph, policy.prune, policy.all_convs)
    scores = channel_scores(graph, importance, layers)
    for family in families_of(graph, layers):
        keeps = tuple(keep_shares(graph, scores, {family: share}, policy) for share in SHARES)
        name = f"{family[0]}" + (f" and {len(family) - 1} tied" if len(family) > 1 else "")
        yield Part("layer", family[0], name, family, _width(graph, family), keeps)


def group_parts(graph: ChannelGraph, importance: Importance, policy: ChannelPolicy) -> Iterator[Part]:
    """The groups of the network that have candidates: what `choose` keeps when only this group has a percentage."""
    groups = pruning_groups(graph)
    grouped = replace(policy, groups=True, layer_keep=policy.layer_keep or 0.0)
    layers = candidates(graph, policy.prune, policy.all_convs)
    for place, group in enumerate(groups):
        own = tuple(layer for layer in group.layers if layer in layers)
        if own:
            rows = (tuple(share * (place == other) for other in range(len(groups))) for share in SHARES)
            keeps = tuple(choose(graph, importance, replace(grouped, group_percents=row)).keep for row in rows)
            yield Part("group", place + 1, group.name, own, _width(graph, own), keeps)


def _width(graph: ChannelGraph, layers: Sequence[int]) -> int:
    return len(np.unique(np.concatenate([graph.labels[layer] for layer in layers])))


def measure_part(graph: ChannelGraph, part: Part, drop: Callable[[str, Removal], float], size: Size) -> Curve:
    """The curve of one part; shares by which the same channels go are measured once.

    Args:
        graph: of the network.
        part: what loses channels.
        drop: points of AP50 that a removal costs; its first argument is for the progress.
        size: height and width of the input, for the multiply-adds.
    """
    whole = np.ones(graph.count, np.bool_)
    before, known = network_cost(graph.network, *size), {whole.tobytes(): 0.0}
    removed, drops, costs = [], [], []
    for share, keep in zip(SHARES, part.keeps, strict=True):
        removal, stays = Removal(keep), keep.tobytes()
        if stays not in known:
            known[stays] = drop(f"{part.kind} {part.name}, {share:g}", removal)
        removed.append(int((~keep).sum()))
        drops.append(known[stays])
        costs.append(network_cost(compact_network(graph, removal), *size))
    parameters = tuple(cost.parameters / before.parameters for cost in costs)
    return Curve(part, tuple(removed), tuple(drops), parameters, tuple(cost.macs / before.macs for cost in costs))


def curve_table(curves: Sequence[Curve], map50: float) -> str:
    """CSV, a row for each share of each part; `map50` of the network before is in the first row."""
    titles = "kind number name layers channels share removed map50 drop parameters macs"
    rows = [["network", "", "", "", "", 0, 0, f"{map50:.6g}", 0, 1, 1]]
    for curve in curves:
        part = curve.part
        about = [part.kind, part.number, part.name, " ".join(map(str, part.layers)), part.channels]
        columns = zip(SHARES, curve.removed, curve.drops, curve.parameters, curve.macs, strict=True)
        for share, removed, drop, parameters, macs in columns:
            left = [f"{map50 - drop / 100:.6g}", f"{drop:.6g}", f"{parameters:.6g}", f"{macs:.6g}"]
            rows.append([*about, share, removed, *left])
    return csv_table(titles.split(), rows)
