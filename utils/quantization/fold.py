"""Batch normalisation folded into the weights that are rounded, in training as in inference.

Krishnamoorthi (arXiv:1806.08342, section 3.2.2): with σ² the running and σ_B² the batch's variance,

    training:   conv(x, Q(W γ / σ)) · σ / σ_B + β − γ μ_B / σ_B
    frozen, evaluation:   conv(x, Q(W γ / σ)) + β − γ μ / σ

The weights that are rounded follow the running statistics, so that they do not jitter from batch to batch, and the
result those of the batch. A second, unrounded convolution finds the batch's statistics; nothing is divided by γ, which
may be 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Folding:
    """The fold of one convolution; a value in its slot.

    `frozen`: the running statistics are used in training, too, and stay.
    """

    def __init__(self) -> None:
        self.frozen = False

    def __call__(
        self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, quantize_weight: nn.Module | None
    ) -> Tensor:
        """[B, C_in, H, W] to [B, filters, H', W']."""
        round_ = nn.Identity() if quantize_weight is None else quantize_weight
        if bn is None:
            return conv._conv_forward(x, round_(conv.weight), conv.bias)
        deviation = torch.sqrt(bn.running_var + bn.eps)
        gain = bn.weight / deviation
        weight = round_(conv.weight * gain.view(-1, 1, 1, 1))
        if self.frozen or not bn.training:
            return conv._conv_forward(x, weight, bn.bias - bn.running_mean * gain)
        mean, variance = _statistics(conv(x), bn)
        batch = torch.sqrt(variance + bn.eps)
        sums = conv._conv_forward(x, weight, None)
        shift = bn.bias - bn.weight * mean / batch
        return sums * (deviation / batch).view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def _statistics(sums: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a batch, [C] each; the running ones are moved as batch normalisation does it."""
    variance, mean = torch.var_mean(sums, dim=(0, 2, 3), correction=0)
    with torch.no_grad():
        count = sums.numel() // sums.shape[1]
        bn.running_mean += bn.momentum * (mean - bn.running_mean)
        bn.running_var += bn.momentum * (variance * count / max(1, count - 1) - bn.running_var)
        bn.num_batches_tracked += 1
    return mean, variance
