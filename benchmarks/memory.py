"""What a training step gains when freed memory stays with the process, and what that takes.

The step is that of benchmarks.step. It is run in processes of its own, with glibc's ways and with those of
`utils.memory`, in turn; the ratio is that of the medians over the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.step import CFGS, Training
from utils.cli import Parser, image_side, positive_int, run
from utils.report.run_dir import environment
from utils.report.tables import Column, markdown_table

EXAMPLE = "python -m benchmarks.memory --img_size 416 --batch-size 16"
ENVIRONMENTS = {"given back": {"MALLOC_PERTURB_": "0"}, "kept": {}}
"""A variable of glibc's allocator, even one that changes nothing, keeps `utils.memory` from doing anything."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.memory")
    add = parser.add_argument_group("what is measured").add_argument
    add("--cfg", nargs="+", default=CFGS, metavar="FILE", help=f"networks (default: {' '.join(CFGS)})")
    add("--img_size", type=image_side, default=416, metavar="N", help="side of the input (default: %(default)s)")
    add("--batch-size", type=positive_int, default=16, metavar="N", help="pictures (default: %(default)s)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="processes of each kind (default: %(default)s)")
    add("--steps", type=positive_int, default=8, metavar="N", help="of a process (default: %(default)s)")
    add("--one", action="store_true", help="measure in this process, and print milliseconds and peak MiB as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row a network."""
    args = parse_args(argv)
    if args.one:
        print(json.dumps(measure(args)))
        return
    rows = [(Path(path).name, *compare(path, args)) for path in args.cfg]
    columns = [Column(f"{what}, {kind}", ".0f") for what in ("step ms", "peak MiB") for kind in ENVIRONMENTS]
    print(markdown_table(("cfg", *columns, Column("step, ratio"), Column("peak, ratio")), rows))
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    print(f"medians of {args.rounds} processes of {args.steps} steps in turn, {args.img_size} × {args.img_size}, "
          f"batch {args.batch_size}; {environment()['cpu']}, threads: {threads}")  # fmt: skip


def compare(path: str, args: argparse.Namespace) -> list[float]:
    """Milliseconds and peak MiB of both ways, and the ratios of the second way to the first."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", "--cfg", path, "--img_size", str(args.img_size),
               "--batch-size", str(args.batch_size), "--steps", str(args.steps)]  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ENVIRONMENTS}
    for _ in range(args.rounds):
        for kind, variables in ENVIRONMENTS.items():
            done = subprocess.run(command, env=inherited | variables, check=True, capture_output=True, text=True)
            found[kind].append(tuple(json.loads(done.stdout)))
    steps, peaks = ([statistics.median(values[i] for values in laps) for laps in found.values()] for i in (0, 1))
    return [*steps, *peaks, steps[1] / steps[0], peaks[1] / peaks[0]]


def measure(args: argparse.Namespace) -> tuple[float, float]:
    """Median milliseconds of a step, and the most memory that the process had, in MiB."""
    training = Training(args.cfg[0], args.img_size, args.batch_size)
    laps = training.laps({"step": training.step}, args.steps)
    return statistics.median(laps["step"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    run(main)
