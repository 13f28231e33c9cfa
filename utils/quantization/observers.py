"""Where the range of an activation ends: what is clipped, so that the rest is rounded the more finely.

One mechanism: ranges are tried on a histogram of the values, and the one that costs least is taken. An observer is the
ranges it tries and what it counts as a cost; with h_i values near x_i in bin i, and x̂_i what the grid makes of x_i:

    minmax        the whole range
    percentile    the share TAIL of all values lies beyond either end
    mse           Σ h_i (x_i − x̂_i)² / Σ h_i
    cosine        1 − Σ h_i x_i x̂_i / √(Σ h_i x_i² · Σ h_i x̂_i²); over powers of two as in SpursLipu's suite
    entropy       KL(P ‖ Q) (Migacz, "8-bit inference with TensorRT", 2017)

`mse` and `cosine` compare what is made of the values, f(x) and f(x̂), where that is known. An integer kernel that rounds
what an activation function gets, too: below −4 mish is flat, so what is clipped there costs next to nothing. And a
head: its logits go through the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from utils.quantization.grid import Grid
from utils.quantization.quantizers import Scale, fake_quantize, rounded, scale_of

BINS = 2048
"""Of a histogram, as in TensorRT and ONNX Runtime."""
CHUNK = 1 << 24
"""Values counted at once: float32 counts no further."""
TAIL = 1e-5
"""Of `percentile`; ONNX Runtime's default."""
RATIOS = 100
"""Clip ratios that are tried for an end of the range, evenly from 0.01 to 1."""
OCTAVES = 16
"""Halvings that are tried where scales are powers of two."""
SMOOTHING = 1e-4
"""Share of Q that is spread evenly, so that no bin of it is empty; as in ONNX Runtime."""
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Curve:
    """What is made of the values."""

    function: Callable[[Tensor], Tensor]
    again: bool
    """Whether its result is rounded to the same grid."""


class Range(NamedTuple):
    """From where to where values are represented."""

    low: float
    high: float


class Histogram:
    """How often values lie in each of BINS equal bins, one of which is centred at 0.

    Args:
        low: smallest value that will be counted.
        high: largest one.
    """

    def __init__(self, low: float, high: float) -> None:
        self.range = Range(min(low, 0.0), max(high, 0.0))
        self.step = (self.range.high - self.range.low) / (BINS - 2) or 1.0
        self.zero = round(-self.range.low / self.step)
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the values of a tensor."""
        low, high = (edge * self.step for edge in (-self.zero - 0.5, BINS - self.zero - 0.5))
        for part in x.detach().float().flatten().split(CHUNK):
            self.counts += torch.histc(part, BINS, low, high).double().cpu()

    @property
    def values(self) -> Tensor:
        """float64 [BINS], a value for each bin.

        They lie at different places in their bins, as the levels of a grid might otherwise meet the centre of every
        bin and seem exact; 0 is 0.
        """
        number = torch.arange(BINS, dtype=torch.float64) - self.zero
        return (number + torch.where(number == 0, 0.0, (number * GOLDEN) % 1 - 0.5)) * self.step

    def quantile(self, share: float) -> float:
        """The value that this share of the values does not exceed."""
        reached = torch.searchsorted(self.counts.cumsum(0), share * self.counts.sum())
        return (min(int(reached), BINS - 1) - self.zero) * self.step


Observer = Callable[[Histogram, Grid, Curve | None], Range]
"""The range of the values of a histogram on a grid, that are handed to a curve, if it is known to which."""
Cost = Callable[[Histogram, Tensor, Tensor, Grid, Curve | None], Tensor]
"""Of K ranges from `low` [K] to `high` [K]: [K]."""


def whole(histogram: Histogram, grid: Grid, curve: Curve | None = None) -> Range:
    """From the smallest to the largest value."""
    return histogram.range


def percentile(histogram: Histogram, grid: Grid, curve: Curve | None = None) -> Range:
    """All but the share TAIL of the values at either end."""
    low, high = histogram.range
    return Range(max(low, min(0.0, histogram.quantile(TAIL))), min(high, max(0.0, histogram.quantile(1 - TAIL))))


def cheapest(cost: Cost) -> Observer:
    """The observer that tries clip ratios: of both ends at once on a symmetric grid, else of one after the other."""

    def find(histogram: Histogram, grid: Grid, curve: Curve | None = None) -> Range:
        low, high = histogram.range
        if grid.power_of_two:
            ratios = torch.exp2(-torch.arange(OCTAVES, dtype=torch.float64))
        else:
            ratios = torch.arange(RATIOS, 0, -1, dtype=torch.float64) / RATIOS
        one = torch.ones_like(ratios)
        if grid.symmetric:
            most = max(-low, high)
            best = ratios[_least(cost(histogram, -most * ratios, most * ratios, grid, curve))].item()
            return Range(max(low, -most * best), min(high, most * best)) if best < 1 else histogram.range
        high *= ratios[_least(cost(histogram, low * one, high * ratios, grid, curve))].item()
        low *= ratios[_least(cost(histogram, low * ratios, high * one, grid, curve))].item()
        return Range(low, high)

    return find


def _least(costs: Tensor) -> int:
    """The first of the smallest."""
    return int(costs.numpy().argmin())


def squared_error(histogram: Histogram, low: Tensor, high: Tensor, grid: Grid, curve: Curve | None) -> Tensor:
    """Mean square of what rounding and clipping change, [K]."""
    x, found = _outcomes(histogram, low, high, grid, curve)
    return ((x - found).square() * histogram.counts).sum(-1) / histogram.counts.sum()


def angle(histogram: Histogram, low: Tensor, high: Tensor, grid: Grid, curve: Curve | None) -> Tensor:
    """1 minus the cosine of the angle between the values and what becomes of them, [K]."""
    x, found = _outcomes(histogram, low, high, grid, curve)
    product, one, other = ((a * b * histogram.counts).sum(-1) for a, b in ((x, found), (x, x), (found, found)))
    return 1 - product / (one * other).sqrt().clamp(min=torch.finfo(torch.float64).tiny)


def divergence(histogram: Histogram, low: Tensor, high: Tensor, grid: Grid, curve: Curve | None) -> Tensor:
    """KL(P ‖ Q), [K].

    P are the values inside a range, with those beyond added to its end bins; in Q the values inside that share a code
    are spread evenly over the bins that had any. A range of fewer bins than codes says nothing and is not taken. Good
    where values have one bulk, poor for heavy one-sided tails.
    """
    q, lowest, highest = _codes(histogram, low, high, grid)
    return torch.stack([_divergence(histogram.counts, row, lowest, highest) for row in q])


def _divergence(counts: Tensor, q: Tensor, lowest: int, highest: int) -> Tensor:
    inside = (q >= lowest) & (q <= highest)
    if int(inside.sum()) < highest - lowest:
        return torch.tensor(torch.inf, dtype=torch.float64)
    own, code = counts[inside], (q[inside] - lowest).long()
    p = own.clone()
    p[0] += counts[q < lowest].sum()
    p[-1] += counts[q > highest].sum()
    held = (own > 0).double()
    mass, bins = (torch.bincount(code, weights, highest - lowest + 1) for weights in (own, held))
    spread = held * (mass / bins.clamp(min=1))[code]
    p, spread = p / p.sum(), spread / spread.sum().clamp(min=torch.finfo(torch.float64).tiny)
    spread = (1 - SMOOTHING) * spread + SMOOTHING / len(spread)
    return torch.where(p > 0, p * (p / spread).clamp(min=torch.finfo(torch.float64).tiny).log(), 0.0).sum()


def _scales(low: Tensor, high: Tensor, grid: Grid) -> tuple[Scale, Grid]:
    """A scale for each of K ranges, and the grid that rounds [K, n] row by row."""
    each = replace(grid, per_channel=True)
    return scale_of(low, high, each), each


def _codes(histogram: Histogram, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, int, int]:
    """Codes [K, BINS] of the values, not clipped to those there are, and the least and the most that there are."""
    scale, each = _scales(low, high, grid)
    step, zero = scale.scale.double()[:, None], scale.zero.double()[:, None]
    return rounded(histogram.values / step, grid.half_even) + zero, each.low, each.high


def _outcomes(
    histogram: Histogram, low: Tensor, high: Tensor, grid: Grid, curve: Curve | None
) -> tuple[Tensor, Tensor]:
    """What is handed on of the values, [1, BINS], and what is with rounding, [K, BINS]."""
    scale, each = _scales(low, high, grid)
    x = histogram.values[None]
    found = fake_quantize(x.expand(len(low), -1), scale, each)
    if curve is None:
        return x, found
    made = curve.function(found)
    return curve.function(x.clone()), fake_quantize(made, scale, each) if curve.again else made


OBSERVERS: Mapping[str, Observer] = {
    "minmax": whole,
    "percentile": percentile,
    "mse": cheapest(squared_error),
    "entropy": cheapest(divergence),
    "cosine": cheapest(angle),
}
"""--observer; `request.OBSERVED` says what they are."""
