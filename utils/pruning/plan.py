"""What goes from a network, and what that leaves; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Network
from utils.darknet.layout import file_bytes
from utils.errors import InfeasibleError
from utils.graph import ChannelGraph
from utils.pruning.advice import advised_percent
from utils.pruning.groups import owners
from utils.pruning.policy import ChannelChoice, ChannelPolicy, Importance, choose
from utils.pruning.removal import Keep, Removal
from utils.pruning.request import Amount
from utils.pruning.surgery import Arrays, compact_network, numbers
from utils.pruning.units import check_units, choose_units
from utils.report.cost import block_costs, network_cost, total

if TYPE_CHECKING:
    from models import Darknet

Size = tuple[int, int]
"""Height and width of the network input."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes from a network, and why."""

    graph: ChannelGraph
    amount: Amount
    removal: Removal
    choice: ChannelChoice | None
    """Of the channels; None if none were to be chosen. Of several rounds the ranking before the first."""
    in_rounds: bool = False
    """Whether several rankings chose the channels, and not one."""

    @property
    def max_percent(self) -> float | None:
        """The largest percentage that works."""
        return None if self.choice is None else self.choice.max_percent

    @property
    def advised(self) -> float | None:
        """The percentage that costs little, as far as trained γ tell; of every group, if there are."""
        if self.choice is None:
            return None
        parts = (part.ranking.scores for part in self.choice.parts if part.ranked)
        return min(advised_percent(scores, self.choice.max_percent) for scores in parts)

    def after(self) -> Network:
        """The network that is left."""
        return compact_network(self.graph, self.removal)


def make_plan(graph: ChannelGraph, importance: Importance, channels: ChannelPolicy | None, amount: Amount) -> Plan:
    """Choose channels, and then residual units by the channels that stay.

    Args:
        graph: of the network.
        importance: of every convolution with batch normalisation.
        channels: which channels; None: all stay.
        amount: how much; its percentage, if any, takes the place of that of `channels`.

    Raises:
        InputError: the network has no residual unit, or another number of groups than there are percentages.
        InfeasibleError: a convolution would lose all its channels, or there are not so many units.
        NumericsError: an importance is NaN or infinite.
    """
    keep, choice, units = np.ones(graph.count, np.bool_), None, ()
    if channels is not None:
        if amount.percent is not None:
            channels = replace(channels, percent=amount.percent)
        choice = choose(graph, importance, channels)
        keep = choice.keep
    if amount.shortcut is not None:
        check_units(graph.network)
        units = choose_units(graph, importance, keep, amount.shortcut)
    return Plan(graph, amount, Removal(keep, units), choice)


def plan_of_rounds(
    graph: ChannelGraph, importance: Importance, channels: ChannelPolicy, keep: Keep, amount: Amount
) -> Plan:
    """A plan of the channels that several rounds chose; `keep` [L], the labels that stay.

    Raises:
        InfeasibleError: there is no candidate.
        NumericsError: an importance is NaN or infinite.
    """
    choice = choose(graph, importance, replace(channels, percent=0.0, groups=False, group_percents=None))
    return Plan(graph, amount, Removal(keep), replace(choice, keep=keep), in_rounds=True)


def grid(
    graph: ChannelGraph, importance: Importance, channels: ChannelPolicy | None, amounts: Iterable[Amount], size: Size
) -> Iterator[dict[str, Any]]:
    """A row for every amount, by the keys of --json: what is left, or why it cannot be done."""
    for amount in amounts:
        row = amount._asdict()
        try:
            plan = make_plan(graph, importance, channels, amount)
            yield row | {"after": figures(plan.after(), size), "groups": group_figures(plan, size), "infeasible": None}
        except InfeasibleError as failure:
            yield row | {"after": None, "groups": None, "infeasible": str(failure)}


def arrays_of(model: Darknet) -> dict[str, NDArray[np.floating]]:
    """The tensors of a model on the CPU, without the counters; where they are there they are not copied."""
    return {name: value.cpu().numpy() for name, value in model.state_dict().items() if "num_batches" not in name}


def gammas_of(network: Network, arrays: Arrays) -> Importance:
    """γ of every batch normalisation, by block number."""
    names = ((i, f"layers.{i}.bn.weight") for i in range(len(network.blocks)))
    return {i: arrays[name] for i, name in names if name in arrays}


def figures(network: Network, size: Size) -> dict[str, Any]:
    """What a network costs, by the keys of --json; accuracy and time are filled in when measured."""
    cost = network_cost(network, *size)
    return {"map50": None, "map50_95": None, "parameters": cost.parameters, "macs": cost.macs,
            "weights_bytes": file_bytes(network), "ms": None}  # fmt: skip


def group_figures(plan: Plan, size: Size) -> list[dict[str, Any]] | None:
    """What goes from every group and what it costs before and after, by the keys of --json; None without groups.

    A block that is no convolution, or a depthwise one, is counted with the convolution before it, so that the groups
    add up to the network.
    """
    parts = () if plan.choice is None else plan.choice.parts
    groups = tuple(part.group for part in parts if part.group is not None)
    if not groups:
        return None
    owner, number = owners(plan.graph, groups), numbers(plan.graph.network, plan.removal)
    old, new = (block_costs(network, *size) for network in (plan.graph.network, plan.after()))
    rows = []
    for place, (part, group) in enumerate(zip(parts, groups, strict=True)):
        blocks = [i for i, at in enumerate(owner) if at == place]
        before, after = total(old[i] for i in blocks), total(new[number[i]] for i in blocks if i in number)
        kept = sum(int(plan.removal.keep[plan.graph.labels[i]].sum()) for i in part.ranking.layers)
        advised = advised_percent(part.ranking.scores, plan.choice.max_percent) if part.ranked else None
        rows.append({
            "name": group.name, "convolutions": list(group.layers), "candidates": part.ranked, "percent": part.percent,
            "advised_percent": advised, "removed": part.removed, "threshold": part.threshold, "kept": kept,
            "before": {"parameters": before.parameters, "macs": before.macs},
            "after": {"parameters": after.parameters, "macs": after.macs},
        })  # fmt: skip
    return rows
