"""Real trainings and compressions: the rows of docs/results.md.

A row that is finished has a file in benchmarks/results and is not run again; one that was interrupted goes on from its
last epoch. Trained networks stay in runs/results. The data sets are looked for in ../shared/data, or in
$DARKNET_SHARED/data.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import cv2

from benchmarks import compressions, criteria, goals, gpu, rewrites, runtimes, suite, trainings
from utils.cli import Parser, log, print_json, run
from utils.files import atomic_write_bytes, atomic_write_text, read_text

EXAMPLE = "python -m benchmarks.results --list"
PAGE = suite.ROOT / "docs" / "results.md"
PICTURES = suite.ROOT / "docs" / "images"
LONGEST_SIDE = 1024
"""Of a picture in docs/images, in pixels."""
KINDS = (goals, criteria, trainings, compressions, rewrites, runtimes, gpu)
"""Modules with rows and sections, in the order of the page."""
ROWS = {name: row for kind in KINDS for name, row in kind.ROWS.items()}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.results")
    add = parser.add_argument_group("rows").add_argument
    rows = "rows to run; --list has their names (default: none)"
    add("--rows", nargs="+", choices=ROWS, default=[], metavar="NAME", help=rows)
    add("--again", action="store_true", help="run them though they are finished: print the figures, store nothing")
    add("--list", action="store_true", help="print the rows, and whether they are finished")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run rows, then write docs/results.md from all that is finished."""
    args = parse_args(argv)
    os.chdir(suite.ROOT)
    for name in args.rows:
        if not stored_file(name).exists():
            store(name, ROWS[name].finish(name))
        elif args.again:
            print_json(ROWS[name].finish(name).document)
    if args.list:
        for name in ROWS:
            print(f"{name}: {'finished' if stored_file(name).exists() else 'to do'}")
        return
    atomic_write_text(PAGE, page())
    log(f"wrote {PAGE.relative_to(suite.ROOT)}")


def stored_file(name: str) -> Path:
    """The file of a finished row."""
    return suite.STORED / f"{name}.json"


def store(name: str, finished: suite.Finished) -> None:
    """Keep the figures of a row, and its picture, small enough for a repository."""
    atomic_write_text(stored_file(name), json.dumps({"row": name, **finished.document}, indent=2) + "\n")
    if finished.picture:
        image = cv2.imread(str(finished.picture))
        scale = min(1, LONGEST_SIDE / max(image.shape[:2]))
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])
        atomic_write_bytes(PICTURES / f"{name}_{finished.picture.name}", data.tobytes())


def page() -> str:
    """Text of docs/results.md, from every stored row."""
    stored = {name: json.loads(read_text(stored_file(name))) for name in ROWS if stored_file(name).exists()}
    return "\n".join([HEAD, *(section.markdown() for kind in KINDS for section in kind.sections(stored))])


HEAD = """# Results of real runs

Written by `python -m benchmarks.results` from the files in benchmarks/results; do not edit. AP by COCO's protocol
on the validation images. Times are those of a machine shared with other work. bccd: blood cells, 3 classes, 292
training and 72 validation images (MIT licence, github.com/Shenggan/BCCD_Dataset). roadsigns: 21 classes, 1197 and 315
images (Roboflow 100 "road signs", https://rf100.org, CC BY 4.0; made smaller here and split anew:
[data.md](data.md)). chess: 13 classes, 202 and 87 images (Roboflow 100 "chess pieces", CC BY 4.0; made smaller here).
"""


if __name__ == "__main__":
    run(main)
