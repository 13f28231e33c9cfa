"""COCO's average precision and recall in numpy, for all images at once.

The rules are pycocotools' (Lin et al., arXiv:1405.0312), and so are the numbers, ties included; pycocotools itself is
the oracle in the tests and the other value of `--evaluator`. What makes it fast: only pairs of a detection and an
object that overlap by the lowest threshold at least can match; the k-th such detection of every image and class is
matched in one step for all images, classes and thresholds; precision is computed only where it can rise, at hits.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

IOUS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""Ranges of an object's area in pixels of its picture, both ends inside."""
MOST_DETECTIONS = (1, 10, 100)
"""Best detections of a class in an image that count; the last for AP, all three for average recall."""


class Boxes(NamedTuple):
    """Objects or detections of all images, in the order of the images."""

    image: Integers
    """[N], 0 … images - 1."""
    category: Integers
    """[N], class."""
    xywh: Floats
    """[N, 4], left, top, width, height in pixels."""
    score: Floats
    """[N]; of detections only."""
    ignored: NDArray[np.bool_] = np.zeros(0, np.bool_)
    """[N], COCO's crowds; of objects only, and empty if there are none."""

    @property
    def crowd(self) -> NDArray[np.bool_]:
        """[N], which objects are ignored: a detection that lies in one is neither a hit nor a miss."""
        return self.ignored if len(self.ignored) else np.zeros(len(self.image), np.bool_)

    @property
    def classes(self) -> Integers:
        """[K], classes with objects that count."""
        return np.unique(self.category[~self.crowd])


@dataclass(frozen=True, eq=False)
class Result:
    """What was measured of the K classes that have objects; T = 10 IoUs, R = 101 recalls, A areas, M = 3."""

    classes: Integers
    """[K]."""
    precision: Floats
    """[T, R, K, A], the best precision at a recall or a higher one; -1 where the class has no object of that area."""
    recall: Floats
    """[T, K, A, M], -1 likewise; only the last M is filled unless all areas were asked for."""
    scores: tuple[Floats, ...]
    """For each class the scores of its detections, without those that match an ignored object at IoU 0.5."""
    hits: tuple[NDArray[np.bool_], ...]
    """For each class whether they match an object at IoU 0.5."""

    def twelve(self) -> Floats:
        """COCO's table: AP, AP50, AP75, AP small, medium, large, AR 1, 10, 100, AR small, medium, large."""
        ap = [mean(self.precision[..., 0]), mean(self.precision[0, ..., 0]), mean(self.precision[5, ..., 0])]
        ap += [mean(self.precision[..., a]) for a in (1, 2, 3)]
        ar = [mean(self.recall[:, :, 0, m]) for m in range(3)] + [mean(self.recall[:, :, a, 2]) for a in (1, 2, 3)]
        return np.array(ap + ar)


def mean(values: Floats) -> float:
    """Mean of what could be measured (the rest is -1); 0 if that is nothing. COCO's own table shows -1 there."""
    values = values[values > -1]
    return float(values.mean()) if values.size else 0.0


def evaluate(detections: Boxes, truth: Boxes, images: int, full: bool) -> Result:
    """Measure in numpy.

    Args:
        detections: of any class; those of classes without objects count nowhere.
        truth: the objects.
        images: number of images.
        full: all areas and recalls; otherwise AP and AP50 over all areas only.
    """
    classes, objects, found, rank, order, starts = sort_boxes(detections, truth, images, full)
    pairs = near_pairs(found, objects, images)
    object_area, area = (boxes.xywh[:, 2] * boxes.xywh[:, 3] for boxes in (objects, found))
    crowd = objects.crowd
    ranges = list(AREAS.values()) if full else [AREAS["all"]]
    shape = len(IOUS), len(classes), len(ranges)
    precision, recall = np.full((*shape, len(RECALLS)), -1.0), np.full((*shape, len(MOST_DETECTIONS)), -1.0)
    for a, (low, high) in enumerate(ranges):
        ignored = crowd | (object_area < low) | (object_area > high)
        matched, left_out = match_pairs(pairs, len(found.score), crowd, ignored)
        left_out |= ~matched & ((area < low) | (area > high))
        if a == 0:
            counted, hits = order[~left_out[0, order]], matched[0]
        counts = np.bincount(objects.category[~ignored], minlength=len(classes))
        true, passed = (matched & ~left_out)[:, order], left_out[:, order] if left_out.any() else None
        _accumulate(true, passed, rank[order] if full else None, starts, counts, precision[:, :, a], recall[:, :, a])
    cuts = np.searchsorted(found.category[counted], np.arange(1, len(classes)))
    scores, hits = np.split(found.score[counted], cuts), np.split(hits[counted], cuts)
    known = len(classes)  # without classes np.split returns one part all the same
    precision = np.ascontiguousarray(precision.transpose(0, 3, 1, 2))
    return Result(classes, precision, recall, tuple(scores[:known]), tuple(hits[:known]))


def sort_boxes(
    detections: Boxes, truth: Boxes, images: int, ranked: bool
) -> tuple[Integers, Boxes, Boxes, Integers, Integers, Integers]:
    """The K classes with objects; what can match, `category` being the position in them; order of the detections.

    Returns:
        classes [K], objects by class and image, detections and ranks as of `_best`, order of the detections by class
        and falling score, [K + 1] where the classes start in it, and the end.
    """
    classes = truth.classes
    found, rank = _best(_of_classes(detections, classes), images, ranked)
    objects = _of_classes(truth, classes)
    objects = _taken(objects, np.argsort(objects.category * images + objects.image, kind="stable"))
    order = np.argsort(-found.score, kind="stable")  # images come in order, so equal scores stay in theirs
    order = order[np.argsort(found.category[order].astype(np.min_scalar_type(len(classes))), kind="stable")]
    return classes, objects, found, rank, order, np.searchsorted(found.category[order], np.arange(len(classes) + 1))


def _of_classes(boxes: Boxes, classes: Integers) -> Boxes:
    """Those of some classes, with the position in `classes` for the class."""
    place = np.searchsorted(classes, boxes.category)
    known = np.zeros(len(place), np.bool_) if not len(classes) else classes[place % len(classes)] == boxes.category
    return _taken(boxes._replace(category=place), known)


def _taken(boxes: Boxes, which: NDArray[np.bool_] | Integers) -> Boxes:
    return Boxes(*(values[which] if len(values) else values for values in boxes))


def _best(found: Boxes, images: int, ranked: bool) -> tuple[Boxes, Integers]:
    """The best detections of every class in every image, in the order they came, and where they stand among those.

    The ranks are only right if they were asked for or something had to be left out.
    """
    group = found.category * images + found.image
    most = MOST_DETECTIONS[-1]
    if not (ranked or np.bincount(group, minlength=1).max() > most):
        return found, group
    order = np.lexsort((-found.score, group))
    rank = np.empty(len(order), np.int64)
    rank[order] = _places(group[order])
    return _taken(found, rank < most), rank[rank < most]


def _places(group: Integers) -> Integers:
    """Position of every entry in its run of equal values."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))


class Pairs(NamedTuple):
    """Pairs of a detection and an object of its image and class, by round, detection, object."""

    found: Integers
    object: Integers
    iou: Floats
    rounds: Integers
    """Where each round starts, and the end."""


def near_pairs(found: Boxes, objects: Boxes, images: int) -> Pairs:
    """The pairs that overlap enough to match at some threshold."""
    group, other = (boxes.category * images + boxes.image for boxes in (found, objects))
    objects_of = np.bincount(other, minlength=int(group.max(initial=0)) + 1)
    with_objects = np.flatnonzero(objects_of[group])
    which = with_objects[np.lexsort((-found.score[with_objects], group[with_objects]))]
    count, first = objects_of[group[which]], (np.cumsum(objects_of) - objects_of)[group[which]]
    one = np.repeat(which, count)
    two = np.arange(len(one)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    iou = _iou(found.xywh[one], objects.xywh[two], objects.crowd[two])
    near = iou >= IOUS[0]
    one, two, iou = one[near], two[near], iou[near]
    new = np.diff(one, prepend=-1) != 0
    number = np.cumsum(new) - 1  # of the detection among those that have a pair
    turn = _places(group[one[new]])[number]
    order = np.argsort(turn, kind="stable")
    rounds = np.searchsorted(turn[order], np.arange(int(turn.max(initial=-1)) + 2))
    return Pairs(one[order], two[order], iou[order], rounds)


def _iou(one: Floats, two: Floats, crowd: NDArray[np.bool_]) -> Floats:
    """IoU of pairs of boxes, of a crowd the share of `one` inside it, with the operations of COCO's bbIou in order."""
    size = np.minimum(one[:, :2] + one[:, 2:], two[:, :2] + two[:, 2:]) - np.maximum(one[:, :2], two[:, :2])
    overlap = np.where((size > 0).all(1), size[:, 0] * size[:, 1], 0.0)
    area = one[:, 2] * one[:, 3]
    union = np.where(crowd, area, area + two[:, 2] * two[:, 3] - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def match_pairs(
    pairs: Pairs, count: int, crowd: NDArray[np.bool_], ignored: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Detections to objects, the best first: each takes the object of the highest IoU that is free, ignored ones last.

    A crowd is always free. Objects outside the range of areas are ignored as well, but match once.

    Returns:
        [T, N] whether a detection is matched, and whether its object is ignored.
    """
    limits = np.minimum(IOUS, 1 - 1e-10)[:, None]
    free = np.ones((len(IOUS), len(ignored)), np.bool_)
    matched, left_out = np.zeros((2, len(IOUS), count), np.bool_)
    for start, end in zip(pairs.rounds[:-1], pairs.rounds[1:], strict=True):
        found, wanted, iou = pairs.found[start:end], pairs.object[start:end], pairs.iou[start:end]
        first = np.flatnonzero(np.diff(found, prepend=-1))
        allowed = free[:, wanted] & (iou >= limits)
        best = _last_best(np.where(allowed & ~ignored[wanted], iou, -1.0), first)
        if ignored[wanted].any():
            second = _last_best(np.where(allowed & ignored[wanted], iou, -1.0), first)
            best = np.where(best < 0, second, best)
        t, d = np.nonzero(best >= 0)
        taken = wanted[best[t, d]]
        free[t, taken] = crowd[taken]
        matched[t, found[first[d]]] = True
        left_out[t, found[first[d]]] = ignored[taken]
    return matched, left_out


def _last_best(values: Floats, first: Integers) -> Integers:
    """[T, D]: in each segment of [T, P] that starts at `first`, the last place of its largest value; -1 if negative."""
    largest = np.maximum.reduceat(values, first, axis=1)
    spread = np.repeat(largest, np.diff(first, append=values.shape[1]), axis=1)
    places = np.where((values == spread) & (values >= 0), np.arange(values.shape[1]), -1)
    return np.maximum.reduceat(places, first, axis=1)


def _accumulate(
    true: NDArray[np.bool_],
    passed: NDArray[np.bool_] | None,
    rank: Integers | None,
    starts: Integers,
    counts: Integers,
    precision: Floats,
    recall: Floats,
) -> None:
    """Fill `precision` [T, K, R] and `recall` [T, K, M].

    Args:
        true: [T, N], hits, by class and falling score.
        passed: [T, N], detections that are neither hit nor miss; None: there are none.
        rank: [N], place in its image and class; None: only the last recall is wanted.
        starts: [K + 1], where the classes start, and the end.
        counts: [K], objects.
        precision: filled where a class has objects.
        recall: likewise.
    """
    for k in np.flatnonzero(counts):
        part = slice(starts[k], starts[k + 1])
        hit = true[:, part]
        precision[:, k] = 0
        recall[:, k, -1] = hit.sum(1) / counts[k]
        for m, most in enumerate(MOST_DETECTIONS[:-1] if rank is not None else ()):
            recall[:, k, m] = hit[:, rank[part] < most].sum(1) / counts[k]
        before = None if passed is None else np.cumsum(passed[:, part], 1)
        for t in range(len(IOUS)):
            at = np.flatnonzero(hit[t])
            if not len(at):
                continue
            hits = np.arange(1.0, len(at) + 1)
            misses = at + 1 - hits if before is None else at + 1 - hits - before[t, at]
            values = hits / (misses + hits + np.spacing(1))
            envelope = np.maximum.accumulate(values[::-1])[::-1]
            place = np.searchsorted(hits / counts[k], RECALLS)
            inside = place < len(at)
            precision[t, k, inside] = envelope[place[inside]]


def evaluate_by_pycocotools(detections: Boxes, truth: Boxes, images: int, full: bool) -> Result:
    """The same by pycocotools; arguments and result as `evaluate`."""
    classes = truth.classes
    coco = pycocotools_evaluation(detections, truth, images)
    if not full:
        coco.params.maxDets = [MOST_DETECTIONS[-1]]
        coco.params.areaRng, coco.params.areaRngLbl = coco.params.areaRng[:1], coco.params.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.evaluate()
        coco.accumulate()
    recall = np.full((len(IOUS), len(classes), coco.eval["recall"].shape[2], len(MOST_DETECTIONS)), -1.0)
    recall[..., -coco.eval["recall"].shape[3] :] = coco.eval["recall"]
    scores, hits = [], []
    stride = len(coco.params.areaRng) * images  # evalImgs is class by area by image; area 0 is all
    for k in range(len(classes)):
        found = [e for e in coco.evalImgs[k * stride : k * stride + images] if e is not None]
        counted = ~np.concatenate([e["dtIgnore"][0] for e in found])
        scores.append(np.concatenate([e["dtScores"] for e in found])[counted])
        hits.append(np.concatenate([e["dtMatches"][0] for e in found])[counted] > 0)
    return Result(classes, coco.eval["precision"][..., -1], recall, tuple(scores), tuple(hits))


def pycocotools_evaluation(detections: Boxes, truth: Boxes, images: int) -> COCOeval:
    """Pycocotools' own evaluation of the classes that have objects, not yet run; it prints as it runs."""
    classes = truth.classes
    with contextlib.redirect_stdout(io.StringIO()):
        return COCOeval(_indexed(truth, images, classes), _indexed(detections, images, classes), "bbox")


def _indexed(boxes: Boxes, images: int, classes: Integers) -> COCO:
    """Boxes as COCO annotations; ids begin at 1, since COCOeval takes 0 for "not matched"."""
    area = boxes.xywh[:, 2] * boxes.xywh[:, 3]
    columns = [boxes.image.tolist(), boxes.category.tolist(), boxes.xywh.tolist(), area.tolist()]
    columns += [boxes.score.tolist() or [0.0] * len(area), boxes.crowd.astype(int).tolist()]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(images)],
        "categories": [{"id": index} for index in classes.tolist()],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": a, "score": score, "iscrowd": crowd}
            for n, (i, c, box, a, score, crowd) in enumerate(zip(*columns, strict=True), 1)
        ],
    }
    coco.createIndex()
    return coco


EVALUATORS: dict[str, Callable[[Boxes, Boxes, int, bool], Result]] = {
    "numpy": evaluate,
    "pycocotools": evaluate_by_pycocotools,
}
"""The values of `--evaluator`."""
