"""Rounding a tensor to a grid, so that training sees what integer arithmetic will make of it.

    q = clamp(⌊x / s⌉ + z, low, high),   x̂ = s (q − z)                     (Jacob et al., arXiv:1712.05877, section 2.1)

The gradient passes where x lies inside the range and is 0 outside (straight-through estimator).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.quantization.scheme import Grid

LEAST_SCALE = 2.0**-60
"""Scales of at most this are those of a tensor that is 0 everywhere, and are 1: dividing by less might overflow."""
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
    A scale that is to be a power of two is the least whose 2^bits steps are as long as the range. The topmost value may
    then be clipped by a step; the next power, which clips nothing, errs by as much in its middle.

    Args:
        low: smallest values, float.
        high: largest ones.
        grid: the codes.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    span = torch.maximum(-low, high) if grid.symmetric else high - low
    scale = span / ((grid.high if grid.symmetric else grid.high - grid.low) + grid.power_of_two)
    scale = torch.where(scale > LEAST_SCALE, scale, torch.ones_like(scale))
    if grid.power_of_two:
        scale = power_above(scale).clamp(min=LEAST_POWER)
    if grid.symmetric:
        return Scale(scale, torch.zeros_like(scale, dtype=torch.int32))
    zero = grid.low - rounded(low / scale, grid.half_even)
    return Scale(scale, zero.clamp(grid.low, grid.high).int())


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
    """x̂ for x; float of the same shape, float32 for fewer bits, which have no room for the codes."""
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

    The paper leaves out max|w|, which a batch normalisation behind makes no difference to; with one folded in front it
    must be there. Its grid 2 ⌊(2^k − 1)(t/2 + ½)⌉ / (2^k − 1) − 1 has 2^k levels and none at 0 (`published`); integer
    arithmetic needs the 0, so the default has the 2^k − 1 levels of a symmetric grid.
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
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, grid: Grid, momentum: float = 0.05, twice: bool = False) -> None:
        super().__init__()
        self.grid, self.momentum, self.twice = grid, momentum, twice
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.observing, self.rounding = False, False

    def scale(self) -> Scale:
        """Scale and zero point of the bounds."""
        return scale_of(self.low, self.high, self.grid)

    def before(self, x: Tensor) -> Tensor:
        """What an activation function gets: x, or x̂ if that is rounded, too."""
        return self._seen(x) if self.twice else x

    def forward(self, x: Tensor) -> Tensor:
        """x, or x̂ while `rounding`."""
        return self._rounded(x) if self.twice else self._seen(x)

    def _seen(self, x: Tensor) -> Tensor:
        if self.observing and self.training:
            self.observe(x.detach())
        return self._rounded(x)

    def _rounded(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale(), self.grid) if self.rounding else x

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the bounds towards those of a batch; the first batch sets them."""
        low, high = (bound.float() for bound in x.aminmax())
        share = torch.where(self.seen == 0, 1.0, self.momentum)
        self.low += share * (low - self.low)
        self.high += share * (high - self.high)
        self.seen += 1
