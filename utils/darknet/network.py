"""What follows from the blocks of a network: shapes, strides, tensors, labels of channels, limits; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal, NamedTuple

from utils.darknet.blocks import Block, Convolutional, Maxpool, Network, Route, Se, Shape, Shortcut, Upsample, Yolo
from utils.darknet.blocks.block import IMAGE, Trail, steps
from utils.darknet.blocks.values import SectionError
from utils.errors import CfgError

FLOAT_BYTES = 4
HEADER_BYTES = 20
"""Header of the files written today: three int32 and a uint64."""
MAX_PARAMETER_BYTES = 4 << 30
"""Four times cspx-p7-mish, the largest detector of the Darknet repository."""
MAX_FEATURE_BYTES = 32 << 30
"""All feature maps of one picture in float32; yolov4 at 608 × 608 has 0.65 GiB."""
OPENCV_EPSILON = 1e-6
"""Added to a variance by OpenCV's reader of Darknet files (4.14); Darknet and this suite add `BN_EPSILON`, 1e-5."""
REFUSED_ACTIVATIONS = ("relu6", "h_swish", "hardsigmoid")


def trace(network: Network, height: int | None = None, width: int | None = None) -> tuple[Shape, ...]:
    """Output shape of every block.

    Args:
        network: blocks with absolute references.
        height: of the network input in pixels; the cfg's by default.
        width: like `height`.

    Raises:
        CfgError: a block cannot work on what it reads, e.g. because the size is no multiple of the stride.
    """
    image = network.image
    trail = Trail(Shape(image.channels, height or image.height, width or image.width))
    for index, block in enumerate(network.blocks):
        try:
            trail.add(block)
        except SectionError as fault:
            guilty = index if fault.block is None else fault.block
            where = f"{network.path or 'network'}: input {trail.image}" if guilty == IMAGE else network.where(guilty)
            raise CfgError(f"{where}: {fault.key + ': ' if fault.key else ''}{fault}") from None
    return tuple(trail.shapes)


def strides(network: Network) -> tuple[int, ...]:
    """Pixels of the network input per cell of each head, in cfg order; the larger of x and y where they differ."""
    every = steps(network.blocks)
    return tuple(max(1, round(max(every[head]))) for head in network.heads)


def normalised_cell(network: Network, height: int, width: int) -> int | None:
    """The first block with batch normalisation whose map is a single cell: one picture gives it no variance."""
    for number, (block, shape) in enumerate(zip(network.blocks, trace(network, height, width), strict=True)):
        if getattr(block, "batch_normalize", False) and (shape.height, shape.width) == (1, 1):
            return number
    return None


def unread(network: Network) -> set[int]:
    """Numbers of the blocks that no head depends on."""
    read = set(network.heads)
    for index, block in reversed(list(enumerate(network.blocks))):
        if index in read:
            read.update(block.reads(index))
    return set(range(len(network.blocks))) - read


def max_stride(network: Network) -> int:
    """Stride of the coarsest head or of a coarser map that is upsampled; input sizes are multiples of it."""
    every = steps(network.blocks)
    read = [block.basis(index) for index, block in enumerate(network.blocks) if isinstance(block, Upsample)]
    return max(*strides(network), *(round(max(every[index])) for index in read if index != IMAGE), 1)


def picture_channels(network: Network) -> Literal[1, 3]:
    """Channels of the pictures that a network takes.

    Raises:
        CfgError: they are not those of a picture.
    """
    channels = network.net.channels
    if channels not in (1, 3):
        raise CfgError(
            f"{network.path or 'network'}: [net] channels={channels}: images have 1 (grey) or 3 (RGB); change the "
            "cfg, or take what reads no images: info, export.py, pruning with --no-test and no --data"
        )
    return 1 if channels == 1 else 3


class TensorSpec(NamedTuple):
    """One float32 tensor of a .weights file."""

    block: int
    """Number of the block it belongs to."""
    name: str
    """Relative to the block: bn.bias, bn.weight, bn.running_mean, bn.running_var, conv.weight, conv.bias, …"""
    shape: tuple[int, ...]
    """As in the module: [filters, inputs / groups, k, k] for `conv.weight`, [out, in] for `fc1.weight`, …"""

    @property
    def key(self) -> str:
        """Its name in the state dict of the model: `layers.23.conv.weight`."""
        return f"layers.{self.block}.{self.name}"

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return FLOAT_BYTES * self.size

    @property
    def trained(self) -> bool:
        """Whether it is a parameter; running statistics are not."""
        return not self.name.startswith("bn.running_")


def tensors(network: Network) -> tuple[TensorSpec, ...]:
    """All tensors of a network in file order (AlexeyAB/darknet, `load_weights_upto`; algorithms: β, γ, μ, σ², W).

    Raises:
        CfgError: the network has an impossible shape.
    """
    shapes = trace(network)
    widths = [network.net.channels, *(shape.channels for shape in shapes)]
    return tuple(
        TensorSpec(index, name, shape)
        for index, block in enumerate(network.blocks)
        for name, shape in block.tensors(widths[index])
    )


def by_block(arrays: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tensors of a state dict by the number of their block, and then by their names in it; others are left out."""
    blocks: dict[int, dict[str, Any]] = {}
    for name, array in arrays.items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            blocks.setdefault(int(index), {})[rest] = array
    return blocks


def parameter_count(network: Network) -> int:
    """Trained values: convolution weights and biases, γ and β; running statistics are not counted."""
    return sum(spec.size for spec in tensors(network) if spec.trained)


def file_bytes(network: Network) -> int:
    """Size of the network's .weights file with the header of today."""
    return HEADER_BYTES + sum(spec.bytes for spec in tensors(network))


def grouped(number: int) -> str:
    """Digits of a large count in groups of three: 61 949 149."""
    return f"{number:,}".replace(",", " ")


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
    for head, old in zip(network.heads, network.yolos, strict=True):
        before, yolo = blocks[head - 1], replace(old, classes=classes)
        assert isinstance(before, Convolutional)  # `Yolo.shape` allows nothing else
        blocks[head - 1], blocks[head] = replace(before, filters=yolo.channels), yolo
    return replace(network, blocks=tuple(blocks))


def same_network(first: Network, second: Network) -> bool:
    """Whether weights of one network are weights of the other, once their class counts agree.

    Weights do not depend on the input size, anchors, keys the suite does not use and the training keys of `[yolo]`.
    """
    return first.heads == second.heads and _skeleton(first) == _skeleton(second)


def _skeleton(network: Network) -> list[Any]:
    """What the outputs depend on, for one class."""
    skeleton: list[Any] = [network.net.channels]
    for block in adapt_classes(network, 1).blocks:
        if isinstance(block, Yolo):
            skeleton.append((block.mask, block.scale_x_y, block.new_coords))
        else:
            skeleton.append(replace(block, extra=()))
    return skeleton


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
        raise SectionError("no block follows; a detector needs at least [convolutional] and [yolo]", block=IMAGE)
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
    for index, shape in enumerate((network.image, *shapes), IMAGE):
        total += FLOAT_BYTES * shape.channels * shape.height * shape.width
        if total > MAX_FEATURE_BYTES:
            gib = f"{total / 2**30:.1f} GiB; at most {MAX_FEATURE_BYTES >> 30} GiB are allowed"
            key = "width" if index == IMAGE else None
            raise SectionError(f"the maps of one image up to here would take {gib}; lower width and height", key, index)


def opencv_warning(network: Network) -> str | None:
    """One line on the first block that OpenCV refuses or silently computes otherwise; None if it reads the network."""
    for index, block in enumerate(network.blocks):
        for problem in _problems(block):
            return f"OpenCV's reader of Darknet files {problem}, as in {network.where(index)}; do not run it there"
    return None


def _problems(block: Block) -> Iterator[str]:
    if isinstance(block, Se):
        yield "refuses [se]"
    if (activation := getattr(block, "activation", "")) in REFUSED_ACTIVATIONS:
        yield f"refuses activation={activation}"
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
