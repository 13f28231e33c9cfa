"""`--multiple-of auto`: the fastest multiple is found, 8 if none is clearly faster, and the run says which and why."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.nets import tiny
from tests.random_nets import networks
from tests.test_percent_sweep import emptied, random_gammas
from tests.test_random_networks import examples
from tests.test_targets import POLICIES
from utils.cli import run as run_script
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Convolutional, Maxpool, Shape
from utils.errors import InputError
from utils.graph import channel_graph
from utils.pruning import alignment, measure, report, workflow
from utils.pruning.alignment import DRAWS, MULTIPLES, Layer, TorchTimer, align, draw, fastest, latency_table, words
from utils.pruning.candidates import candidates
from utils.pruning.policy import ChannelPolicy, channel_scores, families_of
from utils.pruning.shares import keep_shares, weakest

POLICY = ChannelPolicy(0.0, layer_keep=0.01)
SIZE = (64, 64)
EVEN = [100.0, 100.0, 100.0, 100.0]


def channels(layer: Layer) -> tuple[int, ...]:
    """Widths that a layer reads and makes."""
    made = (layer.block.filters,) if isinstance(layer.block, Convolutional) else ()
    return (layer.source.channels, *made)


@pytest.fixture
def prune(prune, monkeypatch):
    """The same, with a table that takes no time."""
    monkeypatch.setattr(workflow, "align", partial(align, seconds=0.05))
    monkeypatch.setattr(measure, "interleaved", partial(measure.interleaved, rounds=5, warm=1))
    return prune


@pytest.mark.parametrize(
    ("plans", "multiple"),
    [
        ([EVEN] * 3, 8),
        ([[96, 97, 100, 98]] * 3, 8),
        ([[90, 97, 100, 98]] * 3, 1),
        ([[120, 110, 100, 90]] * 3, 16),
        ([[120, 90, 100, 110]] * 3, 4),
        ([[70, 100, 100, 100], [70, 100, 100, 100], [101, 100, 100, 100]], 8),
    ],
    ids=["equal", "within the noise", "ragged", "16", "4", "one plan contradicts"],
)
def test_another_multiple_than_8_is_clearly_faster_in_every_plan(plans, multiple):
    assert fastest(np.array(plans, np.float64)) == multiple


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_a_runtime_that_is_slow_beside_multiples_gets_them(multiple, root):
    """Operations take ten times as long where a width is no multiple."""

    def timer(layers, seconds):
        return [one.operations * (10 if any(width % multiple for width in channels(one)) else 1) for one in layers]

    found = align(channel_graph(cfg_file.load(root / "cfg/demo.cfg")), POLICY, SIZE, timer)
    assert (found.multiple_of, found.timed) == (multiple, 1)
    assert list(found.ms) == list(MULTIPLES)


def test_times_are_the_mean_over_the_plans_and_repeated_layers_count():
    """A layer takes 1 ms: the time of a plan is the number of its convolutions and poolings."""
    network = tiny()
    found = align(channel_graph(network), POLICY, SIZE, lambda layers, seconds: [1.0] * len(layers))
    count = sum(isinstance(block, Convolutional | Maxpool) for block in network.blocks)
    assert found.ms == dict.fromkeys(MULTIPLES, count)
    assert found.multiple_of == 8


def test_layers_are_rounded_up_or_whole(root):
    network = cfg_file.load(root / "cfg/demo.cfg")
    whole = {block.filters for block in network.blocks if isinstance(block, Convolutional)}
    plans = draw(channel_graph(network), POLICY, SIZE)
    assert len(plans) == DRAWS
    for site in sum(plans, plans[0]):
        for multiple, layer in zip(MULTIPLES, site, strict=True):
            widths = [width for width in channels(layer)[1:] if width not in whole]
            assert all(width % multiple == 0 for width in widths)
            assert all(a <= b for a, b in zip(channels(site[0]), channels(layer), strict=True))
    assert any(len(set(site)) == len(MULTIPLES) for site in plans[0])


def test_plans_are_the_same_in_every_run_whatever_the_policy_rounds_to():
    graph = channel_graph(tiny())
    assert draw(graph, POLICY, SIZE) == draw(graph, replace(POLICY, multiple_of=16), SIZE)


def test_repeated_units_are_timed_once(root):
    """yolov3 has 75 convolutions."""
    plan = draw(channel_graph(cfg_file.load(root / "cfg/yolov3.cfg")), POLICY, SIZE)[0]
    assert sum(plan.values()) == 75
    assert len(plan) < 50


def test_without_time_only_the_largest_layers_are_timed(monkeypatch):
    """A layer takes a second of three; 100 operations of 160 are then 62.5 %, and get so much of the time at first."""
    now, seen = [0.0], []
    sites = {
        (Layer(Maxpool(size=2, stride_x=2, stride_y=2, padding=1), Shape(4, side, side), operations),): operations
        for side, operations in ((2, 10), (4, 100), (6, 50))
    }

    def timer(layers, seconds):
        seen.append((layers[0].operations, seconds))
        now[0] += 1
        return [5.0]

    monkeypatch.setattr(alignment, "perf_counter", lambda: now[0])
    table = latency_table(sites, timer, 3.0)
    assert seen == [(100, pytest.approx(1.875)), (50, pytest.approx(2 * 50 / 60)), (10, pytest.approx(1))]
    assert all(ms.tolist() == [5.0] for ms in table.values())
    seen.clear()
    assert [site[0].operations for site in latency_table(sites, timer, 1.5)] == [100, 50]
    assert [site[0].operations for site in latency_table(sites, timer, 0.0)] == [100]


def test_layers_are_timed_in_torch_without_random_numbers():
    state = torch.get_rng_state()
    conv = Convolutional(filters=6, size=3, padding=1, activation="mish")
    depthwise = Convolutional(filters=5, size=3, groups=5, activation="leaky")
    pool = Maxpool(size=2, stride_x=2, stride_y=2, padding=1)
    layers = [Layer(block, Shape(5, 8, 8), 1) for block in (conv, depthwise, pool)]
    times = TorchTimer(torch.device("cpu"))(layers, 0.0)
    assert len(times) == 3 and all(0 < ms < 1000 for ms in times)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_says_which_multiple_and_why(prune, files, capsys, tmp_path):
    import slim_prune

    flags = ("--percent", "0.5", "--no-test", "--multiple-of", "auto")
    slim_prune.main([*files, *flags, "--project", str(tmp_path / "told"), "--device", "cpu"])
    told = capsys.readouterr()
    (line,) = (line for line in told.err.splitlines() if line.startswith("--multiple-of"))
    assert re.match(
        r"--multiple-of auto: (1|4|8|16); layers of random plans.*: ragged [\d.]+ ms, multiples of 4 ", line
    )
    assert line in told.out and line in (tmp_path / "told" / "exp" / "report.md").read_text()
    document = prune("slim", *flags)
    chosen, folder = document["alignment"], Path(document["run_dir"])
    assert set(chosen) == {"multiple_of", "ms", "timed", "runtime"}
    assert chosen["multiple_of"] in MULTIPLES and set(chosen["ms"]) == set(map(str, MULTIPLES))
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["alignment"] == chosen and plan["policy"]["multiple_of"] == chosen["multiple_of"]
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert (args["multiple_of"], args["multiple_of_chosen"]) == ("auto", chosen["multiple_of"])


@pytest.mark.parametrize("name", ["normal", "regular", "shortcut", "slim", "group", "layer_channel"])
def test_what_is_chosen_prunes_as_if_it_were_given(prune, monkeypatch, name):
    monkeypatch.setattr(alignment, "fastest", lambda ms: 4)
    amount = ("--percent", "0.6", "--dry-run", *(("--shortcut", "1") if name == "layer_channel" else ()))
    found, given = (prune(name, *amount, "--multiple-of", which) for which in ("auto", "4"))
    assert found.pop("alignment")["multiple_of"] == 4
    assert given.pop("alignment") is None
    assert found == given


def test_whole_units_leave_widths_alone(prune):
    assert prune("layer", "--shortcut", "1", "--dry-run", "--multiple-of", "auto")["alignment"] is None


def test_other_words_are_one_line_and_status_2(prune, files, capsys):
    with pytest.raises(InputError, match="--multiple-of: 'automatic' is not an integer"):
        prune("slim", "--percent", "0.5", "--no-test", "--multiple-of", "automatic")
    import regular_prune

    with pytest.raises(SystemExit) as left:
        run_script(lambda: regular_prune.main([*files, "--percent", "0.5", "--no-test", "--multiple-of", "1025"]))
    assert left.value.code == 2
    assert "--multiple-of: 1025: allowed are 1 to 1024, powers (of two) and auto" in capsys.readouterr().err


def test_efficiency_is_the_gain_in_time_over_the_gain_in_operations(prune, folder, monkeypatch):
    monkeypatch.setattr(report, "write_image", lambda *_: None)
    document = prune("slim", "--percent", "0.5", "--data", str(folder / "d.data"))
    before, after = document["before"], document["after"]
    faster, less = before["ms"] / after["ms"], before["macs"] / after["macs"]
    assert document["efficiency"] == pytest.approx(faster / less)
    wanted = f"; efficiency {faster / less:.2f}: time ÷ {faster:.2f}, multiply-adds ÷ {less:.2f}\n"
    assert wanted in report.text(document)
    assert wanted in (Path(document["run_dir"]) / "report.md").read_text()
    assert prune("slim", "--percent", "0.5", "--no-test")["efficiency"] is None


def test_words_say_how_much_was_timed():
    document = {"multiple_of": 8, "ms": {"1": 2.0, "8": 1.5}, "timed": 0.5, "runtime": "CPU, threads: 1"}
    assert words(document) == (
        "--multiple-of auto: 8; layers of random plans (50 % of their operations): ragged 2.00 ms, "
        "multiples of 8 1.50 ms; CPU, threads: 1; 8 where nothing else is clearly faster"
    )
    assert "operations" not in words(document | {"timed": 1.0})


CHAIN = (
    "[net]\nwidth=32\nheight=32\nchannels=3\n"
    + 2 * ("[convolutional]\nbatch_normalize=1\nfilters=3\nsize=3\npad=1\nactivation=leaky\n")
    + (
        "[shortcut]\nfrom=-2\nactivation=linear\n"
        "[convolutional]\nfilters=18\nsize=1\nactivation=linear\n"
        "[yolo]\nmask=0,1,2\nanchors=1,2,3,4,5,6\nclasses=1\nnum=3\n"
    )
)


@examples(60)
@given(network=networks(), seed=st.integers(0, 9), share=st.floats(0, 0.99), name=st.sampled_from([*POLICIES]))
def test_shares_leave_other_families_whole_and_no_layer_empty(network, seed, share, name):
    graph, policy = channel_graph(network), POLICIES[name]
    gammas, layers = random_gammas(graph, seed), candidates(graph, policy.prune)
    if not layers:
        return
    scores = channel_scores(graph, gammas, layers)
    for family in families_of(graph, layers):
        keep = keep_shares(graph, scores, {family: share}, policy)
        own = weakest(graph, scores, family)
        assert keep[np.setdiff1d(np.arange(graph.count), own)].all() and not emptied(graph, keep)
        gone = int((~keep[own]).sum())
        assert gone <= int(share * len(own) + 1e-9)
        if policy.multiple_of == 1 and len(family) == 1:
            width = len(own)
            assert gone == min(int(share * width + 1e-9), width - policy.least(family[0], width))
            assert not keep[own[:gone]].any() and keep[own[gone:]].all()


def test_a_channel_of_a_chain_is_as_weak_as_its_mean():
    """Two layers tied: γ 1, 4, 2 and 5, 0, 0 have the means 3, 2, 1."""
    graph = channel_graph(cfg_file.parse(CHAIN))
    scores = {0: np.array([1.0, 4.0, 2.0]), 1: np.array([5.0, 0.0, 0.0])}
    (family,) = families_of(graph, (0, 1))
    assert weakest(graph, scores, family).tolist() == graph.labels[0][[2, 1, 0]].tolist()
