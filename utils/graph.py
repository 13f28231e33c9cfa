"""Which channels of a network belong together: computed once from its blocks, without torch.

Every channel that a block puts out has a label. A convolution makes new labels, every other block passes on those it
reads; where two channels must stay or go together they have the same one. To remove a label is to remove its channel
from every block that makes, passes or reads it, so a pruning is one boolean a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Block, Convolutional, Network
from utils.darknet.blocks.block import IMAGE, Labeling, Pin, Tie
from utils.darknet.network import trace

Labels = NDArray[np.int64]


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
        return isinstance(block, Convolutional) and not block.depthwise(len(self.output(index - 1)))

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
        sharing: dict[int, set[int]] = {}
        for i in self.makers():
            mine = self.labels[i][counts[self.labels[i]]].tolist()
            joined = {i}.union(*(sharing[label] for label in mine if label in sharing))
            for member in joined if mine else ():
                for label in self.labels[member][counts[self.labels[member]]].tolist():
                    sharing[label] = joined
        families = {id(family): family for family in sharing.values()}
        return tuple(sorted(tuple(sorted(family)) for family in families.values()))

    def explain(self, index: int) -> Iterator[str]:
        """Lines that say why channels of a block are tied or pinned, and where they are read."""
        labels = self.output(index)
        mine = set(labels.tolist())
        block = self.network.blocks[index]
        yield f"{self.network.where(index)}: {block.SECTION}, {len(labels)} channels"
        makers = [i for i in self.makers() if mine & set(self.labels[i].tolist())]
        if makers != [index]:
            yield f"  made by: {', '.join(f'block {i}' for i in makers) or 'nothing that is pruned'}"
        for tie in self.ties:
            if mine & (set(self.output(tie.one).tolist()) & set(self.output(tie.other).tolist())):
                where = self.network.where(tie.at)
                who = f"block {tie.one}" if tie.one == tie.other else f"blocks {tie.one} and {tie.other}"
                yield f"  tied: {who}, {tie.reason}, {where}"
        for pin in self.pins:
            if mine & set(self.output(pin.block).tolist()):
                yield f"  stays: block {pin.block} {pin.reason}"
        readers = [i for i in range(len(self.labels)) if index in self.network.blocks[i].reads(i)]
        yield f"  read by: {', '.join(f'block {i}' for i in readers) or 'nothing'}"


def channel_graph(network: Network) -> ChannelGraph:
    """Label the channels of a network.

    Raises:
        CfgError: the blocks do not fit each other.
    """
    trace(network)
    labeling = Labeling(network.net.channels)
    for index, block in enumerate(network.blocks):
        labeling.outputs.append(block.label(index, labeling))
    roots = np.array([labeling.root(label) for label in range(len(labeling.parents))], np.int64)
    number = {root: position for position, root in enumerate(dict.fromkeys(roots.tolist()))}
    numbers = np.array([number[root] for root in roots.tolist()], np.int64)
    labels = tuple(numbers[output] for output in labeling.outputs)
    image = numbers[labeling.image]
    pinned, tied = np.zeros((2, len(number)), np.bool_)
    for pin in labeling.pins:
        pinned[image if pin.block == IMAGE else labels[pin.block]] = True
    tied[numbers[labeling.residual]] = True
    return ChannelGraph(network, labels, image, pinned, tied, tuple(labeling.ties), tuple(labeling.pins))
