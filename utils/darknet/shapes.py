"""Sizes of the feature maps: what every block makes of what it reads."""

from __future__ import annotations

from utils.darknet.blocks import Network, Shape
from utils.darknet.blocks.block import NET
from utils.darknet.blocks.trail import Trail, steps
from utils.darknet.blocks.values import SectionError
from utils.errors import CfgError


def trace(network: Network, height: int | None = None, width: int | None = None) -> tuple[Shape, ...]:
    """Output shape of every block.

    Args:
        network: blocks with absolute references.
        height: of the network input in pixels; the cfg's by default.
        width: like `height`.

    Raises:
        CfgError: a block cannot work on what it reads, e.g. because the size is no multiple of the stride.
    """
    trail = Trail(Shape(network.net.channels, height or network.net.height, width or network.net.width))
    for index, block in enumerate(network.blocks):
        try:
            trail.add(block)
        except SectionError as fault:
            place = index if fault.block is None else fault.block
            where = f"{network.path or 'network'}: input {trail.image}" if place == NET else network.where(place)
            raise CfgError(f"{where}: {fault.key + ': ' if fault.key else ''}{fault}") from None
    return tuple(trail.shapes)


def strides(network: Network) -> tuple[int, ...]:
    """Pixels of the network input per cell of each head, in cfg order; the larger of x and y where they differ."""
    every = steps(network.blocks)
    return tuple(max(1, round(max(every[head]))) for head in network.heads)


def normalised_cell(network: Network, height: int, width: int) -> int | None:
    """The first block with batch normalisation whose map is a single cell: one picture gives it no variance."""
    return next(
        (
            number
            for number, (block, shape) in enumerate(zip(network.blocks, trace(network, height, width), strict=True))
            if getattr(block, "batch_normalize", False) and (shape.height, shape.width) == (1, 1)
        ),
        None,
    )


def max_stride(network: Network) -> int:
    """Stride of the coarsest head; input sizes are multiples of it."""
    return max(strides(network))


def picture_channels(network: Network) -> int:
    """Channels of the pictures that a network takes.

    Raises:
        CfgError: they are not those of a picture.
    """
    channels = network.net.channels
    if channels not in (1, 3):
        raise CfgError(
            f"{network.path or 'network'}: [net] channels={channels}: pictures have 1 (grey) or 3 (RGB); change the "
            "cfg, or take what reads no pictures: info, export.py, pruning with --no-test and no --data"
        )
    return channels
