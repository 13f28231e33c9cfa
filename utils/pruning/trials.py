"""Networks that are made and measured on the way to the one that is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import Darknet
from utils.cli import log
from utils.errors import InputError
from utils.graph import ChannelGraph
from utils.pruning.constants import absorb
from utils.pruning.ladder import Ladder, cost_share, make_ladder
from utils.pruning.measure import Bench, Clock, make_bench, training_batches
from utils.pruning.plan import Plan, Size
from utils.pruning.policy import Gammas
from utils.pruning.recalibrate import recalibrate
from utils.pruning.removal import Removal
from utils.pruning.request import Amount, PruneRequest
from utils.pruning.surgery import Arrays, Compacted, compact
from utils.pruning.target import Target
from utils.report.cost import network_cost

QUICK_ROUNDS = 10
"""In which a network is timed while it is only a candidate."""
MOST_MORE = 10
"""Steps beyond that of the quick rounds, before a time is given up."""


@dataclass(frozen=True, eq=False)
class Trials:
    """What the networks that a request might lead to find and need."""

    asked: PruneRequest
    graph: ChannelGraph
    arrays: Arrays
    size: Size
    device: torch.device

    @cached_property
    def bench(self) -> Bench:
        """The validation pictures."""
        return make_bench(self.asked, self.graph.network.net.channels, self.size, self.device)

    @cached_property
    def batches(self) -> list[Tensor]:
        """The pictures for new batch statistics."""
        return list(training_batches(self.asked, self.graph.network.net.channels, self.size, self.device)[0])

    @cached_property
    def original(self) -> Darknet:
        """The network before, to be run."""
        return Clock(self.device, self.size).model(self.graph.network, self.arrays)

    @cached_property
    def map50(self) -> float:
        """AP50 of the network before.

        Raises:
            InputError: it finds nothing, so that nothing can be lost.
        """
        found = self.bench.accuracy("original", self.original)[0].map50
        if found == 0:
            raise InputError(f"{self.asked.files.weights}: finds nothing in {self.asked.data.valid}; its AP50 is 0")
        return found

    def cut(self, removal: Removal) -> Compacted:
        """The network that would be written."""
        absorbed = absorb(self.graph, self.arrays, removal) if self.asked.absorb else self.arrays
        network, arrays = compact(self.graph, absorbed, removal)
        return Compacted(network, recalibrate(network, arrays, self.batches, self.device) if self.asked.recalibrate
                         else arrays)  # fmt: skip

    def drop(self, name: str, removal: Removal) -> float:
        """Points of AP50 that the network which would be written has lost; `name` for the progress."""
        before = self.map50
        return 100 * (before - self.bench.accuracy(name, self.bench.model(*self.cut(removal)))[0].map50)

    def time_share(self, removal: Removal, **pace: int) -> float:
        """Median time of what is left, as a share of that of the network before; both run in turn."""
        clock = Clock(self.device, self.size)
        times = clock.latency({"before": self.original, "after": clock.model(*self.cut(removal))}, **pace)
        return times["after"].median / times["before"].median


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


def settle(trials: Trials, gammas: Gammas) -> tuple[PruneRequest, dict[str, Any] | None]:
    """A request whose amount is that which its target asks for, and the part of the document that says so.

    Raises:
        InfeasibleError: no amount reaches the target.
        InputError: the network before finds nothing, and the target is a loss of AP50.
    """
    asked = trials.asked
    if (target := asked.target) is None:
        return asked, None
    shortcut = asked.amounts[0].shortcut
    ladder = make_ladder(trials.graph, gammas, asked.channels, shortcut, fine=target.counted)
    reached = reach(target, ladder, trials)
    amount, figure, tried = reached
    found = {"flag": target.flag, "bound": target.bound, "reached": figure, **amount._asdict(), "tried": tried}
    return replace(asked, amounts=(amount,)), found
