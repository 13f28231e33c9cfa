"""What must hold for a network as a whole; what must hold for a block where it stands is in shapes.py."""

from __future__ import annotations

from collections.abc import Sequence

from utils.darknet.blocks import Network, Shape
from utils.darknet.blocks.block import NET
from utils.darknet.blocks.values import SectionError
from utils.darknet.layout import FLOAT_BYTES, tensors
from utils.darknet.shapes import max_stride

MAX_PARAMETER_BYTES = 4 << 30
"""Ten times yolov4x-mish, the largest network of the Darknet repository."""
MAX_FEATURE_BYTES = 32 << 30
"""All feature maps of one picture in float32; yolov4 at 608 × 608 has 0.9 GiB."""


def check_network(network: Network, shapes: Sequence[Shape]) -> None:
    """Check a network whose blocks fit together.

    Args:
        network: with at least the shapes right.
        shapes: one a block, as `trace` gives.

    Raises:
        SectionError: there is no head, the last block leads nowhere, the weights or feature maps are too large, or the
            input is no multiple of the largest stride.
    """
    last = len(network.blocks) - 1
    if last < 0:
        raise SectionError("no block follows; a detector needs at least [convolutional] and [yolo]", block=NET)
    if not network.heads:
        raise SectionError("this is the last block, and there is no [yolo]; a detector ends in one", block=last)
    if not network.blocks[last].IS_HEAD:
        raise SectionError(
            "this is the last block, but no [yolo], so nothing reads it; delete it or add a head", block=last
        )
    _check_parameters(network)
    _check_features(network, shapes)
    network.image.check_sides(max_stride(network))


def _check_parameters(network: Network) -> None:
    total = 0
    for spec in tensors(network):
        total += spec.bytes
        if total > MAX_PARAMETER_BYTES:
            gib = f"{total / 2**30:.1f} GiB; at most {MAX_PARAMETER_BYTES >> 30} GiB are allowed"
            raise SectionError(f"the weights up to here would take {gib}", "filters", spec.block)


def _check_features(network: Network, shapes: Sequence[Shape]) -> None:
    total = 0
    for index, shape in enumerate((network.image, *shapes), NET):
        total += FLOAT_BYTES * shape.channels * shape.height * shape.width
        if total > MAX_FEATURE_BYTES:
            gib = f"{total / 2**30:.1f} GiB; at most {MAX_FEATURE_BYTES >> 30} GiB are allowed"
            key = "width" if index == NET else None
            raise SectionError(
                f"the maps of one picture up to here would take {gib}; lower width and height", key, index
            )
