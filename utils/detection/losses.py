"""Target assignment, that is which anchor in which cell answers for which object, and the training loss.

Assignment is one function; its variants are values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import shape_iou, similarity
from utils.darknet.blocks import Yolo
from utils.detection.decode import box_offsets, grid, split_head
from utils.detection.settings import ASSIGNMENTS, Assignment, LossSettings

REACH = 0.95
"""Share of the interval a decoded centre can lie in that a neighbour cell may have to use: at the interval's ends the
sigmoid is saturated and the gradient gone."""
AT_LEAST_ONE = partial(max, 1)
LEAST_AWAY = 1e-6
"""Least distance |p − y| whose power is taken: at 0 the slope of a power below 1 is infinite."""
PAIRS = 1 << 20
"""Pairs of a prediction and an object that are compared at once."""


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


class LossTerms(NamedTuple):
    """Scalars; `total` is what is minimised."""

    total: Tensor
    box: Tensor
    objectness: Tensor
    classes: Tensor


def detection_loss(
    heads: Sequence[Tensor],
    targets: Tensor,
    yolos: Sequence[Yolo],
    size: tuple[int, int],
    settings: LossSettings,
    divisor: Callable[[int], float] = AT_LEAST_ONE,
    ignored: Tensor | None = None,
) -> LossTerms:
    """Loss of a batch.

        L = (g_box Σ₊ (1 − s) + g_obj Σ BCE(obj, o*) + g_cls Σ₊ Σ_c BCE(cls_c, y_c)) / max(1, positives)

    o* is the IoU of the decoded box with its object at a positive (no gradient), 0 elsewhere. Where objects share an
    anchor cell, the cell counts once in the class term, and its y has all their classes (AlexeyAB/darknet
    `delta_yolo_class`). Sums run over the whole batch and all heads, so the gains depend on neither grid, picture size
    nor batch size.

    Args:
        heads: raw outputs [B, A · (5 + C), H, W].
        targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input.
        yolos: head blocks.
        size: height and width of the network input, in pixels.
        settings: gains and variants.
        divisor: what the sums are divided by, from the number of positives in this batch; several processes that share
            a batch count all of them.
        ignored: [M, 6] as `targets`: boxes in which nobody knows what is right. A prediction that lies in one by more
            than `ignore_thresh` of its own area is no negative, whatever the assignment. Its area is what counts, as in
            evaluation: the box of a crowd is much larger than each of its members.
    """
    rule = ASSIGNMENTS[settings.assignment]
    heads = [head.float() for head in heads]
    grids = [(head.shape[-2], head.shape[-1]) for head in heads]
    positives = assign(targets, yolos, grids, size, rule)
    unsure = [(targets, "iou")] if rule.ignore else []
    if ignored is not None and len(ignored):
        unsure.append((ignored, "inside"))
    terms = [
        _head_loss(head, yolo, of_head, unsure, size, settings)
        for head, yolo, of_head in zip(heads, yolos, positives, strict=True)
    ]
    count = divisor(sum(len(of_head.image) for of_head in positives))
    box, objectness, classes = (sum(term) / count for term in zip(*terms, strict=True))
    box, objectness = settings.box_gain * box, settings.objectness_gain * objectness
    classes = settings.class_gain * classes
    return LossTerms(box + objectness + classes, box.detach(), objectness.detach(), classes.detach())


def _head_loss(
    head: Tensor,
    yolo: Yolo,
    positives: Positives,
    unsure: Sequence[tuple[Tensor, str]],
    size: tuple[int, int],
    settings: LossSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the three terms of one head; `unsure`: boxes [N, 6] that spare negatives, and the kind of similarity."""
    values = split_head(head.detach(), yolo)
    height, width = head.shape[-2:]
    cell_anchors = head.new_tensor(yolo.head_anchors) * head.new_tensor((width / size[1], height / size[0]))
    at = (positives.image, positives.anchor, positives.row, positives.column)
    rows, confidence = _Taken.apply(head, yolo, at)
    boxes = box_offsets(rows, cell_anchors[positives.anchor], yolo)
    agreement = similarity(boxes, positives.boxes, settings.iou_loss)

    wanted = head.new_zeros(values.shape[:4])
    iou = similarity(boxes.detach(), positives.boxes).clamp(0, 1)
    flat = ((positives.image * len(yolo.mask) + positives.anchor) * height + positives.row) * width + positives.column
    wanted.view(-1).scatter_reduce_(0, flat, iou, "amax")
    weight = torch.ones_like(wanted)
    for objects, kind in unsure:
        weight[_overlapping(values, cell_anchors, objects, yolo, kind)] = 0
    weight[at] = 1
    if settings.focal_gamma:
        away = (_probability(confidence, yolo) - wanted).abs()
        weight = weight * away.clamp(min=LEAST_AWAY) ** settings.focal_gamma
    objectness = (_cross_entropy(confidence, wanted, yolo) * weight).sum()

    labels, once = _cell_classes(flat, positives.labels, yolo.classes)
    labels = labels * (1 - settings.label_smoothing) + settings.label_smoothing / 2
    classes = _cross_entropy(rows[:, 5:], labels.to(rows.dtype), yolo) * once[:, None]
    return (1 - agreement).sum(), objectness, classes.sum()


def _cell_classes(cells: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The classes of all objects in the anchor cell of each positive, and which positive speaks for its cell.

    Args:
        cells: [P] number of the anchor cell.
        labels: [P] class of the object.
        classes: number of classes C.

    Returns:
        [P, C], 0 or 1, and bool [P], True for the first positive of every cell.
    """
    ordered, order = cells.sort(stable=True)
    first = torch.cat((torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]))
    group = torch.empty_like(order)
    group[order] = first.cumsum(dim=0) - 1
    present = cells.new_zeros(len(cells), classes)
    present[group, labels] = 1
    once = torch.empty_like(first)
    once[order] = first
    return present[group], once


class _Taken(torch.autograd.Function):
    """The rows of the positives and the objectness of all predictions.

    Plain indexing gives the same, but its backward pass fills and adds two tensors of the head's size.
    """

    @staticmethod
    def forward(ctx: Any, head: Tensor, yolo: Yolo, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """[P, 5 + C] and [B, A, H, W]."""
        ctx.head, ctx.yolo, ctx.at = head, yolo, at
        values = split_head(head, yolo)
        return values[at], values[..., 4].clone()

    @staticmethod
    def backward(ctx: Any, rows: Tensor, confidence: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in the head's memory format."""
        gradient = torch.zeros_like(ctx.head)
        values = split_head(gradient, ctx.yolo)
        values[..., 4] = confidence
        values.index_put_(ctx.at, rows, accumulate=True)
        return gradient, None, None


@torch.no_grad()
def _overlapping(values: Tensor, cell_anchors: Tensor, targets: Tensor, yolo: Yolo, kind: str) -> Tensor:
    """Mask [B, A, H, W] of the predictions whose similarity to any box of their picture exceeds `ignore_thresh`.

    Darknet also asks for some class probability above 0.25; with independent class scores that early training has not
    separated yet this only delays the rule, and is left out.
    """
    batch, anchors, height, width = values.shape[:4]
    boxes = box_offsets(values, cell_anchors.view(1, anchors, 1, 1, 2), yolo)
    boxes = torch.cat((boxes[..., :2] + grid(height, width, values), boxes[..., 2:]), dim=-1)
    boxes = boxes.reshape(batch, -1, 4)
    objects = targets[:, 2:6] * values.new_tensor((width, height, width, height))
    hits = values.new_zeros(boxes.shape[:2])
    for some in torch.arange(len(targets), device=targets.device).split(max(1, PAIRS // boxes.shape[1])):
        picture = targets[some, 0].long()
        overlap = similarity(boxes[picture], objects[some, None], kind)
        hits.index_add_(0, picture, (overlap > yolo.ignore_thresh).to(hits.dtype))
    return (hits > 0).view(batch, anchors, height, width)


def _probability(values: Tensor, yolo: Yolo) -> Tensor:
    return values if yolo.new_coords else values.sigmoid()


def _cross_entropy(values: Tensor, wanted: Tensor, yolo: Yolo) -> Tensor:
    """Elementwise binary cross-entropy of logits, or of probabilities where the network ends in a sigmoid."""
    if yolo.new_coords:
        return F.binary_cross_entropy(values.clamp(0, 1), wanted, reduction="none")
    return F.binary_cross_entropy_with_logits(values, wanted, reduction="none")
