"""A target in place of a percentage: what is found keeps the bound, one step from where it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slim_prune
from tests.nets import tiny
from tests.pruning import POLICIES, SCRIPTS, random_gammas
from tests.random_nets import networks
from tests.test_random_networks import examples
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.detection.evaluate import Accuracy
from utils.errors import InfeasibleError, InputError
from utils.pruning import workflow
from utils.pruning.channel_graph import channel_graph
from utils.pruning.target import Amount, PruneTarget, make_plan, make_steps
from utils.report.cost import Latency, network_cost

UNITS = {"layer_channel": ("--shortcut", "1")}
"""What a script needs beside the target."""


@pytest.fixture
def prune(prune):
    """The same, with what a script needs."""
    return lambda name, *flags: prune(name, *UNITS.get(name, ()), *flags)


@pytest.fixture
def measured(monkeypatch, folder):
    """AP50 is the share of the tiny network's parameters that a network has, its time the number of its multiply-adds.
    Returns the flag of pictures."""
    whole = network_cost(tiny()).parameters

    def accuracy(self, name, model):
        value = network_cost(model.network).parameters / whole
        return Accuracy(value, value), [(np.zeros((3, 64, 64), np.uint8), np.zeros((0, 6)))]

    def latency(self, models):
        macs = {name: network_cost(model.network).macs for name, model in models.items()}
        return {name: Latency(count, count, 50) for name, count in macs.items()}

    monkeypatch.setattr(workflow.Pruner, "accuracy", accuracy)
    monkeypatch.setattr(workflow.Pruner, "latency", latency)
    return "--data", str(folder / "d.data"), "--importance", "gamma", "--reconstruct", "0"


@given(figures=st.lists(st.floats(0, 1), min_size=1, max_size=40), bound=st.floats(0.01, 0.99), first=st.booleans())
def test_a_target_is_kept_one_step_from_where_it_is_not(figures, bound, first):
    """Whatever the figures are, monotone or not; a refusal says what works."""
    steps, looked = len(figures) - 1, []

    def figure(step: int) -> float:
        looked.append(step)
        return figures[step]

    share = PruneTarget("macs", bound)
    try:
        found = share.reach(steps, figure)
        assert figures[found] <= bound and (found == 0 or figures[found - 1] > bound)
    except InfeasibleError as refused:
        works = float(str(refused).split()[-1])
        assert figures[replace(share, bound=works).reach(steps, figure)] <= works
    assert len(looked) <= 2 * (2 + len(figures).bit_length())
    drop, first = PruneTarget("drop", bound), int(first)
    try:
        found = drop.reach(steps, figure, first)
        assert found >= first and figures[found] <= bound and (found == steps or figures[found + 1] > bound)
    except InfeasibleError as refused:
        if steps >= first:
            works = float(str(refused).split()[-1])
            assert figures[replace(drop, bound=works).reach(steps, figure, first)] <= works


@examples(80)
@given(
    network=networks(),
    seed=st.integers(0, 9),
    kind=st.sampled_from(["params", "macs"]),
    name=st.sampled_from([*POLICIES]),
)
def test_counted_targets_are_met_channel_by_channel_in_any_network(network, seed, kind, name):
    graph = channel_graph(network)
    gammas, size = random_gammas(graph, seed), (graph.network.net.height, graph.network.net.width)
    try:
        steps = make_steps(graph, gammas, POLICIES[name], None, fine=True)
    except InfeasibleError:
        return
    counted = PruneTarget(kind, 0.5).counted

    def figure(step: int) -> float:
        left = network_cost(steps.plan(step).after(), *size)
        return getattr(left, counted) / getattr(network_cost(network), counted)

    target = PruneTarget(kind, 0.3 + 0.7 * figure(steps.last))
    if target.bound < 1:
        step = target.reach(steps.last, figure)
        assert figure(step) <= target.bound < figure(step - 1)


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_is_one_channel_by_rank(root, name):
    graph = channel_graph(cfg_file.load(root / "cfg" / "demo.cfg"))
    steps = make_steps(graph, random_gammas(graph, 1), POLICIES[name], None, fine=True)
    removed = [steps.plan(step).choice.removed for step in range(0, steps.last + 1, 7)]
    if name == "group":  # each group loses the whole part of its share
        assert all(step - 3 < count <= step for step, count in zip(range(0, steps.last + 1, 7), removed, strict=True))
    else:
        assert removed == list(range(0, steps.last + 1, 7))


def test_steps_of_units_are_units():
    graph = channel_graph(tiny())
    steps = make_steps(graph, random_gammas(graph, 1), None, None, fine=True)
    assert (steps.last, steps.first, steps.plan(1).amount) == (1, 1, Amount(None, 1))
    assert len(steps.plan(1).removal.units) == 1


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_every_script_takes_a_counted_target(prune, tmp_path, name, kind):
    """What is found, given as --percent, or as --shortcut, leads to the same network."""
    key, bound = {"params": "parameters"}.get(kind, kind), 0.98 if name == "regular" else 0.9
    document = prune(name, f"--target-{kind}", str(bound), "--no-test")
    target = document["target"]
    assert target["flag"] == f"--target-{kind}" and target["bound"] == bound and target["tried"] >= 2
    assert document["after"][key] / document["before"][key] == target["reached"] <= bound
    amount = ("--shortcut", "1") if name == "layer" else ("--percent", str(target["percent"]))
    assert prune(name, *amount, "--dry-run")["after"] == document["after"]
    run = Path(document["run_dir"])
    assert json.loads((run / "plan.json").read_text())["target"] == target
    assert f"target --target-{kind} {bound}: {target['reached']:.4f}, by --" in (run / "report.md").read_text()


def test_channels_that_cost_nothing_go_even_where_the_target_keeps_them(prune, files, capsys):
    """By γ: a third of the channels have γ = 0, and the target alone takes one of them."""
    network = tiny()
    arrays = {name: array.copy() for name, array in weights_file.read(files[3], network).items()}
    for name, array in arrays.items():
        if name.endswith("bn.weight"):
            array[1::3] = 0.0
    weights_file.write(Path(files[3]), network, arrays)
    document = prune("slim", "--target-params", "0.99", "--no-test")
    assert document["percent"] == document["advised_percent"] > 0.2
    assert document["after"]["parameters"] / document["before"]["parameters"] == document["target"]["reached"] < 0.9


def test_what_is_out_of_reach_is_refused_with_what_works(prune, tmp_path):
    for name in SCRIPTS:
        with pytest.raises(InfeasibleError, match=r"--target-macs 0\.01: .* works is 0\.\d{4}$") as caught:
            prune(name, "--target-macs", "0.01", "--no-test")
        assert not (tmp_path / "runs").exists()
        works = str(caught.value).split()[-1]
        assert prune(name, "--target-macs", works, "--dry-run")["target"]["reached"] <= float(works)


def test_a_dry_run_prints_the_percentage_that_was_found(prune, tmp_path, files, capsys):
    document = prune("slim", "--target-macs", "0.5", "--dry-run")
    assert document["grid"][0]["percent"] == document["target"]["percent"]
    slim_prune.main([*files, "--target-macs", "0.5", "--dry-run"])
    out = capsys.readouterr().out
    assert f"by --percent {document['target']['percent']}; networks tried: {document['target']['tried']}" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["slim", "group", "layer", "layer_channel"])
def test_the_drop_is_within_the_bound_and_a_hundredth_more_is_not(prune, measured, name):
    bound = {"layer": 45, "layer_channel": 70}.get(name, 30)
    document = prune(name, "--max-drop", str(bound), *measured)
    drop = 100 * (document["before"]["map50"] - document["after"]["map50"])
    assert drop == pytest.approx(document["target"]["reached"]) and 0 < drop <= bound
    if name != "layer":
        percent = document["target"]["percent"]
        assert round(percent, 2) == percent
        more = prune(name, "--percent", f"{percent + 0.01:.2f}", *measured)
        assert 100 * (more["before"]["map50"] - more["after"]["map50"]) > bound


def test_units_that_go_in_any_case_count_as_a_drop(prune, measured, tmp_path):
    with pytest.raises(InfeasibleError, match=r"--max-drop 1: .* works is \d+\.\d\d$") as caught:
        prune("layer_channel", "--max-drop", "1", *measured)
    works = str(caught.value).split()[-1]
    assert not (tmp_path / "runs").exists()
    assert prune("layer_channel", "--max-drop", works, "--dry-run", *measured)["target"]["reached"] <= float(works)


@pytest.mark.parametrize("name", ["slim", "layer", "layer_channel"])
def test_the_time_is_within_the_bound_and_a_hundredth_less_is_not(prune, measured, name):
    document = prune(name, "--target-latency", "0.9", *measured)
    times = {key: document["latency"][key]["median"] for key in ("original", "compact")}
    assert times["compact"] / times["original"] == document["target"]["reached"] <= 0.9
    if name == "slim":
        percent = document["target"]["percent"]
        less = prune(name, "--percent", f"{percent - 0.01:.2f}", "--dry-run")
        assert less["after"]["macs"] / less["before"]["macs"] > 0.9


def test_a_network_that_finds_nothing_cannot_lose_anything(prune, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow.Pruner, "accuracy", lambda *_: (Accuracy(0.0, 0.0), []))
    with pytest.raises(InputError, match=r"finds nothing in .*val\.txt; its AP50 is 0"):
        prune("slim", "--max-drop", "5", "--data", str(folder / "d.data"))
    assert not (tmp_path / "runs").exists()


def test_reconstruction_is_part_of_what_is_tried(prune, measured, monkeypatch):
    seen = []

    def fitted(graph, arrays, removal, pictures, *_):
        seen.append(len(pictures))
        return arrays

    monkeypatch.setattr("utils.pruning.reconstruct.reconstruct", fitted)
    document = prune("slim", "--max-drop", "30", *measured, "--reconstruct", "8", "--batch-size", "4", "--dry-run")
    assert seen == [2] * document["target"]["tried"]


def test_a_found_percentage_says_the_same_when_it_is_given():
    """Also where the share is no short decimal."""
    graph = channel_graph(tiny())
    gammas = random_gammas(graph, 3)
    steps = make_steps(graph, gammas, POLICIES["slim"], None, fine=True)
    for step in range(steps.last + 1):
        percent = float(str(steps.plan(step).amount.percent))
        assert make_plan(graph, gammas, POLICIES["slim"], Amount(percent, None)).choice.removed == step
