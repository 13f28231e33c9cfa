"""Where pictures lie in a training sample: one alone, or four around a cut; pixels and boxes follow one matrix.

A sample is drawn at its final size: each picture is warped once, straight into its region. Positions in a picture are
shares of its width and height, so the resolution at which it was decoded or kept in memory does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from utils.data.augment import Augmentation
from utils.data.fit import GREY

CUT = (0.2, 0.8)
"""Where a mosaic may be cut, as a share of its side (Darknet's blend_truth_mosaic)."""
MIN_SIDE = 2.0
"""Boxes that are narrower or lower than this many pixels in the sample are dropped."""
MIN_AREA = 0.1
"""Boxes of which a smaller share is left in their region are dropped."""
MAX_ASPECT = 20.0
"""Boxes that are longer than this, in units of their other side, are dropped: slivers that a cut has left."""

Region = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the sample."""


class Placement(NamedTuple):
    """Where one picture lies in a sample."""

    region: Region
    """Nothing is drawn outside."""
    matrix: NDArray[np.float64]
    """[2, 3]: shares of the picture's width and height → pixels of the sample."""


def mosaic_regions(rng: Generator, size: tuple[int, int]) -> tuple[Region, Region, Region, Region]:
    """Four regions around a random cut of a sample of `size` height and width, row by row."""
    height, width = size
    x, y = round(rng.uniform(*CUT) * width), round(rng.uniform(*CUT) * height)
    return (0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)


def random_placement(
    rng: Generator, augmentation: Augmentation, fitted: tuple[int, int], region: Region, size: tuple[int, int]
) -> Placement:
    """Scale, turn, shear and shift a picture at random.

    Alone, the picture lies around the centre of the sample. In a mosaic it is shifted at random as long as it covers
    its region, and touches the cut on the sides where it is too small for that.

    Args:
        rng: generator of the sample.
        augmentation: the ranges.
        fitted: height and width of the picture fitted to the sample.
        region: the whole sample, or a region of a mosaic.
        size: height and width of the sample.
    """
    linear = _random_linear(rng, augmentation, fitted)
    shifts = rng.uniform(-1, 1, 2).tolist()
    alone = region == (0, 0, size[1], size[0])
    offsets = []
    for axis, shift in enumerate(shifts):
        low, high, side = region[axis], region[axis + 2], size[1 - axis]
        slack = (abs(linear[axis][axis]) - (high - low)) / 2  # rotation and shear aside
        if alone:
            shift *= augmentation.translate * side
        elif slack > 0:
            shift *= slack
        else:
            shift = slack if low > 0 else -slack  # towards the cut
        offsets.append((low + high - sum(linear[axis])) / 2 + shift)
    return Placement(region, np.array([[*row, offset] for row, offset in zip(linear, offsets, strict=True)]))


def _random_linear(rng: Generator, augmentation: Augmentation, fitted: tuple[int, int]) -> list[list[float]]:
    """[2][2]: rotation · shear · scaling."""
    gain, turn, shear_x, shear_y = rng.uniform(-1, 1, 4).tolist()
    height, width = (side * (1 + gain * augmentation.scale) for side in fitted)
    turn = math.radians(turn * augmentation.degrees)
    shear_x, shear_y = (math.tan(math.radians(shear * augmentation.shear)) for shear in (shear_x, shear_y))
    cos, sin = math.cos(turn), math.sin(turn)
    return [
        [(cos - sin * shear_y) * width, (cos * shear_x - sin) * height],
        [(sin + cos * shear_y) * width, (sin * shear_x + cos) * height],
    ]


def draw(canvas: NDArray[np.uint8], image: NDArray[np.uint8], placement: Placement) -> Placement:
    """Resample a picture into its region of a sample, bilinearly; what it does not cover becomes grey.

    Args:
        canvas: uint8 [h, w, C], edited.
        image: uint8 [H, W, C], at any resolution.
        placement: where it is wanted.

    Returns:
        Where it lies: as wanted if it is turned or sheared, else rounded to whole pixels on both sides.
    """
    left, top, right, bottom = placement.region
    view = canvas[top:bottom, left:right]
    if not view.size:
        return placement
    if placement.matrix[0, 1] or placement.matrix[1, 0]:
        _warp(view, image, placement)
        return placement
    columns = _crop(placement.matrix[0, 0], placement.matrix[0, 2], left, right, image.shape[1])
    rows = _crop(placement.matrix[1, 1], placement.matrix[1, 2], top, bottom, image.shape[0])
    if columns is None or rows is None:
        view.fill(GREY)
        return placement
    if columns.covered < right - left or rows.covered < bottom - top:
        view.fill(GREY)
    cv2.resize(
        image[rows.source, columns.source],
        (columns.covered, rows.covered),
        dst=canvas[rows.target, columns.target],
        interpolation=cv2.INTER_LINEAR,
    )
    return Placement(placement.region, np.array([[columns.span, 0, columns.offset], [0, rows.span, rows.offset]]))


class _Crop(NamedTuple):
    """The part of one axis of a picture that is seen, and the part of the sample that shows it."""

    source: slice
    target: slice
    span: float
    """Pixels of the sample that the whole axis of the picture would cover."""
    offset: float
    """Pixel of the sample where the axis starts."""

    @property
    def covered(self) -> int:
        return self.target.stop - self.target.start


def _crop(span: float, offset: float, low: int, high: int, pixels: int) -> _Crop | None:
    """What of an axis with so many pixels is seen between `low` and `high`, in whole pixels; None: nothing."""
    start, stop = max(round(offset), low), min(round(offset + span), high)
    if stop <= start:
        return None
    first = max(math.floor((start - offset) / span * pixels), 0)
    last = min(math.ceil((stop - offset) / span * pixels), pixels)
    if last <= first:
        return None
    scale = (stop - start) / (last - first)
    return _Crop(slice(first, last), slice(start, stop), scale * pixels, start - scale * first)


def _warp(view: NDArray[np.uint8], image: NDArray[np.uint8], placement: Placement) -> None:
    """Draw a turned or sheared picture into `view`, the part of a sample that is its region."""
    linear = placement.matrix[:, :2] / image.shape[1::-1]
    # OpenCV's 0, 0 is the centre of the first pixel; here it is its corner.
    offset = placement.matrix[:, 2] + linear.sum(1) / 2 - 0.5 - placement.region[:2]
    cv2.warpAffine(
        image,
        np.column_stack([linear, offset]),
        view.shape[1::-1],
        dst=view,
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(GREY,) * 3,
    )


def move_boxes(labels: Sequence[NDArray[np.float32]], placements: Sequence[Placement]) -> NDArray[np.float64]:
    """Boxes of the pictures of a sample, clipped to their regions; what a cut has left of no use is dropped.

    An ignored box, of class < 0, is kept as long as anything is left: a part of a crowd is a crowd.

    Args:
        labels: for each picture [n, 5]: class, cx, cy, w, h as shares of the picture.
        placements: where each picture lies.

    Returns:
        [m, 5]: class, x1, y1, x2, y2 in pixels of the sample. The box of a turned picture is the box around the four
        corners of the box in the picture.
    """
    counts = [len(rows) for rows in labels]
    rows = np.concatenate(labels).astype(np.float64)
    matrix = np.repeat([placement.matrix for placement in placements], counts, 0)  # [n, 2, 3]
    region = np.repeat([placement.region for placement in placements], counts, 0)  # [n, 4]
    half = rows[:, 3:] / 2
    low, high = np.clip([rows[:, 1:3] - half, rows[:, 1:3] + half], 0, 1)  # the part inside the picture
    centre = (matrix[:, :, :2] * ((low + high) / 2)[:, None]).sum(2) + matrix[:, :, 2]
    half = (np.abs(matrix[:, :, :2]) * ((high - low) / 2)[:, None]).sum(2)
    low, high = np.clip([centre - half, centre + half], region[:, :2], region[:, 2:])  # the part inside the region
    sides = high - low
    keep = (sides.min(1) >= MIN_SIDE) & (sides.max(1) <= MAX_ASPECT * sides.min(1))
    keep &= sides.prod(1) >= MIN_AREA * 4 * half.prod(1)
    keep |= (rows[:, 0] < 0) & (sides.min(1) > 0)
    return np.concatenate([rows[:, :1], low, high], 1)[keep]
