"""The flags of quantization-aware training in train.py; no torch."""

from __future__ import annotations

import argparse

from utils.cli import Parser, fraction, log
from utils.darknet.blocks import Network
from utils.errors import InputError
from utils.quantization.flags import SAYS_HOW, add_scheme_flags, flag_name, settings_of
from utils.quantization.scheme import SCHEMES, check, notes
from utils.training.settings import QuantPlan

OFF = (-1, 0)
ALSO_GOOGLE = 3
"""The README of the suites this one follows has it in the example for Google's scheme."""


def add_quant_flags(parser: Parser) -> None:
    """--quantized and what goes with it."""
    group = parser.add_argument_group("quantization-aware training")
    schemes = "1: Google (Jacob et al.), 2: DoReFa's weights, with Google's bounds of activations in place of DoReFa's "
    schemes += "clamp to 0…1; 0 or -1: off"
    group.add_argument("--quantized", type=int, choices=(*OFF, *SCHEMES, ALSO_GOOGLE), default=-1,
                       metavar="{1,2}", help=f"round weights and activations as integer arithmetic does: {schemes} "
                       "(default: off)")  # fmt: skip
    add_scheme_flags(group)
    warm = "share of the steps in which bits fall to those asked for, 0 <= S < 1"
    group.add_argument("--bit-warmup", type=fraction, metavar="S", help=f"{warm} (default: 0)")
    grid = "DoReFa's own levels, which have no 0 and cannot be exported"
    group.add_argument("--dorefa-grid", action="store_true", help=grid)


def quant_plan(args: argparse.Namespace, network: Network | None = None) -> QuantPlan | None:
    """What the flags ask for; None without --quantized.

    Args:
        args: of train.py.
        network: to be quantized; None: it is not known yet.

    Raises:
        InputError: flags that contradict one another, or an activation that the target cannot compute.
    """
    if args.quantized in OFF:
        given = next((name for name in (*SAYS_HOW, "dorefa_grid", "bit_warmup") if getattr(args, name)), None)
        if given:
            raise InputError(f"{flag_name(given)}: says how to quantize; add --quantized 1 or 2, or leave it out")
        return None
    if args.quantized == ALSO_GOOGLE:
        log("--quantized 3: is taken for 1, Google's scheme, as the README of earlier suites has it")
    scheme = SCHEMES.get(args.quantized, SCHEMES[1])
    if args.dorefa_grid and scheme != "dorefa":
        raise InputError("--dorefa-grid: goes with --quantized 2")
    settings = settings_of(args, scheme, published=args.dorefa_grid)
    if network is not None:
        check(network, settings)
        for note in notes(settings):
            log(note)
    return QuantPlan(settings, bit_warmup=args.bit_warmup or 0.0)
