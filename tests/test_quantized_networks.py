"""Laws of networks with quantizers in their slots."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings

from models import Darknet, fuse
from tests.nets import one_head, tiny
from tests.random_nets import networks
from tests.test_models import CONV, lively
from utils.errors import InputError
from utils.layers import ConvBlock
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


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
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


def test_bounds_begin_with_the_first_batch_and_stay_when_frozen():
    model = quantize(Darknet(tiny()), QuantSettings())
    set_phase(model, Phase.OBSERVING)
    images = torch.rand(2, 3, 64, 64)
    model(images)
    bounds = highest(model)
    assert all(value > 0 for value in bounds.values()) and "quantize_image" in bounds
    set_phase(model, Phase.FROZEN)
    model(5 * images)
    assert highest(model) == bounds


def highest(model: Darknet) -> dict[str, float]:
    modules = model.named_modules()
    return {name: float(module.high) for name, module in modules if isinstance(module, ActivationQuantizer)}


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
    for (_, mine), (_, theirs) in zip(plain.named_buffers(), folded_buffers(folded), strict=True):
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


def folded_buffers(model: Darknet) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in model.named_buffers() if "quantize" not in name]


def test_float_weights_load_into_a_quantized_model_and_back():
    model, quantized = lively(tiny()), quantize(Darknet(tiny()), QuantSettings())
    missing, surplus = quantized.load_state_dict(model.state_dict(), strict=False)
    assert not surplus and all("quantize" in key for key in missing)
    state = {key: value for key, value in quantized.state_dict().items() if "quantize" not in key}
    Darknet(tiny()).load_state_dict(state)


def test_mish_is_refused_where_there_are_only_shifts():
    network = one_head(CONV.format(4, "mish"))
    with pytest.raises(InputError, match=r"block 0 .*mish needs more than shifts; .*leaky"):
        quantize(Darknet(network), QuantSettings(target="fpga"))


def test_heads_may_stay_float():
    model = quantize(Darknet(tiny()), QuantSettings(heads="float"))
    heads = [model.layers[index - 1] for index in model.network.heads]
    assert all(layer.quantize_weight is None and layer.quantize_output is None for layer in heads)


def test_a_kept_block_computes_in_float_and_hands_on_rounded_values():
    model = quantize(Darknet(tiny()), QuantSettings(kept=(2,), first="float"))
    for index in (0, 2):
        assert model.layers[index].quantize_weight is None and not model.layers[index].quantize_output.twice
    assert model.layers[3].quantize_weight is not None or not isinstance(model.layers[3], ConvBlock)
