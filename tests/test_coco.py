"""Our evaluator against pycocotools, ties, sizes and empty images included; P, R, F1 and the confusion matrix."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.detection import average_precision as coco
from utils.detection.average_precision import CONFIDENCES, Evaluator, confusion_matrix


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


# Worked examples and laws of the metrics

NAMES = ("cat", "dog", "fox")


def image(detections, truth):
    """Arguments of Evaluator.add from rows (class, x1, y1, x2, y2, confidence) and (class, x1, y1, x2, y2)."""
    detections = np.array(detections, dtype=float).reshape(-1, 6)
    return detections[:, 1:5], detections[:, 5], detections[:, 0], np.array(truth, dtype=float).reshape(-1, 5)


def evaluated(*images, names=NAMES, **options):
    evaluator = Evaluator(names, **options)
    for arguments in images:
        evaluator.add(*arguments)
    return evaluator.result()


def random_image(rng, objects=12, classes=3):
    """Objects of all sizes and a noisy detection of most of them, some with the wrong class, and clutter."""
    corner, side = rng.uniform(0, 300, (objects, 2)), rng.uniform(8, 150, (objects, 2))
    truth = np.column_stack([rng.integers(0, classes, objects), corner, corner + side])
    seen = truth[rng.random(objects) < 0.8]
    boxes = np.vstack([seen[:, 1:] + rng.normal(0, 4, (len(seen), 4)), truth[:3, 1:] + 60])
    labels = np.concatenate([np.where(rng.random(len(seen)) < 0.9, seen[:, 0], 0), truth[:3, 0]])
    return boxes, rng.random(len(boxes)), labels, truth


@pytest.fixture
def images():
    rng = np.random.default_rng(7)
    return [random_image(rng) for _ in range(8)]


def test_average_precision_of_a_worked_example():
    """Two objects; by confidence: hit, miss, hit.

    Precision 1 up to recall 0.5 (51 points), 2/3 up to recall 1 (50 points): AP50 = (51 + 50 · 2/3) / 101.
    F1 is 2·1/(1+2) = 2/3 with the first alone, 2·1/(2+2) with two, 2·2/(3+2) = 0.8 with all three.
    """
    truth = [(0, 0, 0, 50, 50), (0, 100, 0, 150, 50)]
    detections = [(0, 0, 0, 50, 50, 0.9), (0, 300, 300, 350, 350, 0.8), (0, 100, 0, 150, 50, 0.7)]
    metrics = evaluated(image(detections, truth))
    assert metrics.map50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (metrics.precision, metrics.recall, metrics.f1) == pytest.approx((2 / 3, 1, 0.8))
    assert metrics.confidence <= 0.7


@pytest.mark.parametrize(
    ("images", "objects"),
    [((), 0), ((image([], []),), 0), ((image([(0, 0, 0, 9, 9, 0.9)], []),), 0), ((image([], [(1, 0, 0, 9, 9)]),), 1)],
    ids=["no image", "nothing", "no truth", "no detection"],
)
def test_what_has_nothing_to_measure_is_zero(images, objects):
    metrics = evaluated(*images)
    assert (metrics.images, metrics.objects, len(metrics.per_class)) == (len(images), objects, objects)
    values = (metrics.map50, metrics.map50_95, metrics.precision, metrics.recall, metrics.f1, metrics.confidence)
    assert values == (0.0,) * 6
    assert all(size.ap50 == size.ap50_95 == 0.0 for size in metrics.by_size)


def test_the_means_are_the_means_of_the_classes(images):
    metrics = evaluated(*images)
    for mean, key in (("map50", "ap50"), ("map50_95", "ap50_95"), ("precision",) * 2, ("recall",) * 2, ("f1",) * 2):
        values = [getattr(row, key) for row in metrics.per_class]
        assert getattr(metrics, mean) == pytest.approx(np.mean(values))
    assert sum(row.objects for row in metrics.per_class) == metrics.objects == 96
    assert sum(size.objects for size in metrics.by_size) == 96
    np.testing.assert_allclose(metrics.curves.envelope.mean(axis=1), [row.ap50 for row in metrics.per_class])


def test_precision_and_recall_at_a_threshold_are_those_of_the_detections_above_it(images):
    curves = evaluated(*images).curves
    for index in (0, 250, 613, 999):
        kept = [(b[s >= CONFIDENCES[index]], *(v[s >= CONFIDENCES[index]] for v in (s, c)), t) for b, s, c, t in images]
        cut = evaluated(*kept, by_size=False).curves
        for name in ("precision", "recall", "f1"):
            np.testing.assert_allclose(getattr(cut, name)[:, 0], getattr(curves, name)[:, index])


def test_f1_is_the_harmonic_mean_and_the_threshold_maximises_its_mean(images):
    metrics = evaluated(*images)
    p, r, f1 = metrics.curves.precision, metrics.curves.recall, metrics.curves.f1
    np.testing.assert_allclose(f1, 2 * p * r / np.maximum(p + r, 1e-12))
    assert metrics.f1 == pytest.approx(f1.mean(axis=0).max())


def test_the_order_of_images_and_detections_does_not_matter(images):
    shuffled = [(b[::-1], s[::-1], c[::-1], t[::-1]) for b, s, c, t in reversed(images)]
    assert evaluated(*shuffled) == evaluated(*images)


def test_leaving_out_the_sizes_changes_nothing_else(images):
    full, quick = evaluated(*images), evaluated(*images, by_size=False)
    assert quick.by_size == ()
    assert (quick.map50_95, quick.per_class) == (full.map50_95, full.per_class)


def test_a_result_can_be_asked_for_twice_and_images_added_after_it(images):
    evaluator = Evaluator(NAMES)
    for arguments in images[:4]:
        evaluator.add(*arguments)
    assert evaluator.result() == evaluator.result() == evaluated(*images[:4])
    for arguments in images[4:]:
        evaluator.add(*arguments)
    assert evaluator.result() == evaluated(*images)


def test_a_class_without_a_name_is_refused():
    with pytest.raises(ValueError, match="detection of class 3, but there are 3 names"):
        evaluated(image([(3, 0, 0, 9, 9, 0.9)], []))
    with pytest.raises(ValueError, match="object of class 5"):
        evaluated(image([], [(5, 0, 0, 9, 9)]))


def test_confusion_of_a_worked_example():
    """Cat found, dog taken for a fox, a second dog missed, a cat where there is nothing; the faint box is left out.

    Of what lies in an ignored box for cats, a cat does not count, and a dog is false.
    """
    truth = [(0, 0, 0, 50, 50, 0), (1, 100, 0, 150, 50, 0), (1, 200, 0, 250, 50, 0), (0, 0, 200, 300, 390, 1)]
    detections = [
        (0, 0, 0, 50, 50, 0.9),
        (2, 100, 0, 150, 50, 0.8),
        (0, 300, 300, 350, 350, 0.7),
        (1, 200, 0, 250, 50, 0.2),
        (0, 10, 210, 60, 290, 0.9),
        (1, 100, 210, 160, 290, 0.9),
    ]
    arguments = (*image(detections, [])[:3], np.array(truth, float))
    want = [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(confusion_matrix(*arguments, 3), want)


def test_confusion_pairs_the_closest_first_and_each_box_once():
    truth = [(0, 0, 0, 100, 100), (1, 0, 0, 100, 80)]
    arguments = image([(1, 0, 0, 100, 82, 0.5), (0, 0, 0, 100, 81, 0.9)], truth)
    np.testing.assert_array_equal(confusion_matrix(*arguments, 2), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])


def test_confusion_counts_every_object_and_every_confident_detection_once(images):
    matrix = evaluated(*images).confusion
    objects = np.bincount(np.concatenate([t[:, 0] for *_, t in images]).astype(int), minlength=3)
    detections = np.bincount(np.concatenate([c[s >= 0.25] for _, s, c, _ in images]).astype(int), minlength=3)
    np.testing.assert_array_equal(matrix[:3].sum(axis=1), objects)
    np.testing.assert_array_equal(matrix[:, :3].sum(axis=0), detections)
