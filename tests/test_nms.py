"""From rows to detections."""

from __future__ import annotations

import pytest
import torch
import torchvision

from utils.detection.decode import non_max_suppression

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


def test_keeping_enough_candidates_changes_nothing():
    torch.manual_seed(1)
    rows = torch.rand(1, 400, 7) * torch.tensor([100, 100, 30, 30, 1, 1, 1])
    assert torch.equal(run(rows, conf=0.1, max_nms=400), run(rows, conf=0.1, max_nms=100_000))


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
