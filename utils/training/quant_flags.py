"""The flags of quantization-aware training in train.py; no torch."""

from __future__ import annotations

import argparse

from utils.cli import Parser, log
from utils.darknet.blocks import Network
from utils.errors import InputError
from utils.quantization.grid import LEAST_BITS, MOST_BITS
from utils.quantization.scheme import SCHEMES, TARGETS, QuantSettings, check
from utils.training.settings import QuantPlan

OFF = (-1, 0)
ALSO_GOOGLE = 3
"""The README of the suites this one follows has it in the example for Google's scheme."""
SAYS_HOW = ("a_bit", "w_bit", "BN_Fold", "FPGA", "target", "dorefa_grid")
"""Flags that mean nothing without --quantized."""


def add_quant_flags(parser: Parser) -> None:
    """--quantized and what goes with it."""
    group = parser.add_argument_group("quantization-aware training")
    schemes = "1: Google (Jacob et al.), 2: DoReFa; 0 or -1: off"
    group.add_argument("--quantized", type=int, choices=(*OFF, *SCHEMES, ALSO_GOOGLE), default=-1,
                       metavar="{1,2}", help=f"round weights and activations as integer arithmetic does: {schemes} "
                       "(default: off)")  # fmt: skip
    bits = f"{LEAST_BITS} to {MOST_BITS}"
    group.add_argument("--a_bit", type=bit_count, metavar="N", help=f"bits of activations, {bits} (default: 8)")
    group.add_argument("--w_bit", type=bit_count, metavar="N", help=f"bits of weights, {bits} (default: the target's)")
    kinds = "; ".join(f"{name}: {target.what}" for name, target in TARGETS.items())
    group.add_argument("--target", choices=tuple(TARGETS), help=f"whose integer kernels: {kinds} (default: cpu)")
    folding = "fold batch normalisation into the weights before they are rounded"
    group.add_argument("--BN_Fold", "--BN_Flod", dest="BN_Fold", action="store_true", help=folding)
    group.add_argument("--FPGA", action="store_true", help="scales that are powers of two; the same as --target fpga")
    grid = "DoReFa's own levels, which have no 0 and cannot be exported"
    group.add_argument("--dorefa-grid", action="store_true", help=grid)


def bit_count(text: str) -> int:
    """Bits of a code; argparse type."""
    if not text.isdecimal() or not LEAST_BITS <= int(text) <= MOST_BITS:
        raise argparse.ArgumentTypeError(f"{text}: allowed are {LEAST_BITS} to {MOST_BITS} bits")
    return int(text)


def quant_plan(args: argparse.Namespace, network: Network | None = None) -> QuantPlan | None:
    """What the flags ask for; None without --quantized.

    Args:
        args: of train.py.
        network: to be quantized; None: it is not known yet.

    Raises:
        InputError: flags that contradict one another, or an activation that the target cannot compute.
    """
    if args.quantized in OFF:
        given = next((name for name in SAYS_HOW if getattr(args, name)), None)
        if given:
            flag = given.replace("_", "-") if given.startswith("dorefa") else given
            raise InputError(f"--{flag}: says how to quantize; add --quantized 1 or 2, or leave it out")
        return None
    if args.quantized == ALSO_GOOGLE:
        log("--quantized 3: is taken for 1, Google's scheme, as the README of earlier suites has it")
    scheme = SCHEMES.get(args.quantized, SCHEMES[1])
    if args.dorefa_grid and scheme != "dorefa":
        raise InputError("--dorefa-grid: goes with --quantized 2")
    if args.FPGA and args.target not in (None, "fpga"):
        raise InputError(f"--target {args.target}: contradicts --FPGA; leave one of them out")
    target = "fpga" if args.FPGA else args.target or "cpu"
    fold = args.BN_Fold or target == "fpga"
    if fold and not args.BN_Fold:
        log("--target fpga: folds batch normalisation (--BN_Fold), as powers of two are scales of the folded weights")
    settings = QuantSettings(
        scheme, target, args.w_bit or TARGETS[target].weight_bits, args.a_bit or 8, fold, args.dorefa_grid
    )
    if network is not None:
        check(network, settings)
    return QuantPlan(settings)
