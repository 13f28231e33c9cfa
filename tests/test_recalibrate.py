"""Batch statistics are taken anew from the batches, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import Darknet, load_arrays
from tests.nets import one_head, tiny
from utils.errors import InputError, NumericsError
from utils.pruning.recalibrate import recalibrate


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    state = Darknet(tiny()).state_dict()
    return {name: value.numpy() for name, value in state.items() if "num_batches" not in name}


def pictures(batches: int, size: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, 3, 64, 64, generator=generator) for _ in range(batches)]


def test_statistics_change_and_weights_do_not(arrays):
    before = {name: array.copy() for name, array in arrays.items()}
    found = recalibrate(tiny(), arrays, pictures(2))
    for name, array in found.items():
        assert np.array_equal(arrays[name], before[name])
        assert np.array_equal(array, before[name]) == (not name.endswith(("running_mean", "running_var")))


def test_twice_is_once(arrays):
    once = recalibrate(tiny(), arrays, pictures(3))
    twice = recalibrate(tiny(), once, pictures(3))
    assert all(np.array_equal(once[name], twice[name]) for name in once)


def test_statistics_are_plain_means_over_the_batches(arrays):
    """Of the first convolution: mean of the batches' means, and of their unbiased variances."""
    found = recalibrate(tiny(), arrays, pictures(3))
    model = load_arrays(tiny(), {name: torch.from_numpy(array) for name, array in arrays.items()})
    with torch.no_grad():
        outputs = [model.layers[0].conv(images) for images in pictures(3)]
    means = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    variances = torch.stack([output.var((0, 2, 3)) for output in outputs]).mean(0)
    np.testing.assert_allclose(found["layers.0.bn.running_mean"], means, atol=1e-6)
    np.testing.assert_allclose(found["layers.0.bn.running_var"], variances, rtol=1e-5)


def test_one_value_a_channel_has_no_variance():
    network = one_head("[convolutional]\nbatch_normalize=1\nfilters=4\nsize=1\nstride=16\nactivation=leaky\n")
    state = Darknet(network).state_dict()
    arrays = {name: value.numpy() for name, value in state.items() if "num_batches" not in name}
    with pytest.raises(InputError, match="--recalibrate: a batch is too small"):
        recalibrate(network, arrays, [torch.rand(1, 3, 16, 16)])


def test_what_is_not_finite_is_refused(arrays):
    arrays["layers.0.conv.weight"] = np.full_like(arrays["layers.0.conv.weight"], 1e38)
    with pytest.raises(NumericsError, match="not finite"):
        recalibrate(tiny(), arrays, pictures(1))
