"""Channels that belong together, residual units, and the blocks that are left without some of them; no torch.

Every channel that a block puts out has a label. A convolution makes new labels, every other block passes on those it
reads; where two channels must stay or go together they have the same one. To remove a label is to remove its channel
from every block that makes, passes or reads it, so a pruning is one boolean a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Block, Convolutional, Dropout, Network, Shortcut, Yolo
from utils.darknet.blocks.block import IMAGE, Labeling, Pin, Tie, activated
from utils.darknet.network import trace
from utils.errors import InfeasibleError, InputError, NumericsError

Labels = NDArray[np.int64]
Keep = NDArray[np.bool_]
"""[L], whether a label of the channel graph stays."""
Importance = Mapping[int, NDArray[np.floating]]
"""Of the channels [C] of each convolution with batch normalisation, by block number: |γ|, or what masking a channel
does to the loss. A residual unit may have one [1], by the number of its shortcut."""


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
        return tuple(i for i in range(len(self.labels)) if self.makes(i))

    def makes(self, index: int) -> bool:
        """Whether a block makes labels: a convolution that is not depthwise."""
        block = self.network.blocks[index]
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


@dataclass(frozen=True)
class Unit:
    """The blocks between one block and the shortcut that adds it to what they make of it."""

    source: int
    """The block whose output goes around; what read the shortcut reads this one when the unit is removed."""
    last: int
    """The convolution whose γ scales what the unit adds."""
    shortcut: int

    @property
    def blocks(self) -> range:
        """Block numbers of the unit, the shortcut included."""
        return range(self.source + 1, self.shortcut + 1)


def residual_units(network: Network) -> tuple[Unit, ...]:
    """The residual units of any length, in the order of the network.

    A unit is everything between a block and a plain shortcut to that block. Its blocks read only that block and each
    other, and nothing outside reads them. The shape stays. With γ = β = 0 in its last convolution the unit adds 0.
    """
    blocks, shapes = network.blocks, trace(network)
    last_reader = {source: i for i, block in enumerate(blocks) for source in block.reads(i)}
    units = []
    for i, block in enumerate(blocks):
        if not isinstance(block, Shortcut) or len(block.sources) != 1:
            continue
        source, inside = block.sources[0], range(block.sources[0] + 1, i)
        last = computed_before(blocks, i)
        final = blocks[last]
        if (
            (block.activation, block.weights_type) == ("linear", "none")
            and source < last
            and shapes[source] == shapes[i]
            and isinstance(final, Convolutional)
            and final.batch_normalize
            and not activated(final.activation, np.zeros(1)).any()
            and not any(isinstance(blocks[j], Yolo) for j in inside)
            and all(source <= read for j in inside for read in blocks[j].reads(j))
            and all(last_reader.get(j, j) <= i for j in inside)
        ):
            units.append(Unit(source, last, i))
    return tuple(units)


def computed_before(blocks: Sequence[Block], i: int) -> int:
    """The block before another one, dropouts apart."""
    i -= 1
    while isinstance(blocks[i], Dropout):
        i -= 1
    return i


def check_units(network: Network) -> None:
    """Refuse a network without residual units.

    Raises:
        InputError: it has none.
    """
    if not residual_units(network):
        raise InputError(
            f"--shortcut: {network.path or 'the network'} has no residual unit, that is no [shortcut] around "
            "convolutions; slim_prune.py removes channels of any network"
        )


def magnitudes(graph: ChannelGraph, importance: Importance, block: int) -> NDArray[np.float64]:
    """Importance of the channels of a block, without signs.

    Raises:
        NumericsError: one is NaN or infinite.
    """
    values = np.abs(np.asarray(importance[block], np.float64))
    if not np.isfinite(values).all():
        where = graph.network.where(block)
        raise NumericsError(f"{where}: an importance is not finite; take an earlier checkpoint")
    return values


def unit_scores(graph: ChannelGraph, importance: Importance, keep: Keep, units: Sequence[Unit]) -> NDArray[np.float64]:
    """Importance of each unit: its own, or else the mean over those channels of its last convolution that stay.

    Raises:
        NumericsError: an importance is NaN or infinite.
    """
    scores = np.zeros(len(units))
    for number, unit in enumerate(units):
        if unit.shortcut in importance:
            values = magnitudes(graph, importance, unit.shortcut)
        else:
            values = magnitudes(graph, importance, unit.last)[keep[graph.labels[unit.last]]]
        scores[number] = values.mean() if len(values) else 0.0
    return scores


def choose_units(graph: ChannelGraph, importance: Importance, keep: Keep, count: int) -> tuple[Unit, ...]:
    """The `count` weakest residual units, by score and then by number; none lies within another one that goes.

    Args:
        graph: of the network.
        importance: of every convolution with batch normalisation.
        keep: [L], the channels that stay; scores are means over them.
        count: number of units that go.

    Raises:
        InfeasibleError: there are not so many.
        NumericsError: an importance is NaN or infinite.
    """
    choices = list(_weakest_units(graph, importance, keep))
    for chosen in choices:
        if len(chosen) == count:
            return tuple(sorted(chosen, key=lambda unit: unit.shortcut))
    raise InfeasibleError(
        f"--shortcut {count}: {graph.network.path or 'the network'} has not so many residual units; the largest number "
        f"that works is {max(map(len, choices))}"
    )


def most_units(graph: ChannelGraph, importance: Importance, limit: float = np.inf) -> int:
    """The largest number that `choose_units` takes of units with a score below `limit`, where all channels stay."""
    return max(map(len, _weakest_units(graph, importance, np.ones(graph.count, np.bool_), limit)))


def _weakest_units(
    graph: ChannelGraph, importance: Importance, keep: Keep, limit: float = np.inf
) -> Iterator[Sequence[Unit]]:
    """None, the weakest unit, the two weakest … with a score below `limit`; one around others takes their place."""
    units = residual_units(graph.network)
    scores = unit_scores(graph, importance, keep, units)
    chosen: list[Unit] = []
    yield chosen
    for number in sorted(np.flatnonzero(scores < limit).tolist(), key=lambda number: (scores[number], number)):
        if not any(units[number].shortcut in other.blocks for other in chosen):
            chosen = [other for other in chosen if other.shortcut not in units[number].blocks] + [units[number]]
            yield chosen


@dataclass(frozen=True, eq=False)
class Removal:
    """Channels and residual units that go from a network."""

    keep: Keep
    """[L], the labels that stay."""
    units: tuple[Unit, ...] = ()
    """Residual units that go whole, in the order of the network."""

    @property
    def blocks(self) -> frozenset[int]:
        """Numbers of the blocks that go."""
        return frozenset(block for unit in self.units for block in unit.blocks)

    @property
    def nothing(self) -> bool:
        """Whether everything stays."""
        return bool(self.keep.all()) and not self.units

    def stays(self, graph: ChannelGraph, block: int) -> Keep:
        """[C], whether a channel of a block's output is more than a constant when what goes is masked."""
        masked = any(block == unit.last for unit in self.units)
        return self.keep[graph.labels[block]] & (not masked)


def prune_blocks(graph: ChannelGraph, removal: Removal) -> Network:
    """The blocks with the widths and numbers that are left; everything else as it was."""
    widths = graph.widths(removal.keep)
    number = numbers(graph.network, removal)
    around = {unit.shortcut: unit.source for unit in removal.units}

    def moved(index: int) -> int:
        while index in around:
            index = around[index]
        return number[index]

    blocks = graph.network.blocks
    return replace(
        graph.network,
        blocks=tuple(blocks[i].pruned(widths[i], len(graph.output(i - 1)), moved) for i in number),
    )


def numbers(network: Network, removal: Removal) -> dict[int, int]:
    """New numbers of the blocks that stay, by their old ones, in order."""
    gone = removal.blocks
    return {old: new for new, old in enumerate(i for i in range(len(network.blocks)) if i not in gone)}
