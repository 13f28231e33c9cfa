"""Examine a data set before a training.

Finds wrong paths, damaged pictures, bad labels, pictures that are in both splits, classes without boxes, objects too
small for the network, anchors that do not fit, and says what to do.

Exit status 2 if something fatal is found: the training could not run, would leave pictures out, or be measured wrongly.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.cli import Parser, image_side, input_size, one_line, print_json, run
from utils.darknet.blocks import Network
from utils.darknet.cfg import load
from utils.darknet.data_file import DataConfig, load_data
from utils.darknet.shapes import max_stride, strides
from utils.data.anchors import RATIO, box_sizes, fit_quality
from utils.data.annotations import first_places
from utils.data.index import Index, index
from utils.errors import DataError

Severity = Literal["fatal", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("fatal", "warning", "note")
"""From the worst; a set with a fatal finding cannot be trained on, or would be measured wrongly."""
TWIN_IOU = 0.95
"""Two boxes of a class that overlap by more are one object labelled twice."""
BEYOND = 0.01
"""Share of a picture by which a box may reach beyond it: rounding, and tools that count pixels from 1."""
LONG = 4.0
"""Ratio of the sides of a picture from which a letterbox leaves less than a quarter of the input to it."""
FITTED = 0.98
"""Share of boxes that anchors should reach, below which YOLOv5's check clusters them anew."""
MANY_SMALL = 0.1
"""Share of boxes smaller than a cell that is worth a warning."""
BLOCK = 1 << 20


class Kind(NamedTuple):
    """How bad a kind of problem is, and the way out."""

    severity: Severity
    advice: str


_WRONG_LABEL = "correct the line: a wrong label leaves its whole picture out"
_BAD_PICTURE = "save or fetch the picture again, or take it off the list"
PROBLEMS: Mapping[str, Kind] = {
    "wrong path": Kind("fatal", "paths are relative to the file that names them"),
    "no pictures": Kind("fatal", "name pictures in the list, folder or pattern"),
    "nothing usable": Kind("fatal", "correct what is found below"),
    "no boxes": Kind("fatal", "labels lie in `labels` beside `images`, one .txt a picture"),
    "same file in train and val": Kind("fatal", "take it off one list: results on it say nothing"),
    "identical pictures in train and val": Kind("fatal", "take one off its list: results on it say nothing"),
    "missing image": Kind("fatal", "paths in a list are relative to the list"),
    "not a file": Kind("fatal", "take it off the list"),
    "unreadable image": Kind("fatal", "look at the file's permissions"),
    "empty image": Kind("fatal", _BAD_PICTURE),
    "unknown image format": Kind("fatal", "save it as PNG, JPEG, BMP, WebP, GIF or TIFF"),
    "oversized image": Kind("fatal", "scale it down"),
    "damaged image": Kind("fatal", _BAD_PICTURE),
    "unreadable label file": Kind("fatal", "look at the file's permissions and size"),
    "not a text file": Kind("fatal", "save it as UTF-8"),
    "wrong column count": Kind("fatal", _WRONG_LABEL),
    "not a number": Kind("fatal", _WRONG_LABEL),
    "fractional class": Kind("fatal", _WRONG_LABEL),
    "negative class": Kind("fatal", "classes count from 0"),
    "class beyond names": Kind("fatal", "add the name, or correct the class; classes count from 0"),
    "out of range": Kind("fatal", "boxes are shares of the picture, 0..1, not pixels"),
    "negative size": Kind("fatal", _WRONG_LABEL),
    "listed twice": Kind("warning", "it is used once"),
    "zero-size box": Kind("warning", "the row is left out"),
    "duplicate row": Kind("warning", "the second is left out"),
    "no validation pictures": Kind("warning", "nothing is evaluated, and best.pt is the last epoch"),
    "identical pictures in one split": Kind("warning", "they count twice; take one off the list"),
    "most label files missing": Kind("warning", "these pictures teach that there is nothing; see where labels belong"),
    "class without a box in train": Kind("warning", "it cannot be learnt"),
    "class without a box in val": Kind("warning", "it is not measured; mAP is the mean over the others"),
    "object labelled twice": Kind("warning", f"boxes of a class that overlap by more than {TWIN_IOU:g}; delete one"),
    "box beyond the picture": Kind("warning", "it is cut to the picture; look whether boxes are of another size"),
    "many boxes smaller than a cell": Kind("warning", "train at a larger --img_size, or with a head of finer stride"),
    "anchors do not fit": Kind("warning", "train.py --auto-anchors clusters them anew"),
    "very long picture": Kind("warning", f"sides over {LONG:g} : 1; cut it, or most of the input is border"),
    "boxes smaller than a cell": Kind("note", "expect to miss them"),
    "other class count": Kind("note", "train.py adapts the heads"),
    "no label file": Kind("note", "a picture without objects"),
    "empty label file": Kind("note", "a picture without objects"),
}
"""Every kind of problem, the worst first."""


@dataclass(frozen=True)
class Problem:
    """One kind of problem in one split, or between the two."""

    kind: str
    """A key of PROBLEMS."""
    split: str
    """"train", "val", or "" for both."""
    places: tuple[str, ...]
    """Files, FILE:LINE, or class names; each once."""
    detail: str = ""
    """Figures, where there are some."""
    boxes: int | None = None
    """How many boxes are concerned, where places are their pictures."""

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return PROBLEMS[self.kind].severity

    @property
    def count(self) -> int:
        """How often it occurs."""
        return len(self.places) if self.boxes is None else self.boxes


def listed_problems(split: str, index: Index) -> Iterator[Problem]:
    """What the index found in single files, and what is missing altogether."""
    report = index.report
    if not report.listed:
        yield Problem("no pictures", split, ())
    elif not report.usable:
        yield Problem("nothing usable", split, (), f"none of {report.listed} pictures")
    elif not report.boxes:
        yield Problem("no boxes", split, report.places("no label file") or report.places("empty label file"))
    for kind in report.counts():
        places = report.places(kind)
        many = kind == "no label file" and len(places) > report.usable / 2
        yield Problem("most label files missing" if many else kind, split, places)


def shared_pictures(splits: Mapping[str, Index]) -> Iterator[Problem]:
    """Pictures that are in both splits, or twice in one: the same file, or another one with the same bytes."""
    entries = [(split, str(path), os.path.realpath(path)) for split, index in splits.items() for path in index.images]
    owners: dict[str, dict[str, str]] = {}
    for split, path, real in entries:
        owners.setdefault(real, {})[split] = path
    both = [" = ".join(dict.fromkeys(found.values())) for found in owners.values() if len(found) > 1]
    if both:
        yield Problem("same file in train and val", "", tuple(both))
    across, within = [], {split: [] for split in splits}
    for group in _same_bytes(list(owners)):
        first = {split: [owners[real][split] for real in group if split in owners[real]] for split in splits}
        for split, paths in first.items():
            if len(paths) > 1:
                within[split].append(" = ".join(paths))
        if all(first.values()) and len(first) > 1:
            across.append(" = ".join(paths[0] for paths in first.values()))
    if across := [text for text in across if text not in both]:
        yield Problem("identical pictures in train and val", "", tuple(across))
    for split, found in within.items():
        if found:
            yield Problem("identical pictures in one split", split, tuple(found))


def _same_bytes(paths: Sequence[str]) -> Iterator[list[str]]:
    """Groups of different files with the same contents; only files of one size are read."""
    sizes: dict[int, list[str]] = {}
    for path in paths:
        sizes.setdefault(os.stat(path).st_size, []).append(path)
    for candidates in sizes.values():
        digests: dict[bytes, list[str]] = {}
        for path in candidates if len(candidates) > 1 else ():
            digests.setdefault(_content(path), []).append(path)
        yield from (group for group in digests.values() if len(group) > 1)


def _content(path: str) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.digest()


def class_counts(index: Index, classes: int) -> NDArray[np.int64]:
    """[classes]: boxes of each class."""
    numbers = np.concatenate([np.zeros(0, int), *(rows[:, 0].astype(int) for rows in index.labels)])
    return np.bincount(numbers, minlength=classes)


def class_gaps(split: str, index: Index, names: Sequence[str]) -> Iterator[Problem]:
    """Classes without a box, if there are boxes at all."""
    counts = class_counts(index, len(names))
    missing = tuple(name for name, count in zip(names, counts.tolist(), strict=True) if not count)
    if missing and counts.any():
        yield Problem(f"class without a box in {split}", split, missing, f"{len(missing)} of {len(names)}")


def odd_boxes(split: str, index: Index) -> Iterator[Problem]:
    """Objects labelled twice, and boxes beyond their pictures."""
    twins, beyond = [], []
    for path, rows in zip(index.images, index.labels, strict=True):
        low, high = rows[:, 1:3] - rows[:, 3:5] / 2, rows[:, 1:3] + rows[:, 3:5] / 2
        beyond += [str(path)] * int(((low < -BEYOND) | (high > 1 + BEYOND)).any(axis=1).sum())
        twins += [str(path)] * _twins(rows[:, 0], low, high)
    for kind, found in (("object labelled twice", twins), ("box beyond the picture", beyond)):
        if found:
            yield Problem(kind, split, tuple(dict.fromkeys(found)), boxes=len(found))


def _twins(labels: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]) -> int:
    """How many boxes overlap an earlier one of their class by more than TWIN_IOU."""
    areas, count = (high - low).prod(axis=1), 0
    for at in range(1, len(labels)):
        sides = np.minimum(high[:at], high[at]) - np.maximum(low[:at], low[at])
        overlap = np.clip(sides, 0, None).prod(axis=1)
        ious = overlap / (areas[:at] + areas[at] - overlap)
        count += bool((ious[labels[:at] == labels[at]] > TWIN_IOU).any())
    return count


def long_pictures(split: str, index: Index) -> Iterator[Problem]:
    """Pictures that are mostly border once they are fitted to the input."""
    ratio = index.shapes.max(axis=1, initial=1) / index.shapes.min(axis=1, initial=1 << 30)
    places = tuple(str(index.images[at]) for at in np.flatnonzero(ratio > LONG))
    if places:
        yield Problem("very long picture", split, places)


def small_boxes(split: str, index: Index, size: tuple[int, int], stride: int) -> Iterator[Problem]:
    """Boxes whose width or height in the fitted picture is below the smallest cell.

    Args:
        split: for the problem.
        index: the split.
        size: height and width of the input.
        stride: pixels of the input a cell.
    """
    small = (box_sizes(index, size) < stride).any(axis=1)
    if small.any():
        owners = np.repeat(np.arange(len(index)), [len(rows) for rows in index.labels])
        places = tuple(str(index.images[at]) for at in np.unique(owners[small]))
        share = small.mean()
        kind = "many boxes smaller than a cell" if share > MANY_SMALL else "boxes smaller than a cell"
        detail = f"{share:.1%} are narrower or lower than {stride} pixels at {size[1]} x {size[0]}"
        yield Problem(kind, split, places, detail, int(small.sum()))


def loose_anchors(cfg: Path, index: Index, size: tuple[int, int], anchors: NDArray[np.floating]) -> Iterator[Problem]:
    """Anchors [A, 2] that reach too few of the training boxes."""
    sizes = box_sizes(index, size)
    if not len(sizes):
        return
    recall, iou = fit_quality(sizes, anchors)
    if recall < FITTED:
        detail = f"{recall:.1%} of the boxes are within {RATIO:g} times an anchor's sides; mean best IoU {iou:.3f}"
        yield Problem("anchors do not fit", "train", (str(cfg),), detail)


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
