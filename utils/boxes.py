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
    """How well pairs of boxes agree.

        GIoU = IoU − (C − U) / C               C: area of the smallest enclosing box     (arXiv:1902.09630)
        DIoU = IoU − ρ² / c²                   ρ: distance of the centres, c: diagonal of the enclosing box
        CIoU = DIoU − α v,  v = 4/π² (atan w/h − atan w'/h')²,  α = v / (1 − IoU + v)    (arXiv:1911.08287)

    α is a constant for the gradient, as in the paper.

    Args:
        a: [..., 4], cx, cy, w, h.
        b: the same; the two shapes broadcast.
        kind: "iou", "giou", "diou", "ciou", or "inside": the share of the area of `a` that lies in `b`.

    Returns:
        [...], at most 1; IoU and share at least 0, GIoU and DIoU above −1.
    """
    a_low, a_high = a[..., :2] - a[..., 2:4] / 2, a[..., :2] + a[..., 2:4] / 2
    b_low, b_high = b[..., :2] - b[..., 2:4] / 2, b[..., :2] + b[..., 2:4] / 2
    overlap = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(dim=-1)
    if kind == "inside":
        return overlap / (a[..., 2:4].prod(dim=-1) + EPSILON)
    union = a[..., 2:4].prod(dim=-1) + b[..., 2:4].prod(dim=-1) - overlap
    iou = overlap / (union + EPSILON)
    if kind == "iou":
        return iou
    enclosing = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    if kind == "giou":
        area = enclosing.prod(dim=-1)
        return iou - (area - union) / (area + EPSILON)
    distance = (a[..., :2] - b[..., :2]).square().sum(dim=-1)
    diou = iou - distance / (enclosing.square().sum(dim=-1) + EPSILON)
    if kind == "diou":
        return diou
    shape = torch.atan2(a[..., 2], a[..., 3]) - torch.atan2(b[..., 2], b[..., 3])
    v = 4 / math.pi**2 * shape.square()
    with torch.no_grad():
        alpha = v / (1 - iou + v + EPSILON)
    return diou - alpha * v


def shape_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes laid on one another's centre: [N, 2] and [M, 2] widths and heights to [N, M]."""
    overlap = torch.minimum(a[:, None], b[None]).prod(dim=-1)
    return overlap / (a.prod(dim=-1)[:, None] + b.prod(dim=-1)[None] - overlap + EPSILON)
