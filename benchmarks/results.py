"""Real trainings, one row of docs/results.md each.

A row that is finished has a file in benchmarks/results and is not run again; one that was interrupted goes on from its
last epoch. Trained networks stay in runs/results; --again makes those that are gone, and says how the figures differ
from the stored ones, which stay. The data sets are looked for in ../shared/data, or in $DARKNET_SHARED/data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import chains, comparisons, criteria, goals, integers, journeys, lessons, rows, speeds
from benchmarks.trainings import PICTURES, ROOT, STORED, Finished, publish
from utils.cli import Parser, log, run
from utils.errors import InputError
from utils.files import atomic_write_text, read_text

PAGE = ROOT / "docs" / "results.md"
EXAMPLE = "python -m benchmarks.results --rows bccd-yolov4-tiny"


KINDS = (
    (rows.ROWS, rows),
    (goals.ROWS, goals),
    (journeys.ROWS, journeys),
    (speeds.ROWS, speeds),
    (comparisons.COMPARISONS, comparisons),
    (criteria.ROWS, criteria),
    (chains.CHAINS, chains),
    (integers.ROWS, integers),
)
"""Rows that have a section of their own each, and what finishes and describes them."""
EVERY = {name: row for kind in (lessons.LESSONS, *(kind for kind, _ in KINDS)) for name, row in kind.items()}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.results")
    add = parser.add_argument_group("rows").add_argument
    add(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"rows to run: {', '.join(EVERY)} (default: none)",
    )
    add("--again", action="store_true", help="run them though they are finished; what is stored stays as it is")
    add("--list", action="store_true", help="print the rows and what each waits for")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what was asked for, then write docs/results.md from all that is finished."""
    args = parse_args(argv)
    unknown = [name for name in args.rows if name not in EVERY]
    if unknown:
        raise InputError(f"--rows {unknown[0]}: no such row; there are {', '.join(EVERY)}")
    os.chdir(ROOT)
    for name in args.rows:
        path = STORED / f"{name}.json"
        if not path.exists():
            _store(name, finish(name))
        elif args.again:
            _compare(name, finish(name), json.loads(read_text(path)))
    if args.list:
        for name, row in EVERY.items():
            print(f"{name}: {'finished' if (STORED / f'{name}.json').exists() else 'to do'}: {row.what}")
        return
    write_page()


def finish(name: str) -> Finished:
    """Do what is left of a row."""
    return next(
        module.finish(name, kind[name]) for kind, module in (*KINDS, (lessons.LESSONS, lessons)) if name in kind
    )


def _store(name: str, found: Finished) -> None:
    STORED.mkdir(exist_ok=True)
    PICTURES.mkdir(parents=True, exist_ok=True)
    atomic_write_text(STORED / f"{name}.json", json.dumps({"row": name, **found.document}, indent=2) + "\n")
    for picture, path in found.pictures.items():
        publish(path, PICTURES / picture)


def _compare(name: str, found: Finished, stored: dict[str, Any]) -> None:
    """Say which accuracies of a row are other ones than before."""
    before, now = dict(_accuracies(stored)), dict(_accuracies(found.document))
    other = [
        f"{key} {now.get(key, math.nan):.4f} (stored: {value:.4f})"
        for key, value in before.items()
        if now.get(key, value) != value
    ]
    log(f"{name}: {', '.join(other) or f'the same {len(before)} accuracies as stored'}")


def _accuracies(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every AP in a document, and where it stands."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            key = part.get("network", key) if isinstance(part, dict) else key
            yield from _accuracies(part, f"{place}.{key}" if place else str(key))
    elif place.rpartition(".")[2] in ("map50", "map50_95", "ap50", "ap50_95"):
        yield place, value


def write_page() -> None:
    """docs/results.md from every stored row."""
    every = {name: STORED / f"{name}.json" for name in EVERY}
    stored = {name: json.loads(read_text(path)) for name, path in every.items() if path.exists()}
    parts = [HEAD, rows.table({name: document for name, document in stored.items() if name in rows.ROWS}), ""]
    parts += lessons.section(stored)
    for kind, module in KINDS:
        parts += [line for name in kind if name in stored for line in module.section(name, stored[name])]
    parts += integers.mean_section(stored)
    atomic_write_text(PAGE, "\n".join(parts).rstrip() + "\n")
    log(f"wrote {PAGE.relative_to(ROOT)}")


HEAD = """# Results of real runs

Written by `python -m benchmarks.results` from the files in benchmarks/results; do not edit. AP by COCO's protocol
on the validation pictures, best epoch, averaged weights. Minutes are those of the training steps on a
machine shared with other work. bccd: blood cells, 3 classes, 292 training and 72 validation pictures (MIT licence,
github.com/Shenggan/BCCD_Dataset). Rows that begin with bccd-yolov4-tiny and have an older commit begin with
bccd-yolov4-tiny-before. roadsigns: 21 classes, 1197 and 315 pictures (Roboflow 100 "road signs",
https://rf100.org, CC BY 4.0; made smaller here and split anew: [data.md](data.md)). chess: 13 classes, 202 and 87
pictures (Roboflow 100 "chess pieces", CC BY 4.0; made smaller here).
"""


if __name__ == "__main__":
    run(main)
