"""The detection loss, and which anchors answer for which objects."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou, complete_box_iou

from tests.nets import tiny
from utils.darknet.blocks import Yolo
from utils.detection.losses import assign, detection_loss
from utils.detection.settings import ASSIGNMENTS, LossSettings

NETWORK = tiny()
SIZE, GRIDS = (64, 64), ((16, 16), (8, 8))
ANCHORS = ((8.0, 8.0), (16.0, 16.0), (40.0, 40.0), (60.0, 20.0))
FINE = Yolo(mask=(0, 1), anchors=ANCHORS, classes=2, iou_thresh=0.213)
COARSE = Yolo(mask=(2, 3), anchors=ANCHORS, classes=2, iou_thresh=0.213)
OBJECTS = torch.tensor([[0, 1, 0.31, 0.42, 0.2, 0.25], [1, 0, 0.71, 0.66, 0.5, 0.4]])


def heads(fill: float | None = None, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, 21, 8, 8), (batch, 21, 16, 16)]
    return [torch.randn(s) if fill is None else torch.full(s, fill) for s in shapes]


def loss(outputs, targets=OBJECTS, **settings):
    return detection_loss(outputs, targets, NETWORK.yolos, SIZE, LossSettings(**settings))


@pytest.mark.parametrize("rule", sorted(ASSIGNMENTS))
@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_every_variant_has_a_finite_gradient(rule, kind):
    outputs = [head.requires_grad_() for head in heads()]
    loss(outputs, assignment=rule, iou_loss=kind, focal_gamma=1.5, label_smoothing=0.1).total.backward()
    assert all(torch.isfinite(head.grad).all() and head.grad.abs().sum() > 0 for head in outputs)


def test_without_objects_only_objectness_is_left():
    """Every logit 0: each of the 3 · (64 + 256) cells of each of 2 pictures costs ln 2."""
    terms = loss(heads(0.0), OBJECTS[:0])
    assert terms.box.item() == terms.classes.item() == 0
    assert terms.objectness.item() == pytest.approx(2 * 3 * 320 * math.log(2), rel=1e-5)


def test_total_is_the_sum_of_its_terms_and_gains_scale_them():
    plain, scaled = loss(heads()), loss(heads(), box_gain=10.0, class_gain=3.0)
    torch.testing.assert_close(plain.total, plain.box + plain.objectness + plain.classes)
    torch.testing.assert_close(scaled.box, 2 * plain.box)
    torch.testing.assert_close(scaled.classes, 3 * plain.classes)


@pytest.mark.parametrize("rule", sorted(ASSIGNMENTS))
def test_predictions_in_an_ignored_box_are_no_negatives(rule):
    """The left half of picture 0 is ignored, and boxes as large as the anchors are predicted around all cells' centres.

    Without an object each has a gradient, unless more than 0.7 of it lies in the left half.
    """
    outputs = [head.requires_grad_() for head in heads(0.0)]
    yolos = [dataclasses.replace(yolo, ignore_thresh=0.7) for yolo in NETWORK.yolos]
    ignored = torch.tensor([[0, 1, 0.25, 0.5, 0.5, 5.0]])
    settings = LossSettings(assignment=rule)
    detection_loss(outputs, OBJECTS[:0], yolos, SIZE, settings, ignored=ignored).total.backward()
    for head, yolo in zip(outputs, yolos, strict=True):
        side = head.shape[-1]
        touched = head.grad.view(2, 3, 7, side, side)[:, :, 4] != 0
        centre = (torch.arange(side) + 0.5) * 64 / side
        for anchor, (width, _) in enumerate(yolo.head_anchors):
            inside = (centre + width / 2).clamp(max=32) - (centre - width / 2).clamp(min=0)
            spared = inside / width > 0.7
            assert spared.any() and not spared.all()
            assert (touched[0, anchor] == ~spared).all() and touched[1].all()


@pytest.mark.parametrize("rule", sorted(ASSIGNMENTS))
def test_objects_in_an_ignored_box_are_learnt_as_without_it(rule):
    whole = torch.tensor([[0, 0, 0.5, 0.5, 9, 9], [1, 0, 0.5, 0.5, 9, 9.0]])
    gradients = []
    for ignored in (None, whole):
        outputs = [head.requires_grad_() for head in heads()]
        terms = detection_loss(outputs, OBJECTS, NETWORK.yolos, SIZE, LossSettings(assignment=rule), ignored=ignored)
        terms.total.backward()
        gradients.append([head.grad.view(2, 3, 7, *head.shape[2:]).transpose(1, 2) for head in outputs])
    for plain, spared in zip(*gradients, strict=True):
        positive = plain[:, 5:].any(dim=1)
        assert torch.equal(plain[:, :4], spared[:, :4]) and torch.equal(plain[:, 5:], spared[:, 5:])
        assert torch.equal(spared[:, 4], torch.where(positive, plain[:, 4], 0.0))


@pytest.mark.parametrize("rule", sorted(ASSIGNMENTS))
def test_objects_of_two_classes_in_one_cell_have_one_target_of_both(rule):
    """Their logits are pulled up alike, wherever they are; with two targets of one class each they would stop at 0."""
    two = OBJECTS[:1].repeat(2, 1)
    two[1, 1] = 1 - two[0, 1]
    outputs = [head.requires_grad_() for head in heads()]
    terms = loss(outputs, two, assignment=rule, box_gain=0.0, objectness_gain=0.0)
    terms.total.backward()
    slopes = torch.cat([head.grad.view(2, 3, 7, -1).transpose(2, 3)[..., 5:].reshape(-1, 2) for head in outputs])
    slopes = slopes[slopes.any(dim=1)]
    assert len(slopes) and (slopes < 0).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_focal_factor_has_a_gradient(gamma):
    """Σ |σ(z) − y|^γ BCE(z, y) over cells without an object, y = 0: its slope by finite differences, at z = 0.3."""
    outputs = [torch.full_like(head, 0.3).double().requires_grad_() for head in heads()]
    loss(outputs, OBJECTS[:0], focal_gamma=gamma).total.backward()

    def value(z: float) -> float:
        p = 1 / (1 + math.exp(-z))
        return -(p**gamma) * math.log1p(-p)

    slope = (value(0.3 + 1e-5) - value(0.3 - 1e-5)) / 2e-5
    grads = torch.cat([head.grad.view(2, 3, 7, -1)[:, :, 4].flatten() for head in outputs])
    torch.testing.assert_close(grads, torch.full_like(grads, slope), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("fill", "gamma"), [(0.0, 0.5), (0.0, 1.5), (0.5, 0.0)])
def test_new_coords_takes_probabilities(fill, gamma):
    """Their gradient is finite also where the prediction is perfect and focal."""
    yolo = Yolo(mask=(0,), anchors=((8.0, 8.0),), classes=1, new_coords=True, scale_x_y=2.0)
    for targets in (OBJECTS[:0], torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]])):
        head = torch.full((1, 6, 8, 8), fill, requires_grad=True)
        terms = detection_loss([head], targets, [yolo], SIZE, LossSettings(focal_gamma=gamma))
        terms.total.backward()
        assert torch.isfinite(head.grad).all()
        if len(targets) == 0:
            assert terms.objectness.item() == pytest.approx(64 * math.log(2) if fill else 0, rel=1e-5, abs=1e-4)
        broken = torch.full((1, 6, 8, 8), torch.nan, requires_grad=True)  # the training says what it means
        assert detection_loss([broken], targets, [yolo], SIZE, LossSettings()).total.isnan()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"iou_loss": "eiou"}, "allowed are iou"),
        ({"assignment": "atss"}, "darknet, ratio"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0"),
        ({"box_gain": -1.0}, "box_gain -1"),
    ],
)
def test_settings_refuse_what_they_cannot_do(values, match):
    with pytest.raises(ValueError, match=match):
        LossSettings(**values)


class Plain:
    """The loss of Darknet's rule, cell by cell in plain numbers: labels smoothed, heads with `scale_x_y`."""

    ANCHORS = ((8.0, 8.0), (16.0, 30.0), (40.0, 20.0), (60.0, 60.0))
    STRIDES = (8, 16)
    SMOOTHING = 0.1
    SETTINGS = LossSettings(label_smoothing=SMOOTHING)

    def __init__(self, classes: int, height: int, width: int) -> None:
        common = {"anchors": self.ANCHORS, "classes": classes, "iou_thresh": 0.213, "ignore_thresh": 0.5}
        self.yolos = [Yolo(mask=(0, 1), scale_x_y=1.2, **common), Yolo(mask=(2, 3), scale_x_y=1.05, **common)]
        self.classes, self.height, self.width = classes, height, width

    def terms(self, heads, targets) -> tuple[float, float, float]:
        """Box, objectness and class loss."""
        size = (self.width, self.height) * 2
        objects = [
            (int(row[0]), int(row[1]), [part * side for part, side in zip(row[2:], size, strict=True)])
            for row in targets.double().tolist()
        ]
        owned: dict[tuple[int, ...], list[int]] = {}
        for number, (picture, _, box) in enumerate(objects):
            overlaps = [overlap([0, 0, *box[2:]], [0, 0, *anchor]) for anchor in self.ANCHORS]
            for anchor, value in enumerate(overlaps):
                if value > 0.213 or anchor == overlaps.index(max(overlaps)):
                    stride = self.STRIDES[anchor // 2]
                    cell = (picture, anchor, int(box[1] // stride), int(box[0] // stride))
                    owned.setdefault(cell, []).append(number)
        box_loss = objectness = class_loss = 0.0
        for (picture, anchor, row, column), logits in self.cells(heads):
            found = self.decode(logits, anchor, row, column)
            mine = owned.get((picture, anchor, row, column), [])
            others = [box for owner, _, box in objects if owner == picture]
            if mine:
                objectness += cross_entropy(logits[4], max(overlap(found, objects[k][2]) for k in mine))
            elif all(overlap(found, box) <= 0.5 for box in others):
                objectness += cross_entropy(logits[4], 0.0)
            box_loss += sum(1 - overlap(found, objects[k][2], complete_box_iou) for k in mine)
            labels = {objects[k][1] for k in mine}
            for label, logit in enumerate(logits[5:] if mine else ()):
                wanted = (1 - self.SMOOTHING) * (label in labels) + self.SMOOTHING / 2
                class_loss += cross_entropy(logit, wanted)
        positives = sum(map(len, owned.values()))
        return box_loss / positives, objectness / positives, class_loss / positives

    def cells(self, heads):
        """(picture, anchor, row, column) and logits of every cell."""
        for number, head in enumerate(heads):
            rows = head.double().unflatten(1, (2, 5 + self.classes)).movedim(2, -1)
            for place in np.ndindex(*rows.shape[:-1]):
                picture, anchor, row, column = place
                yield (picture, 2 * number + anchor, row, column), rows[place].tolist()

    def decode(self, logits, anchor, row, column) -> list[float]:
        """Center and size in pixels."""
        stride, (width, height) = self.STRIDES[anchor // 2], self.ANCHORS[anchor]
        scale = self.yolos[anchor // 2].scale_x_y
        x, y = (scale / (1 + math.exp(-logit)) - (scale - 1) / 2 for logit in logits[:2])
        return [(column + x) * stride, (row + y) * stride, width * math.exp(logits[2]), height * math.exp(logits[3])]


def overlap(a, b, of=box_iou) -> float:
    """IoU of two boxes cx, cy, w, h, or its complete form (Zheng et al., arXiv:1911.08287), as torchvision has it."""
    corners = box_convert(torch.tensor([a, b], dtype=torch.float64), "cxcywh", "xyxy")
    return of(corners[:1], corners[1:]).item()


def cross_entropy(logit: float, wanted: float) -> float:
    """Binary, with the logistic function."""
    return max(logit, 0) - logit * wanted + math.log1p(math.exp(-abs(logit)))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64)])
@pytest.mark.parametrize("classes", [1, 3])
def test_it_is_that_of_plain_numbers(classes, height, width):
    """Inputs wider and higher than a square; a picture without objects; two objects of two classes in a cell."""
    plain = Plain(classes, height, width)
    generator = torch.Generator().manual_seed(classes)
    heads = [
        torch.randn(3, 2 * (5 + classes), height // stride, width // stride, generator=generator)
        for stride in plain.STRIDES
    ]
    targets = torch.tensor([[0, 0], [0, classes - 1], [2, 0], [0, 0]])
    targets = torch.cat([targets, 0.15 + 0.6 * torch.rand(4, 4, generator=generator)], 1)
    targets[3] = targets[0] * torch.tensor([1, 1, 1, 1, 1.05, 1.05])
    targets[3, 1] = classes - 1
    got = detection_loss(heads, targets, plain.yolos, (height, width), plain.SETTINGS)
    box, objectness, of_classes = plain.terms(heads, targets)
    torch.testing.assert_close(got.box.item(), 5 * box, rtol=1e-4, atol=0)
    torch.testing.assert_close(got.objectness.item(), objectness, rtol=1e-4, atol=0)
    torch.testing.assert_close(got.classes.item(), of_classes, rtol=1e-4, atol=0)


def targets(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)


def positives(rows: torch.Tensor, rule: str, yolos=(FINE, COARSE)):
    return assign(rows, yolos, GRIDS, SIZE, ASSIGNMENTS[rule])


def test_every_head_whose_mask_holds_the_best_anchor_number_answers():
    """yolov4-tiny: 81 × 82 is in the masks of both heads; 10 × 14 in neither, and 23 × 27 is the best of the others."""
    anchors = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
    yolos = [Yolo(mask=mask, anchors=anchors, classes=2) for mask in ((3, 4, 5), (1, 2, 3))]
    sides = ((80, 84), (24, 26), (10, 14))
    rows = targets(*((0, 1, 0.3, 0.6, width / 416, height / 416) for width, height in sides))
    coarse, fine = assign(rows, yolos, ((13, 13), (26, 26)), (416, 416), ASSIGNMENTS["darknet"])
    assert (coarse.anchor.tolist(), coarse.row.tolist(), coarse.column.tolist()) == ([0], [7], [3])
    assert (fine.anchor.tolist(), fine.row.tolist(), fine.column.tolist()) == ([2, 0, 0], [15] * 3, [7] * 3)


def test_heads_with_anchors_of_their_own_answer_each_for_itself():
    yolos = [Yolo(mask=(0, 1), anchors=ANCHORS[2 * i : 2 * i + 2], classes=2) for i in (0, 1)]
    parts = positives(targets((0, 0, 0.5, 0.5, 17 / 64, 17 / 64)), "darknet", yolos)
    assert [part.anchor.tolist() for part in parts] == [[1], [1]]


def test_ratio_takes_every_anchor_within_four_times_the_sides():
    """12 × 12 px: 8 and 16 are within 4 ×, 40 as well (3.33), 60 × 20 is not (60 / 12 = 5)."""
    fine, coarse = positives(targets((0, 0, 0.53, 0.53, 12 / 64, 12 / 64)), "ratio")
    assert sorted(set(fine.anchor.tolist())) == [0, 1]
    assert coarse.anchor.tolist() == [0]


@pytest.mark.parametrize(("scale", "cells"), [(1.05, 1), (2.0, 3)])
def test_a_neighbour_cell_is_positive_only_where_its_decoded_centre_reaches(scale, cells):
    yolo = dataclasses.replace(FINE, mask=(1,), scale_x_y=scale)
    rows = targets((0, 0, (5 + 0.2) / 16, (7 + 0.7) / 16, 0.25, 0.25))
    (part,) = assign(rows, [yolo], GRIDS[:1], SIZE, ASSIGNMENTS["ratio"])
    assert len(part.image) == cells
    low, high = -(scale - 1) / 2, 1 + (scale - 1) / 2
    assert ((part.boxes[:, :2] > low) & (part.boxes[:, :2] < high)).all()
    centre = part.boxes[:, :2] + torch.stack((part.column, part.row), dim=1)
    torch.testing.assert_close(centre, torch.tensor([[5.2, 7.7]]).expand(cells, 2))


@pytest.mark.parametrize("rule", sorted(ASSIGNMENTS))
def test_a_centre_on_the_far_edge_stays_inside_the_grid(rule):
    for part, grid in zip(positives(targets((3, 0, 1.0, 1.0, 0.25, 0.25)), rule), GRIDS, strict=True):
        assert (part.row <= grid[0] - 1).all()
        assert (part.column <= grid[1] - 1).all()
        assert (part.image == 3).all()
