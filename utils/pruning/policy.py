"""Which channels stay: candidates ranked by importance, shortcut chains merged, widths rounded; no torch.

Channels are removed by their number under a total order (importance, layer, channel), never by a threshold. So equal
values and zeros need no rule of their own. All candidates are ranked together, or each group among themselves. Every
script that prunes channels gives `choose` one `ChannelPolicy`.

The three sets of `--prune` are those of the suites this one follows (their `parse_module_defs`, 2 and 4), told from the
channel graph. They differ in two places. A depthwise convolution passes its channels through, so the convolution before
it is a candidate like any other. And of convolutions that share channels, as in a residual chain, either all are
candidates or none is; convolutions that compute a gate are not counted there.
"""

from __future__ import annotations

import argparse
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from utils.cli import flag, fraction, integer
from utils.darknet.blocks import Block, Convolutional, Dropout, Maxpool, Route, Sam, ScaleChannels, Upsample
from utils.darknet.blocks.block import steps
from utils.errors import InfeasibleError, InputError
from utils.pruning.channel_graph import ChannelGraph, Importance, Keep, computed_before, magnitudes, residual_units

Scores = Mapping[int, NDArray[np.float64]]
"""Of each candidate's channels [C], by block number."""
Family = tuple[int, ...]
"""Candidates whose channels are chosen together: one convolution alone, or those of e.g. a residual chain."""
SETS = {
    0: "convolutions that no shortcut ties",
    1: "all convolutions with batch normalisation",
    2: "the last convolution of every residual unit",
}
"""What `--prune` means; 0 for normal and regular pruning, 2 for layer pruning, 1 for the others."""
POWERS = 0
"""`multiple_of` that stands for powers of two."""
LARGEST_MULTIPLE = 1024
MERGES = {
    "first": "as the first convolution of the chain says",
    "union": "what any convolution of the chain keeps",
    "majority": "what at least half of the chain's convolutions keep",
    "intersection": "what all convolutions of the chain keep",
    "minimum": "as that convolution of the chain says which keeps the fewest",
    "mean": "what has a mean importance over the chain as high as the weakest channel that the ranking keeps",
}
"""How the masks of the convolutions that a shortcut ties become one."""
FREE_SHARE = 0.05
"""What any layer can lose of its Σ |γ|. Measured on roadsigns (yolov3-tiny, sparse-trained, not fine-tuned): a loss of
0.05 in the worst layer costs 1.3 points of AP50, of 0.5 it costs 38."""
MOST_ADVISED = 0.99
GROUPS = (
    "backbone to stride 8",
    "backbone at stride 16",
    "from stride 32 to the first upsampling",
    "top-down, to the first upsampled head",
    "the other heads",
)
"""Names of the groups of `pruning_groups`."""


def multiple(text: str) -> int:
    """A number that widths are rounded up to a multiple of, or `powers`; argparse type."""
    if text == "powers":
        return POWERS
    if text == "auto":
        raise argparse.ArgumentTypeError("auto is gone; give 8, which its timings always answered")
    if not 1 <= (value := integer(text)) <= LARGEST_MULTIPLE:
        raise argparse.ArgumentTypeError(f"{text}: allowed are 1 to {LARGEST_MULTIPLE}, and powers (of two)")
    return value


@dataclass(frozen=True)
class ChannelPolicy:
    """A strategy of channel pruning; its flags have a default in every script."""

    percent: float
    """Share of the candidate channels, all or of every group, that is removed before merging, floor and rounding."""
    prune: Literal[0, 1] = 1
    """Which candidates; a key of `SETS`."""
    merge: str = flag(
        "union",
        "which channels of convolutions that a shortcut ties stay; "
        + "; ".join(f"{name}: {text}" for name, text in MERGES.items()),
        choices=tuple(MERGES),
    )
    layer_keep: float | None = flag(
        None,
        "least share of a layer's channels that stays; one channel always does (default: %(default)s)",
        "--layer_keep",
        type=fraction,
    )
    """None: a layer that would lose all its channels is refused."""
    multiple_of: int = flag(
        1,
        "round widths up to multiples of N, e.g. 8, or to powers of two with `powers`; units that go whole have none",
        type=multiple,
        metavar="N",
    )
    all_convs: bool = flag(
        False,
        "also convolutions before an upsampling, a spatial pyramid or a split route, which train.py -sr leaves out",
    )
    groups: bool = False
    """Rank the channels of each of `pruning_groups` among themselves."""
    group_percents: tuple[float, ...] | None = None
    """Of each group; None: `percent` of all."""

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise ValueError(f"merge {self.merge!r}: there are {', '.join(MERGES)}")
        if self.group_percents is not None and not self.groups:
            raise ValueError("group_percents: without groups there is one percent")

    @property
    def has_floor(self) -> bool:
        """Whether every layer keeps channels, however many go."""
        return self.layer_keep is not None or self.multiple_of != 1

    def least(self, width: int) -> int:
        """Channels that stay of a layer of this width, however unimportant."""
        return max(1, int(width * (self.layer_keep or 0) + 1e-9))

    def round_up(self, width: int) -> int:
        """The next allowed width, from 1 channel up."""
        if self.multiple_of == POWERS:
            return 1 << max(0, width - 1).bit_length()
        return max(1, math.ceil(width / self.multiple_of)) * self.multiple_of


@dataclass(frozen=True)
class Group:
    """Convolutions that are ranked among themselves."""

    name: str
    layers: tuple[int, ...]
    """The convolutions that make channels, by block number."""


@dataclass(frozen=True, eq=False)
class Part:
    """Candidates that are ranked among themselves: all of a network, or those in one of its groups."""

    graph: ChannelGraph
    policy: ChannelPolicy
    group: Group | None
    """None: all of a network."""
    percent: float
    scores: Scores
    """Of each candidate's channels: its importance, or the mean with that of the depthwise convolution behind it."""

    @cached_property
    def ordered(self) -> NDArray[np.float64]:
        """[N], all scores, the weakest first."""
        return np.sort(np.concatenate([np.zeros(0), *self.scores.values()]))

    @cached_property
    def ranks(self) -> dict[int, NDArray[np.int64]]:
        """Of each candidate's channels [C] under the order (score, layer, channel), the weakest 0."""
        order = np.argsort(np.concatenate([np.zeros(0), *self.scores.values()]), kind="stable")
        ends = np.cumsum([len(values) for values in self.scores.values()], dtype=np.int64)
        return dict(zip(self.scores, np.split(np.argsort(order), ends), strict=False))  # behind the last end is nothing

    @cached_property
    def families(self) -> list[Family]:
        """The candidates, those together that have channels in common."""
        families = (tuple(layer for layer in family if layer in self.scores) for family in self.graph.families())
        return [family for family in families if family]

    @property
    def ranked(self) -> int:
        """Number of candidate channels, N; may be 0 in a group."""
        return len(self.ordered)

    @property
    def removed(self) -> int:
        """Number of them that the percentage removes."""
        return math.floor(self.percent * self.ranked + 1e-9)

    @property
    def threshold(self) -> float:
        """Score of the weakest channel that the ranking keeps; 0 if it keeps none."""
        return float(self.ordered[self.removed]) if self.removed < self.ranked else 0.0

    def limit(self) -> tuple[float, int | None]:
        """The largest percentage that works, cut to four decimals, and the convolution that limits it.

        Raises:
            InfeasibleError: the part's percentage is larger.
        """
        if self.policy.has_floor:
            return 0.9999, None
        most = bisect_left(range(1, self.ranked), True, key=lambda removed: self.emptied(removed) is not None)
        limiting = self.emptied(most + 1)
        max_percent = min(9999, 10000 * most // self.ranked) / 1e4
        if self.removed > most:
            assert limiting is not None  # `most` is the largest number that empties nothing
            name = "--percent" if self.policy.group_percents is None else "--group-percent"
            raise InfeasibleError(
                f"{name} {self.percent:g}: {self.graph.network.where(limiting)} would lose all its "
                f"{len(self.scores[limiting])} channels; the largest percent that works is {max_percent:.4f}"
            )
        return max_percent, limiting

    def emptied(self, removed: int) -> int | None:
        """The first convolution that loses all its channels; with the merge `minimum` whichever of a family leads."""
        turns = max(map(len, self.families)) if self.policy.merge == "minimum" else 1
        keeps = [self.merged(removed, turn) for turn in range(turns)]
        for layer in self.scores:
            if not all(keep[self.graph.labels[layer]].any() for keep in keeps):
                return layer
        return None

    def kept(self) -> Keep:
        """[L], labels that stay after merging, floors and rounding."""
        keep = self.merged(self.removed)
        for family in self.families:
            _round_widths(self.graph, family, self.label_means, self.policy, keep)
        return keep

    def merged(self, removed: int, turn: int | None = None) -> Keep:
        """[L], labels that stay by the masks of all convolutions and a merge of them.

        Args:
            removed: number of the weakest channels that go.
            turn: place in its family of the convolution that leads; None: as the merge says.
        """
        labels, merge = self.graph.labels, self.policy.merge
        masks = {layer: _mask(ranks, removed, self.policy) for layer, ranks in self.ranks.items()}
        votes, voters = np.zeros((2, self.graph.count), np.int64)
        for layer, mask in masks.items():
            np.add.at(votes, labels[layer], mask)
            np.add.at(voters, labels[layer], 1)
        if merge == "majority":
            return 2 * votes >= voters
        if merge == "intersection":
            return votes == voters
        if merge == "mean":
            weakest = self.ordered[removed] if removed < self.ranked else np.inf
            means = self.label_means
            return (voters == 0) | (means > weakest) | ((means == weakest) & (votes > 0))
        keep = (votes > 0) | (voters == 0)
        # the leader decides for the channels it has; the others decide, as in a union, for the rest
        for family in self.families if merge != "union" else ():
            leader = family[(turn or 0) % len(family)]
            if merge == "minimum" and turn is None:
                leader = min(family, key=lambda layer: int(masks[layer].sum()))
            keep[labels[leader]] = False
            keep[labels[leader][masks[leader]]] = True
        return keep

    @cached_property
    def label_means(self) -> NDArray[np.float64]:
        """[L], mean score over the convolutions that have a label; 0 of a label that none has.

        The weakest are added first, so that the mean does not depend on the order of the layers.
        """
        count = self.graph.count
        labels = np.concatenate([self.graph.labels[layer] for layer in self.scores])
        scores, ranks = (np.concatenate(list(values.values())) for values in (self.scores, self.ranks))
        order = np.argsort(ranks)
        totals, voters = np.zeros((2, count))
        np.add.at(totals, labels[order], scores[order])
        np.add.at(voters, labels, 1)
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(low, labels, scores)
        np.maximum.at(high, labels, scores)
        # a mean of equal values is that value, whatever rounding says
        return np.where(voters > 0, np.clip(totals / np.maximum(voters, 1), low, high), 0.0)


@dataclass(frozen=True, eq=False)
class ChannelChoice:
    """Channels that a policy keeps of a network."""

    keep: Keep
    parts: tuple[Part, ...]
    """One, or as many as there are groups."""
    max_percent: float
    """The largest percentage that works, in all parts, cut to four decimals."""
    limiting: int | None
    """The convolution that would lose all its channels beyond that; None if nothing limits."""

    @property
    def scores(self) -> dict[int, NDArray[np.float64]]:
        """Scores of all candidates."""
        return {layer: values for part in self.parts for layer, values in part.scores.items()}

    @property
    def ranked(self) -> int:
        """Number of candidate channels, N."""
        return sum(part.ranked for part in self.parts)

    @property
    def removed(self) -> int:
        """Number of them that the percentages remove."""
        return sum(part.removed for part in self.parts)

    @property
    def threshold(self) -> float:
        """Score of the weakest channel that the ranking keeps."""
        return min(part.threshold for part in self.parts if part.ranked)

    @property
    def advised(self) -> float:
        """The percentage that costs little in every part, as far as trained γ tell."""
        return min(advised_percent(part.scores, self.max_percent) for part in self.parts if part.ranked)


def candidates(graph: ChannelGraph, prune: int, all_convs: bool = False) -> tuple[int, ...]:
    """Block numbers of the candidates, in the order of the network.

    Args:
        graph: of the network.
        prune: a key of `SETS`.
        all_convs: sets 0 and 1 also have the convolutions that the classic rules leave out although the graph allows
            them: directly before an upsampling, a spatial pyramid, or a route that splits its source.
    """
    if prune == 2:
        return tuple(unit.last for unit in residual_units(graph.network))
    blocks = graph.network.blocks
    # a gate scales the channels of another convolution, which decides for both
    gates = {computed_before(blocks, i) for i, block in enumerate(blocks) if isinstance(block, ScaleChannels | Sam)}
    allowed = {
        i
        for i in graph.makers()
        if isinstance(block := blocks[i], Convolutional)
        and block.batch_normalize
        and i not in gates
        and not graph.pinned[graph.labels[i]].any()
        and (prune == 1 or not graph.tied[graph.labels[i]].any())
        and (all_convs or not _left_out(blocks, i))
    }
    stuck = {i for family in graph.families() if not _free(graph, family, allowed, gates) for i in family}
    return tuple(sorted(allowed - stuck))


def _free(graph: ChannelGraph, family: Family, allowed: set[int], gates: set[int]) -> bool:
    """Whether all of a family are allowed, or gates that keep a channel because an allowed one does."""
    sure = [graph.labels[i] for i in allowed.intersection(family)]
    return all(
        i in allowed or (i in gates and any(np.isin(labels, graph.labels[i]).all() for labels in sure)) for i in family
    )


def _left_out(blocks: tuple[Block, ...], i: int) -> bool:
    """Whether the suites before do not prune a convolution because of the blocks that follow it."""
    match blocks[i + 1 : i + 3]:
        case (Upsample(), *_) | (Maxpool(), Route()):
            return True
        case (Route() as route, *_):
            return route.groups > 1
    return False


def pruning_groups(graph: ChannelGraph) -> tuple[Group, ...]:
    """The groups of a network, in its order; those it does not have are left out.

    Chu et al. (arXiv:2306.01526) divide YOLOv3 and YOLOv4 into five ranges of blocks, written down as block numbers.
    Here they follow from the cfg of any network of the family: the backbone by output stride, then what leads to the
    first upsampled head, then the rest. Convolutions that share channels are in one group, that of the first of them;
    the published ranges of YOLOv3 cut a residual chain in two.
    """
    blocks = graph.network.blocks
    strides = [max(step) for step in steps(blocks)]
    upsampled = next((i for i, block in enumerate(blocks) if isinstance(block, Upsample)), len(blocks) + 1)
    neck = max(0, upsampled - 1)
    first_head = next((i for i in graph.network.heads if i > upsampled), len(blocks))
    starts = [next((i for i, stride in enumerate(strides[:neck]) if stride >= least), neck) for least in (16, 32)]
    starts += [neck, first_head + 1]
    number = {i: int(np.searchsorted(starts, i, side="right")) for i in graph.makers()}
    for family in graph.families():
        number |= dict.fromkeys(family, number[family[0]])
    members = [tuple(i for i in graph.makers() if number[i] == wanted) for wanted in range(len(GROUPS))]
    return tuple(Group(name, layers) for name, layers in zip(GROUPS, members, strict=True) if layers)


def check_percents(groups: Sequence[Group | None], percents: Sequence[float], where: str) -> None:
    """Refuse another number of percentages than there are groups.

    Args:
        groups: of the network.
        percents: of `--group-percent`.
        where: the network's name.

    Raises:
        InputError: lists the groups.
    """
    if len(percents) != len(groups):
        known = "; ".join(
            f"{number} {group.name}, blocks {group.layers[0]} to {group.layers[-1]}"
            for number, group in enumerate(filter(None, groups), 1)
        )
        raise InputError(f"--group-percent: {len(percents)} values, but {where} has {len(groups)} groups: {known}")


def choose(
    graph: ChannelGraph, importance: Importance, policy: ChannelPolicy, left: Keep | None = None
) -> ChannelChoice:
    """The labels that stay under a policy.

    Args:
        graph: of the network.
        importance: of every convolution with batch normalisation.
        policy: the strategy.
        left: [L], labels that earlier cuts left; the others go first and stay away.

    Raises:
        NumericsError: an importance is NaN or infinite.
        InputError: the policy has percentages for another number of groups than there are.
        InfeasibleError: a convolution would lose all its channels, or there is no candidate.
    """
    layers = candidates(graph, policy.prune, policy.all_convs)
    if not layers:
        raise InfeasibleError(f"{graph.network.path or 'network'}: no convolution can be pruned this way")
    scores = channel_scores(graph, importance, layers)
    keep = np.ones(graph.count, np.bool_) if left is None else left.copy()
    for layer, values in scores.items():
        values[~keep[graph.labels[layer]]] = -1.0
    groups = pruning_groups(graph) if policy.groups else (None,)
    percents = policy.group_percents or (policy.percent,) * len(groups)
    check_percents(groups, percents, graph.network.path or "the network")
    parts, limits = [], []
    for group, percent in zip(groups, percents, strict=True):
        members = [layer for layer in layers if group is None or layer in group.layers]
        part = Part(graph, policy, group, percent, {layer: scores[layer] for layer in members})
        parts.append(part)
        if members:
            limits.append(part.limit())
            keep &= part.kept()
    return ChannelChoice(keep, tuple(parts), *min(limits, key=itemgetter(0)))


def _mask(ranks: NDArray[np.int64], removed: int, policy: ChannelPolicy) -> Keep:
    """[C], channels of a convolution that the ranking keeps, and at least the floor of its strongest ones."""
    mask = ranks >= removed
    if policy.has_floor and policy.merge != "mean":
        mask[np.argsort(-ranks)[: policy.least(len(ranks))]] = True
    return mask


def _round_widths(
    graph: ChannelGraph, family: Family, strength: NDArray[np.float64], policy: ChannelPolicy, keep: Keep
) -> None:
    """Give every convolution of a family an allowed width, and its floor, by putting back its strongest channels.

    From the narrowest on; a channel that others share with one that has its width only comes back for their floor.
    """
    done = np.zeros(graph.count, np.bool_)
    for layer in sorted(family, key=lambda layer: len(graph.labels[layer])):
        labels = np.unique(graph.labels[layer])
        kept = int(keep[labels].sum())
        floor = max(kept, policy.least(len(labels)))
        gone = labels[~keep[labels]]
        gone = gone[np.lexsort((gone, -strength[gone], done[gone]))]
        free = int((~done[gone]).sum())
        back = max(floor - kept, min(policy.round_up(floor) - kept, free))
        keep[gone[:back]] = True
        done[labels] = True


def channel_scores(
    graph: ChannelGraph, importance: Importance, layers: Sequence[int]
) -> dict[int, NDArray[np.float64]]:
    """Importance of each layer's channels; with depthwise convolutions behind it, the mean over them and itself.

    Raises:
        NumericsError: an importance is NaN or infinite.
    """
    scores = {}
    for layer, blocks in voters(graph, layers).items():
        votes = [magnitudes(graph, importance, i) for i in blocks if i in importance]
        scores[layer] = np.stack(votes).mean(0)
    return scores


def voters(graph: ChannelGraph, layers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """For each candidate, the blocks that vote on its channels: itself and depthwise convolutions behind it."""
    followers: dict[int, list[int]] = {layer: [layer] for layer in layers}
    blocks = graph.network.blocks
    for i, block in enumerate(blocks):
        if not isinstance(block, Convolutional) or not block.batch_normalize or graph.makes(i):
            continue
        source = i - 1
        while source >= 0 and (
            isinstance(blocks[source], Dropout | Maxpool | Upsample)
            or blocks[source].depthwise(len(graph.labels[source]))
        ):
            source -= 1
        if source in followers:
            followers[source].append(i)
    return {layer: tuple(members) for layer, members in followers.items()}


def advised_percent(scores: Scores, max_percent: float = MOST_ADVISED) -> float:
    """Share of the channels that can go, the weakest first, until a layer has lost `FREE_SHARE` of its Σ |γ|.

    A layer whose Σ |γ| is below that share of an average layer of its width has nothing to lose.

    Args:
        scores: of each candidate's channels.
        max_percent: the largest percentage that works.

    Returns:
        0 … 0.99, cut to two decimals.
    """
    if not scores:
        return 0.0
    parts = [np.sort(np.asarray(part, np.float64)) for part in scores.values()]
    every = np.concatenate(parts)
    wholes = [max(float(part.sum()), FREE_SHARE * float(every.mean()) * len(part)) or 1.0 for part in parts]
    lost = np.concatenate([np.cumsum(part) / whole for part, whole in zip(parts, wholes, strict=True)])
    too_much = lost[np.argsort(every, kind="stable")] > FREE_SHARE
    free = int(np.argmax(too_much)) if too_much.any() else len(every)
    return math.floor(min(free / len(every), max_percent, MOST_ADVISED) * 100 + 1e-9) / 100
