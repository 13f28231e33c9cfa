"""Networks side by side on the same labelled images, and how sure their differences are.

Each is measured as by test.py at its defaults. Differences to the first network have 95 % intervals from a bootstrap
over the images, whose draws are the same for all networks: see utils/detection/bootstrap.py. An interval that holds 0
shows no difference. It does not say what another seed of a training would give.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.suite import machine
from utils.cli import Parser, image_side, log, positive_int, print_json, random_seed, run
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import load_data
from utils.errors import DataError, InputError
from utils.flags import add_device_flags
from utils.report.tables import Column, markdown_table
from utils.runtime.choice import KINDS, RUNTIMES, Named, RuntimeFiles, choose_runtime, named

if TYPE_CHECKING:
    from utils.compress.measure import LoadedNetwork
    from utils.detection.bootstrap import Spread

NETWORKS = "runs/demo/journey/float/model.onnx small=runs/demo/journey/int8/model.onnx"
EXAMPLE = f"python -m benchmarks.compare --data runs/demo/data/toy.data {NETWORKS}"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.compare")
    group = parser.add_argument_group("what is measured")
    add = group.add_argument
    what = "[NAME=]FILE[@SIDE], FILE being .pt, .onnx or another file of export.py, or CFG:WEIGHTS; the others are "
    add("networks", nargs="+", metavar="NETWORK", type=named, help=f"{what}compared with the first")
    add("--data", required=True, metavar="FILE", help="data set: .data or data.yaml")
    add("--img_size", type=image_side, metavar="N", help="side of the network input (default: each cfg's)")
    runtimes = "files of export.py run in each of these that reads them (default: the usual one)"
    add("--runtimes", nargs="+", choices=RUNTIMES, metavar="R", help=runtimes)
    add_device_flags(group, half=False)
    add = parser.add_argument_group("intervals and result").add_argument
    add("--draws", type=positive_int, default=1000, metavar="N", help="data sets drawn (default: %(default)s)")
    add("--seed", type=random_seed, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    add("--time", action="store_true", help="measure the time of an image, the networks of a runtime in turn")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network, and print a line for each."""
    args = parse_args(argv)
    data = load_data(args.data)
    if data.valid is None:
        raise DataError(f"{data.path}: no valid = …, the images that networks are compared on")
    pairs = [pair for network in args.networks for pair in in_runtimes(network, args.runtimes)]
    if len(pairs) < 2:
        raise InputError(f"{args.networks[0].name}: is compared with nothing; name two networks, or two runtimes of it")

    from utils.compress.measure import evaluate_network, load_network, matched, network_times
    from utils.data.index import index
    from utils.detection.bootstrap import SHARE, bootstrap
    from utils.device import select_device

    device, pictures = select_device(args.device), index(data.valid, data.names)
    networks = []
    for network, file in pairs:
        side = network.side or args.img_size
        if side:
            file.check_size((side, side))
        networks.append(load_network(network.name, file, side, data, device))
    hits = [matched(evaluate_network(network, pictures, data.names, device)) for network in networks]
    spreads = bootstrap(hits, args.draws, args.seed)
    lines = [entry(*measured) for measured in zip(networks, spreads, strict=True)]
    if args.time:
        for line, latency in zip(lines, network_times(networks, device), strict=True):
            line["ms"] = latency.median
    document = {
        "data": args.data,
        "images": len(pictures),
        "draws": args.draws,
        "seed": args.seed,
        "share": SHARE,
        **machine(),
        "networks": lines,
    }
    print_json(document) if args.json else print(text(document))


def entry(network: LoadedNetwork, spread: Spread) -> dict[str, Any]:
    """A network in the document of --json; intervals are [low, high], differences [value, low, high]."""
    from utils.report.tables import network_cost

    cost = network_cost(network.loaded.network, *network.size)
    return {
        "network": network.name,
        "size": list(network.size),
        "map50": spread.ap50.value,
        "map50_interval": [spread.ap50.low, spread.ap50.high],
        "map50_95": spread.ap50_95.value,
        "map50_95_interval": [spread.ap50_95.low, spread.ap50_95.high],
        "map50_difference": list(spread.gain50),
        "map50_95_difference": list(spread.gain50_95),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "bytes": total_bytes(network.files),
        "runtime": network.loaded.runtime.split(",")[0],
    }


def in_runtimes(network: Named, runtimes: Sequence[str] | None) -> list[tuple[Named, RuntimeFiles]]:
    """A network with its files, once for each runtime that reads them; None: the usual runtime."""
    kind = KINDS.get(Path(network.file).suffix.lower())
    if runtimes is None or kind is None:
        return [(network, network_files(network))]
    usable = [runtime for runtime in runtimes if runtime in kind.runtimes]
    return [(network._replace(name=f"{network.name}, {name}"), network_files(network, name)) for name in usable]


def network_files(network: Named, runtime: str | None = None) -> RuntimeFiles:
    """Files of a network: one, or a cfg and weights with a colon between.

    Args:
        network: as the command line names it.
        runtime: of a file of export.py; None: the usual one.
    """
    text = network.file
    cfg, _, weights = ("", "", text) if Path(text).exists() else text.rpartition(":")
    files = choose_runtime(cfg_file.load(cfg) if cfg else None, weights, runtime)
    if files.suppressed:
        raise InputError(f"{weights}: ends in NMS at its own thresholds, which lowers AP; export it without --nms")
    log(*files.notes)
    return files


def total_bytes(files: RuntimeFiles) -> int:
    """Bytes of the weights, or of an exported file and what belongs to it."""
    beside = {".param": (".bin", ".json"), ".xml": (".bin",)}.get(files.weights.suffix, ())
    return sum(file.stat().st_size for file in (files.weights, *map(files.weights.with_suffix, beside)))


def text(document: Mapping[str, Any]) -> str:
    """The document for people."""
    sizes = ", ".join(dict.fromkeys("{} × {}".format(*network["size"]) for network in document["networks"]))
    measured = f"{document['images']} images of {document['data']}, {sizes}"
    intervals = f"{100 * document['share']:g} % intervals of {document['draws']} draws, seed {document['seed']}"
    where = ", ".join([document["machine"], *document["gpus"], f"{document['threads']} threads"])
    return "\n".join([markdown_table(*table(document)), f"{measured}; {intervals}", where])


def table(document: Mapping[str, Any]) -> tuple[list[Column | str], list[list[Any]]]:
    """Columns and lines of the networks in a document."""
    columns: list[Column | str] = ["network", "AP50", "AP50-95", "change of AP50", "change of AP50-95"]
    columns += ["parameters", "GMACs", Column("MB", ".2f")]
    timed = "ms" in document["networks"][0]
    lines: list[list[Any]] = []
    for network in document["networks"]:
        line = [network[key] for key in ("network", "map50", "map50_95")]
        for key in ("map50_difference", "map50_95_difference"):
            line.append(signed(network[key]) if lines and key in network else None)
        line += [network["parameters"], network["macs"] / 1e9, network["bytes"] / 1e6]
        lines.append([*line, network["ms"]] if timed else line)
    return columns + ([Column("ms", ".1f")] if timed else []), lines


def signed(difference: Sequence[float]) -> str:
    """A difference and its interval."""
    value, low, high = difference
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    run(main)
