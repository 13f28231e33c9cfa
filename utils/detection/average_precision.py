"""Average precision by COCO's protocol in numpy, for all images at once, and precision, recall and F1 beside it.

The rules are pycocotools' (Lin et al., "Microsoft COCO: Common Objects in Context", arXiv:1405.0312), and so are the
numbers, ties included; the tests compare both. AP is the mean of 101 recall points under the precision envelope, at ten
IoUs, 0.50:0.05:0.95. At most the 100 best detections of a class count in an image. By the area of the box in pixels of
the original picture an object is small (..32²), medium (32²..96²) or large (96²..). A class without ground truth enters
no mean. Ignored boxes, COCO's crowds, are not objects, and a detection that lies in one of its class is neither hit nor
miss. Every value is a fraction, 0..1; it is 0 where there is nothing to measure.

Three things make it fast. Only pairs of a detection and an object that overlap by the lowest threshold at least can
match. The k-th such detection of every image and class is matched in one step for all images, classes and thresholds.
Precision is computed only where it can rise, at hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]

IOUS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""Ranges of an object's area in pixels of its picture, both ends inside."""
MOST_DETECTIONS = 100
"""Best detections of a class in an image that count."""
CONFIDENCES = np.linspace(0.0, 1.0, 1001)
"""Confidence thresholds at which P, R and F1 are measured."""


class ImageBoxes(NamedTuple):
    """Objects or detections of all images, in the order of the images."""

    image: Integers
    """[N], 0 … images - 1."""
    category: Integers
    """[N], class."""
    xywh: Floats
    """[N, 4], left, top, width, height in pixels."""
    score: Floats
    """[N]; of detections only."""
    ignored: Bools = np.zeros(0, np.bool_)
    """[N], COCO's crowds; of objects only, and empty if there are none."""

    @property
    def crowd(self) -> Bools:
        """[N], which objects are ignored: a detection that lies in one is neither a hit nor a miss."""
        return self.ignored if len(self.ignored) else np.zeros(len(self.image), np.bool_)

    @property
    def classes(self) -> Integers:
        """[K], classes with objects that count."""
        return np.unique(self.category[~self.crowd])

    def taken(self, which: Bools | Integers) -> ImageBoxes:
        """Some of the boxes."""
        return ImageBoxes._make(values[which] if len(values) else values for values in self)


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Precision of the K classes that have objects; T = 10 IoUs, R = 101 recalls, A areas."""

    classes: Integers
    """[K]."""
    precision: Floats
    """[T, R, K, A], the best precision at a recall or a higher one; -1 where the class has no object of that area."""
    scores: tuple[Floats, ...]
    """For each class the scores of its detections, without those that match an ignored object at IoU 0.5."""
    hits: tuple[Bools, ...]
    """For each class whether they match an object at IoU 0.5."""


def mean(values: Floats) -> float:
    """Mean of what could be measured (the rest is -1); 0 if that is nothing. COCO's own table shows -1 there."""
    values = values[values > -1]
    return float(values.mean()) if values.size else 0.0


def precision_recall(detections: ImageBoxes, truth: ImageBoxes, images: int, by_size: bool) -> PrecisionRecall:
    """Measure detections.

    Args:
        detections: of any class; those of classes without objects count nowhere.
        truth: the objects.
        images: number of images.
        by_size: measure all areas; otherwise only all sizes together.
    """
    classes, objects, candidates, starts = sort_boxes(detections, truth, images)
    pairs = near_pairs(candidates, objects, images)
    object_area, area = (boxes.xywh[:, 2] * boxes.xywh[:, 3] for boxes in (objects, candidates))
    ranges = list(AREAS.values()) if by_size else [AREAS["all"]]
    precision = np.full((len(IOUS), len(RECALLS), len(classes), len(ranges)), -1.0)
    for a, (low, high) in enumerate(ranges):
        ignored = objects.crowd | (object_area < low) | (object_area > high)
        matched, passed = match_pairs(pairs, len(candidates.score), objects.crowd, ignored)
        passed |= ~matched & ((area < low) | (area > high))
        if a == 0:
            counted, hits = ~passed[0], matched[0]
        matched &= ~passed
        for k, count in enumerate(np.bincount(objects.category[~ignored], minlength=len(classes))):
            if count:
                part = slice(starts[k], starts[k + 1])
                precision[:, :, k, a] = _precision_of_class(matched[:, part], passed[:, part], count)
    cuts = list(pairwise(np.searchsorted(candidates.category[counted], np.arange(len(classes) + 1))))
    scores, hits = candidates.score[counted], hits[counted]
    scores, hits = (tuple(values[start:end] for start, end in cuts) for values in (scores, hits))
    return PrecisionRecall(classes, precision, scores, hits)


def _precision_of_class(hits: Bools, passed: Bools, count: int) -> Floats:
    """Precision [T, R] of one class.

    Args:
        hits: [T, n], by falling score.
        passed: [T, n], detections that are neither hit nor miss.
        count: objects, above 0.
    """
    at = np.flatnonzero(hits.any(0))  # precision can rise nowhere else
    counted = at + 1 - np.cumsum(passed, 1)[:, at] if passed.any() else at + 1
    return interpolated(np.cumsum(hits[:, at], 1), counted, np.array(count))


def interpolated(true: Floats, counted: Floats | Integers, objects: Floats) -> Floats:
    """Best precision at each of RECALLS or a higher recall, [..., R]; 0 at those that are not reached.

    Args:
        true: [..., U], hits among the best detections, of which there are ever more.
        counted: [..., U], those detections.
        objects: [...].
    """
    precision = true / (counted + np.spacing(1))  # pycocotools adds this, too: results equal it to the last digit
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    envelope = np.concatenate([envelope, np.zeros((*envelope.shape[:-1], 1))], axis=-1)
    reached = np.searchsorted(RECALLS, true / objects[..., None], side="right")
    repeats = np.diff(reached, prepend=0, append=len(RECALLS))
    return np.repeat(envelope.ravel(), repeats.ravel()).reshape(*true.shape[:-1], len(RECALLS))


def sort_boxes(
    detections: ImageBoxes, truth: ImageBoxes, images: int
) -> tuple[Integers, ImageBoxes, ImageBoxes, Integers]:
    """The K classes with objects, and the boxes of these, whose `category` is the position among them.

    Returns:
        classes [K]; objects by class and image; the best detections by class and falling score, those of equal score in
        the order of the images; [K + 1] where the classes start in them, and the end.
    """
    classes = truth.classes
    objects, candidates = _of_classes(truth, classes), _of_classes(detections, classes)
    objects = objects.taken(np.lexsort((objects.image, objects.category)))
    candidates = candidates.taken(np.lexsort((-candidates.score, candidates.category)))
    group = candidates.category * images + candidates.image
    if np.bincount(group, minlength=1).max() > MOST_DETECTIONS:
        order = np.argsort(group, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = _positions(group[order])
        candidates = candidates.taken(rank < MOST_DETECTIONS)
    return classes, objects, candidates, np.searchsorted(candidates.category, np.arange(len(classes) + 1))


def _of_classes(boxes: ImageBoxes, classes: Integers) -> ImageBoxes:
    """Boxes of some classes, with the position in `classes` for the class."""
    position = np.searchsorted(classes, boxes.category)
    known = np.isin(boxes.category, classes)
    return boxes._replace(category=position).taken(known)


def _positions(group: Integers) -> Integers:
    """Position of every entry in its run of equal values."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))


class PossibleMatches(NamedTuple):
    """Pairs of a detection and an object of its image and class, by round, detection, object."""

    detection: Integers
    object: Integers
    iou: Floats
    rounds: Integers
    """Where each round starts, and the end."""


def near_pairs(candidates: ImageBoxes, objects: ImageBoxes, images: int) -> PossibleMatches:
    """The pairs that overlap enough to match at some threshold; boxes as `sort_boxes` sorts them."""
    group, other = (boxes.category * images + boxes.image for boxes in (candidates, objects))
    objects_of = np.bincount(other, minlength=int(group.max(initial=0)) + 1)
    which = np.flatnonzero(objects_of[group])
    which = which[np.argsort(group[which], kind="stable")]  # within a group scores still fall
    count, first = objects_of[group[which]], (np.cumsum(objects_of) - objects_of)[group[which]]
    one = np.repeat(which, count)
    two = np.arange(len(one)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    iou = _iou(candidates.xywh[one], objects.xywh[two], objects.crowd[two])
    near = iou >= IOUS[0]
    one, two, iou = one[near], two[near], iou[near]
    new = np.diff(one, prepend=-1) != 0
    number = np.cumsum(new) - 1  # of the detection among those that have a pair
    turn = _positions(group[one[new]])[number]
    order = np.argsort(turn, kind="stable")
    rounds = np.searchsorted(turn[order], np.arange(int(turn.max(initial=-1)) + 2))
    return PossibleMatches(one[order], two[order], iou[order], rounds)


def _iou(one: Floats, two: Floats, crowd: Bools) -> Floats:
    """IoU of pairs of boxes, of a crowd the share of `one` inside it, with the operations of COCO's bbIou in order."""
    size = np.minimum(one[:, :2] + one[:, 2:], two[:, :2] + two[:, 2:]) - np.maximum(one[:, :2], two[:, :2])
    overlap = np.where((size > 0).all(1), size[:, 0] * size[:, 1], 0.0)
    area = one[:, 2] * one[:, 3]
    union = np.where(crowd, area, area + two[:, 2] * two[:, 3] - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def match_pairs(pairs: PossibleMatches, count: int, crowd: Bools, ignored: Bools) -> tuple[Bools, Bools]:
    """Detections to objects, the best first: each takes the object of the highest IoU that is free, ignored ones last.

    A crowd is always free. Objects outside the range of areas are ignored as well, but match once.

    Returns:
        [T, N] whether a detection is matched, and whether its object is ignored.
    """
    limits = np.minimum(IOUS, 1 - 1e-10)[:, None]  # as in pycocotools' evaluateImg
    free = np.ones((len(IOUS), len(ignored)), np.bool_)
    matched, left_out = np.zeros((2, len(IOUS), count), np.bool_)
    for start, end in zip(pairs.rounds[:-1], pairs.rounds[1:], strict=True):
        detection, target, iou = pairs.detection[start:end], pairs.object[start:end], pairs.iou[start:end]
        first = np.flatnonzero(np.diff(detection, prepend=-1))
        allowed = free[:, target] & (iou >= limits)
        best = _last_best(np.where(allowed & ~ignored[target], iou, -1.0), first)
        if ignored[target].any():
            second = _last_best(np.where(allowed & ignored[target], iou, -1.0), first)
            best = np.where(best < 0, second, best)
        t, d = np.nonzero(best >= 0)
        taken = target[best[t, d]]
        free[t, taken] = crowd[taken]
        matched[t, detection[first[d]]] = True
        left_out[t, detection[first[d]]] = ignored[taken]
    return matched, left_out


def _last_best(values: Floats, first: Integers) -> Integers:
    """[T, D]: in each segment of [T, P] that starts at `first`, the last place of its largest value; -1 if negative.

    The last, since in pycocotools an object of equal IoU takes the place of the one before.
    """
    largest = np.maximum.reduceat(values, first, axis=1)
    spread = np.repeat(largest, np.diff(first, append=values.shape[1]), axis=1)
    places = np.where((values == spread) & (values >= 0), np.arange(values.shape[1]), -1)
    return np.maximum.reduceat(places, first, axis=1)


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
    """small, medium, large; empty without `by_size`."""
    curves: Curves = field(compare=False, repr=False)
    confusion: np.ndarray = field(compare=False, repr=False)
    """The sum of `confusion_matrix` over the images."""


class Evaluator:
    """Collects detections and ground truth image by image.

    Args:
        names: of the classes, by index.
        by_size: measure small, medium and large objects too, which takes longer.
    """

    def __init__(self, names: Sequence[str], *, by_size: bool = True) -> None:
        self.names = tuple(names)
        self.by_size = by_size
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
        measured = precision_recall(coco_boxes(self._detections, scored=True), truth, len(self._truth), self.by_size)
        truth = truth.taken(~truth.crowd)
        objects = np.bincount(truth.category, minlength=len(self.names))
        ap = measured.precision.mean(axis=1)  # [T, K, A]; -1 where a class has no object of that area
        curves = _curves(measured, objects[measured.classes])
        best = int(curves.f1.mean(axis=0).argmax()) if len(measured.classes) else 0
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
                for k, index in enumerate(measured.classes)
            ),
            by_size=_by_size(ap, truth) if self.by_size else (),
            curves=curves,
            confusion=self._confusion.copy(),
        )


def detected(truth: NDArray[np.floating], detections: NDArray[np.floating], iou_thres: float = 0.5) -> Bools:
    """Return [m], which objects are found: the surest box first takes the free object of its class it overlaps most.

    Args:
        truth: [m, 6], x1, y1, x2, y2, anything, class.
        detections: [n, 6], x1, y1, x2, y2, confidence, class.
        iou_thres: least overlap.
    """
    taken = np.zeros(len(truth), np.bool_)
    if not len(truth) or not len(detections):
        return taken
    overlap = np.asarray(coco_mask.iou(_xywh(detections[:, :4]), _xywh(truth[:, :4]), [0] * len(truth)))  # [n, m]
    overlap = np.where(detections[:, 5:6] == truth[:, 5], overlap, 0.0)
    for row in np.argsort(-detections[:, 4], kind="stable"):
        best = int(np.argmax(np.where(taken, 0.0, overlap[row])))
        taken[best] |= not taken[best] and overlap[row, best] >= iou_thres
    return taken


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
        iou = np.asarray(coco_mask.iou(_xywh(boxes), _xywh(truth[:, 1:5]), [0] * len(truth)))  # [n, m]
        detection, target = np.nonzero(iou >= iou_thres)
        for pair in np.argsort(-iou[detection, target], kind="stable"):
            if partner[target[pair]] < 0 and detection[pair] not in partner:
                partner[target[pair]] = detection[pair]
    predicted = np.append(classes, count)[partner]  # index -1: background
    np.add.at(matrix, (true_classes, predicted), 1)
    stray = np.delete(np.arange(len(boxes)), partner[partner >= 0])
    if len(stray) and len(crowd):
        inside = np.asarray(coco_mask.iou(_xywh(boxes[stray]), _xywh(crowd[:, 1:5]), [1] * len(crowd))) >= iou_thres
        stray = stray[~(inside & (classes[stray, None] == crowd[:, 0])).any(axis=1)]
    np.add.at(matrix[count], classes[stray], 1)
    return matrix


def _xywh(boxes: np.ndarray) -> np.ndarray:
    """[n, 4] corners to x1, y1, width, height."""
    return np.ascontiguousarray(np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]), dtype=np.float64)


def coco_boxes(images: Sequence[np.ndarray], *, scored: bool) -> ImageBoxes:
    """Rows of each image as COCO has them.

    Args:
        images: [n, 6] each: class, x1, y1, x2, y2, and the score or whether the box is ignored. [n, 5] ignores none.
        scored: the last column is the score.
    """
    rows = np.concatenate([np.zeros((0, 6)), *(np.pad(part, ((0, 0), (0, 6 - part.shape[1]))) for part in images)])
    image = np.repeat(np.arange(len(images)), [len(part) for part in images])
    last = (rows[:, 5], np.zeros(0, np.bool_)) if scored else (np.zeros(0), rows[:, 5] > 0)
    return ImageBoxes(image, rows[:, 0].astype(np.int64), _xywh(rows[:, 1:5]), *last)


def _curves(measured: PrecisionRecall, objects: np.ndarray) -> Curves:
    """P, R and F1 over the confidence at IoU 0.5, from COCO's matches; `objects` is [K]."""
    detected, matched = np.zeros((2, len(objects), len(CONFIDENCES)))
    for k, (scores, hits) in enumerate(zip(measured.scores, measured.hits, strict=True)):
        detected[k] = len(scores) - np.searchsorted(np.sort(scores), CONFIDENCES)
        matched[k] = hits.sum() - np.searchsorted(np.sort(scores[hits]), CONFIDENCES)
    objects = objects[:, None]
    return Curves(
        confidence=CONFIDENCES,
        precision=matched / np.maximum(detected, 1),
        recall=matched / objects,
        f1=2 * matched / (detected + objects),
        recall_points=RECALLS,
        envelope=measured.precision[0, :, :, 0].T,
    )


def _by_size(ap: np.ndarray, truth: ImageBoxes) -> tuple[SizeMetrics, ...]:
    """AP and number of objects for COCO's small, medium and large; `ap` is [T, K, A]."""
    area = truth.xywh[:, 2] * truth.xywh[:, 3]
    return tuple(
        SizeMetrics(label, int(((area >= low) & (area <= high)).sum()), mean(ap[0, :, a]), mean(ap[:, :, a]))
        for a, (label, (low, high)) in enumerate(AREAS.items())
        if label != "all"
    )
