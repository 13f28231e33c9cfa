"""Augmentation: colours, flips, mosaic, mixup, hiding; scaling, rotation, shear and shift of pictures with their boxes.

Every function draws from the generator of the sample, which comes from (seed, epoch, position) alone:
the same sample is the same bytes in whatever process it is made, and another epoch makes another sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, cast

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray

from utils.data.images import GREY

MIXUP_BETA = 32.0
"""Beta(32, 32), the field's value for detection: both pictures stay visible (mixup: arXiv:1710.09412)."""
FENCE_BARS, FENCE_GAPS = (1, 3), (4, 8)
"""Widths of the bars of a fence and of the gaps between them, in 32nds of the longer side."""
LIMITS = {"hsv_h": 0.5, "degrees": 180.0, "scale": 0.9, "shear": 60.0}
"""Largest values of an `Augmentation`; 1 for those not named here."""


@dataclass(frozen=True)
class Augmentation:
    """Ranges in which training samples vary. With all values 0 a sample is its picture."""

    mosaic: float = 1.0
    """Probability that a sample is made of four pictures."""
    mixup: float = 0.0
    """Probability that a sample is blended with another one."""
    hsv_h: float = 0.015
    """Largest turn of the hue, either way, as a share of the circle."""
    hsv_s: float = 0.7
    """Saturation is multiplied by 1 - hsv_s .. 1 + hsv_s."""
    hsv_v: float = 0.4
    """Value (brightness) is multiplied by 1 - hsv_v .. 1 + hsv_v."""
    degrees: float = 0.0
    """Largest rotation, either way."""
    translate: float = 0.1
    """Largest shift, either way, as a share of the input. Not used in a mosaic, which has its own shifts."""
    scale: float = 0.5
    """Pictures are scaled by 1 - scale .. 1 + scale relative to their fitted size."""
    shear: float = 0.0
    """Largest shear in degrees, either way, along both axes."""
    flip_lr: float = 0.5
    """Probability of a mirrored sample; 0 where left and right are different classes."""
    flip_ud: float = 0.0
    """Probability of a sample turned upside down."""
    fence: float = 0.0
    """Probability that black bars hide parts of a sample."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, limit = getattr(self, field.name), LIMITS.get(field.name, 1.0)
            if not 0 <= value <= limit:
                raise ValueError(f"{field.name} must lie in 0..{limit:g}; got {value}")


def sample_generator(seed: int, epoch: int, position: int) -> Generator:
    """The generator of one sample in one epoch."""
    return default_rng(SeedSequence([seed, epoch, position]))


def jitter_colours(
    rng: Generator, augmentation: Augmentation, image: NDArray[np.uint8], planes: NDArray[np.uint8]
) -> None:
    """Turn the hue and scale saturation and value at random; of a grey picture only the value.

    With V = max(R, G, B), scaling saturation by s and value by v takes each channel c to v (s c + (1 - s) V), which is
    what a round trip through HSV does, without its rounding to 180 hues. The hue is turned first, by a rotation of the
    colour space about the axis of greys. Results are clipped to 0..255.

    Args:
        rng: generator of the sample.
        augmentation: the ranges.
        image: uint8 [H, W, 3] RGB or [H, W, 1] grey.
        planes: uint8 [C, H, W], contiguous, where the result is written.
    """
    turn, saturation, value = rng.uniform(-1, 1, 3) * (augmentation.hsv_h, augmentation.hsv_s, augmentation.hsv_v)
    if turn and image.shape[2] == 3:
        image = cast("NDArray[np.uint8]", cv2.transform(image, _hue_rotation(2 * np.pi * turn)))
    cv2.split(image, list(planes))
    if not (saturation or value):
        return
    brightest = planes.max(0) if len(planes) == 1 else cv2.max(cv2.max(planes[0], planes[1]), planes[2])
    channel_weight, brightest_weight = (1 + value) * (1 + saturation), (1 + value) * -saturation
    for plane in planes:
        cv2.addWeighted(plane, channel_weight, brightest, brightest_weight, 0, dst=plane)


def _hue_rotation(angle: float) -> NDArray[np.float64]:
    """[3, 3]: rotation of RGB about (1, 1, 1) by `angle` (Rodrigues' formula); red turns towards green."""
    axis = np.ones((3, 3)) / 3
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) * axis + np.sin(angle) * cross


def flip(
    rng: Generator, augmentation: Augmentation, image: NDArray[np.uint8], boxes: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Mirror a sample, turn it upside down, both or neither.

    Args:
        rng: generator of the sample.
        augmentation: the probabilities.
        image: uint8 [H, W, C].
        boxes: [n, 5]: class, x1, y1, x2, y2 in pixels.
    """
    height, width = image.shape[:2]
    mirror, overturn = rng.random(2) < (augmentation.flip_lr, augmentation.flip_ud)
    if mirror:
        boxes = np.column_stack([boxes[:, 0], width - boxes[:, 3], boxes[:, 2], width - boxes[:, 1], boxes[:, 4]])
    if overturn:
        boxes = np.column_stack([boxes[:, :2], height - boxes[:, 4], boxes[:, 3], height - boxes[:, 2]])
    if mirror or overturn:
        code = -1 if mirror and overturn else int(mirror)
        image = cast("NDArray[np.uint8]", cv2.flip(image, code).reshape(image.shape))
    return image, boxes


def blend(rng: Generator, image: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mixup of two samples of the same shape; the boxes of both stay."""
    share = rng.beta(MIXUP_BETA, MIXUP_BETA)
    return cast("NDArray[np.uint8]", cv2.addWeighted(image, share, other, 1 - share, 0).reshape(image.shape))


def hide_behind_fence(rng: Generator, planes: NDArray[np.uint8]) -> None:
    """Draw black bars in two random directions into a sample [C, H, W] (the fence mask of Chu et al. 2022)."""
    height, width = planes.shape[1:]
    unit = max(height, width) / 32
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    visible = np.ones((height, width), np.bool_)
    for _ in range(2):
        angle, phase = rng.uniform(0, np.pi), rng.random()
        bar, gap = rng.uniform(*FENCE_BARS), rng.uniform(*FENCE_GAPS)
        period = (bar + gap) * unit
        across = x * np.float32(np.cos(angle) / period) + y * np.float32(np.sin(angle) / period)
        visible &= (across + np.float32(phase)) % 1 >= bar / (bar + gap)
    np.multiply(planes, visible, out=planes)


CUT = (0.2, 0.8)
"""Range of the cut of a mosaic, as a share of its side (Darknet's blend_truth_mosaic)."""
MIN_SIDE = 2.0
"""Boxes that are narrower or lower than this many pixels in the sample are dropped."""
MIN_AREA = 0.1
"""Boxes of which a smaller share is left in their region are dropped."""
MAX_ASPECT = 20.0
"""Boxes that are longer than this, in units of their other side, are dropped: slivers that a cut has left."""

Region = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the sample."""


class Placement(NamedTuple):
    """Position of one picture in a sample."""

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
    """Part of an axis with so many pixels that lies between `low` and `high`, in whole pixels; None: nothing."""
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
    counts = [len(part) for part in labels]
    boxes = np.concatenate(labels).astype(np.float64)
    matrix = np.repeat([placement.matrix for placement in placements], counts, 0)  # [n, 2, 3]
    region = np.repeat([placement.region for placement in placements], counts, 0)  # [n, 4]
    half = boxes[:, 3:] / 2
    low, high = np.clip([boxes[:, 1:3] - half, boxes[:, 1:3] + half], 0, 1)  # the part inside the picture
    centre = (matrix[:, :, :2] * ((low + high) / 2)[:, None]).sum(2) + matrix[:, :, 2]
    half = (np.abs(matrix[:, :, :2]) * ((high - low) / 2)[:, None]).sum(2)
    low, high = np.clip([centre - half, centre + half], region[:, :2], region[:, 2:])  # the part inside the region
    sides = high - low
    keep = (sides.min(1) >= MIN_SIDE) & (sides.max(1) <= MAX_ASPECT * sides.min(1))
    keep &= sides.prod(1) >= MIN_AREA * 4 * half.prod(1)
    keep |= (boxes[:, 0] < 0) & (sides.min(1) > 0)
    return np.concatenate([boxes[:, :1], low, high], 1)[keep]
