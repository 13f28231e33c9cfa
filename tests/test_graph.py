"""The channel graph: labels, ties, pins, residual chains and the candidates of pruning."""

from __future__ import annotations

import numpy as np
import pytest

from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Convolutional
from utils.darknet.cfg import parse
from utils.darknet.network import trace
from utils.pruning.channel_graph import channel_graph
from utils.pruning.policy import candidates

YOLOV4_CHAINS = (
    (4, 6),
    (14, 16, 19),
    (27, 29, 32, 35, 38, 41, 44, 47, 50),
    (58, 60, 63, 66, 69, 72, 75, 78, 81),
    (89, 91, 94, 97, 100),
)
YOLOV3_CHAINS = (
    (1, 3),
    (5, 7, 10),
    (12, 14, 17, 20, 23, 26, 29, 32, 35),
    (37, 39, 42, 45, 48, 51, 54, 57, 60),
    (62, 64, 67, 70, 73),
)
HEAD = "[convolutional]\nfilters=21\nactivation=linear\n[yolo]\nmask=0,1,2\nnum=3\nanchors=9,9,18,18,36,36\nclasses=2\n"


def conv(filters: int, size: int = 1, **keys: int) -> str:
    more = "".join(f"{key}={value}\n" for key, value in keys.items())
    return f"[convolutional]\nbatch_normalize=1\nfilters={filters}\nsize={size}\npad=1\n{more}activation=leaky\n"


def graph_of(*sections: str):
    return channel_graph(parse("[net]\nwidth=64\nheight=64\n" + "".join(sections) + HEAD, "test.cfg"))


@pytest.mark.parametrize(
    ("name", "chains"), [("yolov4", YOLOV4_CHAINS), ("yolov3", YOLOV3_CHAINS), ("yolov4-tiny", ())]
)
def test_residual_chains_are_the_known_ones(root, name, chains):
    assert channel_graph(cfg_file.load(root / "cfg" / f"{name}.cfg")).chains() == chains


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("yolov4", [(76, 25920), (104, 32256), (23, 5312)]),
        ("yolov3", [(42, 13376), (70, 25920), (23, 10560)]),
        ("yolov3-spp", [(42, 13376), (70, 25920), (23, 10560)]),
        ("yolov3-tiny", [(10, 3056), (10, 3056), (0, 0)]),
        ("yolov4-tiny", [(15, 2528), (15, 2528), (0, 0)]),
    ],
)
def test_candidates_are_those_of_the_suites_before(root, name, counts):
    network = cfg_file.load(root / "cfg" / f"{name}.cfg")
    graph = channel_graph(network)
    found = [candidates(graph, prune) for prune in (0, 1, 2)]
    assert [(len(part), sum(network.blocks[i].filters for i in part)) for part in found] == counts
    every = candidates(graph, 1, all_convs=True)
    normalised = [i for i, b in enumerate(network.blocks) if isinstance(b, Convolutional) and b.batch_normalize]
    assert list(every) == normalised


def test_widths_of_everything_kept_are_the_shapes(root):
    for path in sorted((root / "cfg").glob("*.cfg")):
        network = cfg_file.load(path)
        graph = channel_graph(network)
        shapes = trace(network)
        assert graph.widths(np.ones(graph.count, np.bool_)) == tuple(shape.channels for shape in shapes), path


def test_depthwise_channels_are_their_producers():
    graph = graph_of(conv(8), conv(8, 3, groups=8), "[depthwise]\nsize=3\npad=1\nactivation=linear\n", conv(4))
    assert np.array_equal(graph.labels[0], graph.labels[1])
    assert np.array_equal(graph.labels[0], graph.labels[2])
    assert candidates(graph, 0) == (0, 3)


def test_a_shortcut_ties_the_channels_that_are_added():
    """Sources of 6 and 10 channels on a block of 8: the first 6 of one, the first 8 of the other."""
    graph = graph_of(conv(6), conv(10), conv(8), "[shortcut]\nfrom=-3,-2\nactivation=linear\n")
    narrow, wide, own = graph.labels[:3]
    assert np.array_equal(own[:6], narrow)
    assert np.array_equal(own, wide[:8])
    assert not set(wide[8:].tolist()) & set(own.tolist())
    assert graph.tied[own].all()
    assert not graph.tied[wide[8:]].any()
    assert graph.chains() == ((0, 1, 2),)
    assert candidates(graph, 0) == ()
    assert candidates(graph, 1) == (0, 1, 2)


def test_a_route_of_a_part_ties_the_parts_and_concatenation_ties_nothing():
    graph = graph_of(conv(8), "[route]\nlayers=-1\ngroups=2\ngroup_id=1\n", conv(4), "[route]\nlayers=-1,0\n")
    assert np.array_equal(graph.labels[0][:4], graph.labels[0][4:])
    assert np.array_equal(graph.labels[1], graph.labels[0][4:])
    assert np.array_equal(graph.labels[3], np.concatenate([graph.labels[2], graph.labels[0]]))
    keep = np.ones(graph.count, np.bool_)
    keep[graph.labels[0][1]] = False
    assert graph.widths(keep)[:4] == (6, 3, 4, 10)
    assert not graph.tied.any()
    assert candidates(graph, 0) == (2,)
    assert candidates(graph, 0, all_convs=True) == (0, 2)


def test_the_image_heads_grouped_convolutions_and_reorg_are_pinned():
    graph = graph_of(conv(8), conv(12, 3, groups=2), conv(4), "[reorg]\nstride=2\n", conv(6))
    assert graph.pinned[graph.image].all()
    assert [bool(graph.pinned[graph.labels[i]].all()) for i in range(6)] == [True, True, True, True, False, True]
    assert candidates(graph, 1) == (4,)
    assert any("groups" in line for line in graph.explain(0))


def test_squeeze_and_excite_goes_with_its_producer():
    graph = graph_of(conv(8), "[avgpool]\n", conv(2), conv(8), "[scale_channels]\nfrom=-4\n")
    assert np.array_equal(graph.labels[3], graph.labels[0])
    assert np.array_equal(graph.labels[4], graph.labels[0])
    assert not graph.tied.any()


def test_explain_names_tie_pin_and_readers():
    graph = graph_of(conv(8), conv(8), "[shortcut]\nfrom=-2\nactivation=linear\n")
    lines = list(graph.explain(1))
    assert lines[0].startswith("block 1 (test.cfg:")
    assert any("blocks 1 and 0, added by the shortcut, block 2" in line for line in lines)
    assert lines[-1] == "  read by: block 2"
    assert any("is the head, block 4" in line for line in graph.explain(3))
