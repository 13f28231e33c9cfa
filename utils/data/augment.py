"""Augmentation: colours, flips, mosaic, mixup, hiding; scaling, rotation, shear and shift of pictures with their boxes.

Every function draws from the generator of the sample, which depends on (seed, epoch, position) alone. So every process
makes the same bytes of a sample, and each epoch makes another sample.
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

from utils.data.images import GREY, Image, Size

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
    rng: Generator, augmentation: Augmentation, image: Image, planes: NDArray[np.uint8], scratch: Image
) -> None:
    """Turn the hue and scale saturation and value at random; of a grey picture only the value.

    With V = max(R, G, B), scaling saturation by s and value by v turns each channel c into v (s c + (1 - s) V). So does
    a trip through HSV, but it rounds to 180 hues and limits the saturation. The hue is turned first, by a rotation of
    the colour space about the axis of greys. Results are clipped to 0..255.

    Args:
        rng: generator of the sample.
        augmentation: the ranges.
        image: uint8 [H, W, 3] RGB or [H, W, 1] grey.
        planes: uint8 [C, H, W], contiguous, where the result is written.
        scratch: uint8 [H, W, C], contiguous, overwritten. The same for all samples, it stays in the processor's cache.
    """
    ranges = augmentation.hsv_h, augmentation.hsv_s, augmentation.hsv_v
    turn, saturation, value = (rng.uniform(-1, 1, 3) * ranges).tolist()
    channel_weight, brightest_weight = (1 + value) * (1 + saturation), (1 + value) * -saturation
    if turn and image.shape[2] == 3:
        # A larger one would clip before the brightest channel is subtracted, a smaller one leave few levels of it.
        early = min(max(channel_weight, 1 / 8), 1.0)
        cv2.transform(image, early * _hue_rotation(2 * math.pi * turn), dst=scratch)
        image, channel_weight, brightest_weight = scratch, channel_weight / early, brightest_weight / early
    cv2.split(image, list(planes))
    if not (saturation or value):
        return
    brightest = cv2.max(planes[0], planes[-1], dst=scratch.reshape(planes.shape)[0])
    for plane in planes[1:-1]:
        cv2.max(brightest, plane, dst=brightest)
    if channel_weight == 1:  # faster than addWeighted
        cv2.convertScaleAbs(brightest, dst=brightest, alpha=abs(brightest_weight))
        combine = cv2.add if brightest_weight > 0 else cv2.subtract
        for plane in planes:
            combine(plane, brightest, dst=plane)
    else:
        for plane in planes:
            cv2.addWeighted(plane, channel_weight, brightest, brightest_weight, 0, dst=plane)


def _hue_rotation(angle: float) -> NDArray[np.float64]:
    """[3, 3]: rotation of RGB about (1, 1, 1) by `angle` (Rodrigues' formula); red turns towards green."""
    axis, cross = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    same, back, forth = math.cos(angle) + axis, axis - cross, axis + cross
    return np.array([[same, back, forth], [forth, same, back], [back, forth, same]])


def random_flips(rng: Generator, augmentation: Augmentation) -> tuple[bool, bool]:
    """Whether a sample is mirrored, and whether it is turned upside down."""
    mirror, overturn = rng.random(2).tolist()
    return mirror < augmentation.flip_lr, overturn < augmentation.flip_ud


def flip_planes(planes: NDArray[np.uint8], flips: tuple[bool, bool]) -> None:
    """Flip a sample [C, H, W] in place, as `random_flips` says."""
    if any(flips):
        for plane in planes:  # faster than the picture before it is split
            cv2.flip(plane, -1 if all(flips) else int(flips[0]), dst=plane)


def flip_boxes(boxes: NDArray[np.float64], flips: NDArray[np.bool_], size: Size) -> NDArray[np.float64]:
    """Flip boxes of samples.

    Args:
        boxes: [n, 5]: class, x1, y1, x2, y2 in pixels.
        flips: [n, 2], of `random_flips` for the sample of each box.
        size: height and width of a sample.
    """
    low, high, sides = boxes[:, 1:3], boxes[:, 3:], size[::-1]
    low, high = np.where(flips, sides - high, low), np.where(flips, sides - low, high)
    return np.concatenate([boxes[:, :1], low, high], 1)


def blend(rng: Generator, image: Image, other: Image) -> Image:
    """Mixup of two samples of the same shape; the boxes of both stay."""
    share = rng.beta(MIXUP_BETA, MIXUP_BETA)
    return cast("Image", cv2.addWeighted(image, share, other, 1 - share, 0).reshape(image.shape))


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
"""Range of the cut of a mosaic, as a share of its side (Darknet's load_data_detection)."""
MIN_SIDE = 2.0
"""Boxes that are narrower or lower than this many pixels in the sample are dropped."""
MIN_AREA = 0.1
"""Boxes of which a smaller share is left in their region are dropped."""
MAX_ASPECT = 20.0
"""Boxes that are longer than this, in units of their other side, are dropped: slivers that a cut has left."""

Region = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the sample."""


class Tile(NamedTuple):
    """Picture of a sample: one of four in a mosaic, or the only one."""

    position: int
    """In the data set."""
    region: Region
    """Nothing is drawn outside."""
    draws: Sequence[float]
    """Six numbers of -1..1 that say how it varies, see `random_placements`."""


class Placements(NamedTuple):
    """Positions of pictures in their samples."""

    regions: NDArray[np.int64]
    """[n, 4], nothing is drawn outside."""
    matrices: NDArray[np.float64]
    """[n, 2, 3]: shares of the picture's width and height → pixels of the sample."""
    sources: NDArray[np.int64]
    """[n, 4]: left, top, right, bottom of the part of the picture that is drawn, if it is not turned."""
    targets: NDArray[np.int64]
    """[n, 4]: pixels of the sample that this part covers."""


def random_tiles(
    rng: Generator, augmentation: Augmentation, position: int, partners: Sequence[int], size: Size
) -> list[Tile]:
    """A picture alone, or a mosaic of it and three of `partners`; `size` is height and width of the sample."""
    positions, regions = [position], [(0, 0, size[1], size[0])]
    if rng.random() < augmentation.mosaic:
        positions += [partners[number] for number in rng.integers(len(partners), size=3).tolist()]
        regions = list(mosaic_regions(rng, size))
    return list(map(Tile, positions, regions, rng.uniform(-1, 1, (len(positions), 6)).tolist()))


def mosaic_regions(rng: Generator, size: Size) -> tuple[Region, Region, Region, Region]:
    """Four regions around a random cut of a sample of `size` height and width, row by row."""
    height, width = size
    x, y = round(rng.uniform(*CUT) * width), round(rng.uniform(*CUT) * height)
    return (0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)


def random_placements(
    augmentation: Augmentation, tiles: Sequence[Tile], fitted: NDArray[np.int64], shapes: NDArray[np.int64], size: Size
) -> Placements:
    """Scale, turn, shear and shift pictures at random.

    Alone, a picture lies around the centre of the sample. In a mosaic it is shifted at random as long as it covers
    its region, and touches the cut on the sides where it is too small for that.

    Args:
        augmentation: the ranges.
        tiles: n pictures. Their numbers are for scale, rotation, shear along x and y, and shift along x and y.
        fitted: [n, 2], height and width of the pictures fitted to the sample.
        shapes: [n, 2], height and width of the pictures as they are.
        size: height and width of the sample.
    """
    draws, regions = np.array([tile.draws for tile in tiles]), np.array([tile.region for tile in tiles])
    low, high, sides = regions[:, :2], regions[:, 2:], size[::-1]
    turn = np.radians(draws[:, 1] * augmentation.degrees)
    shear_x, shear_y = np.tan(np.radians(draws[:, 2:4].T * augmentation.shear))
    cos, sin = np.cos(turn), np.sin(turn)
    # Rotation · shear · scaling, [n, 2, 2].
    linear = np.array([[cos - sin * shear_y, cos * shear_x - sin], [sin + cos * shear_y, sin * shear_x + cos]])
    linear = linear.transpose(2, 0, 1) * (fitted[:, ::-1] * (1 + draws[:, :1] * augmentation.scale))[:, None]
    slack = (np.abs(linear[:, (0, 1), (0, 1)]) - (high - low)) / 2  # rotation and shear aside
    shifts = np.where(slack > 0, draws[:, 4:] * slack, np.where(low > 0, slack, -slack))  # or towards the cut
    alone = (high - low == sides).all(1, keepdims=True)
    shifts = np.where(alone, draws[:, 4:] * augmentation.translate * sides, shifts)
    offsets = (low + high - linear.sum(2)) / 2 + shifts
    return whole_pixels(np.concatenate([linear, offsets[..., None]], 2), regions, shapes)


def whole_pixels(matrices: NDArray[np.float64], regions: NDArray[np.int64], shapes: NDArray[np.int64]) -> Placements:
    """Placements of pictures of [n, 2] height and width; those that are not turned are rounded to whole pixels."""
    spans, offsets = matrices[:, (0, 1), (0, 1)], matrices[:, :, 2]
    pixels = shapes[:, ::-1]
    start, stop = np.maximum(np.round(offsets), regions[:, :2]), np.minimum(np.round(offsets + spans), regions[:, 2:])
    first = np.maximum(np.floor((start - offsets) / spans * pixels), 0)
    last = np.minimum(np.ceil((stop - offsets) / spans * pixels), pixels)
    visible = ((stop - start).min(1) > 0) & ((last - first).min(1) > 0)
    scale = (stop - start) / np.where(visible[:, None], last - first, 1)
    upright = visible & ~matrices[:, (0, 1), (1, 0)].any(1)
    matrices = matrices.copy()
    matrices[upright, :, :2] = (np.eye(2) * (scale * pixels)[:, None])[upright]
    matrices[upright, :, 2] = (start - scale * first)[upright]
    ends = np.where(visible[:, None], np.concatenate([first, last, start, stop], 1), 0).astype(np.int64)
    return Placements(regions, matrices, ends[:, :4], ends[:, 4:])


def draw(canvas: Image, image: Image, placements: Placements, number: int) -> None:
    """Resample a picture into its region of a sample, bilinearly; what it does not cover becomes grey.

    Args:
        canvas: uint8 [h, w, C], edited.
        image: uint8 [H, W, C], at any resolution.
        placements: of `random_placements`.
        number: of the picture in them.
    """
    left, top, right, bottom = region = placements.regions[number].tolist()
    matrix, view = placements.matrices[number], canvas[top:bottom, left:right]
    if not view.size:
        return
    if matrix[0, 1] or matrix[1, 0]:
        _warp(view, image, matrix, (left, top))
        return
    target = placements.targets[number].tolist()
    if target != region:
        view.fill(GREY)
    x1, y1, x2, y2 = target
    if x2 > x1:
        left, top, right, bottom = placements.sources[number].tolist()
        part, dst = image[top:bottom, left:right], canvas[y1:y2, x1:x2]
        cv2.resize(part, (x2 - x1, y2 - y1), dst=dst, interpolation=cv2.INTER_LINEAR)


def _warp(view: Image, image: Image, matrix: NDArray[np.float64], corner: tuple[int, int]) -> None:
    """Draw a turned or sheared picture into `view`, the part of a sample that begins at `corner`."""
    linear = matrix[:, :2] / image.shape[1::-1]
    # OpenCV's 0, 0 is the centre of the first pixel; here it is its corner.
    offset = matrix[:, 2] + linear.sum(1) / 2 - 0.5 - corner
    cv2.warpAffine(
        image,
        np.column_stack([linear, offset]),
        view.shape[1::-1],
        dst=view,
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(GREY,) * 3,
    )


def move_boxes(
    boxes: NDArray[np.float32], owners: NDArray[np.int64], placements: Placements
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes of pictures in their samples, clipped to their regions; what a cut has left of no use is dropped.

    An ignored box, of class < 0, is kept as long as anything is left: a part of a crowd is a crowd.

    Args:
        boxes: [n, 5]: class, cx, cy, w, h as shares of the picture.
        owners: [n], number of the picture of each box.
        placements: of the pictures.

    Returns:
        [m, 5]: class, x1, y1, x2, y2 in pixels of the sample. The box of a turned picture is the box around the four
        corners of the box in the picture. And [n], True for the m boxes that are kept.
    """
    boxes, matrix, region = boxes.astype(np.float64), placements.matrices[owners], placements.regions[owners]
    half = boxes[:, 3:] / 2
    low, high = np.clip([boxes[:, 1:3] - half, boxes[:, 1:3] + half], 0, 1)  # the part inside the picture
    centre = (matrix[:, :, :2] * ((low + high) / 2)[:, None]).sum(2) + matrix[:, :, 2]
    half = (np.abs(matrix[:, :, :2]) * ((high - low) / 2)[:, None]).sum(2)
    low, high = np.clip([centre - half, centre + half], region[:, :2], region[:, 2:])  # the part inside the region
    sides = high - low
    keep = (sides.min(1) >= MIN_SIDE) & (sides.max(1) <= MAX_ASPECT * sides.min(1))
    keep &= sides.prod(1) >= MIN_AREA * 4 * half.prod(1)
    keep |= (boxes[:, 0] < 0) & (sides.min(1) > 0)
    return np.concatenate([boxes[:, :1], low, high], 1)[keep], keep
