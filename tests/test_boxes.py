"""The IoU family against worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from utils.boxes import shape_iou, similarity, to_corners

PAIRS = [
    (
        (0.5, 0.5, 0.4, 0.4),
        (0.6, 0.55, 0.3, 0.5),
        {"iou": 0.476190, "giou": 0.409524, "diou": 0.448566, "ciou": 0.447487},
    ),
    (
        (0.2, 0.2, 0.2, 0.2),
        (0.7, 0.7, 0.2, 0.4),
        {"iou": 0.0, "giou": -0.785714, "diou": -0.442478, "ciou": -0.444167},
    ),
]


@pytest.mark.parametrize(("a", "b", "expected"), PAIRS)
def test_similarities_have_their_worked_values(a, b, expected):
    for kind, value in expected.items():
        assert similarity(torch.tensor(a), torch.tensor(b), kind).item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_similarity_is_one_for_equal_boxes_and_symmetric(kind):
    torch.manual_seed(0)
    a, b = torch.rand(50, 4) + 0.01, torch.rand(50, 4) + 0.01
    torch.testing.assert_close(similarity(a, a, kind), torch.ones(50))
    torch.testing.assert_close(similarity(a, b, kind), similarity(b, a, kind))
    assert (similarity(a, b, kind) <= 1).all()


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_similarity_is_finite_with_a_finite_gradient_for_degenerate_boxes(kind):
    a = torch.zeros(1, 4, requires_grad=True)
    value = similarity(a, torch.zeros(1, 4), kind)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(a.grad).all()


def test_alpha_is_a_constant_for_the_gradient():
    """CIoU = DIoU − α v."""
    a, b = torch.tensor([[10.0, 10.0, 8.0, 4.0]], requires_grad=True), torch.tensor([[12.0, 11.0, 5.0, 9.0]])
    v = 4 / math.pi**2 * (torch.atan(a[:, 2] / a[:, 3]) - torch.atan(b[:, 2] / b[:, 3])) ** 2
    alpha = (v / (1 - similarity(a, b, "iou") + v)).detach()
    want, got = similarity(a, b, "diou") - alpha * v, similarity(a, b, "ciou")
    torch.testing.assert_close(got, want)
    (mine,), (other,) = torch.autograd.grad(got.sum(), a), torch.autograd.grad(want.sum(), a)
    torch.testing.assert_close(mine, other)


def test_corners_lie_half_a_side_from_the_centre():
    corners = to_corners(torch.tensor([[[10.0, 20.0, 4.0, 6.0]]]))
    assert corners.tolist() == [[[8.0, 17.0, 12.0, 23.0]]]


def test_shape_iou_is_the_iou_of_centred_boxes():
    """3 × 2 on 2 × 4: overlap 2 · 2 = 4, union 6 + 8 − 4 = 10."""
    assert shape_iou(torch.tensor([[3.0, 2.0]]), torch.tensor([[2.0, 4.0]])).item() == pytest.approx(0.4)
