"""Turn an annotated data set into what train.py reads: label files, lists, class names and a .data file.

FORMAT is voc (Pascal VOC XML), coco (COCO instances JSON) or oxford-hand (MATLAB files); FORMAT --help says more.
Nothing of the data set is changed: the pictures of the new set are links to the originals, or copies with --copy.
What cannot be used is left out, counted and named; an annotation that is malformed stops with its file and line.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.cli import Parser, fraction, print_json, random_seed, run
from utils.darknet.data_file import load_names
from utils.data.annotations import (
    Annotated,
    Box,
    Note,
    Picture,
    VocRules,
    note_lines,
    read_coco,
    read_oxford,
    read_voc,
    selected_names,
    with_split,
)
from utils.data.images import PictureError, shown_size
from utils.data.index import IGNORED
from utils.errors import DataError, InputError

DIGITS = 6
"""Decimals of a label: 0.01 pixel in a picture of 10 000."""
LEAST = 10.0**-DIGITS / 2
"""A box whose width or height is written as 0 has no area."""
CUT = 1.0
"""Pixels that a box may reach beyond its picture before that is said; it is cut in any case."""
_PLAIN_NAME = re.compile(r"[\w.+-]{1,80}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff/\\]")


@dataclass(frozen=True)
class Split:
    """How much of a split was written."""

    pictures: int
    boxes: int
    backgrounds: int
    """Pictures without a box."""
    ignored: int
    """Boxes that evaluation and training ignore; not among `boxes`."""


@dataclass(frozen=True)
class PictureSet:
    """A set on the disk."""

    data: Path
    """The .data file to train with."""
    names: tuple[str, ...]
    splits: Mapping[str, Split]
    """"train", and "val" if there is one."""
    notes: tuple[Note, ...]
    """What was left out or changed."""


def write_set(
    output: Path, annotated: Annotated, classes: Mapping[str, str], *, name: str | None = None, copy: bool = False
) -> PictureSet:
    """Write a data set into the folder `output`; what is converted is not touched.

    The set is made beside `output` and moved there in one step, so the folder holds all of it or nothing. Pictures are
    links to the originals, or copies.

    Args:
        output: new or empty.
        annotated: pictures and boxes.
        classes: name in `annotated` → name to be written, in the order of the class numbers; other boxes are left out.
        name: of the .names and .data file; the folder's by default.
        copy: copy the pictures.

    Raises:
        DataError: `output` holds something, no training picture is left, or a name cannot be written.
    """
    check_output(output)
    name = name or (output.name if _PLAIN_NAME.match(output.name) else "data")
    if not _PLAIN_NAME.match(name):
        raise DataError(f"--name {name!r}: letters, digits, '.', '_', '+' and '-' are allowed")
    for text in classes.values():
        if not text.strip() or text != text.strip() or re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text):
            raise DataError(f"class name {text!r}: a name is not empty, on one line and without blanks at its ends")
    notes = list(annotated.notes)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=output.parent) as scratch:
        folder = Path(scratch) / "set"
        writer = _Writer(folder, {own: number for number, own in enumerate(classes)}, copy, notes)
        splits = {"train": writer.split("train", annotated.folders[0], annotated.train)}
        if annotated.val is not None:
            splits["val"] = writer.split("val", annotated.folders[1], annotated.val)
        if not splits["train"].pictures:
            first = f"; the first: {notes[0].place}: {notes[0].kind}" if notes else ""
            raise DataError(f"none of {len(annotated.train)} training pictures can be used{first}")
        (folder / f"{name}.names").write_text("".join(f"{text}\n" for text in classes.values()), encoding="utf-8")
        lines = [f"classes={len(classes)}", "train=train.txt", f"names={name}.names"]
        lines[2:2] = ["valid=val.txt"] if "val" in splits else []
        (folder / f"{name}.data").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        try:
            os.rename(folder, output)  # replaces an empty folder, fails on any other
        except OSError as failure:
            raise DataError(f"{output}: {failure.strerror}; name a new folder with --output") from None
    return PictureSet(output / f"{name}.data", tuple(classes.values()), splits, tuple(notes))


def check_output(output: Path) -> None:
    """Raise DataError unless `output` is new or an empty folder."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise DataError(f"{output}: holds other files or is no folder; name a new folder with --output")


class _Writer:
    """Pictures, labels and lists of a set in the making."""

    def __init__(self, folder: Path, classes: Mapping[str, int], copy: bool, notes: list[Note]) -> None:
        self.folder, self.classes, self.copy, self.notes = folder, classes, copy, notes
        self.taken: set[tuple[str, str]] = set()
        """Split folders and lower-case stems that are in use: a.jpg and a.png would share a label file."""
        folder.mkdir()

    def split(self, name: str, part: str, pictures: Sequence[Picture]) -> Split:
        """Write one split into images/PART, labels/PART and, where boxes are ignored, ignored/PART; and its list."""
        for top in ("images", "labels"):
            (self.folder / top / part).mkdir(parents=True, exist_ok=True)
        entries, counts, ignored = [], [], 0
        seen: set[str] = set()
        for picture in tqdm(pictures, f"writing {name}", delay=2, disable=None):
            source = os.path.abspath(picture.path)
            if source in seen:
                self.notes.append(Note("picture listed twice, used once", str(picture.path)))
                continue
            seen.add(source)
            size = self._size(picture)
            if size is None:
                continue
            rows, passed = (self._rows(picture, size, ignored=kind) for kind in (False, True))
            target = self._target(part, picture.path)
            (self.folder / "labels" / part / f"{target.stem}.txt").write_text("".join(rows))
            if passed:
                (self.folder / IGNORED / part).mkdir(parents=True, exist_ok=True)
                (self.folder / IGNORED / part / f"{target.stem}.txt").write_text("".join(passed))
            self._place(source, self.folder / "images" / part / target)
            entries.append(f"images/{part}/{target}\n")
            counts.append(len(rows))
            ignored += len(passed)
        (self.folder / f"{name}.txt").write_bytes(os.fsencode("".join(entries)))
        return Split(len(counts), sum(counts), counts.count(0), ignored)

    def _size(self, picture: Picture) -> tuple[int, int] | None:
        """Size of a picture; None if it cannot be used, which is noted."""
        try:
            size = shown_size(picture.path)
        except PictureError as failure:
            kind = "not found" if failure.kind == "missing image" else "cannot be read"
            self.notes.append(Note(f"picture {kind}, left out", str(picture.path)))
            return None
        if picture.size not in (None, size):
            self.notes.append(Note("picture of another size than annotated, left out", picture.place))
            return None
        return size

    def _rows(self, picture: Picture, size: tuple[int, int], *, ignored: bool) -> list[str]:
        """Lines of the label file, or of the one of ignored boxes; each box is cut to the picture."""
        rows: dict[str, None] = {}
        for box in (box for box in picture.boxes if box.ignored is ignored):
            if box.name not in self.classes:
                self.notes.append(Note("class not in --names, box left out", f"{picture.place}: {box.name}"))
                continue
            shares, beyond = _shares(box, size)
            if min(shares[2:]) < LEAST:
                self.notes.append(Note("box without an area, left out", f"{picture.place}: {box.name}"))
                continue
            if beyond > CUT:
                self.notes.append(Note("box beyond the picture, cut", f"{picture.place}: {box.name}"))
            row = f"{self.classes[box.name]} " + " ".join(f"{share:.{DIGITS}f}" for share in shares) + "\n"
            if row in rows:
                self.notes.append(Note("same box twice, used once", f"{picture.place}: {box.name}"))
            rows[row] = None
        return list(rows)

    def _target(self, part: str, source: Path) -> Path:
        """File name of a picture in the set: its own, without control characters and numbered where it is taken."""
        stem, suffix = _CONTROL.sub("_", source.stem).strip() or "picture", _CONTROL.sub("_", source.suffix)
        name, number = stem, 1
        while (part, name.lower()) in self.taken:
            number += 1
            name = f"{stem}-{number}"
        self.taken.add((part, name.lower()))
        return Path(name + suffix)

    def _place(self, source: str, target: Path) -> None:
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


PROGRAM = "python -m utils.data.convert"
FORMATS = {
    "voc": (
        "Pascal VOC: ROOT/Annotations/*.xml, ROOT/ImageSets/Main/*.txt, ROOT/JPEGImages; a ROOT without ImageSets, as\n"
        "labelling tools write, needs --val-share. Classes are those found, sorted, unless --names is given.",
        "voc VOCdevkit/VOC2007 VOCdevkit/VOC2012 --output data/voc",
    ),
    "coco": (
        "COCO: instances_*.json. Classes are the categories in the order of their ids; crowds are ignored boxes.",
        "coco --train coco/annotations/instances_train2017.json --val coco/annotations/instances_val2017.json "
        "--output data/coco2017",
    ),
    "oxford-hand": (
        "Oxford hand data set: ROOT is the folder hand_dataset, as unpacked. Trained on are its training\n"
        "and validation pictures, without those of --val. Needs scipy (requirements-convert.txt).",
        "oxford-hand hand_dataset --output data/oxfordhand",
    ),
}
"""Format → its description, and an example."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of `python -m utils.data.convert`."""
    parser = Parser(__doc__, f"{PROGRAM} {FORMATS['voc'][1]}", PROGRAM)
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True, parser_class=_format_parser)
    for name, add in (("voc", _add_voc), ("coco", _add_coco), ("oxford-hand", _add_oxford)):
        sub = formats.add_parser(name, description=FORMATS[name][0], epilog=FORMATS[name][1])
        add(sub)
        _add_output(sub)
    args = parser.parse_args(argv)
    if args.val_share is not None and args.val_share <= 0:
        raise InputError(f"--val-share {args.val_share:g}: a share above 0 is needed")
    return args


def _format_parser(prog: str, description: str, epilog: str) -> Parser:
    return Parser(description, f"{PROGRAM} {epilog}", prog)


def _add_voc(parser: Parser) -> None:
    group = parser.add_argument_group("data set")
    group.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="a folder like VOCdevkit/VOC2007")
    group.add_argument("--train", default="trainval", metavar="LIST", help="training list (default: %(default)s)")
    group.add_argument("--val", default="test", metavar="LIST", help="validation list (default: %(default)s)")
    group.add_argument("--images", type=Path, metavar="DIR", help="the pictures (default: ROOT/JPEGImages)")
    group.add_argument(
        "--difficult",
        choices=("ignore", "keep"),
        default="ignore",
        metavar="WHAT",
        help="objects marked difficult: ignore or keep, as objects like others (default: %(default)s)",
    )
    group.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        default=1,
        metavar="N",
        help="number of the leftmost pixel: 1 in VOC itself, 0 as other tools write (default: %(default)s)",
    )


def _add_coco(parser: Parser) -> None:
    group = parser.add_argument_group("data set")
    group.add_argument("--train", type=Path, required=True, metavar="FILE", help="instances of the training pictures")
    group.add_argument("--val", type=Path, metavar="FILE", help="instances of the validation pictures")
    group.add_argument(
        "--images", type=Path, metavar="DIR", help="the pictures (default: found as COCO's archives unpack)"
    )


def _add_oxford(parser: Parser) -> None:
    group = parser.add_argument_group("data set")
    group.add_argument("root", type=Path, metavar="ROOT", help="the folder hand_dataset")
    group.add_argument(
        "--val",
        choices=("test", "validation"),
        default="test",
        metavar="SPLIT",
        help="validation pictures: test or validation (default: %(default)s)",
    )


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("result")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the result, new or empty")
    group.add_argument("--name", metavar="NAME", help="of the .data and .names files (default: the folder's)")
    group.add_argument("--names", type=Path, metavar="FILE", help="classes wanted, one a line, in this order")
    group.add_argument("--copy", action="store_true", help="copy the pictures in place of links to them")
    group.add_argument(
        "--val-share",
        type=fraction,
        metavar="P",
        help="draw a share of the training pictures for validation, and read no validation list",
    )
    group.add_argument("--seed", type=random_seed, default=0, metavar="N", help="of --val-share (default: %(default)s)")
    group.add_argument("--json", action="store_true", help="print the result as one JSON document")


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print what was written and what was left out."""
    args = parse_args(argv)
    check_output(args.output)
    wanted = load_names(args.names) if args.names else None
    annotated = _read(args)
    if args.val_share is not None:
        annotated = with_split(annotated, args.val_share, args.seed)
    own = annotated.used_names()
    if not own:
        raise DataError("the data set has no objects, and so no classes")
    ordered = annotated.names is not None
    classes = dict(zip(own, own, strict=True))
    if wanted is not None:
        classes = selected_names(own, wanted, str(args.names), ordered=ordered)
    made = write_set(args.output, annotated, classes, name=args.name, copy=args.copy)
    if args.json:
        print_json(_document(made))
    else:
        print("\n".join(_lines(made)))


def _read(args: argparse.Namespace) -> Annotated:
    whole = args.val_share is not None
    if args.format == "voc":
        rules = VocRules(args.difficult == "keep", args.first_pixel)
        return read_voc(args.roots, args.train, None if whole else args.val, args.images, rules)
    if args.format == "coco":
        return read_coco(args.train, None if whole else args.val, args.images)
    return read_oxford(args.root, None if whole else args.val)


def _lines(made: PictureSet) -> list[str]:
    parts = [
        f"{name} {split.pictures} pictures ({split.backgrounds} without a box), {split.boxes} boxes"
        + f", {split.ignored} ignored boxes" * bool(split.ignored)
        for name, split in made.splits.items()
    ]
    lines = [f"{made.data}: {'; '.join(parts)}; {len(made.names)} classes", *note_lines(made.notes)]
    if "val" not in made.splits:
        lines.append("  no validation pictures: training evaluates nothing; --val-share 0.1 draws some")
    return lines


def _document(made: PictureSet) -> dict[str, Any]:
    return {
        "data": str(made.data),
        "names": list(made.names),
        "splits": {name: vars(split) for name, split in made.splits.items()},
        "notes": dict(Counter(note.kind for note in made.notes)),
    }


if __name__ == "__main__":
    run(main)
