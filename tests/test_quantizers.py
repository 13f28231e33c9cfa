"""Rounding to grids: the published values, what every quantizer must keep, and the ranges that observers choose."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.quantization.calibration import BINS, COSTS, Curve, Histogram, Range, best_range
from utils.quantization.quantizers import (
    ActivationQuantizer,
    DorefaQuantizer,
    Scale,
    WeightQuantizer,
    codes,
    fake_quantize,
    power_above,
    rounded,
    scale_of,
)
from utils.quantization.scheme import Grid

U8 = Grid(8, signed=False, symmetric=False)
GRIDS = [
    Grid(bits, signed=signed, symmetric=symmetric, power_of_two=two, half_even=even)
    for bits in (2, 4, 8, 16)
    for signed, symmetric in ((True, True), (True, False), (False, False))
    for two in (False, True)
    for even in (False, True)
]
VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


def bounds(x: torch.Tensor, grid: Grid) -> Scale:
    return scale_of(x.amin(), x.amax(), grid)


def test_published_example():
    """uint8 on −0.7 … 1.9: s = 0.0101960784, z = 69."""
    scale = scale_of(torch.tensor(-0.7), torch.tensor(1.9), U8)
    assert scale.scale.item() == pytest.approx(0.0101960784, rel=1e-7)
    assert scale.zero.item() == 69
    x = torch.tensor([0.0, 0.5, 1.9, 2.5, -0.7])
    assert codes(x, scale, U8).tolist() == [69, 118, 255, 255, 0]
    assert fake_quantize(x, scale, U8).tolist() == pytest.approx([0, 0.499608, 1.896471, 1.896471, -0.703529], abs=1e-6)


def test_dorefa_published_example():
    """k = 2: (−1.2, −0.3, 0.1, 0.8) becomes (−1, −1/3, 1/3, 1)."""
    weight = torch.tensor([-1.2, -0.3, 0.1, 0.8])
    found = DorefaQuantizer(Grid(2), published=True)(weight) / weight.abs().amax()
    assert found.tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1], abs=1e-6)


def test_dorefa_has_a_zero_and_keeps_the_largest_weight():
    weight = torch.tensor([[-2.0, 0.001, 0.5, 1.0]])
    quantizer = DorefaQuantizer(Grid(4))
    found = quantizer(weight)
    assert found[0, 1] == 0
    assert found.abs().amax() == 2
    steps = found / quantizer.scale(weight).scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-5, rtol=0)
    assert len(torch.unique(quantizer(torch.linspace(-1, 1, 1001)))) == 2**4 - 1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=15)
@given(values=VALUES)
def test_laws_of_every_grid(grid, values):
    """0 is exact, the error is at most half a step, rounding twice changes nothing, order is kept.

    At the outermost codes the error is half a step more where the zero point is rounded, and where the scale is a power
    of two.
    """
    x = torch.tensor(values, dtype=torch.float64)
    scale = bounds(x, grid)
    found = fake_quantize(x, scale, grid)
    assert fake_quantize(torch.zeros(1, dtype=torch.float64), scale, grid).item() == 0
    q = codes(x, scale, grid)
    outermost = (q == grid.low) | (q == grid.high)
    halves = 1 + outermost * ((not grid.symmetric) + grid.power_of_two)
    assert ((found - x).abs() <= 0.5 * scale.scale * halves * (1 + 1e-4)).all()
    torch.testing.assert_close(fake_quantize(found, scale, grid), found, atol=0, rtol=1e-12)
    order = torch.argsort(x)
    assert (found[order].diff() >= 0).all()
    assert grid.low <= q.amin() and q.amax() <= grid.high
    if grid.power_of_two:
        assert math.frexp(scale.scale.item())[0] == 0.5
    if grid.symmetric:
        torch.testing.assert_close(fake_quantize(-x, bounds(-x, grid), grid), -found, atol=0, rtol=0)


@pytest.mark.parametrize("grid", [Grid(8), Grid(8, per_channel=True), U8, Grid(8, power_of_two=True)], ids=str)
def test_zeros_stay_finite(grid):
    x = torch.zeros(3, 2, 1, 1)
    scale = WeightQuantizer(grid).scale(x)
    assert (scale.scale == 2.0**-8).all()
    assert (fake_quantize(x, scale, grid) == 0).all()


def test_a_scale_for_each_channel():
    weight = torch.tensor([[1.0, -0.3], [100.0, 3.0], [0.0, 0.0]]).reshape(3, 2, 1, 1)
    found = WeightQuantizer(Grid(8, per_channel=True))(weight)
    each = [WeightQuantizer(Grid(8))(row[None]) for row in weight]
    torch.testing.assert_close(found, torch.cat(each), atol=0, rtol=0)


def test_the_gradient_passes_within_the_range_and_at_its_ends_only():
    scale = Scale(torch.tensor(0.5), torch.tensor(100, dtype=torch.int32))
    x = 0.5 * (torch.tensor([0.0, 7.3, 255.0, -1.0, 256.0]) - 100)
    (3 * fake_quantize(x.requires_grad_(), scale, U8)).sum().backward()
    assert x.grad.tolist() == [3, 3, 3, 0, 0]


def test_dorefa_takes_the_largest_weight_for_a_constant():
    """d/dw of max|w| · tanh w / max|tanh w|, also of the largest weight itself."""
    weight = torch.tensor([[1.0], [0.25]], requires_grad=True)
    DorefaQuantizer(Grid(8, per_channel=False))(weight).sum().backward()
    want = (1 - torch.tanh(weight.detach()) ** 2) / math.tanh(1.0)
    torch.testing.assert_close(weight.grad, want)


@pytest.mark.parametrize(("even", "zero"), [(True, 126), (False, 127)])
def test_a_zero_point_is_rounded_as_values_are(even, zero):
    found = scale_of(torch.tensor(-126.5), torch.tensor(128.5), dataclasses.replace(U8, half_even=even))
    assert found.scale == 1 and found.zero == zero


def test_ties():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert rounded(x).tolist() == [-2, -2, 0, 0, 2, 2]
    assert rounded(x, half_even=False).tolist() == [-3, -2, -1, 1, 2, 3]
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))  # floor(x + ½) makes 1 of it
    assert rounded(torch.stack([below, -below]), half_even=False).tolist() == [0, 0]


def test_a_power_of_two_is_exact_at_powers_and_right_above():
    powers = torch.exp2(torch.arange(-100.0, 100.0))
    assert torch.equal(power_above(powers), powers)
    assert torch.equal(power_above(torch.nextafter(powers, torch.tensor(torch.inf))), 2 * powers)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("dorefa", [False, True])
def test_weights_of_powers_of_two_are_codes_times_their_scale(bits, dorefa):
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(bits)) * 3
    kind = DorefaQuantizer(Grid(bits, power_of_two=True)) if dorefa else WeightQuantizer(Grid(bits, power_of_two=True))
    for least in (0.0, 2.0**-3):
        scale = kind.scale(weight, least).scale
        assert math.frexp(float(scale))[0] == 0.5 and scale >= least
        assert torch.equal(kind.codes(weight, least) * scale, kind(weight, least))


def test_bounds_move_in_training_only_and_only_while_observing():
    quantizer = ActivationQuantizer(U8, momentum=0.5)
    quantizer.observing = True
    quantizer(torch.tensor([-1.0, 3.0]))
    assert (quantizer.low.item(), quantizer.high.item()) == (-1, 3)
    quantizer(torch.tensor([0.0, 5.0]))
    assert (quantizer.low.item(), quantizer.high.item()) == (-0.5, 4)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.eval()
    quantizer(torch.tensor([-100.0, 100.0]))
    quantizer.train()
    quantizer.observing = False
    quantizer(torch.tensor([-100.0, 100.0]))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize(("bits", "signed", "symmetric"), [(1, True, True), (17, True, True), (8, False, True)])
def test_impossible_grids_are_refused(bits, signed, symmetric):
    with pytest.raises(ValueError, match=r"allowed is|needs signed"):
        Grid(bits, signed=signed, symmetric=symmetric)


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


def on_grid(x: torch.Tensor, bounds: Range, grid: Grid) -> torch.Tensor:
    return fake_quantize(x, scale_of(*(torch.tensor(bound) for bound in bounds), grid), grid)


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
        on_grid(x, best_range(histogram(x), grid, COSTS[name]), grid) for name in ("minmax", "mse", "cosine")
    )
    assert (square - x).square().mean() < 0.95 * (whole - x).square().mean()
    similar = [torch.cosine_similarity(x, values, dim=0) for values in (whole, cosine, square)]
    assert similar[1] > similar[0] and similar[1] >= similar[2] - 1e-6


@pytest.mark.parametrize("name", ["mse", "cosine"])
def test_one_value_far_off_is_clipped(name):
    """A million even values up to 1 and one at 4: r² / (12 · 255²) + (4 − r)² / 10⁶ is least for r = 1.75."""
    torch.manual_seed(0)
    x = torch.cat((torch.rand(1_000_000), torch.tensor([4.0])))
    assert best_range(histogram(x), U8, COSTS[name]).high == pytest.approx(1.75, rel=0.1)
    assert best_range(histogram(x), U8, COSTS["minmax"]).high == 4


def test_a_curve_that_is_flat_below_lets_values_be_clipped_there():
    """mish of what lies below −6 is 0 nearly: the codes are better used above."""
    x = torch.linspace(-20, 4, 100_001)
    plain, curved = (best_range(histogram(x), U8, COSTS["mse"], curve) for curve in (None, MISH))
    assert plain.low < -19 and -10 < curved.low < -2
    errors = [
        (MISH.function(x) - on_grid(MISH.function(on_grid(x, bounds, U8)), bounds, U8)).square().mean()
        for bounds in (plain, curved)
    ]
    assert errors[1] < 0.5 * errors[0]
