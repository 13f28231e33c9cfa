"""Laws of networks with quantizers in their slots."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings

from models import ConvBlock, Darknet, fuse
from tests.nets import one_head, tiny
from tests.random_nets import networks
from tests.test_models import CONV, lively
from utils.quantization.quantizers import ActivationQuantizer, Phase, quantize, set_phase
from utils.quantization.scheme import TARGETS, TFLITE, QuantSettings

FINE = {"weight_bits": 16, "activation_bits": 16, "heads": "8"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def calibrated(model: Darknet, images: torch.Tensor, settings: QuantSettings) -> Darknet:
    """The model with quantizers whose bounds are those of `images`, in evaluation mode and rounding."""
    model = quantize(model, settings)
    set_phase(model, Phase.OBSERVING)
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.train()
    with torch.no_grad():
        model(images)
    set_phase(model, Phase.FROZEN)
    return model.eval()


def distance(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> float:
    pairs = ((x.detach(), y.detach()) for x, y in zip(a, b, strict=True))
    return max(float((x - y).abs().amax() / max(1, float(x.abs().amax()))) for x, y in pairs)


@settings(max_examples=25)
@given(network=networks())
def test_fine_grids_change_next_to_nothing_and_fusing_nothing(network):
    """Whatever blocks there are: 16 bits are nearly float, and folding batch normalisation keeps the values."""
    images = torch.rand(2, network.net.channels, network.net.height, network.net.width)
    expected = lively(network)(images).heads
    for fold in (False, True):
        model = calibrated(lively(network), images, QuantSettings(target="cpu-vnni", fold=fold, **FINE))
        model.quantize_image = None
        with torch.no_grad():
            assert distance(expected, model(images).heads) < 2e-3
            assert distance(model(images).heads, fuse(model)(images).heads) < 2e-3
        set_phase(model, Phase.OFF)
        assert distance(expected, model(images).heads) < 1e-5


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - set(TFLITE)))
@pytest.mark.parametrize("scheme", ["google", "dorefa"])
@pytest.mark.parametrize("fold", [False, True])
def test_a_quantized_network_puts_out_few_values_and_an_evaluation_changes_nothing(target, scheme, fold):
    images = torch.rand(2, 3, 64, 64)
    found = QuantSettings(scheme, target, TARGETS[target].weight_bits, 4, fold=fold)
    network = one_head(CONV.format(6, "leaky") + CONV.format(8, "relu")) if target == "fpga" else tiny()
    model = calibrated(lively(network), images, found)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        features = model(images, features=range(len(model.layers))).features
        model(2 * images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for index, layer in enumerate(model.layers):
        if isinstance(layer, ConvBlock) and index + 1 not in model.network.heads:
            assert len(torch.unique(features[index])) <= (2**8 if index == 0 else 2**4)


def test_a_folded_layer_trains_as_the_unfolded_one_while_nothing_is_rounded():
    """Outputs, running statistics and gradients; also with γ = 0."""
    network = one_head(CONV.format(6, "leaky") + CONV.format(4, "leaky"))
    plain, folded = lively(network), quantize(lively(network), QuantSettings(fold=True))
    for model in (plain, folded):
        model.double().train()
        model.layers[0].bn.weight.data[0] = 0
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    outputs = [model(images).heads[0] for model in (plain, folded)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-9, rtol=1e-9)
    for output in outputs:
        output.square().sum().backward()
    for (name, mine), (other, theirs) in zip(plain.named_parameters(), folded.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(theirs.grad, mine.grad, atol=1e-9, rtol=1e-6)
        assert torch.isfinite(theirs.grad).all()
    buffers = [value for name, value in folded.named_buffers() if "quantize" not in name]
    for mine, theirs in zip(plain.buffers(), buffers, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-9, rtol=1e-9)


def test_a_frozen_fold_keeps_its_statistics_and_trains_as_it_is_evaluated():
    model = quantize(lively(tiny()), QuantSettings(fold=True))
    images = torch.rand(2, 3, 64, 64)
    set_phase(model, Phase.OBSERVING)
    model.train()
    model(images)
    set_phase(model, Phase.FROZEN)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    trained = model(images).heads
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.eval()
    for mine, theirs in zip(trained, model(images).heads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_heads_and_kept_blocks_compute_in_float_and_kept_ones_hand_on_rounded_values():
    model = quantize(Darknet(tiny()), QuantSettings(kept=(2,), first="float", heads="float"))
    assert all(model.layers[head - 1].quantize_output is None for head in model.network.heads)
    assert not any(model.layers[index].quantize_output.twice for index in (0, 2))
    convolutions = {index for index, layer in enumerate(model.layers) if isinstance(layer, ConvBlock)}
    floats = {index for index in convolutions if model.layers[index].quantize_weight is None}
    assert floats == {0, 2, *(head - 1 for head in model.network.heads)}
