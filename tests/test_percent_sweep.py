"""Every percentage works, or is refused with the layer that limits and the largest percentage that works.

A target in its place keeps the bound, one step from where it does not.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import slim_prune
from tests.nets import tiny
from tests.pruning import POLICIES as SCRIPT_POLICIES
from tests.pruning import SCRIPTS, conv, emptied, graph_of, random_gammas
from tests.random_nets import networks
from tests.test_random_networks import POLICIES as ANY_POLICY
from utils.cli import share as share_of
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.detection.evaluate import Accuracy
from utils.errors import InfeasibleError, InputError, NumericsError
from utils.pruning import workflow
from utils.pruning.channel_graph import ChannelGraph, Removal, channel_graph, prune_blocks
from utils.pruning.policy import ChannelPolicy, candidates, choose
from utils.pruning.target import Amount, PruneTarget, make_plan, make_steps
from utils.report.tables import Latency, network_cost

REFUSAL = re.compile(
    r"--percent \S+: block (\d+) .*lose all its \d+ channels; the largest percent that works is (0\.\d{4})"
)
SPLIT = "[route]\nlayers=-1,-2\n[route]\nlayers=-1\ngroups=2\n"
"""Ties the two convolutions before it, of equal width."""


def works(graph: ChannelGraph, gammas, policy: ChannelPolicy) -> bool:
    """Whether a percentage works; every layer keeps a channel then, and a refusal says what works otherwise."""
    try:
        choice = choose(graph, gammas, policy)
    except InfeasibleError as refused:
        block, largest = REFUSAL.fullmatch(str(refused)).groups()
        assert float(largest) < policy.percent
        choice = choose(graph, gammas, replace(policy, percent=float(largest)))
        assert choice.max_percent == float(largest)
        assert int(block) == choice.limiting
        assert not emptied(graph, choice.keep)
        return False
    assert not emptied(graph, choice.keep)
    assert len(prune_blocks(graph, Removal(choice.keep)).blocks) == len(graph.network.blocks)
    return True


def _stays(graph, gammas, policy, count: int) -> bool:
    """By the definition: `count` weakest candidate channels vote to go, layers that share a channel merge their votes,
    and every candidate keeps a channel; by the merge `minimum` whichever of them leads."""
    layers = candidates(graph, policy.prune, policy.all_convs)
    scores = choose(graph, gammas, replace(policy, percent=0.0)).scores
    order = sorted((scores[i][c], i, c) for i in layers for c in range(len(scores[i])))
    gone = {(i, c) for _, i, c in order[:count]}
    weakest = order[count][0] if count < len(order) else np.inf
    votes: dict[int, list[tuple[int, bool]]] = {}
    values: dict[int, list[float]] = {}
    for i in layers:
        for c, label in enumerate(graph.labels[i].tolist()):
            votes.setdefault(label, []).append((i, (i, c) not in gone))
            values.setdefault(label, []).append(scores[i][c])
    first = {label: given[0][0] for label, given in votes.items()}
    for _ in layers:  # the first of those that are joined by labels, however far
        for i in layers:
            least = min(first[label] for label in graph.labels[i].tolist())
            first |= dict.fromkeys(graph.labels[i].tolist(), least)

    def kept(label: int, leader: int) -> bool:
        given = votes[label]
        stay = [vote for _, vote in given]
        of_first, of_leader = ([vote for i, vote in given if i == who] for who in (first[label], leader))
        mean = np.clip(sum(sorted(values[label])) / len(given), min(values[label]), max(values[label]))
        return {
            "union": any(stay),
            "intersection": all(stay),
            "majority": 2 * sum(stay) >= len(stay),
            "first": any(of_first or stay),
            "minimum": any(of_leader or stay),
            "mean": mean > weakest or (mean == weakest and any(stay)),
        }[policy.merge]

    leaders = layers if policy.merge == "minimum" else layers[:1]
    return all(any(kept(label, leader) for label in graph.labels[i].tolist()) for i in layers for leader in leaders)


@settings(max_examples=600)
@given(networks(), ANY_POLICY, st.integers(0, 99), st.sampled_from((0, 1, 2, 5)))
def test_the_limit_is_that_of_the_definition(network, policy, seed, levels):
    """Feasible exactly if no more channels go than the definition allows, for any network and any γ.

    A floor, or a width of at least 2, makes every percentage work.
    """
    graph = channel_graph(network)
    gammas = random_gammas(graph, seed, levels)
    if not candidates(graph, policy.prune, policy.all_convs):
        with pytest.raises(InfeasibleError, match="no convolution can be pruned this way"):
            choose(graph, gammas, policy)
        return
    assert choose(graph, gammas, replace(policy, percent=0.0)).removed == 0
    assert works(graph, gammas, policy) or (policy.layer_keep, policy.multiple_of) == (None, 1)
    strict = replace(policy, layer_keep=None, multiple_of=1)
    choice = choose(graph, gammas, replace(strict, percent=0.0))
    total = choice.ranked
    most = bisect(range(total), False, key=lambda count: not _stays(graph, gammas, strict, count + 1))
    for count in {0, 1, total // 3, total // 2, total - 1, total, most, min(most + 1, total)}:
        assert works(graph, gammas, replace(strict, percent=count / total)) == _stays(graph, gammas, strict, count)
    limit = most / total
    assert choice.max_percent <= limit < choice.max_percent + 1e-4
    assert works(graph, gammas, replace(strict, percent=max(0.0, limit - 1e-9)))
    assert works(graph, gammas, replace(strict, percent=min(1.0, limit + 1e-9)))


@settings(max_examples=600)
@given(networks(), ANY_POLICY, st.integers(0, 99))
def test_a_floor_holds_whatever_is_merged(network, policy, seed):
    graph = channel_graph(network)
    policy = replace(policy, layer_keep=0.4)
    for i in candidates(graph, policy.prune, policy.all_convs):
        labels = np.unique(graph.labels[i])
        kept = choose(graph, random_gammas(graph, seed), policy).keep[labels].sum()
        assert kept >= max(1, int(0.4 * len(labels)))


class TestTies:
    """Channels that are tied in other ways than by a shortcut."""

    def test_layers_that_a_split_ties_are_chosen_together(self):
        graph = graph_of(conv(4), conv(4), SPLIT, conv(3))
        assert np.array_equal(graph.labels[0], graph.labels[1])
        assert candidates(graph, 0) == (0, 1, 4)
        assert graph.families()[0] == (0, 1)

    def test_one_without_batch_normalisation_keeps_the_other_whole(self):
        plain = "[convolutional]\nfilters=4\nactivation=linear\n"
        assert candidates(graph_of(conv(4), plain, SPLIT, conv(3)), 0) == (4,)

    def test_the_gate_of_a_residual_unit_does_not_keep_its_chain_whole(self):
        gate = f"[avgpool]\n{conv(2)}[convolutional]\nfilters=4\nactivation=logistic\n[scale_channels]\nfrom=-4\n"
        graph = graph_of(conv(4), conv(4), gate, "[shortcut]\nfrom=-6\nactivation=linear\n", conv(3))
        assert candidates(graph, 1) == (0, 1, 3, 7)

    def test_a_convolution_that_gates_itself_stays_whole(self):
        """Tied to two of the channels of another one, it could lose all its own while that one has some left."""
        square = "[sam]\nfrom=-1\n"
        tie = "[route]\nlayers=-1,-2\n" + conv(4) + "[shortcut]\nfrom=-2\nactivation=linear\n"
        graph = graph_of(conv(2), square, conv(2), tie, conv(3))
        assert candidates(graph, 1) == (6,)


class TestDegenerate:
    """P4: what crashed the suites before."""

    @pytest.mark.parametrize("policy", SCRIPT_POLICIES.values(), ids=SCRIPT_POLICIES)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_gamma_that_is_not_finite_is_named(self, policy, value):
        graph = channel_graph(tiny())
        block = candidates(graph, policy.prune, policy.all_convs)[0]
        gammas = random_gammas(graph, 1)
        gammas[block][0] = value
        with pytest.raises(NumericsError, match=rf"block {block} \(tiny.cfg:\d+\): an importance is not finite"):
            choose(graph, gammas, policy)


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


@example(figures=[1.0, 0.99995], bound=0.5, first=True)
@given(figures=st.lists(st.floats(0, 1), min_size=1, max_size=40), bound=st.floats(0.01, 0.99), first=st.booleans())
def test_a_target_is_kept_one_step_from_where_it_is_not(figures, bound, first):
    """Whatever the figures are, monotone or not; a refusal says what works, if the flag can say it."""
    steps, looked = len(figures) - 1, []

    def figure(step: int) -> float:
        looked.append(step)
        return figures[step]

    share = PruneTarget("macs", bound)
    try:
        found = share.reach(steps, figure)
        assert figures[found] <= bound and (found == 0 or figures[found - 1] > bound)
    except InfeasibleError as refused:
        if str(refused).endswith("; less than 0.01 % can be removed"):
            assert figures[-1] > 0.9999
        else:
            works = share_of(str(refused).split()[-1])
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


@settings(max_examples=80)
@given(
    network=networks(),
    seed=st.integers(0, 9),
    kind=st.sampled_from(["params", "macs"]),
    name=st.sampled_from([*SCRIPT_POLICIES]),
)
def test_counted_targets_are_met_channel_by_channel_in_any_network(network, seed, kind, name):
    graph = channel_graph(network)
    gammas, size = random_gammas(graph, seed), (graph.network.net.height, graph.network.net.width)
    try:
        steps = make_steps(graph, gammas, SCRIPT_POLICIES[name], None, fine=True)
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


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_every_script_takes_a_counted_target(prune, tmp_path, name, kind):
    """What is found, given as --percent, or as --shortcut, leads to the same network."""
    key, bound = {"params": "parameters"}.get(kind, kind), 0.98 if name == "regular" else 0.9
    document = prune(name, f"--target-{kind}", str(bound), "--no-test")
    target = document["target"]
    assert (target["flag"], target["bound"], document["rounds"]) == (f"--target-{kind}", bound, 1)
    assert target["tried"] >= 2
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
    assert document["after"] == document["grid"][0]["after"]
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
    fitted = Mock(side_effect=lambda graph, arrays, *_: arrays)
    monkeypatch.setattr("utils.pruning.workflow.reconstruct", fitted)
    document = prune("slim", "--max-drop", "30", *measured, "--reconstruct", "8", "--batch-size", "4", "--dry-run")
    assert [len(call.args[3]) for call in fitted.call_args_list] == [2] * document["target"]["tried"]


@pytest.mark.parametrize("name", SCRIPT_POLICIES)
def test_a_step_is_one_channel_by_rank_and_its_percentage_says_the_same_when_it_is_given(root, name):
    """Also where the share is no short decimal; of groups each loses the whole part of its share."""
    graph = channel_graph(cfg_file.load(root / "cfg" / "demo.cfg"))
    gammas = random_gammas(graph, 1)
    steps = make_steps(graph, gammas, SCRIPT_POLICIES[name], None, fine=True)
    for step in range(0, steps.last + 1, 13):
        plan = steps.plan(step)
        assert step - plan.choice.removed in (range(3) if name == "group" else (0,))
        again = make_plan(graph, gammas, SCRIPT_POLICIES[name], Amount(float(str(plan.amount.percent)), None))
        assert np.array_equal(again.choice.keep, plan.choice.keep)
