"""Ranges of activations: what each observer must do, and the published grids behind them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.test_quantizers import GRIDS, U8
from utils.quantization.grid import Grid
from utils.quantization.observers import BINS, OBSERVERS, TAIL, Curve, Histogram, Range
from utils.quantization.quantizers import fake_quantize, scale_of
from utils.quantization.request import OBSERVED

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
    assert set(OBSERVERS) == set(OBSERVED)
    assert TAIL == 1e-5 and "a hundred-thousandth" in OBSERVED["percentile"]


@pytest.mark.parametrize("x", [heavy(), heavy().abs(), -heavy().abs(), torch.zeros(5), torch.tensor([3.0])])
def test_a_histogram_counts_every_value_once_and_zero_as_zero(x):
    found = histogram(x)
    assert found.counts.sum() == len(x)
    assert found.values[found.zero] == 0
    assert ((found.values.diff() > 0).all()) and len(found.values) == BINS
    assert found.counts[found.zero] >= (x == 0).sum()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits == 8], ids=str)
def test_a_range_holds_zero_and_lies_within_the_values(name, grid):
    for x in (heavy(2000), heavy(2000).relu(), torch.zeros(10), -torch.rand(50)):
        low, high = OBSERVERS[name](histogram(x), grid, None)
        assert min(0.0, float(x.amin())) <= low <= 0 <= high <= max(0.0, float(x.amax()))
        scale = scale_of(torch.tensor(low), torch.tensor(high), grid).scale.item()
        assert not grid.power_of_two or math.frexp(scale)[0] == 0.5


@pytest.mark.parametrize("grid", [U8, S8, replace(S8, power_of_two=True), Grid(4)], ids=str)
def test_what_an_observer_minimizes_is_smaller_than_with_the_whole_range(grid):
    """On the values themselves, not on their histogram; the square error of heavy tails by a factor."""
    x = heavy()
    whole, square, cosine = (rounded(x, OBSERVERS[name](histogram(x), grid, None), grid)
                             for name in ("minmax", "mse", "cosine"))  # fmt: skip
    assert (square - x).square().mean() < 0.95 * (whole - x).square().mean()
    similar = [torch.cosine_similarity(x, values, dim=0) for values in (whole, cosine, square)]
    assert similar[1] > similar[0] and similar[1] >= similar[2] - 1e-6


def test_a_percentile_leaves_out_single_values_of_many():
    """At either end 1 of 200 000 lies far off, less than TAIL, and 5 lie further in, more than that."""
    ends = [torch.full((count,), sign * value) for sign in (-1.0, 1.0) for count, value in ((5, 4.0), (1, 30.0))]
    low, high = OBSERVERS["percentile"](histogram(torch.cat([torch.linspace(-1, 2, 200_000), *ends])), U8, None)
    assert (low, high) == (pytest.approx(-4, abs=0.05), pytest.approx(4, abs=0.05))


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "cosine"])
def test_even_values_are_hardly_clipped(name):
    low, high = OBSERVERS[name](histogram(torch.linspace(-1, 2, 100_001)), U8, None)
    assert low < -0.97 and high > 1.97


@pytest.mark.parametrize(("name", "high"), [("percentile", 1), ("entropy", 1), ("mse", 1.75), ("cosine", 1.75)])
def test_one_value_far_off_is_clipped(name, high):
    """A million even values up to 1 and one at 4: r² / (12 · 255²) + (4 − r)² / 10⁶ is least for r = 1.75."""
    torch.manual_seed(0)
    x = torch.cat((torch.rand(1_000_000), torch.tensor([4.0])))
    assert OBSERVERS[name](histogram(x), U8, None).high == pytest.approx(high, rel=0.1)
    assert OBSERVERS["minmax"](histogram(x), U8, None).high == 4


def test_a_percentile_leaves_its_share_beyond_each_end():
    x = torch.linspace(-3, 5, 1_000_001)
    low, high = OBSERVERS["percentile"](histogram(x), U8, None)
    width = 8 / BINS
    assert abs(low + 3) < 2 * width and abs(high - 5) < 2 * width
    x[:5], x[-5:] = -300.0, 500.0
    low, high = OBSERVERS["percentile"](histogram(x), U8, None)
    assert low > -4 and high < 6


def test_a_curve_that_is_flat_below_lets_values_be_clipped_there():
    """mish of what lies below −6 is 0 nearly: the codes are better used above."""
    x = torch.linspace(-20, 4, 100_001)
    plain, curved = (OBSERVERS["mse"](histogram(x), U8, curve) for curve in (None, MISH))
    assert plain.low < -19 and -10 < curved.low < -2
    errors = [(MISH.function(x) - rounded(MISH.function(rounded(x, bounds, U8)), bounds, U8)).square().mean()
              for bounds in (plain, curved)]  # fmt: skip
    assert errors[1] < 0.5 * errors[0]


def test_entropy_needs_more_bins_than_codes():
    """With 2 to the 16 codes nothing can be compared, and the whole range stays."""
    x = heavy()
    assert OBSERVERS["entropy"](histogram(x), Grid(16), None) == histogram(x).range
