"""Rounding a tensor to a grid, so that training sees what integer arithmetic will make of it; quantizers of a model.

    q = clamp(⌊x / s⌉ + z, low, high),   x̂ = s (q − z)                     (Jacob et al., arXiv:1712.05877, section 2.1)

The gradient passes where x lies inside the range and is 0 outside (straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from models import Computing, ConvBlock, Darknet, normalisation
from utils.darknet.blocks import Network
from utils.darknet.targets import check
from utils.quantization.scheme import GATES, Grid, QuantSettings, conv_grids, passes

MOST_SHIFT = 15
"""Most places that a bias is shifted to the left: with 16 bits it then leaves half of 32 to the sum of products."""
LEAST_SCALE = 2.0**-60
"""Scales of at most this are those of a tensor that is 0 everywhere: dividing by less might overflow."""
ZERO_SCALE = 2.0**-8
"""Scale of a tensor that is 0 everywhere. Biases are rounded to its multiples where the tensor is read, so 1 is too
coarse."""
LEAST_POWER = 2.0**-24
"""Least scale that is a power of two: what shifts of few places still reach."""


class Scale(NamedTuple):
    """What codes mean: scalars, or [C] for a grid with a scale for each channel."""

    scale: Tensor
    """float32, above 0."""
    zero: Tensor
    """int32, the code of 0."""


def scale_of(low: Tensor, high: Tensor, grid: Grid) -> Scale:
    """Scale and zero point for values between `low` and `high`.

    The range is first extended to contain 0, which is always represented exactly: padding with zeros stays exact.
    A power-of-two scale is the smallest one whose 2^bits steps cover the range. It may clip the largest value by one
    step. The next power clips nothing, but its rounding error, half of a doubled step, is as large for all values.

    Args:
        low: smallest values, float.
        high: largest ones.
        grid: the codes.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    span = torch.maximum(-low, high) if grid.symmetric else high - low
    scale = span / ((grid.high if grid.symmetric else grid.high - grid.low) + grid.power_of_two)
    scale = torch.where(scale > LEAST_SCALE, scale, torch.full_like(scale, ZERO_SCALE))
    if grid.power_of_two:
        scale = power_above(scale).clamp(min=LEAST_POWER)
    if grid.symmetric:
        return Scale(scale, torch.zeros_like(scale, dtype=torch.int32))
    zero = grid.low - rounded(low / scale, grid.half_even)
    return Scale(scale, zero.clamp(grid.low, grid.high).int())


def gate_scale(like: Tensor, grid: Grid) -> Scale:
    """Scale and zero point of values 0…1, on the device of `like`; the topmost is clipped by a step of 2^-bits."""
    zero = torch.zeros_like(like)
    return scale_of(zero, zero + (1 - 2.0**-grid.bits), grid)


def power_above(x: Tensor) -> Tensor:
    """The least power of two that is at least x > 0, exactly."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def rounded(x: Tensor, half_even: bool = True) -> Tensor:
    """Nearest integers, ties to the even one or away from 0."""
    if half_even:
        return torch.round(x)
    whole = torch.trunc(x)
    return whole + torch.sign(x) * ((x - whole).abs() >= 0.5)  # x + 0.5 would be rounded itself


def codes(x: Tensor, scale: Scale, grid: Grid) -> Tensor:
    """The integer codes of a tensor, as floats."""
    step, zero = _spread(scale, x, grid)
    return (rounded(x / step, grid.half_even) + zero).clamp(grid.low, grid.high)


def fake_quantize(x: Tensor, scale: Scale, grid: Grid) -> Tensor:
    """x̂ for x, of the same shape and type; float32 for a 16-bit x, which cannot represent all codes."""
    if torch.finfo(x.dtype).bits < 32:
        x = x.float()
    step, zero = _spread(scale, x, grid)
    return _Rounded.apply(x, step, zero, grid)


def _spread(scale: Scale, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point in the type of x, of a shape that broadcasts against it."""
    shape = (-1, *(1,) * (x.dim() - 1)) if grid.per_channel else ()
    return scale.scale.to(x.dtype).reshape(shape), scale.zero.to(x.dtype).reshape(shape)


class _Rounded(torch.autograd.Function):
    """Forward rounds, backward passes what was not clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        """x̂."""
        q = rounded(x / step, grid.half_even).add_(zero)
        ctx.save_for_backward((q >= grid.low) & (q <= grid.high))
        return q.clamp_(grid.low, grid.high).sub_(zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient inside the range."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


class WeightQuantizer(nn.Module):
    """Rounds weights [O, I, k, k]; the range is that of the tensor at hand, so nothing is remembered."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid, self.rounding = grid, True

    def scale(self, weight: Tensor, least: Tensor | float = 0.0) -> Scale:
        """Scale of a weight: from its largest magnitude, of each output channel or of all, and at least `least`."""
        flat = weight.detach().flatten(1)
        if not self.grid.per_channel:
            flat = flat.flatten()
        return _at_least(scale_of(flat.amin(dim=-1), flat.amax(dim=-1), self.grid), least)

    def codes(self, weight: Tensor, least: Tensor | float = 0.0) -> Tensor:
        """The integers of a weight, which `scale` gives their meaning, as floats of its shape."""
        return codes(weight, self.scale(weight, least), self.grid)

    def forward(self, weight: Tensor, least: Tensor | float = 0.0) -> Tensor:
        """The weight on its grid, or as it is while not `rounding`."""
        return self._rounded(weight, least) if self.rounding else weight

    def _rounded(self, weight: Tensor, least: Tensor | float) -> Tensor:
        return fake_quantize(weight, self.scale(weight, least), self.grid)


def _at_least(scale: Scale, least: Tensor | float) -> Scale:
    return scale._replace(scale=scale.scale.clamp(min=least))


class DorefaQuantizer(WeightQuantizer):
    """Weights squeezed by tanh before they are rounded (Zhou et al., arXiv:1606.06160, section 2.3).

        t = tanh(w) / max|tanh w|,   ŵ = max|w| · (t on the grid of −1 … 1)

    The paper leaves out max|w|, which a batch normalisation after the convolution cancels. With one folded into the
    weights it is needed. The paper's grid 2 ⌊(2^k − 1)(t/2 + ½)⌉ / (2^k − 1) − 1 has 2^k levels, none at 0; only old
    checkpoints have it (`published`). Integer arithmetic needs the 0: the default is the symmetric grid of 2^k − 1.
    """

    def __init__(self, grid: Grid, published: bool = False) -> None:
        super().__init__(grid)
        self.published = published

    def scale(self, weight: Tensor, least: Tensor | float = 0.0) -> Scale:
        """Scale of ŵ."""
        unit = self._unit(weight, least)
        return unit._replace(scale=unit.scale * self._largest(weight))

    def codes(self, weight: Tensor, least: Tensor | float = 0.0) -> Tensor:
        """The integers of a weight on the grid that has a 0."""
        return codes(self._squeezed(weight), self._unit(weight, least), self.grid)

    def _squeezed(self, weight: Tensor) -> Tensor:
        """t, −1 … 1."""
        squeezed = torch.tanh(weight)
        return squeezed / squeezed.detach().abs().amax().clamp(min=LEAST_SCALE)

    def _largest(self, weight: Tensor) -> Tensor:
        """max|w|, or the power of two above it; 1 if it is 0."""
        largest = weight.detach().abs().amax().float()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        return power_above(largest) if self.grid.power_of_two else largest

    def _unit(self, weight: Tensor, least: Tensor | float) -> Scale:
        """Scale of t."""
        one = torch.ones((), device=weight.device)
        return _at_least(scale_of(-one, one, self.grid), least / self._largest(weight))

    def _rounded(self, weight: Tensor, least: Tensor | float) -> Tensor:
        squeezed = self._squeezed(weight)
        if self.published:
            levels = 2**self.grid.bits - 1
            whole = (squeezed / 2 + 0.5) * levels
            unit = whole + (torch.round(whole) - whole).detach()
            values = 2 * unit / levels - 1
        else:
            values = fake_quantize(squeezed, self._unit(weight, least), self.grid)
        return values * self._largest(weight).to(values.dtype)


class ActivationQuantizer(nn.Module):
    """Rounds an activation to a grid between running bounds.

    The bounds follow the batches' smallest and largest values while `observing`, and never otherwise: an evaluation
    changes nothing.

    Args:
        grid: the codes.
        momentum: share of a batch in the bounds.
        twice: round what an activation function gets, with the same codes, and not only what it gives; the bounds are
            then those of what it gets. Integer kernels work so where the function is one of its own.
        gate: the function is one of GATES, whose values may lie outside the bounds of what it gets: they have codes of
            their own. Those of 8 bits are the codes of TensorFlow Lite's LOGISTIC.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, grid: Grid, momentum: float = 0.05, twice: bool = False, gate: bool = False) -> None:
        super().__init__()
        self.grid, self.momentum, self.twice, self.gate = grid, momentum, twice, twice and gate
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.observing, self.rounding = False, False

    def scale(self) -> Scale:
        """Scale and zero point of what is put out."""
        return gate_scale(self.low, self.grid) if self.gate else self.scale_before()

    def scale_before(self) -> Scale:
        """Scale and zero point of the bounds: with `twice`, of what the activation function gets."""
        return scale_of(self.low, self.high, self.grid)

    def before(self, x: Tensor) -> Tensor:
        """What an activation function gets: x, or x̂ if that is rounded, too."""
        return self._seen(x) if self.twice else x

    def forward(self, x: Tensor) -> Tensor:
        """x, or x̂ while `rounding`."""
        return self._rounded(x, self.scale) if self.twice else self._seen(x)

    def _seen(self, x: Tensor) -> Tensor:
        if self.observing and self.training:
            self.observe(x.detach())
        return self._rounded(x, self.scale_before)

    def _rounded(self, x: Tensor, scale: Callable[[], Scale]) -> Tensor:
        return fake_quantize(x, scale(), self.grid) if self.rounding else x

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the bounds towards those of a batch; the first batch sets them."""
        low, high = (bound.float() for bound in x.aminmax())
        share = torch.where(self.seen == 0, 1.0, self.momentum)
        self.low += share * (low - self.low)
        self.high += share * (high - self.high)
        self.seen += 1


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

    Weights are rounded with batch normalisation folded into them, in training as in inference. Krishnamoorthi
    (arXiv:1806.08342, section 3.2.2): with σ² the running and σ_B² the batch's variance,

        training:   conv(x, Q(W γ / σ)) · σ / σ_B + β − γ μ_B / σ_B
        frozen, evaluation:   conv(x, Q(W γ / σ)) + β − γ μ / σ

    The weights that are rounded follow the running statistics, so that they do not jitter from batch to batch, and the
    result those of the batch. A second, unrounded convolution finds the batch's statistics; nothing is divided by γ,
    which may be 0.

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


class Phase(Enum):
    """What quantizers do."""

    OFF = "off"
    """Nothing: the network computes in float."""
    OBSERVING = "observing"
    """Weights are rounded, bounds of activations are found."""
    ROUNDING = "rounding"
    """All is rounded, bounds follow the batches."""
    FROZEN = "frozen"
    """All is rounded; bounds and folded statistics stay."""


def quantize(model: Darknet, settings: QuantSettings) -> Darknet:
    """Put quantizers into the slots of a model, which is changed; they are in phase OFF.

    Raises:
        InputError: the target cannot compute an activation of the network.
    """
    network = model.network
    check(network, settings.target)
    model.quantize_image = ActivationQuantizer(settings.activations(8))
    outputs: dict[int, ActivationQuantizer | None] = {-1: model.quantize_image}
    """Quantizer of the output of each block."""
    for index, (block, layer) in enumerate(zip(network.blocks, model.layers, strict=True)):
        source = outputs.get(block.reads(index)[0])
        if isinstance(layer, ConvBlock):
            _fill(layer, index, network, settings, source)
        elif isinstance(layer, Computing) and not passes(block):
            layer.quantize_output = ActivationQuantizer(settings.activations())
        if isinstance(getattr(layer, "activation", None), nn.LeakyReLU) and settings.kernels.leaky_slope is not None:
            layer.activation = nn.LeakyReLU(settings.kernels.leaky_slope, inplace=True)
        outputs[index] = layer.quantize_output if isinstance(layer, Computing) and not passes(block) else source
    set_phase(model, Phase.OFF)
    return model


def _fill(
    layer: ConvBlock, index: int, network: Network, settings: QuantSettings, source: ActivationQuantizer | None
) -> None:
    """Fill the slots of the convolution of block `index`, whose input `source` rounds."""
    grids = conv_grids(network, index, settings)
    if grids.output is not None:
        gate = getattr(network.blocks[index], "activation", "") in GATES
        layer.quantize_output = ActivationQuantizer(grids.output, twice=grids.before, gate=gate)
    if grids.weights is None:
        return
    if settings.scheme == "dorefa":
        layer.quantize_weight = DorefaQuantizer(replace(grids.weights, per_channel=False), settings.published)
    else:
        layer.quantize_weight = WeightQuantizer(grids.weights)
    if grids.bias is not None:
        assert source is not None, "where biases are rounded, nothing is float"
        layer.fold = Folding(BiasRounding(grids.bias, source))
    elif settings.fold and layer.bn is not None:
        layer.fold = Folding()


def set_phase(model: Darknet, phase: Phase) -> None:
    """Let all quantizers of a model do what a phase says."""
    rounding = phase in (Phase.ROUNDING, Phase.FROZEN)
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.observing = phase in (Phase.OBSERVING, Phase.ROUNDING)
            module.rounding = rounding
        elif isinstance(module, WeightQuantizer):
            module.rounding = phase is not Phase.OFF
        elif isinstance(module, ConvBlock) and module.fold is not None:
            module.fold.frozen = phase is Phase.FROZEN
            if module.fold.bias is not None:
                module.fold.bias.rounding = rounding
