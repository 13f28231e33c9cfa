"""Anchors that fit a data set: k-means on the IoU of widths and heights (YOLO9000, arXiv:1612.08242, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Network, Yolo
from utils.data.images import fitted_sizes
from utils.data.index import Index
from utils.errors import DataError

ITERATIONS = 300
"""Rounds of k-means; it stops earlier when no box changes its cluster."""
RATIO = 4.0
"""A box can be learnt from an anchor whose sides are within this factor of its own (`ASSIGNMENTS["ratio"]`)."""


def box_sizes(index: Index, size: tuple[int, int]) -> NDArray[np.float64]:
    """[N, 2]: width and height of every labelled box in pixels of a letterbox of `size` (height, width)."""
    widths_heights = fitted_sizes(index.shapes, size)[:, ::-1]
    return index.labels.rows[:, 3:] * np.repeat(widths_heights, index.labels.counts, 0)


def fit_quality(sizes: NDArray[np.floating], anchors: NDArray[np.floating]) -> tuple[float, float]:
    """Measure how well anchors fit boxes.

    Args:
        sizes: [N, 2] widths and heights.
        anchors: [A, 2] likewise.

    Returns:
        Best possible recall: the share of boxes with an anchor whose sides are within RATIO of their own; and the mean
        over boxes of the best IoU of widths and heights.
    """
    ratio = sizes[:, None] / anchors[None]
    reachable = (np.maximum(ratio, 1 / ratio).max(axis=2).min(axis=1) < RATIO).mean()
    return float(reachable), float(shape_ious(sizes, anchors).max(axis=1).mean())


def shape_ious(sizes: NDArray[np.floating], anchors: NDArray[np.floating]) -> NDArray[np.floating]:
    """IoU of boxes laid on one another's centre: [N, 2] and [A, 2] to [N, A]."""
    overlap = np.minimum(sizes[:, None], anchors[None]).prod(axis=2)
    return overlap / (sizes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - overlap)


def cluster(sizes: NDArray[np.floating], count: int, seed: int = 0) -> NDArray[np.float64]:
    """`count` anchors for boxes: k-means with distance 1 − IoU and the median as centre, sorted by area.

    Raises:
        DataError: fewer different boxes than anchors.
    """
    distinct = np.unique(sizes, axis=0)
    if len(distinct) < count:
        raise DataError(f"--auto-anchors: {len(distinct)} different box sizes are too few for {count} anchors")
    rng = np.random.default_rng(seed)
    centres = distinct[rng.integers(len(distinct), size=1)]
    while len(centres) < count:  # k-means++: far boxes are likelier starts
        distance = 1 - shape_ious(distinct, centres).max(axis=1)
        weight = np.maximum(distance, 1e-12) ** 2
        centres = np.concatenate([centres, distinct[rng.choice(len(distinct), size=1, p=weight / weight.sum())]])
    nearest = np.full(len(sizes), -1)
    for _ in range(ITERATIONS):
        before, nearest = nearest, shape_ious(sizes, centres).argmax(axis=1)
        if (nearest == before).all():
            break
        for number in np.unique(nearest):
            centres[number] = np.median(sizes[nearest == number], axis=0)
    return centres[np.argsort(centres.prod(axis=1))]


def used_anchors(network: Network) -> tuple[int, ...]:
    """Numbers of the anchors that some head predicts with."""
    return tuple(sorted({number for yolo in network.yolos for number in yolo.mask}))


def with_anchors(network: Network, anchors: Sequence[Sequence[float]] | NDArray[np.float64]) -> Network:
    """The network with new values in its heads' one list, for the anchors they use in the order of `used_anchors`."""
    values = list(network.yolos[0].anchors)
    for number, (width, height) in zip(used_anchors(network), anchors, strict=True):
        values[number] = (round(float(width), 1), round(float(height), 1))
    blocks = (replace(block, anchors=tuple(values)) if isinstance(block, Yolo) else block for block in network.blocks)
    return replace(network, blocks=tuple(blocks))


def auto_anchors(network: Network, index: Index, size: tuple[int, int], seed: int) -> tuple[Network, str]:
    """The network with anchors clustered again from a data set, and a line that compares them.

    Raises:
        DataError: as in `cluster`, or the heads do not share one list of anchors.
    """
    if len({yolo.anchors for yolo in network.yolos}) > 1:
        raise DataError(f"--auto-anchors: the heads of {network.path} have different lists of anchors")
    sizes = box_sizes(index, size)
    sizes = sizes[(sizes >= 1).all(axis=1)]
    numbers = used_anchors(network)
    before = np.array([network.yolos[0].anchors[number] for number in numbers])
    after = cluster(sizes, len(numbers), seed)
    (recall, iou), (new_recall, new_iou) = fit_quality(sizes, before), fit_quality(sizes, after)
    text = f"anchors at {size[1]} × {size[0]}: best possible recall {recall:.4f} → {new_recall:.4f}, mean IoU "
    text += f"{iou:.3f} → {new_iou:.3f}: " + "  ".join(f"{width:.1f},{height:.1f}" for width, height in after)
    return with_anchors(network, after), text
