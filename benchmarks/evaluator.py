"""How much faster our evaluator and the cut before suppression are, and that they change nothing.

Detections are drawn at random around random objects, like those of a trained detector at a low threshold: half of them
are objects moved by a tenth of their size, half are anywhere. Of pycocotools its `evaluate` and `accumulate` count,
which know no smaller task than all twelve numbers; of suppression, torchvision's `batched_nms` of all candidates, for
a data set of four classes whose boxes all have four labels above the threshold. Seconds are CPU seconds of one thread,
which other work on the machine disturbs less than the clock; all in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.random import Generator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import batched_nms

from utils.cli import Parser, positive_int, run
from utils.detection import average_precision as coco
from utils.detection.decode import non_max_suppression
from utils.report.tables import Column, markdown_table

EXAMPLE = "python -m benchmarks.evaluator --images 1000"
OBJECTS = 7
"""Mean number of objects in an image, as in COCO."""
LABELS = 4
"""Classes in the comparison of suppressions."""
SIDES = (8, 300)
"""Range of a box's sides, in pixels of a 640 x 640 image."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.evaluator")
    add = parser.add_argument_group("what is measured").add_argument
    add("--images", type=positive_int, default=5000, metavar="N", help="images (default: %(default)s)")
    add("--detections", type=positive_int, default=100, metavar="N", help="in an image (default: %(default)s)")
    add("--classes", type=positive_int, default=80, metavar="N", help="classes (default: %(default)s)")
    add("--candidates", type=positive_int, default=90_000, metavar="N", help="boxes for NMS (default: %(default)s)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="repeats of ours (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row a comparison."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    detections, truth = drawn(np.random.default_rng(0), args.images, args.detections, args.classes)
    theirs = pycocotools_evaluation(detections, truth, args.images)
    with contextlib.redirect_stdout(io.StringIO()):
        spent, _ = seconds(lambda: (theirs.evaluate(), theirs.accumulate()), 1)
    rows = []
    for name, by_size in (("AP and AP50", False), ("all sizes", True)):
        ours, result = seconds(partial(coco.precision_recall, detections, truth, args.images, by_size), args.rounds)
        areas = result.precision.shape[-1]
        gap = np.abs(result.precision - theirs.eval["precision"][..., :areas, -1]).max()
        rows.append((name, spent, ours, spent / ours, f"{gap:.0e}"))
    rows.append(("NMS", *suppression(args.candidates, args.rounds), ""))
    columns = ("what", Column("others s", ".3f"), Column("ours s", ".3f"), Column("ratio", ".0f"), "largest difference")
    print(markdown_table(columns, rows))
    print(f"{args.images} images x {args.detections} detections, {args.classes} classes; NMS: one image of "
          f"{args.candidates} candidates; seed 0, one thread, CPU seconds")  # fmt: skip


def seconds(call: Callable[[], object], rounds: int) -> tuple[float, object]:
    """Least CPU seconds of some calls, and what the last one returned."""
    best = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        result = call()
        best = min(best, time.process_time() - started)
    return best, result


def drawn(rng: Generator, images: int, detections: int, classes: int) -> tuple[coco.Boxes, coco.Boxes]:
    """Detections and objects of some images."""
    count = rng.poisson(OBJECTS, images)
    image = np.repeat(np.arange(images), count)
    truth = coco.Boxes(image, rng.integers(0, classes, len(image)), boxes(rng, len(image)), np.zeros(0))
    first, near = np.cumsum(count) - count, detections // 2
    owner = np.repeat(np.arange(images), detections)
    category, place = rng.integers(0, classes, len(owner)), boxes(rng, len(owner))
    score = rng.beta(1, 4, len(owner))
    moved = (np.arange(len(owner)) % detections < near) & (count[owner] > 0)
    chosen = first[owner[moved]] + rng.integers(0, count[owner[moved]])
    category[moved], score[moved] = truth.category[chosen], rng.beta(3, 2, moved.sum())
    box = truth.xywh[chosen]
    place[moved] = box + box[:, [2, 3, 2, 3]] * rng.normal(0, 0.1, (len(chosen), 4))
    place[:, 2:] = np.abs(place[:, 2:])
    return coco.Boxes(owner, category, place, score), truth


def boxes(rng: Generator, count: int) -> np.ndarray:
    """[count, 4], left, top, width, height."""
    sides = np.exp(rng.uniform(*np.log(SIDES), (count, 2)))
    return np.hstack([rng.uniform(0, 640 - sides), sides])


def pycocotools_evaluation(detections: coco.Boxes, truth: coco.Boxes, images: int) -> COCOeval:
    """Pycocotools' own evaluation of the classes that have objects, not yet run; it prints as it runs."""
    classes = truth.classes
    with contextlib.redirect_stdout(io.StringIO()):
        return COCOeval(_indexed(truth, images, classes), _indexed(detections, images, classes), "bbox")


def _indexed(boxes: coco.Boxes, images: int, classes: coco.Integers) -> COCO:
    """coco.Boxes as COCO annotations; ids begin at 1, since COCOeval takes 0 for "not matched"."""
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


def suppression(candidates: int, rounds: int) -> tuple[float, float, float]:
    """CPU seconds of uncut suppression and of ours with its cut, and their ratio; one image, several labels a box."""
    rng = np.random.default_rng(1)
    count = -(-candidates // LABELS)
    rows = torch.zeros(1, count, 5 + LABELS)
    place = torch.from_numpy(boxes(rng, count))
    rows[0, :, :2], rows[0, :, 2:4] = place[:, :2] + place[:, 2:] / 2, place[:, 2:]
    rows[0, :, 4] = 1
    rows[0, :, 5:] = torch.from_numpy(rng.uniform(0.002, 1, (count, LABELS)))

    def uncut() -> torch.Tensor:
        row, label = (rows[0, :, 5:] > 0.001).nonzero(as_tuple=True)
        corners = torch.cat((place[row, :2], place[row, :2] + place[row, 2:]), 1).float()
        return batched_nms(corners, rows[0, row, 5 + label], label, 0.6)

    ours, _ = seconds(lambda: non_max_suppression(rows, 0.001, 0.6, multi_label=True), rounds)
    theirs, _ = seconds(uncut, 1)
    return theirs, ours, theirs / ours


if __name__ == "__main__":
    run(main)
