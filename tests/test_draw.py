"""Boxes and labels: where they are, what they look like, and that they stay inside the picture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.draw import (
    GAP,
    GRID_SIDE,
    LOST,
    STRIP,
    _place,
    colour,
    draw_detections,
    draw_grid,
    ink_on,
    label_text,
    label_texts,
    style_of,
    targets_as_detections,
)

GREY = np.full((120, 160, 3), 128, np.uint8)
NAMES = ("cat", "dog")


def detection(x1, y1, x2, y2, confidence=0.5, number=0) -> np.ndarray:
    return np.array([[x1, y1, x2, y2, confidence, number]], float)


def test_the_picture_that_is_given_stays_as_it_is():
    before = GREY.copy()
    drawn = draw_detections(GREY, detection(30, 40, 90, 100), NAMES)
    np.testing.assert_array_equal(GREY, before)
    assert drawn.shape == GREY.shape
    assert (drawn != GREY).any()
    np.testing.assert_array_equal(draw_detections(GREY, np.zeros((0, 6)), NAMES), GREY)


def test_the_sides_of_a_box_have_the_colour_of_its_class():
    drawn = draw_detections(GREY, detection(30, 40, 90, 100, number=1), NAMES)
    for y, x in ((70, 30), (70, 90), (100, 60)):
        assert tuple(drawn[y, x]) == colour(1)


def test_the_most_confident_box_is_on_top():
    rows = np.concatenate([detection(30, 40, 90, 100, 0.9, 0), detection(30, 40, 90, 100, 0.4, 1)])
    assert tuple(draw_detections(GREY, rows, NAMES)[70, 30]) == colour(0)
    assert tuple(draw_detections(GREY, rows[::-1], NAMES)[70, 30]) == colour(0)


def test_no_box_crosses_a_label():
    """The dog's left side, x = 40, runs through the place of the cat's label."""
    rows = np.concatenate([detection(20, 40, 100, 100, 0.4, 0), detection(40, 0, 150, 110, 0.9, 1)])
    drawn = draw_detections(GREY, rows, NAMES)
    label = _place("cat 0.40", (20, 40, 100, 100), GREY.shape[:2], style_of(*GREY.shape[:2]), [])
    ground = drawn[label.top : label.bottom, label.left : label.right]
    assert label.left < 40 < label.right
    assert not (ground == colour(1)).all(axis=2).any()


@given(
    size=st.tuples(st.integers(120, 1200), st.integers(120, 1200)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(max_examples=200)
def test_a_label_is_inside_the_picture_and_touches_its_box(size, corners):
    height, width = size
    (x1, x2), (y1, y2) = sorted(corners[:2]), sorted(corners[2:])
    box = round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height)
    style = style_of(height, width)
    label = _place("cat 0.40", box, size, style, [])
    assert 0 <= label.left < label.right <= width
    assert 0 <= label.top < label.baseline < label.bottom <= height
    assert label.left <= box[2] + style.line
    assert label.right >= box[0] - style.line
    assert label.top <= box[3] + style.line
    assert label.bottom >= box[1] - style.line


def test_labels_of_neighbours_do_not_hide_each_other():
    size, style, taken = (240, 320), style_of(240, 320), []
    for offset in range(4):
        taken.append(_place("cat 0.40", (60 + offset, 80 + offset, 200, 180), size, style, taken))
    for a, b in itertools.combinations(taken, 2):
        assert a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top


@pytest.mark.parametrize("size", [(8, 8), (1, 300), (300, 1)])
def test_a_picture_smaller_than_a_label_can_be_drawn_on(size):
    drawn = draw_detections(np.zeros((*size, 3), np.uint8), detection(0, 0, size[1], size[0]), NAMES)
    assert drawn.shape == (*size, 3)


def test_lines_and_letters_grow_with_the_picture_and_ink_can_be_read_on_its_ground():
    small, large = style_of(240, 320), style_of(2160, 3840)
    assert all(a < b for a, b in zip(small, large, strict=True))
    for ground, ink in (((255, 255, 0), 0), ((0, 0, 160), 255), ((255, 255, 255), 0), ((0, 0, 0), 255)):
        assert ink_on(ground) == (ink,) * 3


def test_colours_are_distinct_and_do_not_depend_on_each_other():
    assert len({colour(number) for number in range(80)}) == 80
    first = np.array([colour(number) for number in range(20)], float)
    gaps = np.linalg.norm(first[:, None] - first, axis=2)[~np.eye(20, dtype=bool)]
    assert gaps.min() > 50


def test_label_text_uses_letters_the_font_has():
    names = ["dog", "Bär", "犬", "a\tb"]
    assert [label_text(number, names) for number in range(5)] == ["dog", "Bar", "class 2", "class 3", "class 4"]


def test_targets_become_corners_of_their_picture():
    """Centre (0.5, 0.25), size (0.5, 0.5) of 40 × 80: x 20…60, y 0…20."""
    targets = np.array([[1, 3, 0.5, 0.25, 0.5, 0.5]])
    none, one = targets_as_detections(targets, 2, (40, 80))
    assert none.shape == (0, 6)
    np.testing.assert_array_equal(one, [[20, 0, 60, 20, np.nan, 3]])


@pytest.mark.parametrize(
    "shape", [(1, 3, 32, 32), (3, 1, 32, 64), (20, 3, 16, 16), (2, 3, 1500, 900), (5, 3, 8, 4000), (1, 3, 8192, 32)]
)
def test_a_grid_is_rgb_and_not_larger_than_allowed(shape):
    images = np.full(shape, 7, np.uint8)
    grid = draw_grid(images, [np.zeros((0, 6))] * len(images), NAMES)
    assert grid.dtype == np.uint8
    assert grid.shape[2] == 3
    assert max(grid.shape) <= GRID_SIDE


def test_boxes_follow_their_pictures_into_the_grid():
    images = np.zeros((4, 3, 100, 100), np.uint8)
    boxes = [np.zeros((0, 6))] * 3 + [detection(20, 30, 80, 90, np.nan, 1)]
    grid = draw_grid(images, boxes, NAMES)
    ys, xs = np.nonzero((grid == colour(1)).all(axis=2))
    height, width = grid.shape[:2]
    assert ys.min() > height / 2
    assert xs.min() > width / 2


@pytest.mark.parametrize(("labelled", "texts"), [(1.0, ["cat 0.50", "dog"]), (0.3, ["cat", "dog"]), (0.01, ["0", "1"])])
def test_labels_are_shorter_where_they_would_hide_the_picture(labelled, texts):
    """The whole texts cover about 0.4 of 50 × 100 pixels, the names 0.25."""
    rows = np.concatenate([detection(0, 0, 9, 9), detection(5, 5, 9, 9, np.nan, 1)])
    assert label_texts(rows, NAMES, (50, 100), labelled) == texts


def test_small_pictures_grow_and_a_legend_names_their_numbers():
    crowd = np.concatenate([detection(n, n, n + 9, n + 9, number=n % 2) for n in range(10)])
    picture = np.zeros((1, 3, 32, 32), np.uint8)
    assert draw_grid(picture, [crowd[:0]], NAMES).shape == (320, 320, 3)
    wordy = tuple(6 * name for name in NAMES)
    assert draw_grid(picture, [crowd], wordy).shape == (320 + 2 * STRIP, 320, 3)


def test_columns_have_headings_and_marked_boxes_a_frame_of_their_own():
    rows = np.concatenate([detection(60, 60, 120, 120), detection(200, 200, 300, 300)])
    marks = [[(rows[:1], "lost", LOST)], []]
    grid = draw_grid(np.zeros((2, 3, 400, 400), np.uint8), [rows, rows], NAMES, ["before", "after"], marks)
    assert (grid[:STRIP] == 255).any(axis=(1, 2)).all() and (grid[:STRIP] < 255).any()
    frames = np.all(grid[STRIP:] == LOST, axis=2)
    half = (grid.shape[1] + GAP) // 2
    assert frames[: half // 2, : half // 2].any() and not frames[:, half:].any() and not frames[half // 2 :].any()
