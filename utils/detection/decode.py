"""Box formats and overlaps; raw head outputs to boxes, objectness and class probabilities, and these to detections."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from utils.darknet.blocks import Yolo
from utils.detection.settings import MAX_CANDIDATES
from utils.device import constant
from utils.errors import NumericsError

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


MAX_DETECTIONS = 300
"""Most detections of a picture."""
LARGEST_EXPONENT = 10.0
"""t_w beyond this (22 026 anchors wide) is cut, so that no box becomes infinite."""


def split_head(head: Tensor, yolo: Yolo) -> Tensor:
    """[B, A · (5 + C), H, W] to [B, A, H, W, 5 + C]: t_x, t_y, t_w, t_h, t_o, classes."""
    batch, _, height, width = head.shape
    return head.view(batch, len(yolo.mask), 5 + yolo.classes, height, width).permute(0, 1, 3, 4, 2)


def box_offsets(values: Tensor, anchors: Tensor, yolo: Yolo) -> Tensor:
    """Centres relative to their cell, in cells, and sizes in the anchors' unit.

    With s = scale_x_y (AlexeyAB/darknet, `get_yolo_box`):

        x = s σ(t_x) − (s − 1) / 2,   w = a_w exp(t_w)
        new_coords:  t_x is already in 0…1;  x = s t_x − (s − 1) / 2,   w = a_w (2 t_w)²

    Args:
        values: [..., ≥ 4], raw outputs.
        anchors: [..., 2], broadcast against `values[..., 2:4]`.
        yolo: the head; scale_x_y and new_coords are looked at.

    Returns:
        [..., 4]: x, y, w, h.
    """
    scale = yolo.scale_x_y
    position, size = values[..., :2], values[..., 2:4]
    if yolo.new_coords:
        size = anchors * (2 * size).square()
    else:
        position = position.sigmoid()
        size = anchors * size.clamp(max=LARGEST_EXPONENT).exp()
    return torch.cat((scale * position - (scale - 1) / 2, size), dim=-1)


def decode(heads: Sequence[Tensor], yolos: Sequence[Yolo], size: tuple[int, int]) -> Tensor:
    """Boxes, objectness and class probabilities of every anchor in every cell.

    Args:
        heads: raw outputs [B, A · (5 + C), H, W].
        yolos: the head blocks, in the same order.
        size: height and width of the network input, in pixels.

    Returns:
        [B, N, 5 + C]: cx, cy, w, h in pixels of the network input, objectness, class probabilities (not multiplied).
        Rows run through the heads; within a head through anchors, then rows, then columns of the grid.
    """
    return torch.cat([_decode_head(head, yolo, size) for head, yolo in zip(heads, yolos, strict=True)], dim=1)


def _decode_head(head: Tensor, yolo: Yolo, size: tuple[int, int]) -> Tensor:
    values = split_head(head, yolo)
    scores = values[..., 4:] if yolo.new_coords else values[..., 4:].sigmoid()
    return torch.cat((predicted_boxes(values, yolo, size), scores), dim=-1).flatten(1, 3)


def predicted_boxes(values: Tensor, yolo: Yolo, size: tuple[int, int]) -> Tensor:
    """Boxes of all predictions of a head, [B, A, H, W, ≥ 4] to [B, A, H, W, 4]: cx, cy, w, h in pixels of the input."""
    height, width = values.shape[2:4]
    anchors = constant(yolo.head_anchors, values.dtype, values.device).view(-1, 1, 1, 2)
    sides = constant((size[1] / width, size[0] / height), values.dtype, values.device)
    offsets = box_offsets(values, anchors, yolo)
    centres = (offsets[..., :2] + _corners(height, width, values.dtype, values.device)) * sides
    return torch.cat((centres, offsets[..., 2:]), dim=-1)


@lru_cache(maxsize=256)
def _corners(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[H, W, 2]: column and row of every cell."""
    with torch.inference_mode(False):  # a training may need what an evaluation made
        rows = torch.arange(height, dtype=dtype, device=device)
        columns = torch.arange(width, dtype=dtype, device=device)
        return torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)), dim=-1)


def non_max_suppression(
    rows: Tensor,
    conf_thres: float,
    iou_thres: float,
    *,
    multi_label: bool = False,
    agnostic: bool = False,
    classes: Collection[int] | None = None,
    max_nms: int = MAX_CANDIDATES,
    max_det: int = MAX_DETECTIONS,
) -> list[Tensor]:
    """Detections of each picture, best first.

    Args:
        rows: [B, N, 5 + C] as `decode` returns them.
        conf_thres: objectness · class probability has to be above it.
        iou_thres: a box that overlaps a better one of its class by more is dropped.
        multi_label: a row may give a detection of every class above the threshold; otherwise of its best class only.
        agnostic: boxes suppress one another across classes.
        classes: keep only these; all when None.
        max_nms: best candidates of a picture that enter suppression.
        max_det: most detections of a picture.

    Returns:
        One [n, 6] CPU tensor a picture: x1, y1, x2, y2 in pixels of the network input, confidence, class.

    Raises:
        NumericsError: the network returns NaN.
    """
    if rows.device.type != "cpu" and classes is None:  # a GPU chooses the rows that can have the best candidates
        best = (rows[..., 5:].amax(dim=2) * rows[..., 4]).topk(min(max_nms, rows.shape[1]), dim=1).indices
        rows = rows.gather(1, best.sort(dim=1).values[..., None].expand(-1, -1, rows.shape[2]))
    rows = rows.cpu()  # once for all pictures: suppression waits for each
    if rows.isnan().any():
        raise NumericsError("the network returns NaN; its weights are damaged or its training diverged")
    options = (conf_thres, multi_label, classes)
    return [_suppress(candidates(row, *options), iou_thres, agnostic, max_nms, max_det) for row in rows]


def candidates(rows: Tensor, conf_thres: float, multi_label: bool, classes: Collection[int] | None = None) -> Tensor:
    """[N, 5 + C] rows of a picture to [n, 6] detections above the threshold, as of `non_max_suppression`, but all."""
    rows = rows[rows[:, 4] > conf_thres]
    scores = rows[:, 5:] * rows[:, 4:5]
    if multi_label and scores.shape[1] > 1:
        row, label = (scores > conf_thres).nonzero(as_tuple=True)
        confidence = scores[row, label]
    else:
        confidence, label = scores.max(dim=1)
        row = (confidence > conf_thres).nonzero(as_tuple=True)[0]
        confidence, label = confidence[row], label[row]
    if classes is not None:
        wanted = torch.isin(label, label.new_tensor(list(classes)))
        row, confidence, label = row[wanted], confidence[wanted], label[wanted]
    corners = to_corners(rows[row, :4])
    return torch.cat((corners, confidence[:, None], label[:, None].to(corners.dtype)), dim=1)


def _suppress(detections: Tensor, iou_thres: float, agnostic: bool, max_nms: int, max_det: int) -> Tensor:
    from torchvision.ops import batched_nms  # half a second that a plan or an export need not wait for

    detections = detections[detections[:, 4].argsort(descending=True, stable=True)[:max_nms]]
    groups = torch.zeros_like(detections[:, 5]) if agnostic else detections[:, 5]
    boxes, confidence = detections[:, :4].double(), detections[:, 4].double()
    # torchvision moves each class by the largest coordinate, which keeps classes apart only if none is negative.
    kept = batched_nms(boxes - boxes.clamp(max=0).sum(), confidence, groups, iou_thres)
    # torchvision takes one of two ways, by the device and the number of boxes; one leaves the order of ties open.
    return detections[kept.sort().values[:max_det]]
