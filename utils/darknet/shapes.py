"""Sizes of the feature maps: what every block makes of what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import singledispatch

from utils.darknet.blocks import (
    Avgpool,
    Block,
    Convolutional,
    Depthwise,
    Maxpool,
    Network,
    Reorg,
    Route,
    Sam,
    ScaleChannels,
    Se,
    Shape,
    Shortcut,
    Upsample,
    Yolo,
)
from utils.darknet.values import Fault
from utils.errors import CfgError


@dataclass
class Trail:
    """The blocks passed so far and what they put out."""

    input: Shape
    blocks: list[Block] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)

    @property
    def before(self) -> Shape:
        """What the next block reads unless it names its sources."""
        return self.shapes[-1] if self.shapes else self.input

    def add(self, block: Block) -> Shape:
        """Pass a block; Fault when it cannot work on what it reads."""
        _refuse_detections(block, self)
        shape = output_shape(block, self)
        self.blocks.append(block)
        self.shapes.append(shape)
        return shape


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
        except Fault as fault:
            what = f"{fault.key}: {fault}" if fault.key else str(fault)
            raise CfgError(f"{network.where(index if fault.block is None else fault.block)}: {what}") from None
    return tuple(trail.shapes)


def strides(network: Network) -> tuple[int, ...]:
    """Pixels of the network input per cell of each head, in cfg order; the larger of x and y where they differ."""
    steps = _steps(network)
    return tuple(max(1, round(max(steps[head]))) for head in network.heads)


def max_stride(network: Network) -> int:
    """Stride of the coarsest head; input sizes are multiples of it."""
    return max(strides(network))


@singledispatch
def output_shape(block: Block, trail: Trail) -> Shape:
    """Shape a block puts out after `trail`; Fault when it cannot work there. The default is for `[dropout]`."""
    return trail.before


@output_shape.register
def _(block: Convolutional, trail: Trail) -> Shape:
    channels = trail.before.channels
    if channels % block.groups:
        raise Fault(f"the {channels} input channels do not divide into {block.groups} groups", "groups")
    if block.filters % block.groups:
        raise Fault(f"the {block.filters} filters do not divide into {block.groups} groups", "groups")
    reach = block.dilation * (block.size - 1) + 1
    padding = 2 * block.padding * block.dilation
    return Shape(
        block.filters,
        _windows(trail.before.height + padding, reach, block.stride_y),
        _windows(trail.before.width + padding, reach, block.stride_x),
    )


@output_shape.register
def _(block: Depthwise, trail: Trail) -> Shape:
    channels, height, width = trail.before
    padding = 2 * block.padding
    return Shape(
        channels,
        _windows(height + padding, block.size, block.stride),
        _windows(width + padding, block.size, block.stride),
    )


@output_shape.register
def _(block: Maxpool, trail: Trail) -> Shape:
    channels, height, width = trail.before
    if (block.padding + 1) // 2 >= block.size:
        raise Fault(f"with size={block.size} some windows would see padding only; less than {2 * block.size - 1} "
                    "is allowed", "padding")  # fmt: skip
    return Shape(
        channels,
        _windows(height + block.padding, block.size, block.stride_y),
        _windows(width + block.padding, block.size, block.stride_x),
    )


@output_shape.register
def _(block: Avgpool, trail: Trail) -> Shape:
    return Shape(trail.before.channels, 1, 1)


@output_shape.register
def _(block: Se, trail: Trail) -> Shape:
    return trail.before


@output_shape.register
def _(block: Upsample, trail: Trail) -> Shape:
    channels, height, width = trail.before
    return Shape(channels, height * block.stride, width * block.stride)


@output_shape.register
def _(block: Reorg, trail: Trail) -> Shape:
    channels, height, width = trail.before
    if height % block.stride or width % block.stride:
        raise Fault(f"the {height} x {width} cells it reads are no multiple of it", "stride")
    if channels % block.stride**2:
        raise Fault(f"the {channels} channels it reads are no multiple of its square", "stride")
    return Shape(channels * block.stride**2, height // block.stride, width // block.stride)


@output_shape.register
def _(block: Route, trail: Trail) -> Shape:
    shapes = _read(trail, block.layers, "layers")
    if not 0 <= block.group_id < block.groups:
        raise Fault(f"with groups={block.groups}, 0..{block.groups - 1} is allowed", "group_id")
    for layer, shape in zip(block.layers, shapes, strict=True):
        if shape[1:] != shapes[0][1:]:
            raise Fault(f"{_cells(layer, shape)}, but {_cells(block.layers[0], shapes[0])}; "
                        "joined blocks need the same height and width", "layers")  # fmt: skip
        if shape.channels % block.groups:
            raise Fault(f"the {shape.channels} channels of block {layer} do not divide into {block.groups} groups",
                        "groups")  # fmt: skip
    return Shape(sum(shape.channels for shape in shapes) // block.groups, *shapes[0][1:])


@output_shape.register
def _(block: Shortcut, trail: Trail) -> Shape:
    if not trail.blocks:
        raise Fault("the first block has nothing to add to; put a [convolutional] before it")
    before = trail.before
    for source, shape in zip(block.sources, _read(trail, block.sources, "from"), strict=True):
        if shape[1:] != before[1:]:
            raise Fault(f"{_cells(source, shape)}, but the block before has {before.height} x {before.width}; "
                        "a sum needs the same height and width", "from")  # fmt: skip
    return before


@output_shape.register
def _(block: ScaleChannels, trail: Trail) -> Shape:
    (source,) = _read(trail, (block.source,), "from")
    channels, height, width = trail.before
    if (height, width) != (1, 1):
        raise Fault(f"the block before has {height} x {width} cells; one factor a channel (1 x 1, see [avgpool]) "
                    "is allowed")  # fmt: skip
    if channels != source.channels:
        raise Fault(f"block {block.source} has {source.channels} channels, but the block before {channels} factors",
                    "from")  # fmt: skip
    return source


@output_shape.register
def _(block: Sam, trail: Trail) -> Shape:
    (source,) = _read(trail, (block.source,), "from")
    if source != trail.before:
        raise Fault(f"block {block.source} is {_size(source)}, but the block before {_size(trail.before)}; "
                    "a product needs equal shapes", "from")  # fmt: skip
    return source


@output_shape.register
def _(block: Yolo, trail: Trail) -> Shape:
    index = len(trail.blocks)
    first = next((i for i, other in enumerate(trail.blocks) if isinstance(other, Yolo)), None)
    if not trail.blocks:
        raise Fault("the first block cannot be a head; it needs a [convolutional] before it")
    if not isinstance(trail.blocks[-1], Convolutional):
        raise Fault(f"block {index} follows a {type(trail.blocks[-1]).__name__.lower()} block; "
                    "a head follows a [convolutional]")  # fmt: skip
    if first is not None and trail.blocks[first].classes != block.classes:  # type: ignore[attr-defined]
        raise Fault(f"the head before (block {first}) has {trail.blocks[first].classes} classes; "  # type: ignore[attr-defined]
                    "all heads have the same", "classes")  # fmt: skip
    if trail.before.channels != block.channels:
        raise Fault(
            f"the [yolo] after it needs {len(block.mask)} * (5 + {block.classes}) = {block.channels} "
            "(anchors of its mask, 4 box values, objectness, classes)",
            "filters",
            index - 1,
        )
    return trail.before


def _windows(cells: int, reach: int, stride: int) -> int:
    """Positions of a window of `reach` padded cells."""
    if cells < reach:
        raise Fault(f"the window covers {reach} cells, but the padded input has {cells} only", "size")
    return (cells - reach) // stride + 1


def _read(trail: Trail, sources: Sequence[int], key: str) -> list[Shape]:
    index = len(trail.blocks)
    for source in sources:
        if not 0 <= source < index:
            allowed = f"blocks 0..{index - 1} can be read" if index else "it is the first block, so nothing can be read"
            what = "itself" if source == index else "a later block" if source > index else "before the first one"
            raise Fault(f"block {source} is {what} for block {index}; {allowed}", key)
        if isinstance(trail.blocks[source], Yolo):
            raise Fault(f"block {source} is a [yolo], which ends a branch; read the block before it", key)
    return [trail.shapes[source] for source in sources]


def _refuse_detections(block: Block, trail: Trail) -> None:
    if trail.blocks and isinstance(trail.blocks[-1], Yolo) and not isinstance(block, Route):
        raise Fault(f"block {len(trail.blocks)} follows a [yolo], which ends a branch; go on from a [route]")


def _cells(index: int, shape: Shape) -> str:
    return f"block {index} has {shape.height} x {shape.width} cells"


def _size(shape: Shape) -> str:
    return f"{shape.channels} x {shape.height} x {shape.width}"


def _steps(network: Network) -> list[tuple[Fraction, Fraction]]:
    """Input pixels per cell of every block, x and y."""
    steps: list[tuple[Fraction, Fraction]] = []
    before = (Fraction(1), Fraction(1))
    for block in network.blocks:
        match block:
            case Convolutional() | Maxpool():
                before = (before[0] * block.stride_x, before[1] * block.stride_y)
            case Depthwise() | Reorg():
                before = (before[0] * block.stride, before[1] * block.stride)
            case Upsample():
                before = (before[0] / block.stride, before[1] / block.stride)
            case Avgpool():
                before = (Fraction(network.net.width), Fraction(network.net.height))
            case Route():
                before = steps[block.layers[0]]
            case ScaleChannels() | Sam():
                before = steps[block.source]
        steps.append(before)
    return steps
