"""What goes from a network, and what that leaves; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.darknet.blocks import Network
from utils.darknet.layout import file_bytes
from utils.errors import InfeasibleError, InputError
from utils.graph import ChannelGraph
from utils.pruning.advice import advised_percent
from utils.pruning.policy import ChannelChoice, ChannelPolicy, Gammas, choose
from utils.pruning.removal import Removal
from utils.pruning.request import Amount
from utils.pruning.surgery import Arrays, compact_network
from utils.pruning.units import choose_units, residual_units
from utils.report.cost import network_cost

Size = tuple[int, int]
"""Height and width of the network input."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes from a network, and why."""

    graph: ChannelGraph
    amount: Amount
    removal: Removal
    choice: ChannelChoice | None
    """Of the channels; None if none were to be chosen."""

    @property
    def max_percent(self) -> float | None:
        """The largest percentage that works."""
        return None if self.choice is None else self.choice.max_percent

    @property
    def advised(self) -> float | None:
        """The percentage that costs little, as far as γ tell."""
        return None if self.choice is None else advised_percent(self.choice.scores, self.choice.max_percent)

    def after(self) -> Network:
        """The network that is left."""
        return compact_network(self.graph, self.removal)


def make_plan(graph: ChannelGraph, gammas: Gammas, channels: ChannelPolicy | None, amount: Amount) -> Plan:
    """Choose channels, and then residual units by the channels that stay.

    Args:
        graph: of the network.
        gammas: γ of every convolution with batch normalisation.
        channels: which channels; None: all stay.
        amount: how much; its percentage takes the place of that of `channels`.

    Raises:
        InputError: the network has no residual unit.
        InfeasibleError: a convolution would lose all its channels, or there are not so many units.
        NumericsError: a γ is NaN or infinite.
    """
    keep, choice, units = np.ones(graph.count, np.bool_), None, ()
    if channels is not None:
        choice = choose(graph, gammas, replace(channels, percent=amount.percent))
        keep = choice.keep
    if amount.shortcut:
        if not residual_units(graph.network):
            raise InputError(
                f"--shortcut {amount.shortcut}: {graph.network.path or 'the network'} has no residual unit, that is "
                f"no [shortcut] around convolutions; slim_prune.py removes channels of any network"
            )
        units = choose_units(graph, gammas, keep, amount.shortcut)
    return Plan(graph, amount, Removal(keep, units), choice)


def grid(
    graph: ChannelGraph, gammas: Gammas, channels: ChannelPolicy | None, amounts: Iterable[Amount], size: Size
) -> Iterator[dict[str, Any]]:
    """A row for every amount, by the keys of --json: what is left, or why it cannot be done."""
    for amount in amounts:
        row = amount._asdict()
        try:
            after = figures(make_plan(graph, gammas, channels, amount).after(), size)
            yield row | {"after": after, "infeasible": None}
        except InfeasibleError as failure:
            yield row | {"after": None, "infeasible": str(failure)}


def gammas_of(network: Network, arrays: Arrays) -> Gammas:
    """γ of every batch normalisation, by block number."""
    names = ((i, f"layers.{i}.bn.weight") for i in range(len(network.blocks)))
    return {i: arrays[name] for i, name in names if name in arrays}


def figures(network: Network, size: Size) -> dict[str, Any]:
    """What a network costs, by the keys of --json; accuracy and time are filled in when measured."""
    cost = network_cost(network, *size)
    return {"map50": None, "map50_95": None, "parameters": cost.parameters, "macs": cost.macs,
            "weights_bytes": file_bytes(network), "ms": None}  # fmt: skip
