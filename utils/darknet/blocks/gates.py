"""What scales feature maps: `[se]`, `[scale_channels]` and `[sam]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from utils.darknet.blocks.block import (
    PLAIN_ACTIVATION,
    Array,
    Block,
    Keep,
    Key,
    Labeling,
    Position,
    Shape,
    Trail,
    Values,
    key,
)
from utils.darknet.blocks.values import COUNT, SOURCE, SectionError


@dataclass(frozen=True, kw_only=True)
class Se(Block):
    """Squeeze and excite (`[se]` of the SpursLipu suite): pool, fc, relu, fc, hard sigmoid, scale; no biases."""

    filters: int = key(COUNT, None)
    """Width of the squeezed vector; in a cfg that of the input, which `reduction` divides."""
    reduction = Key(COUNT, 4)
    squeeze = Key(COUNT, None)
    """A key of our own, which gives any width."""

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """The width is `squeeze`, or the channels over `reduction`."""
        channels, squeeze, reduction = position.channels, values.pop("squeeze"), values.pop("reduction")
        if values["filters"] not in (None, channels):
            raise SectionError(f"{channels} is allowed, the channels of the block before", "filters")
        values["filters"] = squeeze or channels // reduction
        if not values["filters"]:
            raise SectionError(f"at most {channels} is allowed, the channels of the block before", "reduction")
        return cls(**values)

    def key_values(self, position: Position) -> Values:
        """`reduction` where one gives the width, `squeeze` otherwise."""
        reduction = max(1, position.channels // self.filters)
        if position.channels // reduction == self.filters:
            return {"filters": position.channels, "reduction": reduction}
        return {"filters": position.channels, "squeeze": self.filters}

    def tensors(self, channels: int) -> list[tuple[str, tuple[int, ...]]]:
        """Both fully connected layers, [out, in]."""
        return [("fc1.weight", (self.filters, channels)), ("fc2.weight", (channels, self.filters))]

    def sliced(self, name: str, array: Array, keep: Keep, read: Keep) -> Array:
        """Columns of the first layer, rows of the second."""
        return array[:, keep] if name == "fc1.weight" else array[keep]

    def macs(self, channels: int, output: Shape) -> int:
        """Those of the fully connected layers."""
        return 2 * channels * self.filters


@dataclass(frozen=True, kw_only=True)
class Gate(Block):
    """`source` times the previous block."""

    TIES: ClassVar[str]
    """Reason why both have the same channels."""

    from_ = Key(SOURCE)
    source: int
    activation: str = key(PLAIN_ACTIVATION, "linear", optional=True)

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """The reference becomes absolute."""
        return cls(source=position.absolute(values.pop("from")), **values)

    def key_values(self, position: Position) -> Values:
        """The reference becomes relative."""
        return vars(self) | {"from": self.source - position.number}

    def reads(self, index: int) -> tuple[int, ...]:
        """The previous block, which scales, then the scaled source."""
        return (index - 1, self.source)

    def basis(self, index: int) -> int:
        """The source."""
        return self.source

    def label(self, index: int, labels: Labeling) -> list[int]:
        """Those of the source, which are the previous block's, too."""
        labels.tie(self.TIES, index, index - 1, self.source)
        return labels.output(self.source)

    def pruned(self, width: int, channels: int, moved: Callable[[int], int]) -> Block:
        """The same of the source that stays."""
        return replace(self, source=moved(self.source))


@dataclass(frozen=True, kw_only=True)
class ScaleChannels(Gate):
    """`source` scaled channel by channel with the previous block, which is 1 × 1 (`[scale_channels]`)."""

    FIXED = "scale_wh=0"
    TIES = "scaled by the scale_channels"

    def shape(self, trail: Trail) -> Shape:
        """That of the source."""
        (source,) = trail.read((self.source,), "from")
        channels, height, width = trail.before
        if (height, width) != (1, 1):
            raise SectionError(
                f"the block before has {height} x {width} cells; 1 x 1 is allowed, as an [avgpool] gives"
            )
        if channels != source.channels:
            raise SectionError(
                f"block {self.source} has {source.channels} channels, but the block before {channels}; one factor for "
                "each channel is needed",
                "from",
            )
        return source


@dataclass(frozen=True, kw_only=True)
class Sam(Gate):
    """`source` times the previous block, cell by cell (spatial attention module)."""

    TIES = "multiplied by the sam"

    def shape(self, trail: Trail) -> Shape:
        """That of the source."""
        (source,) = trail.read((self.source,), "from")
        if source != trail.before:
            raise SectionError(
                f"block {self.source} is {source}, but the block before {trail.before}; a product needs equal shapes",
                "from",
            )
        return source
