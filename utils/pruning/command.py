"""The command line that all pruning scripts share; a script is its docstring and one `PruneStrategy`. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from utils.cli import (
    Parser,
    flag,
    fraction,
    log,
    memory_for,
    non_negative_int,
    points,
    positive_int,
    print_json,
    random_seed,
    settings_from,
    share,
)
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.darknet.data_file import DataConfig, load_data
from utils.errors import DataError, InputError
from utils.flags import ModelFiles, add_device_flags, add_model_flags, add_picture_flags, add_run_flags, choose_model
from utils.pruning.channel_graph import channel_graph, check_units, residual_units
from utils.pruning.policy import SETS, ChannelPolicy, candidates, check_percents, pruning_groups
from utils.pruning.target import Amount, Bounded, PruneTarget
from utils.report.run_dir import check_run

ROUNDS = 4
"""Cuts to a counted target with taylor."""
PROJECT = "runs/prune"
FITTED = 128
"""Pictures of --reconstruct, unless it is given."""


@dataclass(frozen=True)
class PruneStrategy:
    """Parts of a network that one script removes."""

    name: str
    channels: ChannelPolicy | None = None
    """Its channels, none or these; `percent` is replaced by that of the command line."""
    units: bool = False
    """Residual units, whole."""


def group_share(text: str) -> float:
    """A share, 0 <= value < 1; argparse type."""
    if text == "auto":
        raise argparse.ArgumentTypeError("auto is gone; give numbers, or --target-macs alone")
    return fraction(text)


@dataclass(frozen=True, kw_only=True)
class RemovalFlags:
    """Flags of what is removed: an amount or a target, and what ranks channels and units."""

    strategy: PruneStrategy
    shortcut: Sequence[int] | None = flag(
        None,
        "number of residual units to remove, the weakest first; several with --dry-run",
        "--shortcuts",
        "--shortcut",
        type=non_negative_int,
        nargs="+",
    )
    percent: Sequence[float] | None = flag(
        None,
        "share of the candidate channels (in group_prune.py of every group) to remove, the least important first, "
        "0 <= P < 1; several with --dry-run",
        "--percent",
        "--global_percent",
        type=fraction,
        nargs="+",
    )
    group_percent: Sequence[float] | None = flag(
        None,
        "the same by group, in place of --percent: as many shares as the network has groups",
        type=group_share,
        nargs="+",
        metavar="P",
    )
    target_params: float | None = flag(
        None, "find how much has to go until at most this share of the parameters is left, 0 < S < 1", type=share
    )
    target_macs: float | None = flag(None, "the same of the multiply-adds, at the size of --img_size", type=share)
    target_latency: float | None = flag(
        None, "the same of the median time of a forward pass, measured on --device", type=share
    )
    max_drop: float | None = flag(
        None, "find how much can go without losing more than P points of AP50 on --data, 0 < P <= 100", type=points
    )
    importance: Literal["taylor", "gamma"] | None = flag(
        None,
        "what ranks channels and residual units. taylor: what masking one does to the training loss; gamma: |γ|, for "
        "networks of sparse training (default: gamma after train.py -sr or without training images, else taylor)",
        choices=("taylor", "gamma"),
    )
    importance_batches: int = flag(32, "batches of training images that taylor is computed from", type=positive_int)
    rounds: int | None = flag(
        None,
        "reach the amount in N cuts, with importance computed again after each (default: 4 where taylor ranks channels "
        "for --target-macs or --target-params, else 1)",
        type=positive_int,
    )
    explain: int | None = flag(
        None,
        "say why channels of a block of --cfg are tied or stay, and which scripts may remove them; do nothing else",
        type=non_negative_int,
        metavar="BLOCK",
    )

    def __post_init__(self) -> None:
        rivals = ["percent", "target_params", "target_macs", "target_latency", "max_drop"]
        rivals += ["shortcut"] * (self.strategy.channels is None)
        flags = [f"--{name.replace('_', '-')}" for name in rivals if getattr(self, name) is not None]
        if self.group_percent is not None and flags:
            raise InputError(f"--group-percent: takes the place of {flags[-1]}; give one of them")
        if len(flags) > 1:
            raise InputError(f"{flags[1]}: not allowed with argument {flags[0]}")
        if len(self.amounts) > 1 and self.target is not None:
            raise InputError(f"{self.target.flag}: finds one network; give one --shortcut")

    @property
    def target(self) -> PruneTarget | None:
        """The target in place of an amount."""
        bounds: dict[Bounded, float | None] = {"params": self.target_params, "macs": self.target_macs}
        bounds |= {"latency": self.target_latency, "drop": self.max_drop}
        return next((PruneTarget(kind, bound) for kind, bound in bounds.items() if bound is not None), None)

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """All combinations of --percent and --shortcut; None of what a target finds, or each group has for itself.

        Raises:
            InputError: a flag is missing.
        """
        channels, other = self.strategy.channels, ", or a target, such as --target-macs 0.5"
        percents: Sequence[float | None] = [None]
        shortcuts: Sequence[int | None] = [None]
        if channels is not None and self.target is None and self.group_percent is None:
            percents = self.percent or ()
            other = f", or --group-percent{other}" if channels.groups else other
        if self.strategy.units and (channels is not None or self.target is None):
            shortcuts = self.shortcut or ()
        for name, given in (("percent", percents), ("shortcut", shortcuts)):
            if not given:
                way_out = "" if name == "shortcut" and channels is not None else other
                raise InputError(f"--{name}: is needed{way_out}; --dry-run shows beforehand what would be left")
        return tuple(Amount(*pair) for pair in product(percents, shortcuts))


@dataclass(frozen=True, kw_only=True)
class PruneSettings(RemovalFlags):
    """Everything that a pruning follows from, checked as far as it can be without torch."""

    files: ModelFiles
    channels: ChannelPolicy | None
    """Channels that may go, without their percentage; None: no channels."""
    data: DataConfig | None
    flags: Mapping[str, Any]
    """Every flag and its value, for args.yaml."""
    absorb: bool = flag(
        True,
        "do not fold the constants of removed channels into the convolutions that read them",
        "--no-absorb",
        action="store_false",
    )
    reconstruct: int | None = flag(
        None,
        "fit the convolutions that read removed channels to their former output, by least squares on N training "
        f"images; 0: only fold the constants (default: {FITTED} where --data has train images)",
        type=non_negative_int,
    )
    test: bool = flag(
        True, "measure neither accuracy nor time; --data is not needed", "--no-test", action="store_false"
    )
    dry_run: bool = flag(False, "print what would be left and write nothing")
    seed: int = flag(0, "seed of everything random", type=random_seed)
    img_size: Sequence[int] | None = None
    mode: Literal["letterbox", "stretch"] = "letterbox"
    batch_size: int = 16
    device: str = ""
    json: bool = False
    project: str = PROJECT
    name: str = "exp"
    exist_ok: bool = False

    @property
    def trains(self) -> bool:
        """Whether there are training pictures, to compute importance from and to fit with."""
        return self.data is not None and self.data.train is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds is not None and self.rounds > 1:
            self._check_rounds()
        self._check_pictures()
        if self.max_drop is not None and (self.data is None or self.data.valid is None):
            raise InputError("--max-drop: needs --data with valid images, on which AP50 is measured")
        if self.dry_run:
            return
        if len(self.amounts) > 1:
            raise InputError("--percent, --shortcut: several values are compared with --dry-run; a pruning takes one")
        if self.data is None and self.test:
            raise InputError("--data: is needed to measure the accuracy; or --no-test")
        if self.test and self.data is not None and self.data.valid is None:
            raise DataError(f"{self.data.path}: names no valid images to measure on; --no-test works without")

    @property
    def cuts(self) -> int:
        """Rounds; where the flag is left out those that measured best (docs/pruning.md)."""
        if self.rounds is not None:
            return self.rounds
        if self.strategy.channels is None or self.strategy.units or self.dry_run or self.importance != "taylor":
            return 1
        return ROUNDS if self.target is not None and self.target.counted else 1

    def _check_rounds(self) -> None:
        if self.target is not None and not self.target.counted:
            raise InputError(
                f"--rounds: goes with --percent, --target-macs and --target-params, not {self.target.flag}"
            )
        if self.dry_run or self.group_percent:
            other = "--dry-run" if self.dry_run else "--group-percent"
            raise InputError(f"--rounds: does not go with {other}; leave one of them out")

    def _check_pictures(self) -> None:
        """Refuse what is computed from training pictures where there are none."""
        if self.reconstruct and not self.absorb:
            raise InputError("--reconstruct: fits what --no-absorb leaves as it is; leave one of them out")
        wanted = {"--importance taylor": self.importance == "taylor", "--reconstruct": self.reconstruct}
        for name in (name for name, value in wanted.items() if value and not self.trains):
            if self.data is None:
                raise InputError(f"{name}: needs --data, the images that the network was trained with")
            raise DataError(f"{self.data.path}: names no train images, which {name} needs")

    @property
    def fitted(self) -> int:
        """Training pictures that readers are fitted with; 0: they are not fitted."""
        if self.reconstruct is not None:
            return self.reconstruct
        return FITTED if self.absorb and self.trains else 0

    def check_classes(self, network: Network) -> None:
        """Refuse a network that does not go with the data set, as `ModelFiles.check_classes` does."""
        if self.data is not None:
            self.files.check_classes(network, self.data)


def make_parser(strategy: PruneStrategy, description: str) -> Parser:
    """The flags that a pruning script takes."""
    channels, program = strategy.channels, f"{strategy.name}_prune.py"
    amount = " --shortcut 1" * strategy.units + " --percent 0.3" * (channels is not None)
    example = f"python {program} --cfg cfg/demo.cfg --data runs/demo/data/toy.data{amount}"
    parser = Parser(description, example, program=program)
    missing = set() if strategy.units else {"shortcut"}
    if channels is None:
        missing |= {"percent", "all_convs"}
    if channels is None or channels.layer_keep is None:
        missing |= {"layer_keep"}
    if channels is None or not channels.groups:
        missing |= {"group_percent", "merge"}
    if channels is None or strategy.units:
        missing |= {"rounds"}
    defaults = vars(channels) | {"percent": None} if channels else {}  # there is no percentage that suits all networks
    parser.add_settings("what is removed", RemovalFlags, ChannelPolicy, without=missing, **defaults)
    group = parser.add_argument_group("model and data")
    add_model_flags(group)
    add_picture_flags(group)
    group.add_argument("--data", metavar="FILE", help="data set to rank, fit and measure on: .data or data.yaml")
    size = "images at a time (default: %(default)s)"
    group.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help=size)
    inherited = {setting.name for setting in fields(RemovalFlags)}
    parser.add_settings("what is made and measured", PruneSettings, without=inherited)
    group = parser.add_argument_group("run")
    add_run_flags(group, PROJECT)
    add_device_flags(group, half=False)
    group.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def make_settings(strategy: PruneStrategy, args: argparse.Namespace) -> PruneSettings:
    """Check flags and files.

    Raises:
        InputError: flags that exclude each other, files that cannot be used or do not fit.
    """
    settings_from(args, RemovalFlags, strategy=strategy)  # flags are checked before files are read
    check_run(Path(args.project), args.name)
    data = load_data(args.data) if args.data else None
    network = cfg_file.load(args.cfg) if args.cfg else None
    if network is not None and strategy.units:
        check_units(network)
    channels = strategy.channels
    if channels is not None:
        flags = (setting.name for setting in fields(channels) if "flags" in setting.metadata)
        channels = replace(channels, **{name: getattr(args, name) for name in flags if hasattr(args, name)})
        if channels.groups and args.group_percent:
            channels = replace(channels, group_percents=tuple(args.group_percent))
            if network is not None:
                check_percents(pruning_groups(channel_graph(network)), args.group_percent, network.path)
    files = choose_model(network, args.weights, classes=data.classes if data else None)
    others = {"strategy": strategy, "files": files, "channels": channels, "data": data, "flags": vars(args)}
    settings = settings_from(args, PruneSettings, **others)
    log(*files.notes)
    if files.network is not None and not files.is_checkpoint:
        settings.check_classes(files.network)
    return settings


def script(strategy: PruneStrategy, description: str) -> Callable[..., None]:
    """The `main` of a pruning script."""

    def main(argv: Sequence[str] | None = None) -> None:
        """Check flags and files, prune, prove, measure, write."""
        args = make_parser(strategy, description).parse_args(argv)
        if args.explain is not None:
            if not args.cfg:
                raise InputError("--explain: needs --cfg")
            lines = list(explanation(cfg_file.load(args.cfg), args.explain))
            print_json({"block": args.explain, "explanation": lines}) if args.json else print("\n".join(lines))
            return
        settings = make_settings(strategy, args)
        from utils.pruning.workflow import prune

        with memory_for(args.batch_size):
            prune(settings)

    return main


def explanation(network: Network, block: int) -> Iterator[str]:
    """Lines that say why channels of a block are tied or stay, and which scripts may remove them.

    Raises:
        InputError: there is no such block.
    """
    if block >= len(network.blocks):
        raise InputError(f"--explain {block}: {network.path} has the blocks 0 to {len(network.blocks) - 1}")
    graph = channel_graph(network)
    yield from graph.explain(block)
    for key, name in SETS.items() if block in graph.makers() else ():
        answer = "no"
        if block in candidates(graph, key):
            answer = "yes"
        elif key != 2 and block in candidates(graph, key, all_convs=True):
            answer = "with --all-convs"
        yield f"  candidate of set {key}, {name}: {answer}"
    for place, group in enumerate(pruning_groups(graph), 1):
        if block in group.layers:
            yield f"  in group {place} of group_prune.py, {group.name}"
    for unit in residual_units(network):
        if block in unit.blocks:
            yield f"  in a residual unit: blocks {unit.blocks[0]} to {unit.shortcut}, which layer_prune.py may remove"
