"""Examine a data set before a training.

It finds wrong paths, damaged images, bad labels, images in both splits, and classes without boxes. It also finds
objects too small for the network and anchors that do not fit. For each problem it says what to do.

Exit status 2 if something fatal is found: the training could not run, would leave images out, or be measured wrongly.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.cli import Parser, image_side, input_size, one_line, print_json, run
from utils.darknet.blocks import Network
from utils.darknet.cfg import load
from utils.darknet.data_file import DataConfig, load_data
from utils.darknet.network import max_stride, strides
from utils.data.anchors import RATIO, box_sizes, fit_quality
from utils.data.findings import EFFECTS, KINDS, LONG, TWIN_IOU, first_places
from utils.data.index import Index, index, totals_text
from utils.errors import DataError
from utils.files import sha256

EXAMPLE = "python -m utils.data.doctor runs/demo/data/toy.data --cfg cfg/demo.cfg"
SIDE, STRIDE = 416, 8
"""Input and smallest cell that are assumed without --cfg."""
QUANTILES = [0.05, 0.5, 0.95]
BEYOND = 0.01
"""Share of a picture by which a box may reach beyond it: rounding, and tools that count pixels from 1."""
FITTED = 0.98
"""Share of boxes that anchors should reach, below which YOLOv5's check clusters them again."""
MANY_SMALL = 0.1
"""Share of boxes smaller than a cell that is worth a warning."""

Problem = dict[str, Any]
"""A kind of problem in a split, or between the two ("split" is empty): an entry of the --json document."""


class Setting(NamedTuple):
    """Network or input size that a data set is judged for."""

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
    document = examine(data, setting)
    if args.json:
        print_json(document)
    else:
        print("\n".join(lines(document, setting)))
    if fatal := [problem["kind"] for problem in document["problems"] if problem["severity"] == "fatal"]:
        raise DataError(f"{data.path}: {len(fatal)} kinds of fatal problems, the first: {fatal[0]}")


def _setting(network: Network | None, sides: Sequence[int] | None) -> Setting:
    if network is None:
        return Setting(input_size(sides, 1, (SIDE, SIDE)), STRIDE, None)
    default = (network.net.height, network.net.width)
    return Setting(input_size(sides, max_stride(network), default), min(strides(network)), network)


def examine(data: DataConfig, setting: Setting) -> dict[str, Any]:
    """The document that --json prints: figures of the splits that can be read, and all problems, the worst first."""
    splits: dict[str, Index] = {}
    problems: list[Problem] = []
    for split, source in (("train", data.train), ("val", data.valid)):
        if source is None:
            kind = "no images" if split == "train" else "no validation images"
            problems.append(_problem(kind, split, [str(data.path)]))
            continue
        try:
            splits[split] = index(source, data.names, require=False)
        except DataError as failure:
            problems.append(_problem("wrong path", split, [str(failure)]))
    for split, pictures in splits.items():
        problems += _split_problems(split, pictures, data.names, setting)
    problems += _shared_pictures(splits)
    if setting.network is not None and setting.network.classes != data.classes:
        detail = f"the cfg has {setting.network.classes} classes, the data set {data.classes}"
        problems.append(_problem("other class count", "", [str(setting.network.path)], detail))
    anchors = None
    if setting.network is not None and "train" in splits and splits["train"].totals()["boxes"]:
        reached, iou = fit_quality(box_sizes(splits["train"], setting.size), _anchors(setting.network))
        anchors = {"reached": reached, "mean_iou": iou}
        if reached < FITTED:
            detail = f"{reached:.1%} of the boxes are within {RATIO:g} times an anchor's sides; mean best IoU {iou:.3f}"
            problems.append(_problem("anchors do not fit", "train", [str(setting.network.path)], detail))
    return {
        "data": str(data.path),
        "names": list(data.names),
        "img_size": list(setting.size),
        "stride": setting.stride,
        "ok": all(problem["severity"] != "fatal" for problem in problems),
        "splits": {split: _figures(pictures, data.classes, setting) for split, pictures in splits.items()},
        "anchors": anchors,
        "problems": sorted(problems, key=lambda problem: list(KINDS).index(problem["kind"])),
    }


def _anchors(network: Network) -> NDArray[np.float64]:
    return np.array([anchor for yolo in network.yolos for anchor in yolo.head_anchors], float)


def _figures(pictures: Index, classes: int, setting: Setting) -> dict[str, Any]:
    """Figures of a split; those of its boxes only if it has some."""
    figures: dict[str, Any] = pictures.totals()
    figures["boxes_per_class"] = _class_counts(pictures, classes).tolist()
    sizes = box_sizes(pictures, setting.size)
    if len(sizes):
        widths, heights = np.quantile(sizes, QUANTILES, axis=0).T.tolist()
        figures |= {
            "boxes_mean": float(pictures.labels.counts.mean()),
            "boxes_most": int(pictures.labels.counts.max()),
            "quantiles": QUANTILES,
            "widths": widths,
            "heights": heights,
            "smaller_than_a_cell": float((sizes < setting.stride).any(axis=1).mean()),
        }
    return figures


def lines(document: Mapping[str, Any], setting: Setting) -> Iterator[str]:
    """The report for people: totals, classes and boxes, then a line a problem."""
    splits = document["splits"]
    for split, figures in splits.items():
        yield f"{split}: {totals_text(figures)}"
    if splits:
        shown = []
        per_class = [part["boxes_per_class"] for part in splits.values()]
        for name, *counts in zip(document["names"], *per_class, strict=True):
            shown.append(f"{one_line(name)} {'/'.join(map(str, counts))}")
        text = f"boxes of each class, {'/'.join(splits)}: {', '.join(shown)}"
        yield textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    for split, figures in splits.items():
        if "widths" in figures:
            wide, high = (" ".join(f"{side:.0f}" for side in figures[key]) for key in ("widths", "heights"))
            yield (
                f"{split}: boxes in an image: mean {figures['boxes_mean']:.1f}, most {figures['boxes_most']}; "
                f"pixels at {setting.size[1]} x {setting.size[0]} (5, 50, 95 %): widths {wide}, heights {high}"
            )
    if setting.network and (anchors := document["anchors"]):
        reached = f"reach {anchors['reached']:.1%} of the boxes, mean best IoU {anchors['mean_iou']:.3f}"
        yield f"anchors of {setting.network.path}: {reached}"
    for problem in document["problems"]:
        kind, split = problem["kind"], problem["split"]
        where = f" in {split}" if split and split not in kind else ""
        count = f": {problem['count']}" if problem["count"] else ""
        parts = [one_line(part) for part in (problem["detail"], first_places(problem["places"])) if part]
        rest = ": " + "; ".join(parts) if parts else ""
        yield f"{problem['severity']:8}{kind}{where}{count}{rest} -> {problem['advice']}"
    severities = [problem["severity"] for problem in document["problems"]]
    yield "found: " + ", ".join(f"{severities.count(severity)} {severity}" for severity in EFFECTS)


def _problem(kind: str, split: str, places: Sequence[str], detail: str = "", count: int | None = None) -> Problem:
    """Describe a kind of problem.

    Args:
        kind: a key of KINDS.
        split: "train", "val", or "" for both.
        places: files, FILE:LINE, or class names; each once.
        detail: figures, where there are some.
        count: of the boxes, where places are their pictures.
    """
    severity, advice = KINDS[kind]
    count = len(places) if count is None else count
    return {
        "severity": severity,
        "kind": kind,
        "split": split,
        "count": count,
        "places": list(places),
        "detail": detail,
        "advice": advice,
    }


def _split_problems(split: str, pictures: Index, names: Sequence[str], setting: Setting) -> Iterator[Problem]:
    yield from _listed_problems(split, pictures)
    counts = _class_counts(pictures, len(names)).tolist()
    missing = [name for name, count in zip(names, counts, strict=True) if not count]
    if missing and any(counts):
        yield _problem(f"class without a box in {split}", split, missing, f"{len(missing)} of {len(names)}")
    yield from _odd_boxes(split, pictures)
    ratio = pictures.shapes.max(axis=1) / pictures.shapes.min(axis=1)
    if long := [str(pictures.images[position]) for position in np.flatnonzero(ratio > LONG).tolist()]:
        yield _problem("very long image", split, long)
    yield from _small_boxes(split, pictures, setting)


def _listed_problems(split: str, pictures: Index) -> Iterator[Problem]:
    """Findings in single files, and what is missing altogether."""
    usable = len(pictures)
    if not pictures.listed:
        yield _problem("no images", split, ())
    elif not usable:
        yield _problem("nothing usable", split, (), f"none of {pictures.listed} images")
    elif not len(pictures.labels.rows):
        yield _problem("no boxes", split, pictures.places("no label file") or pictures.places("empty label file"))
    for kind in pictures.counts():
        places = pictures.places(kind)
        many = kind == "no label file" and len(places) > usable / 2
        yield _problem("most label files missing" if many else kind, split, places)


def _class_counts(pictures: Index, classes: int) -> NDArray[np.int64]:
    """[classes]: boxes of each class."""
    return np.bincount(pictures.labels.rows[:, 0].astype(int), minlength=classes)


def _odd_boxes(split: str, pictures: Index) -> Iterator[Problem]:
    """Objects labelled twice, and boxes beyond their pictures."""
    odd: dict[str, list[str]] = {"object labelled twice": [], "box beyond the image": []}
    for path, boxes in zip(pictures.images, pictures.labels, strict=True):
        low, high = boxes[:, 1:3] - boxes[:, 3:5] / 2, boxes[:, 1:3] + boxes[:, 3:5] / 2
        beyond = ((low < -BEYOND) | (high > 1 + BEYOND)).any(axis=1)
        odd["object labelled twice"] += [str(path)] * _twins(boxes[:, 0], low, high)
        odd["box beyond the image"] += [str(path)] * int(beyond.sum())
    for kind, paths in odd.items():
        if paths:
            yield _problem(kind, split, list(dict.fromkeys(paths)), count=len(paths))


def _twins(labels: NDArray[np.float32], low: NDArray[np.floating], high: NDArray[np.floating]) -> int:
    """Number of boxes that overlap an earlier one of their class by more than TWIN_IOU."""
    areas, count = (high - low).prod(axis=1), 0
    for at in range(1, len(labels)):
        sides = np.minimum(high[:at], high[at]) - np.maximum(low[:at], low[at])
        overlap = np.clip(sides, 0, None).prod(axis=1)
        union = areas[:at] + areas[at] - overlap  # 0 of boxes that are points in float32, so nothing is divided by it
        count += bool((overlap > TWIN_IOU * union)[labels[:at] == labels[at]].any())
    return count


def _small_boxes(split: str, pictures: Index, setting: Setting) -> Iterator[Problem]:
    """Boxes whose width or height in the fitted picture is below the smallest cell."""
    small = (box_sizes(pictures, setting.size) < setting.stride).any(axis=1)
    if not small.any():
        return
    owners = np.repeat(np.arange(len(pictures)), pictures.labels.counts)
    paths = [str(pictures.images[position]) for position in np.unique(owners[small])]
    share = small.mean()
    kind = "many boxes smaller than a cell" if share > MANY_SMALL else "boxes smaller than a cell"
    height, width = setting.size
    detail = f"{share:.1%} are narrower or lower than {setting.stride} pixels at {width} x {height}"
    yield _problem(kind, split, paths, detail, int(small.sum()))


def _shared_pictures(splits: Mapping[str, Index]) -> Iterator[Problem]:
    """Pictures that are in both splits, or twice in one: the same file, or another one with the same bytes."""
    owners: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    """Real path → split → paths in that split."""
    for split, pictures in splits.items():
        for path in pictures.images:
            owners[os.path.realpath(path)][split].append(str(path))
    both = [_first_of_each(by_split) for by_split in owners.values() if len(by_split) > 1]
    if both:
        yield _problem("same file in train and val", "", both)
    across: list[str] = []
    within: dict[str, list[str]] = defaultdict(list)
    for group in _same_bytes(owners):
        by_split = {split: [path for real in group for path in owners[real][split]] for split in splits}
        for split, paths in by_split.items():
            if len(paths) > 1:
                within[split].append(" = ".join(paths))
        if all(by_split.values()) and len(by_split) > 1:
            across.append(_first_of_each(by_split))
    if across := [text for text in across if text not in both]:
        yield _problem("identical images in train and val", "", across)
    for split, texts in within.items():
        yield _problem("identical images in one split", split, texts)


def _first_of_each(by_split: Mapping[str, Sequence[str]]) -> str:
    return " = ".join(dict.fromkeys(paths[0] for paths in by_split.values()))


def _same_bytes(paths: Iterable[str]) -> Iterator[list[str]]:
    """Files in groups of the same contents; only those that are not alone with their size are read."""
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        sizes[os.stat(path).st_size].append(path)
    for candidates in sizes.values():
        digests: dict[str, list[str]] = defaultdict(list)
        for path in candidates:
            digests[sha256(Path(path)) if len(candidates) > 1 else ""].append(path)
        yield from digests.values()


if __name__ == "__main__":
    run(main)
