"""How a training sample is varied: which pictures it is made of, where they lie, and their colours.

Every function draws from the generator it is given, and a sample's generator comes from (seed, epoch, position) alone:
the same sample is the same bytes in whatever process it is made, and another epoch makes another sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray

from utils.data.fit import GREY

MIN_SIDE = 2.0
"""Boxes that are narrower or lower than this many pixels after augmentation are dropped."""
MIN_AREA = 0.1
"""Boxes of which a smaller share is left inside their region are dropped."""
MAX_ASPECT = 20.0
"""Boxes that a cut has left longer than this, in units of their other side, are dropped."""
CUT = (0.2, 0.8)
"""Where a mosaic may be cut, as a share of its side (Darknet's blend_truth_mosaic)."""
MIXUP_BETA = 32.0
"""Beta(32, 32): both pictures stay visible (Zhang et al., arXiv:1710.09412, with the field's value for detection)."""


@dataclass(frozen=True)
class Augmentation:
    """How much training samples vary. All zeros: the picture as it is."""

    mosaic: float = 1.0
    """Probability that a sample is made of four pictures."""
    mixup: float = 0.0
    """Probability that a sample is blended with another one."""
    hsv_h: float = 0.015
    """Hue is turned by up to this share of the circle, either way."""
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
    """Probability that black bars hide parts of the sample."""

    def __post_init__(self) -> None:
        limits = {"hsv_h": 0.5, "degrees": 180.0, "scale": 0.9, "shear": 60.0}
        for field in fields(self):
            value, limit = getattr(self, field.name), limits.get(field.name, 1.0)
            if not 0 <= value <= limit:
                raise ValueError(f"{field.name} must lie in 0..{limit:g}; got {value}")


class Placement(NamedTuple):
    """Where one picture lies in a sample."""

    region: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the sample; nothing is drawn outside."""
    matrix: NDArray[np.float64]
    """[2, 3]: pixels of the picture (the corner of the first pixel is 0, 0) → pixels of the sample."""


def sample_generator(seed: int, epoch: int, position: int) -> Generator:
    """The generator of one sample in one epoch."""
    return default_rng(SeedSequence([seed, epoch, position]))


def mosaic_regions(rng: Generator, size: tuple[int, int]) -> tuple[tuple[int, int, int, int], ...]:
    """Four regions around a random cut point: left, top, right, bottom; row by row."""
    height, width = size
    x, y = round(rng.uniform(*CUT) * width), round(rng.uniform(*CUT) * height)
    return (0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)


def random_placement(
    rng: Generator,
    augmentation: Augmentation,
    scale: tuple[float, float],
    shape: tuple[int, int],
    region: tuple[int, int, int, int],
    size: tuple[int, int],
) -> Placement:
    """Scale, turn, shear and shift a picture at random in its region of a sample.

    Alone, the picture lies around the centre of the sample. In a mosaic it is shifted at random as long as it covers
    its region, and touches the cut where it is too small for that.

    Args:
        rng: generator of the sample.
        augmentation: the ranges.
        scale: x and y scale that fits the picture to the sample.
        shape: height and width of the picture.
        region: left, top, right, bottom of its region.
        size: height and width of the sample.
    """
    linear = _random_linear(rng, augmentation, scale)
    covered = np.abs(np.diag(linear)) * shape[::-1]  # width, height in the sample, rotation aside
    corner, extent = np.array(region[:2]), np.array(region[2:]) - region[:2]
    whole = np.array(size[::-1])
    alone = (extent == whole).all()
    centre = corner + extent / 2
    shift = rng.uniform(-1, 1, 2)
    if alone:
        centre = centre + shift * augmentation.translate * whole
    else:
        slack = covered - extent
        inwards = np.where(corner == 0, 1, -1)  # towards the cut
        centre = centre + np.where(slack > 0, shift * slack / 2, inwards * -slack / 2)
    offset = centre - linear @ (np.array(shape[::-1]) / 2)
    return Placement(region, np.column_stack([linear, offset]))


def _random_linear(rng: Generator, augmentation: Augmentation, scale: tuple[float, float]) -> NDArray[np.float64]:
    """[2, 2]: rotation · shear · scaling."""
    gain, turn, *shears = rng.uniform(-1, 1, 4) * (
        augmentation.scale,
        np.radians(augmentation.degrees),
        *(np.radians(augmentation.shear),) * 2,
    )
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shear = np.array([[1, np.tan(shears[0])], [np.tan(shears[1]), 1]])
    return rotation @ shear @ np.diag(scale) * (1 + gain)


def draw(canvas: NDArray[np.uint8], image: NDArray[np.uint8], placement: Placement, shape: tuple[int, int]) -> None:
    """Warp a picture into its region of `canvas`; what the picture does not cover becomes grey.

    Args:
        canvas: uint8 [h, w, C], edited.
        image: uint8 [H', W', C], the picture at whatever resolution it was decoded.
        placement: its matrix refers to the picture's own resolution.
        shape: height and width of the picture's own resolution.
    """
    left, top, right, bottom = placement.region
    if right <= left or bottom <= top:
        return
    linear = placement.matrix[:, :2] * (shape[1] / image.shape[1], shape[0] / image.shape[0])
    # OpenCV counts from the centre of the first pixel, which lies at 0.5, 0.5 here.
    offset = placement.matrix[:, 2] + linear.sum(1) / 2 - 0.5 - (left, top)
    view = canvas[top:bottom, left:right]
    warped = cv2.warpAffine(
        image,
        np.column_stack([linear, offset]),
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(GREY,) * 3,
    )
    view[:] = warped.reshape(view.shape)


def move_boxes(boxes: Sequence[NDArray[np.floating]], placements: Sequence[Placement]) -> NDArray[np.float32]:
    """Boxes of all pictures of a sample in pixels of the sample, clipped to their regions; poor remains are dropped.

    Args:
        boxes: for each picture [n, 5]: class, x1, y1, x2, y2 in its own pixels.
        placements: where each picture lies.

    Returns:
        [m, 5], same format.
    """
    counts = [len(rows) for rows in boxes]
    rows = np.concatenate(boxes)
    matrix = np.repeat([placement.matrix for placement in placements], counts, 0)  # [n, 2, 3]
    region = np.repeat([placement.region for placement in placements], counts, 0)  # [n, 4]
    corners = rows[:, [1, 2, 3, 2, 3, 4, 1, 4]].reshape(-1, 4, 2)  # x, y clockwise
    moved = corners @ matrix[:, :, :2].transpose(0, 2, 1) + matrix[:, None, :, 2]
    low, high = moved.min(1), moved.max(1)
    clipped_low = np.clip(low, region[:, :2], region[:, 2:])
    clipped_high = np.clip(high, region[:, :2], region[:, 2:])
    sides = clipped_high - clipped_low
    whole = (high - low).prod(1)
    keep = (
        (sides.min(1) >= MIN_SIDE) & (sides.prod(1) >= MIN_AREA * whole) & (sides.max(1) <= MAX_ASPECT * sides.min(1))
    )
    return np.concatenate([rows[:, :1], clipped_low, clipped_high], 1)[keep].astype(np.float32)


def jitter_colours(rng: Generator, augmentation: Augmentation, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn the hue and scale saturation and value of a picture [H, W, 3]; of a grey one [H, W, 1] only the value."""
    hue, saturation, value = rng.uniform(-1, 1, 3) * (augmentation.hsv_h, augmentation.hsv_s, augmentation.hsv_v)
    if not (hue or saturation or value):
        return image
    levels = np.arange(256)
    brighter = np.clip(np.rint(levels * (1 + value)), 0, 255).astype(np.uint8)
    if image.shape[2] == 1:
        return cv2.LUT(image, brighter)[..., None]
    turned = (np.rint(levels + 180 * hue) % 180).astype(np.uint8)  # OpenCV's 8-bit hue has 180 steps
    richer = np.clip(np.rint(levels * (1 + saturation)), 0, 255).astype(np.uint8)
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    changed = [cv2.LUT(plane, table) for plane, table in zip(planes, (turned, richer, brighter), strict=True)]
    return cv2.cvtColor(cv2.merge(changed), cv2.COLOR_HSV2RGB)


def flip(
    rng: Generator, augmentation: Augmentation, image: NDArray[np.uint8], boxes: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mirror a sample and its boxes [n, 5] (class, x1, y1, x2, y2 in pixels) with the two probabilities."""
    height, width = image.shape[:2]
    mirror, overturn = rng.random(2) < (augmentation.flip_lr, augmentation.flip_ud)
    if mirror:
        image = np.ascontiguousarray(image[:, ::-1])
        boxes = np.column_stack([boxes[:, 0], width - boxes[:, 3], boxes[:, 2], width - boxes[:, 1], boxes[:, 4]])
    if overturn:
        image = np.ascontiguousarray(image[::-1])
        boxes = np.column_stack([boxes[:, :2], height - boxes[:, 4], boxes[:, 3], height - boxes[:, 2]])
    return image, boxes


def blend(rng: Generator, image: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mixup of two samples of equal shape; the boxes of both stay."""
    share = rng.beta(MIXUP_BETA, MIXUP_BETA)
    return cv2.addWeighted(image, share, other, 1 - share, 0).reshape(image.shape)


def hide_behind_fence(rng: Generator, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Black bars in two random directions over a picture [H, W, C].

    With k = the longer side / 32, bars are k..3k wide and 4k..8k apart (the fence mask of Chu et al. 2022).
    """
    height, width = image.shape[:2]
    unit = max(height, width) / 32
    visible = np.ones((height, width), np.bool_)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    for _ in range(2):
        angle, phase = rng.uniform(0, np.pi), rng.random()
        bar, gap = rng.uniform(1, 3) * unit, rng.uniform(4, 8) * unit
        along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
        visible &= (along / np.float32(bar + gap) + np.float32(phase)) % 1 >= bar / (bar + gap)
    return image * visible[..., None]
