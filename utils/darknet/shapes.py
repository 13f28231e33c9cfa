"""Sizes of the feature maps: what every block makes of what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import singledispatch

from utils.darknet.blocks import (
    Avgpool,
    Block,
    Convolutional,
    Maxpool,
    Network,
    Reorg,
    Route,
    Sam,
    ScaleChannels,
    Shape,
    Shortcut,
    Upsample,
    Yolo,
)
from utils.darknet.values import SectionError
from utils.errors import CfgError

NET = -1
"""Stands for `[net]` where a block is named."""


class Trail:
    """The blocks passed so far and the shapes they put out."""

    def __init__(self, image: Shape) -> None:
        self.image = image
        self.blocks: list[Block] = []
        self.shapes: list[Shape] = []
        self.classes: int | None = None
        """Of the heads passed so far."""

    @property
    def before(self) -> Shape:
        """What the next block reads unless it names its sources."""
        return self.shapes[-1] if self.shapes else self.image

    def add(self, block: Block) -> None:
        """Pass a block.

        Raises:
            SectionError: it cannot work on what it reads.
        """
        if self.blocks and isinstance(self.blocks[-1], Yolo) and not isinstance(block, Route):
            raise SectionError(f"block {len(self.blocks)} follows a [yolo], which ends a branch; go on from a [route]")
        self.shapes.append(output_shape(block, self))
        self.blocks.append(block)
        if isinstance(block, Yolo):
            self.classes = block.classes

    def read(self, sources: Sequence[int], key: str) -> list[Shape]:
        """Shapes of the blocks that the next block names in `key`; one that it cannot read is refused."""
        index = len(self.blocks)
        for source in sources:
            if not 0 <= source < index:
                allowed = f"blocks 0..{index - 1} can be read" if index else "the first block has none to read"
                what = "the block itself" if source == index else "a later block" if source > index else "no block"
                raise SectionError(f"block {index} reads block {source}, which is {what}; {allowed}", key)
            if isinstance(self.blocks[source], Yolo):
                raise SectionError(f"block {source} is a [yolo], which ends a branch; read the block before it", key)
        return [self.shapes[source] for source in sources]

    def check_cells(self, source: int, want: Shape, key: str) -> None:
        """Refuse a source of another height and width than `want`; blame the input's size where that explains it."""
        shape = self.shapes[source]
        if shape[1:] == want[1:]:
            return
        stride = max(max(step) for step in steps(self.blocks))
        check_sides(self.image, round(stride))
        raise SectionError(
            f"block {source} has {shape.height} x {shape.width} cells, but {want.height} x {want.width} are needed, "
            "as only maps of one size go together",
            key,
        )


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
            where = f"{network.path or 'network'}: input {_size(trail.image)}" if place == NET else network.where(place)
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


def check_sides(image: Shape, stride: int) -> None:
    """Refuse an input with a side that is no multiple of `stride`."""
    for key, side in (("width", image.width), ("height", image.height)):
        if side % stride:
            near = max(1, round(side / stride)) * stride
            raise SectionError(
                f"multiples of {stride}, the largest stride of the network, are allowed, e.g. {near}", key, NET
            )


def steps(blocks: Sequence[Block]) -> list[tuple[Fraction | int, Fraction | int]]:
    """Pixels of the network input per cell of every block, x and y. Global pooling is passed over."""
    passed: list[tuple[Fraction | int, Fraction | int]] = []
    x: Fraction | int = 1
    y: Fraction | int = 1
    for block in blocks:
        match block:
            case Convolutional() | Maxpool():
                x, y = x * block.stride_x, y * block.stride_y
            case Reorg():
                x, y = x * block.stride, y * block.stride
            case Upsample():
                x, y = Fraction(x, block.stride), Fraction(y, block.stride)
            case Route():
                x, y = passed[block.layers[0]]
            case ScaleChannels() | Sam():
                x, y = passed[block.source]
        passed.append((x, y))
    return passed


@singledispatch
def output_shape(block: Block, trail: Trail) -> Shape:
    """Shape a block puts out after `trail`; a block that cannot work there raises SectionError.

    The default holds for `[dropout]` and `[se]`.
    """
    return trail.before


@output_shape.register
def _(block: Convolutional, trail: Trail) -> Shape:
    channels, height, width = trail.before
    for count, what in ((channels, "input channels"), (block.filters, "filters")):
        if count % block.groups:
            raise SectionError(f"the {count} {what} cannot be split into {block.groups} equal groups", "groups")
    reach = block.dilation * (block.size - 1) + 1
    padding = 2 * block.padding * block.dilation
    return Shape(
        block.filters,
        _windows(height + padding, reach, block.stride_y),
        _windows(width + padding, reach, block.stride_x),
    )


@output_shape.register
def _(block: Maxpool, trail: Trail) -> Shape:
    channels, height, width = trail.before
    largest = 2 * (block.size - 1)
    if block.padding > largest:
        raise SectionError(
            f"at most {largest} is allowed for size {block.size}; some windows would see padding only", "padding"
        )
    return Shape(
        channels,
        _windows(height + block.padding, block.size, block.stride_y),
        _windows(width + block.padding, block.size, block.stride_x),
    )


@output_shape.register
def _(block: Avgpool, trail: Trail) -> Shape:
    return Shape(trail.before.channels, 1, 1)


@output_shape.register
def _(block: Upsample, trail: Trail) -> Shape:
    channels, height, width = trail.before
    return Shape(channels, height * block.stride, width * block.stride)


@output_shape.register
def _(block: Reorg, trail: Trail) -> Shape:
    channels, height, width = trail.before
    stride = block.stride
    if height % stride or width % stride:
        raise SectionError(f"the {height} x {width} cells of the block before are no multiples of {stride}", "stride")
    if channels % stride**2:
        raise SectionError(f"the {channels} channels of the block before are no multiple of {stride**2}", "stride")
    return Shape(channels * stride**2, height // stride, width // stride)


@output_shape.register
def _(block: Route, trail: Trail) -> Shape:
    shapes = trail.read(block.layers, "layers")
    if block.group_id >= block.groups:
        raise SectionError(f"0..{block.groups - 1} is allowed, as groups is {block.groups}", "group_id")
    for layer, shape in zip(block.layers, shapes, strict=True):
        trail.check_cells(layer, shapes[0], "layers")
        if shape.channels % block.groups:
            raise SectionError(
                f"the {shape.channels} channels of block {layer} cannot be split into {block.groups} equal groups",
                "groups",
            )
    return Shape(sum(shape.channels for shape in shapes) // block.groups, *shapes[0][1:])


@output_shape.register
def _(block: Shortcut, trail: Trail) -> Shape:
    trail.read(block.sources, "from")
    for source in block.sources:
        trail.check_cells(source, trail.before, "from")
    return trail.before


@output_shape.register
def _(block: ScaleChannels, trail: Trail) -> Shape:
    (source,) = trail.read((block.source,), "from")
    channels, height, width = trail.before
    if (height, width) != (1, 1):
        raise SectionError(f"the block before has {height} x {width} cells; 1 x 1 is allowed, as an [avgpool] gives")
    if channels != source.channels:
        raise SectionError(
            f"block {block.source} has {source.channels} channels, but the block before {channels}; one factor for "
            "each channel is needed",
            "from",
        )
    return source


@output_shape.register
def _(block: Sam, trail: Trail) -> Shape:
    (source,) = trail.read((block.source,), "from")
    if source != trail.before:
        raise SectionError(
            f"block {block.source} is {_size(source)}, but the block before {_size(trail.before)}; a product needs "
            "equal shapes",
            "from",
        )
    return source


@output_shape.register
def _(block: Yolo, trail: Trail) -> Shape:
    index = len(trail.blocks)
    if not index:
        raise SectionError("a head cannot be the first block; it needs a [convolutional] before it")
    if not isinstance(trail.blocks[-1], Convolutional):
        raise SectionError("a head reads the block before it, which must be a [convolutional]; put one between them")
    if trail.classes not in (None, block.classes):
        raise SectionError(f"the head before has {trail.classes}; all heads have the same classes", "classes")
    if trail.before.channels != block.channels:
        raise SectionError(
            f"the [yolo] after it needs {block.channels} = {len(block.mask)} * (5 + {block.classes}), for each anchor "
            "of its mask 4 box values, objectness and the classes",
            "filters",
            index - 1,
        )
    return trail.before


def _windows(cells: int, reach: int, stride: int) -> int:
    """Positions of a window that reaches over `reach` of the padded cells."""
    if cells < reach:
        raise SectionError(f"the window reaches over {reach} cells, but the input has {cells} with its padding", "size")
    return (cells - reach) // stride + 1


def _size(shape: Shape) -> str:
    return f"{shape.channels} x {shape.height} x {shape.width}"
