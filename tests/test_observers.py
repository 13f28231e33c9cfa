"""Ranges of activations: what each observer must do, and the published grids behind them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.test_quantizers import GRIDS, U8
from utils.quantization.calibration import BINS, COSTS, Curve, Histogram, Range, best_range
from utils.quantization.quantizers import fake_quantize, scale_of
from utils.quantization.scheme import Grid
from utils.quantization.settings import OBSERVED

S8 = Grid(8, narrow=False)
MISH = Curve(torch.nn.Mish(), again=True)


def histogram(x: torch.Tensor) -> Histogram:
    found = Histogram(float(x.amin()), float(x.amax()))
    found.add(x)
    return found


def heavy(count: int = 50_000) -> torch.Tensor:
    """Values of which few are far off: Student's t with three degrees of freedom."""
    torch.manual_seed(0)
    return torch.distributions.StudentT(3.0).sample((count,))


def rounded(x: torch.Tensor, bounds: Range, grid: Grid) -> torch.Tensor:
    return fake_quantize(x, scale_of(*(torch.tensor(bound) for bound in bounds), grid), grid)


def test_every_observer_is_explained():
    assert set(COSTS) == set(OBSERVED)


@pytest.mark.parametrize("x", [heavy(), heavy().abs(), -heavy().abs(), torch.zeros(5), torch.tensor([3.0])])
def test_a_histogram_counts_every_value_once_and_zero_as_zero(x):
    found = histogram(x)
    assert found.counts.sum() == len(x)
    assert found.values[found.zero] == 0
    assert ((found.values.diff() > 0).all()) and len(found.values) == BINS
    assert found.counts[found.zero] >= (x == 0).sum()


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits == 8], ids=str)
def test_a_range_holds_zero_and_lies_within_the_values(name, grid):
    for x in (heavy(2000), heavy(2000).relu(), torch.zeros(10), -torch.rand(50)):
        low, high = best_range(histogram(x), grid, COSTS[name])
        assert min(0.0, float(x.amin())) <= low <= 0 <= high <= max(0.0, float(x.amax()))
        scale = scale_of(torch.tensor(low), torch.tensor(high), grid).scale.item()
        assert not grid.power_of_two or math.frexp(scale)[0] == 0.5


@pytest.mark.parametrize("grid", [U8, S8, replace(S8, power_of_two=True), Grid(4)], ids=str)
def test_what_an_observer_minimizes_is_smaller_than_with_the_whole_range(grid):
    """On the values themselves, not on their histogram; the square error of heavy tails by a factor."""
    x = heavy()
    whole, square, cosine = (
        rounded(x, best_range(histogram(x), grid, COSTS[name]), grid) for name in ("minmax", "mse", "cosine")
    )
    assert (square - x).square().mean() < 0.95 * (whole - x).square().mean()
    similar = [torch.cosine_similarity(x, values, dim=0) for values in (whole, cosine, square)]
    assert similar[1] > similar[0] and similar[1] >= similar[2] - 1e-6


@pytest.mark.parametrize("name", COSTS)
def test_even_values_are_hardly_clipped(name):
    low, high = best_range(histogram(torch.linspace(-1, 2, 100_001)), U8, COSTS[name])
    assert low < -0.97 and high > 1.97


@pytest.mark.parametrize(("name", "high"), [("mse", 1.75), ("cosine", 1.75)])
def test_one_value_far_off_is_clipped(name, high):
    """A million even values up to 1 and one at 4: r² / (12 · 255²) + (4 − r)² / 10⁶ is least for r = 1.75."""
    torch.manual_seed(0)
    x = torch.cat((torch.rand(1_000_000), torch.tensor([4.0])))
    assert best_range(histogram(x), U8, COSTS[name]).high == pytest.approx(high, rel=0.1)
    assert best_range(histogram(x), U8, COSTS["minmax"]).high == 4


def test_a_curve_that_is_flat_below_lets_values_be_clipped_there():
    """mish of what lies below −6 is 0 nearly: the codes are better used above."""
    x = torch.linspace(-20, 4, 100_001)
    plain, curved = (best_range(histogram(x), U8, COSTS["mse"], curve) for curve in (None, MISH))
    assert plain.low < -19 and -10 < curved.low < -2
    errors = [
        (MISH.function(x) - rounded(MISH.function(rounded(x, bounds, U8)), bounds, U8)).square().mean()
        for bounds in (plain, curved)
    ]
    assert errors[1] < 0.5 * errors[0]
