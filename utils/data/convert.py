"""Turn an annotated data set into what train.py reads: label files, lists, class names and a .data file.

FORMAT is voc (Pascal VOC XML), coco (COCO instances JSON) or oxford-hand (MATLAB files); FORMAT --help says more.
Nothing of the data set is changed: the pictures of the new set are links to the originals, or copies with --copy.
What cannot be used is left out, counted and named; an annotation that is malformed stops with its file and line.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.cli import Parser, fraction, print_json, random_seed, run
from utils.darknet.data_file import load_names
from utils.data.annotations import Annotated, note_lines, selected_names, with_split
from utils.data.picture_set import PictureSet, check_output, write_set
from utils.data.read_coco import read_coco
from utils.data.read_oxford import read_oxford
from utils.data.read_voc import VocRules, read_voc
from utils.errors import DataError, InputError

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
