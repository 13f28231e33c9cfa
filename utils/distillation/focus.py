"""Where objects are: the fine-grained mask over the cells of a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import EPSILON
from utils.darknet.blocks import Yolo

NEARNESS = 0.5
"""ψ: a cell counts whose best anchor overlaps an object by more than this share of the best overlap anywhere."""
PAIRS = 1 << 22
"""Anchors that are compared with objects at once."""


@torch.no_grad()
def object_mask(
    targets: Tensor, yolos: Sequence[Yolo], grids: Sequence[tuple[int, int]], size: tuple[int, int], batch: int
) -> list[Tensor]:
    """The cells near objects in the grid of every head (Wang et al., arXiv:1906.03609, section 3.1).

    For each object the IoU with every anchor in every cell is taken; cells with one above ψ times the largest count.
    Here the anchors of all heads compete, so an object is looked at where its size is predicted.

    Args:
        targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input.
        yolos: head blocks.
        grids: height and width of each head's grid, in cells.
        size: height and width of the network input, in pixels.
        batch: pictures.

    Returns:
        For each head bool [B, H, W]; all False for a picture without objects.
    """
    hits = [targets.new_zeros(batch, *cells) for cells in grids]
    objects = targets[:, 2:6] * targets.new_tensor((size[1], size[0], size[1], size[0]))
    total = sum(len(yolo.mask) * cells[0] * cells[1] for yolo, cells in zip(yolos, grids, strict=True))
    for some in torch.arange(len(targets), device=targets.device).split(max(1, PAIRS // total)):
        overlaps = [_overlap(objects[some], yolo, cells, size) for yolo, cells in zip(yolos, grids, strict=True)]
        best = torch.stack([overlap.flatten(1).amax(dim=1) for overlap in overlaps]).amax(dim=0)
        for count, overlap in zip(hits, overlaps, strict=True):
            near = overlap > NEARNESS * best[:, None, None]
            count.index_add_(0, targets[some, 0].long(), near.to(count.dtype))
    return [count > 0 for count in hits]


def project(masks: Sequence[Tensor], cells: tuple[int, int]) -> Tensor:
    """Masks of several grids in another one: bool [B, H, W], a cell of which counts if it meets any that counts."""
    return reduce(torch.logical_or, (_resized(mask, cells) for mask in masks))


def _resized(mask: Tensor, cells: tuple[int, int]) -> Tensor:
    if cells[0] >= mask.shape[1]:
        rows, columns = (_nearest(count, mask.shape[1 + axis], mask.device) for axis, count in enumerate(cells))
        return mask.index_select(2, columns).index_select(1, rows)
    return F.adaptive_max_pool2d(mask[:, None].float(), cells)[:, 0] > 0


def _nearest(count: int, of: int, device: torch.device) -> Tensor:
    """For `count` places the nearest of fewer."""
    return torch.arange(count, device=device) * of // count


def _overlap(objects: Tensor, yolo: Yolo, cells: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[N, H, W] the largest IoU of each object with an anchor in the middle of every cell.

    The area that two boxes share is the product of what their sides share, which needs no pairs of boxes.

    Args:
        objects: [N, 4] cx, cy, w, h in pixels.
        yolo: the head.
        cells: height and width of its grid.
        size: height and width of the network input, in pixels.
    """
    anchors = objects.new_tensor(yolo.head_anchors)
    rows, columns = (
        _shared(objects[:, axis], objects[:, 2 + axis], anchors[:, axis], cells[1 - axis], size[1 - axis])
        for axis in (1, 0)
    )
    shared = rows[..., None] * columns[:, :, None]  # [N, A, H, W]
    area = objects[:, 2:].prod(dim=1)[:, None] + anchors.prod(dim=1)
    return (shared / (area[..., None, None] - shared + EPSILON)).amax(dim=1)


def _shared(centres: Tensor, sides: Tensor, anchors: Tensor, count: int, length: int) -> Tensor:
    """[N, A, count] pixels that N intervals share with anchors [A] in the middle of `count` cells of the `length`."""
    middles = (torch.arange(count, dtype=centres.dtype, device=centres.device) + 0.5) * (length / count)
    half = anchors[:, None] / 2
    low, high = ((centres + sign * sides / 2)[:, None, None] for sign in (-1, 1))
    return (torch.minimum(high, middles + half) - torch.maximum(low, middles - half)).clamp(min=0)
