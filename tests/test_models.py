"""Laws of the network built from blocks."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from models import ACTIVATIONS, Addition, ConvBlock, Darknet, MaxPool, fuse, load_arrays
from tests.nets import one_head, tiny
from utils.darknet import weights
from utils.darknet.blocks import Maxpool, Network, Shortcut
from utils.darknet.network import opencv_warning

CONV = "[convolutional]\nbatch_normalize=1\nfilters={0}\nsize=3\npad=1\nactivation={1}\n"


def lively(network: Network, seed: int = 0) -> Darknet:
    """A model in evaluation mode whose statistics and scales are not at their start values."""
    torch.manual_seed(seed)
    model = Darknet(network).eval()
    with torch.no_grad():
        for layer in model.layers:
            if isinstance(layer, ConvBlock) and layer.bn is not None:
                layer.bn.weight.uniform_(0.5, 1.5)
                layer.bn.bias.normal_(std=0.3)
                layer.bn.running_mean.normal_(std=0.3)
                layer.bn.running_var.uniform_(0.5, 1.5)
    return model


def test_features_are_the_outputs_of_the_blocks_asked_for():
    model, image = lively(tiny()), torch.rand(1, 3, 64, 64)
    features = model(image, features=(0, 4)).features
    torch.testing.assert_close(features[0], model.layers[0](image))
    assert set(features) == {0, 4}
    assert model(image).features == {}


def test_fusing_keeps_the_function_and_leaves_the_model():
    model, image = lively(tiny()), torch.rand(2, 3, 64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model)
    for got, want in zip(fused(image).heads, model(image).heads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(layer.bn is None for layer in fused.layers if isinstance(layer, ConvBlock))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_channels_last_gives_the_same_outputs():
    model, image = lively(tiny()), torch.rand(2, 3, 64, 64)
    want = model(image).heads
    got = model.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last)).heads
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_state_dict_holds_every_tensor_of_the_weights_file_by_its_key():
    network = tiny()
    state = Darknet(network).state_dict()
    for spec in weights.tensors(network):
        assert tuple(state[spec.key].shape) == tuple(spec.shape)
    loaded = load_arrays(network, state)
    assert loaded.layers[0].conv.weight.data_ptr() == state["layers.0.conv.weight"].data_ptr()
    assert len(state) == len(weights.tensors(network)) + sum(key.endswith("tracked") for key in state)


def test_new_heads_predict_their_priors():
    model = Darknet(tiny())
    bias = model.layers[8].conv.bias.view(3, 7)
    torch.testing.assert_close(bias[:, 4].sigmoid(), torch.full((3,), 0.01))
    torch.testing.assert_close(bias[:, 5:].sigmoid(), torch.full((3, 2), 0.5))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_trains(activation):
    model = Darknet(one_head(CONV.format(4, activation), "[dropout]\nprobability=0.2\n"))
    model(torch.rand(2, 3, 16, 16)).heads[0].sum().backward()
    assert torch.isfinite(model.layers[0].conv.weight.grad).all()


def test_shortcut_adds_the_common_channels_and_keeps_the_width_of_the_previous_block():
    layer = Addition(Shortcut(sources=(0, 1)), 3)
    first, wide, narrow = torch.ones(1, 3, 2, 2), torch.full((1, 5, 2, 2), 10.0), torch.full((1, 2, 2, 2), 100.0)
    total = layer(first, wide, narrow)
    assert total[0, :, 0, 0].tolist() == [111, 111, 11]


@pytest.mark.parametrize("kind", ["per_feature", "per_channel"])
@pytest.mark.parametrize("normalization", ["none", "relu", "softmax"])
def test_weighted_shortcut_follows_its_formula(kind, normalization):
    layer = Addition(Shortcut(sources=(0,), weights_type=kind, weights_normalization=normalization), 2)
    raw = torch.tensor([1.0, -3.0]) if kind == "per_feature" else torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    layer.weights.data = raw
    columns = raw.view(2, -1).expand(2, 2)
    powers = (columns - columns.amax(0)).exp()
    scale = {
        "none": columns,
        "relu": columns.clamp(min=0) / (columns.clamp(min=0).sum(0) + 1e-4),
        "softmax": powers / (powers.sum(0) + 1e-4),
    }[normalization]
    first, second = torch.tensor([5.0, 7.0]), torch.tensor([11.0, 13.0])
    got = layer(first.view(1, 2, 1, 1), second.view(1, 2, 1, 1)).flatten()
    torch.testing.assert_close(got, first * scale[0] + second * scale[1])


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(2, 2, 1), (2, 1, 1), (5, 1, 4), (3, 2, 2), (2, 2, 0), (3, 1, 0)]
)
def test_maxpool_pads_as_darknet(size, stride, padding):
    image = torch.randn(1, 2, 7, 9)
    got = MaxPool(Maxpool(size=size, stride_x=stride, stride_y=stride, padding=padding), 2)(image)
    before = padding // 2
    wide = np.pad(image[0], ((0, 0), *[(before, padding - before)] * 2), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(wide, (size, size), axis=(1, 2))
    np.testing.assert_array_equal(got[0], windows[:, ::stride, ::stride].max(axis=(3, 4)))


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (CONV.format(4, "relu6"), "refuses activation=relu6"),
        (CONV.format(4, "leaky") + "dilation=2\n", "ignores dilation"),
        (CONV.format(4, "leaky") + "stride_x=2\nstride_y=1\n", "ignores stride_x"),
        ("[se]\nreduction=3\n", r"refuses \[se\]"),
    ],
)
def test_the_first_block_that_opencv_does_not_read_is_named(section, reason):
    assert re.search(reason, opencv_warning(one_head(CONV.format(3, "leaky"), section)))
    assert opencv_warning(tiny()) is None
