"""`[convolutional]`, and `[depthwise]`, which is a convolution with one filter a channel."""

from __future__ import annotations

from dataclasses import dataclass

from utils.darknet.blocks.block import (
    ACTIVATION,
    COUNT,
    PADDING,
    SIZE,
    Block,
    Key,
    Place,
    Shape,
    Trail,
    Values,
    key,
    windows,
    written_strides,
)
from utils.darknet.blocks.values import Flag, SectionError

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
    def read(cls, values: Values, place: Place) -> Block:
        """`pad=1` means size // 2; a 1 × 1 kernel has no dilation."""
        stride, size = values.pop("stride"), values["size"]
        if values.pop("pad"):
            values["padding"] = size // 2
        values["dilation"] = values["dilation"] if size > 1 else 1
        values["stride_x"] = values["stride_x"] or stride
        values["stride_y"] = values["stride_y"] or stride
        return cls(**values)

    def written(self, place: Place) -> Values:
        """`pad=1` where it says the same as `padding`."""
        pad = self.padding == self.size // 2
        values = vars(self) | written_strides(self) | {"pad": pad}
        return values | {"padding": None} if pad else values

    def depthwise(self, channels: int) -> bool:
        """Whether each channel of the output is made from the same channel of the `channels` inputs."""
        return self.groups > 1 and self.groups == channels == self.filters

    def step(self) -> tuple[int, int]:
        """The strides."""
        return self.stride_x, self.stride_y

    def shape(self, trail: Trail) -> Shape:
        """Windows that fit into the padded input."""
        channels, height, width = trail.before
        for count, what in ((channels, "input channels"), (self.filters, "filters")):
            if count % self.groups:
                raise SectionError(f"the {count} {what} cannot be split into {self.groups} equal groups", "groups")
        reach = self.dilation * (self.size - 1) + 1
        padding = 2 * self.padding * self.dilation
        return Shape(
            self.filters,
            windows(height + padding, reach, self.stride_y),
            windows(width + padding, reach, self.stride_x),
        )

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


class Depthwise(Convolutional):
    """`[depthwise]` of the SpursLipu suite, as it is read: a `Convolutional` with other defaults."""

    filters = Key(COUNT, None)
    size = Key(SIZE, 3)
    groups = Key(COUNT, None)
    activation = Key(ACTIVATION, "linear")

    @classmethod
    def read(cls, values: Values, place: Place) -> Block:
        """`filters` and `groups` may be there if they are the channels; `pad=1` means (size - 1) // 2 in that suite."""
        for name in ("filters", "groups"):
            if values[name] not in (None, place.channels):
                raise SectionError(f"one filter a channel is allowed, and the block before has {place.channels}", name)
            values[name] = place.channels
        if values["pad"]:
            values |= {"pad": False, "padding": (values["size"] - 1) // 2}
        return Convolutional.read(values, place)
