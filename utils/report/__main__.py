"""A page about a compression: what every stage cost and gained, how it was done, and what is proved of it.

Reads run directories of train.py, *_prune.py, quantize.py and export.py, orders them by the sha256 in their lineage,
and writes report.html (one file, no script, nothing from elsewhere), report.md and report.json. With --data all
networks are measured anew on the same images, with paired bootstrap intervals and with times taken in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, memory_for, print_json, run, settings_from
from utils.compress.page import DOCUMENT, MARKDOWN, MeasureSettings, write_report
from utils.flags import add_device_flags

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
    group = parser.add_argument_group("what is measured")
    pictures = "data set whose valid images all networks are measured on (default: none, the figures are those of the "
    group.add_argument("--data", metavar="FILE", help=f"{pictures}runs)")
    add_device_flags(group, half=False)
    parser.add_settings("how it is measured", MeasureSettings)
    add = parser.add_argument_group("result").add_argument
    add("--out", required=True, metavar="DIR", help="folder of the three files; made if missing")
    add("--exist-ok", action="store_true", help="replace a report that is there")
    add("--json", action="store_true", help="print where the files are as one JSON document")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report and say where it is."""
    args = parse_args(argv)
    with memory_for(args.batch_size):
        page = write_report(
            args.runs,
            args.out,
            args.data,
            baselines=args.baselines,
            title=args.title,
            exist_ok=args.exist_ok,
            device=args.device,
            settings=settings_from(args, MeasureSettings),
        )
    others = {key: str(Path(args.out) / name) for key, name in (("markdown", MARKDOWN), ("document", DOCUMENT))}
    print_json({"report": str(page), **others}) if args.json else print(page)


if __name__ == "__main__":
    run(main)
