"""Every percentage either works, or is refused with the layer that limits and the largest percentage that works."""

from __future__ import annotations

import importlib
import re
from bisect import bisect
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nets import TINY, tiny
from tests.pruning import POLICIES as SCRIPT_POLICIES
from tests.pruning import emptied, normalised, random_gammas
from tests.random_nets import networks
from tests.test_graph import conv, graph_of
from tests.test_random_networks import POLICIES as ANY_POLICY
from tests.test_random_networks import examples
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.network import tensors
from utils.errors import InfeasibleError, InputError, NumericsError
from utils.pruning.channel_graph import ChannelGraph, Removal, channel_graph, prune_blocks
from utils.pruning.policy import MERGES, ChannelPolicy, candidates, choose

POLICIES = {name: policy for name, policy in SCRIPT_POLICIES.items() if not policy.groups} | {
    "refused slim": ChannelPolicy(0),
    "majority": ChannelPolicy(0, merge="majority"),
    "all": ChannelPolicy(0, merge="intersection", all_convs=True),
}
PERCENTS = np.arange(101) / 100
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


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("levels", [0, 3, 1], ids=["random", "ties", "zeros"])
@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_every_percentage_works_or_is_refused_with_what_works(root, name, levels, policy):
    graph = channel_graph(tiny() if name == "tiny" else cfg_file.load(root / "cfg" / "demo.cfg"))
    gammas = random_gammas(graph, 5, levels)
    feasible = [works(graph, gammas, replace(policy, percent=float(percent))) for percent in PERCENTS]
    assert feasible == sorted(feasible, reverse=True)
    if policy.layer_keep is not None or policy.multiple_of != 1:
        assert all(feasible)
        return
    choice = choose(graph, gammas, replace(policy, percent=0.0))
    most = bisect(range(choice.ranked), False, key=lambda count: not _stays(graph, gammas, policy, count + 1))
    assert feasible == [int(percent * choice.ranked + 1e-9) <= most for percent in PERCENTS]
    limit = most / choice.ranked
    assert choice.max_percent <= limit < choice.max_percent + 1e-4
    assert works(graph, gammas, replace(policy, percent=limit - 1e-9))
    assert works(graph, gammas, replace(policy, percent=limit))
    assert works(graph, gammas, replace(policy, percent=limit + 1e-9))
    assert not works(graph, gammas, replace(policy, percent=limit + 1.001 / choice.ranked))


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


@examples(600)
@given(networks(), ANY_POLICY, st.integers(0, 99), st.sampled_from((0, 1, 2, 5)))
def test_the_limit_is_that_of_the_definition(network, policy, seed, levels):
    """Feasible exactly if no more channels go than the definition allows, for any network and any γ."""
    graph = channel_graph(network)
    gammas = random_gammas(graph, seed, levels)
    if not candidates(graph, policy.prune, policy.all_convs):
        with pytest.raises(InfeasibleError, match="no convolution can be pruned this way"):
            choose(graph, gammas, policy)
        return
    assert choose(graph, gammas, replace(policy, percent=0.0)).removed == 0
    works(graph, gammas, policy)
    strict = replace(policy, layer_keep=None, multiple_of=1)
    total = choose(graph, gammas, replace(strict, percent=0.0)).ranked
    for count in {0, 1, total // 3, total // 2, total - 1, total}:
        assert works(graph, gammas, replace(strict, percent=count / total)) == _stays(graph, gammas, strict, count)


@examples(600)
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

    @pytest.mark.parametrize("merge", MERGES)
    def test_layers_that_a_split_ties_are_chosen_together(self, merge):
        graph = graph_of(conv(4), conv(4), SPLIT, conv(3))
        assert np.array_equal(graph.labels[0], graph.labels[1])
        gammas = {0: np.array([0.9, 0.1, 0.8, 0.2]), 1: np.array([0.1, 0.9, 0.8, 0.2]), 4: np.ones(3)}
        keep = choose(graph, gammas, ChannelPolicy(4 / 11, prune=0, merge=merge)).keep[graph.labels[0]]
        expected = {
            "union": [1, 1, 1, 0],
            "majority": [1, 1, 1, 0],
            "first": [1, 0, 1, 0],
            "intersection": [0, 0, 1, 0],
            "minimum": [1, 0, 1, 0],
            "mean": [0, 0, 1, 0],
        }
        assert keep.tolist() == [bool(stays) for stays in expected[merge]]

    def test_one_without_batch_normalisation_keeps_the_other_whole(self):
        plain = "[convolutional]\nfilters=4\nactivation=linear\n"
        assert candidates(graph_of(conv(4), plain, SPLIT, conv(3)), 0) == (4,)

    def test_the_gate_of_a_residual_unit_does_not_keep_its_chain_whole(self):
        gate = f"[avgpool]\n{conv(2)}[convolutional]\nfilters=4\nactivation=logistic\n[scale_channels]\nfrom=-4\n"
        graph = graph_of(
            conv(4), conv(4), gate, "[shortcut]\nfrom=0\nactivation=linear\n".replace("=0", "=-6"), conv(3)
        )
        assert candidates(graph, 1) == (0, 1, 3, 7)

    def test_a_convolution_that_gates_itself_stays_whole(self):
        """Tied to two of the channels of another one, it could lose all its own while that one has some left."""
        square = "[sam]\nfrom=-1\n"
        tie = "[route]\nlayers=-1,-2\n" + conv(4) + "[shortcut]\nfrom=-2\nactivation=linear\n"
        graph = graph_of(conv(2), square, conv(2), tie, conv(3))
        assert candidates(graph, 1) == (6,)

    def test_the_strongest_channel_of_the_widest_layer_does_not_save_the_narrow_one(self):
        """Chain of 2 and 4 channels: the channel that only the wide one has does not count for the narrow one."""
        graph = graph_of(conv(4), conv(2), "[shortcut]\nfrom=-2\nactivation=linear\n", conv(3))
        gammas = {0: np.array([0.1, 0.2, 0.3, 0.9]), 1: np.array([0.15, 0.25]), 3: np.array([1.0, 1.1, 1.2])}
        assert choose(graph, gammas, ChannelPolicy(3 / 9)).keep[graph.labels[1]].tolist() == [False, True]
        with pytest.raises(InfeasibleError, match=r"block 1 .* lose all its 2 channels; .* 0\.3333$"):
            choose(graph, gammas, ChannelPolicy(4 / 9))


class TestDegenerate:
    """P4: what crashed the suites before."""

    @pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_gamma_that_is_not_finite_is_named(self, policy, value):
        graph = channel_graph(tiny())
        block = candidates(graph, policy.prune, policy.all_convs)[0]
        gammas = random_gammas(graph, 1)
        gammas[block][0] = value
        with pytest.raises(NumericsError, match=rf"block {block} \(tiny.cfg:\d+\): an importance is not finite"):
            choose(graph, gammas, policy)

    @pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
    def test_layers_of_one_channel_stay(self, policy):
        graph = graph_of(conv(1), conv(1, 3), "[shortcut]\nfrom=-2\nactivation=linear\n", conv(1))
        for percent in (0.0, 0.3, 0.34, 0.99):
            works(graph, random_gammas(graph, 0), replace(policy, percent=percent))
        assert choose(graph, random_gammas(graph, 0), replace(policy, percent=0.3)).keep.all()

    @pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
    def test_an_untrained_network_loses_what_was_asked_for(self, value):
        graph = channel_graph(tiny())
        gammas = {i: np.full(len(graph.labels[i]), value) for i in normalised(graph)}
        choice = choose(graph, gammas, ChannelPolicy(0.2, prune=0))
        assert choice.removed == (~choice.keep).sum() == int(0.2 * choice.ranked)


class TestCommandLine:
    """Before torch is loaded, and without a trace."""

    @pytest.mark.parametrize("name", ["normal", "regular", "shortcut", "slim"])
    @pytest.mark.parametrize("value", ["-0.1", "1.5", "1", "nan", "inf", "", "half"])
    def test_what_is_no_share_is_a_usage_error(self, tmp_path, name, value):
        main = importlib.import_module(f"{name}_prune").main
        with pytest.raises(InputError, match=r"^--percent: ") as caught:
            main(["--cfg", "n.cfg", "--weights", "n.weights", "--project", str(tmp_path / "runs"), "--percent", value])
        assert caught.value.exit_status == 2
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(("name", "status"), [("normal", 6), ("shortcut", 6)])
    def test_too_much_writes_nothing(self, tmp_path, name, status):
        rng = np.random.default_rng(0)
        arrays = {spec.key: rng.random(spec.shape) for spec in tensors(tiny())}
        (tmp_path / "n.cfg").write_text(TINY)
        weights_file.write(tmp_path / "n.weights", tiny(), arrays)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        files = ["--cfg", str(tmp_path / "n.cfg"), "--weights", str(tmp_path / "n.weights"), "--no-test"]
        with pytest.raises(
            InfeasibleError, match=r"--percent 0\.97: block \d+ \(.*\) would lose all .* 0\.\d{4}$"
        ) as caught:
            importlib.import_module(f"{name}_prune").main(
                [*files, "--percent", "0.97", "--project", str(tmp_path / "runs")]
            )
        assert caught.value.exit_status == status
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
