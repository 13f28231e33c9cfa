"""A page about a compression: what every stage cost and gained, how it was done, and what is proved of it.

Reads run directories of train.py, *_prune.py, quantize.py and export.py, orders them by the sha256 in their lineage,
and writes report.html (one file, no script, nothing from elsewhere), report.md and report.json. With --data all
networks are measured anew on the same pictures, with paired bootstrap intervals and with times taken in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, memory_for, non_negative_int, positive_int, print_json, random_seed, run
from utils.flags import add_device_flags
from utils.report.journey.report import DOCUMENT, MARKDOWN, write_report

EXAMPLE = "python -m utils.report runs/demo/journey/train runs/demo/journey/prune --out runs/demo/page"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m utils.report")
    add = parser.add_argument_group("what is shown").add_argument
    add("runs", nargs="+", metavar="RUN", help="run directory, e.g. runs/train/exp")
    add("--title", metavar="TEXT", help="heading of the page (default: the folder that the runs are in)")
    cheap = "networks to beat: .json files of `benchmarks.compare --json --time`, or with --data networks to "
    cheap += "measure, [NAME=]FILE[@SIDE], e.g. small=runs/train/exp/weights/best.pt@160"
    add("--baselines", nargs="+", default=[], metavar="B", help=cheap)
    group = parser.add_argument_group("what is measured anew")
    add = group.add_argument
    add("--data", metavar="FILE", help="data set whose valid pictures all networks are measured on (default: none, "
        "the figures are those of the runs)")  # fmt: skip
    add("--batch-size", type=positive_int, default=16, metavar="N", help="pictures at a time (default: %(default)s)")
    add("--draws", type=positive_int, default=1000, metavar="N", help="data sets drawn (default: %(default)s)")
    add("--seed", type=random_seed, default=0, metavar="N", help="of the draws (default: %(default)s)")
    most = "most pictures shown with what was lost and gained (default: %(default)s)"
    add("--pictures", type=non_negative_int, default=6, metavar="N", help=most)
    add_device_flags(group, half=False)
    add = parser.add_argument_group("result").add_argument
    add("--out", required=True, metavar="DIR", help="folder of the three files; made if missing")
    add("--exist-ok", action="store_true", help="replace a report that is there")
    add("--json", action="store_true", help="print where the files are as one JSON document")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report and say where it is."""
    args = parse_args(argv)
    with memory_for(args.batch_size):
        page = write_report(args.runs, args.out, args.data, baselines=args.baselines, title=args.title,
                            device=args.device, batch_size=args.batch_size, draws=args.draws, seed=args.seed,
                            pictures=args.pictures, exist_ok=args.exist_ok)  # fmt: skip
    others = {key: str(Path(args.out) / name) for key, name in (("markdown", MARKDOWN), ("document", DOCUMENT))}
    print_json({"report": str(page), **others}) if args.json else print(page)


if __name__ == "__main__":
    run(main)
