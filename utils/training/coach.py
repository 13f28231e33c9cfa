"""What a sparse training has reached: how much pruning could take now, found on a few pictures every few epochs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models import Darknet, fuse, load_arrays
from utils.cli import log
from utils.data.datasets import DetectionDataset, Loader, make_loader
from utils.data.index import Index
from utils.errors import InfeasibleError
from utils.evaluation import evaluate
from utils.graph import ChannelGraph, channel_graph
from utils.pruning.constants import absorb
from utils.pruning.ladder import make_ladder
from utils.pruning.plan import gammas_of
from utils.pruning.policy import ChannelPolicy
from utils.pruning.sparsity import SparseSettings
from utils.pruning.surgery import Arrays, compact
from utils.pruning.target import Target
from utils.training.loop import Trainer

CHANNELS = "of the channels"
PICTURES, BATCH = 64, 16
EVALUATIONS = 8
"""In one look, about."""
TIME = 0.05
"""Share of the training time that trials may take."""
STILL = 0.9
"""γ whose lower quartile is above this share of what it was hardly move."""
FALLEN = 0.5
"""An accuracy below this share of what it was, after the rate has turned, will hardly come back."""


def script_policy(settings: SparseSettings) -> ChannelPolicy | None:
    """The channels that the script for what was pressed on removes; None for residual units."""
    if settings.prune == 2:
        return None
    floor = 0.0 if settings.prune == 1 else None
    return ChannelPolicy(0.0, prune=settings.prune, layer_keep=floor, all_convs=settings.all_convs)


class Start(NamedTuple):
    """Before the sparse training."""

    map50: float
    quartile: float
    """Of |γ|, the lower one."""


@dataclass
class Coach:
    """Prunes copies of the network that is trained, and says what that costs."""

    trainer: Trainer
    settings: SparseSettings
    loader: Loader
    graph: ChannelGraph
    begun: float = field(default_factory=time.perf_counter)
    spent: float = 0.0
    """Seconds that trials took."""
    cost: float = 0.0
    """Seconds that the next one is thought to take."""
    start: Start | None = None
    """None in a training that was resumed."""

    def begin(self) -> None:
        """Look at the network before its sparse training, if it is that."""
        started = time.perf_counter()
        model = self.trainer.state.kept
        map50 = self._map50(fuse(model))
        self.cost = EVALUATIONS * (time.perf_counter() - started)
        if self.trainer.progress.step == 0:
            self.start = Start(map50, self._quartile(gammas_of(model.network, _arrays(model))))

    def look(self, epoch: int, row: Mapping[str, float | None]) -> None:
        """Try what could go after an epoch, unless that would take too much time; a watcher of the trainer."""
        started = time.perf_counter()
        if self.spent + self.cost > TIME * (started - self.begun):
            return
        model = self.trainer.state.kept
        arrays = _arrays(model)
        gammas = gammas_of(model.network, arrays)
        map50 = self._map50(fuse(model))
        share, unit = self._share(arrays, gammas, map50)
        log(f"coach: {share:g} {unit} could go now for {self.settings.coach:g} points of AP50 at most "
            f"({len(self.loader.dataset)} pictures, AP50 {map50:.3f})")  # fmt: skip
        for word in self._words(epoch, map50, self._quartile(gammas)):
            log(f"coach: {word}")
        if self.settings.enough is not None and unit == CHANNELS and share >= self.settings.enough:
            log(f"coach: --s-enough {self.settings.enough:g} is reached; the training ends here")
            self.trainer.progress.enough = True
        self.cost = time.perf_counter() - started
        self.spent += self.cost

    def _share(self, arrays: Arrays, gammas: Mapping[int, NDArray[np.floating]], map50: float) -> tuple[float, str]:
        """The largest share of the channels, or number of units, that costs no more than it may."""
        policy = script_policy(self.settings)
        ladder = make_ladder(self.graph, gammas, policy, None, fine=False)

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
        device = self.trainer.team.device
        model = model.to(device, memory_format=torch.channels_last)
        return evaluate(model, self.loader, self.trainer.source.names, device=device, by_size=False).metrics.map50

    def _words(self, epoch: int, map50: float, quartile: float) -> list[str]:
        """Advice where s is too small or too large."""
        epochs, turn, start = self.trainer.settings.epochs, self.settings.schedule.turn, self.start
        if start is None:
            return []
        words = []
        if epoch >= epochs / 4 and quartile > STILL * start.quartile:
            words.append("γ hardly move; a larger s (--s auto finds one), or more epochs")
        if epoch >= (turn + (1 - turn) / 4) * epochs and map50 < FALLEN * start.map50:
            words.append(f"AP50 was {start.map50:.3f} and does not come back; a smaller s, or a smaller --s-share")
        return words

    def _quartile(self, gammas: Mapping[int, NDArray[np.floating]]) -> float:
        return float(np.quantile(np.abs(np.concatenate([gammas[i] for i in self.trainer.sparsity.layers])), 0.25))


def _arrays(model: Darknet) -> dict[str, NDArray[np.floating]]:
    """The tensors on the CPU, not copied where they are there."""
    return {name: value.cpu().numpy() for name, value in model.state_dict().items() if "num_batches" not in name}


def make_coach(trainer: Trainer, settings: SparseSettings) -> Coach | None:
    """A coach with up to `PICTURES` validation pictures, spread over all; None without them, or if none is wanted."""
    if trainer.val_loader is None or not settings.coach:
        return None
    index: Index = trainer.val_loader.dataset.index
    some = np.unique(np.linspace(0, len(index) - 1, min(PICTURES, len(index))).round().astype(int))
    part = dataclasses.replace(
        index,
        images=tuple(index.images[i] for i in some),
        labels=tuple(index.labels[i] for i in some),
        shapes=index.shapes[some],
    )
    network = trainer.model.network
    dataset = DetectionDataset(part, size=trainer.settings.test_size, channels=network.net.channels, cache="ram")
    return Coach(trainer, settings, make_loader(dataset, BATCH), channel_graph(network))
