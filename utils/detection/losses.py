"""Target assignment, that is which anchor in which cell answers for which object, and the training loss.

Assignment is one function; its variants are values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.darknet.blocks import Yolo
from utils.detection.decode import EPSILON, area, box_offsets, predicted_boxes, shape_iou, similarities, split_head
from utils.detection.settings import ASSIGNMENTS, Assignment, LossSettings
from utils.device import constant, uploaded

REACH = 0.95
"""Share of the range of a cell's decoded centre within which a neighbour cell may answer: at the ends of the range the
sigmoid is saturated, and its gradient vanishes."""
LEAST_AWAY = 1e-6
"""Least distance |p − y| whose power is taken: at 0 the slope of a power below 1 is infinite."""
PAIRS = 1 << 22
"""Pairs of a prediction and an object that are compared at once."""
Divisor = Callable[[Any], Any]
"""Makes a divisor, at least 1, of a count: a number, or a scalar on the device."""
AT_LEAST_ONE = partial(max, 1)


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

    As in AlexeyAB/darknet `process_batch`, the best anchor is a number in the list of all anchors. Every head whose
    mask has the number answers: number 3 of yolov4-tiny is in both masks. Heads with different lists are treated
    separately. Unlike in Darknet, a number that is in no mask does not compete, as its objects would have no positive.
    An example is number 0 of yolov4-tiny, whose masks are 3, 4, 5 and 1, 2, 3.
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
    divisor: Divisor = AT_LEAST_ONE,
    ignored: Tensor | None = None,
) -> LossTerms:
    """Loss of a batch.

        L = (g_box Σ₊ (1 − s) + g_obj Σ BCE(obj, o*) + g_cls Σ₊ Σ_c BCE(cls_c, y_c)) / max(1, positives)

    o* is the IoU of the decoded box with its object at a positive (no gradient), 0 elsewhere. Where objects share an
    anchor cell, the cell counts once in the class term, and its y has all their classes (AlexeyAB/darknet
    `delta_yolo_class`). Sums run over the whole batch and all heads, so the gains depend on neither grid, picture size
    nor batch size.

    The labels are on the CPU, where the anchors that answer for them are chosen, too. That gives all shapes, so nothing
    waits for a GPU.

    Args:
        heads: raw outputs [B, A · (5 + C), H, W], on any device.
        targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input; on the CPU.
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
    counts = [len(of_head.image) for of_head in positives]
    numbers, values = uploaded(_match(positives, yolos, grids, size), heads[0].device)
    weight = _negative_weight(heads, yolos, size, targets if rule.ignore else targets[:0], ignored)
    terms = _sums(heads, yolos, numbers.split(counts), values, weight, settings) / divisor(sum(counts))
    gains = (settings.box_gain, settings.objectness_gain, settings.class_gain)
    terms = terms * constant(gains, terms.dtype, terms.device)
    return LossTerms(terms.sum(), *terms.detach().unbind())


def _match(
    positives: Sequence[Positives], yolos: Sequence[Yolo], grids: Sequence[tuple[int, int]], size: tuple[int, int]
) -> Iterator[Tensor]:
    """The P positives of all heads, one head after the other, on the CPU.

    Returns:
        int64 [P, 6]: picture, anchor, row, column; number of the prediction among those of all pictures; number of the
            label among the classes of all positives, where the first positive of an anchor cell has the labels of all.
        float [P, 7]: width and height of the anchor, in cells; the object's box, as in `Positives`; 1 for the first
            positive of an anchor cell.
    """
    counts = [len(yolo.mask) * height * width for yolo, (height, width) in zip(yolos, grids, strict=True)]
    parts: list[tuple[Tensor, Tensor]] = []
    for head, (of_head, yolo, (height, width)) in enumerate(zip(positives, yolos, grids, strict=True)):
        image, anchor, row, column, boxes, labels = of_head
        number = image * sum(counts) + sum(counts[:head]) + (anchor * height + row) * width + column
        _, first, cell = np.unique(number.numpy(), return_index=True, return_inverse=True)
        leader = torch.from_numpy(first[cell])  # the first positive of the same anchor cell
        once = (leader == torch.arange(len(image), device=image.device))[:, None]
        anchors = boxes.new_tensor(yolo.head_anchors) * boxes.new_tensor((width / size[1], height / size[0]))
        slot = (sum(len(cells) for cells, _ in parts) + leader) * yolo.classes + labels
        cells = torch.stack((image, anchor, row, column, number, slot), dim=1)
        parts.append((cells, torch.cat((anchors[anchor], boxes, once), dim=1)))
    return map(torch.cat, zip(*parts, strict=True))


def _sides(boxes: Tensor) -> Tensor:
    """Return cx, cy, w, h as -x1, -y1, x2, y2: of two boxes, the overlap has the smaller of each."""
    centre, side = boxes.split(2, dim=1)
    half = side / 2
    return torch.cat((half - centre, half + centre), dim=1)


def _sums(
    heads: Sequence[Tensor],
    yolos: Sequence[Yolo],
    numbers: Sequence[Tensor],
    values: Tensor,
    weight: Tensor,
    settings: LossSettings,
) -> Tensor:
    """[3] sums of the box, objectness and class term.

    Args:
        heads: raw outputs.
        yolos: head blocks.
        numbers: of the positives of each head, and
        values: of all positives, see `_match`.
        weight: of each prediction as a negative, see `_negative_weight`.
        settings: gains and variants.
    """
    outputs = [_Taken.apply(*part) for part in zip(heads, yolos, numbers, strict=True)]
    positive, confidence = zip(*outputs, strict=True)
    counts, (anchors, objects, once) = list(map(len, positive)), values.split((2, 4, 1), dim=1)
    decoded = zip(positive, anchors.split(counts), yolos, strict=True)
    iou, agreement = similarities(torch.cat([box_offsets(*part) for part in decoded]), objects, settings.iou_loss)

    number, slot = torch.cat(list(numbers))[:, 4:].unbind(1)
    target = torch.zeros_like(weight)
    target.view(-1).scatter_reduce_(0, number, iou.detach().clamp(0, 1), "amax")
    weight.view(-1).index_fill_(0, number, 1)
    cells = [part[0].numel() for part in confidence]
    parts = zip(confidence, target.split(cells, dim=1), weight.split(cells, dim=1), yolos, strict=True)
    objectness = torch.stack([_objectness(*part, settings.focal_gamma) for part in parts])

    labels = target.new_zeros(len(number), yolos[0].classes)
    labels.view(-1).scatter_(0, slot, 1)
    labels = labels * (1 - settings.label_smoothing) + settings.label_smoothing / 2
    scores = zip(positive, labels.split(counts), yolos, strict=True)
    classes = torch.cat([_cross_entropy(part[:, 5:], label, yolo) for part, label, yolo in scores]) * once
    return torch.stack(((1 - agreement).sum(), objectness.sum(), classes.sum()))


def _objectness(confidence: Tensor, target: Tensor, weight: Tensor, yolo: Yolo, focal_gamma: float) -> Tensor:
    """Sum over a head: raw outputs [B, A, H, W]; their targets and weights [B, A · H · W]."""
    target, weight = target.view(confidence.shape), weight.view(confidence.shape)
    if focal_gamma:
        probability = confidence if yolo.new_coords else confidence.sigmoid()
        away = (probability - target).abs()
        weight = weight * away.clamp(min=LEAST_AWAY) ** focal_gamma
    return (_cross_entropy(confidence, target, yolo) * weight).sum()


class _Taken(torch.autograd.Function):
    """The rows of the positives and the objectness of all predictions.

    Plain indexing gives the same, but its backward pass fills and adds two tensors of the head's size.
    """

    @staticmethod
    def forward(ctx: Any, head: Tensor, yolo: Yolo, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """[P, 5 + C] and [B, A, H, W]; `numbers` begin with picture, anchor, row, column."""
        ctx.head, ctx.yolo, ctx.at = head, yolo, numbers[:, :4].unbind(1)
        values = split_head(head, yolo)
        return values[ctx.at], values[..., 4].clone()

    @staticmethod
    def backward(ctx: Any, rows: Tensor, confidence: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in the head's memory format."""
        gradient = torch.zeros_like(ctx.head)
        values = split_head(gradient, ctx.yolo)
        values[..., 4] = confidence
        values.index_put_(ctx.at, rows, accumulate=True)
        return gradient, None, None


@torch.no_grad()
def _negative_weight(
    heads: Sequence[Tensor], yolos: Sequence[Yolo], size: tuple[int, int], objects: Tensor, ignored: Tensor | None
) -> Tensor:
    """Weight of each prediction as a negative [B, M], M those of all heads: 0 where it is spared, otherwise 1.

    It is spared if its IoU with any of the objects, or the share of it inside of an ignored box, exceeds
    `ignore_thresh`. Darknet also asks for some class probability above 0.25; with independent class scores that early
    training has not separated yet this only delays the rule, and is left out.
    """
    values = [split_head(head, yolo) for head, yolo in zip(heads, yolos, strict=True)]
    counts = [part[0, ..., 0].numel() for part in values]
    hits = heads[0].new_zeros(len(heads[0]), sum(counts))
    targets = objects if ignored is None else torch.cat((objects, ignored))
    if not len(targets):
        return hits + 1
    boxes = targets[:, 2:6] * targets.new_tensor((size[1], size[0], size[1], size[0]))
    is_object = torch.arange(len(targets), device=targets.device) < len(objects)
    columns = (targets[:, :1], _sides(boxes), area(boxes[:, 2:])[:, None], is_object[:, None])
    (unsure,) = uploaded((torch.cat(columns, dim=1),), hits.device)
    limits = [hits.new_full((count,), yolo.ignore_thresh) for count, yolo in zip(counts, yolos, strict=True)]
    predicted = [predicted_boxes(part, yolo, size).flatten(1, 3) for part, yolo in zip(values, yolos, strict=True)]
    limit, planes = torch.cat(limits), torch.cat(predicted, dim=1).transpose(1, 2)  # [M], [B, 4, M]
    sides, areas = _sides(planes), planes[:, 2] * planes[:, 3]
    for some in unsure.split(max(1, PAIRS // len(limit))):
        pictures = some[:, 0].long()
        low, high = torch.minimum(sides[pictures], some[:, 1:5, None]).split(2, dim=1)
        width, height = (low + high).clamp_(min=0).unbind(1)
        shared = width * height
        whole = areas[pictures] + (some[:, 5:6] - shared) * some[:, 6:]
        hits.index_add_(0, pictures, (shared / (whole + EPSILON) > limit).to(hits.dtype))
    return (hits == 0).to(hits.dtype)


def _cross_entropy(values: Tensor, wanted: Tensor, yolo: Yolo) -> Tensor:
    """Elementwise binary cross-entropy of logits, or of probabilities where the network ends in a sigmoid."""
    if yolo.new_coords:
        # It refuses NaN: with an error of PyTorch, or on a GPU with an assertion that no later call survives.
        broken = (values + wanted).isnan()
        values, wanted = values.clamp(0, 1).masked_fill(broken, 0.5), wanted.masked_fill(broken, 0.5)
        return F.binary_cross_entropy(values, wanted, reduction="none").masked_fill(broken, torch.nan)
    return F.binary_cross_entropy_with_logits(values, wanted, reduction="none")
