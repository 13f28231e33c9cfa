"""What can be chosen about quantization, as values; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

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
from utils.errors import InputError
from utils.quantization.grid import LEAST_BITS, MOST_BITS, Grid

RELUS = ("linear", "relu", "relu6")
"""Activations that integer kernels take into the convolution."""
SHIFTABLE = ("linear", "relu", "relu6", "leaky")
"""Activations that an FPGA computes with shifts and additions."""
SHIFT_FACTOR, SHIFT_PLACES = 13, 7
SHIFT_SLOPE = SHIFT_FACTOR / 2**SHIFT_PLACES
"""Slope of leaky there: 0.1015625 in place of 0.1."""
BIAS_BITS = 16
FILE_BITS = 8
"""Of what ONNX's integer kernels compute with."""


@dataclass(frozen=True)
class Target:
    """A runtime, and what its integer kernels want."""

    what: str
    weight_bits: int
    activations: Grid
    """With `bits` to be replaced."""
    rounds_before: bool
    """An activation function that does not melt into the convolution is a kernel of its own, between two roundings."""
    weights_per_channel: bool = True
    power_of_two: bool = False
    """Scales are powers of two, those of biases as well, and nothing is computed in float."""
    leaky_slope: float | None = None
    """Slope of leaky in place of the float network's."""
    head_bits: int = 8
    """Least bits of what a head puts out, with policy 8."""


UNSIGNED = Grid(8, signed=False, symmetric=False)
SIGNED = Grid(8, narrow=False)
"""As integer arithmetic saturates."""
TARGETS = {
    "cpu": Target("x86 without VNNI; 7-bit weights, as pairs of products saturate in 16 bits", 7, UNSIGNED, True),
    "cpu-vnni": Target("x86 with VNNI", 8, UNSIGNED, True),
    "arm": Target("ARM; signed activations", 8, Grid(8, symmetric=False), True),
    "tensorrt": Target("TensorRT; symmetric activations", 8, SIGNED, False),
    "fpga": Target(
        "shifts in place of scales",
        8,
        replace(SIGNED, power_of_two=True),
        False,
        power_of_two=True,
        leaky_slope=SHIFT_SLOPE,
        head_bits=16,
    ),
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

    scheme: Literal["google", "dorefa"] = "google"
    target: str = "cpu"
    weight_bits: int = 7
    activation_bits: int = 8
    fold: bool = False
    """Batch normalisation is folded before weights are rounded."""
    published: bool = False
    """DoReFa's own grid, which has no 0 and cannot be exported."""
    half_even: bool = True
    heads: Literal["float", "8", "all"] = "8"
    """The detection convolutions: a key of POLICIES."""
    first: Literal["float", "8", "all"] = "8"
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
        """What the target wants."""
        return TARGETS[self.target]

    def document(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `QuantSettings(**document)` is the same again."""
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """How one convolution is rounded; None: not at all."""

    weights: Grid | None
    output: Grid | None
    before: bool
    """Also before the activation function."""
    bias: Grid | None = None


def place(network: Network, index: int, settings: QuantSettings) -> Place:
    """The grids of the convolution that is a block of the network."""
    block, kernels = network.blocks[index], settings.kernels
    assert isinstance(block, Convolutional)
    head, first = index + 1 in network.heads, index == 0
    policy = settings.heads if head else settings.first if first else "all"
    if policy == "float" or index in settings.kept:
        return Place(None, None if head else activations(settings), False)
    weight_bits, activation_bits = settings.weight_bits, settings.activation_bits
    if policy == "8":
        least = kernels.head_bits if head else 8
        weight_bits, activation_bits = max(kernels.weight_bits, weight_bits), max(least, activation_bits)
    weights = Grid(weight_bits, per_channel=kernels.weights_per_channel, power_of_two=kernels.power_of_two,
                   half_even=settings.half_even)  # fmt: skip
    before = kernels.rounds_before and block.activation not in RELUS
    bias = replace(weights, bits=settings.bias_bits, per_channel=True) if kernels.power_of_two else None
    return Place(weights, activations(settings, activation_bits), before, bias)


def rounded_convolutions(network: Network, settings: QuantSettings) -> tuple[int, ...]:
    """The convolutions whose weights are rounded."""
    return tuple(
        index
        for index, block in enumerate(network.blocks)
        if isinstance(block, Convolutional) and place(network, index, settings).weights is not None
    )


def check(network: Network, settings: QuantSettings) -> None:
    """Refuse a network that the target cannot compute.

    Raises:
        InputError: names the block.
    """
    for index, block in enumerate(network.blocks) if settings.kernels.power_of_two else ():
        if reason := _needs_more_than_shifts(block):
            raise InputError(f"{network.where(index)}: {reason}")


def _needs_more_than_shifts(block: Block) -> str:
    """What a block has that neither integers nor shifts compute; empty if nothing."""
    activation = getattr(block, "activation", "linear")
    if activation not in SHIFTABLE:
        return (f"{activation} has no form in shifts; --target fpga takes {', '.join(SHIFTABLE)}; take a cfg with "
                "leaky, such as cfg/yolov4-leaky.cfg, and train it")  # fmt: skip
    if isinstance(block, Se | Avgpool) or (isinstance(block, Shortcut) and block.weights_type != "none"):
        kind = "a weighted shortcut" if isinstance(block, Shortcut) else f"[{type(block).__name__.lower()}]"
        return f"{kind} has no form in shifts; take another --target, or a cfg without it"
    return ""


def simulated_only(settings: QuantSettings) -> str:
    """Why no int8 file can hold a network so quantized; empty if one can."""
    if settings.published:
        return "has DoReFa's own levels, none of them 0; train it without --dorefa-grid"
    if settings.activation_bits != FILE_BITS or settings.weight_bits > FILE_BITS:
        return (f"has activations of {settings.activation_bits} bits and weights of {settings.weight_bits}; ONNX's "
                f"kernels take {FILE_BITS}, and weights of fewer")  # fmt: skip
    if not settings.half_even:
        return "rounds halves away from 0, ONNX to the even neighbour; quantize it with --round-half even"
    return ""


def notes(settings: QuantSettings) -> tuple[str, ...]:
    """What may surprise whoever chose the settings, one line each."""
    if settings.kernels.power_of_two:
        slope = f"{SHIFT_FACTOR}/{2**SHIFT_PLACES} = {SHIFT_SLOPE}"
        return (f"--target fpga: leaky has the slope {slope} in place of 0.1; batch normalisation is folded",)
    reason = simulated_only(settings)
    return (f"test.py and detect.py will simulate this network, export.py --int8 will refuse it: it {reason}",
            ) if reason else ()  # fmt: skip


def passes(block: Block) -> bool:
    """Whether a block puts out values that it reads, so that they keep their grid."""
    computes = (Convolutional, Se, Avgpool, Shortcut, ScaleChannels, Sam)
    return not isinstance(block, computes) and not (isinstance(block, Route) and len(block.layers) > 1)


def activations(settings: QuantSettings, bits: int | None = None) -> Grid:
    """The grid of an activation that is no convolution's, or of one with other `bits`."""
    return replace(settings.kernels.activations, bits=bits or settings.activation_bits, half_even=settings.half_even)
