"""Networks side by side on the same labelled pictures, and how sure their differences are.

Each is measured as by test.py at its defaults. Differences to the first network have 95 % intervals from a bootstrap
over the pictures, whose draws are the same for all networks: see utils/detection/bootstrap.py. An interval that holds 0
shows no difference. It does not say what another seed of a training would give.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.runtimes import total_bytes
from utils.cli import Parser, image_side, input_size, log, positive_int, print_json, random_seed, run
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import DataConfig, load_data
from utils.darknet.shapes import max_stride, picture_channels
from utils.errors import DataError, InputError
from utils.flags import add_device_flags
from utils.report.tables import markdown_table
from utils.runtime.choice import RuntimeFiles, choose_runtime

if TYPE_CHECKING:
    import torch

    from models import Darknet
    from utils.darknet.blocks import Network
    from utils.data.index import Index
    from utils.detection.bootstrap import Matches, Spread
    from utils.detection.metrics import Metrics
    from utils.report.cost import Cost
    from utils.runtime.load import ForeignModel, Loaded

EXAMPLE = "python -m benchmarks.compare --data data/voc.data --img_size 416 base.pt cfg/pruned.cfg:pruned.weights"


class Named(NamedTuple):
    """A network as the command line names it: [NAME=]FILE[@SIDE]."""

    name: str
    file: str
    """.pt, a file of export.py, or CFG:WEIGHTS."""
    side: int | None
    """Of the network input; None: that of --img_size."""

    @property
    def family(self) -> str:
        """First word of the name."""
        return self.name.split()[0]


class Measured(NamedTuple):
    """One network on the pictures."""

    name: str
    size: tuple[int, int]
    metrics: Metrics
    cost: Cost
    matches: Matches


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.compare")
    group = parser.add_argument_group("what is measured")
    add = group.add_argument
    add("networks", nargs="+", metavar="NETWORK", type=named,
        help="[NAME=]FILE[@SIDE], FILE being .pt, .onnx or another file of export.py, or CFG:WEIGHTS; the others are "
             "compared with the first")  # fmt: skip
    add("--data", required=True, metavar="FILE", help="data set: .data or data.yaml")
    add("--img_size", type=image_side, metavar="N", help="side of the network input (default: each cfg's)")
    add("--batch-size", type=positive_int, default=16, metavar="N", help="pictures at a time (default: %(default)s)")
    add_device_flags(group, half=False)
    add = parser.add_argument_group("intervals and result").add_argument
    add("--draws", type=positive_int, default=1000, metavar="N", help="data sets drawn (default: %(default)s)")
    add("--seed", type=random_seed, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    add("--time", action="store_true", help="measure the time of a picture, all networks in turn; --plot does, too")
    plot = "draw AP50 against parameters, multiply-adds and time; networks whose names begin alike share a colour"
    add("--plot", metavar="FILE", help=plot)
    args = parser.parse_args(argv)
    if len(args.networks) < 2:
        raise InputError(f"{args.networks[0].name}: is compared with nothing; name two networks or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network, draw, and print one row a network."""
    args = parse_args(argv)
    data = load_data(args.data)
    if data.valid is None:
        raise DataError(f"{data.path}: no valid = …, the pictures that networks are compared on")
    files = [network_files(network.file) for network in args.networks]

    from utils.data.index import index
    from utils.detection.bootstrap import bootstrap
    from utils.device import select_device

    device = select_device(args.device)
    networks = [
        load(network.name, file, data, network.side or args.img_size, device)
        for network, file in zip(args.networks, files, strict=True)
    ]
    shared = {"pictures": index(data.valid, data.names), "names": data.names, "batch_size": args.batch_size}
    measured = [
        measure(named.name, loaded.model, size, device=device, network=loaded.network, **shared)
        for named, (loaded, size) in zip(args.networks, networks, strict=True)
    ]
    started = time.perf_counter()
    spreads = bootstrap([network.matches for network in measured], args.draws, args.seed)
    log(f"{args.draws} draws: {time.perf_counter() - started:.1f} s")
    document = describe(args, len(shared["pictures"]), measured, spreads)
    for found, file, (loaded, _) in zip(document["networks"], files, networks, strict=True):
        found |= {"bytes": total_bytes(file), "runtime": loaded.runtime.split(",")[0]}
    if args.plot or args.time:
        for found, ms in zip(document["networks"], latencies(networks, device), strict=True):
            found["ms"] = ms
    if args.plot:
        draw(Path(args.plot), args.networks, document)
    if args.json:
        print_json(document)
    else:
        print(text(document))


def named(text: str) -> Named:
    """A network of the command line; argparse type."""
    name, _, rest = ("", "", text) if Path(text).exists() else text.rpartition("=")
    file, at, side = ("", "", rest) if Path(rest).exists() else rest.rpartition("@")
    return Named(name or rest, file, image_side(side)) if at else Named(name or rest, rest, None)


def network_files(text: str) -> RuntimeFiles:
    """Files of a network: one, or a cfg and weights with a colon between."""
    cfg, _, weights = ("", "", text) if Path(text).exists() else text.rpartition(":")
    files = choose_runtime(cfg_file.load(cfg) if cfg else None, weights, None)
    for note in files.notes:
        log(note)
    return files


def load(
    name: str, files: RuntimeFiles, data: DataConfig, side: int | None, device: torch.device
) -> tuple[Loaded, tuple[int, int]]:
    """The network, ready to run, and the height and width of its input.

    Raises:
        InputError: it has another number of classes than the data set, or cannot work at that side.
    """
    from utils.runtime.load import load as load_runtime

    loaded = load_runtime(files, device)
    net = loaded.network
    if net.classes != data.classes:
        raise InputError(f"{name}: a network of {net.classes} classes, but {data.path} has {data.classes}")
    size = input_size([side] if side else None, max_stride(net), (net.net.height, net.net.width))
    files.check_size(size)
    return loaded, size


def measure(
    name: str,
    model: Darknet | ForeignModel,
    size: tuple[int, int],
    *,
    pictures: Index,
    names: Sequence[str],
    device: torch.device,
    batch_size: int,
    network: Network | None = None,
) -> Measured:
    """Detect in all pictures; of the detections only what they match is kept.

    `network` is the one whose costs are counted, where the model is folded already.
    """
    import numpy as np
    import torch

    from models import Darknet, fuse
    from utils.data.datasets import DetectionDataset, make_loader
    from utils.detection.bootstrap import matches
    from utils.detection.evaluate import evaluate
    from utils.report.cost import network_cost

    network = network or model.network
    dataset = DetectionDataset(pictures, size=size, channels=picture_channels(network))
    loader = make_loader(dataset, batch_size, device=device)
    if isinstance(model, Darknet):
        model = fuse(model).to(device, memory_format=torch.channels_last)
    log(f"{name}: {len(pictures)} pictures at {size[0]} × {size[1]}")
    found = evaluate(model, loader, names, device=device, by_size=False, keep_detections=True)
    rows = [np.column_stack([image.classes, image.boxes, image.scores]) for image in found.detections]
    return Measured(name, size, found.metrics, network_cost(network, *size), matches(rows, found.truth))


def latencies(networks: Sequence[tuple[Loaded, tuple[int, int]]], device: torch.device) -> list[float]:
    """Median milliseconds of a picture, all networks in turn."""
    import torch

    from utils.report.latency import interleaved
    from utils.runtime.load import ForeignModel

    runs = {}
    for number, (loaded, size) in enumerate(networks):
        image = torch.rand(1, loaded.network.net.channels, *size).to(device, memory_format=torch.channels_last)

        rows = isinstance(loaded.model, ForeignModel) and loaded.model.decodes
        call = loaded.model.rows if rows else loaded.model

        def forward(call: Callable[..., object] = call, image: torch.Tensor = image) -> None:
            call(image)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        runs[str(number)] = forward
    with torch.inference_mode():
        return [latency.median for latency in interleaved(runs, seconds=30).values()]


def draw(path: Path, networks: Sequence[Named], document: dict[str, Any]) -> None:
    """The picture of --plot."""
    from utils.report.pareto_plots import ParetoPoint, plot_pareto

    points = []
    for named, found in zip(networks, document["networks"], strict=True):
        low, high = found["map50_interval"]
        points.append(ParetoPoint(named.name, named.family, found["map50"], low, high, found["parameters"],
                                  found["macs"], found["ms"]))  # fmt: skip
    plot_pareto(points, path)


def describe(
    args: argparse.Namespace, pictures: int, measured: Sequence[Measured], spreads: Sequence[Spread]
) -> dict[str, Any]:
    """The document of --json; intervals are [low, high], differences [value, low, high]."""
    import torch

    from utils.detection.bootstrap import SHARE
    from utils.report.run_dir import environment

    where = environment()
    return {
        "data": args.data,
        "images": pictures,
        "draws": args.draws,
        "seed": args.seed,
        "share": SHARE,
        "machine": where["cpu"],
        "gpus": where["gpus"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": where["git_commit"],
        "networks": [
            {
                "network": network.name,
                "size": list(network.size),
                "map50": network.metrics.map50,
                "map50_interval": [spread.ap50.low, spread.ap50.high],
                "map50_95": network.metrics.map50_95,
                "map50_95_interval": [spread.ap50_95.low, spread.ap50_95.high],
                "map50_difference": list(spread.gain50),
                "map50_95_difference": list(spread.gain50_95),
                "parameters": network.cost.parameters,
                "macs": network.cost.macs,
            }
            for network, spread in zip(measured, spreads, strict=True)
        ],
    }


def text(document: dict[str, Any]) -> str:
    """The document for people."""
    columns = ["network", "AP50", "AP50-95", "AP50 to the first", "AP50-95 to the first", "parameters", "GMACs"]
    timed = "ms" in document["networks"][0]
    rows = [
        (n["network"], n["map50"], n["map50_95"], *(signed(n[key]) if number else None for key in
         ("map50_difference", "map50_95_difference")), n["parameters"], n["macs"] / 1e9, *([n["ms"]] if timed else []))
        for number, n in enumerate(document["networks"])
    ]  # fmt: skip
    columns += ["ms"] if timed else []
    sizes = ", ".join(dict.fromkeys("{} × {}".format(*network["size"]) for network in document["networks"]))
    measured = f"{document['images']} pictures of {document['data']}, {sizes}"
    intervals = f"{100 * document['share']:g} % intervals of {document['draws']} draws, seed {document['seed']}"
    machine = ", ".join([document["machine"], *document["gpus"]])
    where = f"{machine}, {document['threads']} threads, PyTorch {document['torch']}"
    return "\n".join([markdown_table(columns, rows), f"{measured}; {intervals}", where])


def signed(difference: Sequence[float]) -> str:
    """A difference and its interval."""
    value, low, high = difference
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    run(main)
