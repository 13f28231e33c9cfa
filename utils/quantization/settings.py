"""Flags that say how a network is quantized, in train.py and quantize.py, as settings; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from utils.cli import bounded, flag, integer, points, positive_int, random_seed
from utils.darknet.data_file import DataConfig
from utils.darknet.targets import HARDWARE
from utils.errors import DataError, InputError
from utils.model_files import ModelFiles
from utils.quantization.scheme import BIAS_BITS, LEAST_BITS, MOST_BITS, POLICIES, TARGETS, QuantSettings

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
        metavar="N",
    )
    seed: int = flag(0, "of their choice (default: 0)", type=random_seed, metavar="N")
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
        "let one after the other be float, until no more than P points of AP50 are lost, 0 < P <= 100",
        type=points,
        metavar="P",
    )
    batch_size: int = flag(16, "images at a time", type=positive_int, metavar="N")
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
