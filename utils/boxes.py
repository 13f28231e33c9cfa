"""Box formats and the IoU family, on tensors whose last dimension is a box."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-9
"""Keeps 0 / 0 of degenerate boxes at 0."""


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x1, y1, x2, y2)."""
    centre, half = boxes[..., :2], boxes[..., 2:4] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def similarity(a: Tensor, b: Tensor, kind: str = "iou") -> Tensor:
    """Return how well pairs of boxes agree, see `similarities`."""
    return similarities(a, b, kind)[1]


def similarities(a: Tensor, b: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the IoU of pairs of boxes, and their similarity of a kind.

        GIoU = IoU − (C − U) / C               C: area of the smallest enclosing box     (arXiv:1902.09630)
        DIoU = IoU − ρ² / c²                   ρ: distance of the centres, c: diagonal of the enclosing box
        CIoU = DIoU − α v,  v = 4/π² (atan w/h − atan w'/h')²,  α = v / (1 − IoU + v)    (arXiv:1911.08287)

    α is a constant for the gradient, as in the paper.

    Args:
        a: [..., 4], cx, cy, w, h.
        b: the same; the two shapes broadcast.
        kind: "iou", "giou", "diou" or "ciou".

    Returns:
        Two of [...], at most 1; IoU at least 0, GIoU and DIoU above −1.
    """
    (a_centre, a_side), (b_centre, b_side) = a[..., :4].split(2, dim=-1), b[..., :4].split(2, dim=-1)
    a_half, b_half = a_side / 2, b_side / 2
    a_low, a_high, b_low, b_high = a_centre - a_half, a_centre + a_half, b_centre - b_half, b_centre + b_half
    overlap = area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    union = area(a_side) + area(b_side) - overlap
    iou = overlap / (union + EPSILON)
    if kind == "iou":
        return iou, iou
    enclosing = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    if kind == "giou":
        hull = area(enclosing)
        return iou, iou - (hull - union) / (hull + EPSILON)
    diou = iou - (a_centre - b_centre).square().sum(dim=-1) / (enclosing.square().sum(dim=-1) + EPSILON)
    if kind == "diou":
        return iou, diou
    shape = torch.atan2(*a_side.unbind(-1)) - torch.atan2(*b_side.unbind(-1))
    v = 4 / math.pi**2 * shape.square()
    with torch.no_grad():
        alpha = v / (1 - iou + v + EPSILON)
    return iou, diou - alpha * v


def area(sides: Tensor) -> Tensor:
    """[..., 2] widths and heights to [...]. Unlike that of `prod`, its backward pass does not wait for a GPU."""
    width, height = sides.unbind(-1)
    return width * height


def shape_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes laid on one another's centre: [N, 2] and [M, 2] widths and heights to [N, M]."""
    overlap = area(torch.minimum(a[:, None], b[None]))
    return overlap / (area(a)[:, None] + area(b)[None] - overlap + EPSILON)
