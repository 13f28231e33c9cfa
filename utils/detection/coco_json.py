"""Detections as COCO's results format, which pycocotools' `loadRes` and COCO's server read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

COCO_GAPS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""Ids between 1 and 90 that COCO gives to no class of its detection task."""
COCO_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)
DARKNET_SPELLINGS = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""Names in Darknet's coco.names that COCO writes otherwise."""
_COCO_FILE = re.compile(r"(?:COCO_[a-z0-9]+_)?([0-9]{1,18})", re.ASCII)


class Result(TypedDict):
    """One detection."""

    image_id: int | str
    category_id: int
    bbox: list[float]
    """x, y of the top left corner, width, height, in pixels of the picture."""
    score: float


def category_ids(names: Sequence[str]) -> tuple[int, ...]:
    """COCO's ids (1..90) if the names are COCO's 80 in its order, in either spelling; otherwise the indices."""
    if tuple(DARKNET_SPELLINGS.get(name, name) for name in names) == COCO_NAMES:
        return tuple(number for number in range(1, 91) if number not in COCO_GAPS)
    return tuple(range(len(names)))


def image_id(path: Path | str) -> int | str:
    """The number that is the file's name, also behind COCO's 2014 prefix (`COCO_val2014_`); otherwise the stem."""
    stem = Path(path).stem
    match = _COCO_FILE.fullmatch(stem)
    return int(match[1]) if match else stem


def results(
    path: Path | str, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, ids: Sequence[int]
) -> list[Result]:
    """The detections of one picture.

    Args:
        path: of the picture.
        boxes: [n, 4], x1, y1, x2, y2 in pixels of the picture.
        scores: [n].
        classes: [n], indices into `ids`.
        ids: of the categories, see `category_ids`.
    """
    image = image_id(path)
    xywh = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    return [
        Result(image_id=image, category_id=ids[index], bbox=[round(v, 3) for v in box], score=round(score, 5))
        for box, score, index in zip(xywh.tolist(), scores.tolist(), classes.tolist(), strict=True)
    ]
