"""What a pruning is asked to do; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from utils.darknet.blocks import Network
from utils.darknet.data_file import DataConfig
from utils.darknet.shapes import picture_channels
from utils.errors import DataError, InputError
from utils.model_files import ModelFiles
from utils.pruning.policy import ChannelPolicy
from utils.pruning.target import Target


class Amount(NamedTuple):
    """How much is removed; None of what a strategy does not remove."""

    percent: float | None
    """Share of the candidate channels; None also if every group has a share of its own."""
    shortcut: int | None
    """Number of residual units."""


@dataclass(frozen=True)
class PruneRequest:
    """What a pruning script was asked for, checked as far as it can be without torch."""

    strategy: str
    """Name of the script, without `_prune.py`."""
    files: ModelFiles
    channels: ChannelPolicy | None
    """Which channels, but for the percentage; None: no channels."""
    amounts: tuple[Amount, ...]
    """One, or for a dry run several; with a target the one whose percentage, or number of units, is to be found."""
    data: DataConfig | None
    flags: Mapping[str, Any]
    """Every flag and its value, for args.yaml."""
    target: Target | None = None
    """What decides how much goes; None: the amount says it."""
    importance: Literal["taylor", "gamma"] | None = None
    """What ranks channels and units; None: gamma for a network of sparse training, else taylor."""
    importance_batches: int = 32
    """Batches of training pictures from which taylor is computed; all, if there are fewer."""
    rounds: int = 1
    """In how many cuts the amount is reached; importance is computed anew after each."""
    seed: int = 0
    """Of everything that is drawn at random."""
    sides: tuple[int, ...] | None = None
    """Of the network input, as `cli.input_size` takes them."""
    mode: Literal["letterbox", "stretch"] = "letterbox"
    batch_size: int = 16
    device: str = ""
    absorb: bool = True
    """Give what removed channels added to the convolutions that read them."""
    reconstruct: int = 0
    """Training pictures with which the convolutions that read removed channels are fitted; 0: none are."""
    test: bool = True
    """Measure accuracy and time."""
    dry_run: bool = False
    as_json: bool = False
    project: Path = Path("runs/prune")
    name: str = "exp"
    exist_ok: bool = False

    @property
    def trains(self) -> bool:
        """Whether there are training pictures, to compute importance from and to fit with."""
        return self.data is not None and self.data.train is not None

    def __post_init__(self) -> None:
        if self.target is not None:
            self._check_target(self.target)
        self._check_rounds()
        self._check_pictures()
        if len(self.amounts) > 1 and not self.dry_run:
            raise InputError("--percent, --shortcut: several values are compared with --dry-run; a pruning takes one")
        if self.dry_run:
            return
        if self.data is None and self.test:
            raise InputError("--data: is needed to measure the accuracy; or --no-test")
        if self.test and self.data.valid is None:
            raise DataError(f"{self.data.path}: names no valid pictures to measure on; --no-test works without")

    def _check_pictures(self) -> None:
        """Refuse what is computed from training pictures where there are none."""
        if self.trains:
            return
        for flag, wanted in (("--importance taylor", self.importance == "taylor"), ("--reconstruct", self.reconstruct)):
            if wanted and self.data is None:
                raise InputError(f"{flag}: needs --data, the pictures that the network was trained with")
            if wanted:
                raise DataError(f"{self.data.path}: names no train pictures, which {flag} needs")

    def _check_rounds(self) -> None:
        if self.rounds == 1:
            return
        if self.target is not None and not self.target.counted:
            raise InputError(
                f"--rounds: goes with --percent, --target-macs and --target-params, not {self.target.flag}"
            )
        for flag, given in (("--dry-run", self.dry_run), ("--group-percent", self.channels.group_percents)):
            if given:
                raise InputError(f"--rounds: does not go with {flag}; leave one of them out")

    def _check_target(self, target: Target) -> None:
        if len(self.amounts) > 1:
            raise InputError(f"{target.flag}: finds one network; give one --shortcut")
        if target.kind == "drop" and (self.data is None or self.data.valid is None):
            raise InputError("--max-drop: needs --data with valid pictures, on which AP50 is measured")

    def check_classes(self, network: Network) -> None:
        """Refuse weights of another class count than the data set's, or of other channels than its pictures have.

        Raises:
            InputError, CfgError: says both numbers.
        """
        if self.trains or (self.test and not self.dry_run):
            picture_channels(network)
        if self.data is not None and network.classes != self.data.classes:
            raise InputError(
                f"{self.files.weights}: a network of {network.classes} classes, but {self.data.path} has "
                f"{self.data.classes}; give the data set it was trained with"
            )
