"""Amounts that remove more and more of a network, from which a target takes one; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from utils.graph import ChannelGraph
from utils.pruning.plan import Plan, Size, make_plan
from utils.pruning.policy import ChannelPolicy, Importance
from utils.pruning.request import Amount
from utils.pruning.target import Kind
from utils.pruning.units import check_units, most_units
from utils.report.cost import Cost, network_cost

HUNDREDTHS = 100
"""Steps to all candidates where every step has to be measured."""
PLACES = 1_000_000
"""A percentage is written with so many parts, so that it says the same when it is given as --percent."""


@dataclass(frozen=True, eq=False)
class Ladder:
    """Amounts by steps: 0 removes nothing, or only the residual units that go in any case."""

    graph: ChannelGraph
    importance: Importance
    channels: ChannelPolicy | None
    """None: a step is a residual unit."""
    shortcut: int | None
    """Residual units that go in any case, where a step is a share of the channels."""
    whole: int
    """Steps to all candidate channels, or residual units."""
    steps: int
    """Steps that can be gone."""

    @property
    def first(self) -> int:
        """The smallest step that removes anything."""
        return 0 if self.channels is not None and self.shortcut else 1

    def amount(self, step: int) -> Amount:
        """How much goes by so many steps."""
        if self.channels is None:
            return Amount(None, step)
        return Amount(math.ceil(step * PLACES / self.whole) / PLACES, self.shortcut)

    def plan(self, step: int) -> Plan:
        """What goes by so many steps."""
        return self.plan_of(self.amount(step))

    def plan_of(self, amount: Amount) -> Plan:
        """What goes by an amount."""
        return make_plan(self.graph, self.importance, self.channels, amount)


def make_ladder(
    graph: ChannelGraph, importance: Importance, channels: ChannelPolicy | None, shortcut: int | None, *, fine: bool
) -> Ladder:
    """The steps from nothing to the most that works.

    Args:
        graph: of the network.
        importance: of every convolution with batch normalisation.
        channels: which channels may go; one percentage of all groups, if there are.
        shortcut: residual units that go in any case.
        fine: channel by channel; otherwise hundredths of the candidates.

    Raises:
        InputError: there is no residual unit to remove.
        InfeasibleError: no convolution can be pruned.
        NumericsError: an importance is NaN or infinite.
    """
    if channels is None:
        check_units(graph.network)
        whole = steps = most_units(graph, importance, np.ones(graph.count, np.bool_))
        return Ladder(graph, importance, None, None, whole, steps)
    choice = make_plan(graph, importance, channels, Amount(0.0, None)).choice
    whole = choice.ranked if fine else HUNDREDTHS
    return Ladder(graph, importance, channels, shortcut, whole, math.floor(choice.max_percent * whole + 1e-9))


def cost_share(before: Cost, plan: Plan, kind: Kind, size: Size) -> float:
    """Parameters or multiply-adds that are left, as a share of those before."""
    after = network_cost(plan.after(), *size)
    return after.parameters / before.parameters if kind == "params" else after.macs / before.macs
