"""Channels by a share of every family of layers, instead of by one ranking of all; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from utils.graph import ChannelGraph
from utils.pruning.policy import ChannelPolicy, round_widths
from utils.pruning.ranking import Family, Scores
from utils.pruning.removal import Keep


def keep_shares(graph: ChannelGraph, scores: Scores, shares: Mapping[Family, float], policy: ChannelPolicy) -> Keep:
    """[L], the labels that stay when every family loses a share of its own; families that are not named stay whole.

    The weakest go: those with the smallest mean importance over the convolutions that have them. Widths are rounded and
    floors kept as the policy says; one channel of every convolution stays.

    Args:
        graph: of the network.
        scores: of each convolution's channels.
        shares: 0 <= share < 1.
        policy: whose `layer_keep` and `multiple_of` hold.
    """
    keep = np.ones(graph.count, np.bool_)
    for family, share in shares.items():
        ranked = weakest(graph, scores, family)
        keep[ranked[: math.floor(share * len(ranked) + 1e-9)]] = False
        round_widths(graph, family, scores, policy, keep)
    return keep


def weakest(graph: ChannelGraph, scores: Scores, family: Sequence[int]) -> np.ndarray:
    """The labels of a family from the smallest mean importance to the largest; equal ones by number."""
    total, voters = np.zeros((2, graph.count))
    for layer in family:
        np.add.at(total, graph.labels[layer], scores[layer])
        np.add.at(voters, graph.labels[layer], 1)
    own = np.flatnonzero(voters)
    return own[np.argsort(total[own] / voters[own], kind="stable")]
