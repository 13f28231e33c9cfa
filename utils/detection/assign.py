"""Target assignment: which anchor in which cell answers for which object. One function; the variants are values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.boxes import shape_iou
from utils.darknet.blocks import Yolo
from utils.detection.settings import Assignment

REACH = 0.95
"""Share of the interval a decoded centre can lie in that a neighbour cell may have to use: at the interval's ends the
sigmoid is saturated and the gradient gone."""


class Positives(NamedTuple):
    """The P anchor cells of one head that answer for an object, and for which one."""

    image: Tensor
    """[P] picture in the batch."""
    anchor: Tensor
    """[P] anchor, in the order of the head's mask."""
    row: Tensor
    """[P] row of the cell."""
    column: Tensor
    """[P] column of the cell."""
    boxes: Tensor
    """[P, 4] cx, cy, w, h of the object; centre relative to the cell's corner, all in cells."""
    labels: Tensor
    """[P] class of the object."""


def assign(
    targets: Tensor, yolos: Sequence[Yolo], grids: Sequence[tuple[int, int]], size: tuple[int, int], rule: Assignment
) -> list[Positives]:
    """Positives of every head.

    Args:
        targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input.
        yolos: head blocks.
        grids: height and width of each head's grid, in cells.
        size: height and width of the network input, in pixels.
        rule: who answers.

    Returns:
        One Positives a head; an object may have several positives or, without `rule.best`, none.
    """
    shapes = targets[:, 4:6] * targets.new_tensor((size[1], size[0]))
    return [
        _positives(targets, _chosen(shapes, yolo, yolos, rule), grid, yolo, rule.neighbours)
        for yolo, grid in zip(yolos, grids, strict=True)
    ]


def _chosen(shapes: Tensor, yolo: Yolo, yolos: Sequence[Yolo], rule: Assignment) -> Tensor:
    """Mask [N, A] of the objects and the anchors of a head that answer for them; shapes [N, 2] in pixels.

    As in AlexeyAB/darknet `process_batch` the best anchor is a number in the list of all anchors, and every head whose
    mask holds the number answers: yolov4-tiny's number 3 is in both masks. Heads with lists of their own are asked one
    by one. Unlike there, a number that is in no mask does not compete: its objects would have no positive at all, such
    as those of number 0 in yolov4-tiny, whose masks are 3, 4, 5 and 1, 2, 3.
    """
    mask = torch.tensor(yolo.mask, device=shapes.device)
    scores = _similarity(shapes, shapes.new_tensor(yolo.anchors), rule.similarity)
    chosen = scores[:, mask] > (yolo.iou_thresh if rule.threshold is None else rule.threshold)
    if rule.best:
        rivals = sorted({number for other in yolos if other.anchors == yolo.anchors for number in other.mask})
        numbers = torch.tensor(rivals, device=shapes.device)
        chosen |= numbers[scores[:, numbers].argmax(dim=1)][:, None] == mask
    return chosen


def _similarity(shapes: Tensor, anchors: Tensor, kind: str) -> Tensor:
    """[N, 2] and [A, 2] widths and heights to [N, A] in 0…1."""
    if kind == "iou":
        return shape_iou(shapes, anchors)
    ratio = shapes[:, None] / anchors[None]
    return torch.minimum(ratio, 1 / ratio).amin(dim=2)


def _positives(targets: Tensor, chosen: Tensor, grid: tuple[int, int], yolo: Yolo, neighbours: bool) -> Positives:
    """Cells of one head for the pairs in `chosen` [N, A]."""
    item, anchor = chosen.nonzero(as_tuple=True)
    height, width = grid
    cells = targets.new_tensor((width, height))
    boxes = targets[item, 2:6] * torch.cat((cells, cells))
    cell = torch.minimum(boxes[:, :2].floor(), cells - 1).clamp(min=0)
    if neighbours:
        item, anchor, boxes, cell = _with_neighbours(item, anchor, boxes, cell, cells, yolo)
    labels = targets[item, 1].long()
    picture = targets[item, 0].long()
    boxes = torch.cat((boxes[:, :2] - cell, boxes[:, 2:]), dim=1)
    column, row = cell.long().unbind(dim=1)
    return Positives(picture, anchor, row, column, boxes, labels)


def _with_neighbours(
    item: Tensor, anchor: Tensor, boxes: Tensor, cell: Tensor, cells: Tensor, yolo: Yolo
) -> tuple[Tensor, ...]:
    """The pairs, and once more for every neighbour cell from which scale_x_y reaches the object's centre."""
    reach = REACH * yolo.scale_x_y / 2
    parts = [(item, anchor, boxes, cell)]
    for step in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        other = cell + cell.new_tensor(step)
        inside = ((other >= 0) & (other < cells)).all(dim=1)
        reached = ((boxes[:, :2] - other - 0.5).abs() <= reach).all(dim=1)
        near = inside & reached
        parts.append((item[near], anchor[near], boxes[near], other[near]))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
