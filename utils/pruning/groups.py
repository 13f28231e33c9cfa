"""The parts of a network that group pruning gives a percentage each; no torch.

Chu et al. (arXiv:2306.01526) divide YOLOv3 and YOLOv4 into five ranges of blocks, written down as block numbers. Here
they are told from the cfg of any network of the family: the backbone by output stride, then what leads to the first
upsampled head, then the rest. Convolutions that share channels are in one group, that of the first of them; the
published ranges of YOLOv3 cut a residual chain in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.darknet.blocks import Upsample
from utils.darknet.blocks.trail import steps
from utils.errors import InputError
from utils.graph import ChannelGraph


@dataclass(frozen=True)
class Group:
    """Convolutions that are ranked among themselves."""

    name: str
    layers: tuple[int, ...]
    """The convolutions that make channels, by block number."""


NAMES = (
    "backbone to stride 8",
    "backbone at stride 16",
    "from stride 32 to the first upsampling",
    "top-down, to the first upsampled head",
    "the other heads",
)


def pruning_groups(graph: ChannelGraph) -> tuple[Group, ...]:
    """The groups of a network, in its order; those it does not have are left out.

    Args:
        graph: of the network.
    """
    network = graph.network
    blocks = network.blocks
    strides = [max(step) for step in steps(blocks)]
    upsampled = next((i for i, block in enumerate(blocks) if isinstance(block, Upsample)), len(blocks) + 1)
    neck = max(0, upsampled - 1)
    heads = [i for i in network.heads if i > upsampled]
    first_head = heads[0] if heads else len(blocks)
    starts = (
        next((i for i, stride in enumerate(strides[:neck]) if stride >= 16), neck),
        next((i for i, stride in enumerate(strides[:neck]) if stride >= 32), neck),
        neck,
        first_head + 1,
    )
    of = {i: int(np.searchsorted(starts, i, side="right")) for i in graph.makers()}
    for family in graph.families():
        of |= dict.fromkeys(family, of[family[0]])
    members = [tuple(i for i in graph.makers() if of[i] == number) for number in range(len(NAMES))]
    return tuple(Group(name, layers) for name, layers in zip(NAMES, members, strict=True) if layers)


def owners(graph: ChannelGraph, groups: Sequence[Group]) -> list[int]:
    """For every block the place of its group in `groups`: that of the convolution it is, or else of the one before it.

    Blocks before the first convolution are in that one's group.
    """
    of = {i: place for place, group in enumerate(groups) for i in group.layers}
    owner, found = of[min(of)], []
    for i in range(len(graph.network.blocks)):
        owner = of.get(i, owner)
        found.append(owner)
    return found


def check_percents(groups: Sequence[Group], percents: Sequence[float], where: str) -> None:
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
            for number, group in enumerate(groups, 1)
        )
        raise InputError(f"--group-percent: {len(percents)} values, but {where} has {len(groups)} groups: {known}")
