"""What layers and groups are worth, and the percentages of groups that follow from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.random_nets import networks
from tests.test_percent_sweep import emptied, random_gammas
from tests.test_random_networks import examples
from tests.test_targets import POLICIES, measured, prune  # noqa: F401 - fixtures
from utils.darknet import cfg as cfg_file
from utils.data.index import index
from utils.errors import InfeasibleError, InputError
from utils.graph import channel_graph
from utils.pruning import measure
from utils.pruning.allocation import allocate
from utils.pruning.candidates import candidates
from utils.pruning.plan import make_plan
from utils.pruning.policy import ChannelPolicy, channel_scores, choose, families_of
from utils.pruning.request import Amount
from utils.pruning.sensitivity import SHARES, curve_table, group_parts, layer_parts, measure_part
from utils.pruning.shares import keep_shares, weakest
from utils.pruning.target import Target
from utils.report.sensitivity_plots import plot_sensitivity

GRID = (0.1, 0.5, 0.9)


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


CHAIN = "[net]\nwidth=32\nheight=32\nchannels=3\n" + 2 * (
    "[convolutional]\nbatch_normalize=1\nfilters=3\nsize=3\npad=1\nactivation=leaky\n"
) + ("[shortcut]\nfrom=-2\nactivation=linear\n"
     "[convolutional]\nfilters=18\nsize=1\nactivation=linear\n"
     "[yolo]\nmask=0,1,2\nanchors=1,2,3,4,5,6\nclasses=1\nnum=3\n")  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_a_group_loses_what_choose_takes_from_it_alone(root, name):
    graph = channel_graph(cfg_file.load(root / "cfg" / "demo.cfg"))
    gammas = random_gammas(graph, 2)
    parts = list(group_parts(graph, gammas, POLICIES[name]))
    covered = sorted(layer for part in parts for layer in part.layers)
    assert covered == list(candidates(graph, POLICIES[name].prune))
    for part in parts:
        own = np.concatenate([graph.labels[layer] for layer in part.layers])
        assert all(keep[np.setdiff1d(np.arange(graph.count), own)].all() for keep in part.keeps)
        removed = [int((~keep).sum()) for keep in part.keeps]
        assert removed == sorted(removed) and (name == "regular" or removed[-1] > 0)
    if name == "group":
        row = (*(0.0,) * (parts[-1].number - 1), SHARES[1])
        alone = choose(
            graph, gammas, ChannelPolicy(0, merge="majority", layer_keep=0.01, groups=True, group_percents=row)
        )
        assert np.array_equal(alone.keep, parts[-1].keeps[1])


def test_the_same_channels_are_measured_once():
    """In three channels 0.1 and 0.3 of them are none, which costs nothing; 0.7 and 0.9 are two."""
    graph, calls = channel_graph(cfg_file.parse(CHAIN)), []

    def drop(name, removal):
        calls.append(name)
        return float((~removal.keep).sum())

    (part,) = layer_parts(graph, random_gammas(graph, 0), ChannelPolicy(0))
    curve = measure_part(graph, part, drop, (32, 32))
    assert (curve.removed, curve.drops) == ((0, 0, 1, 2, 2), (0, 0, 1, 2, 2))
    assert calls == ["layer 0 and 1 tied, 0.5", "layer 0 and 1 tied, 0.7"]
    assert curve.parameters[0] == curve.macs[0] == 1 > curve.macs[2] > curve.macs[3] == curve.macs[4]
    rows = list(csv.DictReader(curve_table([curve], 0.5).splitlines()))
    assert [row["kind"] for row in rows] == ["network"] + 5 * ["layer"]
    assert [float(row["map50"]) for row in rows] == pytest.approx([0.5, 0.5, 0.5, 0.49, 0.48, 0.48])


def linear(*weights: float):
    """What is left if each group has such a share of all."""
    return lambda percents: 1 - sum(weight * percent for weight, percent in zip(weights, percents, strict=True))


def test_the_cheapest_group_loses_most():
    """Of two groups of equal size one costs ten times more. 0.9 of the cheap one leaves 0.55; 0.1 of the other, 0.5."""
    found = allocate(GRID, [(10, 50, 90), (1, 5, 9)], linear(0.5, 0.5), Target("macs", 0.5))
    assert found.percents == (0.1, 0.9) and found.left == pytest.approx(0.5)
    assert found.drop == pytest.approx(19)


def test_the_last_group_is_fitted_to_the_target():
    """0.9 of the first would leave 0.1; 0.3 are enough for 0.7."""
    found = allocate(GRID, [(0, 0, 0), (1, 1, 1)], linear(1, 0.01), Target("macs", 0.7))
    assert found.percents == (0.3, 0.0) and found.left == pytest.approx(0.7) and found.drop == 0


def test_a_cliff_is_jumped_over_if_it_pays():
    """The first tenth costs 5 and nothing more after it: that is cheaper a share than the other group's 1 a tenth."""
    found = allocate(GRID, [(5, 5, 5), (1, 5, 9)], linear(0.5, 0.5), Target("params", 0.6))
    assert found.percents == (0.8, 0.0)


@given(
    drops=st.lists(st.lists(st.floats(-5, 50), min_size=3, max_size=3), min_size=1, max_size=4),
    bound=st.floats(0.15, 0.99),
)
def test_an_allocation_keeps_the_bound_and_barely(drops, bound):
    count = len(drops)
    left = linear(*(1 / count for _ in drops))
    found = allocate(GRID, drops, left, Target("macs", bound))
    assert all(0 <= percent <= 0.9 for percent in found.percents)
    assert left(found.percents) == found.left <= bound < found.left + 1.001e-3 / count + 1e-9
    assert found.drop >= 0


def test_what_no_share_reaches_is_refused():
    with pytest.raises(InfeasibleError, match=r"--target-macs 0\.05: .* works is 0\.1000$"):
        allocate(GRID, [(1, 2, 3)], linear(1), Target("macs", 0.05))


@pytest.mark.parametrize("name", ["slim", "normal", "regular", "group"])
def test_a_sensitivity_run_has_every_part_and_writes_no_network(prune, measured, name):  # noqa: F811
    document = prune(name, "--sensitivity", *measured)
    run = Path(document["run_dir"])
    assert {path.name for path in run.iterdir()} == {"args.yaml", "env.json", "sensitivity.csv", "sensitivity.png"}
    assert document["pictures"] == 3 and document["shares"] == list(SHARES)
    rows = list(csv.DictReader((run / "sensitivity.csv").read_text().splitlines()))
    parts = [*document["groups"], *document["layers"]]
    assert parts and len(rows) == 1 + len(SHARES) * len(parts)
    for part in parts:  # here AP50 is the share of the parameters that is left, after folding of normalisations
        gone = [1 - left for left in part["parameters"]]
        assert [drop / 100 for drop in part["drop"]] == pytest.approx(gone, rel=0.03)
    image = cv2.imread(str(run / "sensitivity.png"))
    assert image.std() > 1


def test_sensitivity_looks_at_the_first_pictures(prune, folder, monkeypatch):  # noqa: F811
    seen = []

    def accuracy(self, name, model):
        seen.append([path.name for path in self.loader.dataset.index.images])
        return measure.Accuracy(0.5, 0.5), []

    monkeypatch.setattr(measure.Bench, "accuracy", accuracy)
    first = [path.name for path in index(folder / "val.txt", ("a", "b")).images][:2]
    document = prune("slim", "--sensitivity", "--sensitivity-pictures", "2", "--data", str(folder / "d.data"))
    assert document["pictures"] == 2 and all(names == first for names in seen)


def test_percentages_of_groups_are_found_by_themselves(prune, measured):  # noqa: F811
    document = prune("group", "--group-percent", "auto", "--target-macs", "0.7", *measured)
    target, run = document["target"], Path(document["run_dir"])
    assert document["after"]["macs"] / document["before"]["macs"] == target["reached"] <= 0.7
    assert [group["percent"] for group in document["groups"]] == target["group_percents"]
    assert json.loads((run / "plan.json").read_text())["policy"]["group_percents"] == target["group_percents"]
    assert "points of AP50 predicted to go, by --group-percent" in (run / "report.md").read_text()
    assert (run / "sensitivity.csv").read_text().count("group,") == len(SHARES)  # one of its groups has candidates
    percents = map(str, target["group_percents"])
    again = prune("group", "--group-percent", *percents, "--dry-run")
    assert again["after"]["macs"] == document["after"]["macs"]


def test_all_groups_of_a_network_can_be_raised(root):
    graph = channel_graph(cfg_file.load(root / "cfg" / "demo.cfg"))
    gammas = random_gammas(graph, 1)
    percents = [0.1, 0.3, 0.5]
    policy = ChannelPolicy(0, merge="majority", layer_keep=0.01, groups=True, group_percents=tuple(percents))
    assert [part.percent for part in make_plan(graph, gammas, policy, Amount(None, None)).choice.parts] == percents


@pytest.mark.parametrize(("groups", "layers"), [(0, 0), (1, 1), (5, 200)])
def test_the_picture_is_drawn_for_any_number_of_parts(tmp_path, groups, layers):
    drops = (0.0, 1.0, -2.0, 3.0, 50.0)
    plot_sensitivity(SHARES, {f"g{n}": drops for n in range(groups)}, {f"{n}": drops for n in range(layers)}, 0.5,
                     tmp_path / "s.png")  # fmt: skip
    assert cv2.imread(str(tmp_path / "s.png")).std() > 1


@pytest.mark.parametrize(
    ("name", "flags", "match"),
    [
        ("slim", ["--sensitivity"], "--sensitivity: needs --data"),
        ("slim", ["--sensitivity", "--percent", "0.5"], "not allowed with argument --"),
        ("group", ["--sensitivity", "--group-percent", "0.5", "0.5"], "takes the place of --sensitivity"),
        ("layer", ["--sensitivity"], "unknown flag --sensitivity"),
        ("group", ["--group-percent", "auto", "0.5", "--target-macs", "0.5"], "auto stands for all of them"),
        ("group", ["--group-percent", "auto", "--percent", "0.5"], "takes the place of --percent"),
        ("group", ["--group-percent", "auto", "--target-macs", "0.5"], "--group-percent auto: needs --data"),
        ("group", ["--group-percent", "half"], "--group-percent: 'half' is not a number"),
    ],
)
def test_bad_flags_are_one_line(prune, tmp_path, name, flags, match):  # noqa: F811
    with pytest.raises(InputError, match=match):
        prune(name, *flags)
    assert not (tmp_path / "runs").exists()


def test_auto_needs_a_target_that_can_be_counted(prune, measured, tmp_path):  # noqa: F811
    for flags in ([], ["--max-drop", "5"]):
        with pytest.raises(InputError, match=r"--group-percent auto: needs --target-macs or --target-params"):
            prune("group", "--group-percent", "auto", *flags, *measured)
    assert not (tmp_path / "runs").exists()
