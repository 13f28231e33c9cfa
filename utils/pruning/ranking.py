"""Candidate channels from the weakest to the strongest, and how convolutions that share channels agree; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.graph import ChannelGraph, Labels
from utils.pruning.removal import Keep

Scores = Mapping[int, NDArray[np.float64]]
"""Of each convolution's channels [C], by block number."""
Family = tuple[int, ...]
"""Candidate convolutions whose channels are chosen together: one alone, or those of e.g. a residual chain."""
MERGES = {
    "first": "as the first convolution of the chain says",
    "union": "what any convolution of the chain keeps",
    "majority": "what at least half of the chain's convolutions keep",
    "intersection": "what all convolutions of the chain keep",
    "minimum": "as that convolution of the chain says which keeps the fewest",
    "mean": "what has a mean importance over the chain as high as the weakest channel that the ranking keeps",
}
"""How the masks of the convolutions that a shortcut ties become one."""
LED = ("first", "minimum")
"""Merges in which one convolution speaks for the channels it has; the others do, as in a union, for the rest."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Channels under the total order (score, layer, channel)."""

    scores: Scores
    ranks: Mapping[int, NDArray[np.int64]]
    """Of each convolution's channels [C], the weakest 0."""
    ordered: NDArray[np.float64]
    """[N], all scores, the weakest first."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The convolutions, by block number."""
        return tuple(self.ranks)


def rank(scores: Scores, layers: Sequence[int]) -> Ranking:
    """The channels of some convolutions, ranked among themselves.

    Args:
        scores: of these convolutions, and perhaps of others.
        layers: block numbers, ascending; may be none.
    """
    every = np.concatenate([scores[layer] for layer in layers]) if layers else np.zeros(0)
    order = np.argsort(every, kind="stable")
    ranks = np.empty(len(every), np.int64)
    ranks[order] = np.arange(len(every))
    cuts = np.cumsum([len(scores[layer]) for layer in layers], dtype=np.int64)
    parts = {layer: ranks[end - len(scores[layer]) : end] for layer, end in zip(layers, cuts, strict=True)}
    return Ranking({layer: scores[layer] for layer in layers}, parts, every[order])


def largest_removal(graph: ChannelGraph, families: Sequence[Family], ranking: Ranking, merge: str) -> tuple[int, int]:
    """The most channels that can be removed without emptying a convolution, and the one that limits.

    With the merge `minimum` whatever convolution speaks for a family.
    """
    last = np.zeros(graph.count, np.int64)
    limits = []
    for family in families:
        for leader in family if merge == "minimum" else family[:1]:
            for members in (family, (leader,)) if merge in LED else (family,):
                own, stays = _last(graph, members, ranking, merge)
                last[own] = stays
            limits += [(int(last[graph.labels[layer]].max()), layer) for layer in family]
    return min(limits)


def _last(graph: ChannelGraph, members: Family, ranking: Ranking, merge: str) -> tuple[Labels, NDArray[np.int64]]:
    """Labels of some convolutions, and for each the largest number of removed channels with which it stays."""
    labels = np.concatenate([graph.labels[layer] for layer in members])
    votes = np.concatenate([ranking.ranks[layer] for layer in members])
    order = np.lexsort((votes, labels))
    own, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    votes, strongest = votes[order], start + count - 1
    if merge != "mean":
        place = {"intersection": 0, "majority": count // 2}.get(merge, count - 1)
        return own, votes[start + place]
    values = ranking.ordered[votes]
    means = np.clip(np.add.reduceat(values, start) / count, values[start], values[strongest])
    below, up_to = (np.searchsorted(ranking.ordered, means, side) for side in ("left", "right"))
    return own, np.maximum(below - 1, np.minimum(up_to - 1, votes[strongest]))


def merge_masks(graph: ChannelGraph, family: Family, masks: Mapping[int, Keep], merge: str, keep: Keep) -> None:
    """Write the labels of a family into `keep` [L]: what the masks [C] of its convolutions say, by a merge of masks."""
    votes, voters = np.zeros((2, graph.count), np.int64)
    for layer in family:
        labels = graph.labels[layer]
        np.add.at(votes, labels, masks[layer])
        np.add.at(voters, labels, 1)
    own = voters > 0
    merged = {"majority": 2 * votes >= voters, "intersection": votes == voters}.get(merge, votes > 0)
    keep[own] = merged[own]
    if merge in LED:
        leader = family[0] if merge == "first" else min(family, key=lambda layer: int(masks[layer].sum()))
        keep[graph.labels[leader]] = False
        keep[graph.labels[leader][masks[leader]]] = True


def merge_means(graph: ChannelGraph, family: Family, ranking: Ranking, removed: int, keep: Keep) -> None:
    """Write the labels of a family into `keep` [L]: what the mean scores over its convolutions say.

    A label stays if its mean is above the score of the weakest channel that stays when `removed` go, or as high and one
    of its own channels stays by its rank.
    """
    own, last = _last(graph, family, ranking, "mean")
    keep[own] = last >= removed
