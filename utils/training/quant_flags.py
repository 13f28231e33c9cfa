"""The flags of quantization-aware training in train.py; no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from utils.cli import Parser, flag, fraction, log, settings_from
from utils.darknet.blocks import Network
from utils.errors import InputError
from utils.quantization.scheme import SCHEMES, check, notes
from utils.quantization.settings import SchemeFlags
from utils.training.settings import QuantPlan

OFF = (-1, 0)
ALSO_GOOGLE = 3
"""The README of the suites this one follows has it in the example for Google's scheme."""
UNDERSCORED = ("a_bit", "w_bit", "b_bit", "BN_Fold")
"""Flags that are documented with an underscore."""


@dataclass(frozen=True)
class QuantFlags(SchemeFlags):
    """--quantized and the flags that go with it."""

    quantized: int = flag(
        -1,
        "round weights and activations as integer arithmetic does: 1: Google (Jacob et al.), 2: DoReFa's weights, with "
        "Google's bounds of activations in place of DoReFa's clamp to 0…1; 0 or -1: off (default: off)",
        type=int,
        choices=(*OFF, *SCHEMES, ALSO_GOOGLE),
        metavar="{1,2}",
    )
    BN_Fold: bool = flag(
        False, "fold batch normalisation into the weights before they are rounded", "--BN_Fold", "--BN_Flod"
    )
    bit_warmup: float | None = flag(
        None,
        "share of the steps in which bits fall to those asked for, 0 <= S < 1 (default: 0)",
        type=fraction,
        metavar="S",
    )
    dorefa_grid: bool = flag(False, "DoReFa's own levels, which have no 0 and cannot be exported")


def add_quant_flags(parser: Parser) -> None:
    """--quantized and what goes with it."""
    parser.add_settings("quantization-aware training", QuantFlags)


def quant_plan(args: argparse.Namespace, network: Network | None = None) -> QuantPlan | None:
    """What the flags ask for; None without --quantized.

    Args:
        args: of train.py.
        network: to be quantized; None: it is not known yet.

    Raises:
        InputError: flags that contradict one another, or an activation that the target cannot compute.
    """
    if args.quantized in OFF:
        names = [field.name for field in fields(QuantFlags) if field.name != "quantized"]
        if name := next((name for name in names if getattr(args, name)), None):
            spelled = name if name in UNDERSCORED else name.replace("_", "-")
            raise InputError(f"--{spelled}: says how to quantize; add --quantized 1 or 2, or leave it out")
        return None
    if args.quantized == ALSO_GOOGLE:
        log("--quantized 3: is taken for 1, Google's scheme, as the README of earlier suites has it")
    scheme = SCHEMES.get(args.quantized, SCHEMES[1])
    if args.dorefa_grid and scheme != "dorefa":
        raise InputError("--dorefa-grid: goes with --quantized 2")
    flags = settings_from(args, QuantFlags)
    settings = flags.settings(scheme, fold=flags.BN_Fold, published=flags.dorefa_grid)
    if network is not None:
        check(network, settings)
        for note in notes(settings):
            log(note)
    return QuantPlan(settings, bit_warmup=flags.bit_warmup or 0.0)
