"""Which channels stay: candidates ranked by |γ|, residual chains merged, widths rounded; no torch.

Channels are removed by their number under a total order (|γ|, layer, channel), never by a threshold, so equal γ and
zeros are nothing special. Every pruning script is one `ChannelPolicy` given to `choose`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Convolutional, Depthwise, Dropout, Maxpool, Upsample
from utils.errors import InfeasibleError, NumericsError
from utils.graph import ChannelGraph, Labels, is_depthwise
from utils.pruning.candidates import candidates
from utils.pruning.removal import Keep

Gammas = Mapping[int, NDArray[np.floating]]
"""γ of batch normalisation [C], by block number."""
Group = tuple[int, ...]
"""Candidate convolutions whose channels are chosen together: one alone, or those of e.g. a residual chain."""
MERGES = {
    "first": "as the first convolution of the chain says",
    "union": "what any convolution of the chain keeps",
    "majority": "what at least half of the chain's convolutions keep",
    "intersection": "what all convolutions of the chain keep",
}
"""How the masks of the convolutions that a shortcut ties become one."""
POWERS = 0
"""`multiple_of` that stands for powers of two."""


@dataclass(frozen=True)
class ChannelPolicy:
    """A strategy of channel pruning."""

    percent: float
    """Share of the candidate channels that is removed, before merging, floor and rounding."""
    prune: Literal[0, 1] = 1
    """Which candidates; a key of `candidates.SETS`."""
    merge: str = "union"
    """A key of `MERGES`."""
    layer_keep: float | None = None
    """Least share of a layer that stays, at least one channel; None: a layer that would lose all is refused."""
    multiple_of: int = 1
    """Widths are rounded up to multiples of this number, or to powers of two (`POWERS`)."""
    all_convs: bool = False
    """Candidates beyond the classic ones."""

    def least(self, width: int) -> int:
        """Channels that stay of so many, whatever their γ."""
        return max(1, int(width * (self.layer_keep or 0)))

    def round_up(self, width: int) -> int:
        """The next allowed width, from 1 channel up."""
        if self.multiple_of == POWERS:
            return 1 << max(0, width - 1).bit_length()
        return max(1, math.ceil(width / self.multiple_of)) * self.multiple_of


@dataclass(frozen=True, eq=False)
class ChannelChoice:
    """What a policy keeps of a network."""

    keep: Keep
    layers: tuple[int, ...]
    """The candidate convolutions."""
    scores: Mapping[int, NDArray[np.float64]]
    """Of each candidate's channels: |γ|, or its mean with that of the depthwise convolution behind it."""
    ranked: int
    """Number of candidate channels, N."""
    removed: int
    """How many of them the percentage says."""
    threshold: float
    """Score of the weakest channel that the ranking keeps."""
    max_percent: float
    """The largest percentage that works, cut to four decimals."""
    limiting: int | None
    """The convolution that would lose all its channels beyond that; None if nothing limits."""


def choose(graph: ChannelGraph, gammas: Gammas, policy: ChannelPolicy) -> ChannelChoice:
    """The labels that stay under a policy.

    Args:
        graph: of the network.
        gammas: γ of every convolution with batch normalisation.
        policy: the strategy.

    Raises:
        NumericsError: a γ is NaN or infinite.
        InfeasibleError: a convolution would lose all its channels, or there is no candidate.
    """
    layers = candidates(graph, policy.prune, policy.all_convs)
    if not layers:
        raise InfeasibleError(f"{graph.network.path or 'network'}: no convolution can be pruned this way")
    scores = channel_scores(graph, gammas, layers)
    ranks = _ranks(scores, layers)
    total = sum(len(rank) for rank in ranks.values())
    removed = math.floor(policy.percent * total + 1e-9)
    groups = _groups(graph, layers)
    limit, limiting = total, None
    if policy.layer_keep is None and policy.multiple_of == 1:
        limit, limiting = _limit(graph, groups, ranks, policy.merge)
    max_percent = min(9999, 10000 * limit // total) / 1e4
    if removed > limit:
        raise InfeasibleError(
            f"--percent {policy.percent:g}: {graph.network.where(limiting)} would lose all its "
            f"{len(ranks[limiting])} channels; the largest percent that works is {max_percent:.4f}"
        )
    keep = np.ones(graph.count, np.bool_)
    for group in groups:
        masks = {layer: _floored(ranks[layer], removed, policy) for layer in group}
        _merge(graph, group, masks, policy.merge, keep)
        _round(graph, group, scores, policy, keep)
    weakest = [scores[layer][rank >= removed] for layer, rank in ranks.items()]
    threshold = float(min((part.min() for part in weakest if part.size), default=0.0))
    return ChannelChoice(keep, layers, scores, total, removed, threshold, max_percent, limiting)


def channel_scores(graph: ChannelGraph, gammas: Gammas, layers: Sequence[int]) -> dict[int, NDArray[np.float64]]:
    """|γ| of each layer's channels; with depthwise convolutions behind it, the mean over them and itself.

    Raises:
        NumericsError: a γ is NaN or infinite.
    """
    scores = {}
    for layer, speak in voters(graph, layers).items():
        known = [i for i in speak if i in gammas]
        votes = np.abs(np.stack([np.asarray(gammas[i], np.float64) for i in known]))
        if not np.isfinite(votes).all():
            bad = next(i for i, row in zip(known, votes, strict=True) if not np.isfinite(row).all())
            raise NumericsError(f"{graph.network.where(bad)}: a γ is not finite; take an earlier checkpoint")
        scores[layer] = votes.mean(0)
    return scores


def voters(graph: ChannelGraph, layers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each candidate, the blocks whose γ speak for its channels: its own and depthwise convolutions behind it."""
    followers = _depthwise_followers(graph)
    return {layer: (layer, *followers.get(layer, ())) for layer in layers}


def _depthwise_followers(graph: ChannelGraph) -> dict[int, list[int]]:
    """For each convolution, the normalised depthwise ones that read its channels and no one else's."""
    followers: dict[int, list[int]] = {}
    blocks = graph.network.blocks
    for i, block in enumerate(blocks):
        if not (isinstance(block, Convolutional | Depthwise) and block.batch_normalize):
            continue
        if not is_depthwise(block, len(graph.output(i - 1))):
            continue
        source = i - 1
        while source >= 0 and (isinstance(blocks[source], Dropout | Maxpool | Upsample)
                               or is_depthwise(blocks[source], len(graph.labels[source]))):  # fmt: skip
            source -= 1
        if source >= 0 and graph.makes(source, blocks[source]):
            followers.setdefault(source, []).append(i)
    return followers


def _ranks(scores: Mapping[int, NDArray[np.float64]], layers: Sequence[int]) -> dict[int, NDArray[np.int64]]:
    """Rank of every candidate channel under (score, layer, channel), the weakest 0."""
    every = np.concatenate([scores[layer] for layer in layers])
    ranks = np.empty(len(every), np.int64)
    ranks[np.argsort(every, kind="stable")] = np.arange(len(every))
    cuts = np.cumsum([len(scores[layer]) for layer in layers])[:-1]
    return dict(zip(layers, np.split(ranks, cuts), strict=True))


def _groups(graph: ChannelGraph, layers: Sequence[int]) -> list[Group]:
    """The candidates, those together that have channels in common."""
    groups = (tuple(layer for layer in family if layer in layers) for family in graph.families())
    return [group for group in groups if group]


def _limit(
    graph: ChannelGraph, groups: Sequence[Group], ranks: Mapping[int, NDArray[np.int64]], merge: str
) -> tuple[int, int]:
    """The most channels that can be removed without emptying a convolution, and the one that limits."""
    last = np.zeros(graph.count, np.int64)
    for group in groups:
        voters = group[:1] if merge == "first" else group
        for members in (group, voters):  # where the first has no say, all have
            labels = np.concatenate([graph.labels[layer] for layer in members])
            votes = np.concatenate([ranks[layer] for layer in members])
            order = np.lexsort((votes, labels))
            own, start, count = np.unique(labels[order], return_index=True, return_counts=True)
            place = {"intersection": 0, "majority": count // 2}.get(merge, count - 1)
            last[own] = votes[order][start + place]
    return min((int(last[graph.labels[layer]].max()), layer) for layer in ranks)


def _floored(ranks: NDArray[np.int64], removed: int, policy: ChannelPolicy) -> Keep:
    """Mask [C] of one convolution: what the ranking keeps, and at least the floor of its strongest channels."""
    mask = ranks >= removed
    if policy.layer_keep is not None or policy.multiple_of != 1:
        mask[np.argsort(-ranks)[: policy.least(len(ranks))]] = True
    return mask


def _merge(graph: ChannelGraph, group: Group, masks: Mapping[int, Keep], merge: str, keep: Keep) -> None:
    """Write the group's labels into `keep`."""
    votes, voters = np.zeros((2, graph.count), np.int64)
    for layer in group:
        labels = graph.labels[layer]
        np.add.at(votes, labels, masks[layer])
        np.add.at(voters, labels, 1)
    own = voters > 0
    merged = {
        "union": votes > 0,
        "first": votes > 0,
        "majority": 2 * votes >= voters,
        "intersection": votes == voters,
    }[merge]
    keep[own] = merged[own]
    if merge == "first":
        first = group[0]
        keep[graph.labels[first]] = False
        keep[graph.labels[first][masks[first]]] = True


def _round(
    graph: ChannelGraph, group: Group, scores: Mapping[int, NDArray[np.float64]], policy: ChannelPolicy, keep: Keep
) -> None:
    """Give every convolution of the group an allowed width, and its floor, by putting back its strongest channels.

    From the narrowest on; a channel that others share with one that has its width only comes back for their floor.
    """
    total, voters = np.zeros((2, graph.count))
    for layer in group:
        np.add.at(total, graph.labels[layer], scores[layer])
        np.add.at(voters, graph.labels[layer], 1)
    settled: set[int] = set()
    for layer in sorted(group, key=lambda layer: len(graph.labels[layer])):
        labels = np.unique(graph.labels[layer])
        kept = int(keep[labels].sum())
        floor = max(kept, policy.least(len(labels)))
        gone = labels[~keep[labels]].tolist()
        gone.sort(key=lambda label: (label in settled, -total[label] / voters[label], label))
        free = sum(label not in settled for label in gone)
        back = max(floor - kept, min(policy.round_up(floor) - kept, free))
        keep[gone[:back]] = True
        settled |= set(labels.tolist())


def kept_channels(graph: ChannelGraph, keep: Keep, block: int) -> Labels:
    """Numbers of the channels of a block's output that stay."""
    return np.flatnonzero(keep[graph.output(block)])
