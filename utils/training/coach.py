"""What a sparse training has reached: how much pruning could take now, found on a few pictures every few epochs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models import Darknet, fuse, load_arrays
from utils.cli import log
from utils.data.datasets import Batch, collate
from utils.errors import InfeasibleError
from utils.evaluation import evaluate
from utils.graph import channel_graph
from utils.pruning.constants import absorb
from utils.pruning.ladder import make_ladder
from utils.pruning.plan import arrays_of, gammas_of
from utils.pruning.policy import ChannelPolicy
from utils.pruning.sparsity import SparseSettings
from utils.pruning.surgery import Arrays, compact
from utils.pruning.target import Target
from utils.training.loop import Trainer

CHANNELS = "of the channels"
PICTURES, BATCH = 64, 16
EVALUATIONS = 9
"""In the first look: of the network before and now, and of the copies by which one of a hundred steps is found."""
TIME = 0.05
"""Share of the training time that the coach may take."""
STILL = 0.9
"""γ whose lower quartile is above this share of what it was hardly move."""
FALLEN = 0.5
"""An accuracy below this share of what it was says nothing of what could go, as little is left to lose; when half of
the epochs after the turn of the rate are over, it will hardly come back. (A quarter is too early: bccd, yolov4-tiny, 16
epochs, had a quarter of its AP50 then and all of it at the end.)"""


def script_policy(settings: SparseSettings) -> ChannelPolicy | None:
    """The channels that the script for what was pressed on removes; None for residual units."""
    if settings.prune == 2:
        return None
    floor = 0.0 if settings.prune == 1 else None
    return ChannelPolicy(0.0, prune=settings.prune, layer_keep=floor, all_convs=settings.all_convs)


class Allowance:
    """Time for work beside something longer: at most a share of all the time since it was made.

    Work is done in pieces, and another piece is begun only if one as long as the longest so far still fits. So the
    share is kept at every moment as long as no piece is longer than all before it; what a longer one takes too much is
    made up for before any work is begun again.

    Args:
        share: of the time.
        clock: seconds.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self._clock = share, clock
        self._begun = self._piece = clock()
        self._since: float | None = None
        self._done = self._longest = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._begun

    @property
    def used(self) -> float:
        """Seconds of work."""
        return self._done + (0.0 if self._since is None else self._clock() - self._since)

    @property
    def left(self) -> float:
        """Seconds of work that may be done now; below 0 after a piece that took too long."""
        return self.share * self.elapsed - self.used

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is done within is work."""
        self._since = self._piece = self._clock()
        try:
            yield
        finally:
            self._done, self._since = self.used, None

    def another(self) -> bool:
        """End a piece of the work, to begin another one: whether that fits."""
        now = self._clock()
        self._longest = max(self._longest, now - self._piece)
        self._piece = now
        return self.left >= self._longest


class Found(NamedTuple):
    """What a look has found."""

    share: float | None
    """Of the channels, or number of residual units, that could go; None where AP50 is too low to tell."""
    unit: str
    map50: float
    """Of the network as it is."""


class _LeftOff(Exception):  # noqa: N818
    """A look was left."""


class Coach:
    """Prunes copies of the network that is trained, and says what that costs.

    It changes nothing of the training but `Progress.enough`, and no step sees what it draws at random. So the weights
    after an epoch are the same with and without it, in a run that was interrupted, too. When it looks depends on the
    time that its looks and the epochs take, and with `--s-enough` so does the epoch with which a run ends: then two
    runs, or one that was interrupted and one that was not, have the same weights only after the same epoch.

    Args:
        trainer: of a sparse training with validation pictures; up to `PICTURES` of them, spread over all, are used.
        settings: what it was asked for.
        allowance: the time for all looks.
    """

    def __init__(self, trainer: Trainer, settings: SparseSettings, allowance: Allowance) -> None:
        self.trainer, self.settings, self.allowance = trainer, settings, allowance
        self.graph = channel_graph(trainer.model.network)
        self.best50 = 0.0
        """The highest AP50 that is known: of the epochs, and of the network before them."""
        self.start_quartile: float | None = None
        """The lower quartile of |γ| then; None in a run that was resumed."""
        self.cost: float | None = None
        """Seconds that the next look is thought to take; None before the first one."""
        self._before: Darknet | None = None
        count = len(trainer.val_loader.dataset)
        self._positions = np.unique(np.linspace(0, count - 1, min(PICTURES, count)).round().astype(int))
        self._batches: list[Batch] = []
        self._told: set[str] = set()
        if trainer.progress.step == 0:
            model = trainer.state.kept
            with allowance.work():
                self._before = copy.deepcopy(fuse(model))
                self.start_quartile = self._quartile(model)

    def look(self, epoch: int, row: Mapping[str, float | None]) -> None:
        """After an epoch say what could go, if there is time to try it, and what is wrong; a watcher of the trainer."""
        found = self._try(row)
        if found is not None:
            self._say(found)
        map50 = row.get("map50", None if found is None else found.map50)
        self.best50 = max(self.best50, map50 or 0.0)
        with self.allowance.work():
            words = self._words(epoch, map50, self._quartile(self.trainer.state.kept))
        for fault in sorted(words.keys() - self._told):
            log(f"coach: {words[fault]}")
        self._told |= words.keys()

    def _try(self, row: Mapping[str, float | None]) -> Found | None:
        """What a look finds; None where there is no time for it."""
        used = self.allowance.used
        if self.allowance.left < (self.cost or EVALUATIONS * self._evaluation(row)):
            return None
        try:
            with self.allowance.work():
                found = self._found()
        except _LeftOff:
            self.cost = 2 * (self.allowance.used - used)
            return None
        self.cost = self.cost if found.share is None else self.allowance.used - used
        return found

    def _evaluation(self, row: Mapping[str, float | None]) -> float:
        """Seconds that an evaluation may take, from those that the epoch took for a picture."""
        if seconds := row.get("test_seconds"):
            return seconds / len(self.trainer.val_loader.dataset) * len(self._positions)
        each = row["seconds"] * self.trainer.team.size / len(self.trainer.train_loader.dataset)
        return each * len(self._positions)

    def _found(self) -> Found:
        """Look.

        Raises:
            _LeftOff: there is no time for the rest of it, or the run is to stop.
        """
        if self._before is not None:
            self.best50, self._before = max(self.best50, self._map50(self._before)), None
        model = self.trainer.state.kept
        arrays = arrays_of(model)
        map50 = self._map50(fuse(model))
        if map50 <= max(FALLEN * self.best50, self.settings.coach / 100):
            return Found(None, CHANNELS, map50)
        return Found(*self._share(arrays, gammas_of(model.network, arrays), map50), map50)

    def _say(self, found: Found) -> None:
        source = (f"({len(self._positions)} pictures, AP50 {found.map50:.3f}; "
                  f"{self.allowance.used / self.allowance.elapsed:.1%} of the time so far)")  # fmt: skip
        if found.share is None:
            log(f"coach: AP50 is too low to tell what could go {source}")
            return
        log(f"coach: {found.share:g} {found.unit} could go now for {self.settings.coach:g} points of AP50 at most "
            f"{source}")  # fmt: skip
        enough = self.settings.enough
        if enough is not None and found.unit == CHANNELS and found.share >= enough:
            log(f"coach: --s-enough {enough:g} is reached; the training ends here")
            self.trainer.progress.enough = True

    def _share(self, arrays: Arrays, gammas: Mapping[int, NDArray[np.floating]], map50: float) -> tuple[float, str]:
        """The largest share of the channels, or number of units, that costs no more than it may."""
        policy = script_policy(self.settings)
        ladder = make_ladder(self.graph, gammas, policy, None, fine=False)

        @cache
        def drop(step: int) -> float:
            removal = ladder.plan(step).removal
            network, tensors = compact(self.graph, absorb(self.graph, arrays, removal), removal)
            small = load_arrays(network, {name: torch.from_numpy(np.asarray(a)) for name, a in tensors.items()})
            return 100 * (map50 - self._map50(fuse(small)))

        try:
            step = Target("drop", self.settings.coach).fulfil(ladder.steps, drop, ladder.first)
        except InfeasibleError:
            step = 0
        return (step, "residual units") if policy is None else (step / ladder.whole, CHANNELS)

    def _map50(self, model: Darknet) -> float:
        device, names = self.trainer.team.device, self.trainer.source.names
        model = model.to(device, memory_format=torch.channels_last)
        return evaluate(model, self._pictures(), names, device=device, by_size=False).metrics.map50

    def _pictures(self) -> Iterator[Batch]:
        """The pictures in batches, which are made once; each is a piece of the work."""
        dataset = self.trainer.val_loader.dataset
        for number, first in enumerate(range(0, len(self._positions), BATCH)):
            if self.trainer.stop or not self.allowance.another():
                raise _LeftOff
            if number == len(self._batches):
                part = self._positions[first : first + BATCH].tolist()
                self._batches.append(collate([dataset[position] for position in part]))
            yield self._batches[number]

    def _words(self, epoch: int, map50: float | None, quartile: float) -> dict[str, str]:
        """Advice where s is too small or too large, by what is wrong; AP50 is None where it was not measured."""
        epochs, turn, words = self.trainer.settings.epochs, self.settings.schedule.turn, {}
        if self.start_quartile is not None and epoch >= epochs / 4 and quartile > STILL * self.start_quartile:
            words["still"] = "γ hardly move; a larger s (--s auto finds one), or more epochs"
        late = epoch >= (turn + (1 - turn) / 2) * epochs
        if map50 is not None and late and map50 < FALLEN * self.best50:
            words["fallen"] = f"AP50 was {self.best50:.3f} and does not come back; a smaller s, or a smaller --s-share"
        return words

    def _quartile(self, model: Darknet) -> float:
        gammas = gammas_of(model.network, arrays_of(model))
        return float(np.quantile(np.abs(np.concatenate([gammas[i] for i in self.trainer.sparsity.layers])), 0.25))


def make_coach(trainer: Trainer, settings: SparseSettings) -> Coach | None:
    """A coach; None without validation pictures, or if none is wanted."""
    if trainer.val_loader is None or not settings.coach:
        return None
    return Coach(trainer, settings, Allowance(TIME))
