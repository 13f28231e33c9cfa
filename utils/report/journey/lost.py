"""Which objects a compressed network lost or gained, and the pictures that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from utils.data.draw import FONT, Image, draw_detections, ink_on, style_of
from utils.data.images import read_image
from utils.data.index import Index
from utils.detection.evaluate import Evaluation, ImageDetections

Rows = NDArray[np.float64]
"""[n, 6]: x1, y1, x2, y2 in pixels of the picture, confidence (NaN for objects), class."""
CONFIDENCE = 0.25
"""Least confidence of a box that is drawn or counted, as in the confusion matrix."""
OVERLAP = 0.5
"""IoU from which on a detection finds an object of its class."""
LOST, GAINED = (213, 94, 0), (0, 158, 115)
"""Vermilion and green (Okabe and Ito)."""
LONGEST, SHORTEST = 520, 320
"""Pixels that the longer side of a picture has at most and at least in the report."""


QUALITY = 80
"""Of JPEG."""


@dataclass(frozen=True)
class ComparedPicture:
    """One picture: its objects, what both networks found, and the difference."""

    path: str
    truth: Rows
    before: Rows
    after: Rows
    found_before: NDArray[np.bool_]
    """[truth], objects that the first network finds."""
    found_after: NDArray[np.bool_]
    """[truth], objects that the second one finds."""

    @property
    def lost(self) -> Rows:
        """Objects that only the first network finds."""
        return self.truth[self.found_before & ~self.found_after]

    @property
    def gained(self) -> Rows:
        """Objects that only the second network finds."""
        return self.truth[self.found_after & ~self.found_before]


@dataclass(frozen=True)
class Comparison:
    """Two networks on all pictures; objects are found at CONFIDENCE and OVERLAP."""

    names: tuple[str, ...]
    """Of the classes."""
    objects: int
    before: int
    """Objects that the first network finds."""
    after: int
    """Objects that the second one finds."""
    lost: int
    """Objects that only the first finds."""
    gained: int
    """Objects that only the second finds."""
    pictures: tuple[ComparedPicture, ...]
    """Those where most changed."""


def most_changed(
    before: Evaluation, after: Evaluation, index: Index, names: Sequence[str], pictures: int
) -> Comparison:
    """Count what was lost and gained, and pick the pictures that show most of it.

    Args:
        before: of the first network, with its detections.
        after: of the second one, on the same pictures.
        index: the pictures.
        names: of the classes.
        pictures: how many at most; of those in which as much changed the ones with fewer objects.
    """
    rows = [
        compare_picture(str(index.images[one.position]), truth, _rows(one), _rows(other))
        for one, other, truth in zip(before.detections, after.detections, before.truth, strict=True)
    ]
    order = sorted(rows, key=lambda row: (-len(row.lost) - len(row.gained), len(row.truth) == 0, len(row.truth)))
    return Comparison(
        tuple(names),
        *(sum(count(row) for row in rows) for count in (
            lambda row: len(row.truth),
            lambda row: int(row.found_before.sum()),
            lambda row: int(row.found_after.sum()),
            lambda row: len(row.lost),
            lambda row: len(row.gained),
        )),
        pictures=tuple(order[:pictures]),
    )  # fmt: skip


def compare_picture(path: str, truth: NDArray[np.floating], before: Rows, after: Rows) -> ComparedPicture:
    """One picture; `truth` is [m, 5 or 6]: class, x1, y1, x2, y2, 1 if the box is ignored and so no object."""
    truth = truth[~truth[:, 5:].any(axis=1)]
    objects = np.column_stack([truth[:, 1:5], np.full(len(truth), np.nan), truth[:, 0]])
    return ComparedPicture(path, objects, before, after, found(objects, before), found(objects, after))


def found(truth: Rows, detections: Rows) -> NDArray[np.bool_]:
    """Which objects are found: every detection, the best first, takes the free object of its class it overlaps most."""
    taken = np.zeros(len(truth), np.bool_)
    if not len(truth) or not len(detections):
        return taken
    overlap = box_iou(torch.from_numpy(detections[:, :4]), torch.from_numpy(np.ascontiguousarray(truth[:, :4])))
    overlap = np.where(detections[:, 5:6] == truth[:, 5], overlap.numpy(), 0.0)
    for row in np.argsort(-detections[:, 4], kind="stable"):
        place = int(np.argmax(np.where(taken, 0.0, overlap[row])))
        taken[place] |= not taken[place] and overlap[row, place] >= OVERLAP
    return taken


def panels(picture: ComparedPicture, names: Sequence[str]) -> tuple[Image, Image, Image]:
    """The picture with its objects, with what was found before, and after, where lost and gained boxes are marked."""
    image = read_image(picture.path)
    longest = max(image.shape[:2])
    scale = min(LONGEST / longest, max(1.0, SHORTEST / longest))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    factor = np.array([scale] * 4 + [1, 1])
    marked, spots = image.copy(), []
    for rows, word, colour in ((picture.lost, "lost", LOST), (picture.gained, "gained", GAINED)):
        for row in (rows * factor)[:, :4].round().astype(int).tolist():
            _outline(marked, row, colour)
            spots.append((row, word, colour))
    truth, before, after = (
        draw_detections(ground, rows * factor, names)
        for ground, rows in ((image, picture.truth), (image, picture.before), (marked, picture.after))
    )
    for spot in spots:
        _say(after, *spot)
    return truth, before, after


def jpeg(image: Image) -> bytes:
    """A picture as JPEG."""
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[
        1
    ].tobytes()


def _rows(image: ImageDetections) -> Rows:
    """What is sure enough."""
    rows = np.column_stack([image.boxes, image.scores, image.classes]).astype(np.float64)
    return rows[rows[:, 4] >= CONFIDENCE]


def _outline(image: Image, box: Sequence[int], colour: tuple[int, int, int]) -> None:
    """A thick box, under those of the detections; white outside for contrast."""
    (x1, y1, x2, y2), width = box, 2 * style_of(*image.shape[:2]).line + 2
    cv2.rectangle(image, (x1, y1), (x2, y2), (255, 255, 255), width + 2)
    cv2.rectangle(image, (x1, y1), (x2, y2), colour, width)


def _say(image: Image, box: Sequence[int], word: str, colour: tuple[int, int, int]) -> None:
    """What became of the object, below its box, or in it where the picture ends."""
    style = style_of(*image.shape[:2])
    (wide, high), below = cv2.getTextSize(word, FONT, style.font_scale, style.stroke)
    width, height = wide + 2 * style.margin, high + below + 2 * style.margin
    left = max(0, min(box[0] - style.line, image.shape[1] - width))
    top = max(0, min(box[3] + style.line, image.shape[0] - height))
    cv2.rectangle(image, (left, top), (left + width, top + height), colour, cv2.FILLED)
    cv2.putText(image, word, (left + style.margin, top + style.margin + high), FONT, style.font_scale, ink_on(colour),
                style.stroke, cv2.LINE_AA)  # fmt: skip
