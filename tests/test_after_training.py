"""Laws of quantization after training: calibration, bias correction, noise of each convolution."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings

from models import Darknet, fuse
from tests.nets import one_head, tiny
from tests.random_nets import networks
from tests.test_models import CONV, lively
from tests.test_quantized_networks import distance
from utils.errors import NumericsError
from utils.quantization import workflow
from utils.quantization.calibration import COSTS, biased, block_noise, head_noise, means, quantizers, whole_noise
from utils.quantization.quantizers import Phase, set_phase
from utils.quantization.scheme import AUTO, Grid, QuantSettings, rounded_convolutions
from utils.quantization.workflow import FloatNetwork, choose_observer, prepare, ranking

FINE = {"weight_bits": 16, "activation_bits": 16}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pictures(model: Darknet, count: int = 4) -> torch.Tensor:
    net = model.network.net
    images = torch.rand(count, net.channels, net.height, net.width, generator=torch.Generator().manual_seed(1))
    images.view(-1)[:2] = torch.tensor([0.0, 1.0])
    return images


def recipe(model: Darknet, observer: str = "minmax", *, correct: bool = False, **how: object) -> FloatNetwork:
    chosen = QuantSettings(**{"target": "cpu-vnni", "weight_bits": 8, "fold": True, **how})
    images = pictures(model)
    return replace(prepare(model, chosen, images.split(2), images if correct else None), cost=COSTS[observer])


@settings(max_examples=10)
@given(network=networks())
def test_sixteen_bits_are_nearly_float_and_nothing_else_changes(network):
    """Whatever blocks there are; neither batch statistics nor weights move, also when biases are corrected."""
    model = lively(network)
    images, before = pictures(model), copy.deepcopy(model.state_dict())
    for correct in (False, True):
        made = recipe(model, correct=correct, **FINE).quantized()
        made.quantize_image = None
        with torch.no_grad():
            assert distance(model(images).heads, made(images).heads) < 1e-3
            assert distance(made(images).heads, fuse(made)(images).heads) < 1e-3
        for key, value in made.state_dict().items():
            if "quantize_" not in key and not (correct and key.endswith("bias")):
                assert torch.equal(value, before[key]), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("observer", COSTS)
@pytest.mark.parametrize("target", ["cpu", "arm", "tensorrt"])
def test_bounds_are_found_for_every_tensor_that_is_rounded(observer, target):
    made = recipe(lively(tiny()), observer, target=target).quantized()
    assert (made.quantize_image.low, made.quantize_image.high) == (0, 1)
    for point, quantizer in quantizers(made):
        assert quantizer.seen == 4 and quantizer.low <= 0 <= quantizer.high != quantizer.low, point
        assert quantizer.rounding and not quantizer.observing


def test_minmax_bounds_are_those_of_what_is_rounded():
    """Before the activation function where that is a kernel of its own, behind it elsewhere."""
    model = lively(tiny())
    made, images = recipe(model, target="cpu").quantized(), pictures(model)
    with torch.no_grad():
        sums = model.layers[0].sums(images)
        out = model(images, features=(11,)).features[11]
    first, relu = made.layers[0].quantize_output, made.layers[11].quantize_output
    torch.testing.assert_close(torch.stack([first.low, first.high]), torch.stack(sums.aminmax()))
    torch.testing.assert_close(torch.stack([relu.low, relu.high]), torch.stack(out.aminmax()))


@pytest.mark.parametrize("target", ["cpu", "arm", "tensorrt"])
@pytest.mark.parametrize("observer", COSTS)
@pytest.mark.parametrize("gate", ["logistic", "hardsigmoid"])
def test_gates_keep_values_outside_the_bounds_of_their_sums(gate, observer, target):
    """σ(x) is above 0 where all x are below, and between 0 and 1 where steps of x are long."""
    network = one_head(CONV.format(6, gate))
    for shift, spread in ((-2, 0.3), (0, 20)):
        model = lively(network)
        model.layers[0].bn.bias.data.fill_(shift)
        model.layers[0].bn.weight.data.fill_(spread)
        images = pictures(model)
        made = recipe(model, observer, target=target, weight_bits=16).quantized()
        made.quantize_image = None
        with torch.no_grad():
            x = model.layers[0].sums(images)
            expected, found = (net(images, features=(0,)).features[0] for net in (model, made))
        step = (x.clamp(min=0).amax() - x.clamp(max=0).amin()) / 255
        assert (found - expected).abs().max() < step / 8 + 1 / 128


def test_weights_that_are_damaged_are_refused():
    model = lively(tiny())
    model.layers[2].bn.bias.data[0] = torch.inf
    with pytest.raises(NumericsError, match=r"block 2 .*not finite"):
        recipe(model)


def test_corrected_biases_leave_no_error_of_the_mean():
    """Of every convolution, behind all others, and by far more without the correction."""
    model = lively(tiny())
    images = pictures(model)
    errors = []
    for correct in (False, True):
        made = recipe(model, correct=correct, weight_bits=3, heads="all", first="all").quantized()
        found = means(made, images)
        set_phase(made, Phase.OFF)
        for index, bias in biased(made).items():
            bias.data.copy_(biased(model)[index])
        expected = means(made, images)
        errors.append(max(float((found[i] - expected[i]).abs().amax()) for i in found))
    assert errors[1] < 1e-5 < 0.01 < errors[0]


def test_with_all_blocks_kept_only_outputs_are_rounded():
    """At 16 bits of the outputs nothing is left of 2-bit weights."""
    model = lively(tiny())
    images = pictures(model)
    found = recipe(model, weight_bits=2, activation_bits=16, heads="all", first="all")
    blocks = rounded_convolutions(model.network, found.settings)
    coarse, kept = found.quantized(), found.quantized(blocks)
    assert all(kept.layers[block].quantize_weight is None for block in blocks)
    assert found.keeping((3, 1)).kept == (1, 3)
    for made in (coarse, kept):
        made.quantize_image = None
    with torch.no_grad():
        assert distance(model(images).heads, kept(images).heads) < 2e-3
        assert distance(model(images).heads, coarse(images).heads) > 0.02


def test_what_one_block_does_alone_is_known_and_ranked():
    """Weights that lie on the grid do no harm; those of few bits do most."""
    model = lively(one_head(*[CONV.format(6, "relu")] * 3))
    model.layers[1].conv.weight.data.sign_()
    made = recipe(model, target="tensorrt").quantized()
    made.layers[2].quantize_weight = type(made.layers[2].quantize_weight)(Grid(3, per_channel=True))
    alone = head_noise(made, [pictures(model)])
    assert set(alone) == {0, 1, 2, 3}
    assert alone[1] is None or alone[1] > 90
    assert ranking(alone)[0] == 2 and ranking(alone)[-1] == 1
    assert all(quantizer.rounding for _, quantizer in quantizers(made))


def test_more_bits_are_more_decibels():
    """Each bit of all that is rounded is worth 6 dB."""
    model = lively(tiny())
    noise = []
    for bits in (8, 10, 12):
        made = recipe(model, weight_bits=bits, activation_bits=bits).quantized()
        made.quantize_image = None  # which has 8 bits always
        noise.append(block_noise(made, pictures(model).split(2)))
    for block in noise[0]:
        gains = [more[block] - less[block] for less, more in pairwise(noise)]
        assert all(8 < gain < 16 for gain in gains), (block, gains)


def test_the_observer_that_is_found_leaves_least_noise_in_the_heads(monkeypatch):
    """One that clips nearly all is never taken, however it is named."""
    network = lively(tiny())
    whole = recipe(network)
    images = pictures(network)

    def narrow(counts: torch.Tensor, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        """Cost that the narrowest range has least of."""
        return rounded.abs().sum(-1)

    monkeypatch.setattr(workflow, "COSTS", {"aaa": narrow, **COSTS, "zzz": narrow})
    name, chosen = choose_observer(AUTO, whole, images.split(2))
    noise = {
        key: whole_noise(replace(whole, cost=cost).quantized(), images.split(2)) for key, cost in workflow.COSTS.items()
    }
    assert noise[name] == max(noise.values()) and chosen.cost is COSTS[name]
    assert noise["aaa"] == min(noise.values()) < noise[name] - 3
    assert choose_observer("minmax", whole, images.split(2))[0] == "minmax"
