"""How long slim_prune.py takes and how much memory: to plan (--dry-run), and from the files to the pruned network.

The weights are random. Every run is a process of its own, from starting Python to its end; plans and whole runs in
turn. The whole run proves the pruned network and writes it, but measures no accuracy (--no-test). Memory is the peak of
the process, pages of the mapped weights included; the goals are those of yolov4.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.cli import Parser, fraction, positive_int, run
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.network import tensors
from utils.report.tables import Column, markdown_table

EXAMPLE = "python -m benchmarks.prune --cfg cfg/yolov4.cfg --rounds 5"
SCRIPT = Path(__file__).resolve().parent.parent / "slim_prune.py"
GIGABYTE = 1e9


class Goal(NamedTuple):
    """What a run may take."""

    seconds: float
    gigabytes: float


GOALS = {"plan": Goal(3, 1.6), "whole run": Goal(10, 1.6)}


class Cost(NamedTuple):
    """What a run took."""

    seconds: float
    cpu: float
    """Seconds of all threads; less than `seconds` where the process waited for the disk or for other processes."""
    gigabytes: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.prune")
    add = parser.add_argument_group("what is measured").add_argument
    add("--cfg", default="cfg/yolov4.cfg", metavar="FILE", help="network (default: %(default)s)")
    add("--percent", type=fraction, default=0.5, metavar="P", help="of its channels (default: %(default)s)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="runs of each kind (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print medians beside the goals."""
    args = parse_args(argv)
    costs: dict[str, list[Cost]] = {kind: [] for kind in GOALS}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.weights"
        # In a process of its own: a child's peak starts at what its parent held.
        writer = multiprocessing.get_context("spawn").Process(target=write_random, args=(args.cfg, str(weights)))
        writer.start()
        writer.join()
        command = [sys.executable, str(SCRIPT), "--cfg", args.cfg, "--weights", str(weights), "--percent",
                   str(args.percent), "--json", "--project", str(Path(folder) / "runs")]  # fmt: skip
        for _ in range(args.rounds):
            costs["plan"].append(measured([*command, "--dry-run"]))
            costs["whole run"].append(measured([*command, "--no-test"]))
    columns = (Column("slim_prune.py"), Column("s", ".2f"), Column("goal"), Column("CPU s", ".2f"),
               Column("peak GB", ".2f"), Column("goal"))  # fmt: skip
    rows = [row(kind, found) for kind, found in costs.items()]
    print(markdown_table(columns, rows))
    print(f"{args.cfg}, --percent {args.percent:g}, median of {args.rounds}, {os.cpu_count()} processors")


def row(kind: str, costs: Sequence[Cost]) -> tuple[object, ...]:
    """Medians of time, the largest peak, and the goals."""
    goal = GOALS[kind]
    seconds, cpu = (statistics.median(values) for values in list(zip(*costs, strict=True))[:2])
    return kind, seconds, f"< {goal.seconds:g}", cpu, max(cost.gigabytes for cost in costs), f"< {goal.gigabytes:g}"


def measured(command: Sequence[str]) -> Cost:
    """Run a command to its end.

    Raises:
        CalledProcessError: its exit status is not 0.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / GIGABYTE)


def write_random(cfg: str, path: str) -> None:
    """Weights whose features neither vanish nor explode: He's for the kernels, γ and σ² in 0.5..1.5, small β and μ."""
    network, rng = cfg_file.load(cfg), np.random.default_rng(0)
    arrays = {}
    for spec in tensors(network):
        if spec.name in ("bn.weight", "bn.running_var"):
            array = 0.5 + rng.random(spec.shape, np.float32)
        else:
            fan_in = spec.size // spec.shape[0]
            array = rng.standard_normal(spec.shape, np.float32) * (2 / fan_in) ** 0.5 / (10 if fan_in == 1 else 1)
        arrays[spec.key] = array.astype(np.float32)
    weights_file.write(path, network, arrays)


if __name__ == "__main__":
    run(main)
