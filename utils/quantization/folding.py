"""Batch normalisation folded into the weights that are rounded, in training as in inference.

Krishnamoorthi (arXiv:1806.08342, section 3.2.2): with σ² the running and σ_B² the batch's variance,

    training:   conv(x, Q(W γ / σ)) · σ / σ_B + β − γ μ_B / σ_B
    frozen, evaluation:   conv(x, Q(W γ / σ)) + β − γ μ / σ

The weights that are rounded follow the running statistics, so that they do not jitter from batch to batch, and the
result those of the batch. A second, unrounded convolution finds the batch's statistics; nothing is divided by γ, which
may be 0. What is added may be rounded, too: `BiasRounding`.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from utils.layers import normalisation
from utils.quantization.quantizers import ActivationQuantizer, Scale, WeightQuantizer, fake_quantize, scale_of
from utils.quantization.scheme import Grid

MOST_SHIFT = 15
"""Most places that a bias is shifted to the left: with 16 bits it then leaves half of 32 to the sum of products."""


class BiasRounding:
    """Biases on a grid of powers of two, to which an accumulator is aligned by shifts; a value in a `Folding`.

    With s_x the scale of what the convolution reads, s_w[o] that of its weights and s_b that of the largest bias,

        b̂[o] = s · ⌊b[o] / s⌉,   s = max(s_b, s_x s_w[o])

    so that a bias is a whole number of units of the accumulator, q_b 2^n with 0 <= n. A channel whose weights are so
    small that n would be more than MOST_SHIFT has larger steps for them: s_w[o] >= s_b / (2^MOST_SHIFT s_x).

    Args:
        grid: with a scale for each channel.
        source: what rounds what the convolution reads.
    """

    def __init__(self, grid: Grid, source: ActivationQuantizer) -> None:
        self.grid, self.source, self.rounding = grid, source, False

    def least(self, bias: Tensor | None) -> Tensor | float:
        """Least scale of the weights."""
        if bias is None or not self.rounding or not bias.detach().any():
            return 0.0
        return self._coarsest(bias) / (self.source.scale().scale * 2**MOST_SHIFT)

    def scale(self, bias: Tensor, weights: Tensor) -> Scale:
        """Scale of each bias, [O], beside weights of scale [O] or []."""
        scale = torch.maximum(self._coarsest(bias), self.source.scale().scale * weights).expand(len(bias))
        return Scale(scale, torch.zeros_like(scale, dtype=torch.int32))

    def __call__(self, bias: Tensor, weights: Tensor) -> Tensor:
        """The biases as they are added."""
        return fake_quantize(bias, self.scale(bias, weights), self.grid) if self.rounding else bias

    def _coarsest(self, bias: Tensor) -> Tensor:
        """s_b."""
        low, high = bias.detach().aminmax()
        return scale_of(low, high, self.grid).scale


class Folded(NamedTuple):
    """The one convolution that is computed."""

    weight: Tensor
    """[O, I, k, k], rounded."""
    bias: Tensor | None
    """[O], rounded if biases are."""
    weight_scale: Tensor | None = None
    """Of the weight, [O] or []; None: it is not rounded."""
    bias_scale: Tensor | None = None
    """[O]; None: biases are not rounded."""


class Folding:
    """The fold of one convolution, with or without a batch normalisation; a value in its slot.

    `frozen`: the running statistics are used in training, too, and stay.

    Args:
        bias: rounds what is added; None: nothing does.
    """

    def __init__(self, bias: BiasRounding | None = None) -> None:
        self.bias, self.frozen = bias, False

    def __call__(
        self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, quantize_weight: WeightQuantizer | None
    ) -> Tensor:
        """[B, C_in, H, W] to [B, filters, H', W']."""
        if bn is None or self.frozen or not bn.training:
            folded = self.folded(conv, bn, quantize_weight)
            return conv._conv_forward(x, folded.weight, folded.bias)
        mean, variance, running = _statistics(conv(x), bn)
        batch, deviation = torch.sqrt(variance + bn.eps), torch.sqrt(running + bn.eps)
        weight = conv.weight * (bn.weight / deviation).view(-1, 1, 1, 1)
        folded = self._rounded(weight, bn.bias - bn.weight * mean / batch, quantize_weight)
        sums = conv._conv_forward(x, folded.weight, None)
        return sums * (deviation / batch).view(1, -1, 1, 1) + cast(Tensor, folded.bias).view(1, -1, 1, 1)

    def folded(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, quantize_weight: WeightQuantizer | None) -> Folded:
        """Weight and bias of an evaluation, with running statistics."""
        if bn is None:
            return self._rounded(conv.weight, conv.bias, quantize_weight)
        gain, offset = normalisation(bn)
        return self._rounded(conv.weight * gain.view(-1, 1, 1, 1), offset, quantize_weight)

    def _rounded(self, weight: Tensor, bias: Tensor | None, quantize_weight: WeightQuantizer | None) -> Folded:
        if quantize_weight is None:
            return Folded(weight, bias)
        if self.bias is None:
            return Folded(quantize_weight(weight), bias)
        least = self.bias.least(bias)
        scale = quantize_weight.scale(weight, least).scale
        weight = quantize_weight(weight, least)
        if bias is None:
            return Folded(weight, None, scale)
        return Folded(weight, self.bias(bias, scale), scale, self.bias.scale(bias, scale).scale)


def _statistics(sums: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of a batch, and the running variance, [C] each; running ones are moved as usual."""
    sums = sums.to(torch.promote_types(sums.dtype, torch.float32))  # variance · count overflows float16
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    assert bn.momentum is not None, "BN_MOMENTUM"
    variance, mean = torch.var_mean(sums, dim=(0, 2, 3), correction=0)
    with torch.no_grad():
        count = sums.numel() // sums.shape[1]
        bn.running_mean += bn.momentum * (mean - bn.running_mean)
        bn.running_var += bn.momentum * (variance * (count / max(1, count - 1)) - bn.running_var)
        bn.num_batches_tracked += 1
    return mean, variance, bn.running_var
