"""Percentages of groups from their sensitivity: the most multiply-adds for the least loss; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from utils.pruning.target import Target

FINE = 1000
"""Parts of a percentage in which the last group is fitted to the bound."""
Left = Callable[[tuple[float, ...]], float]
"""Share of the parameters or multiply-adds that is left with a percentage of every group."""


class Allocation(NamedTuple):
    """What every group loses."""

    percents: tuple[float, ...]
    left: float
    """Share of what is bounded that is left."""
    drop: float
    """Points of AP50 that the curves predict: the sum over the groups, straight between the measured shares."""


def allocate(grid: Sequence[float], drops: Sequence[Sequence[float]], left: Left, target: Target) -> Allocation:
    """Raise one group after the other to a higher share of the grid, until the target is reached.

    Every time that step of all is taken which loses the fewest predicted points of AP50 for what it wins (Δ drop / Δ
    left), several shares of the grid at once included; equal ones by what they win. Curves are made monotone first: a
    group that got better by losing channels lost nothing. The group raised last is then lowered as far as the target
    allows, by thousandths. The losses of groups are taken to add up, which is why the network that comes of it is
    measured anew. Greedy: within a step of the grid of the best for convex curves, with no such bound for others.

    Args:
        grid: [S], the shares that were measured, increasing, above 0.
        drops: [G, S], points of AP50 that each group lost at them.
        left: counts a network.
        target: of parameters or multiply-adds.

    Raises:
        InfeasibleError: the largest share of all groups does not reach the target.
    """
    shares = np.concatenate([[0.0], grid])
    losses = [np.maximum.accumulate([0.0, *row]) for row in drops]
    levels = [0] * len(losses)

    def percents(raised: int | None = None, level: int = 0) -> tuple[float, ...]:
        return tuple(float(shares[level if place == raised else own]) for place, own in enumerate(levels))

    now, last, before = left(percents()), None, 0
    while now > target.bound:
        steps = []
        for place, own in enumerate(levels):
            for level in range(own + 1, len(shares)):
                won = now - left(percents(place, level))
                if won > 0:
                    steps.append(((losses[place][level] - losses[place][own]) / won, -won, place, level))
        if not steps:
            raise target.missed(now)
        *_, last, level = min(steps)
        before, levels[last] = levels[last], level
        now = left(percents())
    found = list(percents())
    if last is not None:
        found[last] = _lowered(found, last, float(shares[before]), left, target.bound)
    drop = sum(float(np.interp(percent, shares, loss)) for percent, loss in zip(found, losses, strict=True))
    return Allocation(tuple(found), left(tuple(found)), drop)


def _lowered(found: Sequence[float], place: int, low: float, left: Left, bound: float) -> float:
    """The percentage of a group between `low`, which is over the bound, and its own, at which the bound is kept."""
    over, under = round(low * FINE), round(found[place] * FINE)
    while under - over > 1:
        middle = (over + under) // 2
        if left((*found[:place], middle / FINE, *found[place + 1 :])) <= bound:
            under = middle
        else:
            over = middle
    return under / FINE
