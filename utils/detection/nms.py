"""From decoded rows to detections."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from utils.boxes import to_corners
from utils.flags import MAX_CANDIDATES

MAX_DETECTIONS = 300
"""Most detections of a picture."""


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
        conf_thres: least objectness · class probability.
        iou_thres: a box that overlaps a better one of its class by more is dropped.
        multi_label: a row may give a detection of every class above the threshold; otherwise of its best class only.
        agnostic: boxes suppress one another across classes.
        classes: keep only these; all when None.
        max_nms: best candidates of a picture that enter suppression.
        max_det: most detections of a picture.

    Returns:
        One [n, 6] tensor a picture: x1, y1, x2, y2 in pixels of the network input, confidence, class.
    """
    options = (conf_thres, multi_label, classes)
    return [_suppress(_candidates(row, *options), iou_thres, agnostic, max_nms, max_det) for row in rows]


def _candidates(rows: Tensor, conf_thres: float, multi_label: bool, classes: Collection[int] | None) -> Tensor:
    """[N, 5 + C] to [n, 6] detections above the threshold, not yet suppressed."""
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


def _suppress(candidates: Tensor, iou_thres: float, agnostic: bool, max_nms: int, max_det: int) -> Tensor:
    from torchvision.ops import batched_nms  # half a second that a plan or an export need not wait for

    candidates = candidates[candidates[:, 4].argsort(descending=True, stable=True)[:max_nms]]
    groups = torch.zeros_like(candidates[:, 5]) if agnostic else candidates[:, 5]
    boxes, confidence = candidates[:, :4].float(), candidates[:, 4].float()
    kept = batched_nms(boxes, confidence, groups, iou_thres)
    # torchvision takes one of two ways, by the device and the number of boxes; one leaves the order of ties open.
    return candidates[kept.sort().values[:max_det]]
