"""Blocks without weights that change the cells of a map or drop some: pooling, `[upsample]`, `[reorg]`, `[dropout]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from utils.darknet.blocks.block import (
    Arrays,
    Block,
    Key,
    Labeling,
    Position,
    Shape,
    Trail,
    Values,
    Vector,
    key,
    windows,
    written_strides,
)
from utils.darknet.blocks.values import PADDING, SIZE, Number, SectionError


@dataclass(frozen=True, kw_only=True)
class ChannelWise(Block):
    """Works on each channel alone, and leaves one as it is that is constant."""

    def constant(self, arrays: Arrays, sources: Sequence[Vector], width: int) -> Vector:
        """What it reads."""
        return sources[0]


@dataclass(frozen=True, kw_only=True)
class Maxpool(ChannelWise):
    """Max pooling; Darknet pads `padding` cells in all, `padding // 2` of them before."""

    size: int = key(SIZE, None)
    stride = Key(SIZE, 1)
    stride_x: int = key(SIZE, None)
    stride_y: int = key(SIZE, None)
    padding: int = key(PADDING, None)

    SILENT = "out_channels"
    FIXED = "antialiasing=0 maxpool_depth=0 maxpool_zero_nonmax=0"

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """The size is the stride by default, the padding size - 1."""
        stride = values.pop("stride")
        for name in ("size", "stride_x", "stride_y"):
            values[name] = values[name] or stride
        if values["padding"] is None:
            values["padding"] = values["size"] - 1
        return cls(**values)

    def key_values(self, position: Position) -> Values:
        """`padding` only where it is not the default."""
        padding = None if self.padding == self.size - 1 else self.padding
        return vars(self) | written_strides(self) | {"padding": padding}

    def step(self) -> tuple[int, int]:
        """The strides."""
        return self.stride_x, self.stride_y

    def shape(self, trail: Trail) -> Shape:
        """Windows that fit into the padded input."""
        largest = 2 * (self.size - 1)
        if self.padding > largest:
            raise SectionError(
                f"at most {largest} is allowed for size {self.size}; some windows would see padding only", "padding"
            )
        return Shape(trail.before.channels, *windows(self, trail.before, self.padding, self.size))

    def operations(self, output: Shape) -> int:
        """One for each cell it looks at."""
        return self.size**2 * output.channels * output.height * output.width


@dataclass(frozen=True, kw_only=True)
class Avgpool(ChannelWise):
    """Global average pooling to 1 × 1."""

    def shape(self, trail: Trail) -> Shape:
        """One cell."""
        return Shape(trail.before.channels, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Upsample(ChannelWise):
    """Nearest-neighbour upsampling."""

    stride: int = key(SIZE, 2)

    FIXED = "scale=1"

    def step(self) -> tuple[Fraction, Fraction]:
        """A part of a cell."""
        return Fraction(1, self.stride), Fraction(1, self.stride)

    def shape(self, trail: Trail) -> Shape:
        """Every cell becomes stride × stride."""
        channels, height, width = trail.before
        return Shape(channels, height * self.stride, width * self.stride)


@dataclass(frozen=True, kw_only=True)
class Reorg(Block):
    """Space to depth in the memory order of Darknet's `[reorg]`."""

    stride: int = key(SIZE, 1)

    FIXED = "reverse=0"

    def step(self) -> tuple[int, int]:
        """The stride."""
        return self.stride, self.stride

    def shape(self, trail: Trail) -> Shape:
        """The cells of a square become channels."""
        channels, height, width = trail.before
        s = self.stride
        if height % s or width % s:
            raise SectionError(f"the {height} x {width} cells of the block before are no multiples of {s}", "stride")
        if channels % s**2:
            raise SectionError(f"the {channels} channels of the block before are no multiple of {s**2}", "stride")
        return Shape(channels * s**2, height // s, width // s)

    def label(self, index: int, labels: Labeling) -> list[int]:
        """New ones; all that it reads and makes stays."""
        labels.pin(index - 1, f"is rearranged by the reorg, block {index}")
        labels.pin(index, "is made by a reorg")
        return labels.new(self.stride**2 * len(labels.output(index - 1)))


@dataclass(frozen=True, kw_only=True)
class Dropout(ChannelWise):
    """Dropout; the identity outside training, but counted as a block."""

    probability: float = key(Number(0, 0.999), 0.2)

    SILENT = "dropblock dropblock_size_abs dropblock_size_rel"
