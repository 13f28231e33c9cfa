"""The convolutions whose channels sparse training squeezes and pruning removes; no torch.

The three sets of `--prune` are those of the suites this one follows (their `parse_module_defs`, 2 and 4), told from the
channel graph. They differ in two places: a depthwise convolution passes its channels through, so the convolution before
it is a candidate like any other; and of convolutions that go together, as in a residual chain, all are candidates or
none is, gates apart.
"""

from __future__ import annotations

import numpy as np

from utils.darknet.blocks import Block, Dropout, Maxpool, Route, Sam, ScaleChannels, Upsample
from utils.graph import ChannelGraph
from utils.pruning.units import residual_units

SETS = {
    0: "convolutions that no shortcut ties",
    1: "all convolutions with batch normalisation",
    2: "the last convolution of every residual unit",
}
"""What `--prune` means; 0 for normal and regular pruning, 1 for shortcut, slim and layer_channel, 2 for layers."""


def candidates(graph: ChannelGraph, prune: int, all_convs: bool = False) -> tuple[int, ...]:
    """Block numbers of the candidates, in the order of the network.

    Args:
        graph: of the network.
        prune: a key of `SETS`.
        all_convs: sets 0 and 1 also have the convolutions that the classic rules leave out although the graph allows
            them: directly before an upsampling, a spatial pyramid, or a route that splits its source.
    """
    blocks = graph.network.blocks
    gates = {_before(blocks, i) for i, block in enumerate(blocks) if isinstance(block, ScaleChannels | Sam)}
    if prune == 2:
        return tuple(unit.last for unit in residual_units(graph.network))
    found = {
        i
        for i in graph.makers()
        if blocks[i].batch_normalize
        and i not in gates  # it scales the channels of another convolution, which speaks for both
        and not graph.pinned[graph.labels[i]].any()
        and (prune == 1 or not graph.tied[graph.labels[i]].any())
        and (all_convs or not _left_out(blocks, i))
    }
    stuck = {i for family in graph.families() if not _free(graph, family, found, gates) for i in family}
    return tuple(sorted(found - stuck))


def _free(graph: ChannelGraph, family: tuple[int, ...], found: set[int], gates: set[int]) -> bool:
    """Whether all of a family are candidates, or gates that keep a channel because a candidate does."""
    sure = [graph.labels[i] for i in found.intersection(family)]
    return all(
        i in found or (i in gates and any(np.isin(labels, graph.labels[i]).all() for labels in sure)) for i in family
    )


def _before(blocks: tuple[Block, ...], i: int) -> int:
    """The block before another one, dropouts apart."""
    i -= 1
    while isinstance(blocks[i], Dropout):
        i -= 1
    return i


def _left_out(blocks: tuple[Block, ...], i: int) -> bool:
    """The classic exceptions: what follows the convolution was not handled."""
    after = blocks[i + 1 : i + 3]
    match after:
        case (Upsample(), *_) | (Maxpool(), Route()):
            return True
        case (Route() as route, *_):
            return route.groups > 1
    return False
