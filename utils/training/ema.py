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
        model: its copy starts the average; it stays on its device.
        decay: share of the average that an update keeps, once the start is over.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model; call it once an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (RAMP + self.updates))
        ours, theirs = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for own, other in self._copied:
            own.copy_(other)
