"""Pruning: the graph of channels, the choice among them, the surgery, and the constants of what was removed."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from models import Darknet
from tests import nets
from tests.nets import PUBLIC_MODELS, one_head
from tests.pruning import (
    GATE,
    SHORTCUT,
    assert_compact_equals_silenced,
    conv,
    graph_of,
    heads,
    model_of,
    policy,
    randomised,
    removal_of,
    varied_arrays,
)
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Convolutional
from utils.darknet.network import max_stride
from utils.errors import InfeasibleError, NumericsError
from utils.pruning.channel_graph import Removal, channel_graph, choose_units, residual_units
from utils.pruning.policy import POWERS, ChannelPolicy, candidates, choose
from utils.pruning.surgery import Certificate, arrays_of, certify, fold_constants, gammas_of, prune_network

PERCENTS = {"normal": 0.3, "shortcut": 0.3, **dict.fromkeys(("regular", "slim", "layer_channel", "group"), 0.5)}
"""What each script that prunes channels removes here."""
CASES = {name: (policy(name, PERCENTS.get(name)), 2 * name.startswith("layer")) for name in (*PERCENTS, "layer")}
CASES["all"] = (ChannelPolicy(0.5, layer_keep=0.1, multiple_of=8, all_convs=True), 1)
"""Policies and numbers of residual units: of the scripts, and all that the graph allows."""
LARGE = ("yolov3", "yolov3-spp", "yolov3-voc", "yolov4", "yolov4-csp", "yolov4-leaky", "yolov4-leaky-spp557")
FOLDERS = {
    "cfg": ("demo", "yolov3-tiny", "yolov4-tiny", "yolo-fastest", "mobilenetv2-yolov3", *LARGE[:2], *LARGE[3:]),
    "shared/darknet_cfg": ("yolov3-tiny", "yolov3-tiny-prn", "yolov4-tiny", *LARGE[:4]),
    "shared/data/weights": PUBLIC_MODELS,
}
NETWORKS = tuple(
    pytest.param(f"{folder}/{name}.cfg", marks=pytest.mark.slow if name in LARGE else ())
    for folder, names in FOLDERS.items()
    for name in names
)


@pytest.mark.parametrize("strategy", CASES)
@pytest.mark.parametrize("name", NETWORKS)
def test_compact_equals_silenced_and_absorbed_equals_keep_size(root, request, name, strategy):
    """At every pixel, in float64; and the widths are those of the kept labels."""
    folder, _, rest = name.partition("/")
    path = request.getfixturevalue("shared") / rest if folder == "shared" else root / name
    network = cfg_file.load(path, warn=lambda text: None)
    graph = channel_graph(network)
    arrays = arrays_of(randomised(network))
    removal = removal_of(graph, arrays, *CASES[strategy])
    if strategy == "layer" and not residual_units(network):
        assert removal.keep.all()
        return
    assert not removal.keep.all() or removal.units
    assert_compact_equals_silenced(graph, arrays, removal, 2 * max_stride(network))


def test_the_border_of_3x3_is_all_that_absorption_gets_wrong():
    graph = graph_of(conv(8), conv(6, 3))
    arrays = arrays_of(randomised(graph.network))
    keep = np.ones(graph.count, np.bool_)
    keep[graph.labels[0][:3]] = False
    arrays["layers.0.bn.weight"] = np.where(keep[graph.labels[0]], arrays["layers.0.bn.weight"], 0)
    (constant,) = heads(model_of(graph.network, arrays), 64)
    folded = fold_constants(graph, arrays, Removal(keep))
    (pruned,) = heads(model_of(*prune_network(graph, folded, Removal(keep))), 64)
    gap = (constant - pruned).abs()
    assert float(gap[..., 1:-1, 1:-1].max()) < 1e-12
    assert float(gap.max()) > 1e-3


class TestChoice:
    """Ranks, floors, chains and widths, on γ that are given."""

    graph = graph_of(conv(4), conv(4), SHORTCUT, conv(4))
    gammas: ClassVar = {
        0: np.array([0.1, 0.9, 0.2, 0.8]),
        1: np.array([0.7, 0.05, 0.15, -0.6]),
        3: np.array([0.3, 0.01, 0.02, 0.03]),
    }

    def kept(self, policy: ChannelPolicy) -> list[list[int]]:
        keep = choose(self.graph, self.gammas, policy).keep
        return [np.flatnonzero(keep[self.graph.labels[i]]).tolist() for i in (0, 1, 3)]

    def test_the_weakest_go_whatever_their_sign(self):
        assert self.kept(ChannelPolicy(0.5, prune=0)) == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 3]]

    def test_a_floor_keeps_the_strongest(self):
        assert self.kept(ChannelPolicy(0.99, layer_keep=0.5)) == [[0, 1, 3], [0, 1, 3], [0, 3]]

    @pytest.mark.parametrize(("multiple", "width"), [(1, 1), (2, 2), (3, 3), (4, 4), (8, 4), (POWERS, 1)])
    def test_widths_are_rounded_up_but_not_beyond_what_there_is(self, multiple, width):
        policy = ChannelPolicy(0.9, prune=0, layer_keep=0.01, multiple_of=multiple)
        assert len(self.kept(policy)[2]) == width

    def test_a_depthwise_convolution_votes_with_its_producer(self):
        graph = graph_of(conv(4), conv(4, 3, groups=4), conv(4))
        gammas = {0: np.array([1, 0.2, 0.9, 0.8]), 1: np.array([0.1, 0.8, 0.9, 0.8]), 2: np.full(4, 2.0)}
        keep = choose(graph, gammas, ChannelPolicy(0.25, prune=0)).keep
        assert keep[graph.labels[0]].tolist() == [False, False, True, True]


def float32(graph) -> dict[str, np.ndarray]:
    """Tensors of a network whose channels all matter."""
    return arrays_of(randomised(graph.network, torch.float32))


def weakest(graph, arrays, percent: float = 0.3) -> Removal:
    """By γ, of every layer at most nine in ten channels."""
    return Removal(choose(graph, gammas_of(graph.network, arrays), ChannelPolicy(percent, layer_keep=0.1)).keep)


def certified(graph, arrays, removal: Removal, **changes: np.ndarray) -> Certificate:
    """The proof of a surgery without constants, some of whose tensors may have been changed."""
    bare = prune_network(graph, arrays, removal)
    return certify(graph, arrays, arrays, removal, bare._replace(arrays={**bare.arrays, **changes}), bare)


class TestCertificate:
    """The proof of a pruned network."""

    def made(self, spoil: bool = False):
        graph = graph_of(conv(8), conv(8, 3), SHORTCUT, conv(6, 3))
        arrays = float32(graph)
        removal = weakest(graph, arrays, 0.5)
        absorbed = fold_constants(graph, arrays, removal)
        bare, written = prune_network(graph, arrays, removal), prune_network(graph, absorbed, removal)
        if spoil:
            bare.arrays["layers.1.conv.weight"][0, 0] += 1
        return certify(graph, arrays, absorbed, removal, bare, written)

    def test_a_right_surgery_passes_and_the_border_is_measured(self):
        certificate = self.made()
        certificate.check()
        assert certificate.compact_vs_silenced < 1e-5
        assert certificate.compact_vs_silenced_float64 < 1e-12
        assert certificate.compact_vs_keep_size < 1e-5
        assert certificate.border > 1e-3

    def test_its_picture_fits_any_stride(self):
        sections = conv(4, 3, stride=6), conv(4, 3, stride=2), "[upsample]\n", "[route]\nlayers=-1,0\n"
        graph = channel_graph(one_head(*sections, width=72))
        assert certified(graph, float32(graph), Removal(np.ones(graph.count, np.bool_))).side == 72

    def test_its_picture_is_that_of_the_cfg_where_windows_do_not_fit_into_a_smaller_one(self):
        graph = channel_graph(one_head(*(nets.conv(4, 5, stride=2),) * 5, width=128))
        removal = Removal(np.arange(graph.count) != graph.labels[0][0])
        certificate = certified(graph, varied_arrays(graph.network), removal)
        certificate.check()
        assert certificate.side == 128

    def test_an_untrained_network_proves_something_too(self, root):
        """Its signals die out on the way to the heads, and any two networks would seem equal."""
        graph = channel_graph(cfg_file.load(root / "cfg" / "yolov4-tiny.cfg"))
        arrays = {name: value.numpy() for name, value in Darknet(graph.network).state_dict().items()}
        removal = weakest(graph, arrays)
        certified(graph, arrays, removal).check()
        pruned = prune_network(graph, arrays, removal).arrays
        wrong = {name: pruned[name][::-1].copy() for name in pruned if name.endswith("conv.weight")}
        with pytest.raises(InfeasibleError, match="certificate"):
            certified(graph, arrays, removal, **wrong).check()

    def test_a_gate_with_batch_normalisation_is_proved(self):
        """One cell a picture: a single value, which has no variance."""
        graph = graph_of(conv(8), *GATE, conv(6, 3))
        arrays = float32(graph)
        removal = weakest(graph, arrays)
        assert not all(removal.stays(graph, index).all() for index in (2, 3))
        certificate = certified(graph, arrays, removal)
        certificate.check()
        assert certificate.compact_vs_silenced_float64 < 1e-12

    def test_heads_that_are_not_finite_prove_nothing(self):
        nan = float("nan")
        with pytest.raises(NumericsError, match="the heads are not finite"):
            Certificate(nan, 0.0, 0.0, 0.0, 64).check()

    def test_a_wrong_one_is_refused(self):
        certificate = self.made(spoil=True)
        assert certificate.allowed_float64 == 1e-9  # the network does not enlarge rounding
        with pytest.raises(InfeasibleError, match="compact_vs_silenced is"):
            certificate.check()


class TestRounding:
    """A network that enlarges rounding: values of 1e8 ± 1, normalised by what they are in the batch."""

    @pytest.fixture
    def made(self):
        graph = graph_of(conv(24), conv(24), conv(24))
        arrays = float32(graph)
        arrays["layers.0.bn.bias"] += 1e8
        arrays["layers.1.bn.running_var"][:] = 1e16
        return graph, arrays, weakest(graph, arrays)

    def test_another_order_of_summation_passes(self, made):
        pruned = prune_network(*made).arrays
        turned = {name: pruned[name][::-1].copy() for name in pruned if name.startswith("layers.0.")}
        turned["layers.1.conv.weight"] = pruned["layers.1.conv.weight"][:, ::-1].copy()
        certificate = certified(*made, **turned)
        certificate.check()
        assert 1e-9 < certificate.compact_vs_silenced_float64 < certificate.allowed_float64 < 1e-4

    @pytest.mark.parametrize("fault", ["a wrong channel", "a missing constant", "a wrong weight"])
    def test_faults_are_refused(self, made, fault):
        pruned = {name: array.copy() for name, array in prune_network(*made).arrays.items()}
        if fault == "a wrong channel":
            pruned["layers.2.conv.weight"][:, :2] = pruned["layers.2.conv.weight"][:, 1::-1]
        elif fault == "a missing constant":
            pruned["layers.1.bn.bias"][0] = 0
        else:
            pruned["layers.1.conv.weight"][0, 0] *= 1 + 1e-4
        with pytest.raises(InfeasibleError, match="certificate: compact_vs_silenced"):
            certified(*made, **pruned).check()


class TestUnits:
    """Residual units: which there are, and the network without them."""

    NET = (
        conv(8),
        conv(4),
        conv(8, 3),
        "[shortcut]\nfrom=-3\nactivation=linear\n",
        conv(8),
        "[dropout]\nprobability=.1\n",
        "[shortcut]\nfrom=-3\nactivation=linear\n",
        conv(8),
        "[shortcut]\nfrom=3\nactivation=linear\n",
        "[route]\nlayers=-1,6\n",
        conv(8, 3),
        "[shortcut]\nfrom=8\nactivation=linear\n",
    )
    """Units of two convolutions and of one with a dropout; a shortcut past a block that is read elsewhere, and one past
    a block that reads elsewhere, which are none."""

    def test_units_are_found_by_what_they_read(self):
        units = residual_units(graph_of(*self.NET).network)
        assert [(unit.source, unit.last, unit.shortcut) for unit in units] == [(0, 2, 3), (3, 4, 6)]

    @pytest.mark.parametrize(("name", "count"), [("yolov3", 23), ("yolov4", 23), ("yolov4-tiny", 0), ("demo", 4)])
    def test_known_counts(self, root, name, count):
        assert len(residual_units(cfg_file.load(root / "cfg" / f"{name}.cfg"))) == count

    def test_the_weakest_go_and_too_many_are_refused(self):
        graph = graph_of(*self.NET)
        gammas = {i: np.full(len(graph.labels[i]), 1.0) for i in graph.makers()} | {4: np.full(8, 0.1)}
        keep = np.ones(graph.count, np.bool_)
        assert [unit.shortcut for unit in choose_units(graph, gammas, keep, 1)] == [6]
        with pytest.raises(InfeasibleError, match=r"--shortcut 3: .* 2$"):
            choose_units(graph, gammas, keep, 3)

    def test_a_wide_unit_is_no_stronger_for_it(self):
        """Means of |γ|: 0.3 in eight channels against 0.5 in four."""
        graph = graph_of(conv(8), conv(8), SHORTCUT, conv(4), conv(4), SHORTCUT)
        gammas = {i: np.full(len(graph.labels[i]), 1.0) for i in graph.makers()}
        gammas |= {1: np.full(8, 0.3), 4: np.full(4, 0.5)}
        assert [unit.last for unit in choose_units(graph, gammas, np.ones(graph.count, np.bool_), 1)] == [1]


YOLOV4_CHAINS = (
    (4, 6),
    (14, 16, 19),
    (27, 29, 32, 35, 38, 41, 44, 47, 50),
    (58, 60, 63, 66, 69, 72, 75, 78, 81),
    (89, 91, 94, 97, 100),
)


@pytest.mark.parametrize(("name", "chains"), [("yolov4", YOLOV4_CHAINS), ("yolov4-tiny", ())])
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
