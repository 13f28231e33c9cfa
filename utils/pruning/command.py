"""The command line that all pruning scripts share; a script is its docstring and one `Strategy`. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from utils.cli import Parser, fraction, integer, log, positive_int
from utils.darknet.data_file import load_data
from utils.errors import DataError, InputError
from utils.flags import add_device_flags, add_model_flags, add_picture_flags, add_run_flags
from utils.model_files import choose_model
from utils.pruning.policy import POWERS, ChannelPolicy
from utils.pruning.request import PruneRequest

PROJECT = "runs/prune"
LARGEST_MULTIPLE = 1024


@dataclass(frozen=True)
class Strategy:
    """What one script removes."""

    name: str
    policy: ChannelPolicy
    """Its channels; `percent` is replaced by that of the command line."""

    @property
    def script(self) -> str:
        """File of the script."""
        return f"{self.name}_prune.py"


def multiple(text: str) -> int:
    """A number that widths are rounded up to a multiple of, or `powers`; argparse type."""
    value = POWERS if text == "powers" else integer(text)
    if text != "powers" and not 1 <= value <= LARGEST_MULTIPLE:
        raise argparse.ArgumentTypeError(f"{text}: allowed are 1 to {LARGEST_MULTIPLE}, and powers (of two)")
    return value


def parse_args(strategy: Strategy, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags of a pruning script."""
    example = f"python {strategy.script} --cfg cfg/demo.cfg --data runs/demo/data/toy.data --percent 0.3"
    parser = Parser(description, example, program=strategy.script)
    _add_choice_flags(parser.add_argument_group("what is removed"), strategy)
    _add_files_flags(parser.add_argument_group("model and data"))
    _add_check_flags(parser.add_argument_group("what is made and measured"))
    group = parser.add_argument_group("run")
    add_run_flags(group, PROJECT)
    add_device_flags(group, half=False)
    group.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


def _add_choice_flags(group: argparse._ArgumentGroup, strategy: Strategy) -> None:
    add, policy = group.add_argument, strategy.policy
    share = "share of the candidate channels to remove, the weakest |γ| first; 0 <= P < 1"
    add("--percent", type=fraction, required=True, metavar="P", help=share)
    if policy.layer_keep is not None:
        least = "least share of a layer's channels that stays; one channel always does (default: %(default)s)"
        add("--layer_keep", type=fraction, default=policy.layer_keep, metavar="P", help=least)
    widths = "round widths up to multiples of N, or to powers of two with `powers` (default: %(default)s)"
    add("--multiple-of", type=multiple, default=policy.multiple_of, metavar="N", help=widths)
    beyond = "also convolutions before an upsampling, a spatial pyramid or a split route, as in train.py"
    add("--all-convs", action="store_true", help=beyond)


def _add_files_flags(group: argparse._ArgumentGroup) -> None:
    add_model_flags(group)
    add_picture_flags(group)
    group.add_argument("--data", metavar="FILE", help="data set to measure on: .data or data.yaml")
    size = "pictures at a time (default: %(default)s)"
    group.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help=size)


def _add_check_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    absorbed = "do not give the constants of removed channels to the convolutions that read them"
    add("--no-absorb", dest="absorb", action="store_false", help=absorbed)
    add("--no-test", dest="test", action="store_false", help="measure no accuracy; --data is not needed")
    add("--dry-run", action="store_true", help="print what would be left and write nothing")


def request(strategy: Strategy, args: argparse.Namespace) -> PruneRequest:
    """Check flags and files.

    Raises:
        InputError: flags that exclude each other, files that cannot be used or do not fit.
    """
    if args.data is None and args.test and not args.dry_run:
        raise InputError("--data: is needed to measure the accuracy; or --no-test")
    data = load_data(args.data) if args.data else None
    files = choose_model(args.cfg, args.weights, classes=data.classes if data else None)
    for note in files.notes:
        log(note)
    if data and args.test and data.valid is None:
        raise DataError(f"{data.path}: names no valid pictures to measure on; --no-test works without")
    policy = replace(strategy.policy, percent=args.percent, multiple_of=args.multiple_of, all_convs=args.all_convs)
    if policy.layer_keep is not None:
        policy = replace(policy, layer_keep=args.layer_keep)
    return PruneRequest(strategy.name, files, policy, data, args)


def script(strategy: Strategy, description: str) -> Callable[[Sequence[str] | None], None]:
    """The `main` of a pruning script."""

    def main(argv: Sequence[str] | None = None) -> None:
        """Check flags and files, prune, prove, measure, write."""
        asked = request(strategy, parse_args(strategy, description, argv))
        from utils.pruning.workflow import prune

        prune(asked)

    return main
