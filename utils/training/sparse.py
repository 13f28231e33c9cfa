"""Sparse training: the pressure on γ in every optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet
from utils.errors import InputError
from utils.graph import channel_graph
from utils.pruning.candidates import SETS, candidates
from utils.pruning.policy import voters
from utils.pruning.sparsity import SparseSettings
from utils.training.optim import Schedule


@dataclass(frozen=True)
class Sparsity:
    """What presses on the γ of a model's candidates.

    The pressure is applied once per optimizer step, when the gradient is complete: added up over batches, unscaled,
    averaged over the processes and clipped.
    """

    settings: SparseSettings
    schedule: Schedule
    layers: tuple[int, ...]
    """The candidates."""
    gammas: tuple[tuple[Tensor, ...], ...]
    """For each candidate the parameters γ [C] that speak for its channels: its own, and those of depthwise convolutions
    behind it."""

    def scores(self) -> NDArray[np.float64]:
        """|γ| of all channels [N], in the order of the candidates; means where several speak for one."""
        parts = [torch.stack([g.detach().abs() for g in layer]).double().mean(0) for layer in self.gammas]
        return torch.cat(parts).cpu().numpy()

    def add_gradient(self, epoch: int) -> None:
        """Add the sub-gradient s · sign(γ) to the gradients of γ, for the sub-gradient solver."""
        if not self.settings.proximal:
            for gamma, rate in self._rates(epoch):
                if gamma.grad is not None:
                    gamma.grad.add_(gamma.detach().sign() * rate)

    def shrink(self, epoch: int, step: int) -> None:
        """Take s · pace off every |γ|, down to 0, after the step, for the proximal solver."""
        if self.settings.proximal:
            pace = self.schedule.pace(step)
            for gamma, rate in self._rates(epoch):
                data = gamma.detach()
                data.copy_(data.sign() * (data.abs() - rate * pace).clamp_(min=0))

    @property
    def reach(self) -> float:
        """How far a weak γ gets in the whole training with s = 1: the sum of the paces under pressure."""
        schedule, per_epoch = self.schedule, self.schedule.steps_per_epoch
        rates = self.settings.schedule
        return sum(
            schedule.pace(step) * rates.least(step // per_epoch, schedule.epochs) for step in range(schedule.steps)
        )

    def _rates(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """Each γ with s for each of its channels."""
        pressed = self.settings.schedule.pressed(epoch, self.schedule.epochs, self.scores())
        rates = torch.from_numpy(pressed * self.settings.s)
        widths = [len(layer[0]) for layer in self.gammas]
        return [
            (gamma, part.to(gamma.device, gamma.dtype))
            for layer, part in zip(self.gammas, rates.split(widths), strict=True)
            for gamma in layer
        ]


def sparsity(model: Darknet, settings: SparseSettings, schedule: Schedule) -> Sparsity:
    """The pressure on a model that is about to be trained.

    Raises:
        InputError: it has no candidate, or all are frozen.
    """
    graph = channel_graph(model.network)
    layers = candidates(graph, settings.prune, settings.all_convs)
    who = voters(graph, layers)
    parameters = {i: tuple(model.layers[j].bn.weight for j in who[i]) for i in layers}
    layers = tuple(i for i in layers if all(gamma.requires_grad for gamma in parameters[i]))
    if not layers:
        raise InputError(f"--prune {settings.prune}: {model.network.path or 'the network'} has no such convolutions to "
                         f"train ({SETS[settings.prune]}); another --prune, or a smaller --freeze")  # fmt: skip
    found = Sparsity(settings, schedule, layers, tuple(parameters[i] for i in layers))
    return Sparsity(settings.resolved(found.scores(), found.reach), schedule, layers, found.gammas)
