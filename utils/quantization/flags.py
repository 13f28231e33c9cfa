"""The flags that say how a network is quantized, in train.py and quantize.py; no torch."""

from __future__ import annotations

import argparse

from utils.errors import InputError
from utils.flags import Group
from utils.quantization.grid import LEAST_BITS, MOST_BITS
from utils.quantization.scheme import BIAS_BITS, POLICIES, TARGETS, QuantSettings

SAYS_HOW = ("a_bit", "w_bit", "b_bit", "BN_Fold", "FPGA", "target", "quant_heads", "quant_first", "round_half")
"""Names of the flags; each is None or False unless given."""
ROUNDINGS = {"even": True, "away": False}
"""--round-half."""


def add_scheme_flags(group: Group, *, folds: bool = True) -> None:
    """Bits, target, policies.

    Args:
        group: of the parser.
        folds: whether folding is a choice.
    """
    bits = f"{LEAST_BITS} to {MOST_BITS}"
    group.add_argument("--a_bit", type=bit_count, metavar="N", help=f"bits of activations, {bits} (default: 8)")
    group.add_argument("--w_bit", type=bit_count, metavar="N", help=f"bits of weights, {bits} (default: the target's)")
    biases = f"bits of biases, with --FPGA, {bits} (default: {BIAS_BITS})"
    group.add_argument("--b_bit", type=bit_count, metavar="N", help=biases)
    kinds = "; ".join(f"{name}: {target.what}" for name, target in TARGETS.items())
    group.add_argument("--target", choices=tuple(TARGETS), help=f"whose integer kernels: {kinds} (default: cpu)")
    if folds:
        folding = "fold batch normalisation into the weights before they are rounded"
        group.add_argument("--BN_Fold", "--BN_Flod", dest="BN_Fold", action="store_true", help=folding)
    group.add_argument("--FPGA", action="store_true", help="scales that are powers of two; the same as --target fpga")
    policies = "; ".join(f"{name}: {what}" for name, what in POLICIES.items())
    heads = "the detection convolutions, and what they put out"
    for name, which in (("heads", heads), ("first", "the first convolution")):
        group.add_argument(f"--quant-{name}", choices=tuple(POLICIES), help=f"{which}: {policies} (default: 8)")
    ties = "where a value lies between two levels: the even one, as in ONNX, or away from 0, as much hardware does"
    group.add_argument("--round-half", choices=tuple(ROUNDINGS), help=f"{ties} (default: even)")


def bit_count(text: str) -> int:
    """Bits of a code; argparse type."""
    if not text.isdecimal() or not LEAST_BITS <= int(text) <= MOST_BITS:
        raise argparse.ArgumentTypeError(f"{text}: allowed are {LEAST_BITS} to {MOST_BITS} bits")
    return int(text)


def flag_name(name: str) -> str:
    """A flag as it is typed."""
    return f"--{name}" if name in ("a_bit", "w_bit", "b_bit", "BN_Fold") else f"--{name.replace('_', '-')}"


def settings_of(
    args: argparse.Namespace, scheme: str = "google", *, published: bool = False, folds: bool = False
) -> QuantSettings:
    """What the flags of `add_scheme_flags` say.

    Args:
        args: with those flags.
        scheme: a value of SCHEMES.
        published: DoReFa's own grid.
        folds: batch normalisation is folded without being asked for.

    Raises:
        InputError: flags that contradict one another.
    """
    if args.FPGA and args.target not in (None, "fpga"):
        raise InputError(f"--target {args.target}: contradicts --FPGA; leave one of them out")
    target = "fpga" if args.FPGA else args.target or "cpu"
    asked = folds or args.BN_Fold
    if target == "fpga":
        _check_shifts(args, published)
    elif args.b_bit:
        raise InputError("--b_bit: goes with --FPGA; elsewhere biases have 32 bits")
    return QuantSettings(
        scheme,
        target,
        args.w_bit or TARGETS[target].weight_bits,
        args.a_bit or 8,
        asked or target == "fpga",
        published,
        half_even=ROUNDINGS[args.round_half or "even"],
        heads=args.quant_heads or "8",
        first=args.quant_first or "8",
        bias_bits=args.b_bit or BIAS_BITS,
    )


def _check_shifts(args: argparse.Namespace, published: bool) -> None:
    """Refuse what shifts cannot compute."""
    for name in ("quant_heads", "quant_first"):
        if getattr(args, name) == "float":
            raise InputError(f"{flag_name(name)} float: --target fpga has no float arithmetic; take 8 or all")
    if published:
        raise InputError("--dorefa-grid: has no 0, which integers need; leave it out with --target fpga")
