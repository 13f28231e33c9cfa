"""A network without some of its channels and residual units: blocks, sliced tensors, folded constants; no torch.

Nothing is changed in place: new blocks and new arrays are returned, which can be pruned again.

A removed channel with γ = 0 still puts out a constant, f(β), whatever the picture. So does a removed residual unit:
with γ = 0 in its last convolution it adds f(β) to what goes round it. The constants are carried through every block to
all the convolutions that read them. There they are added to the bias, or subtracted from the running mean of the batch
normalisation (Ye et al., arXiv:1802.00124; the suites before this one reach only the next block). This is exact for
1 × 1 kernels and away from the zero-padded border. Where a constant meets a gate that depends on the picture
(squeeze-excite, scale_channels, sam), it counts as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Convolutional, Network
from utils.darknet.blocks.block import IMAGE, Vector
from utils.darknet.network import by_block, tensors
from utils.graph import ChannelGraph

if TYPE_CHECKING:
    from models import Darknet

Keep = NDArray[np.bool_]
"""[L], whether a label of the channel graph stays."""
Arrays = Mapping[str, NDArray[np.floating]]
"""Tensors by their keys in the state dict of the model."""


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


class PrunedNetwork(NamedTuple):
    """A network and its tensors."""

    network: Network
    arrays: dict[str, NDArray[np.floating]]


def prune_network(graph: ChannelGraph, arrays: Arrays, removal: Removal) -> PrunedNetwork:
    """Remove the labels that go from every block that makes, passes or reads them, and the units that go.

    Args:
        graph: of the network.
        arrays: its tensors; others are left out.
        removal: what goes.
    """
    number = numbers(graph.network, removal)
    sliced = {}
    for spec in tensors(graph.network):
        if spec.block in number:
            name = spec._replace(block=number[spec.block]).key
            keep, read = (removal.keep[graph.output(i)] for i in (spec.block, spec.block - 1))
            block = graph.network.blocks[spec.block]
            sliced[name] = np.ascontiguousarray(block.sliced(spec.name, arrays[spec.key], keep, read))
    return PrunedNetwork(prune_blocks(graph, removal), sliced)


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


def fold_constants(graph: ChannelGraph, arrays: Arrays, removal: Removal) -> dict[str, NDArray[np.floating]]:
    """The tensors with the constants of what is removed folded into what reads them; shapes as before.

    Args:
        graph: of the network.
        arrays: its tensors.
        removal: what goes.
    """
    changed = dict(arrays)
    outputs: dict[int, Vector] = {IMAGE: np.zeros(len(graph.image))}
    masked = {unit.last for unit in removal.units}
    tensors_of = by_block(arrays)
    for index, block in enumerate(graph.network.blocks):
        sources = [outputs[i] for i in block.reads(index)]
        stays, tensor = removal.stays(graph, index), tensors_of.get(index, {})
        changed |= {f"layers.{index}.{name}": array for name, array in block.take_up(tensor, sources[0]).items()}
        if isinstance(block, Convolutional) and index in masked:
            constant = block.shifted(tensor)
        else:
            constant = block.constant(tensor, sources, len(stays))
        outputs[index] = np.where(stays, constant if block.hands_on() else 0.0, constant)
    return changed


def arrays_of(model: Darknet) -> dict[str, NDArray[np.floating]]:
    """The tensors of a model on the CPU, without the counters; where they are there they are not copied."""
    return {name: value.cpu().numpy() for name, value in model.state_dict().items() if "num_batches" not in name}


def gammas_of(network: Network, arrays: Arrays) -> dict[int, NDArray[np.floating]]:
    """γ of every batch normalisation, by block number."""
    names = ((i, f"layers.{i}.bn.weight") for i in range(len(network.blocks)))
    return {i: arrays[name] for i, name in names if name in arrays}
