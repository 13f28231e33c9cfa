"""Grids, targets and settings of quantization, as values; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from utils.cli import command_of
from utils.darknet.blocks import (
    Avgpool,
    Block,
    Convolutional,
    Network,
    Route,
    Sam,
    ScaleChannels,
    Se,
    Shortcut,
)
from utils.darknet.targets import HARDWARE

LEAST_BITS, MOST_BITS = 2, 16
RELUS = ("linear", "relu", "relu6")
"""Activations that integer kernels take into the convolution."""
SHIFT_FACTOR, SHIFT_PLACES = 13, 7
SHIFT_SLOPE = SHIFT_FACTOR / 2**SHIFT_PLACES
"""Slope of leaky there: 0.1015625 in place of 0.1."""
BIAS_BITS = 16
FILE_BITS = 8
"""Of what ONNX's integer kernels compute with."""


@dataclass(frozen=True)
class Grid:
    """Integer codes q of a tensor x = scale · (q − zero point)."""

    bits: int = 8
    signed: bool = True
    """Codes around 0; otherwise from 0 on."""
    symmetric: bool = True
    """The zero point is 0 (signed) and the range reaches as far down as up."""
    per_channel: bool = False
    """A scale for each channel of dimension 0."""
    power_of_two: bool = False
    """Scales are powers of two, so that rescaling is a shift."""
    narrow: bool = True
    """A symmetric grid leaves the most negative code out, so that −x is there for every x."""
    half_even: bool = True
    """Ties go to the even neighbour, as in ONNX; otherwise away from 0, as much hardware does."""

    def __post_init__(self) -> None:
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(f"{self.bits} bits: allowed is {LEAST_BITS} <= bits <= {MOST_BITS}")
        if self.symmetric and not self.signed:
            raise ValueError("symmetric: needs signed codes")

    @cached_property
    def low(self) -> int:
        """Smallest code."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + (self.symmetric and self.narrow)

    @cached_property
    def high(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


@dataclass(frozen=True)
class Target:
    """Runtime, and the numbers its integer kernels compute with."""

    what: str
    weight_bits: int
    activations: Grid
    """Bits are replaced by those of the settings."""
    rounds_before: bool = True
    """An activation function that does not melt into the convolution is a kernel of its own, between two roundings."""
    leaky_slope: float | None = None
    """Slope of leaky in place of the float network's."""
    head_bits: int = 8
    """Least bits of the output of a head, with policy 8."""

    @property
    def power_of_two(self) -> bool:
        """Scales are powers of two, those of biases as well, and nothing is computed in float."""
        return self.activations.power_of_two


U8 = Grid(8, signed=False, symmetric=False)
S8 = Grid(8, narrow=False)
"""As integer arithmetic saturates."""
SHIFTS = replace(S8, power_of_two=True)
ARM = Target("ARM; signed activations", 8, Grid(8, symmetric=False))
TFLITE = ("tflite", "edgetpu", "ethos-u")
"""Targets whose integers are in TensorFlow Lite files; those of arm."""
TARGETS = {
    "cpu": Target("x86 without VNNI; 7-bit weights, as pairs of products saturate in 16 bits", 7, U8),
    "cpu-vnni": Target("x86 with VNNI", 8, U8),
    "arm": ARM,
    **{name: replace(ARM, what=HARDWARE[name].what) for name in TFLITE},
    "tensorrt": Target("TensorRT; symmetric activations", 8, S8, rounds_before=False),
    "fpga": Target("shifts in place of scales", 8, SHIFTS, False, leaky_slope=SHIFT_SLOPE, head_bits=16),
}
"""--target."""
POLICIES = {
    "float": "weights are not rounded",
    "8": "at least 8 bits, weights at least those of the target",
    "all": "as all others",
}
"""How the first and the last convolutions are rounded."""
SCHEMES: Mapping[int, str] = {1: "google", 2: "dorefa"}
"""--quantized."""


@dataclass(frozen=True)
class QuantSettings:
    """How a network is quantized; it is stored with the network."""

    scheme: str = "google"
    """A value of SCHEMES."""
    target: str = "cpu"
    weight_bits: int = 7
    activation_bits: int = 8
    fold: bool = False
    """Batch normalisation is folded before weights are rounded."""
    published: bool = False
    """DoReFa's own grid, which has no 0 and cannot be exported."""
    half_even: bool = True
    heads: str = "8"
    """The detection convolutions: a key of POLICIES."""
    first: str = "8"
    """The first convolution: a key of POLICIES."""
    kept: tuple[int, ...] = ()
    """Blocks whose convolutions stay float."""
    bias_bits: int = BIAS_BITS
    """Of biases where scales are powers of two; elsewhere they have 32."""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "bias_bits"):
            if not LEAST_BITS <= getattr(self, name) <= MOST_BITS:
                raise ValueError(f"{name} {getattr(self, name)}: allowed is {LEAST_BITS} <= bits <= {MOST_BITS}")
        if self.kernels.power_of_two and ("float" in (self.heads, self.first) or self.kept or self.published):
            raise ValueError(f"target {self.target}: has no float arithmetic, and no levels without a 0")

    @property
    def kernels(self) -> Target:
        """The target itself."""
        return TARGETS[self.target]

    def document(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `QuantSettings(**document)` is the same again."""
        return asdict(self)

    def activations(self, bits: int | None = None) -> Grid:
        """Grid of an activation; its bits unless `bits` says otherwise."""
        return replace(self.kernels.activations, bits=bits or self.activation_bits, half_even=self.half_even)


class ConvGrids(NamedTuple):
    """Grids of one convolution; None: not rounded."""

    weights: Grid | None
    output: Grid | None
    before: bool = False
    """The input of the activation function is rounded, too."""
    bias: Grid | None = None


def conv_grids(network: Network, index: int, settings: QuantSettings) -> ConvGrids:
    """Grids of the convolution that is block `index`."""
    block, kernels = network.blocks[index], settings.kernels
    head = index + 1 in network.heads
    policy = settings.heads if head else settings.first if index == 0 else "all"
    if policy == "float" or index in settings.kept:
        return ConvGrids(None, None if head else settings.activations())
    weight_bits, activation_bits = settings.weight_bits, settings.activation_bits
    if policy == "8":
        weight_bits = max(kernels.weight_bits, weight_bits)
        activation_bits = max(kernels.head_bits if head else 8, activation_bits)
    weights = Grid(weight_bits, per_channel=True, power_of_two=kernels.power_of_two, half_even=settings.half_even)
    before = kernels.rounds_before and getattr(block, "activation", "linear") not in RELUS
    bias = replace(weights, bits=settings.bias_bits) if kernels.power_of_two else None
    return ConvGrids(weights, settings.activations(activation_bits), before, bias)


def rounded_convolutions(network: Network, settings: QuantSettings) -> tuple[int, ...]:
    """Blocks of the convolutions whose weights are rounded."""
    convolutions = (index for index, block in enumerate(network.blocks) if isinstance(block, Convolutional))
    return tuple(index for index in convolutions if conv_grids(network, index, settings).weights is not None)


def simulated_only(settings: QuantSettings) -> str:
    """Reason why no int8 file can hold a network so quantized; empty if one can."""
    if settings.published:
        return "has DoReFa's own levels, none of them 0; train it without --dorefa-grid"
    if settings.activation_bits != FILE_BITS or settings.weight_bits > FILE_BITS:
        return (
            f"has activations of {settings.activation_bits} bits and weights of {settings.weight_bits}; ONNX's kernels "
            f"take {FILE_BITS}, and weights of fewer"
        )
    if not settings.half_even:
        return "rounds halves away from 0, ONNX to the even neighbour; quantize it with --round-half even"
    return ""


def export_command(settings: QuantSettings, data: object, weights: str, **flags: Any) -> str:
    """The command that exports the integers of a network so quantized, or measures it where no file holds them."""
    if settings.target != "fpga" and simulated_only(settings):
        return command_of("test.py", data=data, weights=weights, **flags)
    form: dict[str, Any] = {"int8": True, "format": "tflite" if settings.target in TFLITE else None}
    if settings.target in ("fpga", "tensorrt"):
        form = {"format": settings.target}
    return command_of("export.py", weights=weights, **form, **flags)


def notes(settings: QuantSettings) -> tuple[str, ...]:
    """Lines on what may surprise whoever chose the settings."""
    if settings.kernels.power_of_two:
        slope = f"{SHIFT_FACTOR}/{2**SHIFT_PLACES} = {SHIFT_SLOPE}"
        return (f"--target fpga: leaky has the slope {slope} in place of 0.1; batch normalisation is folded",)
    if reason := simulated_only(settings):
        return (f"test.py and detect.py will simulate this network, export.py --int8 will refuse it: it {reason}",)
    return ()


def passes(block: Block) -> bool:
    """Tell whether a block puts out values that it reads, so that they keep their grid."""
    computes = (Convolutional, Se, Avgpool, Shortcut, ScaleChannels, Sam)
    return not isinstance(block, computes) and not (isinstance(block, Route) and len(block.layers) > 1)
