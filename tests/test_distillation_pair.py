"""Parts of a student that answer to those of its teacher, and attention maps that networks put out beside features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import Darknet, attended
from tests.nets import TINY, TINY_HEAD, conv, lined, one_head, refused, tiny, with_heads
from tests.pruning import CONV, SHORTCUT, model_of, varied_arrays
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network, Shortcut
from utils.darknet.cfg import parse
from utils.darknet.network import adapt_classes, trace
from utils.detection.settings import ASSIGNMENTS
from utils.distillation.strategies import AT, KD, LEAST_ANCHOR_IOU, Quantity, comparable, distillation, features, pair
from utils.distillation.terms import Distiller, Teacher
from utils.errors import InputError
from utils.pruning.channel_graph import channel_graph
from utils.pruning.policy import ChannelPolicy
from utils.pruning.surgery import gammas_of, prune_network
from utils.pruning.target import Amount, make_plan

OUTPUTS, EVERYTHING, ATTENTION = distillation("3", None), distillation(None, "3"), distillation(None, "1")
RULE = ASSIGNMENTS["darknet"]
YOLOV3 = ("yolov3", "yolov3-spp", "yolov3-tiny")
YOLOV4 = ("yolov4-csp", "yolov4-leaky", "yolov4-tiny", "yolov4")
CFGS = ("demo", "mobilenetv2-yolov3", "yolo-fastest", *YOLOV3, *YOLOV4)
SEVERAL_HEADS = TINY[: TINY.index("[route]\nlayers=7")]
"""The tiny network as far as its first head, which is at stride 8."""
SECOND = lined("[route] layers=7 [convolutional] batch_normalize=1 filters={} activation=relu")
SECOND += TINY_HEAD.format("0,1,2")
"""Another head at that stride."""


def load(root, name: str) -> Network:
    return cfg_file.load(str(root / "cfg" / f"{name}.cfg"))


def network(*seconds: int) -> Network:
    """One head at stride 8, and one more with a convolution of each of these widths before it."""
    return parse(SEVERAL_HEADS + "".join(SECOND.format(width) for width in seconds), "several.cfg")


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("yolov4", {"backbone": [10, 23, 54, 85], "deep": [117, 159], "neck": [127, 137, 148]}),
        ("yolov3", {"backbone": [4, 11, 36, 61], "deep": [80, 84], "neck": [92, 96, 104]}),
    ],
)
def test_features_are_told_from_the_cfg(root, name, roles):
    """Those of YOLOv4 are the nine of Chu et al., arXiv:2306.01526: the maps of --AT_str 2 by the cfg's numbers."""
    groups: dict[str, list[int]] = {}
    for feature in features(load(root, name)):
        groups.setdefault(feature.group, []).append(feature.block)
    assert groups == roles


@pytest.mark.parametrize("name", CFGS)
def test_every_network_pairs_with_itself_whole(root, name):
    network = load(root, name)
    for chosen in (*(distillation(kd, None) for kd in KD), *(distillation(None, at) for at in AT), EVERYTHING):
        pairing = pair(network, network, chosen)
        assert pairing.notes == ()
        heads = range(len(network.yolos)) if chosen.compares(Quantity.SCORES | Quantity.BOXES) else ()
        assert [(p.student, p.teacher) for p in pairing.heads] == [(i, i) for i in heads]
        assert all(a == b for p in pairing.heads for a, b in p.anchors)
        assert all(f.student == f.teacher for f in pairing.features)
        assert any(f.group == "backbone" for f in pairing.features) == chosen.compares(Quantity.MAPS)


def test_a_network_without_upsampling_has_stages_and_heads():
    network = one_head(*(f"[convolutional]\nfilters={width}\nsize=3\npad=1\nstride=2\n" for width in (4, 5)))
    roles = [(f.role, f.block, f.group) for f in features(network)]
    assert roles == [("stage", 0, "backbone"), ("head", 1, "deep")]


def test_a_small_student_takes_what_it_can_and_the_rest_is_said(root):
    """yolov3-tiny has no head at stride 8, and at 16 smaller anchors than yolov3."""
    student, teacher = load(root, "yolov3-tiny"), load(root, "yolov3")
    pairing = pair(student, teacher, EVERYTHING)
    assert [(p.student, p.teacher) for p in pairing.heads] == [(0, 0), (1, 1)]
    assert pairing.heads[1].anchors == ((2, 0),)
    assert pairing.notes == (
        "head at stride 16: 1 of 3 anchors are like one of the teacher's; the others learn from the data",
        "the teacher's head at stride 8 has none in the student and teaches nothing",
    )
    assert [f.group for f in pairing.features] == ["backbone"] * 4 + ["deep"] * 2 + ["neck"]
    shapes = trace(student), trace(teacher)
    for f in pairing.features:
        mine, theirs = shapes[0][f.student], shapes[1][f.teacher]
        assert student.net.height / mine.height == teacher.net.height / theirs.height
    pairing = pair(teacher, student, EVERYTHING)
    assert [(p.student, p.teacher) for p in pairing.heads] == [(0, 0), (1, 1)]
    assert "the student's head at stride 8 has none in the teacher and learns from the data" in pairing.notes
    assert pairing.notes[-1] == "the teacher has no features like the student's upsampled at 16, head at 8"


def test_heads_in_another_order(root):
    """YOLOv3 has its coarsest head first, YOLOv4 its finest."""
    pairing = pair(load(root, "yolov4"), load(root, "yolov3"), OUTPUTS)
    assert [(p.student, p.teacher) for p in pairing.heads] == [(0, 2), (1, 1), (2, 0)]


def test_strides_are_compared_at_the_input_of_the_student():
    """Without padding the stride depends on it: 16 / 14 at 16 pixels, 32 / 30 at 32."""
    network = one_head(conv(4, 3))
    larger = replace(network, net=replace(network.net, height=32, width=32))
    assert pair(network, larger, EVERYTHING) == pair(network, network, EVERYTHING)


def test_anchors_are_paired_one_to_one_the_most_alike_first():
    """(8, 8) is like (10, 8) and (8, 9); (30, 30) is like none."""
    network = one_head()
    yolo = replace(network.yolos[0], mask=(0, 1, 2))
    network = replace(network, blocks=(replace(network.blocks[0], filters=18), yolo))
    student = with_heads(network, anchors=((8, 8), (10, 10), (30, 30)))
    teacher = with_heads(network, anchors=((8, 9), (8, 8.1), (60, 60)))
    pairing = pair(student, teacher, OUTPUTS)
    assert pairing.heads[0].anchors == ((0, 1), (1, 0))
    assert 900 / 3600 < LEAST_ANCHOR_IOU < 72 / 100
    assert pairing.notes == (
        "head at stride 1: 2 of 3 anchors are like one of the teacher's; the others learn from the data",
    )


def test_several_heads_at_one_stride_are_paired_in_their_order():
    two, other = network(6), network(6, 9)
    for student, teacher in ((two, other), (other, two)):
        pairing = pair(student, teacher, EVERYTHING)
        assert [(p.student, p.teacher) for p in pairing.heads] == [(0, 0), (1, 1)]
        assert [(f.student, f.teacher) for f in pairing.features[-2:]] == [(7, 7), (11, 11)]
    assert pair(two, other, EVERYTHING).notes == (
        "the teacher's head at stride 8 has none in the student and teaches nothing",
    )
    assert pairing.notes == (
        "the student's head at stride 8 has none in the teacher and learns from the data",
        "the teacher has no features like the student's head at 8 #3",
    )


GREY = replace(tiny(), net=replace(tiny().net, channels=1))


@pytest.mark.parametrize(
    ("teacher", "chosen", "match"),
    [
        (GREY, OUTPUTS, r"tiny\.cfg: takes images of 1 channels, the student of 3"),
        (GREY, ATTENTION, "takes images of 1 channels"),
        (adapt_classes(one_head(width=64), 2), OUTPUTS, "no head of the student has stride and anchors"),
        (with_heads(tiny(), anchors=((400, 1),) * 6), OUTPUTS, "no head of the student has stride and anchors"),
        (one_head(width=64), ATTENTION, "the student has no features at the strides of the teacher's"),
    ],
    ids=["channels", "channels of features", "strides", "anchors", "features"],
)
def test_what_cannot_be_compared_is_refused_in_a_line(teacher, chosen, match):
    with refused(InputError, match):
        pair(tiny(), teacher, chosen)


def test_a_teacher_of_other_classes_teaches_boxes_and_features():
    other = adapt_classes(tiny(), 7)
    for chosen in (ATTENTION, distillation(None, "2")):
        pairing = pair(tiny(), other, chosen)
        assert pairing.heads == () == pairing.notes and pairing.features
    left, notes = comparable(EVERYTHING, tiny(), other)
    assert set(left.terms) == set(EVERYTHING.terms) - {"objectness", "classes"}
    assert len(notes) == 1 and "7 classes and the student 2: objectness, classes left out" in notes[0]
    assert comparable(EVERYTHING, tiny(), tiny()) == (EVERYTHING, ())


def terms_of(student: Darknet, teacher: Darknet, chosen) -> dict[str, float]:
    """The weighted terms for two pictures with an object each."""
    distiller = Distiller(student, Teacher(teacher, torch.device("cpu")), chosen, RULE)
    torch.manual_seed(0)
    images = torch.rand(2, 3, student.network.net.height, student.network.net.width)
    targets = torch.tensor([[0, 0, 0.31, 0.42, 0.2, 0.25], [1, 0, 0.71, 0.66, 0.5, 0.4]])
    outputs = student(images, maps=distiller.wanted)
    terms = distiller(distiller.teach(images), outputs, targets, tuple(images.shape[2:]))
    return {term: value.item() for term, value in terms.items()}


def pruned(network: Network, percent: float, units: int | None) -> tuple[Darknet, Darknet]:
    """A network with a share of its channels silenced, and one without them."""
    arrays, generator = varied_arrays(network), np.random.default_rng(1)
    gammas = {i: generator.random(len(g)) + 0.1 for i, g in gammas_of(network, arrays).items()}
    policy = ChannelPolicy(percent, layer_keep=0.2, all_convs=True)
    plan = make_plan(channel_graph(network), gammas, policy, Amount(None, units))
    for i in gammas:
        silent = ~plan.removal.stays(plan.graph, i)
        for name in ("weight", "bias"):
            arrays[f"layers.{i}.bn.{name}"][silent] = 0
    return model_of(network, arrays).float(), model_of(*prune_network(plan.graph, arrays, plan.removal)).float()


@pytest.mark.parametrize("units", [None, 1], ids=["channels", "channels and layers"])
def test_a_student_that_was_pruned_of_silent_channels_has_nothing_to_learn(root, units):
    """It does what its origin does, and all its heads and features have partners there."""
    network = adapt_classes(load(root, "demo"), 1)
    teacher, student = pruned(network, 0.5, units)
    pairing = pair(student.network, network, EVERYTHING)
    assert pairing.notes == ()
    assert len(pairing.features) == len(pair(network, network, EVERYTHING).features)
    assert any(f.student != f.teacher for f in pairing.features) == bool(units)
    for chosen in (distillation("3", "2"), distillation("5", None), distillation("1", None)):
        learnt = terms_of(student, teacher, chosen)
        assert max(map(abs, learnt.values())) < 1e-4, (chosen.name, learnt)


@pytest.mark.parametrize(("chosen", "maps"), [(OUTPUTS, 0), (ATTENTION, 5)], ids=["outputs", "attention"])
def test_networks_are_asked_for_what_is_compared_and_no_more(chosen, maps):
    distiller = Distiller(Darknet(tiny()), Teacher(Darknet(tiny()), torch.device("cpu")), chosen, RULE)
    outputs = distiller.teach(torch.rand(1, 3, 64, 64))
    assert len(distiller.wanted) == maps and not outputs.features
    assert outputs.maps.keys() == set(distiller.wanted)


def test_a_teacher_computes_what_its_model_computes_and_leaves_it_as_it_is():
    network = tiny()
    model = model_of(network, varied_arrays(network)).float().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(2, 3, 64, 64)
    taught = Teacher(model, torch.device("cpu"))(images, (7, 11))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    wanted = model.eval()(images, maps=(7, 11))
    pairs = [
        *zip(taught.heads, wanted.heads, strict=True),
        *((taught.maps[b], wanted.maps[b]) for b in (7, 11)),
    ]
    for mine, theirs in pairs:
        assert not mine.requires_grad
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


ADDITION = one_head(CONV, CONV, SHORTCUT)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_features_and_attention_maps_is_that_of_both(fresh, memory_format):
    torch.manual_seed(0)
    values = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    passed, maps = attended(values, fresh)
    assert torch.equal(passed, values)
    assert torch.allclose(maps, values.square().sum(dim=1))
    weight, slope = torch.randn_like(values), torch.randn(2, 4, 5, dtype=torch.float64)
    of_maps = 2 * values * slope[:, None]
    totals = {"both": (passed * weight).sum() + (maps * slope).sum(), "maps": (maps * slope).sum()}
    for name, total in (*totals.items(), ("features", (passed * weight).sum())):
        (gradient,) = torch.autograd.grad(total, values, retain_graph=True)
        expected = {"both": weight + of_maps, "maps": of_maps, "features": weight}[name]
        assert torch.allclose(gradient, expected)


def test_half_precision_is_squared_and_multiplied_in_single():
    values = torch.full((1, 2, 1, 1), 300.0, dtype=torch.float16, requires_grad=True)
    passed, maps = attended(values)
    assert maps.item() == 2 * 300**2 > torch.finfo(torch.float16).max
    (passed.sum() + maps.sum() / 1e3).backward()
    assert values.grad.flatten().tolist() == pytest.approx([1.6, 1.6], rel=1e-3)


@pytest.mark.parametrize("network", [tiny(), ADDITION], ids=["tiny", "an addition"])
def test_maps_of_any_block_leave_every_gradient_as_it_is(network):
    """Of all blocks, whatever reads them: an addition hands on one gradient to both of its terms."""
    torch.manual_seed(0)
    model = Darknet(network).double().train()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    blocks = range(len(network.blocks) - 1)
    slopes = {i: torch.randn_like(x[:, 0]) for i, x in model(images, blocks).features.items()}

    def gradients(maps: Mapping[int, torch.Tensor], heads: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        total = sum(head.square().sum() for head in heads) + sum((maps[i] * slopes[i]).sum() for i in maps)
        return torch.autograd.grad(total, list(model.parameters()))

    plain, attentive = model(images, blocks), model(images, (), blocks)
    assert attentive.maps.keys() == plain.features.keys() and not plain.maps
    wanted = gradients({i: x.square().sum(dim=1) for i, x in plain.features.items()}, plain.heads)
    pairs = zip(gradients(attentive.maps, attentive.heads), wanted, strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


def test_only_a_gradient_that_nobody_else_holds_is_written_into():
    added = next(i for i, block in enumerate(ADDITION.blocks) if isinstance(block, Shortcut))
    fresh = Darknet(ADDITION)._fresh
    assert added in fresh and not {*ADDITION.blocks[added].reads(added)} & fresh
    assert features(tiny())[0].block in Darknet(tiny())._fresh
