"""The flags of distillation in train.py; no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from utils.cli import Parser, log, number
from utils.distillation.strategies import AT, DEFAULT, KD, LARGEST_WEIGHT, Distillation, distillation
from utils.errors import InputError
from utils.model_files import ModelFiles, choose_model, is_checkpoint

SAYS_HOW = ("KDstr", "AT_str", "kd_weight")
"""Flags that mean nothing without a teacher."""


@dataclass(frozen=True)
class DistillationPlan:
    """A teacher and the terms that compare it with the student."""

    distillation: Distillation
    teacher: ModelFiles


def add_distil_flags(parser: Parser) -> None:
    """The teacher and the strategy."""
    group = parser.add_argument_group("distillation")
    group.add_argument("--t_cfg", metavar="FILE", help="network of the teacher; not needed where --t_weights is a .pt")
    group.add_argument("--t_weights", metavar="FILE", help="a trained network to learn from, .pt or .weights")
    strategies = "; ".join(f"{key}: {strategy.what}" for key, strategy in KD.items())
    group.add_argument(
        "--KDstr", choices=tuple(KD), help=f"what is learnt from it: {strategies} (default: {DEFAULT}, or none beside "
        "--AT_str)"
    )  # fmt: skip
    maps = "; ".join(f"{key}: {strategy.what}" for key, strategy in AT.items())
    group.add_argument("--AT_str", choices=tuple(AT), help=f"attention to learn, alone or beside --KDstr: {maps}")
    group.add_argument("--kd-weight", type=weight, metavar="X", help="factor on all that is learnt (default: 1)")


def weight(text: str) -> float:
    """A factor, 0 < value <= LARGEST_WEIGHT; argparse type."""
    if not 0 < (value := number(text)) <= LARGEST_WEIGHT:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 < value <= {LARGEST_WEIGHT:g}")
    return value


def distillation_plan(args: argparse.Namespace) -> DistillationPlan | None:
    """What the flags ask for; None without a teacher.

    With a teacher and no strategy, the one that measured best is entered into `args`, and that is said.

    Raises:
        InputError: flags that mean nothing without a teacher, a teacher without weights, files that do not fit.
    """
    if args.t_cfg is None and args.t_weights is None:
        given = next((name for name in SAYS_HOW if getattr(args, name)), None)
        if given:
            flag = given if given in ("KDstr", "AT_str") else given.replace("_", "-")
            raise InputError(f"--{flag}: there is nobody to learn from; add --t_weights (and --t_cfg for a .weights)")
        return None
    if args.t_weights is None:
        raise InputError(f"--t_cfg {args.t_cfg}: a teacher needs what it has learnt; add --t_weights")
    files = _teacher(args)
    if args.KDstr is None and args.AT_str is None:
        args.KDstr = DEFAULT
        log(f"--KDstr left out: taking {DEFAULT}, which measured best ({KD[DEFAULT].what}); there are --KDstr "
            f"{', '.join(KD)} and --AT_str {', '.join(AT)}")  # fmt: skip
    return DistillationPlan(distillation(args.KDstr, args.AT_str, args.kd_weight or 1.0), files)


def _teacher(args: argparse.Namespace) -> ModelFiles:
    path = Path(args.t_weights)
    if not is_checkpoint(path) and args.t_cfg is None:
        raise InputError(f"--t_weights {path}: a Darknet .weights file does not say its network; add --t_cfg")
    files = choose_model(args.t_cfg, args.t_weights)
    for note in files.notes:
        log(note)
    return files
