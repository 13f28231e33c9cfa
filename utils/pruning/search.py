"""Random networks at a budget of multiply-adds, the best of which is kept (EagleEye, arXiv:2007.02491); no torch.

A vector has a share for every family of layers; within a layer the weakest channels go. The paper draws vectors until
one has the budget; here every vector is stretched to it, so that budgets far from the mean cost no more draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.errors import InfeasibleError
from utils.graph import ChannelGraph
from utils.pruning.candidates import candidates
from utils.pruning.plan import Size
from utils.pruning.policy import ChannelPolicy, Importance, channel_scores, families_of
from utils.pruning.ranking import Family
from utils.pruning.removal import Keep, Removal
from utils.pruning.shares import keep_shares
from utils.pruning.surgery import compact_network
from utils.pruning.target import Target
from utils.report.cost import network_cost
from utils.report.tables import csv_table

LARGEST_SHARE = 0.9
"""Of a family's channels that may go."""
TOLERANCE = 0.02
"""By how much of the budget a network may be below it; above it is none."""
MOST_DRAWS = 100
"""Vectors that are drawn for one candidate."""
HALVINGS = 20
"""Of the interval 0..900 in which the stretch of a vector lies: to a thousandth."""


class Candidate(NamedTuple):
    """A network that might be the one."""

    shares: dict[Family, float]
    keep: Keep
    macs: float
    """Share of the multiply-adds that is left."""
    parameters: float
    draws: int
    """Vectors that were drawn for it."""


@dataclass(frozen=True, eq=False)
class Drawer:
    """Draws candidates of one network."""

    graph: ChannelGraph
    importance: Importance
    policy: ChannelPolicy
    """Whose candidates, floors and widths hold."""
    size: Size

    def draw(self, count: int, target: Target, seed: int) -> Iterator[Candidate]:
        """Different candidates whose multiply-adds are at most the target, and at least 98 % of it.

        Every share is min(0.9, t · u) with u uniform in 0..1 and one t, found by bisection, that meets the budget.

        Args:
            count: how many; fewer come if a network has not so many.
            target: of multiply-adds.
            seed: of the draws.

        Raises:
            InfeasibleError: the largest share of all families does not reach the target, or no vector comes so near.
        """
        layers = candidates(self.graph, self.policy.prune, self.policy.all_convs)
        if not layers:
            raise InfeasibleError(f"{self.graph.network.path or 'network'}: no convolution can be pruned this way")
        scores, families = channel_scores(self.graph, self.importance, layers), families_of(self.graph, layers)
        before, random = network_cost(self.graph.network, *self.size), np.random.default_rng(seed)

        def network(shares: NDArray) -> Candidate:
            named = dict(zip(families, shares.tolist(), strict=True))
            keep = keep_shares(self.graph, scores, named, self.policy)
            cost = network_cost(compact_network(self.graph, Removal(keep)), *self.size)
            return Candidate(named, keep, cost.macs / before.macs, cost.parameters / before.parameters, 0)

        least = network(np.full(len(families), LARGEST_SHARE)).macs
        if least > target.bound:
            raise target.missed(least)
        seen: set[bytes] = set()
        for _ in range(count):
            for draws in range(1, MOST_DRAWS + 1):
                found = _stretched(network, random.uniform(size=len(families)), target.bound)
                if found.macs >= (1 - TOLERANCE) * target.bound and found.keep.tobytes() not in seen:
                    seen.add(found.keep.tobytes())
                    yield found._replace(draws=draws)
                    break
            else:
                break
        if not seen:
            raise InfeasibleError(f"{target.flag} {target.bound:g}: {MOST_DRAWS} draws came no nearer than "
                                  f"{100 * TOLERANCE:g} %; the channels are too few")  # fmt: skip


def _stretched(network: Callable[[NDArray], Candidate], vector: NDArray, bound: float) -> Candidate:
    """The candidate along a vector that removes least and keeps the bound; all families lose most if need be."""
    low, high = 0.0, LARGEST_SHARE / max(float(vector.min()), 1e-3)
    best = network(np.minimum(LARGEST_SHARE, high * vector))
    if best.macs > bound:
        return network(np.full(len(vector), LARGEST_SHARE))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = network(np.minimum(LARGEST_SHARE, middle * vector))
        if tried.macs <= bound:
            high, best = middle, tried
        else:
            low = middle
    return best


def candidate_table(found: Sequence[Candidate], accuracies: Sequence[float]) -> str:
    """CSV, a row for each candidate in the order of the draws: AP50, costs, and each family's share by its blocks."""
    names = [" ".join(map(str, family)) for family in found[0].shares]
    rows = [
        (number, f"{map50:.6g}", f"{one.macs:.6g}", f"{one.parameters:.6g}", one.draws,
         *(f"{share:.4f}" for share in one.shares.values()))
        for number, (one, map50) in enumerate(zip(found, accuracies, strict=True), 1)
    ]  # fmt: skip
    return csv_table(["candidate", "map50", "macs", "parameters", "draws", *names], rows)
