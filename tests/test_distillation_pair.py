"""What of a student answers to what of its teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from models import Darknet, load_arrays
from tests.nets import TINY, one_head, tiny, with_heads
from utils.checkpoint import load_model
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Convolutional, Network
from utils.darknet.cfg import parse
from utils.darknet.network import adapt_classes, trace
from utils.detection.settings import ASSIGNMENTS
from utils.distillation.matching import LEAST_ANCHOR_IOU, Kept, comparable, features, pair, rebased
from utils.distillation.strategies import AT, KD, Quantity, distillation
from utils.distillation.terms import Distiller, Teacher
from utils.errors import InputError
from utils.model_files import choose_model
from utils.pruning.channel_graph import channel_graph
from utils.pruning.policy import ChannelPolicy
from utils.pruning.report import kept as kept_of
from utils.pruning.surgery import gammas_of, prune_network
from utils.pruning.target import Amount, make_plan

OUTPUTS, EVERYTHING = distillation("3", None), distillation("cwd", "3")
CHANNELS, ATTENTION = distillation("cwd", None), distillation(None, "1")
RULE = ASSIGNMENTS["darknet"]
YOLOV3 = ("yolov3", "yolov3-spp", "yolov3-tiny")
YOLOV4 = ("yolov4-csp", "yolov4-leaky", "yolov4-tiny", "yolov4")
CFGS = ("demo", "mobilenetv2-yolov3", "yolo-fastest", *YOLOV3, *YOLOV4)
SEVERAL_HEADS = TINY[: TINY.index("[route]\nlayers=7")]
"""The tiny network as far as its first head, which is at stride 8."""
SECOND = """
[route]
layers=7

[convolutional]
batch_normalize=1
filters={}
size=1
activation=relu

[convolutional]
filters=21
size=1
activation=linear

[yolo]
mask=0,1,2
anchors=4,4, 8,8, 12,10, 20,16, 24,30, 40,44
classes=2
num=6
"""
"""Another head at that stride."""


def load(root, name: str) -> Network:
    return cfg_file.load(str(root / "cfg" / f"{name}.cfg"))


def network(*seconds: int) -> Network:
    """One head at stride 8, and one more with a convolution of each of these widths before it."""
    return parse(SEVERAL_HEADS + "".join(SECOND.format(width) for width in seconds), "several.cfg")


class TestRoles:
    """Features are told from the cfg."""

    def test_those_of_yolov4_are_the_nine_of_the_paper(self, root):
        """Chu et al., arXiv:2306.01526: the maps of --AT_str 2 by the cfg's numbers."""
        found: dict[str, list[int]] = {}
        for feature in features(load(root, "yolov4")):
            found.setdefault(feature.group, []).append(feature.block)
        assert found == {"backbone": [10, 23, 54, 85], "deep": [117, 159], "neck": [127, 137, 148]}

    def test_those_of_yolov3_are_what_its_stages_end_in_and_what_heads_and_upsamplings_read(self, root):
        found = {feature.block: (feature.role, feature.stride) for feature in features(load(root, "yolov3"))}
        assert found == {
            4: ("stage", 2),
            11: ("stage", 4),
            36: ("stage", 8),
            61: ("stage", 16),
            80: ("head", 32),
            84: ("upsampled", 32),
            92: ("head", 16),
            96: ("upsampled", 16),
            104: ("head", 8),
        }

    @pytest.mark.parametrize("name", CFGS)
    def test_every_network_pairs_with_itself_whole(self, root, name):
        given = load(root, name)
        for chosen in (*(distillation(kd, None) for kd in KD), *(distillation(None, at) for at in AT), EVERYTHING):
            found = pair(given, given, chosen)
            assert found.notes == ()
            assert [(p.student, p.teacher) for p in found.heads] == (
                [(i, i) for i in range(len(given.yolos))] if chosen.compares(Quantity.SCORES | Quantity.BOXES) else []
            )
            assert all(a == b for p in found.heads for a, b in p.anchors)
            assert all(f.student == f.teacher and not f.needs_adapter for f in found.features)
            assert bool(found.features) == chosen.compares(Quantity.MAPS | Quantity.CHANNELS)
            assert any(f.group == "backbone" for f in found.features) == chosen.compares(Quantity.MAPS)

    def test_a_network_without_upsampling_has_stages_and_heads(self):
        given = one_head(*(f"[convolutional]\nfilters={width}\nsize=3\npad=1\nstride=2\n" for width in (4, 5)))
        roles = [(f.role, f.block, f.group) for f in features(given)]
        assert roles == [("stage", 0, "backbone"), ("head", 1, "deep")]


class TestHeads:
    """By stride, and anchors by their shapes."""

    def test_a_small_student_takes_what_it_can_and_the_rest_is_said(self, root):
        """yolov3-tiny has no head at stride 8, and at 16 smaller anchors than yolov3."""
        student, teacher = load(root, "yolov3-tiny"), load(root, "yolov3")
        found = pair(student, teacher, EVERYTHING)
        assert [(p.student, p.teacher) for p in found.heads] == [(0, 0), (1, 1)]
        assert found.heads[1].anchors == ((2, 0),)
        assert found.notes == (
            "head at stride 16: 1 of 3 anchors are like one of the teacher's; the others learn from the data",
            "the teacher's head at stride 8 has none in the student and teaches nothing",
        )
        stages = [f"stage at {stride}" for stride in (2, 4, 8, 16)]
        assert [f.name for f in found.features] == [*stages, "head at 32", "upsampled at 32", "head at 16"]
        assert [f.needs_adapter for f in found.features] == [False] * 4 + [True] * 3
        shapes = trace(student), trace(teacher)
        for f in found.features:
            mine, theirs = shapes[0][f.student], shapes[1][f.teacher]
            assert (mine.channels, theirs.channels) == f.widths
            assert student.net.height / mine.height == teacher.net.height / theirs.height

    def test_a_large_student_learns_the_rest_from_the_data(self, root):
        found = pair(load(root, "yolov3"), load(root, "yolov3-tiny"), EVERYTHING)
        assert [(p.student, p.teacher) for p in found.heads] == [(0, 0), (1, 1)]
        assert "the student's head at stride 8 has none in the teacher and learns from the data" in found.notes
        assert found.notes[-1] == "the teacher has no features like the student's upsampled at 16, head at 8"

    def test_heads_in_another_order(self, root):
        """YOLOv3 has its coarsest head first, YOLOv4 its finest."""
        found = pair(load(root, "yolov4"), load(root, "yolov3"), OUTPUTS)
        assert [(p.student, p.teacher) for p in found.heads] == [(0, 2), (1, 1), (2, 0)]

    def test_anchors_are_paired_one_to_one_the_most_alike_first(self):
        """(8, 8) is like (10, 8) and (8, 9); (30, 30) is like none."""
        given = one_head()
        given = replace(given, blocks=(replace(given.blocks[0], filters=18), replace(given.yolos[0], mask=(0, 1, 2))))
        student = with_heads(given, anchors=((8, 8), (10, 10), (30, 30)))
        teacher = with_heads(given, anchors=((8, 9), (8, 8.1), (60, 60)))
        found = pair(student, teacher, OUTPUTS)
        assert found.heads[0].anchors == ((0, 1), (1, 0))
        assert 900 / 3600 < LEAST_ANCHOR_IOU < 72 / 100
        assert found.notes == (
            "head at stride 1: 2 of 3 anchors are like one of the teacher's; the others learn from the data",
        )

    def test_anchors_in_another_order(self):
        anchors = tiny().yolos[0].anchors
        order = (2, 0, 1, 5, 4, 3)
        found = pair(tiny(), with_heads(tiny(), anchors=tuple(anchors[i] for i in order)), OUTPUTS)
        assert found.heads[0].anchors == ((0, 2), (1, 1), (2, 0))
        assert found.heads[1].anchors == ((0, 1), (1, 2), (2, 0))

    def test_several_heads_at_one_stride_are_paired_in_their_order(self):
        two, other = network(6), network(6, 9)
        found = pair(two, other, EVERYTHING)
        assert [(p.student, p.teacher) for p in found.heads] == [(0, 0), (1, 1)]
        heads = {f.name: (f.student, f.teacher) for f in found.features if f.name.startswith("head")}
        assert heads == {"head at 8": (7, 7), "head at 8 #2": (11, 11)}
        assert found.notes == ("the teacher's head at stride 8 has none in the student and teaches nothing",)
        found = pair(other, two, EVERYTHING)
        assert [(p.student, p.teacher) for p in found.heads] == [(0, 0), (1, 1)]
        assert found.notes == (
            "the student's head at stride 8 has none in the teacher and learns from the data",
            "the teacher has no features like the student's head at 8 #3",
        )

    @pytest.mark.parametrize(
        ("teacher", "chosen", "match"),
        [
            (
                replace(tiny(), net=replace(tiny().net, channels=1)),
                OUTPUTS,
                r"tiny\.cfg: takes pictures of 1 channels, the student of 3",
            ),
            (replace(tiny(), net=replace(tiny().net, channels=1)), ATTENTION, "takes pictures of 1 channels"),
            (one_head(width=64), adapt_classes, "no head of the student has stride and anchors"),
            (with_heads(tiny(), anchors=((400, 1),) * 6), OUTPUTS, "no head of the student has stride and anchors"),
            (one_head(width=64), CHANNELS, "the student has no features at the strides of the teacher's"),
        ],
        ids=["channels", "channels of features", "strides", "anchors", "features"],
    )
    def test_what_cannot_be_compared_is_refused_in_a_line(self, teacher, chosen, match):
        if not hasattr(chosen, "terms"):
            teacher, chosen = adapt_classes(teacher, 2), OUTPUTS
        with pytest.raises(InputError, match=match) as caught:
            pair(tiny(), teacher, chosen)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("chosen", [ATTENTION, distillation(None, "2"), CHANNELS, distillation("pkd", "1")])
    def test_a_teacher_of_other_classes_teaches_features(self, chosen):
        found = pair(tiny(), adapt_classes(tiny(), 7), chosen)
        assert found.heads == ()
        assert found.features and found.notes == ()

    def test_of_a_teacher_of_other_classes_boxes_and_features_are_comparable(self):
        left, notes = comparable(EVERYTHING, tiny(), adapt_classes(tiny(), 7))
        assert set(left.terms) == set(EVERYTHING.terms) - {"objectness", "classes"}
        assert len(notes) == 1 and "7 classes and the student 2: objectness, classes left out" in notes[0]
        assert comparable(EVERYTHING, tiny(), tiny()) == (EVERYTHING, ())
        with pytest.raises(InputError, match="--KDstr 1: compares scores, but"):
            comparable(distillation("1", None), tiny(), adapt_classes(tiny(), 7))


def terms_of(student: Darknet, teacher: Darknet, kept: Kept | None, chosen) -> dict[str, float]:
    """The weighted terms for two pictures with an object each."""
    distiller = Distiller(student, Teacher(teacher, torch.device("cpu")), chosen, RULE, kept)
    torch.manual_seed(0)
    images = torch.rand(2, 3, student.network.net.height, student.network.net.width)
    targets = torch.tensor([[0, 0, 0.31, 0.42, 0.2, 0.25], [1, 0, 0.71, 0.66, 0.5, 0.4]])
    terms = distiller(distiller.teach(images), student(images, *distiller.wanted), targets, tuple(images.shape[2:]))
    return {term: value.item() for term, value in terms.items()}


def model_of(given: Network, arrays: dict) -> Darknet:
    return load_arrays(given, {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}).eval()


def start(given: Network) -> dict[str, np.ndarray]:
    """Weights whose features and heads are not small."""
    torch.manual_seed(0)
    model = Darknet(given)
    for name, value in model.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "running_mean")):
            value.normal_(std=0.3)
    return {name: value.numpy().copy() for name, value in model.state_dict().items() if "num_batches" not in name}


class Pruned(NamedTuple):
    """A network with channels that put out 0 always, and one without them."""

    network: Network
    kept: Kept
    teacher: Darknet
    student: Darknet
    weights: dict[str, np.ndarray]
    """Of the student."""


def pruned(given: Network, arrays: dict, percent: float, units: int | None, seed: int = 1, kept=None) -> Pruned:
    """Silence a share of the channels and remove just those; `kept` is where those of `given` come from."""
    generator = np.random.default_rng(seed)
    gammas = {i: generator.random(len(g)) + 0.1 for i, g in gammas_of(given, arrays).items()}
    policy = ChannelPolicy(percent, layer_keep=0.2, all_convs=True)
    plan = make_plan(channel_graph(given), gammas, policy, Amount(None, units))
    arrays = {name: array.copy() for name, array in arrays.items()}
    for i in gammas:
        silent = ~plan.removal.stays(plan.graph, i)
        for name in ("weight", "bias"):
            arrays[f"layers.{i}.bn.{name}"][silent] = 0
    network, weights = prune_network(plan.graph, arrays, plan.removal)
    return Pruned(network, kept_of(plan, kept), model_of(given, arrays), model_of(network, weights), weights)


class TestPruned:
    """A student that was pruned of silent channels does what its origin does, and has nothing to learn from it."""

    STRATEGIES = (distillation("cwd", "3"), distillation("pkd", "2"), distillation("5", None), distillation("1", None))

    @pytest.mark.parametrize("units", [None, 1], ids=["channels", "channels and layers"])
    def test_it_pairs_with_its_origin_channel_by_channel(self, root, units):
        given = adapt_classes(load(root, "demo"), 1)
        cut, kept, teacher, student, _ = pruned(given, start(given), 0.5, units)
        found = pair(cut, given, EVERYTHING, kept)
        assert found.notes == ()
        assert len(found.features) == len(pair(given, given, EVERYTHING).features)
        compared = [f for f in found.features if f.compares_channels]
        assert any(f.widths[0] < f.widths[1] for f in compared)
        assert all(f.channels is not None and not f.needs_adapter for f in compared)
        assert any(f.student != f.teacher for f in found.features) == bool(units)
        for chosen in self.STRATEGIES:
            learnt = terms_of(student, teacher, kept, chosen)
            assert max(map(abs, learnt.values())) < 1e-4, (chosen.name, learnt)
        torch.manual_seed(0)
        assert terms_of(student, teacher, None, CHANNELS)["cwd"] > 0.1  # through adapters that know nothing

    def test_a_pool_and_a_route_before_a_head_have_adapters(self):
        """Only convolutions have origins; attention has nothing to learn all the same."""
        cut, kept, teacher, student, _ = pruned(tiny(), start(tiny()), 0.5, None)
        known = {f.name: f.channels is not None for f in pair(cut, tiny(), CHANNELS, kept).features}
        assert known == {"head at 8": False, "upsampled at 8": True, "head at 4": False}
        for chosen in (distillation("3", "2"), distillation("5", None)):
            assert max(map(abs, terms_of(student, teacher, kept, chosen).values())) < 1e-4

    def test_pruned_twice_it_pairs_with_what_was_pruned_once(self, root):
        given = adapt_classes(load(root, "demo"), 1)
        once = pruned(given, start(given), 0.4, 1)
        twice = pruned(once.network, once.weights, 0.4, 1, seed=2, kept=once.kept)
        between = rebased(twice.kept, once.kept)
        assert len(between) == len(twice.kept)
        for chosen in (distillation("cwd", None), distillation("pkd", None)):
            assert max(terms_of(twice.student, twice.teacher, between, chosen).values()) < 1e-4
        assert all(f.channels is not None for f in pair(twice.network, once.network, CHANNELS, between).features)

    def test_rebased_leaves_out_what_the_teacher_has_not(self):
        teacher = {"3": {"block": 4, "channels": [1, 5, 7]}, "5": {"block": 6, "channels": [0, 2]}}
        student = {
            "0": {"block": 0, "channels": [0]},
            "2": {"block": 4, "channels": [7, 1]},
            "4": {"block": 6, "channels": [1]},
        }
        assert rebased(student, teacher) == {"2": {"block": 3, "channels": [2, 0]}}

    def test_a_wrong_teacher_is_reached_through_an_adapter(self, root):
        """Narrower than the channels say, or with blocks of other numbers."""
        cut, kept, *_ = pruned(tiny(), start(tiny()), 0.5, None)
        narrow = parse(TINY.replace("filters=6\n", "filters=2\n"), "narrow.cfg")
        upsampled = next(f for f in pair(cut, narrow, CHANNELS, kept).features if f.name == "upsampled at 8")
        assert max(kept["11"]["channels"]) >= 2 == upsampled.widths[1] < upsampled.widths[0]
        assert upsampled.channels is None and upsampled.needs_adapter
        longer = TINY.replace("[maxpool]", "[dropout]\nprobability=.5\n\n[maxpool]", 1)
        found = pair(cut, parse(longer.replace("layers=7", "layers=8"), "longer.cfg"), CHANNELS, kept).features
        upsampled = next(f for f in found if f.name == "upsampled at 8")
        assert (upsampled.student, upsampled.teacher, upsampled.channels) == (11, 12, None)
        assert upsampled.needs_adapter

    def test_the_scripts_leave_what_is_needed_in_model_pt(self, prune):
        document = prune("slim", "--percent", "0.3", "--no-test")
        loaded = load_model(choose_model(None, document["cfg"].replace("model.cfg", "model.pt")))
        compared = pair(loaded.model.network, tiny(), CHANNELS, loaded.kept).features
        compared = [f for f in compared if f.student in (7, 11)]
        convolutions = [f for f in compared if isinstance(tiny().blocks[f.teacher], Convolutional)]
        assert convolutions and all(f.channels is not None for f in convolutions)
        widths = {int(number): len(origin["channels"]) for number, origin in loaded.kept.items()}
        assert all(widths[f.student] == f.widths[0] for f in convolutions)


class TestAdapters:
    """Convolutions of the loss."""

    def of(self, student: Network, teacher: Network, chosen=CHANNELS) -> Distiller:
        return Distiller(Darknet(student), Teacher(Darknet(teacher), torch.device("cpu")), chosen, RULE)

    def test_there_is_one_where_widths_differ_and_channels_are_compared(self):
        wide = parse(TINY.replace("filters=12", "filters=20"), "wide.cfg")
        distiller = self.of(tiny(), wide)
        assert {key: tuple(a.weight.shape) for key, a in distiller.adapters.items()} == {"head at 8": (20, 12, 1, 1)}
        assert not self.of(tiny(), wide, distillation(None, "3")).adapters
        assert not self.of(tiny(), tiny()).adapters

    def test_a_stride_need_not_be_a_whole_number(self):
        """A convolution without padding leaves 62 of 64 cells; a module's name takes no point."""
        nets = [one_head(f"[convolutional]\nfilters={width}\nsize=3\n", width=64) for width in (4, 6)]
        distiller = self.of(*nets)
        assert [key for key in distiller.adapters] == ["head at 1_03226"]
        images = torch.rand(1, 3, 64, 64)
        student = Darknet(nets[0])
        outputs = student(images, *distiller.wanted)
        terms = distiller(distiller.teach(images), outputs, torch.zeros(0, 6), (64, 64))
        terms["cwd"].backward()
        assert distiller.adapters["head at 1_03226"].weight.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("chosen", "features", "maps"),
        [(OUTPUTS, 0, 0), (distillation("4", None), 0, 5), (CHANNELS, 3, 0), (distillation("cwd", "1"), 3, 5)],
        ids=["outputs", "attention", "channels", "both"],
    )
    def test_networks_are_asked_for_what_is_compared_and_no_more(self, chosen, features, maps):
        distiller = self.of(tiny(), tiny(), chosen)
        assert [len(blocks) for blocks in distiller.wanted] == [features, maps]
        outputs = distiller.teach(torch.rand(1, 3, 64, 64))
        assert (outputs.features.keys(), outputs.maps.keys()) == tuple(map(set, distiller.wanted))

    def test_nothing_of_the_teacher_is_a_parameter_or_a_buffer_of_the_distiller(self):
        wide = parse(TINY.replace("filters=12", "filters=20"), "wide.cfg")
        distiller = self.of(tiny(), wide)
        adapters = {f"adapters.{key}.weight" for key in distiller.adapters}
        assert {name for name, _ in distiller.named_parameters()} == adapters
        assert not list(distiller.buffers())
        distiller.train()
        assert not distiller.teacher._model.training


def test_a_teacher_sees_what_its_model_sees_and_leaves_it_as_it_is():
    given = tiny()
    model = model_of(given, start(given)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = Teacher(model, torch.device("cpu"))
    images = torch.rand(2, 3, 64, 64)
    found = teacher(images, (7, 11))
    assert not any(head.requires_grad for head in (*found.heads, *found.features.values()))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    wanted = model.eval()(images, (7, 11))
    for mine, theirs in zip(found.heads, wanted.heads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    for block in (7, 11):
        torch.testing.assert_close(found.features[block], wanted.features[block], atol=1e-4, rtol=1e-4)
