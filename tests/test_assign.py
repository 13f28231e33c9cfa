"""Which anchors answer for which objects."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from utils.darknet.blocks import Yolo
from utils.detection.losses import assign
from utils.detection.settings import ASSIGNMENTS

ANCHORS = ((8.0, 8.0), (16.0, 16.0), (40.0, 40.0), (60.0, 20.0))
FINE = Yolo(mask=(0, 1), anchors=ANCHORS, classes=2, iou_thresh=0.213)
COARSE = Yolo(mask=(2, 3), anchors=ANCHORS, classes=2, iou_thresh=0.213)
SIZE, GRIDS = (64, 64), ((16, 16), (8, 8))


def targets(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)


def found(rows: torch.Tensor, rule: str, yolos=(FINE, COARSE)):
    return assign(rows, yolos, GRIDS, SIZE, ASSIGNMENTS[rule])


def test_darknet_takes_the_best_anchor_and_those_above_iou_thresh():
    """17 × 17 px: IoU with 16 × 16 is 256/289, with 8 × 8 64/289 = 0.22, with 40 × 40 289/1600 = 0.18."""
    fine, coarse = found(targets((0, 1, 0.5, 0.25, 17 / 64, 17 / 64)), "darknet")
    assert sorted(fine.anchor.tolist()) == [0, 1]
    assert coarse.anchor.tolist() == [1]  # 60 × 20: overlap 17 · 17, IoU 289/1200 = 0.24
    assert fine.row.unique().tolist() == [4]
    assert fine.column.unique().tolist() == [8]
    assert fine.labels.unique().tolist() == [1]


def test_darknet_leaves_no_object_without_an_anchor():
    strict = [dataclasses.replace(yolo, iou_thresh=1.0) for yolo in (FINE, COARSE)]
    torch.manual_seed(0)
    rows = torch.cat((torch.zeros(40, 2), torch.rand(40, 4) * 0.9 + 0.05), dim=1)
    assert sum(len(part.image) for part in found(rows, "darknet", strict)) == 40


def test_every_head_whose_mask_holds_the_best_anchor_number_answers():
    """yolov4-tiny: 81 × 82 is number 3, in the masks of both heads."""
    anchors = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
    yolos = [Yolo(mask=mask, anchors=anchors, classes=2) for mask in ((3, 4, 5), (1, 2, 3))]
    rows = targets((0, 1, 0.3, 0.6, 80 / 416, 84 / 416), (0, 0, 0.3, 0.6, 24 / 416, 26 / 416))
    coarse, fine = assign(rows, yolos, ((13, 13), (26, 26)), (416, 416), ASSIGNMENTS["darknet"])
    assert (coarse.anchor.tolist(), coarse.row.tolist(), coarse.column.tolist()) == ([0], [7], [3])
    assert (fine.anchor.tolist(), fine.row.tolist(), fine.column.tolist()) == ([2, 0], [15, 15], [7, 7])


def test_an_anchor_that_is_in_no_mask_leaves_its_objects_to_the_next_best():
    """10 × 14 is in neither mask of yolov4-tiny; 23 × 27 is the best of the others."""
    anchors = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
    yolos = [Yolo(mask=mask, anchors=anchors, classes=2) for mask in ((3, 4, 5), (1, 2, 3))]
    rows = targets((0, 1, 0.3, 0.6, 10 / 416, 14 / 416))
    coarse, fine = assign(rows, yolos, ((13, 13), (26, 26)), (416, 416), ASSIGNMENTS["darknet"])
    assert (len(coarse.anchor), fine.anchor.tolist()) == (0, [0])


def test_heads_with_anchors_of_their_own_answer_each_for_itself():
    yolos = [Yolo(mask=(0, 1), anchors=ANCHORS[2 * i : 2 * i + 2], classes=2) for i in (0, 1)]
    parts = found(targets((0, 0, 0.5, 0.5, 17 / 64, 17 / 64)), "darknet", yolos)
    assert [part.anchor.tolist() for part in parts] == [[1], [1]]


def test_ratio_takes_every_anchor_within_four_times_the_sides():
    """12 × 12 px: 8 and 16 are within 4 ×, 40 as well (3.33), 60 × 20 is not (60 / 12 = 5)."""
    fine, coarse = found(targets((0, 0, 0.53, 0.53, 12 / 64, 12 / 64)), "ratio")
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
def test_no_objects_give_no_positives(rule):
    assert [len(part.image) for part in found(targets(), rule)] == [0, 0]


@pytest.mark.parametrize("rule", sorted(ASSIGNMENTS))
def test_a_centre_on_the_far_edge_stays_inside_the_grid(rule):
    for part, grid in zip(found(targets((3, 0, 1.0, 1.0, 0.25, 0.25)), rule), GRIDS, strict=True):
        assert (part.row <= grid[0] - 1).all()
        assert (part.column <= grid[1] - 1).all()
        assert (part.image == 3).all()
