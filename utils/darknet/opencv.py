"""What OpenCV's reader of Darknet files (4.14) does not read as Darknet does."""

from __future__ import annotations

from collections.abc import Iterator

from utils.darknet.blocks import Block, Convolutional, Maxpool, Network, Route, Se, Shortcut

EPSILON = 1e-6
"""Added to a variance there; Darknet and this suite add `BN_EPSILON`, 1e-5."""
REFUSED_ACTIVATIONS = ("relu6", "h_swish", "hardsigmoid")


def opencv_warning(network: Network) -> str | None:
    """One line on the first block that OpenCV refuses or silently computes otherwise; None if it reads the network."""
    for index, block in enumerate(network.blocks):
        for problem in _problems(block):
            return f"OpenCV's reader of Darknet files {problem}, as in {network.where(index)}; do not run it there"
    return None


def _problems(block: Block) -> Iterator[str]:
    if isinstance(block, Se):
        yield "refuses [se]"
    if getattr(block, "activation", "") in REFUSED_ACTIVATIONS:
        yield f"refuses activation={block.activation}"
    if isinstance(block, Shortcut) and len(block.sources) > 1:
        yield "ignores the second from of a shortcut"
    if isinstance(block, Shortcut) and block.weights_type != "none":
        yield "passes over the weights of a shortcut, so that those of all later blocks are wrong"
    if isinstance(block, Convolutional) and not (block.bias or block.batch_normalize):
        yield "reads a bias where bias=0, so that the weights of all later blocks are wrong"
    if isinstance(block, Route) and block.groups > 1 < len(block.layers):
        yield "cuts the concatenation of a route into groups, not each of its blocks"
    if isinstance(block, Convolutional) and block.dilation > 1:
        yield "ignores dilation"
    if isinstance(block, Convolutional | Maxpool) and block.stride_x != block.stride_y:
        yield "ignores stride_x and stride_y"
