"""The flags of sparse training in train.py; no torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from utils.cli import Parser, number, threshold
from utils.errors import InputError
from utils.pruning.candidates import SETS
from utils.pruning.sparsity import AUTO, LARGEST_S, SCHEDULES, SparseSettings

SOLVERS = ("subgradient", "proximal")
DEFAULT = SparseSettings()


def add_sparse_flags(parser: Parser) -> None:
    """-sr and what goes with it."""
    group = parser.add_argument_group("sparse training")
    squeeze = "press on γ of the channels that pruning may remove; best.pt is then the last epoch, the sparsest"
    group.add_argument("-sr", "--sparsity-regularization", dest="sr", action="store_true", help=squeeze)
    rate = f"strength, or {AUTO}: what can bring --s-share of the channels to zero (default: {DEFAULT.s})"
    group.add_argument("--s-rate", "--s", dest="s", type=rate_or_auto, metavar="S", help=rate)
    sets = "; ".join(f"{key}: {text}" for key, text in SETS.items())
    group.add_argument(
        "--prune", type=int, choices=tuple(SETS), help=f"which channels: {sets} (default: {DEFAULT.prune})"
    )
    kinds = "dynamic: from --s-turn on only the weakest --s-keep feel all of s, the others a hundredth; constant; " \
            "global: all a hundredth from --s-turn on (default: dynamic)"  # fmt: skip
    group.add_argument("--s-schedule", choices=tuple(SCHEDULES), help=kinds)
    turns = ", ".join(f"{name} {rates.turn:g}" for name, rates in SCHEDULES.items() if rates.turn < 1)
    turn = "share of the epochs after which the rate turns; where it is a whole number of epochs, the authors' code of "
    turn += f"dynamic turns one epoch later (default: {turns})"
    group.add_argument("--s-turn", type=threshold, metavar="P", help=turn)
    keep = f"share of the channels that dynamic keeps under pressure (default: {SCHEDULES['dynamic'].weakest:g})"
    group.add_argument("--s-keep", type=threshold, metavar="P", help=keep)
    solver = "how: a sub-gradient before the step, or soft thresholding behind it, which gives exact zeros (default: " \
             "subgradient; with --adam proximal)"  # fmt: skip
    group.add_argument("--s-solver", choices=SOLVERS, help=solver)
    share = f"share of the channels that --s {AUTO} brings to zero (default: {DEFAULT.share})"
    group.add_argument("--s-share", type=threshold, metavar="P", help=share)
    coach = "points of AP50 that the coach's trials may cost: every few epochs, in at most 5 %% of the time, it " \
            "prunes copies of the network, measures them on 64 pictures and says how much could go (default: " \
            f"{DEFAULT.coach:g}; 0: none)"  # fmt: skip
    group.add_argument("--s-coach", type=points, metavar="X", help=coach)
    enough = "end the training when the coach finds that this share of the channels could go; when it looks, and so " \
             "the epoch, depends on how fast the machine is"  # fmt: skip
    group.add_argument("--s-enough", type=threshold, metavar="P", help=enough)
    beyond = "also convolutions before an upsampling, a spatial pyramid or a split route, as in the pruning scripts"
    group.add_argument("--all-convs", action="store_true", help=beyond)


def points(text: str) -> float:
    """Points of AP50, 0 <= value <= 100; argparse type."""
    if not 0 <= (value := number(text)) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 <= value <= 100")
    return value


def rate_or_auto(text: str) -> float | Literal["auto"]:
    """A strength, 0 < s <= 10, or `auto`; argparse type."""
    if text == AUTO:
        return AUTO
    if not 0 < (value := number(text)) <= LARGEST_S:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 < s <= {LARGEST_S:g}; or {AUTO}")
    return value


def sparse_settings(args: argparse.Namespace) -> SparseSettings | None:
    """What the flags ask for; None without -sr.

    Raises:
        InputError: flags that mean nothing without -sr or beside others.
    """
    names = ("s", "prune", "s_schedule", "s_turn", "s_keep", "s_solver", "s_share", "s_coach", "s_enough")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not args.sr:
        if given or args.all_convs:
            flag = next((f"--{name.replace('_', '-')}" for name in given), "--all-convs")
            raise InputError(f"{flag}: says how to train sparse; add -sr, or leave it out")
        return None
    _check_combination(args, given)
    name = given.get("s_schedule", "dynamic")
    changes = {
        field: given[f"s_{flag}"] for field, flag in (("turn", "turn"), ("weakest", "keep")) if f"s_{flag}" in given
    }
    for field, allowed in (("turn", ("dynamic", "global")), ("weakest", ("dynamic",))):
        if field in changes and name not in allowed:
            flag = "--s-turn" if field == "turn" else "--s-keep"
            raise InputError(f"{flag}: goes with --s-schedule {' or '.join(allowed)}, not with {name}")
    schedule = dataclasses.replace(SCHEDULES[name], **changes)
    share = given.get("s_share", DEFAULT.share)
    if given.get("s") == AUTO and 0 < schedule.weakest < share:
        raise InputError(
            f"--s-share {share:g}: only {schedule.weakest:g} of the channels stay under pressure; a smaller share, or "
            "a larger --s-keep"
        )
    return SparseSettings(
        s=given.get("s", DEFAULT.s),
        prune=given.get("prune", DEFAULT.prune),
        schedule=schedule,
        proximal=given.get("s_solver", "proximal" if args.adam else "subgradient") == "proximal",
        share=share,
        all_convs=args.all_convs,
        coach=given.get("s_coach", DEFAULT.coach),
        enough=given.get("s_enough"),
    )


def _check_combination(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuse what says nothing beside -sr, or contradicts it."""
    if args.patience:
        raise InputError("--patience: a sparse training goes to its end, the last epoch is the sparsest; leave it out")
    if args.evolve:
        raise InputError("--evolve: looks for the best training, which is none with -sr; leave one of them out")
    if args.adam and given.get("s_solver") == "subgradient":
        raise InputError("--s-solver subgradient: Adam would scale the pressure away; leave it or --adam out")
    if "s_share" in given and given.get("s") != AUTO:
        raise InputError(f"--s-share: goes with --s {AUTO}")
    if "s_enough" in given and (given.get("s_coach") == 0 or given.get("prune") == 2):
        raise InputError("--s-enough: is what the coach finds of channels; it goes with --prune 0 or 1 and a --s-coach")
