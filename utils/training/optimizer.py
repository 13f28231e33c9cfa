"""The optimizer, its step size in the course of a run, and the averaged weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import Darknet
from utils.training.hyperparameters import OptimizerSettings

NOMINAL_BATCH = 64
"""Pictures an optimizer step stands for; smaller batches are accumulated up to about as many."""
LEAST_STEPS = 1000
"""A run gets at least this many optimizer steps, by accumulating less, before the nominal batch is kept."""
ADAM_SHARE = 1 / 30
"""Adam's learning rate as a share of SGD's."""
RAMP = 10
"""Early on the average forgets faster: the decay of update t is at most (1 + t) / (RAMP + t)."""
QUANTIZER = "quantize_"
"""In the names of a quantizer's tensors; its bounds are running averages already, and stay where training left them."""


def accumulation(batch: int, batches: int, epochs: int) -> int:
    """Return how many batches a step accumulates: to about NOMINAL_BATCH pictures, but LEAST_STEPS steps are left.

    Args:
        batch: pictures in a batch.
        batches: batches in an epoch.
        epochs: epochs in the run.
    """
    return max(1, min(round(NOMINAL_BATCH / batch), batches * epochs // LEAST_STEPS))


@dataclass(frozen=True)
class Schedule:
    """Learning rate and momentum at every optimizer step."""

    settings: OptimizerSettings
    epochs: int
    batches: int
    """Batches in an epoch."""
    accumulate: int
    """Batches in an optimizer step; the last step of an epoch may have fewer."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.batches / self.accumulate)

    @property
    def steps(self) -> int:
        """Optimizer steps in the run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.settings.warmup * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate at a step as a share of lr0: a half cosine, times a linear rise at the start.

        It would be lrf at the step after the last, so a run of few steps ends above lrf: one of 20 at 0.016, not 0.01.
        """
        down = (1 + math.cos(math.pi * step / max(1, self.steps))) / 2
        rate = self.settings.lrf + (1 - self.settings.lrf) * down
        return rate * self._warmth(step)

    def momentum(self, step: int) -> float:
        """Momentum at a step: rises with the learning rate."""
        low = self.settings.warmup_momentum
        return low + (self.settings.momentum - low) * self._warmth(step)

    def pace(self, step: int) -> float:
        """How far a constant gradient of 1 moves a weight per step: the learning rate of SGD over 1 - momentum."""
        return self.settings.lr0 * self.rate(step) / (1 - self.momentum(step))

    @property
    def ema_decay(self) -> float:
        """Decay of the averaged weights, which remember `ema_horizon` of the run."""
        return 1 - 1 / max(2.0, self.settings.ema_horizon * self.steps)

    def _warmth(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup_steps + 1))


def build_optimizer(model: nn.Module, settings: OptimizerSettings, adam: bool) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or Adam with decoupled decay, over the parameters that require a gradient.

    Only weights of convolutions and linear layers decay; γ, β, biases and shortcut weights do not.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if adam:
        betas = (settings.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=settings.lr0 * ADAM_SHARE, betas=betas, fused=True)
    nesterov = settings.momentum > 0  # PyTorch refuses it without a momentum
    return torch.optim.SGD(groups, lr=settings.lr0, momentum=settings.momentum, nesterov=nesterov, fused=True)


def set_step(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Give the optimizer the learning rate and momentum of a step."""
    adam = isinstance(optimizer, torch.optim.AdamW)
    rate = schedule.settings.lr0 * schedule.rate(step) * (ADAM_SHARE if adam else 1)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if not adam:
            group["momentum"] = schedule.momentum(step)


class AveragedModel:
    """Exponential moving average of a model's parameters and running statistics; the rest is the model's.

    Args:
        model: its copy starts the average; it stays on its device.
        decay: share of the average that an update keeps, once the start is over.
    """

    def __init__(self, model: Darknet, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0
        current = model.state_dict()
        self._averaged: list[tuple[Tensor, Tensor]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        for name, mean in self.model.state_dict().items():
            averaged = mean.is_floating_point() and QUANTIZER not in name
            (self._averaged if averaged else self._copied).append((mean, current[name]))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model; call it once an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (RAMP + self.updates))
        means, values = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(means, values, 1 - decay)
        if self._copied:
            copies, values = zip(*self._copied, strict=True)
            torch._foreach_copy_(copies, values)
