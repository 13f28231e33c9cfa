"""Examine a data set before a training.

Finds wrong paths, damaged pictures, bad labels, pictures that are in both splits, classes without boxes, objects too
small for the network, anchors that do not fit, and says what to do.

Exit status 2 if something fatal is found: the training could not run, would leave pictures out, or be measured wrongly.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.cli import Parser, image_side, input_size, one_line, print_json, run
from utils.darknet.blocks import Network
from utils.darknet.cfg import load
from utils.darknet.data_file import DataConfig, load_data
from utils.darknet.shapes import max_stride, strides
from utils.data.anchors import box_sizes, fit_quality
from utils.data.annotations import first_places
from utils.data.diagnosis import (
    PROBLEMS,
    SEVERITIES,
    Problem,
    class_counts,
    class_gaps,
    listed_problems,
    long_pictures,
    loose_anchors,
    odd_boxes,
    shared_pictures,
    small_boxes,
)
from utils.data.index import Index, index
from utils.errors import DataError

EXAMPLE = "python -m utils.data.doctor runs/demo/data/toy.data --cfg cfg/demo.cfg"
SIDE, STRIDE = 416, 8
"""Input and smallest cell that are assumed without --cfg."""
QUANTILES = (0.05, 0.5, 0.95)


class Setting(NamedTuple):
    """What a data set is judged for."""

    size: tuple[int, int]
    """Height and width of the input."""
    stride: int
    """Pixels of the input a cell of the finest head."""
    network: Network | None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of `python -m utils.data.doctor`."""
    parser = Parser(__doc__, EXAMPLE, "python -m utils.data.doctor")
    parser.add_argument("data", metavar="DATA", help="data set: .data or data.yaml")
    parser.add_argument("--cfg", metavar="FILE", help="network to judge classes, sizes and anchors by")
    parser.add_argument(
        "--img_size",
        type=image_side,
        nargs="+",
        metavar="N",
        help=f"input of N x N or H x W pixels (default: the cfg's; without --cfg {SIDE})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document with all places")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Examine, print, and fail if anything is fatal."""
    args = parse_args(argv)
    data = load_data(args.data)
    setting = _setting(load(args.cfg) if args.cfg else None, args.img_size)
    splits, problems = examine(data, setting)
    if args.json:
        print_json(document(data, setting, splits, problems))
    else:
        print("\n".join(lines(data, setting, splits, problems)))
    if fatal := [problem for problem in problems if problem.severity == "fatal"]:
        raise DataError(f"{data.path}: {len(fatal)} kinds of fatal problems, the first: {fatal[0].kind}")


def _setting(network: Network | None, sides: Sequence[int] | None) -> Setting:
    if network is None:
        return Setting(input_size(sides, 1, (SIDE, SIDE)), STRIDE, None)
    default = (network.net.height, network.net.width)
    return Setting(input_size(sides, max_stride(network), default), min(strides(network)), network)


def examine(data: DataConfig, setting: Setting) -> tuple[dict[str, Index], list[Problem]]:
    """The splits that can be read, and all problems, the worst first."""
    splits: dict[str, Index] = {}
    problems: list[Problem] = []
    for split, source in (("train", data.train), ("val", data.valid)):
        if source is None:
            kind = "no pictures" if split == "train" else "no validation pictures"
            problems.append(Problem(kind, split, (str(data.path),)))
            continue
        try:
            splits[split] = index(source, data.names, require=False)
        except DataError as failure:
            problems.append(Problem("wrong path", split, (str(failure),)))
    for split, found in splits.items():
        problems += _of_split(split, found, data, setting)
    problems += shared_pictures(splits)
    problems += _of_network(data, setting, splits.get("train"))
    return splits, sorted(problems, key=lambda problem: list(PROBLEMS).index(problem.kind))


def _of_split(split: str, found: Index, data: DataConfig, setting: Setting) -> Iterator[Problem]:
    yield from listed_problems(split, found)
    yield from class_gaps(split, found, data.names)
    yield from odd_boxes(split, found)
    yield from long_pictures(split, found)
    yield from small_boxes(split, found, setting.size, setting.stride)


def _of_network(data: DataConfig, setting: Setting, train: Index | None) -> Iterator[Problem]:
    network = setting.network
    if network is None:
        return
    if network.classes != data.classes:
        detail = f"the cfg has {network.classes} classes, the data set {data.classes}"
        yield Problem("other class count", "", (str(network.path),), detail)
    if train is not None:
        yield from loose_anchors(network.path, train, setting.size, _anchors(network))


def _anchors(network: Network) -> NDArray[np.float64]:
    return np.array([anchor for yolo in network.yolos for anchor in yolo.head_anchors], float)


def lines(
    data: DataConfig, setting: Setting, splits: Mapping[str, Index], problems: Sequence[Problem]
) -> Iterator[str]:
    """The report for people: totals, classes and boxes, then a line a problem."""
    for split, found in splits.items():
        yield f"{split}: {found.report.totals()}"
    counts = [class_counts(found, data.classes).tolist() for found in splits.values()]
    if counts:
        shown = [f"{one_line(name)} {'/'.join(map(str, row))}" for name, *row in zip(data.names, *counts, strict=True)]
        text = f"boxes of each class, {'/'.join(splits)}: {', '.join(shown)}"
        yield textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    for split, found in splits.items():
        if statistics := _statistics(found, setting):
            wide, high = (" ".join(f"{side:.0f}" for side in statistics[key]) for key in ("widths", "heights"))
            yield (
                f"{split}: boxes in a picture: mean {statistics['boxes_mean']:.1f}, most {statistics['boxes_most']}; "
                f"pixels at {setting.size[1]} x {setting.size[0]} (5, 50, 95 %): widths {wide}, heights {high}"
            )
    if (fitted := _anchor_fit(splits, setting)) is not None:
        yield f"anchors of {setting.network.path}: reach {fitted[0]:.1%} of the boxes, mean best IoU {fitted[1]:.3f}"
    for problem in problems:
        where = f" in {problem.split}" if problem.split and problem.split not in problem.kind else ""
        count = f": {problem.count}" if problem.count else ""
        parts = [problem.detail, first_places(problem.places)]
        rest = ": " + "; ".join(one_line(part) for part in parts if part) if any(parts) else ""
        yield f"{problem.severity:8}{problem.kind}{where}{count}{rest} -> {PROBLEMS[problem.kind].advice}"
    found = [problem.severity for problem in problems]
    yield "found: " + ", ".join(f"{found.count(severity)} {severity}" for severity in SEVERITIES)


def _statistics(found: Index, setting: Setting) -> dict[str, Any]:
    """Figures of a split's boxes; empty if it has none."""
    sizes = box_sizes(found, setting.size)
    if not len(sizes):
        return {}
    numbers = [len(rows) for rows in found.labels]
    widths, heights = np.quantile(sizes, QUANTILES, axis=0).T.tolist()
    return {
        "boxes_mean": float(np.mean(numbers)),
        "boxes_most": max(numbers),
        "quantiles": list(QUANTILES),
        "widths": widths,
        "heights": heights,
        "smaller_than_a_cell": float((sizes < setting.stride).any(axis=1).mean()),
    }


def _anchor_fit(splits: Mapping[str, Index], setting: Setting) -> tuple[float, float] | None:
    """Share of the training boxes that the cfg's anchors reach, and the mean best IoU."""
    if setting.network is None or "train" not in splits or not splits["train"].report.boxes:
        return None
    return fit_quality(box_sizes(splits["train"], setting.size), _anchors(setting.network))


def document(
    data: DataConfig, setting: Setting, splits: Mapping[str, Index], problems: Sequence[Problem]
) -> dict[str, Any]:
    """What `--json` prints."""
    fitted = _anchor_fit(splits, setting)
    return {
        "data": str(data.path),
        "names": list(data.names),
        "img_size": list(setting.size),
        "stride": setting.stride,
        "ok": all(problem.severity != "fatal" for problem in problems),
        "splits": {
            split: {
                "listed": found.report.listed,
                "usable": found.report.usable,
                "backgrounds": found.report.backgrounds,
                "boxes": found.report.boxes,
                "ignored": found.report.ignored,
                "boxes_per_class": class_counts(found, data.classes).tolist(),
                **_statistics(found, setting),
            }
            for split, found in splits.items()
        },
        "anchors": None if fitted is None else {"reached": fitted[0], "mean_iou": fitted[1]},
        "problems": [
            {
                "severity": problem.severity,
                "kind": problem.kind,
                "split": problem.split,
                "count": problem.count,
                "places": list(problem.places),
                "detail": problem.detail,
                "advice": PROBLEMS[problem.kind].advice,
            }
            for problem in problems
        ],
    }


if __name__ == "__main__":
    run(main)
