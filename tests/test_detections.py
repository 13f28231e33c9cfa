"""From raw heads to boxes, their overlaps, the detections that are kept, and COCO's results format."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torchvision

from tests.nets import tiny
from utils.darknet.blocks import Yolo
from utils.detection.decode import decode, non_max_suppression, shape_iou, similarity, to_corners
from utils.detection.evaluate import category_ids, coco_results, image_id

# Boxes


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


# Heads


@pytest.mark.parametrize(
    ("scale", "new_coords", "expected"),
    [
        (1.1, False, (88.87708, 118.26310, 83.99299, 40.74500)),
        (2.0, True, (89.59469, 116.84200, 83.78336, 39.84181)),
        (1.05, True, (88.83721, 118.34204, 83.78336, 39.84181)),  # the 2 of width and height is no scale_x_y
    ],
)
def test_box_has_its_worked_value(scale, new_coords, expected):
    """26 × 26 cells of a 416 input, cell (5, 7), anchor (76, 55)."""
    yolo = Yolo(mask=(0,), anchors=((76.0, 55.0),), classes=1, scale_x_y=scale, new_coords=new_coords)
    values = torch.tensor((0.2, -0.4, 0.1, -0.3))
    head = torch.zeros(1, 6, 26, 26)
    head[0, :4, 7, 5] = values.sigmoid() if new_coords else values
    rows = decode([head], [yolo], (416, 416)).view(26, 26, 6)
    torch.testing.assert_close(rows[7, 5, :4], torch.tensor(expected), rtol=0, atol=1e-3)


def test_rows_run_through_heads_anchors_rows_columns():
    network = tiny()
    heads = [torch.zeros(1, 21, 8, 8), torch.zeros(1, 21, 16, 16)]
    heads[1].view(1, 3, 7, 16, 16)[0, 2, 4, 5, 9] = 8.0
    rows = decode(heads, network.yolos, (64, 64))
    assert rows.shape == (1, 3 * 64 + 3 * 256, 7)
    assert rows[0, :, 4].argmax().item() == 192 + 2 * 256 + 5 * 16 + 9


def test_a_network_input_that_is_not_square_has_two_strides_at_most_one_pixel_apart():
    yolo = Yolo(mask=(0,), anchors=((8.0, 8.0),), classes=1)
    rows = decode([torch.zeros(1, 6, 4, 6)], [yolo], (32, 48)).view(4, 6, 6)
    assert rows[3, 5, :2].tolist() == [44.0, 28.0]


def test_no_box_is_infinite():
    yolo = Yolo(mask=(0,), anchors=((8.0, 8.0),), classes=1)
    assert torch.isfinite(decode([torch.full((1, 6, 4, 4), 1e6)], [yolo], (32, 32))).all()


# Suppression


ROWS = torch.tensor(
    [
        [
            [10, 10, 10, 10, 0.9, 0.8, 0.3],
            [11, 10, 10, 10, 0.9, 0.7, 0.1],
            [40, 40, 8, 8, 0.8, 0.1, 0.9],
            [40, 40, 8, 8, 0.2, 0.1, 0.9],
        ],
    ]
)


def run(rows=ROWS, conf=0.25, iou=0.5, **options):
    return non_max_suppression(rows, conf, iou, **options)[0]


def test_the_better_of_two_overlapping_boxes_of_a_class_stays():
    found = run()
    assert found[:, 5].tolist() == [0, 1]
    torch.testing.assert_close(found[:, 4], torch.tensor([0.72, 0.72]))
    assert found[0, :4].tolist() == [5, 5, 15, 15]


@pytest.mark.parametrize(("threshold", "count"), [(0.59, 1), (0.61, 2)])
def test_a_box_goes_that_overlaps_by_more_than_the_threshold(threshold, count):
    """Two boxes of 20 x 20, 5 apart: 300 of 500."""
    rows = torch.tensor([[[20, 20, 20, 20, 0.9, 0.9, 0.1], [25, 20, 20, 20, 0.8, 0.9, 0.1]]])
    assert len(run(rows, iou=threshold)) == count


def test_a_row_gives_several_classes_only_with_multi_label():
    assert run(conf=0.2, multi_label=True)[:, 5].tolist().count(1) == 2
    assert run(conf=0.2)[:, 5].tolist().count(1) == 1


def test_agnostic_suppression_crosses_classes():
    rows = ROWS[:, :1].repeat(1, 2, 1)
    rows[0, 1, 5:] = torch.tensor([0.1, 0.7])
    assert len(run(rows)) == 2
    assert len(run(rows, agnostic=True)) == 1


def test_boxes_outside_of_the_picture_suppress_no_other_class():
    """In opposite corners, the second one as far outside as torchvision's offset of its class moves it."""
    rows = torch.tensor([[[400, 400, 40, 40, 0.9, 1, 0], [-16, -16, 50, 50, 0.8, 0, 1]]])
    assert len(run(rows, iou=0.6)) == 2


def test_only_the_wanted_classes_come_out():
    assert run(classes=[1])[:, 5].tolist() == [1]
    assert len(run(classes=[7])) == 0


def test_pictures_are_independent_and_empty_ones_give_no_rows():
    found = non_max_suppression(torch.cat((ROWS, torch.zeros_like(ROWS))), 0.25, 0.5)
    assert torch.equal(found[0], run())
    assert found[1].shape == (0, 6)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_at_most_max_det_detections_come_out_best_first(limit):
    torch.manual_seed(0)
    rows = torch.rand(1, 50, 8) * torch.tensor([100, 100, 5, 5, 1, 1, 1, 1])
    found = run(rows, max_det=limit)
    assert len(found) == limit
    assert (found[:-1, 4] >= found[1:, 4]).all()


@pytest.mark.parametrize("limit", [1, 5, 20])
def test_the_best_candidates_are_those_that_are_kept(limit):
    torch.manual_seed(2)
    rows = torch.rand(1, 60, 7) * torch.tensor([1000, 1000, 1, 1, 1, 1, 1])  # none overlaps another of its class
    best = run(rows, conf=0.1, iou=0.99, multi_label=True)[:limit]
    assert torch.equal(run(rows, conf=0.1, iou=0.99, multi_label=True, max_nms=limit), best)


@pytest.mark.parametrize("vanilla", [False, True])
def test_equal_confidences_keep_the_order_of_rows(vanilla, monkeypatch):
    """A quantized network has many; how torchvision groups classes depends on the device and the number of boxes."""
    way = torchvision.ops.boxes._batched_nms_vanilla if vanilla else torchvision.ops.boxes._batched_nms_coordinate_trick
    monkeypatch.setattr(torchvision.ops, "batched_nms", way)
    rows = torch.zeros(1, 400, 7)
    rows[0, :, 0] = torch.arange(400) * 10
    rows[0, :, 2:4] = 5
    rows[0, :, 4] = 0.9
    rows[0, :, 5:] = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)).gt(0.5) * 0.5 + 0.25
    expected = sorted(range(400), key=lambda row: -float(rows[0, row, 5:].amax()))
    assert run(rows, max_det=150)[:, 0].tolist() == [row * 10 - 2.5 for row in expected[:150]]
    assert run(rows, max_det=400, max_nms=150)[:, 0].tolist() == [row * 10 - 2.5 for row in expected[:150]]


# COCO


def test_category_ids_are_cocos_for_its_names_in_both_spellings(shared):
    names = (shared / "data/weights/coco.names").read_text().split("\n")[:80]
    document = json.loads((shared / "data/coco_mini/annotations/instances_val.json").read_text())
    want = tuple(category["id"] for category in document["categories"])
    assert category_ids(names) == want
    assert category_ids([category["name"] for category in document["categories"]]) == want


def test_category_ids_of_other_names_are_indices():
    assert category_ids(["person", "bicycle"]) == (0, 1)


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("a/000000000139.jpg", 139),
        ("COCO_val2014_000000000042.jpg", 42),
        ("BloodImage_00007.jpg", "BloodImage_00007"),
        ("1.5.png", "1.5"),
        ("٣.png", "٣"),
    ],
)
def test_image_id_is_the_number_of_the_file_or_its_stem(path, want):
    assert image_id(path) == want


def test_results_have_the_left_upper_corner_the_sides_and_the_ids():
    """Test_test_script.py has pycocotools read a file of them."""
    boxes, scores, classes = np.array([[10.0, 20, 30.5, 60]]), np.array([0.5]), np.array([1])
    rows = coco_results("7.jpg", boxes, scores, classes, (1, 3))
    assert rows == [{"image_id": 7, "category_id": 3, "bbox": [10.0, 20.0, 20.5, 40.0], "score": 0.5}]
