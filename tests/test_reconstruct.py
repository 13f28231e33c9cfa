"""Readers of removed channels are fitted anew: exact where it can be, never worse than constants where it counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import load_arrays
from tests.nets import one_head, tiny
from tests.pruning import CONV, varied_arrays
from utils.errors import NumericsError
from utils.pruning import reconstruct as module
from utils.pruning.channel_graph import Removal, channel_graph, residual_units
from utils.pruning.reconstruct import most_pictures, reconstruct
from utils.pruning.surgery import fold_constants, masked, prune_network


def pictures(count: int = 2, side: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 3, side, side, generator=generator) for _ in range(count)]


def heads(network, arrays, images) -> list[torch.Tensor]:
    model = load_arrays(network, {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}).eval()
    with torch.no_grad():
        return [head for image in images for head in model(image).heads]


def removal_of(graph, *gone: tuple[int, int]) -> Removal:
    """Without some channels, each given by its block and its number there."""
    keep = np.ones(graph.count, np.bool_)
    for block, channel in gone:
        keep[graph.labels[block][channel]] = False
    return Removal(keep)


def test_a_channel_that_another_one_repeats_is_not_missed():
    network = one_head(CONV, CONV)
    graph, arrays = channel_graph(network), varied_arrays(network)
    for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        arrays[f"layers.0.{name}"][3] = arrays[f"layers.0.{name}"][5]
    removal = removal_of(graph, (0, 3))
    before = heads(network, arrays, pictures(side=16))
    fitted, constant = (
        heads(*prune_network(graph, made, removal), pictures(side=16))
        for made in (reconstruct(graph, arrays, removal, pictures(side=16)), fold_constants(graph, arrays, removal))
    )
    errors = [max(float((a - b).abs().max()) for a, b in zip(before, of, strict=True)) for of in (fitted, constant)]
    assert errors[0] < 2e-3 * float(before[0].abs().max()) < errors[1]


def test_the_fit_is_the_least_squares_solution(monkeypatch):
    """Of one reader, a head: against numpy's lstsq without ridge, over all positions of all pictures."""
    monkeypatch.setattr(module, "RIDGE", 0.0)
    network = one_head(CONV)
    graph, arrays, images = channel_graph(network), varied_arrays(network), pictures(side=16)
    removal = removal_of(graph, (0, 1), (0, 6))
    found = heads(*prune_network(graph, reconstruct(graph, arrays, removal, images), removal), images)
    model = load_arrays(network, {name: torch.from_numpy(array) for name, array in arrays.items()}).eval()
    with torch.no_grad():
        features = [model(image, features=[0]).features[0] for image in images]
    z = np.concatenate([one.permute(0, 2, 3, 1).reshape(-1, 8).numpy() for one in features])
    y = np.concatenate([one.permute(0, 2, 3, 1).reshape(-1, 6).numpy() for one in heads(network, arrays, images)])
    design = np.column_stack([np.delete(z, [1, 6], axis=1), np.ones(len(z))])
    expected = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    got = np.concatenate([one.permute(0, 2, 3, 1).reshape(-1, 6).numpy() for one in found])
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(y).max())


def test_what_is_written_is_the_silenced_network_of_full_size():
    network = tiny()
    graph, arrays, images = channel_graph(network), varied_arrays(network), pictures()
    removal = removal_of(graph, (0, 1), (2, 0), (5, 2))
    fitted = reconstruct(graph, arrays, removal, images)
    assert {name: array.shape for name, array in fitted.items()} == {name: a.shape for name, a in arrays.items()}
    large = load_arrays(network, {name: torch.from_numpy(array) for name, array in fitted.items()}).eval()
    with torch.no_grad(), masked(large, graph, removal):
        full = [head for image in images for head in large(image).heads]
    small = heads(*prune_network(graph, fitted, removal), images)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(full, small, strict=True))


def test_units_that_go_are_made_up_for_as_well():
    network = tiny()
    graph, arrays, images = channel_graph(network), varied_arrays(network), pictures()
    removal = Removal(np.ones(graph.count, np.bool_), residual_units(network))
    before = heads(network, arrays, images)
    fitted, constant = (
        heads(*prune_network(graph, made, removal), images)
        for made in (reconstruct(graph, arrays, removal, images), fold_constants(graph, arrays, removal))
    )
    errors = [sum(float((a - b).square().sum()) for a, b in zip(before, of, strict=True)) for of in (fitted, constant)]
    assert errors[0] < 0.8 * errors[1]


def test_nothing_gone_changes_nothing():
    network = tiny()
    graph, arrays = channel_graph(network), varied_arrays(network)
    found = reconstruct(graph, arrays, removal_of(graph), pictures())
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_the_same_seed_gives_the_same_weights_and_the_tensors_before_stay(monkeypatch):
    monkeypatch.setattr(module, "POSITIONS", 64)
    network = tiny()
    graph, arrays = channel_graph(network), varied_arrays(network)
    before, removal = {name: array.copy() for name, array in arrays.items()}, removal_of(graph, (0, 1), (2, 0))
    one, same, other = (reconstruct(graph, arrays, removal, pictures(), seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_a_reader_that_takes_no_shift_is_fitted_without_one(monkeypatch):
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    network = one_head(CONV, "[convolutional]\nfilters=8\nsize=1\nbias=0\nactivation=linear\n")
    graph, arrays, images = channel_graph(network), varied_arrays(network), pictures(side=16)
    fitted = reconstruct(graph, arrays, removal_of(graph, (0, 3)), images)["layers.1.conv.weight"]
    layer = load_arrays(network, {name: torch.from_numpy(array) for name, array in arrays.items()}).eval().layers[0]
    with torch.no_grad():
        x = torch.cat([layer(image) for image in images]).permute(0, 2, 3, 1).reshape(-1, 8).double().numpy()
    kept = np.delete(np.arange(8), 3)
    best = np.linalg.lstsq(x[:, kept], x, rcond=None)[0]
    expected = arrays["layers.1.conv.weight"][:, :, 0, 0] @ best.T
    np.testing.assert_allclose(fitted[:, kept, 0, 0], expected, atol=1e-3)


def test_a_reader_of_nothing_but_zeros_keeps_its_weights():
    network = one_head(CONV, CONV)
    graph, arrays = channel_graph(network), varied_arrays(network)
    for name in ("weight", "bias"):
        arrays[f"layers.0.bn.{name}"][:] = 0
    fitted = reconstruct(graph, arrays, removal_of(graph, (0, 3)), pictures(side=16))
    kept = np.delete(np.arange(8), 3)
    np.testing.assert_allclose(fitted["layers.1.conv.weight"][:, kept], arrays["layers.1.conv.weight"][:, kept])


def test_damaged_weights_are_refused():
    network = tiny()
    graph, arrays = channel_graph(network), varied_arrays(network)
    arrays["layers.0.conv.weight"][:] = 1e38
    with pytest.raises(NumericsError, match="--reconstruct: a fitted weight is not finite"):
        reconstruct(graph, arrays, removal_of(graph, (0, 1)), pictures())


def test_pictures_are_as_many_as_fit_into_memory(monkeypatch):
    few, many = (most_pictures(tiny(), (side, side)) for side in (256, 64))
    assert many == pytest.approx(16 * few, rel=0.01)
    monkeypatch.setattr(module, "MEMORY", 1)
    assert most_pictures(tiny(), (64, 64)) == 1
