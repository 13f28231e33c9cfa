"""Average precision by COCO's protocol, and precision, recall and F1 beside it.

The matching and the averages are pycocotools' (Lin et al., "Microsoft COCO: Common Objects in Context",
arXiv:1405.0312): 101 recall points under the precision envelope, IoU 0.50:0.05:0.95, at most 100 detections of a class
an image, small < 32², medium 32²..96², large > 96² pixels of the original picture. A class without ground truth enters
no mean. Ignored boxes, COCO's crowds, are no objects, and a detection that lies in one of its class is neither hit nor
miss. Every value is a fraction, 0..1; what has nothing to be measured on is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pycocotools import mask as coco_mask

from utils.detection.coco import AREAS, EVALUATORS, RECALLS, Boxes, Result, mean

CONFIDENCES = np.linspace(0.0, 1.0, 1001)
"""Confidence thresholds at which P, R and F1 are measured."""


@dataclass(frozen=True)
class ClassMetrics:
    """One class that has ground truth."""

    index: int
    name: str
    images: int
    """Images that show the class."""
    objects: int
    ap50: float
    ap50_95: float
    precision: float
    """At IoU 0.5 and `Metrics.confidence`, as recall and f1."""
    recall: float
    f1: float


@dataclass(frozen=True)
class SizeMetrics:
    """The objects of one of COCO's three sizes; AP is 0 where `objects` is."""

    name: str
    objects: int
    ap50: float
    ap50_95: float


@dataclass(frozen=True, eq=False)
class Curves:
    """What the plots draw; one row for each of the K entries of `Metrics.per_class`, at IoU 0.5."""

    confidence: np.ndarray
    """[1001], thresholds: a detection counts when its confidence is at least this."""
    precision: np.ndarray
    """[K, 1001], TP / (TP + FP); 0 where nothing is detected."""
    recall: np.ndarray
    """[K, 1001], TP / objects."""
    f1: np.ndarray
    """[K, 1001], 2 TP / (TP + FP + objects)."""
    recall_points: np.ndarray
    """[101], COCO's recall points."""
    envelope: np.ndarray
    """[K, 101], the best precision at that recall or a higher one: its mean over the points is AP50."""


@dataclass(frozen=True)
class Metrics:
    """What an evaluation measured. precision, recall and f1 are means over the classes that have objects."""

    images: int
    objects: int
    map50: float
    map50_95: float
    precision: float
    recall: float
    f1: float
    confidence: float
    """The threshold of precision, recall and f1: the one where the mean F1 over the classes is highest."""
    per_class: tuple[ClassMetrics, ...]
    by_size: tuple[SizeMetrics, ...]
    """small, medium, large; empty when the evaluator was told to leave it out."""
    curves: Curves = field(compare=False, repr=False)
    confusion: np.ndarray = field(compare=False, repr=False)
    """The sum of `confusion_matrix` over the images."""


class Evaluator:
    """Collects detections and ground truth image by image.

    Args:
        names: of the classes, by index.
        by_size: measure small, medium and large objects too, which takes longer.
        evaluator: a key of `coco.EVALUATORS`.
    """

    def __init__(self, names: Sequence[str], *, by_size: bool = True, evaluator: str = "numpy") -> None:
        """Start without images."""
        self.names = tuple(names)
        self.by_size = by_size
        self._evaluate = EVALUATORS[evaluator]
        self._confusion = np.zeros((len(names) + 1, len(names) + 1), dtype=np.int64)
        self._detections: list[np.ndarray] = []
        self._truth: list[np.ndarray] = []

    def add(self, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, truth: np.ndarray) -> None:
        """Add an image.

        Args:
            boxes: [n, 4], x1, y1, x2, y2 in pixels of the original picture; n may be 0.
            scores: [n], confidences.
            classes: [n], class indices.
            truth: [m, 6], class, x1, y1, x2, y2 in pixels of the original picture, 1 if the box is ignored; m may be 0,
                and [m, 5] ignores none.

        Raises:
            ValueError: a class index is outside the names.
        """
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        truth = np.asarray(truth, dtype=np.float64)
        for what, values in (("detection", np.asarray(classes)), ("object", truth[:, 0])):
            if len(values) and not (values.min() >= 0 and values.max() < len(self.names)):
                raise ValueError(f"{what} of class {int(values.max())}, but there are {len(self.names)} names")
        self._detections.append(np.column_stack([np.asarray(classes, np.float64), boxes, scores]))
        self._truth.append(truth)
        self._confusion += confusion_matrix(boxes, scores, classes, truth, len(self.names))

    def result(self) -> Metrics:
        """Evaluate what was added so far."""
        truth = coco_boxes(self._truth, scored=False)
        found = self._evaluate(coco_boxes(self._detections, scored=True), truth, len(self._truth), self.by_size)
        truth = Boxes(*(values[~truth.crowd] for values in truth[:3]), truth.score)
        objects = np.bincount(truth.category, minlength=len(self.names))
        ap = found.precision.mean(axis=1)  # [T, K, A]; -1 where a class has no object of that area
        curves = _curves(found, objects[found.classes])
        best = int(curves.f1.mean(axis=0).argmax()) if len(found.classes) else 0
        return Metrics(
            images=len(self._truth),
            objects=len(truth.category),
            map50=mean(ap[0, :, 0]),
            map50_95=mean(ap[:, :, 0]),
            precision=mean(curves.precision[:, best]),
            recall=mean(curves.recall[:, best]),
            f1=mean(curves.f1[:, best]),
            confidence=float(curves.confidence[best]),
            per_class=tuple(
                ClassMetrics(
                    index=int(index),
                    name=self.names[index],
                    images=len(np.unique(truth.image[truth.category == index])),
                    objects=int(objects[index]),
                    ap50=float(ap[0, k, 0]),
                    ap50_95=float(ap[:, k, 0].mean()),
                    precision=float(curves.precision[k, best]),
                    recall=float(curves.recall[k, best]),
                    f1=float(curves.f1[k, best]),
                )
                for k, index in enumerate(found.classes)
            ),
            by_size=_by_size(ap, truth) if self.by_size else (),
            curves=curves,
            confusion=self._confusion.copy(),
        )


def confusion_matrix(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    truth: np.ndarray,
    count: int,
    *,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
) -> np.ndarray:
    """Which class was taken for which, in one image.

    Detections with at least `conf_thres` are paired with objects of any class: of all pairs with an IoU of at least
    `iou_thres` the closest first, each box once. A detection without a partner is left out if at least `iou_thres` of
    its area lies in an ignored box of its class.

    Args:
        boxes: [n, 4], x1, y1, x2, y2.
        scores: [n].
        classes: [n].
        truth: [m, 5 or 6], class, x1, y1, x2, y2, 1 if the box is ignored.
        count: number of classes.
        conf_thres: smallest confidence that counts.
        iou_thres: smallest overlap that is a pair.

    Returns:
        [count + 1, count + 1] counts, true class by predicted class. The last column holds the objects that were
        missed, the last row the detections where there is nothing.
    """
    matrix = np.zeros((count + 1, count + 1), dtype=np.int64)
    kept = np.asarray(scores) >= conf_thres
    boxes, classes = boxes[kept], np.asarray(classes)[kept].astype(int)
    crowd = truth[truth[:, 5:].any(axis=1)]
    truth = truth[~truth[:, 5:].any(axis=1)]
    true_classes = truth[:, 0].astype(int)
    partner = np.full(len(truth), -1)
    if len(boxes) and len(truth):
        iou = coco_mask.iou(_xywh(boxes), _xywh(truth[:, 1:5]), [0] * len(truth))  # [n, m]
        found, wanted = np.nonzero(iou >= iou_thres)
        for pair in np.argsort(-iou[found, wanted], kind="stable"):
            if partner[wanted[pair]] < 0 and found[pair] not in partner:
                partner[wanted[pair]] = found[pair]
    predicted = np.append(classes, count)[partner]  # index -1: background
    np.add.at(matrix, (true_classes, predicted), 1)
    stray = np.delete(np.arange(len(boxes)), partner[partner >= 0])
    if len(stray) and len(crowd):
        inside = coco_mask.iou(_xywh(boxes[stray]), _xywh(crowd[:, 1:5]), [1] * len(crowd)) >= iou_thres
        stray = stray[~(inside & (classes[stray, None] == crowd[:, 0])).any(axis=1)]
    np.add.at(matrix, (count, classes[stray]), 1)
    return matrix


def _xywh(boxes: np.ndarray) -> np.ndarray:
    """[n, 4] corners to x1, y1, width, height."""
    return np.ascontiguousarray(np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]), dtype=np.float64)


def coco_boxes(images: Sequence[np.ndarray], *, scored: bool) -> Boxes:
    """Rows of each image as COCO has them.

    Args:
        images: [n, 6] each: class, x1, y1, x2, y2, and the score or whether the box is ignored. [n, 5] ignores none.
        scored: the last column is the score.
    """
    rows = np.concatenate([np.zeros((0, 6)), *(np.pad(part, ((0, 0), (0, 6 - part.shape[1]))) for part in images)])
    image = np.repeat(np.arange(len(images)), [len(part) for part in images])
    last = (rows[:, 5], np.zeros(0, np.bool_)) if scored else (np.zeros(0), rows[:, 5] > 0)
    return Boxes(image, rows[:, 0].astype(np.int64), _xywh(rows[:, 1:5]), *last)


def _curves(found: Result, objects: np.ndarray) -> Curves:
    """P, R and F1 over the confidence at IoU 0.5, from COCO's matches; `objects` is [K]."""
    detected, matched = np.zeros((2, len(objects), len(CONFIDENCES)))
    for k, (scores, hits) in enumerate(zip(found.scores, found.hits, strict=True)):
        detected[k] = len(scores) - np.searchsorted(np.sort(scores), CONFIDENCES)
        matched[k] = hits.sum() - np.searchsorted(np.sort(scores[hits]), CONFIDENCES)
    objects = objects[:, None]
    return Curves(
        confidence=CONFIDENCES,
        precision=matched / np.maximum(detected, 1),
        recall=matched / objects,
        f1=2 * matched / (detected + objects),
        recall_points=RECALLS,
        envelope=found.precision[0, :, :, 0].T,
    )


def _by_size(ap: np.ndarray, truth: Boxes) -> tuple[SizeMetrics, ...]:
    """AP and number of objects for COCO's small, medium and large; `ap` is [T, K, A]."""
    area = truth.xywh[:, 2] * truth.xywh[:, 3]
    return tuple(
        SizeMetrics(label, int(((area >= low) & (area <= high)).sum()), mean(ap[0, :, a]), mean(ap[:, :, a]))
        for a, (label, (low, high)) in enumerate(AREAS.items())
        if label != "all"
    )
