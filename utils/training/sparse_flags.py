"""The flags of sparse training in train.py; no torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from utils.cli import Parser, number, threshold
from utils.errors import InputError
from utils.pruning.policy import SETS
from utils.pruning.sparsity import AUTO, LARGEST_S, LOSS_RISE, SCHEDULES, SparseSettings

SOLVERS = ("subgradient", "proximal")
DEFAULT = SparseSettings()


def add_sparse_flags(parser: Parser) -> None:
    """-sr and what goes with it."""
    group = parser.add_argument_group("sparse training")
    squeeze = "press on γ of the channels that pruning may remove; best.pt is then the last epoch, the sparsest"
    group.add_argument("-sr", "--sparsity-regularization", dest="sr", action="store_true", help=squeeze)
    rate = f"strength, or {AUTO}: rises while fewer channels are weak than planned, lets go when accuracy falls "
    rate += f"(default: {DEFAULT.s})"
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
    solver = "how: a sub-gradient before the step, or soft thresholding behind it, which gives exact zeros (default: "
    solver += f"subgradient; with --adam or --s {AUTO} proximal)"
    group.add_argument("--s-solver", choices=SOLVERS, help=solver)
    share = f"share of the channels that --s {AUTO} makes weak; each percent takes about 20 optimizer steps (default: "
    share += f"{DEFAULT.share})"
    group.add_argument("--s-share", type=threshold, metavar="P", help=share)
    drop = f"--s {AUTO} lets go while AP50 is more than X points below its best; where epochs are not evaluated, while "
    drop += f"the training loss is X · {100 * LOSS_RISE:g} %% above its lowest (default: {DEFAULT.drop:g})"
    group.add_argument("--s-drop", type=points, metavar="X", help=drop)
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
    names = ("s", "prune", "s_schedule", "s_turn", "s_keep", "s_solver", "s_share", "s_drop")
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
    return SparseSettings(
        s=given.get("s", DEFAULT.s),
        prune=given.get("prune", DEFAULT.prune),
        schedule=schedule,
        proximal=given.get("s_solver", "proximal" if args.adam or given.get("s") == AUTO else "subgradient")
        == "proximal",
        share=given.get("s_share", DEFAULT.share),
        drop=given.get("s_drop", DEFAULT.drop),
        all_convs=args.all_convs,
    )


def _check_combination(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuse what says nothing beside -sr, or contradicts it."""
    if args.patience:
        raise InputError("--patience: a sparse training goes to its end, the last epoch is the sparsest; leave it out")
    if args.evolve:
        raise InputError("--evolve: looks for the best training, which is none with -sr; leave one of them out")
    if args.adam and given.get("s_solver") == "subgradient":
        raise InputError("--s-solver subgradient: Adam would scale the pressure away; leave it or --adam out")
    for flag in ("schedule", "turn", "keep"):
        if f"s_{flag}" in given and given.get("s") == AUTO:
            raise InputError(f"--s-{flag}: --s {AUTO} chooses the channels itself; leave it out, or give --s a number")
    for flag in ("share", "drop"):
        if f"s_{flag}" in given and given.get("s") != AUTO:
            raise InputError(f"--s-{flag}: goes with --s {AUTO}")
