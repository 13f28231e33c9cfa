"""Rewritten networks: equal where they must be, with the right references, and files that go with each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from tests.nets import PUBLIC_MODELS, one_head
from tests.pruning import randomised
from tests.random_nets import networks
from utils.checkpoint import LoadedModel, load_model, model_document, write_checkpoint
from utils.darknet import cfg, rewrite
from utils.darknet.blocks import Convolutional, Maxpool, ScaleChannels, Se, Upsample
from utils.darknet.targets import LINK
from utils.errors import InfeasibleError, InputError
from utils.flags import choose_model
from utils.pruning.surgery import arrays_of, difference, model_of

FOLDER = Path(__file__).parents[1] / "cfg"
CFGS = [*sorted(FOLDER.glob("*.cfg")), *(f"darknet_cfg/{name}.cfg" for name in ("yolov3-tiny-prn", "yolov3-voc"))]
CFGS += [f"data/weights/{name}.cfg" for name in PUBLIC_MODELS]
CONV = "[convolutional]\nbatch_normalize=1\nfilters=4\nsize=3\npad=1\nactivation=mish\n"
POINT = "[convolutional]\nfilters=5\nactivation=leaky\n"


@pytest.fixture(params=CFGS, ids=lambda path: Path(path).stem)
def narrow(request):
    """A network of cfg/ or ../shared with a small input, and a sixteenth of its widths if it has no groups."""
    path = request.param
    network = cfg.load(path if isinstance(path, Path) else request.getfixturevalue("shared") / path, lambda _: None)
    blocks = list(network.blocks)
    grouped = any(getattr(block, "groups", 1) > 1 for block in blocks if isinstance(block, Convolutional))
    for index, block in enumerate(blocks):
        if isinstance(block, Convolutional) and index + 1 not in network.heads and not grouped:
            blocks[index] = replace(block, filters=max(2, block.filters // 16))
    return replace(network, blocks=tuple(blocks), net=replace(network.net, width=64, height=64))


def heads(network, arrays, *hooks):
    """Heads for a random picture in float64, with a function in place of the modules of some kinds of blocks."""
    model = model_of(network, arrays).double()
    for kind, function in hooks:
        for block, layer in zip(network.blocks, model.layers, strict=True):
            if isinstance(block, kind) and getattr(block, "activation", "linear") == "linear":
                layer.register_forward_hook(lambda _, inputs, output, function=function: function(inputs))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, network.net.channels, network.net.height, network.net.width, generator=generator)
    with torch.no_grad():
        return model(images.double()).heads


def check(network, change, *hooks):
    """Rewrite a network, and compare it with itself, some modules replaced; returns it."""
    loaded = LoadedModel(randomised(network), None)
    graph = change(rewrite.graph_of(network))
    after = rewrite.carried(loaded, graph)
    assert cfg.parse(cfg.format_network(after.network), warn=lambda _: None).blocks == after.network.blocks
    gap = difference(heads(*after), heads(network, arrays_of(loaded.model), *hooks))
    assert gap < 1e-9, gap
    return after.network


GATES = ((Se, lambda inputs: inputs[0]), (ScaleChannels, lambda inputs: inputs[1]))
"""Modules without squeeze-and-excite."""


def test_every_network_is_laid_out_as_it_was_and_rewritten_right(narrow):
    assert rewrite.lay_out(narrow, rewrite.graph_of(narrow))[0] == narrow
    for block in check(narrow, rewrite.chain_pools).blocks:
        assert not isinstance(block, Maxpool) or block.stride_x > 1 or block.size <= LINK
    check(narrow, rewrite.late_upsampling)
    assert not {Se, ScaleChannels} & set(map(type, check(narrow, rewrite.drop_se, *GATES).blocks))


@settings(max_examples=30)
@given(networks())
def test_random_networks_are_laid_out_as_they_were_and_rewritten_right(network):
    assert rewrite.lay_out(network, rewrite.graph_of(network))[0] == network
    check(network, rewrite.late_upsampling)
    check(network, rewrite.drop_se, *GATES)


def spp(*sides, stride=1):
    """Pools of one map, each behind a route to it, and all of them concatenated."""
    pools = [f"[maxpool]\nsize={side}\nstride={stride}\n" for side in sides]
    behind = [f"[route]\nlayers=0\n{pool}" for pool in pools[1:]]
    layers = ",".join(str(1 + 2 * number) for number in range(len(sides)))
    return one_head(CONV, pools[0], *behind, f"[route]\nlayers={layers},0\n", CONV, CONV, "[shortcut]\nfrom=-2\n")


@pytest.mark.parametrize(
    ("sides", "chain"),
    [
        ((5, 9, 13), (5, 5, 5)),
        ((13, 9, 5), (5, 5, 5)),
        ((9,), (5, 5)),
        ((7,), (5, 3)),
        ((3, 11), (3, 5, 5)),
        ((5, 5, 7), (5, 3)),
        ((6, 9), (6, 5, 5)),
        ((5, 3), (5, 3)),
    ],
)
def test_pools_become_the_shortest_chain_and_stay_equal_to_the_bit(sides, chain):
    network = check(spp(*sides), rewrite.chain_pools)
    assert tuple(block.size for block in network.blocks if isinstance(block, Maxpool)) == chain
    assert check(network, rewrite.chain_pools) == network


def test_pools_of_different_halves_of_a_map_share_no_chain():
    half = "[route]\nlayers=0\ngroups=2\ngroup_id={}\n"
    pool = "[maxpool]\nsize=9\nstride=1\n"
    network = one_head(CONV, half.format(0), pool, half.format(1), pool, "[route]\nlayers=2,4\n", CONV)
    pools = [block for block in check(network, rewrite.chain_pools).blocks if isinstance(block, Maxpool)]
    assert [pool.size for pool in pools] == [5, 5, 5, 5]


def test_convolutions_come_before_the_upsampling_that_they_alone_read():
    network = one_head(CONV, "[upsample]\n", POINT, POINT, CONV, "[route]\nlayers=-2\n", "[upsample]\n", POINT, CONV)
    kinds = [type(block) for block in check(network, rewrite.late_upsampling).blocks]
    assert kinds[:5] == [Convolutional] * 3 + [Upsample, Convolutional]
    two_readers = one_head(CONV, "[upsample]\n", POINT, "[route]\nlayers=-2\n", CONV)
    three_by_three, head = one_head(CONV, "[upsample]\n", CONV), one_head(CONV, "[upsample]\n")
    for unchanged in (two_readers, three_by_three, head):
        assert check(unchanged, rewrite.late_upsampling) == unchanged


def test_activations_change_everywhere_but_in_heads():
    network = one_head(CONV, POINT, "[shortcut]\nfrom=-1\nactivation=leaky\n", "[convolutional]\n")
    graph = rewrite.swap_activation("leaky", "relu", rewrite.graph_of(network))
    graph = rewrite.swap_activation("linear", "mish", graph)
    changed = [getattr(block, "activation", None) for block, _ in graph.values()]
    assert changed == ["mish", "relu", "relu", "logistic", "linear", None]


@pytest.fixture
def source(tmp_path):
    """A cfg with an SPP, and .weights and .pt beside it; returns a function that runs the script."""
    network = spp(5, 9)
    path = tmp_path / "net.cfg"
    path.write_text(cfg.format_network(network))
    model = randomised(network, torch.float32)
    rewrite.write(LoadedModel(model, None), rewrite.graph_of(network), path, path.with_suffix(".weights"))
    write_checkpoint(path.with_suffix(".pt"), model_document(model.state_dict(), network, ["a"], ()))

    def call(*flags, output=tmp_path / "new.cfg"):
        rewrite.main([str(path), *flags, "-o", str(output)])
        return output

    return call


@pytest.mark.parametrize("suffix", [".weights", ".pt"])
def test_files_fit_each_other_and_the_next_command_trains_what_is_not_equal(source, tmp_path, capsys, suffix):
    weights = tmp_path / f"net{suffix}"
    out = source("--weights", str(weights), "--pools", "chained", "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["exact"] and document["difference"] < 1e-9 and document["next"].startswith("python test.py")
    made = choose_model(None if suffix == ".pt" else str(out), str(out.with_suffix(suffix)))
    before, after = load_model(choose_model(str(tmp_path / "net.cfg"), str(weights))), load_model(made)
    models = [(loaded.model.network, arrays_of(loaded.model)) for loaded in (before, after)]
    assert difference(heads(*models[0]), heads(*models[1])) < 1e-9
    if suffix == ".pt":
        assert after.names == ("a",)
        assert after.lineage()[0]["path"] == str(weights)
    out = source("--weights", str(weights), "--activation", "mish=leaky", output=tmp_path / "leaky.cfg")
    text = capsys.readouterr().out
    teacher = f"--t_cfg {tmp_path}/net.cfg --t_weights {weights} --KDstr 4"
    assert "\na rewrite that is not exact changes what the network computes: it must be trained again\n" in text
    assert text.strip().endswith(teacher)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to rewrite; give --activation"),
        (["--activation", "swish=relu6"], r"--activation swish=relu6: changes nothing in .*net\.cfg"),
        (["--upsample", "late"], "--upsample late: changes nothing"),
        (["--drop-se"], "--drop-se: changes nothing"),
        (["--activation", "mish"], "is not OLD=NEW, such as mish=leaky"),
        (["--activation", "mish=leaky", "leaky=mish"], "--activation: leaky is replaced and takes another one's place"),
        (["--activation", "mish=lkeay"], "did you mean leaky"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(source, tmp_path, flags, message):
    files = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        source(*flags)
    assert set(tmp_path.iterdir()) == files


def test_files_that_exist_or_have_another_suffix_are_refused(source, tmp_path):
    for name, message in (
        ("net.cfg", "net.cfg exists"),
        ("net.weights", "that ends in .cfg"),
        ("a/b.cfg", "in a folder"),
    ):
        with pytest.raises(InputError, match=message):
            source("--pools", "chained", output=tmp_path / name)
    (tmp_path / "new.weights").touch()
    with pytest.raises(InputError, match=r"new\.weights exists"):
        source("--pools", "chained", "--weights", str(tmp_path / "net.weights"))


def test_a_rewrite_that_is_not_exact_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setitem(rewrite.EXACT, "pools", lambda graph: rewrite.swap_activation("mish", "relu", graph))
    with pytest.raises(InfeasibleError, match="nothing is written"):
        source("--pools", "chained")
    assert not (tmp_path / "new.cfg").exists()
