"""Averaged weights: what is evaluated and kept."""

from __future__ import annotations

import copy

import torch
from torch import nn

RAMP = 10
"""Early on the average forgets faster: the decay of update t is at most (1 + t) / (RAMP + t)."""
QUANTIZER = "quantize_"
"""In the names of a quantizer's tensors; its bounds are running averages already, and stay where training left them."""


class AveragedModel:
    """Exponential moving average of a model's parameters and running statistics; the rest is the model's.

    Args:
        model: its copy starts the average; it stays on its device.
        decay: share of the average that an update keeps, once the start is over.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0
        theirs = model.state_dict()
        self._averaged, self._copied = [], []
        for name, own in self.model.state_dict().items():
            averaged = own.is_floating_point() and QUANTIZER not in name
            (self._averaged if averaged else self._copied).append((own, theirs[name]))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model; call it once an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (RAMP + self.updates))
        ours, theirs = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for own, other in self._copied:
            own.copy_(other)
