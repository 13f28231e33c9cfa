"""Averaged weights: what is evaluated and kept."""

from __future__ import annotations

import copy

import torch
from torch import nn

RAMP = 10
"""Early on the average forgets faster: the decay of update t is at most (1 + t) / (RAMP + t)."""


class AveragedModel:
    """Exponential moving average of a model's parameters and running statistics.

    Args:
        model: its copy starts the average.
        decay: share of the average that an update keeps, once the start is over.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model; call it once an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (RAMP + self.updates))
        ours, theirs = self.model.state_dict(), model.state_dict()
        floating = [key for key, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[key] for key in floating], [theirs[key] for key in floating], 1 - decay)
        for key, value in ours.items():
            if not value.is_floating_point():
                value.copy_(theirs[key])
