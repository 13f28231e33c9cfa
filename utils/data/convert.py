"""Turn an annotated data set into what train.py reads: label files, lists, class names and a .data file.

FORMAT is voc (Pascal VOC XML), coco (COCO instances JSON) or oxford-hand (MATLAB files); FORMAT --help says more.
Nothing of the data set is changed: the images of the new set are links to the originals, or copies with --copy.
What cannot be used is left out, counted and named; an annotation that is malformed stops with its file and line.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.cli import Parser, ProgressBar, fraction, print_json, random_seed, run
from utils.darknet.data_file import load_names, write_data_file
from utils.data.annotations import Annotated, Box, Notes, Picture, VocReader, read_coco, read_oxford
from utils.data.findings import first_places
from utils.data.images import PictureError, shown_size
from utils.data.index import DIGITS, IGNORED, IMAGE_FOLDERS, label_line, label_path
from utils.errors import DataError, InputError
from utils.files import new_folder

PROGRAM = "python -m utils.data.convert"
FORMATS = {
    "voc": (
        "Pascal VOC: ROOT/Annotations/*.xml, ROOT/ImageSets/Main/*.txt, ROOT/JPEGImages; a ROOT without ImageSets, as\n"
        "labelling tools write, needs --val-share. Classes are those found, sorted, unless --names is given.\n"
        "The archives of Pascal VOC unpack to VOCdevkit.",
        "voc VOCdevkit/VOC2007 VOCdevkit/VOC2012 --output data/voc",
    ),
    "coco": (
        "COCO: instances_*.json. Classes are the categories in the order of their ids; crowds are ignored boxes.\n"
        "In the example coco is the folder in which its archives were unpacked.",
        "coco --train coco/annotations/instances_train2017.json --val coco/annotations/instances_val2017.json "
        "--output data/coco2017",
    ),
    "oxford-hand": (
        "Oxford hand data set: ROOT is the folder hand_dataset, as unpacked. Trained on are its training\n"
        "and validation images, without those of --val. Needs scipy (requirements-convert.txt).",
        "oxford-hand hand_dataset --output data/oxfordhand",
    ),
}
"""Format → its description, and an example."""
LEAST = 10.0**-DIGITS / 2
"""A box whose width or height is written as 0 has no area."""
LONGEST_STEM = 200
"""Bytes of a file name before its suffix; a number, a suffix and a temporary name must have room in 255 bytes, too."""
CUT = 1.0
"""Pixels that a box may reach beyond its picture without a note; it is cut in any case."""
_PLAIN_NAME = re.compile(r"[\w.+-]{1,80}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of `python -m utils.data.convert`."""
    parser = Parser(__doc__, f"{PROGRAM} {FORMATS['voc'][1]}", PROGRAM)
    formats = parser.add_subparsers(  # type: ignore[call-overload]  # the stub asks for a class
        dest="format", metavar="FORMAT", required=True, parser_class=_format_parser
    )
    for name, add_flags in (("voc", _add_voc), ("coco", _add_coco), ("oxford-hand", _add_oxford)):
        sub = formats.add_parser(name, description=FORMATS[name][0], epilog=FORMATS[name][1])
        add_flags(sub.add_argument_group("data set"))
        _add_output(sub.add_argument_group("result"))
    args = parser.parse_args(argv)
    if args.val_share is not None and args.val_share <= 0:
        raise InputError(f"--val-share {args.val_share:g}: a share above 0 is needed")
    return args


def _format_parser(prog: str, description: str, epilog: str) -> Parser:
    return Parser(description, f"{PROGRAM} {epilog}", prog)


def _add_voc(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("roots", type=Path, nargs="+", metavar="ROOT", help="a folder like VOCdevkit/VOC2007")
    add("--train", default="trainval", metavar="LIST", help="training list (default: %(default)s)")
    add("--val", default="test", metavar="LIST", help="validation list (default: %(default)s)")
    add("--images", type=Path, metavar="DIR", help="the images (default: ROOT/JPEGImages)")
    text = "objects marked difficult: ignore or keep, as objects like others (default: %(default)s)"
    add("--difficult", choices=("ignore", "keep"), default="ignore", metavar="WHAT", help=text)
    text = "number of the leftmost pixel: 1 in VOC itself, 0 as other tools write (default: %(default)s)"
    add("--first-pixel", type=int, choices=(0, 1), default=1, metavar="N", help=text)


def _add_coco(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--train", type=Path, required=True, metavar="FILE", help="instances of the training images")
    add("--val", type=Path, metavar="FILE", help="instances of the validation images")
    add("--images", type=Path, metavar="DIR", help="the images (default: found as COCO's archives unpack)")


def _add_oxford(group: argparse._ArgumentGroup) -> None:
    group.add_argument("root", type=Path, metavar="ROOT", help="the folder hand_dataset")
    text = "validation images: test or validation (default: %(default)s)"
    group.add_argument("--val", choices=("test", "validation"), default="test", metavar="SPLIT", help=text)


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the result, new or empty")
    add("--name", metavar="NAME", help="of the .data and .names files (default: the folder's)")
    add("--names", type=Path, metavar="FILE", help="classes wanted, one a line, in this order")
    add("--copy", action="store_true", help="copy the images in place of links to them")
    text = "draw a share of the training images for validation, and read no validation list"
    add("--val-share", type=fraction, metavar="P", help=text)
    add("--seed", type=random_seed, default=0, metavar="N", help="of --val-share (default: %(default)s)")
    add("--json", action="store_true", help="print the result as one JSON document")


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print what was written and what was left out."""
    args = parse_args(argv)
    with new_folder(args.output) as folder:
        name = args.name or (args.output.name if _PLAIN_NAME.match(args.output.name) else "data")
        if not _PLAIN_NAME.match(name):
            raise DataError(f"--name {name!r}: letters, digits, '.', '_', '+' and '-' are allowed")
        wanted = load_names(args.names) if args.names else None
        annotated = _read(args)
        if args.val_share is not None:
            annotated = with_split(annotated, args.val_share, args.seed)
        classes = class_names(annotated, wanted, args.names)
        splits = write_set(folder, annotated, classes, name=name, copy=args.copy)
    data, names = args.output / f"{name}.data", list(classes.values())
    if args.json:
        notes = {kind: len(places) for kind, places in annotated.notes.items()}
        print_json({"data": str(data), "names": names, "splits": splits, "notes": notes})
        return
    parts = []
    for split, counts in splits.items():
        ignored = f", {counts['ignored']} ignored boxes" if counts["ignored"] else ""
        pictures = f"{split} {counts['pictures']} images ({counts['backgrounds']} without a box)"
        parts.append(f"{pictures}, {counts['boxes']} boxes{ignored}")
    print(f"{data}: {'; '.join(parts)}; {len(names)} classes")
    for kind, places in annotated.notes.items():
        print(f"  {kind}: {len(places)}: {first_places(places)}")
    if not _has_val(splits):
        print("  no validation images: training evaluates nothing; --val-share 0.1 draws some")


def _read(args: argparse.Namespace) -> Annotated:
    val = args.val if args.val_share is None else None
    if args.format == "voc":
        return VocReader(args.images, args.difficult == "keep", args.first_pixel).read(args.roots, args.train, val)
    if args.format == "coco":
        return read_coco(args.train, val, args.images)
    return read_oxford(args.root, val)


def with_split(annotated: Annotated, share: float, seed: int) -> Annotated:
    """A share of the training pictures, drawn at random, as the validation pictures; one that is listed twice is one.

    Args:
        annotated: without validation pictures.
        share: 0 < share < 1; at least one picture stays on either side.
        seed: another one draws another split.

    Raises:
        InputError: there are fewer than two pictures.
    """
    paths = [os.path.abspath(picture.path) for picture in annotated.train]
    different = list(dict.fromkeys(paths))
    count = len(different)
    if count < 2:
        raise InputError(f"--val-share {share}: {count} images cannot be split; at least 2 are needed")
    order = np.random.default_rng(seed).permutation(count).tolist()
    drawn = {different[position] for position in order[: min(count - 1, max(1, round(count * share)))]}
    parts: tuple[list[Picture], list[Picture]] = [], []
    for path, picture in zip(paths, annotated.train, strict=True):
        parts[path in drawn].append(picture)
    return replace(annotated, train=parts[0], val=parts[1], folders=(annotated.folders[0], "val"))


def class_names(annotated: Annotated, wanted: Sequence[str] | None, path: Path | None) -> dict[str, str]:
    """Name of a class in the annotations → its name in the result, in the order of the class numbers.

    Without `wanted` they are all classes, in the order of the format or sorted. Wanted names that are all among them
    select classes. A file of as many names as an ordered set has classes may call them otherwise, as Darknet's
    coco.names does (`motorbike` for `motorcycle`).

    Args:
        annotated: the data set.
        wanted: names of the file `path`.
        path: for messages.

    Raises:
        DataError: there are no classes; a name is there twice, or is none of the set's.
    """
    names = annotated.names
    if names is None:
        names = tuple(
            sorted({box.name for part in (annotated.train, annotated.val or ()) for p in part for box in p.boxes})
        )
    if not names:
        raise DataError("the data set has no objects, and so no classes")
    if wanted is None:
        return dict(zip(names, names, strict=True))
    for name in wanted:
        if list(wanted).count(name) > 1:
            raise DataError(f"{path}: the name {name!r} is there twice; every class needs a name of its own")
    strange = [name for name in wanted if name not in names]
    if not strange or annotated.names is None:
        return dict(zip(wanted, wanted, strict=True))
    renamed = dict(zip(names, wanted, strict=False))
    if len(names) == len(wanted) and all(new == name or new not in names for name, new in renamed.items()):
        return renamed
    raise DataError(f"{path}: {strange[0]!r} is no class of the data set, which has: {', '.join(names)}")


def write_set(
    folder: Path, annotated: Annotated, classes: Mapping[str, str], *, name: str, copy: bool
) -> dict[str, dict[str, int]]:
    """Write images/, labels/, ignored/, train.txt, val.txt, NAME.names and NAME.data into an empty folder.

    Args:
        folder: of the new set.
        annotated: pictures and boxes; what is left out is added to its notes.
        classes: name in `annotated` → name to be written, in the order of the class numbers; other boxes are left out.
        name: of the .names and .data file.
        copy: copy the pictures in place of links to them.

    Returns:
        Counts of pictures, boxes, backgrounds (pictures without a box) and ignored boxes of "train" and "val".

    Raises:
        DataError: no training picture is left, or a class name cannot be written.
    """
    for text in classes.values():
        if not text.strip() or text != text.strip() or _CONTROL.search(text):
            raise DataError(f"class name {text!r}: a name is not empty, on one line and without blanks at its ends")
    writer = _Writer(folder, {old: number for number, old in enumerate(classes)}, copy, annotated.notes)
    # The label of images/images/a.jpg would be looked for in images/labels/a.txt.
    train, val = (
        split if part in IMAGE_FOLDERS else part
        for split, part in zip(("train", "val"), annotated.folders, strict=True)
    )
    splits = {"train": writer.split("train", train, annotated.train)}
    if annotated.val is not None:
        splits["val"] = writer.split("val", val, annotated.val)
    if not splits["train"]["pictures"]:
        first = next((f"; the first: {places[0]}: {kind}" for kind, places in annotated.notes.items()), "")
        raise DataError(f"none of {len(annotated.train)} training images can be used{first}")
    write_data_file(folder, name, list(classes.values()), valid=_has_val(splits))
    return splits


def _has_val(splits: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether there are validation pictures: train.py refuses an empty list, and trains without one."""
    return "val" in splits and splits["val"]["pictures"] > 0


class _Writer:
    """Pictures, labels and lists of a set in the making."""

    def __init__(self, folder: Path, classes: Mapping[str, int], copy: bool, notes: Notes) -> None:
        self.folder, self.classes, self.copy, self.notes = folder, classes, copy, notes
        self.taken: set[str] = set()
        """Label files in lower case: those of a.jpg and a.png would be one."""

    def split(self, name: str, part: str, pictures: Sequence[Picture]) -> dict[str, int]:
        """Write one split into images/PART, labels/PART and, where boxes are ignored, ignored/PART; and its list."""
        (self.folder / "images" / part).mkdir(parents=True, exist_ok=True)
        counts = {"pictures": 0, "boxes": 0, "backgrounds": 0, "ignored": 0}
        entries: list[str] = []
        sources: dict[str, list[Picture]] = {}
        for picture in pictures:
            same = sources.setdefault(os.path.abspath(picture.path), [])
            if same:
                self.notes["image listed twice, used once"].append(str(picture.path))
            if picture.location not in (other.location for other in same):  # another annotation has boxes of its own
                same.append(picture)
        for source, same in ProgressBar(f"writing {name}", sources.items(), len(sources), "images"):
            picture = same[0]
            if picture.within is not None and not source.startswith(os.path.join(os.path.abspath(picture.within), "")):
                self.notes[f"image outside of {picture.within}, left out"].append(picture.location)
                continue
            if (size := self._size(same)) is None:
                continue
            labels, ignored = (self._labels(same, size, ignored=kind) for kind in (False, True))
            target = self._target(part, picture.path)
            self._write_labels(label_path(target), labels)
            if ignored:
                self._write_labels(label_path(target, IGNORED), ignored)
            self._add_picture(source, self.folder / target)
            entries.append(f"{target}\n")
            counts["pictures"] += 1
            counts["boxes"] += len(labels)
            counts["backgrounds"] += not labels
            counts["ignored"] += len(ignored)
        (self.folder / f"{name}.txt").write_bytes(os.fsencode("".join(entries)))
        return counts

    def _size(self, same: Sequence[Picture]) -> tuple[int, int] | None:
        """Size of a picture; None if it cannot be used, which is noted."""
        try:
            size = shown_size(same[0].path)
        except PictureError as failure:
            kind = "not found" if failure.kind == "missing image" else "cannot be read"
            self.notes[f"image {kind}, left out"].append(str(same[0].path))
            return None
        if wrong := [picture.location for picture in same if picture.size not in (None, size)]:
            self.notes["image of another size than annotated, left out"] += wrong
            return None
        return size

    def _labels(self, same: Sequence[Picture], size: tuple[int, int], *, ignored: bool) -> list[str]:
        """Lines of the label file, or of the one of ignored boxes; each box is cut to the picture."""
        lines: dict[str, None] = {}
        for location, box in ((picture.location, box) for picture in same for box in picture.boxes):
            if box.ignored is not ignored:
                continue
            where = f"{location}: {box.name}"
            if box.name not in self.classes:
                self.notes["class not in --names, box left out"].append(where)
                continue
            shares, beyond = _shares(box, size)
            if min(shares[2:]) < LEAST:
                self.notes["box without an area, left out"].append(where)
                continue
            if beyond > CUT:
                self.notes["box beyond the image, cut"].append(where)
            line = label_line(self.classes[box.name], shares)
            if line in lines:
                self.notes["same box twice, used once"].append(where)
            lines[line] = None
        return list(lines)

    def _target(self, part: str, source: Path) -> str:
        """Path of a picture in the set: without control characters, and numbered where its label file is taken."""
        stem, suffix = (_CONTROL.sub("_", text).replace("\\", "_") for text in os.path.splitext(source.name))
        stem = stem.strip().encode()[:LONGEST_STEM].decode(errors="ignore") or "picture"
        target, number = f"images/{part}/{stem}{suffix}", 1
        while (label := label_path(target).lower()) in self.taken:
            number += 1
            target = f"images/{part}/{stem}-{number}{suffix}"
        self.taken.add(label)
        return target

    def _write_labels(self, name: str, lines: Sequence[str]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))

    def _add_picture(self, source: str, target: Path) -> None:
        if self.copy:
            shutil.copyfile(source, target)
            return
        try:
            os.symlink(source, target)
        except OSError as failure:
            raise DataError(f"{target.name}: no link can be made ({failure.strerror}); copy with --copy") from None


def _shares(box: Box, size: tuple[int, int]) -> tuple[tuple[float, float, float, float], float]:
    """A box cut to a picture of `size` (height, width) as cx, cy, w, h in shares of it, and the pixels cut off."""
    height, width = size
    x1, x2 = (min(max(x, 0.0), float(width)) for x in (box.x1, box.x2))
    y1, y2 = (min(max(y, 0.0), float(height)) for y in (box.y1, box.y2))
    beyond = max(x1 - box.x1, y1 - box.y1, box.x2 - x2, box.y2 - y2)
    return ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height), beyond


if __name__ == "__main__":
    run(main)
