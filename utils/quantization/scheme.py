"""Grids, targets and settings of quantization as values, and the flags that stand for them; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from utils.cli import bounded, command_of, flag, integer, points, positive_int, random_seed
from utils.darknet.blocks import Block, Convolutional, Dropout, Maxpool, Network, Reorg, Route, Upsample, Yolo
from utils.darknet.data_file import DataConfig
from utils.darknet.targets import HARDWARE
from utils.errors import DataError, InputError
from utils.flags import ModelFiles

LEAST_BITS, MOST_BITS = 2, 16
RELUS = ("linear", "relu", "relu6")
"""Activations that integer kernels take into the convolution."""
GATES = ("logistic", "hardsigmoid")
"""Activations with values of 0…1, whatever they read: their codes have the bounds 0 and 1 − 2^-bits."""
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
    """An activation that is not fused into the convolution is a separate kernel, whose input and output are rounded."""
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
        return "has DoReFa's own levels, none of them 0; train it again, as --quantized 2 has a level at 0 now"
    if settings.activation_bits != FILE_BITS or settings.weight_bits > FILE_BITS:
        return (
            f"has activations of {settings.activation_bits} bits and weights of {settings.weight_bits}; ONNX's kernels "
            f"take {FILE_BITS}, and weights of fewer"
        )
    if not settings.half_even:
        return "rounds halves away from 0, ONNX to the even neighbour; quantize it with --round-half even"
    return ""


def export_command(
    settings: QuantSettings, data: DataConfig, weights: str, *, single_cls: bool = False, **flags: Any
) -> str:
    """The command that exports the integers of a network so quantized, or measures it where no file holds them.

    Args:
        settings: of the network.
        data: it is measured on its training images if it names no others.
        weights: the network.
        single_cls: it was trained with all classes as one.
        flags: of both commands.
    """
    if settings.target != "fpga" and simulated_only(settings):
        flags |= {"single-cls": single_cls, "split": None if data.valid else "train"}
        return command_of("test.py", data=data.path, weights=weights, **flags)
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
    """Tell whether a block only selects or moves values that it reads, so that they keep their grid.

    A kind that is not listed counts as one that computes: its output gets a quantizer.
    """
    moves = (Dropout, Maxpool, Reorg, Upsample, Yolo)
    return isinstance(block, moves) or (isinstance(block, Route) and len(block.layers) == 1)


BITS = f"{LEAST_BITS} to {MOST_BITS}"
bit_count = bounded(integer, lambda bits: LEAST_BITS <= bits <= MOST_BITS, f": allowed are {BITS} bits")
KERNELS = "; ".join(f"{name}: {target.what}" for name, target in TARGETS.items())
CHOICES = "; ".join(f"{name}: {text}" for name, text in POLICIES.items())
PICTURES = 128
"""Calibration pictures unless --calib says how many, if there are as many."""
OBSERVED: Mapping[str, str] = {
    "minmax": "the whole range",
    "mse": "least square error of what is handed on",
    "cosine": "smallest angle between what is handed on and what is in float",
}
"""--observer; `calibration.COSTS` has the functions."""
AUTO = "auto"
"""The one of OBSERVED that leaves least noise in the heads."""
ENDS = "; ".join(f"{name}: {text}" for name, text in OBSERVED.items())


@dataclass(frozen=True)
class SchemeFlags:
    """Bits, target and policies; None where the target or QuantSettings decide."""

    a_bit: int | None = flag(None, f"bits of activations, {BITS} (default: 8)", "--a_bit", type=bit_count, metavar="N")
    w_bit: int | None = flag(
        None, f"bits of weights, {BITS} (default: the target's)", "--w_bit", type=bit_count, metavar="N"
    )
    b_bit: int | None = flag(
        None, f"bits of biases, with --FPGA, {BITS} (default: {BIAS_BITS})", "--b_bit", type=bit_count, metavar="N"
    )
    target: str | None = flag(None, f"integer kernels to round for; {KERNELS} (default: cpu)", choices=tuple(HARDWARE))
    FPGA: bool = flag(False, "scales that are powers of two; the same as --target fpga", "--FPGA")
    quant_heads: str | None = flag(
        None, f"the detection convolutions and their outputs; {CHOICES} (default: 8)", choices=tuple(POLICIES)
    )
    quant_first: str | None = flag(None, f"the first convolution; {CHOICES} (default: 8)", choices=tuple(POLICIES))
    round_half: str | None = flag(
        None,
        "a value between two levels becomes the even one, as in ONNX, or the one away from 0, as in much hardware "
        "(default: even)",
        choices=("even", "away"),
    )

    def settings(self, scheme: str = "google", *, fold: bool) -> QuantSettings:
        """Settings that the flags stand for.

        Args:
            scheme: a value of SCHEMES.
            fold: batch normalisation is folded; an FPGA always wants that.

        Raises:
            InputError: flags that contradict one another.
        """
        if self.FPGA and self.target not in (None, "fpga"):
            raise InputError(f"--target {self.target}: contradicts --FPGA; leave one of them out")
        target = "fpga" if self.FPGA else self.target or "cpu"
        if target not in TARGETS:
            raise InputError(f"--target {target}: {HARDWARE[target].tools} quantizes for it; export a float file")
        if self.b_bit and target != "fpga":
            raise InputError("--b_bit: goes with --FPGA; elsewhere biases have 32 bits")
        for name, policy in (("heads", self.quant_heads), ("first", self.quant_first)):
            if policy == "float" and target == "fpga":
                raise InputError(f"--quant-{name} float: --target fpga has no float arithmetic; take 8 or all")
        return QuantSettings(
            scheme,
            target,
            self.w_bit or TARGETS[target].weight_bits,
            self.a_bit or 8,
            fold or target == "fpga",
            half_even=self.round_half != "away",
            heads=self.quant_heads or "8",
            first=self.quant_first or "8",
            bias_bits=self.b_bit or BIAS_BITS,
        )


@dataclass(frozen=True)
class QuantRequest:
    """Quantization after training, checked as far as it can be without torch."""

    files: ModelFiles
    data: DataConfig
    scheme: QuantSettings
    sides: tuple[int, ...] | None = None
    """Of the network input, as `cli.input_size` takes them."""
    mode: Literal["letterbox", "stretch"] = "letterbox"
    device: str = ""
    calib: int | None = flag(
        None,
        f"train images that the bounds come from (default: {PICTURES}, or all if there are fewer)",
        type=positive_int,
    )
    seed: int = flag(0, "seed that chooses these images (default: 0)", type=random_seed)
    observer: str = flag(
        AUTO, f"end of a range; {ENDS}; {AUTO}: the one that leaves least noise in the heads", choices=(*OBSERVED, AUTO)
    )
    bias_correction: bool = flag(False, "let every convolution have the mean that it had in float (arXiv:1906.04721)")
    keep_float: int = flag(
        0,
        "convolutions that stay float, those that alone do most harm to the heads (default: none)",
        type=positive_int,
        metavar="K",
    )
    max_drop: float | None = flag(
        None,
        "keep convolutions float, one after the other, until at most P points of AP50 are lost, 0 < P <= 100",
        type=points,
    )
    batch_size: int = flag(16, "images at a time", type=positive_int)
    test: bool = flag(True, "do not measure accuracy (default: measure it)", "--no-test", action="store_false")

    def __post_init__(self) -> None:
        if self.data.train is None:
            raise DataError(f"{self.data.path}: names no train images, which the calibration needs")
        if self.keep_float and self.max_drop is not None:
            raise InputError("--max-drop: not allowed with --keep-float; leave one of them out")
        if self.scheme.target == "fpga" and self.ranks:
            name = "--keep-float" if self.keep_float else "--max-drop"
            raise InputError(f"{name}: --target fpga has no float arithmetic; leave one of them out")
        if self.max_drop is not None and not self.test:
            raise InputError("--max-drop: has to measure; leave out --no-test")
        if self.test and self.data.valid is None:
            raise DataError(f"{self.data.path}: names no valid images to measure on; --no-test works without")

    @property
    def ranks(self) -> bool:
        """Tell whether the harm of each convolution alone is needed."""
        return self.keep_float > 0 or self.max_drop is not None
