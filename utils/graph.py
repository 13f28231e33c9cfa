"""Which channels of a network belong together: computed once from its blocks, without torch.

Every channel that a block puts out has a label. A convolution makes new labels, every other block passes on those it
reads; where two channels must stay or go together they have the same one. To remove a label is to remove its channel
from every block that makes, passes or reads it, so a pruning is one boolean a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import (
    Block,
    Convolutional,
    Network,
    Reorg,
    Route,
    Sam,
    ScaleChannels,
    Shortcut,
    Yolo,
)
from utils.darknet.shapes import trace

Labels = NDArray[np.int64]
IMAGE = -1
"""Block number of the network's input."""


class TieKind(Enum):
    """Why channels of two blocks share a label."""

    SHORTCUT = "added by the shortcut"
    SCALE = "scaled by the scale_channels"
    SPLIT = "split into equal parts by the route"
    ATTENTION = "multiplied by the sam"


@dataclass(frozen=True)
class Tie:
    """Channels of two blocks that go together because of a third."""

    kind: TieKind
    at: int
    """The block that ties."""
    one: int
    other: int
    """The blocks whose outputs it reads; the same for a split."""


@dataclass(frozen=True)
class Pin:
    """Channels that stay, whatever is pruned."""

    block: int
    """The block whose output they are."""
    reason: str


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The labels of a network's channels."""

    network: Network
    labels: tuple[Labels, ...]
    """For each block [C], the labels of its output."""
    image: Labels
    """Of the input."""
    pinned: NDArray[np.bool_]
    """[L], whether a label stays, whatever is pruned."""
    tied: NDArray[np.bool_]
    """[L], whether a shortcut ties it to another channel."""
    ties: tuple[Tie, ...]
    pins: tuple[Pin, ...]

    @property
    def count(self) -> int:
        """Number of labels, L."""
        return len(self.pinned)

    def reads(self, index: int) -> Labels:
        """Labels of the channels that a block reads, its sources one after the other."""
        return np.concatenate([self.output(source) for source in self.network.blocks[index].reads(index)])

    def output(self, index: int) -> Labels:
        """Labels of a block's output; of the image for -1."""
        return self.image if index == IMAGE else self.labels[index]

    def makers(self) -> tuple[int, ...]:
        """The convolutions that make labels."""
        return tuple(i for i, block in enumerate(self.network.blocks) if self.makes(i, block))

    def makes(self, index: int, block: Block) -> bool:
        """Whether a block makes labels: a convolution that is not depthwise."""
        return isinstance(block, Convolutional) and not is_depthwise(block, len(self.output(index - 1)))

    def widths(self, keep: NDArray[np.bool_]) -> tuple[int, ...]:
        """Channels of every block's output when the labels in `keep` [L] stay."""
        return tuple(int(keep[labels].sum()) for labels in self.labels)

    def chains(self) -> tuple[tuple[int, ...], ...]:
        """The convolutions that feed each residual chain: those whose channels shortcuts tie together."""
        return self._joined(self.tied)

    def families(self) -> tuple[tuple[int, ...], ...]:
        """All convolutions that make labels, those together that have labels in common, whatever ties them."""
        return self._joined(np.ones(self.count, np.bool_))

    def _joined(self, counts: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
        """The convolutions with labels that count [L], those together that have such labels in common."""
        found: dict[int, set[int]] = {}
        for i in self.makers():
            mine = self.labels[i][counts[self.labels[i]]].tolist()
            joined = {i}.union(*(found[label] for label in mine if label in found))
            for member in joined if mine else ():
                for label in self.labels[member][counts[self.labels[member]]].tolist():
                    found[label] = joined
        families = {id(family): family for family in found.values()}
        return tuple(sorted(tuple(sorted(family)) for family in families.values()))

    def explain(self, index: int) -> Iterator[str]:
        """Lines that say why channels of a block are tied or pinned, and where they are read."""
        labels = self.output(index)
        mine = set(labels.tolist())
        block = self.network.blocks[index]
        yield f"{self.network.where(index)}: {type(block).__name__.lower()}, {len(labels)} channels"
        makers = [i for i in self.makers() if mine & set(self.labels[i].tolist())]
        if makers != [index]:
            yield f"  made by: {', '.join(f'block {i}' for i in makers) or 'nothing that is pruned'}"
        for tie in self.ties:
            if mine & (set(self.output(tie.one).tolist()) & set(self.output(tie.other).tolist())):
                place = self.network.where(tie.at)
                who = f"block {tie.one}" if tie.one == tie.other else f"blocks {tie.one} and {tie.other}"
                yield f"  tied: {who}, {tie.kind.value}, {place}"
        for pin in self.pins:
            if mine & set(self.output(pin.block).tolist()):
                yield f"  stays: block {pin.block} {pin.reason}"
        readers = [i for i in range(len(self.labels)) if index in self.network.blocks[i].reads(i)]
        yield f"  read by: {', '.join(f'block {i}' for i in readers) or 'nothing'}"


def is_depthwise(block: Block, channels: int) -> bool:
    """Whether each channel of a block's output is made from the same channel of its `channels` inputs."""
    return isinstance(block, Convolutional) and block.groups > 1 and block.groups == channels == block.filters


def channel_graph(network: Network) -> ChannelGraph:
    """Label the channels of a network.

    Raises:
        CfgError: the blocks do not fit each other.
    """
    builder = _Builder(network)
    for index, block in enumerate(network.blocks):
        builder.add(index, block)
    return builder.finish()


class _Builder:
    """The labels so far, as a forest: channels with one root have one label."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.shapes = trace(network)
        self.parents: list[int] = []
        self.outputs: list[list[int]] = []
        self.image = self._new(network.net.channels)
        self.ties: list[Tie] = []
        self.pins: list[Pin] = [Pin(IMAGE, "is the image")]
        self.shortcut_tied: list[int] = []

    def add(self, index: int, block: Block) -> None:
        """Label the output of the next block."""
        read = [self._output(source) for source in block.reads(index)]
        match block:
            case Convolutional() if not is_depthwise(block, len(read[0])):
                self.outputs.append(self._new(block.filters))
                if block.groups > 1:
                    self.pins += [Pin(place, f"meets the {block.groups} groups of the convolution, block {index}")
                                  for place in (index, index - 1)]  # fmt: skip
            case Route():
                parts = [self._part(index, source, block) for source in block.layers]
                self.outputs.append([label for part in parts for label in part])
            case Shortcut():
                for source in block.sources:
                    self._tie(Tie(TieKind.SHORTCUT, index, index - 1, source))
                self.outputs.append(read[0])
            case ScaleChannels() | Sam():
                kind = TieKind.SCALE if isinstance(block, ScaleChannels) else TieKind.ATTENTION
                self._tie(Tie(kind, index, index - 1, block.source))
                self.outputs.append(read[1])
            case Reorg():
                self.pins.append(Pin(index - 1, f"is rearranged by the reorg, block {index}"))
                self.outputs.append(self._new(self.shapes[index].channels))
                self.pins.append(Pin(index, "is made by a reorg"))
            case _:
                if isinstance(block, Yolo):
                    self.pins.append(Pin(index - 1, f"is the head, block {index}"))
                self.outputs.append(read[0])

    def finish(self) -> ChannelGraph:
        """Number the roots 0..L-1 in the order of the network."""
        roots = np.array([self._root(label) for label in range(len(self.parents))], np.int64)
        number = {root: position for position, root in enumerate(dict.fromkeys(roots.tolist()))}
        numbers = np.array([number[root] for root in roots.tolist()], np.int64)
        labels = tuple(numbers[output] for output in self.outputs)
        image = numbers[self.image]
        pinned, tied = np.zeros((2, len(number)), np.bool_)
        for pin in self.pins:
            pinned[image if pin.block == IMAGE else labels[pin.block]] = True
        tied[numbers[self.shortcut_tied]] = True
        return ChannelGraph(self.network, labels, image, pinned, tied, tuple(self.ties), tuple(self.pins))

    def _output(self, index: int) -> list[int]:
        return self.image if index == IMAGE else self.outputs[index]

    def _new(self, channels: int) -> list[int]:
        start = len(self.parents)
        self.parents += range(start, start + channels)
        return list(range(start, start + channels))

    def _part(self, index: int, source: int, route: Route) -> list[int]:
        """What a route takes of a source. Parts of equal width stay so: their channels go together, one of each."""
        labels = self._output(source)
        if route.groups == 1:
            return labels
        width = len(labels) // route.groups
        parts = [labels[start : start + width] for start in range(0, width * route.groups, width)]
        self.ties.append(Tie(TieKind.SPLIT, index, source, source))
        for other in parts[1:]:
            self._join(parts[0], other)
        return parts[route.group_id]

    def _tie(self, tie: Tie) -> None:
        """Tie the channels that two blocks have in common: all, or those of the narrower one."""
        self.ties.append(tie)
        one, other = self._output(tie.one), self._output(tie.other)
        self._join(one, other)
        if tie.kind is TieKind.SHORTCUT:
            self.shortcut_tied += one[: len(other)]

    def _join(self, ones: list[int], others: list[int]) -> None:
        for one, other in zip(ones, others, strict=False):
            one, other = self._root(one), self._root(other)
            self.parents[max(one, other)] = min(one, other)

    def _root(self, label: int) -> int:
        while self.parents[label] != label:
            self.parents[label] = self.parents[self.parents[label]]
            label = self.parents[label]
        return label
