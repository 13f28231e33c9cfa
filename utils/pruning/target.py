"""From an amount or a target to the channels and units that go: one bisection over one ranking; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from utils.cli import log
from utils.darknet.blocks import Network
from utils.errors import InfeasibleError
from utils.pruning.channel_graph import (
    ChannelGraph,
    Importance,
    Keep,
    Removal,
    Unit,
    check_units,
    choose_units,
    most_units,
    prune_blocks,
)
from utils.pruning.policy import ChannelChoice, ChannelPolicy, choose

if TYPE_CHECKING:
    from utils.pruning.workflow import Pruner

HUNDREDTHS = 100
"""Steps to all candidates where every step has to be measured."""
PLACES = 1_000_000
"""Parts of a percentage that is reported, so that it removes the same when it is given as --percent."""


class Amount(NamedTuple):
    """Shares and numbers that are removed; None of what a strategy does not remove."""

    percent: float | None
    """Share of the candidate channels; None also if every group has a share of its own."""
    shortcut: int | None
    """Number of residual units."""

    def __str__(self) -> str:
        """The flags that ask for it."""
        return " ".join(f"--{key} {value:g}" for key, value in self._asdict().items() if value is not None)


@dataclass(frozen=True, eq=False)
class Plan:
    """Channels and units that go from a network, and why."""

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

    def after(self) -> Network:
        """The network that is left."""
        return prune_blocks(self.graph, self.removal)


def make_plan(
    graph: ChannelGraph,
    importance: Importance,
    channels: ChannelPolicy | None,
    amount: Amount,
    left: Keep | None = None,
) -> Plan:
    """Choose channels, and then residual units by the channels that stay.

    Args:
        graph: of the network.
        importance: of every convolution with batch normalisation.
        channels: which channels; None: all stay.
        amount: its percentage, if any, takes the place of that of `channels`.
        left: [L], labels that earlier cuts left.

    Raises:
        InputError: the network has no residual unit, or another number of groups than there are percentages.
        InfeasibleError: a convolution would lose all its channels, or there are not so many units.
        NumericsError: an importance is NaN or infinite.
    """
    keep, choice = np.ones(graph.count, np.bool_), None
    units: tuple[Unit, ...] = ()
    if channels is not None:
        if amount.percent is not None:
            channels = replace(channels, percent=amount.percent)
        choice = choose(graph, importance, channels, left)
        keep = choice.keep
    if amount.shortcut is not None:
        check_units(graph.network)
        units = choose_units(graph, importance, keep, amount.shortcut)
    return Plan(graph, amount, Removal(keep, units), choice)


Bounded = Literal["params", "macs", "latency", "drop"]
"""Parameters, multiply-adds, or the median time of a forward pass, as shares of those of the network before; or the
loss of AP50 in points."""


@dataclass(frozen=True)
class PruneTarget:
    """A bound that the pruned network keeps."""

    kind: Bounded
    bound: float

    @property
    def flag(self) -> str:
        """The flag that asks for it."""
        return "--max-drop" if self.kind == "drop" else f"--target-{self.kind}"

    @property
    def counted(self) -> Literal["parameters", "macs"] | None:
        """The cost of a cfg that is bounded, without pictures and time; None of a time or a loss."""
        return "parameters" if self.kind == "params" else "macs" if self.kind == "macs" else None

    def reach(self, steps: int, figure: Callable[[int], float], first: int = 1) -> int:
        """The number of steps to go, by bisection.

        For a share, a number whose figure is at or under the bound, while that of one step less is over it. For a drop,
        one whose figure is, while that of one step more is over. It is the smallest, or the largest, such number if the
        figure is monotone, which AP, a time, and rounded widths are only roughly.

        Args:
            steps: the most that can be done.
            figure: of a number of steps; it falls with them for a share, and rises for a drop.
            first: the smallest number that removes anything.

        Raises:
            InfeasibleError: not even all steps reach the bound; for a drop, not even the first keeps it.
        """
        if self.kind != "drop":
            if (least := figure(steps)) > self.bound:
                works = math.ceil(least * 1e4) / 1e4
                way_out = f"the smallest that works is {works:.4f}" if works < 1 else "less than 0.01 % can be removed"
                raise InfeasibleError(f"{self.flag} {self.bound:g}: is out of reach; {way_out}")
            return _boundary(-1, steps, lambda step: figure(step) > self.bound) + 1
        last = _boundary(first - 1, max(first, steps + 1), lambda step: figure(step) <= self.bound)
        if last >= first:
            return last
        if steps < first:
            raise InfeasibleError(f"{self.flag} {self.bound:g}: nothing can be removed")
        works = math.ceil(figure(first) * 100) / 100
        raise InfeasibleError(
            f"{self.flag} {self.bound:g}: the first step loses more; sparse training (python train.py -sr) makes more "
            f"channels weak; the smallest that works is {works:.2f}"
        )


def _boundary(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """A number for which a condition holds, but not for the next one; it must hold for `low` and not for `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


class Steps(NamedTuple):
    """Plans that remove more and more; step 0 removes nothing, or only the residual units that go in any case."""

    plan: Callable[[int], Plan]
    """Plan of a step."""
    first: int
    """The smallest step that removes anything."""
    last: int
    """The last step that works."""


def make_steps(
    graph: ChannelGraph,
    importance: Importance,
    channels: ChannelPolicy | None,
    shortcut: int | None,
    *,
    fine: bool,
    left: Keep | None = None,
) -> Steps:
    """The steps from nothing to the most that works.

    Args:
        graph: of the network.
        importance: of every convolution with batch normalisation.
        channels: which channels may go, one percentage of all groups, if there are; None: a step is a residual unit.
        shortcut: residual units that go in any case.
        fine: channel by channel; otherwise hundredths of the candidates.
        left: [L], labels that earlier cuts left.

    Raises:
        InputError: there is no residual unit to remove.
        InfeasibleError: no convolution can be pruned.
        NumericsError: an importance is NaN or infinite.
    """
    if channels is None:
        check_units(graph.network)
        units = most_units(graph, importance)
        return Steps(lambda step: make_plan(graph, importance, None, Amount(None, step)), 1, units)
    choice = choose(graph, importance, replace(channels, percent=0.0), left)
    whole = choice.ranked if fine else HUNDREDTHS

    def plan(step: int) -> Plan:
        percent = math.ceil(step * PLACES / whole) / PLACES
        return make_plan(graph, importance, channels, Amount(percent, shortcut), left)

    return Steps(plan, 0 if shortcut else 1, math.floor(choice.max_percent * whole + 1e-9))


def find_plan(target: PruneTarget, steps: Steps, figure: Callable[[Plan], float]) -> tuple[Plan, float, int]:
    """The plan that a target asks for, its figure, and how many networks were tried.

    Raises:
        InfeasibleError: no amount reaches the target; says what does.
    """
    figure_of = cache(lambda step: figure(steps.plan(step)))
    step = target.reach(steps.last, figure_of, steps.first)
    return steps.plan(step), figure_of(step), figure_of.cache_info().currsize


def plan_for_target(pruner: Pruner, importance: Importance) -> tuple[Plan, dict[str, Any]]:
    """The plan that reaches the target of the settings, and the part of the document that says so.

    Parameters and multiply-adds are counted channel by channel, or unit by unit. AP50 and time are measured at
    hundredths of the candidates. With γ a counted target also takes what γ advise, if that is more: those channels cost
    nothing.

    Raises:
        InfeasibleError: no amount reaches the target.
        InputError: the network before finds nothing, and AP50 is to be measured.
    """
    settings, target, channels = pruner.settings, pruner.settings.target, pruner.settings.channels
    assert target is not None  # called with one
    fine = target.counted is not None
    steps = make_steps(pruner.graph, importance, channels, settings.amounts[0].shortcut, fine=fine)
    plan, reached, tried = find_plan(target, steps, partial(pruner.figure, target))
    advised = plan.choice.advised if settings.importance == "gamma" and fine and plan.choice is not None else 0.0
    if advised > (plan.amount.percent or 0.0):
        log(f"{target.flag}: reached by --percent {plan.amount.percent:g}; γ advise {advised:g}, which is taken")
        plan = make_plan(pruner.graph, importance, channels, plan.amount._replace(percent=advised))
        reached = pruner.figure(target, plan)
    return plan, _target_document(target, reached, plan.amount, tried)


def plan_in_rounds(pruner: Pruner, importance: Importance) -> tuple[Plan, dict[str, Any] | None]:
    """The plan of several cuts to a percentage or a target, with importance computed again after each.

    After round k of n the share S^(k/n) is left, where S is left at the end. All rounds rank the channels of the first
    network, and those that are gone come first. So shares and floors are of the first network, and if importance did
    not change, rounds to a percentage would remove what one cut does. Readers are always fitted to the first network.

    Raises:
        InfeasibleError: a round cannot do its part.
    """
    settings, graph = pruner.settings, pruner.graph
    target, amount, channels = settings.target, settings.amounts[0], settings.channels
    assert channels is not None  # --rounds goes with them
    first = choose(graph, importance, replace(channels, percent=0.0, groups=False))
    keep, reached, tried = first.keep, 1.0, 0
    stays = 1 - (amount.percent or 0.0) if target is None else target.bound
    for number in range(1, settings.cuts + 1):
        share = stays ** (number / settings.cuts)
        if number > 1:
            importance = pruner.importance_after(keep)
        try:
            if target is None:
                plan = make_plan(graph, importance, channels, Amount(1 - share, None), keep)
            else:
                steps = make_steps(graph, importance, channels, None, fine=True, left=keep)
                plan, reached, count = find_plan(replace(target, bound=share), steps, partial(pruner.figure, target))
                tried += count
        except InfeasibleError as failure:
            wanted = f"--percent {amount.percent:g}" if target is None else f"{target.flag} {target.bound:g}"
            raise InfeasibleError(
                f"{wanted} --rounds {settings.cuts}: round {number} cannot do its part ({failure}); ask for less, "
                "or take fewer rounds"
            ) from failure
        keep = plan.removal.keep
        log(f"round {number} of {settings.cuts}: {int(keep.sum())} of {graph.count} channels stay")
    plan = Plan(graph, amount, Removal(keep), replace(first, keep=keep), in_rounds=True)
    if target is None:
        return plan, None
    return plan, _target_document(target, reached, amount, tried) | {"rounds": settings.cuts}


def _target_document(target: PruneTarget, reached: float, amount: Amount, tried: int) -> dict[str, Any]:
    """The part of the document that says what a target led to."""
    return {"flag": target.flag, "bound": target.bound, "reached": reached, **amount._asdict(), "tried": tried}
