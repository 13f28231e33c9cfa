"""The terms of a distillation against float64 formulas of the papers, and what must not change or break them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from models import Outputs, attended
from tests.nets import tiny, with_heads
from utils.darknet.blocks import Network, Yolo
from utils.detection.decode import box_offsets, similarity, split_head
from utils.detection.losses import assign
from utils.detection.settings import ASSIGNMENTS
from utils.distillation.strategies import AT, ATTENTION, KD, QUANTITIES, HeadPair, Pairing, distillation, pair
from utils.distillation.terms import NEARNESS, TERMS, DistillationBatch, binary_kl, object_mask, project

NETWORK = tiny()
OTHER_ANCHORS = with_heads(
    NETWORK,
    anchors=tuple((1.1 * NETWORK.yolos[0].anchors[i][0], NETWORK.yolos[0].anchors[i][1]) for i in (2, 0, 1, 5, 4, 3)),
    scale_x_y=1.3,
)
"""Its anchors come in another order, and are a little wider."""
ACTIVATED = with_heads(NETWORK, new_coords=True)
"""Scores of its heads are probabilities."""
RULE = ASSIGNMENTS["darknet"]
STRIDES, SIZE = (8, 4), (64, 64)
OBJECTS = torch.tensor([[0, 1, 0.31, 0.42, 0.2, 0.25], [1, 0, 0.71, 0.66, 0.5, 0.4]])
MORE = torch.cat((OBJECTS, torch.tensor([[1, 0, 0.08, 0.91, 0.11, 0.07], [1, 1, 0.99, 0.02, 0.4, 0.6]])))
SMALL = torch.tensor(
    [[0, 0, 0.3, 0.3, 4 / 64, 4 / 64], [1, 1, 0.6, 0.7, 8 / 64, 8 / 64], [1, 1, 0.2, 0.7, 12 / 64, 10 / 64]]
)
"""Each of the size of an anchor of the second head."""
SEVERAL = distillation(None, "3")
"""Heads and attention."""
EPSILON = float(np.finfo(np.float32).eps)


def outputs(seed: int = 0, batch: int = 2, scale: float = 1.0) -> Outputs:
    """What the tiny network might put out for a picture of 64 × 64; the widths of all features are its own."""
    torch.manual_seed(seed)
    heads = (scale * torch.randn(batch, 21, 8, 8), scale * torch.randn(batch, 21, 16, 16))
    widths = {0: (8, 32), 5: (4, 16), 7: (12, 8), 11: (6, 8), 13: (10, 16)}
    return Outputs(heads, {block: scale * torch.randn(batch, c, side, side) for block, (c, side) in widths.items()})


def changed(given: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Every tensor with the same change."""
    return Outputs(tuple(map(change, given.heads)), {block: change(value) for block, value in given.features.items()})


def leaves(given: Outputs) -> tuple[Outputs, list[Tensor]]:
    """The outputs as tensors that get a gradient, and those."""
    result = changed(given, lambda value: value.detach().clone().requires_grad_())
    return result, [*result.heads, *result.features.values()]


def with_maps(given: Outputs) -> Outputs:
    """With the attention maps that a network puts out beside its features."""
    pairs = {block: attended(features) for block, features in given.features.items()}
    return Outputs(given.heads, *({block: pair[i] for block, pair in pairs.items()} for i in (0, 1)))


def batch_of(
    student: Outputs,
    teacher: Outputs,
    targets: Tensor = OBJECTS,
    networks: tuple[Network, Network] = (NETWORK, NETWORK),
    pairing: Pairing | None = None,
) -> DistillationBatch:
    pairing = pairing or pair(*networks, SEVERAL)
    yolos = tuple(network.yolos for network in networks)
    return DistillationBatch(with_maps(student), with_maps(teacher), yolos, pairing, targets, SIZE, RULE)


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of probabilities from logits, as it is written."""
    q, p = student.sigmoid(), teacher.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def decoded(head: Tensor, yolo: Yolo, anchor: int, stride: int, cell: tuple[int, int, int]) -> Tensor:
    """The box that an anchor predicts in a cell, relative to it, in cells."""
    picture, row, column = cell
    shape = torch.tensor(yolo.head_anchors[anchor]) / stride
    return box_offsets(split_head(head, yolo)[picture, anchor, row, column], shape, yolo)


def scores(head: Tensor, yolo: Yolo, anchor: int) -> tuple[Tensor, Tensor]:
    """Logits of objectness [B, H, W] and of the classes [B, H, W, C] of an anchor."""
    values = split_head(head, yolo)[:, anchor, ..., 4:]
    values = values.clamp(1e-6, 1 - 1e-6).logit() if yolo.new_coords else values
    return values[..., 0], values[..., 1:]


def from_heads(batch: DistillationBatch) -> dict[str, Tensor]:
    """Terms of scores and boxes, one pair of anchors and one positive after the other; T = 3."""
    terms = dict.fromkeys(("objectness", "classes", "class_softmax", "box", "box_bounded"), torch.zeros(()).double())
    attention, count = torch.zeros(()).double(), 0
    positives = assign(batch.targets, batch.yolos[0], [(8, 8), (16, 16)], SIZE, RULE)
    for heads in batch.pairing.heads:
        mine, theirs = batch.yolos[0][heads.student], batch.yolos[1][heads.teacher]
        student, teacher = batch.student.heads[heads.student], batch.teacher.heads[heads.teacher]
        for anchor, partner in heads.anchors:
            (z, classes), (z_teacher, softened) = scores(student, mine, anchor), scores(teacher, theirs, partner)
            certainty = z_teacher.sigmoid()
            attention = attention + certainty.sum()
            terms["objectness"] = terms["objectness"] + bernoulli_kl(z, z_teacher).sum()
            apart = bernoulli_kl(classes / 3, softened / 3).mean(-1)
            terms["classes"] = terms["classes"] + 9 * (certainty * apart).sum()
            q, p = (classes / 3).softmax(-1), (softened / 3).softmax(-1)
            terms["class_softmax"] = terms["class_softmax"] + 9 * (certainty * (p * (p / q).log()).sum(-1)).sum()
        match, stride = dict(heads.anchors), STRIDES[heads.student]
        for picture, anchor, row, column, item, _ in zip(*positives[heads.student], strict=True):
            if int(anchor) in match:
                cell = (int(picture), int(row), int(column))
                box = decoded(student, mine, int(anchor), stride, cell)
                taught = decoded(teacher, theirs, match[int(anchor)], stride, cell)
                terms["box"] = terms["box"] + 1 - similarity(box, taught, "ciou")
                near, nearer = (similarity(one, item.double(), "ciou") for one in (box, taught))
                terms["box_bounded"] = terms["box_bounded"] + (1 - near) * (nearer > near)
                count += 1
    divisors = {"box": max(1, count), "box_bounded": max(1, count)}
    return {term: value / divisors.get(term, attention.clamp(min=1)) for term, value in terms.items()}


def near_objects(targets: Tensor, pictures: int) -> list[Tensor]:
    """The mask of Wang et al. as the paper words it, one anchor at a time."""
    masks = [torch.zeros(pictures, 64 // stride, 64 // stride, dtype=torch.bool) for stride in STRIDES]
    for picture, _, cx, cy, w, h in targets.double().tolist():
        cx, cy, w, h = 64 * cx, 64 * cy, 64 * w, 64 * h
        best = [np.zeros(mask.shape[1:]) for mask in masks]
        for overlaps, stride, yolo in zip(best, STRIDES, NETWORK.yolos, strict=True):
            for (row, column), (aw, ah) in itertools.product(np.ndindex(*overlaps.shape), yolo.head_anchors):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                across = min(cx + w / 2, x + aw / 2) - max(cx - w / 2, x - aw / 2)
                down = min(cy + h / 2, y + ah / 2) - max(cy - h / 2, y - ah / 2)
                shared = max(0, across) * max(0, down)
                overlaps[row, column] = max(overlaps[row, column], shared / (w * h + aw * ah - shared))
        for mask, overlaps in zip(masks, best, strict=True):
            mask[int(picture)] |= torch.from_numpy(overlaps > NEARNESS * max(o.max() for o in best))
    return masks


def attention(batch: DistillationBatch, group: str | None, masked: bool) -> Iterator[Tensor]:
    """Distance of the maps of each feature, mean over pictures."""
    for features in batch.pairing.features:
        if group in (None, features.group):
            blocks = ((batch.student, features.student), (batch.teacher, features.teacher))
            maps = [given.features[block].square().sum(1) for given, block in blocks]
            if masked:
                near = project(near_objects(batch.targets, len(maps[0])), tuple(maps[0].shape[1:]))
                maps = [map_ * near for map_ in maps]
            mine, theirs = (map_.flatten(1) for map_ in maps)
            lengths = [map_.norm(dim=1, keepdim=True).clamp(min=1e-12) for map_ in (mine, theirs)]
            yield (mine / lengths[0] - theirs / lengths[1]).square().sum(1).mean()


def from_features(batch: DistillationBatch) -> dict[str, Tensor]:
    """Terms of attention maps."""
    terms = {name: list(attention(batch, ATTENTION[name], name.endswith("masked"))) for name in ATTENTION}
    zero = torch.zeros(()).double()
    return {name: torch.stack(values).mean() if values else zero for name, values in terms.items()}


def reversed_heads() -> tuple[Network, Pairing]:
    """A teacher with its finest head first, as YOLOv4 has it and YOLOv3 has not."""
    first, second = NETWORK.heads
    blocks = list(NETWORK.blocks)
    blocks[first], blocks[second] = blocks[second], blocks[first]
    pairing = pair(NETWORK, NETWORK, SEVERAL)
    heads = tuple(p._replace(teacher=1 - p.teacher) for p in pairing.heads)
    return dataclasses.replace(NETWORK, blocks=tuple(blocks)), pairing._replace(heads=heads)


REVERSED = reversed_heads()
CASES = {
    "the same network": {"targets": MORE},
    "its teacher": {"student": outputs(1)},
    "other anchors": {"networks": (NETWORK, OTHER_ANCHORS), "targets": MORE},
    "heads in another order": {
        "teacher": Outputs(outputs(1).heads[::-1], outputs(1).features),
        "networks": (NETWORK, REVERSED[0]),
        "pairing": REVERSED[1],
    },
    "anchors and heads without a partner": {
        "targets": SMALL,
        "pairing": Pairing((HeadPair(1, 1, ((0, 2), (2, 1))),), pair(NETWORK, NETWORK, SEVERAL).features, ()),
    },
    "probabilities": {
        "student": changed(outputs(), torch.sigmoid),
        "teacher": changed(outputs(1), torch.sigmoid),
        "networks": (ACTIVATED, ACTIVATED),
    },
    "a teacher of probabilities": {"teacher": changed(outputs(1), torch.sigmoid), "networks": (NETWORK, ACTIVATED)},
    "no objects": {"targets": OBJECTS[:0]},
    "one image": {"student": outputs(batch=1), "teacher": outputs(1, batch=1), "targets": OBJECTS[:1]},
    "a teacher that sees nothing": {"teacher": changed(outputs(1), lambda value: value - 30)},
}


@pytest.mark.parametrize("name", CASES)
def test_every_term_and_its_gradient_are_those_of_the_papers(name):
    case = {"student": outputs(), "teacher": outputs(1), **CASES[name]}
    ours, parts = leaves(case.pop("student"))
    teacher = case.pop("teacher")
    batch = batch_of(ours, teacher, **case)
    precise, precise_parts = leaves(changed(ours, Tensor.double))
    wanted_batch = batch_of(precise, changed(teacher, Tensor.double), **case)
    wanted = from_heads(wanted_batch) | from_features(wanted_batch)
    assert wanted.keys() == TERMS.keys()
    for term, formula in TERMS.items():
        value = formula(batch)
        assert value.item() == pytest.approx(wanted[term].item(), rel=1e-5, abs=1e-6), term
        pairs = [(value, parts), (wanted[term], precise_parts)]
        gradients = [
            torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
            if total.requires_grad
            else [torch.zeros_like(tensor) for tensor in tensors]
            for total, tensors in pairs
        ]
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected.float(), atol=1e-7, rtol=1e-4, msg=term)
    for mask, expected in zip(batch.masks, near_objects(batch.targets, len(ours.heads[0])), strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_binary_kl_of_all_kinds_of_logits(t):
    """From certain to certain; beyond 100 no probability is left in float32. Rounding a σ costs a share of z."""
    logits = torch.tensor([-300.0, -40, -9, -1, 0, 0.5, 8, 30, 200])
    student, teacher = (values.flatten()[:, None] for values in torch.meshgrid(logits, logits, indexing="ij"))
    mine, theirs = student.double() / t, teacher.double() / t
    sure = [torch.nn.functional.softplus(values) for values in (mine, theirs)]
    wanted = (sure[0] - sure[1] - theirs.sigmoid() * (mine - theirs))[:, 0]
    bound = EPSILON * (1 + 2 * (mine - theirs).abs()[:, 0])
    assert bool(((binary_kl(student, teacher, t) - wanted).abs() <= bound).all())


def test_objects_and_pictures_of_all_processes_count():
    """The mean over two processes, one with two of three pictures, and one with all the objects, is that of one."""
    student = outputs(batch=3)
    sizes = torch.tensor([1.0, 0.1, 0.5])
    teacher = changed(outputs(1, batch=3), lambda value: value * sizes.view(-1, *[1] * (value.dim() - 1)))
    targets = OBJECTS.clone()
    targets[:, 0] = 0
    terms = ("objectness", "classes", "class_softmax", "box", "box_bounded", "attention")
    whole = batch_of(student, teacher, targets)
    totals = [whole.objects_seen, len(whole.boxes.objects), len(whole.boxes.objects), 3] * 2
    sums = dict.fromkeys(terms, 0.0)
    for pictures, objects in ((slice(1), targets), (slice(1, 3), targets[:0])):
        parts = [changed(given, lambda value, i=pictures: value[i]) for given in (student, teacher)]
        batch = batch_of(*parts, objects)
        batch.divisor = lambda _: totals.pop(0) / 2
        for term in terms:
            sums[term] += TERMS[term](batch).item() / 2
    assert sums == pytest.approx({term: TERMS[term](whole).item() for term in terms}, rel=1e-4)


def large(kind: torch.dtype, sign: int) -> Callable[[Tensor], Tensor]:
    """Values next to the end of float16; the rows of the positives are such, too."""
    return lambda value: (sign * 6e4 * torch.sign(value.abs() - 0.1)).to(kind)


EXTREMES = {
    **{
        f"{kind} {signs}": ((NETWORK, NETWORK), *(large(kind, sign) for sign in signs))
        for kind in (torch.float16, torch.bfloat16)
        for signs in itertools.product((1, -1), repeat=2)
    },
    "probabilities": (
        (ACTIVATED, ACTIVATED),
        lambda value: (5 * value).round().clamp(-1, 2),
        lambda value: value.round().clamp(0, 1),
    ),
}
"""Networks, and changes of the student's and the teacher's outputs."""


@pytest.mark.parametrize("name", EXTREMES)
def test_terms_are_compared_in_float32_and_stay_finite_however_large(name):
    networks, *changes = EXTREMES[name]
    student, teacher = (changed(outputs(seed), change) for seed, change in enumerate(changes))
    for term, formula in TERMS.items():
        ours, parts = leaves(student)
        value = formula(batch_of(ours, teacher, networks=networks))
        assert value.dtype == torch.float32 and torch.isfinite(value), term
        value.backward()
        assert all(part.grad is None or torch.isfinite(part.grad).all() for part in parts), term


def test_an_object_is_looked_at_where_its_size_is_predicted():
    """An object of 6 × 6 pixels at (20, 40): the anchors of the first head are too large."""
    heads = [torch.zeros(3, 1, 64 // stride, 64 // stride) for stride in STRIDES]
    masks = object_mask(torch.tensor([[1, 0, 20 / 64, 40 / 64, 6 / 64, 6 / 64]]), NETWORK.yolos, heads, SIZE)
    picture, row, column = masks[1].nonzero(as_tuple=True)
    assert (picture == 1).all() and not masks[0].any()
    assert (((row + 0.5) * 4 - 40).abs() < 12).all() and (((column + 0.5) * 4 - 20).abs() < 12).all()


def test_several_masks_in_a_finer_and_a_coarser_grid():
    coarse, fine = torch.zeros(1, 2, 2, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    coarse[0, 0, 1] = fine[0, 3, 0] = True
    up = project((coarse, fine), (8, 8))
    assert up[0, :4, 4:].all() and up[0, 6:, :2].all() and up.sum() == 16 + 4
    assert project((coarse, fine), (4, 4)).sum() == 4 + 1
    assert project((coarse, fine), (2, 2)).tolist() == [[[False, True], [True, False]]]
    assert project((coarse, fine), (1, 1)).all()


def test_weights_of_two_strategies_are_added_and_every_term_is_known():
    assert distillation("4", "1").terms["attention"] == KD["4"].terms["attention"] + AT["1"].terms["attention"]
    assert distillation("3", "3", weight=0.5).terms["box"] == pytest.approx(KD["3"].terms["box"])
    assert TERMS.keys() == QUANTITIES.keys()
    for strategy in (*KD.values(), *AT.values()):
        assert set(strategy.terms) <= set(TERMS) and min(strategy.terms.values()) > 0
