"""How long a picture takes in every runtime, the same network as each one's own file.

A network is a .pt, a CFG, which gets random weights, CFG:WEIGHTS, or a file of export.py, which is run as it is. Of the
others a file is written for every runtime, proved as by export.py, to a temporary folder: Darknet's own for OpenCV,
which is where most begin. All runtimes and networks of one input size and number of threads are timed in turn, A B A B,
one picture at a time; before each turn there is a rest, as threads of one library that still wait for work would take
the cores from the next, and a run that does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runtimes import Named, Size, load, named, prepare, source, total_bytes
from utils.cli import Parser, image_side, log, positive_int, print_json, run
from utils.darknet.data_file import DataConfig, load_data
from utils.errors import DataError, InputError
from utils.report.tables import Column, markdown_table, text_table
from utils.runtime.choice import PACKAGES, RUNTIMES, RuntimeFiles
from utils.runtime.packages import require

if TYPE_CHECKING:
    from utils.report.latency import Latency
    from utils.runtime.load import Loaded

EXAMPLE = "python -m benchmarks.latency cfg/yolov4-tiny.cfg cfg/yolov3-tiny.cfg --threads 1 2"
BASE = "opencv"
"""What the others are compared with."""
PAUSE = 0.05
"""Seconds of rest: libgomp, onnxruntime and ncnn let their threads wait for up to 20 ms."""


@dataclass(frozen=True)
class Row:
    """One network in one runtime."""

    network: str
    runtime: str
    engine: str
    """The runtime with its version and threads."""
    height: int
    width: int
    threads: int
    macs: int
    bytes: int
    """Of the weights, or of the file and what belongs to it."""
    ms: float
    """Median."""
    p90: float
    rounds: int
    map50: float | None
    """None without --data."""
    faster: float | None = None
    """How many times faster than OpenCV with the same network; None where that does not run."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.latency")
    add = parser.add_argument_group("what is measured").add_argument
    what = "[NAME=]FILE, FILE being .pt, .cfg, CFG:WEIGHTS, or a file of export.py"
    add("networks", nargs="+", metavar="NETWORK", type=named, help=what)
    add(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        metavar="R",
        help=f"of {', '.join(RUNTIMES)} (default: all there are)",
    )
    add("--threads", nargs="+", type=positive_int, default=[2], metavar="N", help="numbers of threads (default: 2)")
    add("--img_size", nargs="+", type=image_side, metavar="N", help="sides of the input (default: the network's own)")
    add("--rounds", type=positive_int, default=50, metavar="N", help="most turns of each (default: %(default)s)")
    seconds = "no turn begins after S seconds of one size and number of threads (default: %(default)s)"
    add("--seconds", type=positive_int, default=60, metavar="S", help=seconds)
    add("--data", metavar="FILE", help="data set whose AP50 is measured, too: .data or data.yaml")
    add = parser.add_argument_group("result").add_argument
    add("--markdown", action="store_true", help="print the table in Markdown")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    add("--plot", type=Path, metavar="FILE", help="draw medians and 90th percentiles: .png or .jpg")
    args = parser.parse_args(argv)
    if len({network.name for network in args.networks}) < len(args.networks):
        raise InputError("two networks have one name; give them others: NAME=FILE")
    if args.plot and args.plot.suffix not in (".png", ".jpg"):
        raise InputError(f"--plot {args.plot}: .png and .jpg are allowed")
    for runtime in args.runtimes or ():
        if runtime in PACKAGES:
            require(f"--runtimes {runtime}", PACKAGES[runtime])
    there = [name for name in RUNTIMES if importlib.util.find_spec(PACKAGES.get(name, "cv2"))]
    args.runtimes = args.runtimes or sorted(there, key=lambda name: name != BASE)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, draw and print."""
    args = parse_args(argv)
    data = load_data(args.data) if args.data else None
    if data and data.valid is None:
        raise DataError(f"{data.path}: no valid = …, the pictures that AP50 is measured on")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, data, Path(folder))
    rows = with_gains(rows)
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        print_json(describe(args, rows))
    else:
        print(text(args, rows))


def measure(args: argparse.Namespace, data: DataConfig | None, folder: Path) -> list[Row]:
    """Every network in every runtime, by size and threads.

    Raises:
        InputError: nothing that was asked for can be run.
    """
    import torch

    sources = {network: source(network, folder) for network in args.networks}
    rows: list[Row] = []
    precisions: dict[tuple[str, str, Size], float] = {}
    for side in args.img_size or [None]:
        ready = [
            (network, *found)
            for network in args.networks
            for found in prepare(network, sources[network], side, args.runtimes, folder)
        ]
        for threads in args.threads:
            torch.set_num_threads(threads)
            loaded = [(network, files, size, load(files, size)) for network, files, size in ready]
            runs = {f"{network.name} {files.runtime}": runner(found, size) for network, files, size, found in loaded}
            log(f"{len(runs)} networks and runtimes, {threads} threads, side {side or 'as they are'}")
            times = timed(runs, args)
            for latency, (network, files, size, found) in zip(times, loaded, strict=True):
                key = (network.name, files.runtime, size)
                if data is not None and key not in precisions:
                    precisions[key] = ap50(found, data, size, files)
                rows.append(row(network, files, size, threads, found, latency, precisions.get(key)))
    if not rows:
        raise InputError("none of these networks runs in one of these runtimes")
    return rows


def runner(loaded: Loaded, size: Size) -> Callable[[], object]:
    """A function that runs the network on a random picture."""
    import torch

    from utils.runtime.load import ForeignModel

    image = torch.rand(1, loaded.network.net.channels, *size, generator=torch.Generator().manual_seed(0))
    if isinstance(loaded.model, ForeignModel):
        array, engine = image.numpy(), loaded.model.engine
        return lambda: engine(array)
    image = image.to(memory_format=torch.channels_last)
    return lambda: loaded.model(image)


def timed(runs: dict[str, Callable[[], object]], args: argparse.Namespace) -> list[Latency]:
    """Milliseconds of every run."""
    import torch

    from utils.report.latency import interleaved

    with torch.inference_mode():
        return list(interleaved(runs, rounds=args.rounds, seconds=args.seconds, pause=PAUSE).values())


def ap50(loaded: Loaded, data: DataConfig, size: Size, files: RuntimeFiles) -> float:
    """AP50 on the validation pictures, as test.py measures it.

    Raises:
        InputError: the network has other classes.
    """
    from utils.data.datasets import DetectionDataset, make_loader
    from utils.data.index import index
    from utils.detection.evaluate import evaluate

    net = loaded.network
    if net.classes != data.classes:
        raise InputError(f"{files.weights}: a network of {net.classes} classes, but {data.path} has {data.classes}")
    pictures = DetectionDataset(
        index(data.valid, data.names), size=size, mode=files.mode or "letterbox", channels=net.net.channels
    )
    return evaluate(loaded.model, make_loader(pictures, 8), data.names, device="cpu", by_size=False).metrics.map50


def row(
    network: Named, files: RuntimeFiles, size: Size, threads: int, loaded: Loaded, latency: Latency, map50: float | None
) -> Row:
    """What was measured of one network in one runtime."""
    from utils.report.cost import network_cost

    return Row(network.name, files.runtime, loaded.runtime, *size, threads, network_cost(loaded.network, *size).macs,
               total_bytes(files), latency.median, latency.p90, latency.rounds, map50)  # fmt: skip


def with_gains(rows: Sequence[Row]) -> list[Row]:
    """The rows with how many times faster each is than OpenCV with the same network, input and threads."""
    base = {(r.network, r.height, r.width, r.threads): r.ms for r in rows if r.runtime == BASE}
    gains = [base.get((r.network, r.height, r.width, r.threads)) for r in rows]
    return [Row(**asdict(r) | {"faster": ms and ms / r.ms}) for r, ms in zip(rows, gains, strict=True)]


def describe(args: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """The document of --json."""
    from utils.report.run_dir import environment

    where = environment()
    return {"machine": where["cpu"], "commit": where["git_commit"], "data": args.data, "pause_s": PAUSE,
            "rows": [asdict(found) for found in rows]}  # fmt: skip


def text(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """The table for people."""
    from utils.report.run_dir import environment

    columns: list[Column | str] = ["network", "runtime", "input", "threads", Column("ms", ".2f"), Column("p90", ".2f"),
                                   Column("× OpenCV", ".2f"), Column("GMACs"), Column("MB", ".2f")]  # fmt: skip
    columns += ["AP50"] if args.data else []
    cells = [
        (r.network, r.runtime, f"{r.height} × {r.width}", r.threads, r.ms, r.p90, r.faster, r.macs / 1e9, r.bytes / 1e6,
         *([r.map50] if args.data else []))
        for r in rows
    ]  # fmt: skip
    table = (markdown_table if args.markdown else text_table)(columns, cells)
    engines = ", ".join(dict.fromkeys(found.engine.split(",")[0] for found in rows))
    turns = f"medians of {min(r.rounds for r in rows)} to {max(r.rounds for r in rows)} turns, one picture"
    return f"{table}\n{turns}; {environment()['cpu']}; {engines}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """The picture of --plot."""
    from utils.report.latency_plots import LatencyBar, plot_latency

    bars = [LatencyBar(f"{r.height} × {r.width}, threads: {r.threads}", r.network, r.runtime, r.ms, r.p90)
            for r in rows]  # fmt: skip
    plot_latency(sorted(bars, key=lambda bar: bar.panel), path)


if __name__ == "__main__":
    run(main)
