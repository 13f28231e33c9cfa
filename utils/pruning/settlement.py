"""From a target to the amounts that reach it: candidates are counted or measured until one keeps the bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from utils.cli import log
from utils.errors import InfeasibleError
from utils.graph import ChannelGraph, channel_graph
from utils.pruning.ladder import Ladder, cost_share, make_ladder
from utils.pruning.plan import Plan, make_plan
from utils.pruning.policy import ChannelPolicy, Importance, choose
from utils.pruning.removal import Keep, Removal
from utils.pruning.request import Amount, PruneRequest
from utils.pruning.savings import ranked
from utils.pruning.target import Target
from utils.pruning.trials import Trials
from utils.report.cost import network_cost

QUICK_ROUNDS = 10
"""In which a network is timed while it is only a candidate."""
MOST_MORE = 10
"""Steps beyond that of the quick rounds, before a time is given up."""


class Reached(NamedTuple):
    """What a target led to."""

    amount: Amount
    figure: float
    """What is bounded, of the network that was found."""
    tried: int
    """How many networks were looked at."""


def reach(target: Target, ladder: Ladder, trials: Trials) -> Reached:
    """The amount that a target asks for.

    Parameters and multiply-adds are counted channel by channel, or unit by unit. AP50 and time are measured at
    hundredths of the candidates. A time is found in few rounds and verified in the usual number; while it is over, a
    step more goes.

    Raises:
        InfeasibleError: no amount reaches it; says what does.
        InputError: the network before finds nothing, and the target is a loss of AP50.
    """
    before = network_cost(ladder.graph.network, *trials.size)
    known: dict[int, float] = {}

    def figure(step: int) -> float:
        if step not in known:
            plan = ladder.plan(step)
            known[step] = _measure(target, plan, trials) if not target.counted else (
                cost_share(before, plan, target.kind, trials.size))  # fmt: skip
        return known[step]

    step = target.fulfil(ladder.steps, figure, ladder.first)
    if target.kind == "latency":
        step = _verified(target, ladder, trials, step, known)
    return Reached(ladder.amount(step), known[step], len(known))


def _measure(target: Target, plan: Plan, trials: Trials) -> float:
    words = " ".join(f"--{key} {value:g}" for key, value in plan.amount._asdict().items() if value is not None)
    if target.kind == "drop":
        return trials.drop(words, plan.removal)
    share = trials.time_share(plan.removal, rounds=QUICK_ROUNDS)
    log(f"{words}: {share:.3f} of the time")
    return share


def _verified(target: Target, ladder: Ladder, trials: Trials, step: int, known: dict[int, float]) -> int:
    """The first step from this one on whose time in the usual number of rounds keeps the bound; written to `known`."""
    last = min(ladder.steps, step + MOST_MORE)
    for number in range(step, last + 1):
        known[number] = trials.time_share(ladder.plan(number).removal)
        log(f"verified: {known[number]:.3f} of the time")
        if known[number] <= target.bound:
            return number
    if last < ladder.steps:
        log(f"{MOST_MORE} steps beyond that of {QUICK_ROUNDS} rounds: the machine is busy with other work")
    raise target.missed(known[last])


class Settled(NamedTuple):
    """A request that says how much goes."""

    asked: PruneRequest
    target: dict[str, Any] | None
    """The part of the document that says what the target led to."""
    keep: Keep | None = None
    """[L], the labels that stay, if several rounds found them."""


def _at_least_advised(
    target: Target, ladder: Ladder, trials: Trials, amount: Amount, figure: float
) -> tuple[Amount, float]:
    """The amount, and what is left by it; what γ advise where that is more: those channels cost nothing."""
    advised = ladder.plan_of(amount).advised
    if advised <= amount.percent:
        return amount, figure
    before = network_cost(ladder.graph.network, *trials.size)
    more = amount._replace(percent=advised)
    log(f"{target.flag}: reached by --percent {amount.percent:g}; γ advise {advised:g}, which is taken")
    return more, cost_share(before, ladder.plan_of(more), target.kind, trials.size)


def in_rounds(trials: Trials, importance: Importance) -> Settled:
    """Several cuts to a percentage or a target, with importance computed anew after each, on what is left then.

    After round k of n the share S^(k/n) is left, where S is left at the end. Shares and `layer_keep` are those of the
    first network, so if importance did not change, rounds to a percentage would remove what one cut does. Readers are
    always fitted to the first network.

    Raises:
        InfeasibleError: a round cannot do its part.
    """
    asked, first = trials.asked, trials.graph
    target, percent, rounds = asked.target, asked.amounts[0].percent, asked.rounds
    before, graph, keep = network_cost(first.network, *trials.size), first, np.ones(first.count, np.bool_)
    at_first, channels = _candidates(first, importance, asked.channels), asked.channels
    left, tried = 1.0, 0
    for number in range(1, rounds + 1):
        if number > 1:
            network, arrays = trials.cut(Removal(keep))
            graph = channel_graph(network)
            importance = ranked(asked, graph, trials.importance(network, arrays), trials.size)
            wider = {i: len(first.labels[i]) / len(graph.labels[i]) for i in first.makers()}
            channels = replace(asked.channels, wider=wider)
        try:
            if target is None:
                policy = _down_to(at_first, (1 - percent) ** (number / rounds), graph, importance, channels)
                plan = make_plan(graph, importance, policy, Amount(None, None))
            else:
                bound = target.bound ** (number / rounds) / left
                if bound >= 1:
                    continue
                ladder = make_ladder(graph, importance, channels, None, fine=True)
                reached = reach(replace(target, bound=bound), ladder, trials)
                plan, tried = ladder.plan_of(reached.amount), tried + reached.tried
        except InfeasibleError as failure:
            amount = f"--percent {percent:g}" if target is None else f"{target.flag} {target.bound:g}"
            raise InfeasibleError(
                f"{amount} --rounds {rounds}: round {number} cannot do its part ({failure}); ask for less, "
                "or take fewer rounds"
            ) from failure
        _take(first, keep, graph, plan.removal.keep)
        if target is not None:
            left = cost_share(before, Plan(first, asked.amounts[0], Removal(keep), None), target.kind, trials.size)
        log(f"round {number} of {rounds}: {int(keep.sum())} of {first.count} channels stay")
    document = None if target is None else {
        "flag": target.flag, "bound": target.bound, "reached": left, "percent": None, "shortcut": None, "tried": tried,
        "rounds": rounds}  # fmt: skip
    return Settled(asked, document, keep)


def _candidates(graph: ChannelGraph, importance: Importance, channels: ChannelPolicy) -> tuple[int, ...]:
    """Number of the candidate channels, all or of every group."""
    return tuple(part.ranked for part in choose(graph, importance, replace(channels, percent=0.0)).parts)


def _down_to(
    at_first: Sequence[int], stays: float, graph: ChannelGraph, importance: Importance, channels: ChannelPolicy
) -> ChannelPolicy:
    """A policy with the percentages after which the share `stays` of the candidates `at_first` is left.

    As in a single cut, candidates that shortcuts, floors or widths bring back count as removed.
    """
    now = _candidates(graph, importance, channels)
    percents = tuple(max(0.0, 1 - stays * old / new) if new else 0.0 for old, new in zip(at_first, now, strict=True))
    return replace(channels, group_percents=percents) if channels.groups else replace(channels, percent=percents[0])


def _take(first: ChannelGraph, keep: Keep, graph: ChannelGraph, stays: Keep) -> None:
    """Write into `keep` [L], the labels of the first network that stay, those that go from what is left of it."""
    old = keep.copy()
    for before, now in zip(first.labels, graph.labels, strict=True):
        keep[before[old[before]][~stays[now]]] = False


def settle(trials: Trials, importance: Importance) -> Settled:
    """A request whose amount, or percentages of groups, are those which its target asks for.

    Raises:
        InfeasibleError: no amount reaches the target.
        InputError: the network before finds nothing, and AP50 is to be measured.
    """
    asked = trials.asked
    if asked.rounds > 1:
        return in_rounds(trials, importance)
    if (target := asked.target) is None:
        return Settled(asked, None)
    shortcut = asked.amounts[0].shortcut
    ladder = make_ladder(trials.graph, importance, asked.channels, shortcut, fine=target.counted)
    amount, figure, tried = reach(target, ladder, trials)
    if asked.importance == "gamma" and target.counted and amount.percent is not None:
        amount, figure = _at_least_advised(target, ladder, trials, amount, figure)
    found = {"flag": target.flag, "bound": target.bound, "reached": figure, **amount._asdict(), "tried": tried}
    return Settled(replace(asked, amounts=(amount,)), found)
