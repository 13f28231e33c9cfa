"""Importance of channels and units: Taylor against finite differences, savings against counted networks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import load_arrays, network_input
from tests.nets import TINY, one_head, tiny
from tests.pruning import CONV, varied_arrays
from utils.checkpoint import read_checkpoint, write_checkpoint
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Convolutional
from utils.darknet.cfg import parse
from utils.data.datasets import Batch
from utils.detection.settings import LossSettings
from utils.errors import DataError, InfeasibleError, NumericsError
from utils.pruning import importance, workflow
from utils.pruning.channel_graph import Removal, channel_graph, residual_units
from utils.pruning.importance import per_saving, savings
from utils.pruning.target import Amount, Plan
from utils.report.cost import network_cost

SIZE = (64, 64)
DEPTHWISE = CONV + "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\npad=1\ngroups=8\nactivation=leaky\n"


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


def test_taylor_is_the_root_mean_square_of_what_scaling_a_channel_does(smooth):
    network = tiny()
    arrays, pictures = varied_arrays(network), batches(2)
    found = importance.taylor(network, arrays, pictures, LossSettings())
    for block, channel in ((0, 1), (2, 0), (3, 2)):
        changes = [change(network, arrays, block, [channel], batch, smooth) for batch in pictures]
        assert found[block][channel] == pytest.approx(np.sqrt(np.mean(np.square(changes))), rel=1e-3)


def test_a_unit_counts_as_all_channels_of_its_last_convolution_at_once(smooth):
    network = tiny()
    arrays, pictures = varied_arrays(network), batches(2)
    found = importance.taylor(network, arrays, pictures, LossSettings())
    (unit,) = residual_units(network)
    everything = slice(None)
    changes = [change(network, arrays, unit.last, everything, batch, smooth) for batch in pictures]
    assert found[unit.shortcut] == pytest.approx([np.sqrt(np.mean(np.square(changes)))], rel=1e-3)


def test_taylor_changes_nothing_and_is_the_same_every_time():
    network = tiny()
    arrays, pictures = varied_arrays(network), batches(2)
    before = {name: array.copy() for name, array in arrays.items()}
    one, other = (importance.taylor(network, arrays, pictures, LossSettings()) for _ in range(2))
    assert all(np.array_equal(one[block], other[block]) for block in one)
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)


def test_what_no_head_reads_does_not_matter():
    network = one_head(CONV, CONV, "[route]\nlayers=0\n")
    batch = batches(1)[0]._replace(targets=torch.zeros(0, 6))
    found = importance.taylor(network, varied_arrays(network), [batch], LossSettings())
    assert found[0].all() and not found[1].any()


def test_a_network_without_batch_normalisation_has_nothing_to_rank():
    network = one_head(CONV.replace("batch_normalize=1\n", ""))
    batch = batches(1)[0]._replace(targets=torch.zeros(0, 6))
    assert importance.taylor(network, varied_arrays(network), [batch], LossSettings()) == {}


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
    assert (plain["importance"], plain["advised_percent"]) == ("taylor", None)
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


def test_the_reason_of_the_default_is_said(files, folder, tmp_path, capsys):
    import slim_prune

    flags = ("--percent", "0.2", "--no-test", "--project", str(tmp_path / "runs"))
    slim_prune.main([*files, *flags, "--data", str(folder / "d.data")])
    assert "--importance taylor: what masking a channel does to the loss" in capsys.readouterr().err
    slim_prune.main([*files, *flags])
    assert "--importance gamma: there are no training pictures" in capsys.readouterr().err


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


@pytest.mark.parametrize("flag", [["--importance", "taylor"], ["--reconstruct", "1"]])
def test_training_pictures_are_needed(prune, folder, flag):
    (folder / "v.data").write_text("valid=val.txt\nclasses=2\nnames=d.names")
    with pytest.raises(DataError, match=f"names no train pictures, which {' '.join(flag[:1])}"):
        prune("slim", "--percent", "0.1", "--data", str(folder / "v.data"), *flag)


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
        ("slim", ("--percent", "0.2")),
        ("slim", ("--target-macs", "0.9", "--importance", "gamma")),
        ("layer", ("--shortcut", "1")),
    ],
)
def test_one_cut_is_the_default_of_everything_else(prune, folder, name, flags):
    data = ("--data", str(folder / "d.data"), "--batch-size", "4")
    assert prune(name, *flags, *data, "--no-test")["rounds"] == 1


def test_rounds_take_a_percentage_in_parts(prune, folder):
    flags = ("--percent", "0.4", "--no-test", "--data", str(folder / "d.data"), "--batch-size", "4")
    once, twice = (prune("slim", *flags, "--rounds", count) for count in ("1", "2"))
    shares = [document["after"]["parameters"] / document["before"]["parameters"] for document in (once, twice)]
    assert max(shares) < 0.9 and abs(shares[0] - shares[1]) < 0.2


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


def test_parsing_is_not_forgotten():
    """TINY, which the tests above rely on, has the blocks that they name."""
    network = parse(TINY, "tiny.cfg")
    assert [unit.blocks for unit in residual_units(network)] == [range(2, 5)]
