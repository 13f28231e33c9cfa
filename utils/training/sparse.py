"""Sparse training: the pressure on γ in every optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet
from utils.errors import InputError
from utils.graph import channel_graph
from utils.pruning.policy import SETS, candidates, voters
from utils.pruning.sparsity import AUTO, DECAY, PLAN_END, Control, SparseSettings
from utils.training.optim import Schedule
from utils.training.state import Progress


@dataclass(frozen=True)
class Sparsity:
    """What presses on the γ of a model's candidates.

    The pressure is applied once per optimizer step, when the gradient is complete: added up over batches, unscaled,
    averaged over the processes and clipped.
    """

    model: Darknet
    settings: SparseSettings
    schedule: Schedule
    voters: Mapping[int, tuple[int, ...]]
    """For each candidate the blocks whose γ [C] speak for its channels: itself, and depthwise ones behind it."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The candidates."""
        return tuple(self.voters)

    def scores(self) -> NDArray[np.float64]:
        """|γ| of all channels [N], in the order of the candidates; means where several speak for one."""
        return self._scores().cpu().numpy()

    @torch.no_grad()
    def add_gradient(self, progress: Progress) -> None:
        """Add the sub-gradient s · sign(γ) to the gradients of γ, for the sub-gradient solver."""
        if not self.settings.proximal:
            for gamma, rate in zip(self.gammas(), self._rates(progress), strict=True):
                if gamma.grad is not None:
                    gamma.grad.add_(gamma.sign() * rate)

    @torch.no_grad()
    def shrink(self, progress: Progress) -> None:
        """Take s · pace off every |γ|, down to 0, after the step, for the proximal solver."""
        if self.settings.proximal:
            pace = self.schedule.pace(progress.step)
            for gamma, rate in zip(self.gammas(), self._rates(progress), strict=True):
                gamma.copy_(gamma.sign() * (gamma.abs() - rate * pace).clamp_(min=0))

    @torch.no_grad()
    def keep_zeros(self, average: Darknet) -> None:
        """Set γ of the averaged model to 0 where the proximal solver has set those of the model to 0."""
        if self.settings.proximal:
            for mean, gamma in zip(self.gammas(average), self.gammas(), strict=True):
                mean.masked_fill_(gamma == 0, 0)

    @property
    def reach(self) -> float:
        """How far a weak γ gets in the whole training with s = 1: the sum of the paces under pressure."""
        schedule, per_epoch = self.schedule, self.schedule.steps_per_epoch
        rates = self.settings.schedule
        return sum(
            schedule.pace(step) * rates.least(step // per_epoch, schedule.epochs) for step in range(schedule.steps)
        )

    def control(self) -> Control | None:
        """The state of s = auto before the first step; None where s is a number."""
        return Control.begin(self.scores(), self.planned_reach()) if self.settings.s == AUTO else None

    def planned_reach(self, step: int = 0) -> float:
        """How far a γ gets from a step on until the plan of s = auto ends, with s = 1."""
        return float(self._paces[step:].sum())

    def gammas(self, model: Darknet | None = None) -> list[Tensor]:
        """The parameters γ that are pressed on, of the model or of another one of its kind."""
        layers = (self.model if model is None else model).layers
        return [layers[block].bn.weight for blocks in self.voters.values() for block in blocks]

    def _scores(self) -> Tensor:
        found = [
            torch.stack([self.model.layers[block].bn.weight.detach().abs() for block in blocks]).double().mean(0)
            for blocks in self.voters.values()
        ]
        return torch.cat(found)

    @cached_property
    def _paces(self) -> NDArray[np.float64]:
        """Pace of each step of the plan of s = auto."""
        return np.array([self.schedule.pace(step) for step in range(round(PLAN_END * self.schedule.steps))])

    def _rates(self, progress: Progress) -> list[Tensor | float]:
        """For each γ, s for its channels; one number while all are pressed alike."""
        widths = [len(self.model.layers[layer].bn.weight) for layer in self.voters]
        pressed, control = (
            self.settings.schedule.penalised(progress.epoch, self.schedule.epochs, sum(widths)),
            progress.control,
        )
        s, others = self.settings.s, DECAY
        if control is None and pressed in (0, sum(widths)):
            return [s * (1.0 if pressed else DECAY)] * sum(map(len, self.voters.values()))
        scores = self._scores()
        if control is not None:
            weak = float((scores < control.limit).double().mean())
            left = self.planned_reach(progress.step)
            s, share = control.next_s(weak, left, self.settings, self.schedule.steps_per_epoch)
            pressed, others = math.ceil(share * len(scores)), 0.0
        ranks = torch.empty(len(scores), dtype=torch.long, device=scores.device)
        ranks[torch.argsort(scores, stable=True)] = torch.arange(len(scores), device=scores.device)
        rates = torch.where(ranks < pressed, s, s * others).float()
        if control is not None:
            rates[scores < control.limit] = control.hold
        parts = zip(rates.split(widths), self.voters.values(), strict=True)
        return [part for part, blocks in parts for _ in blocks]


def sparsity(model: Darknet, settings: SparseSettings, schedule: Schedule) -> Sparsity:
    """The pressure on a model that is about to be trained.

    Raises:
        InputError: it has no candidate, or all are frozen.
    """
    graph = channel_graph(model.network)
    who = voters(graph, candidates(graph, settings.prune, settings.all_convs))
    free = {i: blocks for i, blocks in who.items() if all(model.layers[j].bn.weight.requires_grad for j in blocks)}
    if not free:
        raise InputError(f"--prune {settings.prune}: {model.network.path or 'the network'} has no such convolutions to "
                         f"train ({SETS[settings.prune]}); another --prune, or a smaller --freeze")  # fmt: skip
    return Sparsity(model, settings, schedule, free)
