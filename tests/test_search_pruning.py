"""Random networks at a budget, of which the best is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import search as benchmark
from benchmarks.compare import Measured
from models import fuse
from tests.nets import tiny
from tests.random_nets import networks
from tests.test_percent_sweep import emptied, random_gammas
from tests.test_random_networks import examples
from tests.test_targets import POLICIES, measured, prune  # noqa: F401 - fixtures
from utils.darknet import cfg as cfg_file
from utils.detection.bootstrap import Matches, matches
from utils.errors import InfeasibleError, InputError
from utils.graph import channel_graph
from utils.pruning import measure
from utils.pruning.removal import Removal
from utils.pruning.search import LARGEST_SHARE, TOLERANCE, Drawer, candidate_table
from utils.pruning.surgery import compact_network
from utils.pruning.target import Target
from utils.report.cost import network_cost


def drawer(graph, name: str = "slim", seed: int = 1) -> Drawer:
    size = (graph.network.net.height, graph.network.net.width)
    return Drawer(graph, random_gammas(graph, seed), POLICIES[name], size)


@pytest.mark.parametrize("bound", [0.3, 0.6, 0.9])
def test_every_candidate_has_the_budget_and_is_another_one(root, bound):
    graph = channel_graph(cfg_file.load(root / "cfg" / "demo.cfg"))
    found = list(drawer(graph).draw(4, Target("macs", bound), 0))
    assert len(found) == 4 == len({one.keep.tobytes() for one in found})
    before = network_cost(graph.network)
    for one in found:
        cost = network_cost(compact_network(graph, Removal(one.keep)))
        assert (1 - TOLERANCE) * bound <= one.macs == cost.macs / before.macs <= bound
        assert one.parameters == cost.parameters / before.parameters
        assert all(0 <= share <= LARGEST_SHARE for share in one.shares.values()) and not emptied(graph, one.keep)
        assert len(set(one.shares.values())) > 1


def test_the_same_seed_draws_the_same(root):
    graph = channel_graph(cfg_file.load(root / "cfg" / "demo.cfg"))
    target = Target("macs", 0.5)
    first, again, other = ([one.keep for one in drawer(graph).draw(2, target, seed)] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@examples(8)
@given(network=networks(), seed=st.integers(0, 9), name=st.sampled_from(["slim", "normal", "regular", "group"]))
def test_in_any_network_candidates_keep_the_budget_or_are_refused(network, seed, name):
    graph = channel_graph(network)
    try:
        found = list(drawer(graph, name, seed).draw(2, Target("macs", 0.6), seed))
    except InfeasibleError as refused:
        assert any(words in str(refused) for words in ("smallest that works", "came no nearer", "no convolution"))
        return
    assert found and all((1 - TOLERANCE) * 0.6 <= one.macs <= 0.6 and not emptied(graph, one.keep) for one in found)


def test_a_budget_that_no_share_reaches_is_refused():
    with pytest.raises(
        InfeasibleError, match=r"--target-macs 0\.01: is out of reach; the smallest that works is 0\.\d{4}$"
    ):
        list(drawer(channel_graph(tiny())).draw(1, Target("macs", 0.01), 0))


def test_the_table_has_the_share_of_every_family():
    found = list(drawer(channel_graph(tiny())).draw(2, Target("macs", 0.6), 0))
    rows = list(csv.DictReader(candidate_table(found, [0.25, 0.5]).splitlines()))
    assert [row["map50"] for row in rows] == ["0.25", "0.5"]
    for row, one in zip(rows, found, strict=True):
        shares = {" ".join(map(str, family)): share for family, share in one.shares.items()}
        assert {name: float(row[name]) for name in shares} == pytest.approx(shares, abs=1e-4)


@pytest.mark.parametrize("name", ["slim", "group"])
def test_the_best_candidate_is_written_as_it_was_scored(prune, folder, monkeypatch, name):  # noqa: F811
    """Scores are drawn from the weights, so that a network that is not the scored one has another."""

    def accuracy(self, title, model):
        value = float(sum(parameter.double().abs().sum() for parameter in model.parameters())) % 1
        return measure.Accuracy(value, value), [(np.zeros((3, 64, 64), np.uint8), np.zeros((0, 6)))]

    monkeypatch.setattr(measure.Bench, "accuracy", accuracy)
    flags = ("--target-macs", "0.6", "--search", "5", "--batch-size", "4", "--data", str(folder / "d.data"))
    document = prune(name, *flags)
    run, target = Path(document["run_dir"]), document["target"]
    rows = list(csv.DictReader((run / "candidates.csv").read_text().splitlines()))
    scores = [float(row["map50"]) for row in rows]
    best = int(np.argmax(scores))
    assert len(rows) == 5 and target["search"]["best"] == best + 1 and max(scores) > min(scores)
    assert document["after"]["map50"] == pytest.approx(target["search"]["map50"], abs=1e-9)
    assert target["search"]["map50"] == pytest.approx(scores[best], abs=1e-5)
    assert document["after"]["macs"] / document["before"]["macs"] == target["reached"] <= 0.6
    assert document["recalibrated"] == 2 and document["absorbed"] is None  # nine pictures make two batches
    plan = json.loads((run / "plan.json").read_text())
    assert plan["channels"]["removed"] > 0 and plan["target"] == target and plan["percent"] is None
    assert not (run / "importance.png").exists()
    assert f"candidate {best + 1} of 5, drawn at random" in (run / "report.md").read_text()
    again = prune(name, *flags)
    assert Path(again["weights"]).read_bytes() == Path(document["weights"]).read_bytes()


@pytest.mark.parametrize(
    ("name", "flags", "match"),
    [
        ("slim", ["--search", "5", "--percent", "0.5"], "--search: needs --target-macs"),
        ("slim", ["--search", "5", "--target-params", "0.5"], "--search: needs --target-macs"),
        ("slim", ["--search", "5", "--target-macs", "0.5"], "--search: needs --data"),
        ("slim", ["--search", "0", "--target-macs", "0.5"], "--search: 0 is below 1"),
        ("normal", ["--search", "5", "--target-macs", "0.5"], "unknown flag --search"),
        ("layer_channel", ["--search", "5", "--target-macs", "0.5"], "unknown flag --search"),
    ],
)
def test_bad_flags_are_one_line(prune, tmp_path, name, flags, match):  # noqa: F811
    with pytest.raises(InputError, match=match):
        prune(name, *flags)
    assert not (tmp_path / "runs").exists()


def test_a_search_measures_so_it_is_no_dry_run(prune, measured, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="--search: has to measure; leave out --dry-run"):
        prune("slim", "--search", "5", "--target-macs", "0.5", "--dry-run", *measured)
    assert not (tmp_path / "runs").exists()


def finder(rng: np.random.Generator, images: int = 60, share: float = 0.5) -> Matches:
    """Matches of a network that finds this share of the objects, of which every image has one, and nothing else."""
    truth = [np.array([[0.0, 10, 10, 30, 30]])] * images
    found = [np.column_stack([row, [[rng.random()]]])[: rng.random() < share] for row in truth]
    return matches(found, truth)


def test_held_out_pictures_flatter_no_choice():
    """Ten candidates as good as the ranking: the best is better only on the pictures that it was chosen by."""
    rng, flattered, fair = np.random.default_rng(0), [], []
    for seed in range(20):
        ranking, *candidates = (finder(rng) for _ in range(11))
        recall = [np.mean([len(hits[0]) / 60 for hits in one.hits]) for one in (ranking, *candidates)]
        flattered.append(max(recall[1:]) - recall[0])
        fair.append(benchmark.held_out(candidates, ranking, 6, seed).mean())
    assert np.mean(flattered) > 0.06
    assert abs(np.mean(fair)) < 0.04
    assert not benchmark.held_out([ranking] * 3, ranking, 5, 0).any()
    assert benchmark.held_out([ranking, finder(rng, share=1.0)], ranking, 10, 0).mean() > 0.3


@pytest.mark.slow
def test_the_benchmark_finds_what_the_scripts_find(prune, folder, files, monkeypatch, capsys):  # noqa: F811
    """Scores are drawn from the weights, as above."""

    def score(model) -> float:
        return float(sum(parameter.double().abs().sum() for parameter in model.parameters())) % 1

    def accuracy(self, title, model):
        return measure.Accuracy(score(model), 0.0), [(np.zeros((3, 64, 64), np.uint8), np.zeros((0, 6)))]

    def measured_by_weights(name, model, size, **_):
        value, found = score(fuse(model)), finder(np.random.default_rng(0))
        return Measured(name, size, SimpleNamespace(map50=value, map50_95=0.0), network_cost(model.network), found)

    monkeypatch.setattr(measure.Bench, "accuracy", accuracy)
    monkeypatch.setattr(benchmark, "measure", measured_by_weights)
    flags = ["--target-macs", "0.6", "--batch-size", "4", "--data", str(folder / "d.data")]
    written = {
        "search, statistics anew": prune("slim", *flags, "--search", "4"),
        "ranking, statistics anew": prune("slim", *flags, "--recalibrate", "10"),
        "ranking, constants absorbed": prune("slim", *flags),
    }
    capsys.readouterr()
    benchmark.main([*files, *flags, "--search", "4", "--device", "cpu", "--draws", "10", "--halves", "4"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    for name, document in written.items():
        assert rows[name][0] == f"{document['after']['map50']:.3f}"
        assert rows[name][4].replace(" ", "") == str(document["after"]["parameters"])
    assert rows["before pruning"][4].replace(" ", "") == str(document["before"]["parameters"])
    assert rows["constants absorbed"][2] == rows["search, constants absorbed"][0]
