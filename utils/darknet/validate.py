"""What must hold for a network as a whole; every block by itself is checked by shapes.py."""

from __future__ import annotations

from collections.abc import Sequence

from utils.darknet.blocks import Block, Convolutional, Depthwise, Network, Se, Shape, Yolo
from utils.darknet.shapes import max_stride
from utils.darknet.values import Fault

MAX_PARAMETER_BYTES = 4 << 30
"""Ten times yolov4x-mish, the largest network of the Darknet repository."""
MAX_FEATURE_BYTES = 32 << 30
"""All feature maps of one picture in float32; yolov4 at 608 x 608 has 0.8 GiB."""
NET = -1
"""Stands for `[net]` where a Fault names a block."""


def check_network(network: Network, shapes: Sequence[Shape]) -> None:
    """Fault when there is no head, blocks lead nowhere, sizes do not fit the strides, or the network is too large."""
    blocks = network.blocks
    if not blocks:
        raise Fault("there is no block after it; a detector ends in [convolutional] and [yolo]", block=NET)
    if not network.heads:
        raise Fault("the network has no [yolo]; a detector ends in one", block=len(blocks) - 1)
    if not isinstance(blocks[-1], Yolo):
        raise Fault(
            "nothing reads the last block, and it is no [yolo]; delete what follows the last head",
            block=len(blocks) - 1,
        )
    _check_parameters(network, shapes)
    _check_features(network, shapes)
    stride = max_stride(network)
    for key, side in (("width", network.net.width), ("height", network.net.height)):
        if side % stride:
            near = max(1, round(side / stride)) * stride
            raise Fault(f"multiples of {stride}, the largest stride of the heads, are allowed, e.g. {near}", key, NET)


def _parameters(block: Block, channels: int) -> int:
    match block:
        case Convolutional():
            return block.filters * (channels // block.groups * block.size**2 + (4 if block.batch_normalize else 1))
        case Depthwise():
            return channels * (block.size**2 + (4 if block.batch_normalize else 1))
        case Se():
            return 2 * channels * block.filters
    return 0


def _check_parameters(network: Network, shapes: Sequence[Shape]) -> None:
    total, channels = 0, network.net.channels
    for index, (block, shape) in enumerate(zip(network.blocks, shapes, strict=True)):
        total += 4 * _parameters(block, channels)
        channels = shape.channels
        if total > MAX_PARAMETER_BYTES:
            raise Fault(
                f"the weights up to here would take {total / 2**30:.1f} GiB; at most {MAX_PARAMETER_BYTES >> 30} GiB "
                "are allowed",
                "filters",
                index,
            )


def _check_features(network: Network, shapes: Sequence[Shape]) -> None:
    net = network.net
    total = 4 * net.channels * net.height * net.width
    if total > MAX_FEATURE_BYTES:
        raise Fault(f"with height={net.height} a picture would take {_gib(total)}", "width", NET)
    for index, shape in enumerate(shapes):
        total += 4 * shape.channels * shape.height * shape.width
        if total > MAX_FEATURE_BYTES:
            raise Fault(f"the feature maps up to here would take {_gib(total)}; lower width and height", block=index)


def _gib(total: int) -> str:
    return f"{total / 2**30:.1f} GiB; at most {MAX_FEATURE_BYTES >> 30} GiB are allowed"
