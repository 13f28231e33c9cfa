"""How long an image takes in every runtime, the same network as each one's own file.

A network is a .pt, a CFG, which gets random weights, CFG:WEIGHTS, or a file of export.py, which is run as it is. Of the
others a file is written for every runtime, proved as by export.py, to a temporary folder: Darknet's own for OpenCV,
which is where most begin. All runtimes and networks are timed in turn, A B A B, one image at a time; before each turn
there is a rest, as threads of one library that still wait for work would take the cores from the next, and a run that
does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import total_bytes
from benchmarks.suite import machine
from utils.cli import Parser, image_side, log, positive_int, print_json, require, run
from utils.darknet import cfg as cfg_file
from utils.errors import InputError
from utils.flags import ModelFiles, choose_model
from utils.report.tables import Column, markdown_table
from utils.runtime.choice import KINDS, PACKAGES, RUNTIMES, Named, RuntimeFiles, choose_runtime, named

EXAMPLE = "python -m benchmarks.latency cfg/yolov4-tiny.cfg small=cfg/yolov4-tiny.cfg@320 --threads 2"
BASE = "opencv"
"""What the others are compared with."""
FORMATS = {"opencv": "darknet"} | {kind.runtimes[0]: kind.format for kind in KINDS.values()}
"""Formats of export.py by what runs them here."""
PAUSE = 0.05
"""Seconds of rest: libgomp, onnxruntime and ncnn let their threads wait for up to 20 ms."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.latency")
    add = parser.add_argument_group("what is measured").add_argument
    what = "[NAME=]FILE[@SIDE], FILE being .pt, .cfg, CFG:WEIGHTS, or a file of export.py"
    add("networks", nargs="+", metavar="NETWORK", type=named, help=what)
    runtimes = f"of {', '.join(RUNTIMES)} (default: all there are)"
    add("--runtimes", nargs="+", choices=RUNTIMES, metavar="R", help=runtimes)
    add("--threads", type=positive_int, default=2, metavar="N", help="number of threads (default: 2)")
    add("--img_size", type=image_side, metavar="N", help="side of the input (default: the network's own)")
    add("--rounds", type=positive_int, default=50, metavar="N", help="most turns of each (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    args = parser.parse_args(argv)
    if len({network.name for network in args.networks}) < len(args.networks):
        raise InputError("two networks have one name; give them others: NAME=FILE")
    for runtime in args.runtimes or ():
        if runtime in PACKAGES:
            require(f"--runtimes {runtime}", PACKAGES[runtime])
    args.runtimes = args.runtimes or [name for name in RUNTIMES if importlib.util.find_spec(PACKAGES.get(name, "cv2"))]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Time every network in every runtime, and print a line for each."""
    args = parse_args(argv)

    import torch

    from utils.compress.measure import LoadedNetwork, forward
    from utils.report.tables import interleaved, network_cost
    from utils.runtime.engines import load

    torch.set_num_threads(args.threads)
    cpu = torch.device("cpu")
    lines, calls = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for network in args.networks:
            for files, size in prepared(network, network.side or args.img_size, args.runtimes, Path(folder)):
                loaded = load(files, cpu, size)
                calls[f"{network.name} {files.runtime}"] = forward(
                    LoadedNetwork(network.name, loaded, size, files), cpu
                )
                line = {"network": network.name, "runtime": files.runtime, "engine": loaded.runtime}
                line |= {"height": size[0], "width": size[1], "threads": args.threads}
                lines.append(line | {"macs": network_cost(loaded.network, *size).macs, "bytes": total_bytes(files)})
        if not lines:
            raise InputError("none of these networks runs in one of these runtimes")
        with torch.inference_mode():
            times = interleaved(calls, rounds=args.rounds, seconds=60, pause=PAUSE)
    for line, latency in zip(lines, times.values(), strict=True):
        line |= {"ms": latency.median, "p90": latency.p90, "rounds": latency.rounds}
    base = {line["network"]: line["ms"] for line in lines if line["runtime"] == BASE}
    for line in lines:
        line["faster"] = base[line["network"]] / line["ms"] if line["network"] in base else None
    document = {**machine(), "rows": lines}
    print_json(document) if args.json else print(markdown_table(*table(document)), measured(document), sep="\n")


def prepared(
    network: Named, side: int | None, runtimes: Sequence[str], folder: Path
) -> Iterator[tuple[RuntimeFiles, tuple[int, int]]]:
    """The network's files for every runtime that can run it, and the input they take."""
    if kind := KINDS.get(Path(network.file).suffix.lower()):
        for runtime in [runtime for runtime in runtimes if runtime in kind.runtimes]:
            files = choose_runtime(None, network.file, runtime)
            files.check_size((side, side) if side else files.exported.metadata.size)
            yield files, files.exported.metadata.size
        return
    files = source(network, folder)
    for runtime in runtimes:
        try:
            yield export(network, files, side, runtime, folder)
        except InputError as refusal:
            log(f"{network.name} in {runtime}: {refusal}; left out")


def source(network: Named, folder: Path) -> ModelFiles:
    """Files of a network that others are made of; a bare cfg gets random weights."""
    cfg, _, weights = ("", "", network.file) if Path(network.file).exists() else network.file.rpartition(":")
    if Path(weights).suffix != ".cfg":
        return choose_model(cfg_file.load(cfg) if cfg else None, weights)

    import torch

    from models import Darknet
    from utils.checkpoint import write_darknet

    torch.manual_seed(0)
    blocks, path = cfg_file.load(weights), folder / f"{Path(weights).stem}.random.weights"
    write_darknet(path, Darknet(blocks))
    return choose_model(blocks, str(path))


def export(
    network: Named, files: ModelFiles, side: int | None, runtime: str, folder: Path
) -> tuple[RuntimeFiles, tuple[int, int]]:
    """A file for a runtime, written and proved, and its input.

    Raises:
        InputError: the runtime cannot run it.
    """
    from utils.export import workflow
    from utils.export.settings import SUFFIXES, ExportSettings

    format_ = FORMATS.get(runtime, "pt")
    path = folder / f"{Path(network.file).stem}-{side}{SUFFIXES[format_]}"
    settings = ExportSettings(format_, sides=(side,) if side else None, path=path)
    size = workflow.load_subject(files, settings).metadata.size
    if runtime == "torch":
        return RuntimeFiles(**vars(files)), size
    workflow.export(files, settings)
    cfg = cfg_file.load(path.with_suffix(".cfg")) if format_ == "darknet" else None
    return choose_runtime(cfg, str(path), runtime), size


def table(document: Mapping[str, Any]) -> tuple[list[Column], list[tuple[Any, ...]]]:
    """Columns and lines of a document."""
    names = ("network", "runtime", "input", "ms", "p90", "× OpenCV", "GMACs", "MB")
    lines = []
    for line in document["rows"]:
        size, times = f"{line['height']} × {line['width']}", (line["ms"], line["p90"], line["faster"])
        lines.append((line["network"], line["runtime"], size, *times, line["macs"] / 1e9, line["bytes"] / 1e6))
    return [Column(name, ".2f") for name in names], lines


def measured(document: Mapping[str, Any]) -> str:
    """How and where a document was measured."""
    rounds = [line["rounds"] for line in document["rows"]]
    engines = ", ".join(dict.fromkeys(line["engine"].split(",")[0] for line in document["rows"]))
    turns = f"medians of {min(rounds)} to {max(rounds)} turns, threads: {document['rows'][0]['threads']}"
    return f"{document['machine']}, {turns}; {engines}"


if __name__ == "__main__":
    run(main)
