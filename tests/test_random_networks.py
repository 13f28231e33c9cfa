"""The laws of the channel graph and of pruning (design.md), on random networks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning import assert_compact_equals_silenced, conv, graph_of, heads, model_of, removal_of
from tests.random_nets import networks
from utils.darknet import weights as weights_file
from utils.darknet.blocks import (
    ACTIVATIONS,
    SECTIONS,
    Convolutional,
    Dropout,
    Network,
    Route,
    Sam,
    ScaleChannels,
    Shortcut,
)
from utils.darknet.cfg import format_network, parse
from utils.darknet.network import file_bytes, tensors, trace
from utils.pruning.channel_graph import ChannelGraph, Removal, channel_graph, prune_blocks, residual_units
from utils.pruning.policy import MERGES, POWERS, ChannelPolicy, candidates
from utils.pruning.surgery import difference, fold_constants, prune_network, without_gamma

POLICIES = st.builds(
    ChannelPolicy,
    percent=st.sampled_from((0.1, 0.3, 0.5, 0.7, 0.9, 1.0)),
    prune=st.sampled_from((0, 1, 1)),
    merge=st.sampled_from(tuple(MERGES)),
    layer_keep=st.sampled_from((None, 0.0, 0.0, 0.3)),
    multiple_of=st.sampled_from((1, 1, 1, 2, 4, POWERS)),
    all_convs=st.booleans(),
)
SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.sampled_from((0, 1, 2, 9))
SIDE = 32


def random_arrays(network: Network, seed: int, dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Tensors whose channels all matter and whose constants are not small (γ in 0..1, β and μ normal)."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for spec in tensors(network):
        if spec.name in ("bn.weight", "bn.running_var"):
            array = rng.random(spec.shape) + 0.5 * (spec.name == "bn.running_var")
        else:
            array = rng.standard_normal(spec.shape)
        if len(spec.shape) > 1 and spec.name != "weights":
            array /= np.prod(spec.shape[1:]) ** 0.5
        arrays[spec.key] = array.astype(dtype)
    return arrays


def folded_heads(graph: ChannelGraph, arrays, removal: Removal) -> list:
    """Heads of the pruned network with the constants folded."""
    return heads(model_of(*prune_network(graph, fold_constants(graph, arrays, removal), removal)), SIDE)


def features(network: Network) -> set[str]:
    """What a network has, in words."""
    shapes, units = trace(network), residual_units(network)
    found = {type(block).__name__ for block in network.blocks} | {f"{len(network.heads)} heads"}
    for i, block in enumerate(network.blocks):
        found.add(getattr(block, "activation", "linear"))
        match block:
            case Convolutional():
                deep = block.depthwise(shapes[i - 1].channels if i else network.net.channels)
                found.add("depthwise" if deep else "grouped" if block.groups > 1 else "plain")
                found.add("normalised" if block.batch_normalize else "bias" if block.bias else "neither")
            case Shortcut():
                found |= {f"{min(2, len(block.sources))} sources", block.weights_type, block.weights_normalization}
                gaps = np.sign([shapes[source].channels - shapes[i].channels for source in block.sources])
                found |= {("equal", "wider", "narrower")[gap] for gap in gaps}
            case Route() if block.groups > 1:
                found.add(f"split of {min(2, len(block.layers))}")
    found |= {f"{min(2, len(units))} units", f"{min(2, len(channel_graph(network).chains()))} chains"}
    found |= {"nested" for one in units for two in units if one != two and one.shortcut in two.blocks}
    found |= {"in a row" for one in units for two in units if one.shortcut == two.source}
    return found | {"depthwise unit" for unit in units if network.blocks[unit.last].groups > 1}


@pytest.mark.parametrize("exact", [False, True])
def test_the_networks_have_every_block_and_every_case(exact):
    """Otherwise the laws below would hold of nothing."""
    seen: set[str] = set()

    @settings(max_examples=400)
    @given(networks(exact))
    def look(network):
        seen.update(features(network))

    look()
    wanted = {*ACTIVATIONS, "depthwise", "plain", "grouped", "normalised", "bias", "1 heads", "2 heads"}
    wanted |= {f"{count} {kind}" for count in range(3) for kind in ("units", "chains")}
    wanted |= {"nested", "in a row", "depthwise unit", "equal", "wider", "narrower", "1 sources", "2 sources"}
    wanted |= {"split of 1", "split of 2"}
    if not exact:
        wanted |= {kind.__name__ for kind in SECTIONS.values()} - {"Depthwise", "RouteLhalf"}
        wanted |= {"neither", "per_channel", "per_feature", "softmax"}
    assert sorted(wanted - seen) == []


@settings(max_examples=200)
@given(networks())
def test_text_and_back(network):
    assert parse(format_network(network), warn=lambda text: None) == network


@settings(max_examples=600)
@given(networks(), st.booleans())
def test_candidates_are_free_and_sets_lie_within_each_other(network, all_convs):
    """No candidate has a pinned label, none of set 0 a tied one; set 0 lies in set 1; of layers that share a label, all
    but gates are candidates, or none."""
    graph = channel_graph(network)
    sets = [candidates(graph, prune, all_convs) for prune in (0, 1, 2)]
    for i in sets[0] + sets[1]:
        assert network.blocks[i].batch_normalize
        assert not graph.pinned[graph.labels[i]].any()
    assert not any(graph.tied[graph.labels[i]].any() for i in sets[0])
    assert set(sets[0]) <= set(sets[1]) <= set(candidates(graph, 1, all_convs=True))
    assert {unit.last for unit in residual_units(network)} <= set(sets[2])
    chains = graph.chains()
    assert [len(chain) for chain in chains] == [len(set(chain)) for chain in chains]
    assert len({i for chain in chains for i in chain}) == sum(map(len, chains))
    gates = [i for i, block in enumerate(network.blocks) if isinstance(block, ScaleChannels | Sam)]
    before = {i - 1 - isinstance(network.blocks[i - 1], Dropout) for i in gates}
    for some in sets[:2]:
        for family in graph.families():
            assert set(family) <= {*some, *before} or not set(family) & set(some)


@settings(max_examples=200)
@given(networks())
def test_every_block_can_be_explained(network):
    graph = channel_graph(network)
    for i in range(len(network.blocks)):
        lines = list(graph.explain(i))
        assert lines[0].startswith(f"block {i} (random.cfg:")
        assert lines[-1].startswith("  read by: ")
        assert graph.pinned[graph.labels[i]].any() == any(line.startswith("  stays: ") for line in lines)
        if graph.tied[graph.labels[i]].any():
            assert any("added by the shortcut" in line for line in lines)


@settings(max_examples=600)
@given(networks(), POLICIES, COUNTS, SEEDS)
def test_compact_equals_silenced_and_absorbed_equals_keep_size(network, policy, units, seed):
    """Widths commute; at every pixel, in float64, with and without the constants; whatever goes."""
    graph, arrays = channel_graph(network), random_arrays(network, seed)
    removal = removal_of(graph, arrays, policy, units)
    assert prune_network(graph, arrays, removal).network == prune_blocks(graph, removal)
    assert_compact_equals_silenced(graph, arrays, removal, SIDE)


@settings(max_examples=200)
@given(networks(), SEEDS)
def test_everything_kept_is_the_same_bit_for_bit(network, seed):
    graph, arrays = channel_graph(network), random_arrays(network, seed)
    removal = Removal(np.ones(graph.count, np.bool_))
    taken = fold_constants(graph, arrays, removal)
    assert taken.keys() == arrays.keys()
    narrow, sliced = prune_network(graph, taken, removal)
    assert narrow == network
    assert all(np.array_equal(sliced[name], arrays[name]) for name in arrays)


@settings(max_examples=300)
@given(networks(exact=True), POLICIES, COUNTS, SEEDS)
def test_constants_are_taken_up_exactly_where_nothing_is_padded(network, policy, units, seed):
    """γ = 0 in what goes: the network says the same without it."""
    graph, arrays = channel_graph(network), random_arrays(network, seed)
    removal = removal_of(graph, arrays, policy, units)
    constant = without_gamma(graph, arrays, removal)
    constant |= {(name := f"layers.{unit.last}.bn.weight"): 0 * arrays[name] for unit in removal.units}
    want = heads(model_of(network, constant), SIDE)
    got = folded_heads(graph, arrays, removal)
    assert difference(got, want) < 1e-9


@pytest.mark.parametrize(
    "section",
    [
        *(
            f"[shortcut]\nfrom=-2,-3\nweights_type={kind}\nweights_normalization={normalization}\nactivation=linear\n"
            for kind in ("per_feature", "per_channel")
            for normalization in ("none", "relu", "softmax")
        ),
        "[route]\nlayers=-1\ngroups=2\ngroup_id=0\n",
        "[route]\nlayers=-1\ngroups=2\ngroup_id=1\n",
        "[shortcut]\nfrom=-2\nactivation=leaky\n",
    ],
)
def test_constants_are_taken_up_exactly_through_sums_halves_and_activations(section):
    graph = graph_of(conv(8), conv(6), conv(8), section, conv(4))
    arrays, keep = random_arrays(graph.network, 1), np.ones(graph.count, np.bool_)
    keep[graph.labels[2][[1, 5]]] = keep[graph.labels[0][[1, 5, 7]]] = False
    removal = Removal(keep)
    want = heads(model_of(graph.network, without_gamma(graph, arrays, removal)), SIDE)
    assert difference(folded_heads(graph, arrays, removal), want) < 1e-9
    assert difference(heads(model_of(*prune_network(graph, arrays, removal)), SIDE), want) > 1e-3


@settings(max_examples=200)
@given(networks(), POLICIES, COUNTS, SEEDS)
def test_a_pruned_network_is_written_read_and_pruned_again(tmp_path_factory, network, policy, units, seed):
    folder = tmp_path_factory.getbasetemp()
    graph, arrays = channel_graph(network), random_arrays(network, seed, np.float32)
    removal = removal_of(graph, arrays, policy, units)
    narrow, sliced = prune_network(graph, fold_constants(graph, arrays, removal), removal)
    narrow = parse(format_network(narrow), "pruned.cfg", warn=lambda text: None)
    assert narrow == prune_blocks(graph, removal)
    weights_file.write(folder / "one.weights", narrow, sliced)
    again = weights_file.read(folder / "one.weights", narrow)
    assert (folder / "one.weights").stat().st_size == file_bytes(narrow)
    weights_file.write(folder / "two.weights", narrow, again)
    assert (folder / "one.weights").read_bytes() == (folder / "two.weights").read_bytes()
    graph = channel_graph(narrow)
    removal = removal_of(graph, again, policy, units)
    assert_compact_equals_silenced(graph, again, removal, SIDE)
