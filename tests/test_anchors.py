"""Anchors that fit a data set."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.nets import tiny
from utils.data.anchors import auto_anchors, box_sizes, cluster, fit_quality, shape_ious, used_anchors, with_anchors
from utils.data.index import Index
from utils.errors import DataError
from utils.memory import PackedBoxes, PackedPaths


def index_of(*labels: np.ndarray) -> Index:
    shapes = np.array([(100, 200)] * len(labels))
    names, nothing = (f"{n}.png" for n in range(len(labels))), [np.zeros((0, 5), np.float32)] * len(labels)
    return Index(PackedPaths(names), PackedBoxes(labels), PackedBoxes(nothing), shapes, len(labels), ())


def test_box_sizes_are_pixels_of_the_fitted_picture():
    """A picture of 200 × 100 is halved to fit 100 × 100: 0.2 of its width are 20 pixels."""
    rows = np.array([[0, 0.5, 0.5, 0.2, 0.4]], np.float32)
    np.testing.assert_allclose(box_sizes(index_of(rows), (100, 100)), [[20, 20]], rtol=1e-6)
    np.testing.assert_allclose(box_sizes(index_of(rows), (100, 100), "stretch"), [[20, 40]], rtol=1e-6)


def test_clusters_find_the_groups_they_were_made_of():
    rng = np.random.default_rng(0)
    centres = np.array([[10, 12], [40, 20], [80, 90]])
    sizes = np.concatenate([centre * rng.uniform(0.95, 1.05, (200, 2)) for centre in centres])
    np.testing.assert_allclose(cluster(sizes, 3), centres, rtol=0.03)


def test_quality_counts_boxes_within_four_times_the_sides():
    recall, iou = fit_quality(np.array([[10.0, 10], [10, 41]]), np.array([[10.0, 10]]))
    assert recall == 0.5
    assert iou == pytest.approx((1 + 100 / 410) / 2)
    assert shape_ious(np.array([[3.0, 2]]), np.array([[2.0, 4]])).item() == pytest.approx(0.4)


def test_only_the_anchors_that_heads_use_are_replaced():
    network = tiny()
    blocks = list(network.blocks)
    blocks[9] = dataclasses.replace(blocks[9], mask=(3, 4), classes=2)
    network = dataclasses.replace(network, blocks=tuple(blocks))
    assert used_anchors(network) == (0, 1, 2, 3, 4)
    changed = with_anchors(network, [(n, n + 0.123) for n in range(1, 6)])
    assert changed.yolos[0].anchors == ((1, 1.1), (2, 2.1), (3, 3.1), (4, 4.1), (5, 5.1), (40, 44))
    assert changed.yolos[0].anchors == changed.yolos[1].anchors


def test_auto_anchors_fit_better_and_say_so():
    rng = np.random.default_rng(1)
    rows = np.concatenate([np.zeros((60, 1)), rng.uniform(0.3, 0.9, (60, 4))], 1).astype(np.float32)
    network, text = auto_anchors(tiny(), index_of(rows), (64, 64), "letterbox", seed=0)
    sizes = box_sizes(index_of(rows), (64, 64))
    before, after = (fit_quality(sizes, np.array(n.yolos[0].anchors))[1] for n in (tiny(), network))
    assert after > before
    assert "best possible recall" in text


def test_too_few_boxes_are_an_error_that_says_how_many():
    with pytest.raises(DataError, match="1 different box sizes are too few for 6 anchors"):
        cluster(np.array([[3.0, 4.0]] * 9), 6)
