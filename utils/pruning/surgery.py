"""A network without some of its channels and residual units: the one place that slices tensors; no torch.

Nothing is changed in place: new blocks and new arrays are returned, which can be pruned again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Network
from utils.darknet.layout import key, tensors
from utils.graph import ChannelGraph
from utils.pruning.removal import Removal

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
            keep, read = (removal.keep[graph.output(i)] for i in (spec.block, spec.block - 1))
            block = graph.network.blocks[spec.block]
            sliced[name] = np.ascontiguousarray(block.sliced(spec.name, arrays[key(spec)], keep, read))
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
        blocks=tuple(blocks[i].pruned(widths[i], len(graph.output(i - 1)), moved) for i in number),
    )


def numbers(network: Network, removal: Removal) -> dict[int, int]:
    """New numbers of the blocks that stay, by their old ones, in order."""
    gone = removal.blocks
    return {old: new for new, old in enumerate(i for i in range(len(network.blocks)) if i not in gone)}
