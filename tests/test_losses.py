"""The detection loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.nets import tiny
from utils.darknet.blocks import Yolo
from utils.detection.losses import detection_loss
from utils.detection.settings import ASSIGNMENTS, LossSettings

NETWORK = tiny()
SIZE = (64, 64)
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


def test_a_perfect_prediction_costs_almost_nothing():
    """One object in the middle of a cell, as large as anchor (8, 8): logits that say so."""
    outputs = [head.detach() for head in heads(0.0, batch=1)]
    for head in outputs:
        head.view(1, 3, 7, *head.shape[2:])[:, :, 4:] = -20
    fine = outputs[1].view(1, 3, 7, 16, 16)
    fine[0, 1, :, 5, 9] = torch.tensor([0.0, 0, 0, 0, 20, -20, 20])
    row = torch.tensor([[0, 1, 9.5 / 16, 5.5 / 16, 8 / 64, 8 / 64]])
    strict = [dataclasses.replace(yolo, iou_thresh=1.0) for yolo in NETWORK.yolos]
    terms = detection_loss(outputs, row, strict, SIZE, LossSettings(assignment="darknet"))
    assert terms.total.item() == pytest.approx(0, abs=1e-4)


def test_ignored_predictions_have_no_objectness_gradient():
    outputs = [head.requires_grad_() for head in heads(0.0, batch=1)]
    yolos = [dataclasses.replace(yolo, ignore_thresh=-1.0, iou_thresh=1.0) for yolo in NETWORK.yolos]
    detection_loss(outputs, OBJECTS[:1], yolos, SIZE, LossSettings(assignment="darknet")).total.backward()
    touched = sum(int((head.grad.view(1, 3, 7, -1)[:, :, 4] != 0).sum()) for head in outputs)
    assert touched == 1


def test_pictures_do_not_see_one_another():
    """The loss of a batch of one picture twice is the loss of the picture: sums grow with the positives."""
    single = [head[:1] for head in heads()]
    double = [torch.cat((head, head)) for head in single]
    twice = torch.cat((OBJECTS[:1], OBJECTS[:1] + torch.tensor([1.0, 0, 0, 0, 0, 0])))
    torch.testing.assert_close(loss(double, twice).total, loss(single, OBJECTS[:1]).total)


def test_two_objects_on_one_anchor_keep_the_better_objectness_target():
    once, again = loss(heads(0.0), OBJECTS[:1]), loss(heads(0.0), OBJECTS[:1].repeat(2, 1))
    torch.testing.assert_close(again.box, once.box)
    torch.testing.assert_close(again.objectness * 2, once.objectness)


def test_new_coords_takes_probabilities():
    yolo = Yolo(mask=(0,), anchors=((8.0, 8.0),), classes=1, new_coords=True, scale_x_y=2.0)
    head = torch.full((1, 6, 8, 8), 0.5, requires_grad=True)
    terms = detection_loss([head], torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]]), [yolo], SIZE, LossSettings())
    terms.total.backward()
    assert torch.isfinite(head.grad).all()
    assert detection_loss([head], OBJECTS[:0], [yolo], SIZE, LossSettings()).objectness.item() == pytest.approx(
        64 * math.log(2), rel=1e-5
    )


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
