"""Importance of channels and units: Taylor against finite differences, savings against counted networks.

Readers of what went are fitted anew: exact where it can be, never worse than constants where it counts.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import load_arrays, network_input
from tests.nets import one_head, tiny
from tests.pruning import CONV, conv, varied_arrays
from utils.checkpoint import read_checkpoint, write_checkpoint
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Convolutional
from utils.data.datasets import Batch
from utils.detection.settings import LossSettings
from utils.errors import InfeasibleError, NumericsError
from utils.pruning import importance, workflow
from utils.pruning import surgery as module
from utils.pruning.channel_graph import ChannelGraph, Removal, channel_graph, residual_units
from utils.pruning.importance import per_saving, savings
from utils.pruning.surgery import fold_constants, masked, model_of, most_pictures, prune_network, reconstruct
from utils.pruning.target import Amount, Plan
from utils.report.tables import network_cost

SIZE = (64, 64)
DEPTHWISE = CONV + conv(8, 3, groups=8)


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 2, 3, *SIZE), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 0.4, 0.4, 0.2, 0.3], [1, 1, 0.6, 0.5, 0.4, 0.2]])
    return [Batch(pictures, boxes, boxes[:0], torch.arange(2), ()) for pictures in images]


@pytest.fixture
def smooth(monkeypatch):
    """A loss without targets that depend on the outputs, whose gradient would not be that of the whole."""

    def loss(heads, *_, **__):
        return SimpleNamespace(total=sum(head.square().sum() for head in heads) / 100)

    monkeypatch.setattr(importance, "detection_loss", loss)
    return loss


def scaled(network, arrays, names, channels, factor):
    """The loss of a batch when some γ and β are scaled."""
    changed = dict(arrays)
    for name in names:
        changed[name] = changed[name].astype(np.float64)
        changed[name][channels] *= factor
    tensors = {name: torch.from_numpy(np.asarray(array, np.float64)) for name, array in changed.items()}
    return load_arrays(network, tensors).eval()


def change(network, arrays, block, channels, batch, loss) -> float:
    """Derivative of the loss by a common factor of γ and β, from two values of the loss."""
    names, step = [f"layers.{block}.bn.{name}" for name in ("weight", "bias")], 1e-4
    images = network_input(batch.images, "cpu").double()
    with torch.no_grad():
        up, down = (
            float(loss(scaled(network, arrays, names, channels, factor)(images).heads).total)
            for factor in (1 + step, 1 - step)
        )
    return (up - down) / (2 * step)


def test_taylor_is_the_root_mean_square_of_what_scaling_does(smooth):
    """Of a channel; a unit counts as all channels of its last convolution at once. The tensors stay as they are."""
    network = tiny()
    arrays, pictures = varied_arrays(network), batches(2)
    before = {name: array.copy() for name, array in arrays.items()}
    found = importance.taylor(network, arrays, pictures, LossSettings())
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)
    (unit,) = residual_units(network)
    scaled_parts = [(block, [channel], found[block][channel]) for block, channel in ((0, 1), (2, 0), (3, 2))]
    for block, channels, value in (*scaled_parts, (unit.last, slice(None), found[unit.shortcut].item())):
        changes = [change(network, arrays, block, channels, batch, smooth) for batch in pictures]
        assert value == pytest.approx(np.sqrt(np.mean(np.square(changes))), rel=1e-3)


def ranked(*sections: str) -> dict[int, np.ndarray]:
    """Importance in a network of one head, by a batch without an object."""
    network = one_head(*sections)
    batch = batches(1)[0]._replace(targets=torch.zeros(0, 6))
    return importance.taylor(network, varied_arrays(network), [batch], LossSettings())


def test_what_no_head_reads_does_not_matter_and_a_head_need_read_no_batch_normalisation():
    plain, unread = CONV.replace("batch_normalize=1\n", ""), (CONV, "[route]\nlayers=0\n")
    both = ranked(CONV, *unread)
    assert both[0].all() and not both[1].any()
    assert not ranked(plain, *unread)[1].any()
    assert ranked(plain) == {}  # nothing to rank


def test_damaged_weights_are_refused():
    network = tiny()
    arrays = varied_arrays(network)
    arrays["layers.0.bn.weight"][0] = np.inf
    with pytest.raises(NumericsError, match="no finite gradient"):
        importance.taylor(network, arrays, batches(1), LossSettings())


@pytest.mark.parametrize("network", [tiny(), one_head(DEPTHWISE)], ids=["tiny", "depthwise"])
@pytest.mark.parametrize("counted", ["macs", "parameters"])
def test_a_label_saves_what_the_network_without_it_does_not_cost(network, counted):
    graph = channel_graph(network)
    size = (network.net.height, network.net.width)
    saved = savings(graph, counted, size)
    for label in np.flatnonzero(~graph.pinned):
        keep = np.ones(graph.count, np.bool_)
        keep[label] = False
        if 0 in graph.widths(keep):
            continue
        left = Plan(graph, Amount(None, None), Removal(keep), None).after()
        before, after = (network_cost(one, *size) for one in (network, left))
        assert saved[label] == pytest.approx(getattr(before, counted) - getattr(after, counted))


def test_channels_are_ranked_by_the_square_of_their_importance_for_what_they_save():
    graph = channel_graph(tiny())
    values = {i: np.random.default_rng(i).random(len(graph.labels[i])) for i in graph.makers()}
    saved, order = savings(graph, "macs", SIZE), per_saving(graph, values, "macs", SIZE)
    makers = [i for i in graph.makers() if (saved[graph.labels[i]] > 0).all()]
    ratio = np.concatenate([values[i] ** 2 / saved[graph.labels[i]] for i in makers])
    assert np.array_equal(np.argsort(ratio), np.argsort(np.concatenate([order[i] for i in makers])))


def test_taylor_is_the_default_and_gamma_that_of_sparse_training(prune, files, folder, tmp_path, capsys):
    flags = ("--percent", "0.2", "--no-test", "--data", str(folder / "d.data"))
    plain = prune("slim", *flags)
    assert (plain["importance"], plain["advised_percent"], plain["rounds"]) == ("taylor", None, 1)
    sparse = read_checkpoint(tmp_path / "runs/exp/model.pt") | {"args": {"sr": True}}
    write_checkpoint(tmp_path / "sparse.pt", sparse)
    found = prune(
        "slim", "--weights", str(tmp_path / "sparse.pt"), *flags, "--cfg", str(tmp_path / "runs/exp/model.cfg")
    )
    assert found["importance"] == "gamma" and found["advised_percent"] is not None
    assert prune("slim", "--percent", "0.2", "--no-test")["importance"] == "gamma"


def test_pictures_vary_as_in_the_training_of_the_network(prune, folder, tmp_path, monkeypatch):
    flags = ("--percent", "0.2", "--no-test", "--data", str(folder / "d.data"))
    prune("slim", *flags)
    network = ("--cfg", str(tmp_path / "runs/exp/model.cfg"), "--weights", str(tmp_path / "trained.pt"))
    seen, plain = [], workflow.Pruner.training_batches
    monkeypatch.setattr(workflow.Pruner, "training_batches", lambda *args: (seen.append(args[2]), plain(*args))[1])
    pruned = read_checkpoint(tmp_path / "runs/exp/model.pt")
    for more in ({"hyp": {"flip_lr": 0.0, "flip_ud": 0.0, "hsv_h": 0.25}}, {"lineage": [{"no_flip": True}]}, {}):
        write_checkpoint(tmp_path / "trained.pt", pruned | more)
        prune("slim", *network, *flags, "--reconstruct", "0")
    assert [(how.flip_lr, how.hsv_h) for how in seen] == [(0.0, 0.25), (0.0, 0.015), (0.5, 0.015)]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("layer", ("--shortcut", "1")),
        ("layer_channel", ("--shortcut", "1", "--percent", "0.2")),
        ("group", ("--percent", "0.2")),
        ("normal", ("--percent", "0.2")),
    ],
)
def test_a_seed_decides_everything(prune, folder, name, flags):
    common = (*flags, "--no-test", "--data", str(folder / "d.data"), "--batch-size", "4", "--importance", "taylor")
    one, same, other = (prune(name, *common, "--seed", seed) for seed in ("5", "5", "6"))
    weights = [Path(document["weights"]).read_bytes() for document in (one, same, other)]
    assert weights[0] == weights[1] != weights[2]


def test_all_convolutions_are_candidates_of_taylor(prune, folder):
    """Block 12 of the tiny network is followed by an upsampling."""
    flags = ("--percent", "0.2", "--no-test", "--dry-run", "--data", str(folder / "d.data"))
    taylor, gamma = (prune("slim", *flags, "--importance", kind) for kind in ("taylor", "gamma"))
    beyond = prune("slim", *flags, "--importance", "gamma", "--all-convs")
    assert taylor["max_percent"] != gamma["max_percent"] or taylor["grid"] != gamma["grid"]
    assert beyond["grid"] != gamma["grid"]


def test_rounds_reach_the_target_and_are_proved_against_the_first_network(prune, folder, monkeypatch):
    scored = []
    plain = workflow.Pruner.importance
    monkeypatch.setattr(
        workflow.Pruner,
        "importance",
        lambda self, network, arrays: (scored.append(network_cost(network).macs), plain(self, network, arrays))[1],
    )
    flags = ("--target-macs", "0.5", "--no-test", "--data", str(folder / "d.data"), "--batch-size", "4")
    document = prune("slim", *flags)
    assert len(scored) == document["rounds"] == 4 and sorted(scored, reverse=True) == scored
    assert document["target"]["rounds"] == 4
    assert document["target"]["reached"] == document["after"]["macs"] / document["before"]["macs"] <= 0.5
    assert document["certificate"]["compact_vs_keep_size"] < 1e-4


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("normal", ()),
        ("slim", ()),
        ("slim", ("--layer_keep", "0.5")),
        ("group", ()),
        ("regular", ("--multiple-of", "2")),
    ],
)
def test_rounds_remove_what_one_cut_does_where_importance_stays(prune, folder, name, flags):
    """|γ| does not change with a cut that fits nothing anew; ten rounds, of which some are for less than a channel."""
    common = ("--percent", "0.4", "--no-test", "--importance", "gamma", "--no-absorb", *flags)
    weights = [Path(prune(name, *common, "--rounds", count)["weights"]).read_bytes() for count in ("1", "2", "10")]
    assert weights[0] == weights[1] == weights[2]


def test_a_layer_keeps_its_share_of_the_first_width_in_all_rounds(prune):
    flags = ("--percent", "0.9", "--no-test", "--layer_keep", "0.5", "--all-convs")
    widths = cfg_file.load(prune("slim", *flags, "--rounds", "4")["cfg"])
    assert [block.filters for block in widths.blocks if isinstance(block, Convolutional)] == [4, 8, 2, 8, 6, 21, 3, 21]


@pytest.mark.parametrize(("name", "amount"), [("slim", ("--target-params", "0.05")), ("normal", ("--percent", "0.9"))])
def test_a_round_that_cannot_do_its_part_names_what_was_asked_for(prune, tmp_path, name, amount):
    with pytest.raises(InfeasibleError, match=f"^{' '.join(amount)} --rounds 3: round [123] cannot do its part"):
        prune(name, *amount, "--no-test", "--rounds", "3")
    assert not (tmp_path / "runs").exists()


def pictures(count: int = 2, side: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 3, side, side, generator=generator) for _ in range(count)]


@torch.no_grad()
def heads(network, arrays, images) -> list[torch.Tensor]:
    model = model_of(network, arrays)
    return [head for image in images for head in model(image).heads]


@torch.no_grad()
def features(network, arrays, images) -> np.ndarray:
    """What the first block puts out: a row for every position."""
    model = model_of(network, arrays)
    rows = [model(image, features=[0]).features[0].permute(0, 2, 3, 1).flatten(0, 2) for image in images]
    return torch.cat(rows).numpy()


def fitted_and_constant(graph, arrays, removal, images) -> list[list[torch.Tensor]]:
    """Heads of the pruned network with fitted readers, and with constants."""
    ways = (reconstruct(graph, arrays, removal, images), fold_constants(graph, arrays, removal))
    return [heads(*prune_network(graph, made, removal), images) for made in ways]


def without(network, *gone: tuple[int, int]) -> tuple[ChannelGraph, dict[str, np.ndarray], Removal]:
    """The graph of a network, its tensors, and some channels that go, each given by its block and its number there."""
    graph = channel_graph(network)
    keep = np.ones(graph.count, np.bool_)
    for block, channel in gone:
        keep[graph.labels[block][channel]] = False
    return graph, varied_arrays(network), Removal(keep)


def test_a_channel_that_another_one_repeats_is_not_missed():
    network = one_head(CONV, CONV)
    graph, arrays, removal = without(network, (0, 3))
    for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        arrays[f"layers.0.{name}"][3] = arrays[f"layers.0.{name}"][5]
    before, images = heads(network, arrays, pictures(side=16)), pictures(side=16)
    ways = fitted_and_constant(graph, arrays, removal, images)
    errors = [max(float((a - b).abs().max()) for a, b in zip(before, of, strict=True)) for of in ways]
    assert errors[0] < 2e-3 * float(before[0].abs().max()) < errors[1]


def test_the_fit_is_the_least_squares_solution(monkeypatch):
    """Of one reader, a head: against numpy's lstsq without ridge, over all positions of all pictures."""
    monkeypatch.setattr(module, "RIDGE", 0.0)
    network = one_head(CONV)
    (graph, arrays, removal), images = without(network, (0, 1), (0, 6)), pictures(side=16)
    found = heads(*prune_network(graph, reconstruct(graph, arrays, removal, images), removal), images)
    z = features(network, arrays, images)
    y, got = (
        np.concatenate([one.permute(0, 2, 3, 1).reshape(-1, 6).numpy() for one in of])
        for of in (heads(network, arrays, images), found)
    )
    design = np.column_stack([np.delete(z, [1, 6], axis=1), np.ones(len(z))])
    expected = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(y).max())


def test_what_is_written_is_the_silenced_network_of_full_size():
    network, images = tiny(), pictures()
    graph, arrays, removal = without(network, (0, 1), (2, 0), (5, 2))
    fitted = reconstruct(graph, arrays, removal, images)
    assert {name: array.shape for name, array in fitted.items()} == {name: a.shape for name, a in arrays.items()}
    large = model_of(network, fitted)
    with torch.no_grad(), masked(large, graph, removal):
        full = [head for image in images for head in large(image).heads]
    small = heads(*prune_network(graph, fitted, removal), images)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(full, small, strict=True))


def test_units_that_go_are_made_up_for_as_well():
    network = tiny()
    graph, arrays, images = channel_graph(network), varied_arrays(network), pictures()
    removal = Removal(np.ones(graph.count, np.bool_), residual_units(network))
    before, ways = heads(network, arrays, images), fitted_and_constant(graph, arrays, removal, images)
    errors = [sum(float((a - b).square().sum()) for a, b in zip(before, of, strict=True)) for of in ways]
    assert errors[0] < 0.8 * errors[1]


def test_nothing_gone_changes_nothing():
    graph, arrays, removal = without(tiny())
    found = reconstruct(graph, arrays, removal, pictures())
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_the_same_seed_gives_the_same_weights_and_the_tensors_before_stay(monkeypatch):
    monkeypatch.setattr(module, "POSITIONS", 64)
    graph, arrays, removal = without(tiny(), (0, 1), (2, 0))
    before = {name: array.copy() for name, array in arrays.items()}
    one, same, other = (reconstruct(graph, arrays, removal, pictures(), seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_a_reader_that_takes_no_shift_is_fitted_without_one(monkeypatch):
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    network = one_head(CONV, "[convolutional]\nfilters=8\nsize=1\nbias=0\nactivation=linear\n")
    (graph, arrays, removal), images = without(network, (0, 3)), pictures(side=16)
    fitted = reconstruct(graph, arrays, removal, images)["layers.1.conv.weight"]
    x = features(network, arrays, images).astype(np.float64)
    kept = np.delete(np.arange(8), 3)
    best = np.linalg.lstsq(x[:, kept], x, rcond=None)[0]
    expected = arrays["layers.1.conv.weight"][:, :, 0, 0] @ best.T
    np.testing.assert_allclose(fitted[:, kept, 0, 0], expected, atol=1e-3)


def test_a_reader_of_nothing_but_zeros_keeps_its_weights():
    graph, arrays, removal = without(one_head(CONV, CONV), (0, 3))
    for name in ("weight", "bias"):
        arrays[f"layers.0.bn.{name}"][:] = 0
    fitted = reconstruct(graph, arrays, removal, pictures(side=16))
    kept = np.delete(np.arange(8), 3)
    np.testing.assert_allclose(fitted["layers.1.conv.weight"][:, kept], arrays["layers.1.conv.weight"][:, kept])


def test_damaged_weights_are_not_fitted():
    graph, arrays, removal = without(tiny(), (0, 1))
    arrays["layers.0.conv.weight"][:] = 1e38
    with pytest.raises(NumericsError, match="--reconstruct: a fitted weight is not finite"):
        reconstruct(graph, arrays, removal, pictures())


def test_pictures_are_as_many_as_fit_into_memory(monkeypatch):
    few, many = (most_pictures(tiny(), (side, side)) for side in (256, 64))
    assert many == pytest.approx(16 * few, rel=0.01)
    monkeypatch.setattr(module, "MEMORY", 1)
    assert most_pictures(tiny(), (64, 64)) == 1
