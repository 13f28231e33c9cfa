"""The training loss: boxes, objectness and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import similarity
from utils.darknet.blocks import Yolo
from utils.detection.assign import Positives, assign
from utils.detection.decode import box_offsets, grid, split_head
from utils.detection.settings import ASSIGNMENTS, LossSettings

AT_LEAST_ONE = partial(max, 1)
LEAST_AWAY = 1e-6
"""Least distance |p − y| whose power is taken: at 0 the slope of a power below 1 is infinite."""
PAIRS = 1 << 20
"""Pairs of a prediction and an object that are compared at once."""


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
