"""A network without some of its channels: the one place that slices tensors; no torch.

Nothing is changed in place: new blocks and new arrays are returned, which can be pruned again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Block, Convolutional, Network, Se, Shortcut
from utils.darknet.layout import TensorSpec, key, tensors
from utils.graph import ChannelGraph, is_depthwise
from utils.pruning.policy import Keep

Arrays = Mapping[str, NDArray[np.floating]]
"""Tensors by their keys in the state dict of the model."""


class Compacted(NamedTuple):
    """A network and its tensors."""

    network: Network
    arrays: dict[str, NDArray[np.floating]]


def compact(graph: ChannelGraph, arrays: Arrays, keep: Keep) -> Compacted:
    """Remove the labels that are not kept from every block that makes, passes or reads them.

    Args:
        graph: of the network.
        arrays: its tensors; others are left out.
        keep: [L] bool.
    """
    network = compact_network(graph, keep)
    sliced = {key(spec): _sliced(graph, spec, arrays[key(spec)], keep) for spec in tensors(graph.network)}
    return Compacted(network, sliced)


def compact_network(graph: ChannelGraph, keep: Keep) -> Network:
    """The blocks with the widths that are left; everything else as it was."""
    widths = graph.widths(keep)
    blocks = tuple(_narrowed(graph, i, block, widths[i]) for i, block in enumerate(graph.network.blocks))
    return replace(graph.network, blocks=blocks)


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
