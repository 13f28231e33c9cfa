"""A network without some of its channels and residual units: the one place that slices tensors; no torch.

Nothing is changed in place: new blocks and new arrays are returned, which can be pruned again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Block, Convolutional, Network, Route, Sam, ScaleChannels, Se, Shortcut
from utils.darknet.layout import TensorSpec, key, tensors
from utils.graph import ChannelGraph, is_depthwise
from utils.pruning.removal import Keep, Removal

Arrays = Mapping[str, NDArray[np.floating]]
"""Tensors by their keys in the state dict of the model."""


class Compacted(NamedTuple):
    """A network and its tensors."""

    network: Network
    arrays: dict[str, NDArray[np.floating]]


def compact(graph: ChannelGraph, arrays: Arrays, removal: Removal) -> Compacted:
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
            name = key(spec._replace(block=number[spec.block]))
            sliced[name] = _sliced(graph, spec, arrays[key(spec)], removal.keep)
    return Compacted(compact_network(graph, removal), sliced)


def compact_network(graph: ChannelGraph, removal: Removal) -> Network:
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
        blocks=tuple(_renumbered(_narrowed(graph, i, blocks[i], widths[i]), moved) for i in number),
    )


def numbers(network: Network, removal: Removal) -> dict[int, int]:
    """New numbers of the blocks that stay, by their old ones, in order."""
    gone = removal.blocks
    return {old: new for new, old in enumerate(i for i in range(len(network.blocks)) if i not in gone)}


def _renumbered(block: Block, moved: Callable[[int], int]) -> Block:
    """A block with its references to others changed; what it reads as the block before it needs none."""
    match block:
        case Route():
            return replace(block, layers=tuple(map(moved, block.layers)))
        case Shortcut():
            return replace(block, sources=tuple(map(moved, block.sources)))
        case ScaleChannels() | Sam():
            return replace(block, source=moved(block.source))
    return block


def _narrowed(graph: ChannelGraph, index: int, block: Block, width: int) -> Block:
    if not isinstance(block, Convolutional):
        return block
    depthwise = is_depthwise(block, len(graph.output(index - 1)))
    return replace(block, filters=width, groups=width if depthwise else block.groups)


def _sliced(graph: ChannelGraph, spec: TensorSpec, array: NDArray[np.floating], keep: Keep) -> NDArray[np.floating]:
    """One tensor without the channels that go; contiguous."""
    block = graph.network.blocks[spec.block]
    own, read = keep[graph.labels[spec.block]], keep[graph.output(spec.block - 1)]
    match block:
        case Se():
            array = array[:, own] if spec.name == "fc1.weight" else array[own]
        case Shortcut():
            array = array[..., own] if array.ndim > 1 else array
        case _:
            array = array[own]
            whole = spec.name == "conv.weight" and not is_depthwise(block, len(read)) and block.groups == 1
            array = array[:, read] if whole else array
    return np.ascontiguousarray(array)
