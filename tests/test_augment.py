"""Boxes follow pixels through every augmentation, and what is random follows from seed, epoch and position."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from utils.data.augment import (
    LIMITS,
    Augmentation,
    Placements,
    blend,
    draw,
    flip_boxes,
    flip_planes,
    hide_behind_fence,
    jitter_colours,
    mosaic_regions,
    move_boxes,
    random_flips,
    random_placements,
    random_tiles,
    sample_generator,
    whole_pixels,
)
from utils.data.images import GREY

STILL = Augmentation(**dict.fromkeys((field.name for field in dataclasses.fields(Augmentation)), 0.0))
"""Nothing varies."""
GEOMETRIES = {
    "as it is": STILL,
    "scaled": dataclasses.replace(STILL, scale=0.5),
    "shifted": dataclasses.replace(STILL, translate=0.3),
    "turned": dataclasses.replace(STILL, degrees=30),
    "sheared": dataclasses.replace(STILL, shear=20),
    "all": dataclasses.replace(STILL, scale=0.3, translate=0.1, degrees=10, shear=5),
}
SIZE = (96, 128)
WHOLE = (0, 0, 128, 96)


def rng(number: int = 0) -> np.random.Generator:
    return sample_generator(7, 0, number)


def picture_with_box(channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A black picture [120, 160, C] with a white rectangle, and its label [1, 5]."""
    image = np.zeros((120, 160, channels), np.uint8)
    image[30:80, 40:120] = 255
    return image, np.array([[1, 80 / 160, 55 / 120, 80 / 160, 50 / 120]], np.float32)


def placements(generator, geometry, image, region=WHOLE, fitted=SIZE) -> Placements:
    """Of one picture, in a region of a sample."""
    (tile,) = random_tiles(generator, dataclasses.replace(geometry, mosaic=0), 0, (), SIZE)
    shapes = np.array([image.shape[:2]])
    return random_placements(geometry, [tile._replace(region=region)], np.array([fitted]), shapes, SIZE)


def boxes_in(label: np.ndarray, placed: Placements) -> np.ndarray:
    return move_boxes(label, np.zeros(len(label), int), placed)[0]


def drawn(image: np.ndarray, *arguments) -> tuple[np.ndarray, Placements]:
    """A sample with one picture, and its placement."""
    canvas, placed = np.empty((*SIZE, image.shape[2]), np.uint8), placements(*arguments[:2], image, *arguments[2:])
    draw(canvas, image, placed, 0)
    return canvas, placed


def extent(image: np.ndarray) -> np.ndarray:
    """x1, y1, x2, y2 of what is white in [h, w, C], to a fraction of a pixel along straight edges."""
    white = image[..., 0].astype(float).clip(GREY, 255) - GREY
    rows, columns = white.max(1) / (255 - GREY), white.max(0) / (255 - GREY)
    edges = []
    for line in (columns, rows):
        bright = np.flatnonzero(line > 0.02)
        edges.append((bright[0] + 1 - line[bright[0]], bright[-1] + line[bright[-1]]))
    return np.array([edges[0][0], edges[1][0], edges[0][1], edges[1][1]])


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(5))
def test_boxes_follow_pixels_in_a_picture_alone(geometry, channels, number):
    image, label = picture_with_box(channels)
    canvas, placed = drawn(image, rng(number), geometry)
    np.testing.assert_allclose(boxes_in(label, placed)[0, 1:], extent(canvas), atol=1.5)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("number", range(5))
def test_boxes_follow_pixels_in_every_region_of_a_mosaic(geometry, number):
    """The box is where its region shows white; of a turned picture it may be larger, if a corner is cut off.

    Where there is no box, less than a tenth of it is seen.
    """
    generator = rng(number)
    image, label = picture_with_box()
    for region in mosaic_regions(generator, SIZE):
        canvas, placed = drawn(image, generator, geometry, region)
        boxes = boxes_in(label, placed)
        left, top, right, bottom = region
        view = canvas[top:bottom, left:right]
        if len(boxes):
            outwards = (extent(view) - (boxes[0, 1:] - (left, top, left, top))) * (1, 1, -1, -1)
            assert outwards.min() > -2
            assert outwards.max() < 2 or geometry.degrees or geometry.shear
        else:
            _, x1, y1, x2, y2 = boxes_in(label, placed._replace(regions=np.array([[-999, -999, 999, 999]])))[0]
            assert (view[..., 0] > 128).sum() < 0.12 * (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("scale", [0.2, 0.5, 1.0, 2.3])
def test_warping_and_plain_resizing_agree(scale):
    """The least shear takes the other way and gives the same sample, but for the rounding to whole pixels."""
    image = cv2.GaussianBlur(rng().integers(0, 255, (120, 160, 3), np.uint8), (0, 0), 6)
    matrix = np.array([[128 * scale, 0, 10.0], [0, 96 * scale, -5.0]])
    plain, warped = np.empty((2, *SIZE, 3), np.uint8)
    for canvas, shear in ((plain, 0), (warped, 1e-4)):
        matrix[0, 1] = shear
        draw(canvas, image, whole_pixels(matrix[None], np.array([WHOLE]), np.array([(120, 160)])), 0)
    assert np.abs(plain.astype(int) - warped)[8:-8, 18:-8].mean() < 2


@pytest.mark.parametrize("degrees", [0, 20])
def test_the_resolution_of_a_picture_does_not_move_it(degrees):
    image, _ = picture_with_box()
    half = cv2.resize(image, (80, 60), interpolation=cv2.INTER_AREA)
    geometry = dataclasses.replace(STILL, scale=0.4, degrees=degrees)
    extents = [extent(drawn(one, rng(), geometry)[0]) for one in (image, half)]
    np.testing.assert_allclose(*extents, atol=1.5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_and_long_pictures_can_be_drawn(shape):
    for number, region in enumerate(mosaic_regions(rng(), SIZE)):
        for degrees in (0, 45):
            canvas, image = np.full((*SIZE, 3), 7, np.uint8), np.zeros((*shape, 3), np.uint8)
            geometry = dataclasses.replace(STILL, scale=0.9, degrees=degrees)
            draw(canvas, image, placements(rng(number), geometry, image, region, (2, 3)), 0)
            left, top, right, bottom = region
            assert set(np.unique(canvas[top:bottom, left:right])) <= {*range(GREY + 1)}
            canvas[top:bottom, left:right] = 7
            assert (canvas == 7).all()


def test_a_mosaic_covers_the_sample_once():
    for number in range(20):
        covered = np.zeros(SIZE, int)
        for left, top, right, bottom in mosaic_regions(rng(number), SIZE):
            covered[top:bottom, left:right] += 1
        assert (covered == 1).all()


def test_large_pictures_leave_no_grey_in_a_mosaic_and_small_ones_touch_the_cut():
    left, top, right, bottom = region = mosaic_regions(rng(), SIZE)[0]
    white = np.full((60, 80, 3), 255, np.uint8)
    assert (drawn(white, rng(), STILL, region)[0][top:bottom, left:right] == 255).all()
    canvas, _ = drawn(white, rng(), STILL, region, (5, 7))
    assert (canvas[bottom - 5 : bottom, right - 7 : right] == 255).all()
    assert (canvas[top:bottom, left:right] == 255).sum() == 5 * 7 * 3


def moved(box: list[float], region: tuple[int, int, int, int], label: int = 0) -> list[list[float]]:
    """A box x1, y1, x2, y2 in a picture of 100 x 100 pixels that is drawn as it is, as seen in a region."""
    x1, y1, x2, y2 = np.array(box) / 100
    row = np.array([[label, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]])
    placed = whole_pixels(np.array([[[100.0, 0, 0], [0, 100, 0]]]), np.array([region]), np.array([(100, 100)]))
    return boxes_in(row, placed)[:, 1:].round(6).tolist()


@pytest.mark.parametrize(
    ("box", "region", "expected"),
    [
        ([10, 10, 40, 40], (0, 0, 30, 100), [[10, 10, 30, 40]]),
        ([-10, 10, 40, 40], (0, 0, 100, 100), [[0, 10, 40, 40]]),
        ([10, 10, 11.9, 40], (0, 0, 100, 100), []),  # narrower than 2 pixels
        ([10, 10, 40, 40], (0, 0, 12, 100), []),  # 2 / 30 of its area left
        ([10, 10, 40, 40], (50, 0, 100, 100), []),  # outside
        ([0, 10, 90, 14], (0, 0, 100, 100), []),  # 22.5 times as long as high
    ],
)
def test_a_box_is_clipped_and_what_is_left_must_be_of_use_and_of_an_ignored_box_be_there(box, region, expected):
    assert moved(box, region) == expected
    assert len(moved(box, region, label=-1)) == (region[0] < box[2])


def test_no_boxes_are_no_problem():
    empty = np.zeros((0, 5), np.float32)
    assert boxes_in(empty, placements(rng(), STILL, np.zeros((4, 4, 3)))).shape == (0, 5)
    assert flip_boxes(np.zeros((0, 5)), np.zeros((0, 2), bool), SIZE).shape == (0, 5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("flip_lr", "flip_ud"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_boxes_follow_pixels_through_flips(flip_lr, flip_ud, channels):
    planes = np.full((channels, 60, 80), GREY, np.uint8)
    planes[:, 10:30, 5:45] = 255
    planes[:, 12, 7] = 200
    expected = planes[:, :: 1 - 2 * flip_ud, :: 1 - 2 * flip_lr].copy()
    flips = random_flips(rng(), Augmentation(flip_lr=flip_lr, flip_ud=flip_ud))
    flip_planes(planes, flips)
    np.testing.assert_array_equal(planes, expected)
    boxes = flip_boxes(np.array([[2.0, 5, 10, 45, 30]]), np.array([flips]), (60, 80))
    np.testing.assert_allclose(boxes, [[2, *extent(planes.transpose(1, 2, 0))]])
    assert (boxes[0, 1] == 35) == bool(flip_lr) and (boxes[0, 2] == 30) == bool(flip_ud)


# Colours


def jittered(*arguments) -> np.ndarray:
    image = arguments[-1]
    planes = np.empty((image.shape[2], *image.shape[:2]), np.uint8)
    jitter_colours(*arguments, planes, np.empty_like(image))
    return planes


def test_without_jitter_colours_stay():
    image = rng().integers(0, 255, (8, 9, 3), np.uint8)
    np.testing.assert_array_equal(jittered(rng(), STILL, image), image.transpose(2, 0, 1))


@pytest.mark.parametrize("number", range(4))
def test_saturation_and_value_are_scaled_as_a_round_trip_through_hsv_scales_them(number):
    """Against OpenCV's float HSV (hue in degrees, saturation and value in 0..1) where nothing is clipped."""
    image = rng().integers(60, 130, (16, 16, 3), np.uint8)
    augmentation = Augmentation(hsv_h=0, hsv_s=0.5, hsv_v=0.4)
    _, saturation, value = rng(number).uniform(-1, 1, 3) * (0, 0.5, 0.4)
    hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV) * (1, 1 + saturation, 1 + value)
    expected = cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2RGB) * 255
    got = jittered(rng(number), augmentation, image).transpose(1, 2, 0)
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("number", range(8))
def test_hue_saturation_and_value_together_are_those_of_float_arithmetic(number):
    """Rotation about the axis of greys, then v (s c + (1 - s) max(c)), here with v s from 0.5 to 2.3."""
    image = rng().integers(60, 130, (16, 16, 3), np.uint8)
    turn, saturation, value = rng(number).uniform(-1, 1, 3) * (0.015, 0.7, 0.4)
    rotation, _ = cv2.Rodrigues(np.full(3, 2 * np.pi * turn / np.sqrt(3)))
    turned = image @ rotation.T
    expected = (1 + value) * ((1 + saturation) * turned - saturation * turned.max(2, keepdims=True))
    got = jittered(rng(number), Augmentation(), image).transpose(1, 2, 0)
    assert np.abs(got - expected.clip(0, 255)).max() <= 2.5


def test_a_picture_of_almost_no_saturation_keeps_its_brightness():
    image = rng().integers(0, 255, (16, 16, 3), np.uint8)
    draws = SimpleNamespace(uniform=lambda *_: np.array([0.01, -0.99, 0]))
    assert np.abs(jittered(draws, Augmentation(hsv_s=1), image) - image.max(2).astype(float)).max() <= 6


def test_a_grey_picture_only_changes_its_value():
    image = np.full((4, 4, 1), 100, np.uint8)
    _, _, value = rng(3).uniform(-1, 1, 3)
    planes = jittered(rng(3), dataclasses.replace(STILL, hsv_h=0.5, hsv_s=1, hsv_v=0.5), image)
    assert planes.shape == (1, 4, 4) and np.abs(planes - 100 * (1 + 0.5 * value)).max() <= 1


# Blending and hiding


def test_a_blend_lies_between_both_samples():
    dark, bright = np.zeros((4, 4, 1), np.uint8), np.full((4, 4, 1), 200, np.uint8)
    assert 40 < blend(rng(), dark, bright)[0, 0, 0] < 160
    np.testing.assert_array_equal(blend(rng(), bright, bright), bright)


@pytest.mark.parametrize("number", range(4))
def test_a_fence_blackens_bars_and_changes_nothing_else(number):
    planes = np.full((3, 128, 96), 200, np.uint8)
    hide_behind_fence(rng(number), planes)
    assert set(np.unique(planes)) == {0, 200}
    assert (planes == planes[0]).all()
    share = (planes == 0).mean()  # two sets of bars that each hide 1 / 9 .. 3 / 7
    assert 1 / 9 < share < 1 - (4 / 7) ** 2 + 0.1


# Values


def test_values_are_checked():
    for field in dataclasses.fields(Augmentation):
        limit = LIMITS.get(field.name, 1)
        for value in (-0.1, limit + 0.1, math.nan):
            with pytest.raises(ValueError, match=rf"{field.name} must lie in 0\.\.{limit:g}; got {value}"):
                Augmentation(**{field.name: value})
