"""`[convolutional]`, and `[depthwise]`, which is a convolution with one filter a channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.darknet.blocks.block import (
    ACTIVATION,
    Array,
    Arrays,
    Block,
    Keep,
    Key,
    Labeling,
    Position,
    Shape,
    Trail,
    Values,
    Vector,
    activated,
    key,
    windows,
    written_strides,
)
from utils.darknet.blocks.values import COUNT, PADDING, SIZE, Flag, SectionError

BN_EPSILON = 1e-5
"""Added to the variance, as AlexeyAB/darknet does (src/blas.c, `normalize_cpu`). OpenCV's Darknet importer adds 1e-6,
which moves raw heads of public weights by up to 8e-3 of their scale; folded, the two agree."""


@dataclass(frozen=True, kw_only=True)
class Convolutional(Block):
    """Convolution, optional batch normalisation, activation."""

    batch_normalize: bool = key(Flag(), False, optional=True)
    filters: int = key(COUNT, 1, told=True)
    size: int = key(SIZE, 1)
    stride = Key(SIZE, 1)
    stride_x: int = key(SIZE, None, default=1)
    stride_y: int = key(SIZE, None, default=1)
    pad = Key(Flag(any_number=True), False)
    padding: int = key(PADDING, 0, optional=True)
    """Zeros on each side; `pad=1` in a cfg means size // 2. Multiplied by `dilation`, as Darknet does."""
    groups: int = key(COUNT, 1, optional=True)
    dilation: int = key(SIZE, 1, optional=True)
    activation: str = key(ACTIVATION, "logistic", told=True)
    bias: bool = key(Flag(), True, optional=True)
    """Only looked at without batch normalisation, whose β is the bias otherwise."""

    SILENT = "angle assisted_excitation dot grad_centr reverse stream wait_stream"
    FIXED = (
        "antialiasing=0 bin_output=0 binary=0 cbn=0 coordconv=0 flipped=0 rotate=0 share_index stretch=0 "
        "stretch_sway=0 sway=0 xnor=0"
    )

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """`pad=1` means size // 2; a 1 × 1 kernel has no dilation."""
        stride, size = values.pop("stride"), values["size"]
        if values.pop("pad"):
            values["padding"] = size // 2
        values["dilation"] = values["dilation"] if size > 1 else 1
        values["stride_x"] = values["stride_x"] or stride
        values["stride_y"] = values["stride_y"] or stride
        return cls(**values)

    def key_values(self, position: Position) -> Values:
        """`pad=1` where it says the same as `padding`."""
        pad = self.padding == self.size // 2
        values = vars(self) | written_strides(self) | {"pad": pad}
        return values | {"padding": None} if pad else values

    def depthwise(self, channels: int) -> bool:
        """Whether there is one group, and one filter, a channel."""
        return self.groups > 1 and self.groups == channels == self.filters

    def step(self) -> tuple[int, int]:
        """The strides."""
        return self.stride_x, self.stride_y

    def shape(self, trail: Trail) -> Shape:
        """Windows that fit into the padded input."""
        for count, what in ((trail.before.channels, "input channels"), (self.filters, "filters")):
            if count % self.groups:
                raise SectionError(f"the {count} {what} cannot be split into {self.groups} equal groups", "groups")
        reach = self.dilation * (self.size - 1) + 1
        return Shape(self.filters, *windows(self, trail.before, 2 * self.padding * self.dilation, reach))

    def tensors(self, channels: int) -> list[tuple[str, tuple[int, ...]]]:
        """β, γ, μ, σ² or the bias, then the kernel [filters, inputs / groups, k, k]."""
        vectors = ["conv.bias"] * self.bias
        if self.batch_normalize:
            vectors = ["bn.bias", "bn.weight", "bn.running_mean", "bn.running_var"]
        kernel = (self.filters, channels // self.groups, self.size, self.size)
        return [*((name, kernel[:1]) for name in vectors), ("conv.weight", kernel)]

    def macs(self, channels: int, output: Shape) -> int:
        """Those of every filter in every cell."""
        return channels // self.groups * self.size**2 * output.channels * output.height * output.width

    def label(self, index: int, labels: Labeling) -> list[int]:
        """New labels; those of the input where it is depthwise. Channels of groups stay."""
        read = labels.output(index - 1)
        if self.depthwise(len(read)):
            return read
        if self.groups > 1:
            for block in (index, index - 1):
                labels.pin(block, f"meets the {self.groups} groups of the convolution, block {index}")
        return labels.new(self.filters)

    def pruned(self, width: int, channels: int, moved: Callable[[int], int]) -> Block:
        """A narrower convolution."""
        return replace(self, filters=width, groups=width if self.depthwise(channels) else self.groups)

    def sliced(self, name: str, array: Array, keep: Keep, read: Keep) -> Array:
        """Filters, and what they read unless that is one group each."""
        array = array[keep]
        return array[:, read] if name == "conv.weight" and self.groups == 1 else array

    def constant(self, arrays: Arrays, sources: Sequence[Vector], width: int) -> Vector:
        """f(β) with γ = 0; a depthwise convolution convolves a constant. Unknown without batch normalisation."""
        import numpy as np

        if not self.depthwise(len(sources[0])):
            return self.shifted(arrays)
        values = arrays["conv.weight"].astype(np.float64).sum((1, 2, 3)) * sources[0]
        if self.batch_normalize:
            gain = arrays["bn.weight"] / np.sqrt(arrays["bn.running_var"].astype(np.float64) + BN_EPSILON)
            values = (values - arrays["bn.running_mean"]) * gain + arrays["bn.bias"]
        elif self.bias:
            values = values + arrays["conv.bias"]
        return activated(self.activation, values)

    def shifted(self, arrays: Arrays) -> Vector:
        """f(β), the output with γ = 0; 0 without batch normalisation."""
        import numpy as np

        if not self.batch_normalize:
            return np.zeros(self.filters)
        return activated(self.activation, arrays["bn.bias"].astype(np.float64))

    def hands_on(self) -> bool:
        """False, as it takes constants up."""
        return False

    def take_up(self, arrays: Arrays, read: Vector) -> Arrays:
        """The bias, or the running mean; a convolution without bias cannot take anything up."""
        import numpy as np

        name, sign = ("bn.running_mean", -1) if self.batch_normalize else ("conv.bias", 1)
        if name not in arrays or not read.any():
            return {}
        sums = arrays["conv.weight"].astype(np.float64).sum((2, 3))
        groups = len(read) // sums.shape[1]
        shift = (sums.reshape(groups, -1, sums.shape[1]) @ read.reshape(groups, -1, 1)).ravel()
        return {name: (arrays[name] + sign * shift).astype(arrays[name].dtype)}


class Depthwise(Convolutional):
    """`[depthwise]` of the SpursLipu suite, as it is read: a `Convolutional` with other defaults."""

    filters: Any = Key(COUNT, None)
    size: Any = Key(SIZE, 3)
    groups: Any = Key(COUNT, None)
    activation: Any = Key(ACTIVATION, "linear")

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """`filters` and `groups` may be there if they are the channels; `pad=1` means (size - 1) // 2 in that suite."""
        for name in ("filters", "groups"):
            if values[name] not in (None, position.channels):
                raise SectionError(
                    f"one filter a channel is allowed, and the block before has {position.channels}", name
                )
            values[name] = position.channels
        if values["pad"]:
            values |= {"pad": False, "padding": (values["size"] - 1) // 2}
        return Convolutional.read(values, position)
