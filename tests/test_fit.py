"""Fitting pictures to the input of the network, and boxes back."""

from __future__ import annotations

import numpy as np
import pytest

from utils.data.images import GREY, fit, paste, place, unfit

SHAPES = [(480, 640), (640, 480), (33, 57), (1, 1), (9, 5000), (416, 416)]


@pytest.mark.parametrize("mode", ["letterbox", "stretch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unfit_undoes_fit(shape, mode):
    placed = place(shape, (416, 320), mode)
    corners = np.sort(np.random.default_rng(0).uniform(0, 1, (20, 2, 2)), 1) * shape[::-1]
    boxes = corners.reshape(-1, 4)
    scales = np.array(placed.inner[::-1] * 2) / (shape[::-1] * 2)
    fitted = boxes * scales + (placed.left, placed.top) * 2
    np.testing.assert_allclose(unfit(fitted, placed), boxes, atol=1e-9)


@pytest.mark.parametrize(("boxes", "expected"), [([[-50, -50, 500, 500]], [[0, 0, 200, 100]]), (np.zeros((0, 4)), [])])
def test_boxes_beyond_the_picture_are_clipped_and_keep_their_type(boxes, expected):
    found = unfit(np.array(boxes, np.float32), place((100, 200), (64, 64)))
    assert (found.dtype, found.shape[1], found.tolist()) == (np.float32, 4, expected)


def test_a_letterbox_is_centred_grey_and_keeps_the_aspect_ratio():
    """640 x 480 in 416 x 416: 0.65 times as large, 416 x 312, 52 rows of grey above and below."""
    image, placed = fit(np.full((480, 640, 3), 7, np.uint8), (416, 416))
    assert placed == ((480, 640), (416, 416), (312, 416), 0, 52)
    assert (image[52:364] == 7).all()
    assert (image[:52] == GREY).all() and (image[364:] == GREY).all()


def test_a_stretched_picture_fills_the_input():
    image, placed = fit(np.full((480, 640, 3), 7, np.uint8), (96, 64), "stretch")
    assert image.shape == (96, 64, 3) and (image == 7).all()
    assert placed[2:] == ((96, 64), 0, 0)


@pytest.mark.parametrize("mode", ["letterbox", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_input_has_the_size_asked_for(shape, channels, mode):
    image, placed = fit(np.zeros((*shape, channels), np.uint8), (64, 96), mode)
    assert image.shape == (64, 96, channels)
    assert min(placed.inner) >= 1


def test_a_picture_of_the_right_size_is_not_touched():
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    image, placed = fit(picture, (64, 96))
    assert image is picture
    assert placed[2:] == ((64, 96), 0, 0)


def test_the_resolution_of_the_picture_does_not_move_it():
    """A picture decoded at half its sides lies where the whole one does."""
    placed = place((100, 200), (64, 64))
    half = paste(np.full((50, 100, 3), 9, np.uint8), placed)
    np.testing.assert_array_equal(half, paste(np.full((100, 200, 3), 9, np.uint8), placed))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="letterbox or stretch, not 'crop'"):
        place((1, 1), (2, 2), "crop")
