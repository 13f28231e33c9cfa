"""Group pruning: the groups of a network, a percentage for each, and how convolutions of a chain agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import group_prune
from tests.pruning import GATE, POLICIES, SHORTCUT, conv, emptied, graph_of, random_gammas
from tests.random_nets import networks
from utils.darknet import cfg as cfg_file
from utils.errors import InfeasibleError, InputError
from utils.pruning import report
from utils.pruning.channel_graph import ChannelGraph, Removal, channel_graph, prune_blocks
from utils.pruning.policy import MERGES, ChannelPolicy, candidates, choose, pruning_groups
from utils.pruning.report import group_figures
from utils.pruning.target import Amount, make_plan
from utils.report.tables import network_cost

BOUNDARIES = {
    "yolov4": [(0, 54), (55, 85), (86, 116), (117, 138), (141, 160)],
    "yolov3": [(0, 35), (37, 60), (62, 81), (84, 93), (96, 105)],
    "yolov3-tiny": [(0, 6), (8, 8), (10, 15), (18, 22)],
    "yolov4-tiny": [(0, 15), (18, 23), (26, 29), (32, 36)],
    "mobilenetv2-yolov3": [(0, 21), (23, 47), (49, 70), (73, 85), (88, 100)],
    "demo": [(0, 7), (9, 18), (21, 25)],
}
"""First and last convolution of every group."""
TWO_HEADS = (
    *[conv(8, 3, stride=2)] * 3,
    conv(12, 3, stride=2),
    conv(12, 3),
    SHORTCUT,
    conv(16, 3, stride=2),
    conv(16, 1),
    conv(8),
    "[upsample]\nstride=2\n",
    "[route]\nlayers=-1,5\n",
    conv(10, 3),
)
"""Backbone to stride 32, one upsampling, one head: four groups."""
POLICY = replace(POLICIES["group"], percent=0.5)


def graph_of_cfg(root, name: str) -> ChannelGraph:
    return channel_graph(cfg_file.load(root / "cfg" / f"{name}.cfg"))


class TestGroups:
    """What is a group."""

    @pytest.mark.parametrize("name", BOUNDARIES)
    def test_they_are_told_from_strides_upsamplings_and_heads(self, root, name):
        graph = graph_of_cfg(root, name)
        groups = pruning_groups(graph)
        assert [(group.layers[0], group.layers[-1]) for group in groups] == BOUNDARIES[name]
        assert all(sorted(group.layers) == list(group.layers) for group in groups)

    def test_without_an_upsampling_the_backbone_goes_to_the_end(self):
        graph = graph_of(*TWO_HEADS[:8])
        groups = pruning_groups(graph)
        assert [group.layers for group in groups] == [(0, 1, 2), (3, 4), (6, 7, 8)]
        assert [group.layers for group in pruning_groups(graph_of(conv(4)))] == [(0, 1)]

    def test_a_gate_is_where_its_block_is(self):
        """Its single cell is no stride."""
        plain = graph_of(*(conv(8, 3, stride=2) for _ in range(5)))
        gated = graph_of(conv(8, 3, stride=2), *GATE, *(conv(8, 3, stride=2) for _ in range(4)))
        names = [[(group.name, len(group.layers)) for group in pruning_groups(graph)] for graph in (plain, gated)]
        assert names[0] == [
            ("backbone to stride 8", 3),
            ("backbone at stride 16", 1),
            ("from stride 32 to the first upsampling", 2),
        ]
        assert names[1] == [(names[0][0][0], 5), *names[0][1:]]

    def test_what_is_tied_across_a_boundary_is_in_the_group_of_the_first(self):
        """The sum at stride 8 of a convolution of the top-down path and one of the backbone."""
        shortcut = "[shortcut]\nfrom=-5\nactivation=linear\n"
        graph = graph_of(
            conv(8, 3, stride=8), conv(4, 3, stride=2), conv(4), "[upsample]\nstride=2\n", conv(8), shortcut
        )
        assert [group.layers for group in pruning_groups(graph)] == [(0, 4), (1,), (2, 6)]

    @settings(max_examples=300)
    @given(networks())
    def test_every_convolution_is_in_one_group_and_no_family_in_two(self, network):
        graph = channel_graph(network)
        groups = pruning_groups(graph)
        assert sorted(i for group in groups for i in group.layers) == list(graph.makers())
        assert len({group.name for group in groups}) == len(groups)
        of = {i: number for number, group in enumerate(groups) for i in group.layers}
        assert all(len({of[i] for i in family}) == 1 for family in graph.families())
        alone = [of[family[0]] for family in graph.families() if len(family) == 1]
        assert alone == sorted(alone)

    def test_a_pruned_network_has_the_same(self, root):
        graph = graph_of_cfg(root, "yolov4-tiny")
        keep = choose(graph, random_gammas(graph, 0), POLICY).keep
        assert pruning_groups(channel_graph(prune_blocks(graph, Removal(keep)))) == pruning_groups(graph)


class TestPercents:
    """What goes from every group."""

    @pytest.mark.parametrize("levels", [0, 4, 1], ids=["random", "ties", "zeros"])
    def test_each_loses_its_weakest(self, root, levels):
        """Without chains: exactly floor(p · N) of each, by (|γ|, layer, channel), whatever the others have."""
        graph = graph_of_cfg(root, "yolov4-tiny")
        gammas, percents = random_gammas(graph, 3, levels), (0.1, 0.55, 0.3, 0.0)
        choice = choose(graph, gammas, replace(POLICY, layer_keep=0.0, group_percents=percents))
        for group, part, percent in zip(pruning_groups(graph), choice.parts, percents, strict=True):
            layers = [i for i in candidates(graph, 1) if i in group.layers]
            order = sorted((abs(gammas[i][c]), i, c) for i in layers for c in range(len(gammas[i])))
            gone = {(i, c) for _, i, c in order[: int(percent * len(order) + 1e-9)]}
            assert (part.group, tuple(part.ranks), part.ranked) == (group, tuple(layers), len(order))
            assert part.removed == len(gone)
            assert part.threshold == order[len(gone)][0]
            for i in layers:
                goes, kept = [(i, c) in gone for c in range(len(gammas[i]))], choice.keep[graph.labels[i]]
                assert kept.sum() == max(1, goes.count(False))
                assert all(goes) or goes == (~kept).tolist()
        assert choice.removed == sum(part.removed for part in choice.parts)
        assert choice.ranked == 2528

    def test_one_percentage_is_that_of_all(self, root):
        graph = graph_of_cfg(root, "yolov4-tiny")
        gammas = random_gammas(graph, 1)
        one, each = (
            choose(graph, gammas, replace(POLICY, percent=0.3, group_percents=percents))
            for percents in (None, (0.3,) * 4)
        )
        assert np.array_equal(one.keep, each.keep)
        assert not np.array_equal(one.keep, choose(graph, gammas, replace(POLICY, percent=0.3, groups=False)).keep)

    @settings(max_examples=200)
    @given(networks(), st.floats(0, 0.99), st.sampled_from(tuple(MERGES)), st.integers(0, 99))
    def test_a_network_of_one_group_is_pruned_as_by_slim(self, network, percent, merge, seed):
        graph = channel_graph(network)
        policy = ChannelPolicy(percent, merge=merge, layer_keep=0.01)
        if not candidates(graph, 1):
            return
        gammas = random_gammas(graph, seed)
        slim, group = (choose(graph, gammas, replace(policy, groups=groups)) for groups in (False, True))
        assert group.ranked == slim.ranked
        if sum(part.ranked > 0 for part in group.parts) == 1:
            assert np.array_equal(group.keep, slim.keep)
            assert (group.removed, group.threshold) == (slim.removed, slim.threshold)

    def test_without_a_floor_the_limit_is_that_of_the_tightest_group(self):
        graph = graph_of(*TWO_HEADS)
        gammas = random_gammas(graph, 0)
        policy = replace(POLICY, percent=0.0, layer_keep=None)
        largest = choose(graph, gammas, policy).max_percent
        choice = choose(graph, gammas, replace(policy, percent=largest))
        assert not emptied(graph, choice.keep)
        with pytest.raises(InfeasibleError, match=rf"--percent .*: block {choice.limiting} .* works is {largest:.4f}$"):
            choose(graph, gammas, replace(policy, percent=largest + 0.13))
        with pytest.raises(InfeasibleError, match=r"--group-percent 1: block \d+ .* lose all"):
            choose(graph, gammas, replace(policy, group_percents=(0.0, 0.0, 1.0, 0.0)))

    def test_a_policy_that_contradicts_itself_is_a_mistake(self):
        with pytest.raises(ValueError, match="merge 'or': there are first, union"):
            ChannelPolicy(0.1, merge="or")
        with pytest.raises(ValueError, match="without groups there is one percent"):
            ChannelPolicy(0.1, group_percents=(0.1,))

    def test_figures_add_up_to_the_network(self, root):
        """With depthwise convolutions, too."""
        graph = graph_of_cfg(root, "mobilenetv2-yolov3")
        plan = make_plan(graph, random_gammas(graph, 4), POLICY, Amount(0.4, None))
        rows = group_figures(plan, (416, 416), by_gamma=True)
        for when, network in (("before", graph.network), ("after", plan.after())):
            cost = network_cost(network, 416, 416)
            assert sum(row[when]["parameters"] for row in rows) == cost.parameters
            assert sum(row[when]["macs"] for row in rows) == cost.macs
        assert sum(row["candidates"] for row in rows) == plan.choice.ranked
        assert all(row["kept"] < row["candidates"] for row in rows)
        assert plan.choice.advised == min(row["advised_percent"] for row in rows)
        slim = make_plan(graph, random_gammas(graph, 4), replace(POLICY, groups=False), Amount(0.4, None))
        assert group_figures(slim, (416, 416), by_gamma=True) is None


class TestMerges:
    """One mask for a chain of three."""

    graph = graph_of(conv(4), conv(4), SHORTCUT, conv(4), SHORTCUT, conv(4))
    gammas: ClassVar = {
        0: np.array([0.9, 0.8, 0.7, 0.1]),
        1: np.array([0.9, 0.36, 0.1, 0.15]),
        3: np.array([0.05, 0.25, 0.26, 0.9]),
        5: np.array([0.3, 0.35, 0.4, 0.45]),
    }

    def kept(self, merge: str, percent: float = 0.5, gammas=None) -> list[int]:
        choice = choose(self.graph, gammas or self.gammas, replace(POLICY, percent=percent, merge=merge))
        return np.flatnonzero(choice.keep[self.graph.labels[0]]).tolist()

    @pytest.mark.parametrize(
        ("merge", "chain"),
        [
            ("first", [0, 1, 2]),
            ("union", [0, 1, 2, 3]),
            ("majority", [0, 1]),
            ("intersection", [0]),
            ("minimum", [3]),
            ("mean", [0, 1, 3]),
        ],
    )
    def test_by_hand(self, merge, chain):
        """Eight of sixteen go: 0.05 0.1 0.1 0.15 0.25 0.26 0.3 0.35; the weakest that stays is 0.36.

        So the three keep {0, 1, 2}, {0, 1} and {3}. None is in all, and the floor gives back 0, whose mean is highest:
        0.617, 0.47, 0.353, 0.383.
        """
        assert self.kept(merge) == chain

    def test_of_those_that_keep_equally_few_the_first_counts(self):
        gammas = self.gammas | {0: np.array([0.9, 0.01, 0.02, 0.03]), 1: np.array([0.01, 0.9, 0.02, 0.03])}
        assert self.kept("minimum", gammas=gammas | {3: np.array([0.9, 0.9, 0.02, 0.03])}) == [0]

    def test_equal_means_go_by_rank(self):
        """All γ are 0; six of sixteen go, those of block 0 and two of block 1, which the others keep."""
        zeros = {i: np.zeros(4) for i in self.gammas}
        assert self.kept("mean", 6 / 16, zeros) == [0, 1, 2, 3]
        assert self.kept("mean", 10 / 16, zeros) == [2, 3]
        assert self.kept("mean", 0.0, {i: np.full(4, 0.7) for i in self.gammas}) == [0, 1, 2, 3]

    def test_a_floor_holds_for_means(self):
        assert self.kept("mean", 0.99) == [0]


class TestScript:
    """group_prune.py on the tiny network."""

    FLAGS = ("group", "--group-percent", "0.3", "0.5", "--all-convs")

    def test_a_run_is_proved_and_says_what_went_from_every_group(self, prune, monkeypatch):
        drawn = []
        monkeypatch.setattr(
            report, "plot_threshold", lambda scores, removed, path: drawn.append((len(scores), removed, path.name))
        )
        document = prune(*self.FLAGS, "--no-test")
        assert max(document["certificate"][key] for key in ("compact_vs_silenced", "compact_vs_keep_size")) < 1e-4
        first, second = document["groups"]
        assert (first["percent"], first["candidates"], first["removed"]) == (0.3, 40, 12)
        assert (second["percent"], second["candidates"], second["removed"]) == (0.5, 6, 3)
        assert second["convolutions"] == [11, 14] and second["kept"] == 3
        assert document["percent"] is None and document["strategy"] == "group"
        run = Path(document["run_dir"])
        plan = json.loads((run / "plan.json").read_text())
        assert plan["groups"] == document["groups"]
        assert plan["policy"]["group_percents"] == [0.3, 0.5] and plan["policy"]["merge"] == "majority"
        assert plan["channels"]["removed"] == 15
        assert drawn == [(40, 12, "importance_1.png"), (6, 3, "importance_2.png")]
        text = (run / "report.md").read_text()
        assert "| 1 backbone to stride 8" in text and "advised: --group-percent" in text
        assert cfg_file.load(document["cfg"]).blocks[11].filters == 3

    def test_a_dry_run_shows_them_and_writes_nothing(self, prune, files, tmp_path, capsys):
        document = prune(*self.FLAGS, "--dry-run")
        assert [group["kept"] < group["candidates"] for group in document["groups"]] == [True, True]
        assert document["groups"] == document["grid"][0]["groups"]
        group_prune.main([*files, *self.FLAGS[1:], "--dry-run"])
        lines = capsys.readouterr().out.splitlines()
        row = next(line for line in lines if line.startswith("1 backbone to stride 8"))
        group = document["groups"][0]
        assert row.split()[5:11] == f"0–8 6 40 0.3 {group['advised_percent']:g} {group['kept']}".split()
        grid = prune("group", "--percent", "0.1", "0.9", "--dry-run")["grid"]
        assert [group["percent"] for row in grid for group in row["groups"]] == [0.1, 0.1, 0.9, 0.9]
        assert not (tmp_path / "runs").exists()

    def test_a_share_is_advised_only_by_gamma(self, prune, folder):
        document = prune(*self.FLAGS, "--no-test", "--data", str(folder / "d.data"))
        assert document["importance"] == "taylor"
        assert [group["advised_percent"] for group in document["groups"]] == [None, None]
        assert "advised:" not in (Path(document["run_dir"]) / "report.md").read_text()

    def test_a_group_without_candidates_takes_any_percentage(self, prune):
        document = prune("group", "--group-percent", "0.3", "0.9", "--dry-run")
        second = document["groups"][1]
        assert (second["candidates"], second["kept"], second["advised_percent"]) == (0, 0, None)
        assert second["convolutions"] == [11, 14]

    def test_the_merge_is_as_asked_for(self, prune):
        flags = ("group", "--percent", "0.6", "--dry-run")
        kept = {merge: prune(*flags, "--merge", merge)["groups"][0]["kept"] for merge in MERGES}
        assert kept["union"] > kept["intersection"]
        assert kept["intersection"] <= kept["minimum"] <= kept["union"]
        assert prune(*flags)["groups"][0]["kept"] == kept["majority"]

    def test_the_groups_of_a_checkpoint_are_counted_when_it_is_read(self, prune):
        weights = str(Path(prune(*self.FLAGS, "--no-test")["run_dir"]) / "model.pt")
        with pytest.raises(InputError, match=r"--group-percent: 3 values, but .* has 2 groups"):
            group_prune.main(["--weights", weights, "--no-test", "--group-percent", "0.1", "0.1", "0.1"])
