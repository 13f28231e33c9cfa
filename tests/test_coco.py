"""Our evaluator against pycocotools: the same numbers, ties, sizes and empty images included."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.detection import average_precision as coco
from utils.detection.average_precision import Evaluator


def pycocotools_evaluation(detections: coco.ImageBoxes, truth: coco.ImageBoxes, images: int) -> COCOeval:
    """Pycocotools' own evaluation of the classes that have objects, not yet run; it prints as it runs."""
    classes = truth.classes
    with contextlib.redirect_stdout(io.StringIO()):
        return COCOeval(_indexed(truth, images, classes), _indexed(detections, images, classes), "bbox")


def _indexed(boxes: coco.ImageBoxes, images: int, classes: coco.Integers) -> COCO:
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


def by_pycocotools(
    detections: coco.ImageBoxes, truth: coco.ImageBoxes, images: int, by_size: bool
) -> coco.PrecisionRecall:
    """The oracle: pycocotools; arguments and result as of `precision_recall`."""
    classes = truth.classes
    run = pycocotools_evaluation(detections, truth, images)
    if not by_size:
        run.params.maxDets = [coco.MOST_DETECTIONS]
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accumulate()
    scores, hits = [], []
    stride = len(run.params.areaRng) * images  # evalImgs is class by area by image; area 0 is all
    for k in range(len(classes)):
        found = [e for e in run.evalImgs[k * stride : k * stride + images] if e is not None]
        counted = ~np.concatenate([e["dtIgnore"][0] for e in found])
        scores.append(np.concatenate([e["dtScores"] for e in found])[counted])
        hits.append(np.concatenate([e["dtMatches"][0] for e in found])[counted] > 0)
    return coco.PrecisionRecall(classes, run.eval["precision"][..., -1], tuple(scores), tuple(hits))


EVALUATORS = (coco.precision_recall, by_pycocotools)


def case(
    seed: int, images: int = 25, classes: int = 4, detections: int = 140
) -> tuple[coco.ImageBoxes, coco.ImageBoxes]:
    """Objects of all sizes, some images without; half of the detections near objects, scores with ties."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(4, images) * (rng.random(images) < 0.8)
    image = np.repeat(np.arange(images), count)
    truth = coco.ImageBoxes(image, rng.integers(0, classes, len(image)), boxes(rng, len(image)), np.zeros(0))
    owner = np.repeat(np.arange(images), detections)
    place = boxes(rng, len(owner))
    category, first = rng.integers(0, classes + 1, len(owner)), np.cumsum(count) - count
    near = (rng.random(len(owner)) < 0.5) & (count[owner] > 0)
    chosen = first[owner[near]] + rng.integers(0, count[owner[near]])
    place[near] = truth.xywh[chosen] * rng.choice([1, 1, 1.1, 0.9, 1.3], (len(chosen), 4))
    category[near] = truth.category[chosen]
    return coco.ImageBoxes(owner, category, place, np.round(rng.random(len(owner)), 2)), truth


def boxes(rng, count):
    sides = np.exp(rng.uniform(np.log(6), np.log(250), (count, 2)))
    return np.hstack([rng.uniform(0, 400, (count, 2)), sides]).round(1)


def with_crowds(seed: int) -> tuple[coco.ImageBoxes, coco.ImageBoxes]:
    """As `case`, but a third of the boxes are ignored, twice as large, and all of class 3; of class 0 none is."""
    detections, truth = case(seed)
    ignored = (np.random.default_rng(seed).random(len(truth.image)) < 1 / 3) & (truth.category > 0)
    ignored |= truth.category == 3
    grown = truth.xywh * np.where(ignored[:, None], [1, 1, 2, 2], 1)
    return detections, truth._replace(xywh=grown, ignored=ignored)


def crowd(seed: int) -> tuple[coco.ImageBoxes, coco.ImageBoxes]:
    """Two images of two classes with 40 objects and 500 detections, all from a few boxes and a few scores.

    More than 100 of a class in an image, equal IoUs and equal scores throughout, sides of 0, and areas of 32² and 96².
    """
    rng = np.random.default_rng(seed)
    few = rng.choice([0, 8, 16, 32, 48, 96, 120], (30, 4)).astype(float)
    place = [few[rng.integers(0, len(few), count)] for count in (500, 40)]
    owner = [np.sort(rng.integers(0, 2, len(part))) for part in place]
    category = [rng.integers(0, 2, len(part)) for part in place]
    score = [rng.integers(1, 9, 500) / 10, np.zeros(0)]
    return tuple(coco.ImageBoxes(*parts) for parts in zip(owner, category, place, score, strict=True))


def with_ignored_crowd(seed: int) -> tuple[coco.ImageBoxes, coco.ImageBoxes]:
    """As `crowd`, but three in ten objects are ignored."""
    detections, truth = crowd(seed)
    return detections, truth._replace(ignored=np.random.default_rng(seed).random(40) < 0.3)


SETS = {case: (25, 4), with_crowds: (25, 8), crowd: (2, 3), with_ignored_crowd: (2, 3)}
"""Data, the number of images and of seeds."""


@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize(("data", "seed"), [(data, seed) for data, (_, count) in SETS.items() for seed in range(count)])
def test_it_equals_pycocotools_whose_crowds_are_ignored_boxes(data, seed, by_size):
    (detections, truth), images = data(seed), SETS[data][0]
    ours, theirs = (measure(detections, truth, images, by_size) for measure in EVALUATORS)
    assert ours.classes.tolist() == theirs.classes.tolist() == sorted({*truth.category[~truth.crowd].tolist()})
    assert ours.precision.shape == theirs.precision.shape
    np.testing.assert_allclose(ours.precision, theirs.precision, rtol=0, atol=0 if images == 2 else 1e-9)
    assert 0 < ours.precision[0, ..., 0].mean() < 0.95
    for one, other in ((ours.scores, theirs.scores), (ours.hits, theirs.hits)):
        assert [np.sort(values).tolist() for values in one] == [np.sort(values).tolist() for values in other]
    for k in range(len(ours.classes)):
        assert np.array_equal(np.sort(ours.scores[k][ours.hits[k]]), np.sort(theirs.scores[k][theirs.hits[k]]))


def arguments_of_images(detections: coco.ImageBoxes, truth: coco.ImageBoxes, images: int = 25) -> Iterator[tuple]:
    """Arguments of Evaluator.add, image by image."""
    for image in range(images):
        mine, real = detections.image == image, truth.image == image
        corners, objects = (
            b.xywh[m] + np.pad(b.xywh[m][:, :2], ((0, 0), (2, 0))) for b, m in ((detections, mine), (truth, real))
        )
        labels = np.column_stack([truth.category[real], objects, truth.crowd[real]])
        yield corners, detections.score[mine], detections.category[mine], labels


@pytest.mark.parametrize("data", [case, with_crowds])
def test_metrics_are_those_from_pycocotools_numbers(data, monkeypatch):
    metrics = []
    for measure in EVALUATORS:
        monkeypatch.setattr(coco, "precision_recall", measure)
        evaluator = Evaluator([str(k) for k in range(5)])
        for arguments in arguments_of_images(*data(5)):
            evaluator.add(*arguments)
        metrics.append(evaluator.result())
    assert metrics[0] == metrics[1]
    assert metrics[0].map50 > 0.1
    assert metrics[0].objects == sum(size.objects for size in metrics[0].by_size)


def test_the_average_precisions_are_those_of_cocos_table():
    detections, truth = case(9)
    reference = pycocotools_evaluation(detections, truth, 25)
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    precision = coco.precision_recall(detections, truth, 25, True).precision
    ours = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., a] for a in (1, 2, 3))]
    np.testing.assert_allclose([coco.mean(values) for values in ours], reference.stats[:6], atol=1e-9)
