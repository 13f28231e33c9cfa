"""COCO's results format: ids of pictures and classes, and boxes."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from utils.detection.evaluate import category_ids, coco_results, image_id


def test_category_ids_are_cocos_for_its_names_in_both_spellings(shared):
    names = (shared / "data/weights/coco.names").read_text().split("\n")[:80]
    document = json.loads((shared / "data/coco_mini/annotations/instances_val.json").read_text())
    want = tuple(category["id"] for category in document["categories"])
    assert category_ids(names) == want
    assert category_ids([category["name"] for category in document["categories"]]) == want


def test_category_ids_of_other_names_are_indices():
    assert category_ids(["person", "bicycle"]) == (0, 1)


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("a/000000000139.jpg", 139),
        ("COCO_val2014_000000000042.jpg", 42),
        ("BloodImage_00007.jpg", "BloodImage_00007"),
        ("1.5.png", "1.5"),
        ("٣.png", "٣"),
    ],
)
def test_image_id_is_the_number_of_the_file_or_its_stem(path, want):
    assert image_id(path) == want


def test_results_are_read_by_pycocotools():
    boxes, scores, classes = np.array([[10.0, 20, 30.5, 60]]), np.array([0.5]), np.array([1])
    rows = coco_results("7.jpg", boxes, scores, classes, (1, 3))
    assert rows == [{"image_id": 7, "category_id": 3, "bbox": [10.0, 20.0, 20.5, 40.0], "score": 0.5}]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": 7}], "categories": [{"id": 3}], "annotations": []}
        coco.createIndex()
        assert coco.loadRes(rows).anns[1]["area"] == pytest.approx(820)


def test_a_picture_without_detections_gives_no_results():
    assert coco_results("7.jpg", np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=int), (1, 3)) == []
