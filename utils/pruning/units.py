"""Residual units: what can be taken out whole, because a shortcut leads around it; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Convolutional, Dropout, Network, Shortcut, Yolo
from utils.darknet.blocks.block import activated
from utils.darknet.network import trace
from utils.errors import InfeasibleError, InputError, NumericsError
from utils.graph import ChannelGraph
from utils.pruning.surgery import Keep, Unit

Importance = Mapping[int, NDArray[np.floating]]
"""Of the channels [C] of each convolution with batch normalisation, by block number: |γ|, or what masking a channel
does to the loss. A residual unit may have one [1], by the number of its shortcut."""


def residual_units(network: Network) -> tuple[Unit, ...]:
    """The residual units of any length, in the order of the network.

    A unit is everything between a block and a plain shortcut to it, provided that nothing else reads or is read there,
    the shape stays, and the unit adds 0 where the γ and β of its last convolution are 0.
    """
    blocks, shapes = network.blocks, trace(network)
    readers: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for source in block.reads(i):
            if source >= 0:
                readers[source].append(i)
    units = []
    for i, block in enumerate(blocks):
        if not isinstance(block, Shortcut) or len(block.sources) != 1:
            continue
        source, inside = block.sources[0], range(block.sources[0] + 1, i)
        last = i - 1
        while isinstance(blocks[last], Dropout):
            last -= 1
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
            and all(reader <= i for j in inside for reader in readers[j])
        ):
            units.append(Unit(source, last, i))
    return tuple(units)


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


def unit_scores(graph: ChannelGraph, importance: Importance, keep: Keep, units: Sequence[Unit]) -> NDArray[np.float64]:
    """Importance of each unit: its own, or else the mean over those channels of its last convolution that stay.

    Raises:
        NumericsError: an importance is NaN or infinite.
    """
    scores = np.zeros(len(units))
    for number, unit in enumerate(units):
        if unit.shortcut in importance:
            values = np.abs(np.asarray(importance[unit.shortcut], np.float64))
        else:
            values = np.abs(np.asarray(importance[unit.last], np.float64))[keep[graph.labels[unit.last]]]
        if not np.isfinite(values).all():
            where = graph.network.where(unit.last)
            raise NumericsError(f"{where}: an importance is not finite; take an earlier checkpoint")
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


def most_units(graph: ChannelGraph, importance: Importance) -> int:
    """The largest number that `choose_units` takes where all channels stay."""
    return max(map(len, _weakest_units(graph, importance, np.ones(graph.count, np.bool_))))


def _weakest_units(graph: ChannelGraph, importance: Importance, keep: Keep) -> Iterator[Sequence[Unit]]:
    """None, the weakest unit, the two weakest …; one around others takes their place."""
    units = residual_units(graph.network)
    scores = unit_scores(graph, importance, keep, units)
    chosen: list[Unit] = []
    yield chosen
    for number in sorted(range(len(units)), key=lambda number: (scores[number], number)):
        if not any(units[number].shortcut in other.blocks for other in chosen):
            chosen = [other for other in chosen if other.shortcut not in units[number].blocks] + [units[number]]
            yield chosen
