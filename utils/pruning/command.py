"""The command line that all pruning scripts share; a script is its docstring and one `Strategy`. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from utils.cli import (
    Parser,
    fraction,
    integer,
    log,
    memory_for,
    non_negative_int,
    points,
    positive_int,
    print_json,
    random_seed,
)
from utils.cli import number as decimal
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.darknet.data_file import DataConfig, load_data
from utils.errors import InputError
from utils.flags import add_device_flags, add_model_flags, add_picture_flags, add_run_flags
from utils.graph import channel_graph
from utils.model_files import choose_model
from utils.pruning.candidates import SETS, candidates
from utils.pruning.groups import check_percents, pruning_groups
from utils.pruning.policy import POWERS, ChannelPolicy
from utils.pruning.ranking import MERGES
from utils.pruning.request import Amount, PruneRequest
from utils.pruning.target import Kind, Target
from utils.pruning.units import check_units, residual_units
from utils.report.run_dir import check_run

PROJECT = "runs/prune"
LARGEST_MULTIPLE = 1024
AUTO = "auto"
GONE = {
    "sensitivity": "compare amounts with --dry-run, or name what is to be left, as by --target-macs 0.5",
    "sensitivity_pictures": "--max-drop measures AP50 on all valid pictures of --data",
}
"""Flags of older versions, and what to do instead."""
FITTED = 128
"""Pictures of --reconstruct, unless it is given."""
TARGETS: dict[Kind, str] = {
    "params": "find how much has to go until at most this share of the parameters is left, 0 < S < 1",
    "macs": "the same of the multiply-adds, at the size of --img_size",
    "latency": "the same of the median time of a forward pass, measured on --device",
    "drop": "find how much can go without losing more than P points of AP50 on --data, 0 < P <= 100",
}
"""What takes the place of a percentage, or of a number of units where only these go."""


@dataclass(frozen=True)
class Strategy:
    """What one script removes."""

    name: str
    channels: ChannelPolicy | None = None
    """Its channels, none or these; `percent` is replaced by that of the command line."""
    units: bool = False
    """Residual units, whole."""

    @property
    def script(self) -> str:
        """File of the script."""
        return f"{self.name}_prune.py"


def multiple(text: str) -> int:
    """A number that widths are rounded up to a multiple of, or `powers`; argparse type."""
    if text == "powers":
        return POWERS
    if text == AUTO:
        raise argparse.ArgumentTypeError("auto is gone; give 8, which its timings always answered")
    if not 1 <= (value := integer(text)) <= LARGEST_MULTIPLE:
        raise argparse.ArgumentTypeError(f"{text}: allowed are 1 to {LARGEST_MULTIPLE}, and powers (of two)")
    return value


def share(text: str) -> float:
    """A share of what was before, 0 < value < 1; argparse type."""
    if not 0 < (value := decimal(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 < value < 1")
    return value


def group_share(text: str) -> float:
    """A share, 0 <= value < 1; argparse type."""
    if text == AUTO:
        raise argparse.ArgumentTypeError("auto is gone; give numbers, or --target-macs alone")
    return fraction(text)


def parse_args(strategy: Strategy, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags of a pruning script."""
    return make_parser(strategy, description).parse_args(argv)


def make_parser(strategy: Strategy, description: str) -> Parser:
    """The flags that a pruning script takes."""
    amount = " --shortcut 1" * strategy.units + " --percent 0.3" * (strategy.channels is not None)
    example = f"python {strategy.script} --cfg cfg/demo.cfg --data runs/demo/data/toy.data{amount}"
    parser = Parser(description, example, program=strategy.script, gone=GONE)
    group = parser.add_argument_group("what is removed")
    amounts = group.add_mutually_exclusive_group()
    if strategy.units:
        _add_unit_flags(group if strategy.channels is not None else amounts)
    if strategy.channels is not None:
        _add_percent_flag(amounts, strategy.channels)
    _add_target_flags(amounts)
    if strategy.channels is not None:
        _add_channel_flags(group, strategy.channels)
    _add_width_flag(group, strategy.channels)
    _add_importance_flags(group, rounds=strategy.channels is not None and not strategy.units)
    why = "say why channels of a block of --cfg are tied or stay, and which scripts may remove them; do nothing else"
    group.add_argument("--explain", type=non_negative_int, metavar="BLOCK", help=why)
    _add_files_flags(parser.add_argument_group("model and data"))
    _add_check_flags(parser.add_argument_group("what is made and measured"))
    group = parser.add_argument_group("run")
    add_run_flags(group, PROJECT)
    add_device_flags(group, half=False)
    group.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_unit_flags(group: argparse._ActionsContainer) -> None:
    many = "number of residual units to remove, the weakest first; several with --dry-run"
    group.add_argument(
        "--shortcuts", "--shortcut", dest="shortcut", type=non_negative_int, nargs="+", metavar="N", help=many
    )


def _add_percent_flag(group: argparse._ActionsContainer, channels: ChannelPolicy) -> None:
    weakest = "share of the candidate channels to remove, the least important first, 0 <= P < 1; several with --dry-run"
    if channels.groups:
        weakest = weakest.replace("candidate channels", "candidate channels of every group")
    group.add_argument("--percent", type=fraction, nargs="+", metavar="P", help=weakest)


def _add_target_flags(group: argparse._ActionsContainer) -> None:
    """What the network that is left is to keep; all of them set `target`."""
    for kind, of in TARGETS.items():
        target = Target(kind, 0.0)
        metavar, typed = ("P", points) if kind == "drop" else ("S", share)
        group.add_argument(target.flag, type=typed, metavar=metavar, help=of)


def _add_channel_flags(group: argparse._ArgumentGroup, channels: ChannelPolicy) -> None:
    add = group.add_argument
    if channels.groups:
        each = "the same by group, in place of --percent: as many shares as the network has groups"
        add("--group-percent", type=group_share, nargs="+", metavar="P", help=each)
        merges = "; ".join(f"{name}: {what}" for name, what in MERGES.items())
        tied = f"which channels of what a shortcut ties stay; {merges} (default: %(default)s)"
        add("--merge", choices=tuple(MERGES), default=channels.merge, help=tied)
    if channels.layer_keep is not None:
        least = "least share of a layer's channels that stays; one channel always does (default: %(default)s)"
        add("--layer_keep", type=fraction, default=channels.layer_keep, metavar="P", help=least)
    beyond = "also convolutions before an upsampling, a spatial pyramid or a split route, as in train.py"
    add("--all-convs", action="store_true", help=beyond)


def _add_width_flag(group: argparse._ArgumentGroup, channels: ChannelPolicy | None) -> None:
    widths = "round widths up to multiples of N, e.g. 8, or to powers of two with `powers` (default: %(default)s)"
    if channels is None:
        widths = "as in the other scripts; changes nothing here, where whole units go (default: %(default)s)"
    default = 1 if channels is None else channels.multiple_of
    group.add_argument("--multiple-of", type=multiple, default=default, metavar="N", help=widths)


def _add_importance_flags(group: argparse._ArgumentGroup, *, rounds: bool) -> None:
    add = group.add_argument
    kinds = "what ranks channels and residual units. taylor: what silencing one does to the training loss; gamma: |γ|, "
    kinds += "for networks of sparse training (default: gamma after train.py -sr, else taylor)"
    add("--importance", choices=("taylor", "gamma"), help=kinds)
    batches = "batches of training pictures that taylor is computed from (default: %(default)s)"
    add("--importance-batches", type=positive_int, default=32, metavar="N", help=batches)
    if rounds:
        cuts = "reach the amount in N cuts, with importance computed anew after each (default: %(default)s)"
        add("--rounds", type=positive_int, default=1, metavar="N", help=cuts)


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
    anew = "fit the convolutions that read removed channels to what they put out before, by least squares on N "
    anew += f"training pictures; 0: they only get the constants (default: {FITTED} where --data has train pictures)"
    add("--reconstruct", type=non_negative_int, metavar="N", help=anew)
    add("--no-test", dest="test", action="store_false", help="measure neither accuracy nor time; --data is not needed")
    add("--dry-run", action="store_true", help="print what would be left and write nothing")
    add("--seed", type=random_seed, default=0, metavar="N", help="of all that is random (default: %(default)s)")


def request(strategy: Strategy, args: argparse.Namespace) -> PruneRequest:
    """Check flags and files.

    Raises:
        InputError: flags that exclude each other, files that cannot be used or do not fit.
    """
    amounts = _amounts(strategy, args)
    check_run(Path(args.project), args.name)
    data = load_data(args.data) if args.data else None
    network = cfg_file.load(args.cfg) if args.cfg else None
    if network is not None and strategy.units:
        check_units(network)
    channels = strategy.channels
    if channels is not None:
        channels = replace(channels, multiple_of=args.multiple_of, all_convs=args.all_convs)
        if channels.layer_keep is not None:
            channels = replace(channels, layer_keep=args.layer_keep)
        if channels.groups:
            percents = tuple(args.group_percent) if args.group_percent else None
            channels = replace(channels, merge=args.merge, group_percents=percents)
            if network is not None and percents:
                check_percents(pruning_groups(channel_graph(network)), percents, network.path)
    files = choose_model(network, args.weights, classes=data.classes if data else None)
    asked = PruneRequest(
        strategy.name,
        files,
        channels,
        amounts,
        data,
        vars(args),
        target=_target(args),
        sides=tuple(args.img_size) if args.img_size else None,
        mode=args.mode,
        batch_size=args.batch_size,
        device=args.device,
        importance=args.importance,
        importance_batches=args.importance_batches,
        rounds=getattr(args, "rounds", 1),
        seed=args.seed,
        absorb=args.absorb,
        reconstruct=_fitted(args, data),
        test=args.test,
        dry_run=args.dry_run,
        as_json=args.json,
        project=Path(args.project),
        name=args.name,
        exist_ok=args.exist_ok,
    )
    for note in files.notes:
        log(note)
    if not files.is_checkpoint:
        asked.check_classes(files.network)
    return asked


def _target(args: argparse.Namespace) -> Target | None:
    """What was asked for in place of an amount; argparse has seen that it is one thing at most."""
    targets = (Target(kind, 0.0) for kind in TARGETS)
    given = ((target, getattr(args, target.flag[2:].replace("-", "_"))) for target in targets)
    return next((replace(target, bound=bound) for target, bound in given if bound is not None), None)


def _fitted(args: argparse.Namespace, data: DataConfig | None) -> int:
    """Pictures of --reconstruct."""
    if args.reconstruct and not args.absorb:
        raise InputError("--reconstruct: fits what --no-absorb leaves as it is; leave one of them out")
    trains = args.absorb and data is not None and data.train is not None
    return args.reconstruct if args.reconstruct is not None else FITTED if trains else 0


def _amounts(strategy: Strategy, args: argparse.Namespace) -> tuple[Amount, ...]:
    """All combinations of what was asked for; None of what a target finds, or each group has for itself."""
    by_group, target = getattr(args, "group_percent", None) is not None, _target(args)
    if by_group and (args.percent is not None or target is not None):
        other = target.flag if target else "--percent"
        raise InputError(f"--group-percent: takes the place of {other}; give one of them")
    channels = strategy.channels is not None
    wanted = {
        "shortcut": strategy.units and (channels or target is None),
        "percent": channels and not by_group and target is None,
    }
    values = {key: getattr(args, key) if needed else [None] for key, needed in wanted.items()}
    for key, given in values.items():
        if given is None:
            others = ", or --group-percent" if hasattr(args, "group_percent") else ""
            others += "" if key == "shortcut" and channels else ", or a target, such as --target-macs 0.5"
            raise InputError(f"--{key}: is needed{others}; --dry-run shows beforehand what would be left")
    return tuple(Amount(*pair) for pair in product(values["percent"], values["shortcut"]))


def script(strategy: Strategy, description: str) -> Callable[[Sequence[str] | None], None]:
    """The `main` of a pruning script."""

    def main(argv: Sequence[str] | None = None) -> None:
        """Check flags and files, prune, prove, measure, write."""
        args = parse_args(strategy, description, argv)
        if args.explain is not None:
            if not args.cfg:
                raise InputError("--explain: needs --cfg")
            _explain(cfg_file.load(args.cfg), args.explain, as_json=args.json)
            return
        asked = request(strategy, args)
        from utils.pruning.workflow import prune

        with memory_for(args.batch_size):
            prune(asked)

    return main


def _explain(network: Network, block: int, *, as_json: bool) -> None:
    last = len(network.blocks) - 1
    if block > last:
        raise InputError(f"--explain {block}: {network.path} has the blocks 0 to {last}")
    lines = list(explanation(network, block))
    if as_json:
        print_json({"block": block, "explanation": lines})
    else:
        print("\n".join(lines))


def explanation(network: Network, block: int) -> Iterator[str]:
    """Lines that say why channels of a block are tied or stay, and what may remove them."""
    graph = channel_graph(network)
    yield from graph.explain(block)
    for number, name in SETS.items() if block in graph.makers() else ():
        found = block in candidates(graph, number)
        beyond = number != 2 and not found and block in candidates(graph, number, all_convs=True)
        answer = "yes" if found else "with --all-convs" if beyond else "no"
        yield f"  candidate of set {number}, {name}: {answer}"
    for number, group in enumerate(pruning_groups(graph), 1):
        if block in group.layers:
            yield f"  in group {number} of group_prune.py, {group.name}"
    for unit in residual_units(network):
        if block in unit.blocks:
            yield f"  in a residual unit: blocks {unit.blocks[0]} to {unit.shortcut}, which layer_prune.py may remove"
