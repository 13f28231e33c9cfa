"""How much training samples vary, and what changes a sample as a whole: colours, flips, blending, hiding.

Every function draws from the generator it is given, and a sample's generator comes from (seed, epoch, position) alone:
the same sample is the same bytes in whatever process it is made, and another epoch makes another sample.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray

MIXUP_BETA = 32.0
"""Beta(32, 32), the field's value for detection: both pictures stay visible (mixup: arXiv:1710.09412)."""
FENCE_BARS, FENCE_GAPS = (1, 3), (4, 8)
"""Widths of the bars of a fence and of the gaps between them, in 32nds of the longer side."""
LIMITS = {"hsv_h": 0.5, "degrees": 180.0, "scale": 0.9, "shear": 60.0}
"""Largest values of an `Augmentation`; 1 for those not named here."""


@dataclass(frozen=True)
class Augmentation:
    """How much training samples vary. With all values 0 a sample is its picture."""

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


def split_planes(image: NDArray[np.uint8], planes: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """uint8 [H, W, C] → contiguous [C, H, W], written to `planes` if they are given."""
    if planes is None:
        planes = np.empty((image.shape[2], *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))
    return planes


def jitter_colours(
    rng: Generator, augmentation: Augmentation, image: NDArray[np.uint8], planes: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Turn the hue and scale saturation and value at random; of a grey picture only the value.

    With V = max(R, G, B), scaling saturation by s and value by v takes each channel c to v (s c + (1 - s) V), which is
    what a round trip through HSV does, without its rounding to 180 hues. The hue is turned first, by a rotation of the
    colour space about the axis of greys. Results are clipped to 0..255.

    Args:
        rng: generator of the sample.
        augmentation: the ranges.
        image: uint8 [H, W, 3] RGB or [H, W, 1] grey.
        planes: uint8 [C, H, W], where the result is written; None: a new array.

    Returns:
        uint8 [C, H, W], contiguous.
    """
    turn, saturation, value = rng.uniform(-1, 1, 3) * (augmentation.hsv_h, augmentation.hsv_s, augmentation.hsv_v)
    if turn and image.shape[2] == 3:
        image = cv2.transform(image, _hue_rotation(2 * np.pi * turn))
    planes = split_planes(image, planes)
    if not (saturation or value):
        return planes
    brightest = planes.max(0) if len(planes) == 1 else cv2.max(cv2.max(planes[0], planes[1]), planes[2])
    own, common = (1 + value) * (1 + saturation), (1 + value) * -saturation
    for plane in planes:
        cv2.addWeighted(plane, own, brightest, common, 0, dst=plane)
    return planes


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
        image = cv2.flip(image, code).reshape(image.shape)
    return image, boxes


def blend(rng: Generator, image: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mixup of two samples of the same shape; the boxes of both stay."""
    share = rng.beta(MIXUP_BETA, MIXUP_BETA)
    return cv2.addWeighted(image, share, other, 1 - share, 0).reshape(image.shape)


def hide_behind_fence(rng: Generator, planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
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
    return np.multiply(planes, visible, out=planes)
