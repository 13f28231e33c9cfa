"""Laws of quantization after training: calibration, equalization, bias correction, sensitivity."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings

from models import Darknet, fuse
from tests.nets import one_head, tiny
from tests.random_nets import networks
from tests.test_models import CONV, lively
from tests.test_quantized_networks import distance
from utils.errors import InputError, NumericsError
from utils.layers import ConvBlock
from utils.quantization import workflow
from utils.quantization.attach import Phase, set_phase
from utils.quantization.calibrate import quantizers
from utils.quantization.correct import biased, means
from utils.quantization.equalize import Pair, equalize, find_pairs, folded
from utils.quantization.grid import Grid
from utils.quantization.observers import OBSERVERS, Curve, Histogram, Range
from utils.quantization.recipe import Recipe, prepare
from utils.quantization.request import AUTO
from utils.quantization.scheme import QuantSettings
from utils.quantization.sensitivity import block_noise, head_noise, ranking, rounded_blocks, whole_noise

FINE = {"weight_bits": 16, "activation_bits": 16}
POOL = "[maxpool]\nsize=2\nstride=1\n"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pictures(model: Darknet, count: int = 4) -> torch.Tensor:
    net = model.network.net
    images = torch.rand(count, net.channels, net.height, net.width, generator=torch.Generator().manual_seed(1))
    images.view(-1)[:2] = torch.tensor([0.0, 1.0])
    return images


def recipe(model: Darknet, observer: str = "minmax", *, correct: bool = False, **how: object) -> Recipe:
    chosen = QuantSettings(**{"target": "cpu-vnni", "weight_bits": 8, "fold": True, **how})
    images = pictures(model)
    return prepare(model, chosen, images.split(2), OBSERVERS[observer], images if correct else None)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(network=networks())
def test_sixteen_bits_are_nearly_float_and_nothing_else_changes(network):
    """Whatever blocks there are; neither batch statistics nor weights move, also when biases are corrected."""
    model = lively(network)
    images, before = pictures(model), copy.deepcopy(model.state_dict())
    for correct in (False, True):
        made = recipe(model, correct=correct, **FINE).made()
        made.quantize_image = None
        with torch.no_grad():
            assert distance(model(images).heads, made(images).heads) < 3e-3
            assert distance(made(images).heads, fuse(made)(images).heads) < 3e-3
        for key, value in made.state_dict().items():
            if "quantize_" not in key and not (correct and key.endswith("bias")):
                assert torch.equal(value, before[key]), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("target", ["cpu", "arm", "tensorrt"])
def test_bounds_are_found_for_every_tensor_that_is_rounded(observer, target):
    made = recipe(lively(tiny()), observer, target=target).made()
    assert (made.quantize_image.low, made.quantize_image.high) == (0, 1)
    for point, quantizer in quantizers(made):
        assert quantizer.seen == 4 and quantizer.low <= 0 <= quantizer.high != quantizer.low, point
        assert quantizer.rounding and not quantizer.observing


def test_minmax_bounds_are_those_of_what_is_rounded():
    """Before the activation function where that is a kernel of its own, behind it elsewhere."""
    model = lively(tiny())
    made, images = recipe(model, target="cpu").made(), pictures(model)
    with torch.no_grad():
        sums = model.layers[0].sums(images)
        out = model(images, features=(11,)).features[11]
    first, relu = made.layers[0].quantize_output, made.layers[11].quantize_output
    torch.testing.assert_close(torch.stack([first.low, first.high]), torch.stack(sums.aminmax()))
    torch.testing.assert_close(torch.stack([relu.low, relu.high]), torch.stack(out.aminmax()))


def test_weights_that_are_damaged_are_refused():
    model = lively(tiny())
    model.layers[2].bn.bias.data[0] = torch.inf
    with pytest.raises(NumericsError, match=r"block 2 .*not finite"):
        recipe(model)


def test_pairs_are_convolutions_of_which_one_alone_reads_the_other():
    pairs = find_pairs(tiny())
    assert pairs.usable == (Pair(0, 1), Pair(2, 3)) and pairs.curved == ()
    between = one_head(CONV.format(4, "relu"), POOL, CONV.format(4, "mish"), "[dropout]\n", CONV.format(4, "leaky"))
    assert find_pairs(between).usable == (Pair(0, 2), Pair(4, 5))
    assert find_pairs(between).curved == (Pair(2, 4),)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(network=networks())
def test_equalizing_changes_no_output(network):
    """In float64 to 1e-6; grouped and depthwise convolutions, and channels without weight, are among them."""
    assume(find_pairs(network).usable)
    model = lively(network).double()
    maker = model.layers[find_pairs(network).usable[0].maker]
    (maker.conv if maker.bn is None else maker.bn).weight.data[0] = 0
    images = pictures(model).double()
    even = copy.deepcopy(model)
    equalize(even)
    with torch.no_grad():
        assert distance(model(images).heads, even(images).heads) < 1e-6


def test_equalized_channels_are_as_large_where_made_as_where_read():
    model = lively(one_head(CONV.format(6, "leaky"), POOL, CONV.format(5, "relu"))).double()
    for layer in model.layers:
        if isinstance(layer, ConvBlock) and layer.bn is not None:
            layer.bn.bias.data.zero_()
            layer.bn.running_mean.zero_()
    model.layers[0].bn.weight.data *= torch.tensor([1, 10, 0.1, 3, 0.5, 100.0])
    equalize(model)
    for maker, reader in find_pairs(model.network).usable:
        made = folded(model.layers[maker])[0].abs().amax(dim=(1, 2, 3))
        read = folded(model.layers[reader])[0].abs().amax(dim=(0, 2, 3))
        torch.testing.assert_close(made, read, rtol=5e-3, atol=0)


def test_equalizing_lets_no_constant_outgrow_the_others():
    """A channel that has lost its weights, but not its constant, would take the range with it."""
    model = lively(one_head(CONV.format(6, "leaky"), CONV.format(5, "leaky")))
    model.layers[0].bn.weight.data[2] = 1e-8
    before = folded(model.layers[0])[1].abs().amax()
    equalize(model)
    assert folded(model.layers[0])[1].abs().amax() <= before * (1 + 1e-5)


def test_equalizing_helps_where_one_input_channel_outweighs_the_others():
    """Weights of 4 bits, one of whose columns is a hundred times as large as the rest: these vanish."""
    model = lively(one_head(CONV.format(6, "relu"), CONV.format(8, "relu")))
    strong = torch.tensor([0.01, 0.01, 1, 0.01, 0.01, 0.01])
    model.layers[1].conv.weight.data *= strong.view(1, -1, 1, 1)
    model.layers[0].bn.weight.data /= strong
    model.layers[0].bn.bias.data /= strong
    even = copy.deepcopy(model)
    equalize(even)
    noise = [block_noise(recipe(found, target="fpga", weight_bits=4).made(), [pictures(model)])[1]
             for found in (model, even)]  # fmt: skip
    assert noise[1] > noise[0] + 3


def test_a_network_of_mish_is_not_equalized():
    with pytest.raises(InputError, match=r"--equalize: .*mish does not scale.*leaky"):
        equalize(Darknet(one_head(CONV.format(4, "mish"), CONV.format(4, "mish"))))


def test_corrected_biases_leave_no_error_of_the_mean():
    """Of every convolution, behind all others, and by far more without the correction."""
    model = lively(tiny())
    images = pictures(model)
    errors = []
    for correct in (False, True):
        made = recipe(model, correct=correct, weight_bits=3, heads="all", first="all").made()
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
    coarse, kept = found.made(), found.made(rounded_blocks(found.made()))
    assert rounded_blocks(kept) == () and found.keeping((3, 1)).kept == (1, 3)
    for made in (coarse, kept):
        made.quantize_image = None
    with torch.no_grad():
        assert distance(model(images).heads, kept(images).heads) < 2e-3
        assert distance(model(images).heads, coarse(images).heads) > 0.02


def test_what_one_block_does_alone_is_known_and_ranked():
    """Weights that lie on the grid do no harm; those of few bits do most."""
    model = lively(one_head(*[CONV.format(6, "relu")] * 3))
    model.layers[1].conv.weight.data.sign_()
    made = recipe(model, target="tensorrt").made()
    made.layers[2].quantize_weight = type(made.layers[2].quantize_weight)(
        QuantSettings(weight_bits=8).kernels.activations.__class__(3, per_channel=True)
    )
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
        made = recipe(model, weight_bits=bits, activation_bits=bits).made()
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

    class Batches:
        def first(self, count: int, at_once: int) -> list[torch.Tensor]:
            return list(images.split(2))

    def narrow(histogram: Histogram, grid: Grid, curve: Curve | None = None) -> Range:
        return Range(histogram.range.low / 50, histogram.range.high / 50)

    monkeypatch.setattr(workflow, "OBSERVERS", {"aaa": narrow, **OBSERVERS, "zzz": narrow})
    asked = SimpleNamespace(observer=AUTO)
    name, chosen = workflow.observed(asked, whole, Batches())
    noise = {
        key: whole_noise(replace(whole, observer=observer).made(), images.split(2))
        for key, observer in workflow.OBSERVERS.items()
    }
    assert noise[name] == max(noise.values()) and chosen.observer is OBSERVERS[name]
    assert noise["aaa"] == min(noise.values()) < noise[name] - 3
    asked.observer = "minmax"
    assert workflow.observed(asked, whole, Batches())[0] == "minmax"
