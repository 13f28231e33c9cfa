"""One cfg for every data set: the same network with another number of classes."""

from __future__ import annotations

from dataclasses import replace

from utils.darknet.blocks import Block, Net, Network, Yolo


def head_convolutions(network: Network) -> tuple[int, ...]:
    """Numbers of the blocks whose filters depend on the class count: the convolution before each `[yolo]`."""
    return tuple(head - 1 for head in network.heads)


def adapt_classes(network: Network, classes: int) -> Network:
    """The network with `classes` classes in every head: `[yolo].classes` and the filters of the convolution before.

    Returns:
        `network` itself when it has that many classes already.
    """
    if classes < 1:
        raise ValueError(f"a network has at least one class; got {classes}")
    if all(yolo.classes == classes for yolo in network.yolos):
        return network
    blocks = list(network.blocks)
    for head in network.heads:
        yolo = replace(blocks[head], classes=classes)
        blocks[head - 1] = replace(blocks[head - 1], filters=yolo.channels)
        blocks[head] = yolo
    return replace(network, blocks=tuple(blocks))


def differs_only_in_classes(first: Network, second: Network) -> bool:
    """Whether two networks compute the same from the same weights once their class counts agree.

    The input size, keys the suite does not use and the training keys of `[yolo]` are not compared, since weights do
    not depend on them. True for equal networks, too.
    """
    if len(first.blocks) != len(second.blocks) or first.heads != second.heads:
        return False
    return _skeleton(adapt_classes(first, second.classes)) == _skeleton(second)


def _skeleton(network: Network) -> tuple[Block, ...]:
    """The blocks without what their outputs do not depend on."""
    return (Net(width=0, height=0, channels=network.net.channels), *(_bare(block) for block in network.blocks))


def _bare(block: Block) -> Block:
    if not isinstance(block, Yolo):
        return replace(block, extra=())
    return Yolo(
        mask=block.mask,
        anchors=block.anchors,
        classes=block.classes,
        scale_x_y=block.scale_x_y,
        new_coords=block.new_coords,
    )
