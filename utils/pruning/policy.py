"""Which channels stay: candidates ranked by importance, residual chains merged, widths rounded; no torch.

Channels are removed by their number under a total order (importance, layer, channel), never by a threshold, so equal
ones and zeros are nothing special; all candidates together, or each group among themselves. Every pruning script is
one `ChannelPolicy` given to `choose`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Convolutional, Dropout, Maxpool, Upsample
from utils.errors import InfeasibleError, NumericsError
from utils.graph import ChannelGraph, Labels
from utils.pruning.candidates import candidates
from utils.pruning.groups import Group, check_percents, pruning_groups
from utils.pruning.ranking import MERGES, Family, Ranking, Scores, largest_removal, merge_masks, merge_means, rank
from utils.pruning.removal import Keep

Importance = Mapping[int, NDArray[np.floating]]
"""Of the channels [C] of each convolution with batch normalisation, by block number: |γ|, or what silencing a channel
does to the loss. A residual unit may have one [1], by the number of its shortcut."""
POWERS = 0
"""`multiple_of` that stands for powers of two."""


@dataclass(frozen=True)
class ChannelPolicy:
    """A strategy of channel pruning."""

    percent: float
    """Share of the candidate channels, all or of every group, that is removed before merging, floor and rounding."""
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
    groups: bool = False
    """Rank the channels of each of `pruning_groups` among themselves."""
    group_percents: tuple[float, ...] | None = None
    """Of each group; None: `percent` of all."""
    wider: Mapping[int, float] = field(default_factory=dict)
    """How many times as wide a layer was before the first of several cuts, by block number; 1 where it is not named."""

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise ValueError(f"merge {self.merge!r}: there are {', '.join(MERGES)}")
        if self.group_percents is not None and not self.groups:
            raise ValueError("group_percents: without groups there is one percent")

    @property
    def has_floor(self) -> bool:
        """Whether every layer keeps channels, however many go."""
        return self.layer_keep is not None or self.multiple_of != 1

    def least(self, layer: int, width: int) -> int:
        """Channels that stay of the `width` that a layer has, however unimportant."""
        return max(1, int(width * self.wider.get(layer, 1.0) * (self.layer_keep or 0) + 1e-9))

    def round_up(self, width: int) -> int:
        """The next allowed width, from 1 channel up."""
        if self.multiple_of == POWERS:
            return 1 << max(0, width - 1).bit_length()
        return max(1, math.ceil(width / self.multiple_of)) * self.multiple_of


@dataclass(frozen=True, eq=False)
class Part:
    """Candidates that are ranked among themselves: all of a network, or those in one of its groups."""

    group: Group | None
    """None: all of a network."""
    ranking: Ranking
    percent: float

    @property
    def ranked(self) -> int:
        """Number of candidate channels, N; may be 0 in a group."""
        return len(self.ranking.ordered)

    @property
    def removed(self) -> int:
        """How many of them the percentage says."""
        return math.floor(self.percent * self.ranked + 1e-9)

    @property
    def threshold(self) -> float:
        """Score of the weakest channel that the ranking keeps; 0 if it keeps none."""
        return float(self.ranking.ordered[self.removed]) if self.removed < self.ranked else 0.0


@dataclass(frozen=True, eq=False)
class ChannelChoice:
    """What a policy keeps of a network."""

    keep: Keep
    layers: tuple[int, ...]
    """The candidate convolutions."""
    scores: Scores
    """Of each candidate's channels: its importance, or the mean with that of the depthwise convolution behind it."""
    parts: tuple[Part, ...]
    """One, or as many as there are groups."""
    max_percent: float
    """The largest percentage that works, in all parts, cut to four decimals."""
    limiting: int | None
    """The convolution that would lose all its channels beyond that; None if nothing limits."""

    @property
    def ranked(self) -> int:
        """Number of candidate channels, N."""
        return sum(part.ranked for part in self.parts)

    @property
    def removed(self) -> int:
        """How many of them the percentages say."""
        return sum(part.removed for part in self.parts)

    @property
    def threshold(self) -> float:
        """Score of the weakest channel that the ranking keeps."""
        return min(part.threshold for part in self.parts if part.ranked)


def choose(graph: ChannelGraph, importance: Importance, policy: ChannelPolicy) -> ChannelChoice:
    """The labels that stay under a policy.

    Args:
        graph: of the network.
        importance: of every convolution with batch normalisation.
        policy: the strategy.

    Raises:
        NumericsError: an importance is NaN or infinite.
        InputError: the policy has percentages for another number of groups than there are.
        InfeasibleError: a convolution would lose all its channels, or there is no candidate.
    """
    layers = candidates(graph, policy.prune, policy.all_convs)
    if not layers:
        raise InfeasibleError(f"{graph.network.path or 'network'}: no convolution can be pruned this way")
    scores = channel_scores(graph, importance, layers)
    parts = tuple(_parts(graph, scores, layers, policy))
    families = families_of(graph, layers)
    keep = np.ones(graph.count, np.bool_)
    limits = []
    for part in parts:
        own = [family for family in families if family[0] in part.ranking.ranks]
        if own:
            limits.append(_limit(graph, own, part, policy))
            _prune(graph, own, part, policy, keep)
    max_percent, limiting = min(limits, key=itemgetter(0))
    return ChannelChoice(keep, layers, scores, parts, max_percent, limiting)


def _parts(graph: ChannelGraph, scores: Scores, layers: Sequence[int], policy: ChannelPolicy) -> Iterator[Part]:
    """The candidates as they are ranked, each part with its percentage."""
    if not policy.groups:
        yield Part(None, rank(scores, layers), policy.percent)
        return
    groups = pruning_groups(graph)
    percents = (policy.percent,) * len(groups) if policy.group_percents is None else policy.group_percents
    check_percents(groups, percents, graph.network.path or "the network")
    for group, percent in zip(groups, percents, strict=True):
        members = [layer for layer in layers if layer in group.layers]
        yield Part(group, rank(scores, members), percent)


def _limit(
    graph: ChannelGraph, families: Sequence[Family], part: Part, policy: ChannelPolicy
) -> tuple[float, int | None]:
    """The largest percentage that works in a part, cut to four decimals, and the convolution that limits it.

    Raises:
        InfeasibleError: the part's percentage is larger.
    """
    limit, limiting = part.ranked, None
    if not policy.has_floor:
        limit, limiting = largest_removal(graph, families, part.ranking, policy.merge)
    max_percent = min(9999, 10000 * limit // part.ranked) / 1e4
    if part.removed > limit:
        flag = "--percent" if policy.group_percents is None else "--group-percent"
        raise InfeasibleError(
            f"{flag} {part.percent:g}: {graph.network.where(limiting)} would lose all its "
            f"{len(part.ranking.ranks[limiting])} channels; the largest percent that works is {max_percent:.4f}"
        )
    return max_percent, limiting


def _prune(graph: ChannelGraph, families: Sequence[Family], part: Part, policy: ChannelPolicy, keep: Keep) -> None:
    """Write the labels of a part into `keep`."""
    ranking, removed = part.ranking, part.removed
    for family in families:
        if policy.merge == "mean":
            merge_means(graph, family, ranking, removed, keep)
        else:
            masks = {layer: _floored(layer, ranking.ranks[layer], removed, policy) for layer in family}
            merge_masks(graph, family, masks, policy.merge, keep)
        round_widths(graph, family, ranking.scores, policy, keep)


def channel_scores(
    graph: ChannelGraph, importance: Importance, layers: Sequence[int]
) -> dict[int, NDArray[np.float64]]:
    """Importance of each layer's channels; with depthwise convolutions behind it, the mean over them and itself.

    Raises:
        NumericsError: an importance is NaN or infinite.
    """
    scores = {}
    for layer, speak in voters(graph, layers).items():
        known = [i for i in speak if i in importance]
        votes = np.abs(np.stack([np.asarray(importance[i], np.float64) for i in known]))
        if not np.isfinite(votes).all():
            bad = next(i for i, row in zip(known, votes, strict=True) if not np.isfinite(row).all())
            raise NumericsError(f"{graph.network.where(bad)}: an importance is not finite; take an earlier checkpoint")
        scores[layer] = votes.mean(0)
    return scores


def voters(graph: ChannelGraph, layers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each candidate, the blocks that speak for its channels: its own and depthwise convolutions behind it."""
    followers = _depthwise_followers(graph)
    return {layer: (layer, *followers.get(layer, ())) for layer in layers}


def _depthwise_followers(graph: ChannelGraph) -> dict[int, list[int]]:
    """For each convolution, the normalised depthwise ones that read its channels and no one else's."""
    followers: dict[int, list[int]] = {}
    blocks = graph.network.blocks
    for i, block in enumerate(blocks):
        if not (isinstance(block, Convolutional) and block.batch_normalize):
            continue
        if not block.depthwise(len(graph.output(i - 1))):
            continue
        source = i - 1
        while source >= 0 and (isinstance(blocks[source], Dropout | Maxpool | Upsample)
                               or blocks[source].depthwise(len(graph.labels[source]))):  # fmt: skip
            source -= 1
        if source >= 0 and graph.makes(source, blocks[source]):
            followers.setdefault(source, []).append(i)
    return followers


def families_of(graph: ChannelGraph, layers: Sequence[int]) -> list[Family]:
    """The candidates, those together that have channels in common."""
    families = (tuple(layer for layer in family if layer in layers) for family in graph.families())
    return [family for family in families if family]


def _floored(layer: int, ranks: NDArray[np.int64], removed: int, policy: ChannelPolicy) -> Keep:
    """Mask [C] of one convolution: what the ranking keeps, and at least the floor of its strongest channels."""
    mask = ranks >= removed
    if policy.has_floor:
        mask[np.argsort(-ranks)[: policy.least(layer, len(ranks))]] = True
    return mask


def round_widths(graph: ChannelGraph, family: Family, scores: Scores, policy: ChannelPolicy, keep: Keep) -> None:
    """Give every convolution of a family an allowed width, and its floor, by putting back its strongest channels.

    From the narrowest on; a channel that others share with one that has its width only comes back for their floor.
    """
    total, voters = np.zeros((2, graph.count))
    for layer in family:
        np.add.at(total, graph.labels[layer], scores[layer])
        np.add.at(voters, graph.labels[layer], 1)
    settled: set[int] = set()
    for layer in sorted(family, key=lambda layer: len(graph.labels[layer])):
        labels = np.unique(graph.labels[layer])
        kept = int(keep[labels].sum())
        floor = max(kept, policy.least(layer, len(labels)))
        gone = labels[~keep[labels]].tolist()
        gone.sort(key=lambda label: (label in settled, -total[label] / voters[label], label))
        free = sum(label not in settled for label in gone)
        back = max(floor - kept, min(policy.round_up(floor) - kept, free))
        keep[gone[:back]] = True
        settled |= set(labels.tolist())


def kept_channels(graph: ChannelGraph, keep: Keep, block: int) -> Labels:
    """Numbers of the channels of a block's output that stay."""
    return np.flatnonzero(keep[graph.output(block)])
