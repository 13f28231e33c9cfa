"""What raw head outputs mean: boxes, objectness and class probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.darknet.blocks import Yolo

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
    batch, anchors, height, width, columns = values.shape
    sizes = values.new_tensor(yolo.head_anchors).view(1, anchors, 1, 1, 2)
    offsets = box_offsets(values, sizes, yolo)
    cells = grid(height, width, values)
    stride = values.new_tensor((size[1] / width, size[0] / height))
    scores = values[..., 4:] if yolo.new_coords else values[..., 4:].sigmoid()
    rows = torch.cat(((offsets[..., :2] + cells) * stride, offsets[..., 2:], scores), dim=-1)
    return rows.reshape(batch, anchors * height * width, columns)


def grid(height: int, width: int, like: Tensor) -> Tensor:
    """[H, W, 2]: column and row of every cell, with the type and device of `like`."""
    rows = torch.arange(height, dtype=like.dtype, device=like.device)
    columns = torch.arange(width, dtype=like.dtype, device=like.device)
    return torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)), dim=-1)
