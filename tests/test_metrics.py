"""Laws of the average precision, of P, R and F1, and of the confusion matrix."""

from __future__ import annotations

import numpy as np
import pytest

from utils.detection.average_precision import CONFIDENCES, Evaluator, confusion_matrix

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


def test_a_class_without_objects_enters_no_mean():
    hit, stray = (1, 0, 0, 50, 50, 0.9), (2, 100, 100, 150, 150, 0.95)
    metrics = evaluated(image([hit, stray], [(1, 0, 0, 50, 50)]))
    assert (metrics.map50, metrics.precision, metrics.f1) == pytest.approx((1, 1, 1))
    assert [(row.index, row.name, row.images, row.objects) for row in metrics.per_class] == [(1, "dog", 1, 1)]


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
