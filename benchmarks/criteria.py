"""What ranks the channels that go: slim_prune.py with several flags beside torch-pruning, at equal multiply-adds.

All begin with one trained network, round widths to multiples of 8 and leave the heads whole. They are measured as cut,
and with --epochs again after one and the same distillation by the network before (--KDstr 4). What is finished in
--project is not made again, and a training that was interrupted goes on from its last epoch. Seconds are those of
scoring and cutting: of slim_prune.py from starting Python to the written file.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lessons import spread
from benchmarks.rows import BCCD, CHESS, ROADSIGNS
from benchmarks.trainings import RUNS, TRAIN, Finished, python, shared, train, weights_of
from utils.cli import Parser, image_side, input_size, non_negative_int, print_json, random_seed, run
from utils.darknet.cfg import format_network
from utils.darknet.data_file import load_data
from utils.darknet.shapes import max_stride, picture_channels
from utils.errors import InputError
from utils.files import atomic_write_text, read_text, sha256
from utils.model_files import choose_model
from utils.pruning.command import share
from utils.report.tables import Column, markdown_table
from utils.runtime.packages import require

EXAMPLE = "python -m benchmarks.criteria --weights best.pt --data data/voc.data --img_size 256 --macs 0.5 --peers LAMP"
OURS = (
    "--importance gamma --reconstruct 0",
    "--importance gamma",
    "--importance taylor --reconstruct 0",
    "--importance taylor",
    "--importance taylor --rounds 2",
)
PEERS = ("LAMP", "GroupTaylor", "BNScale", "GroupMagnitude")
SHARES = (0.5, 0.33, 0.25)
BATCH, MULTIPLE = 16, 8
FIGURES = ("map50", "map50_interval", "map50_95", "map50_95_interval", "parameters", "macs")


@dataclass(frozen=True)
class Criteria:
    """One network, cut by all criteria."""

    source: str
    """Row of the network before."""
    data: str
    """`{shared}` in it is the folder of the real data."""
    size: int
    epochs: int
    """Of the distillation."""
    flags: str = "--amp bf16"
    """Of train.py, beside."""
    shares: tuple[float, ...] = SHARES
    trained: bool = False

    @property
    def what(self) -> str:
        """The question it answers."""
        after = f"after {self.epochs} epochs of distillation, three seeds" if self.trained else "without any training"
        return f"{self.source}: criteria of importance, ours and torch-pruning's, {after}"


SETS = {
    "chess": Criteria("chess-yolov3-tiny", CHESS, 256, 25),
    "bccd": Criteria("bccd-yolov4-tiny", BCCD, 256, 20),
    "roadsigns": Criteria("roadsigns-yolov3-tiny-33", ROADSIGNS, 224, 8, "--amp bf16 --no-flip"),
}
ROWS = {f"criteria-{key}": row for key, row in SETS.items()} | {
    f"criteria-{key}-tuned-{100 * kept:.0f}": Criteria(
        row.source, row.data, row.size, row.epochs, row.flags, (kept,), trained=True
    )
    for key, row in SETS.items() for kept in SHARES
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.criteria")
    add = parser.add_argument_group("what is compared").add_argument
    add("--weights", required=True, metavar="FILE", help="the network before, a .pt")
    add("--data", required=True, metavar="FILE", help="data set with train and valid pictures: .data or data.yaml")
    add("--img_size", type=image_side, metavar="N", help="side of the network input (default: the network's)")
    left = "shares of the multiply-adds that are left (default: %(default)s)"
    add("--macs", type=share, nargs="+", default=SHARES, metavar="S", help=left)
    flags = f'flags of slim_prune.py, as in --ours="{OURS[-1]}"; may be repeated (default: {", ".join(OURS)})'
    add("--ours", action="append", metavar="FLAGS", help=flags)
    add("--peers", nargs="*", choices=PEERS, default=PEERS, metavar="NAME",
        help=f"importances of torch-pruning (default: {', '.join(PEERS)})")  # fmt: skip
    add = parser.add_argument_group("distillation and result").add_argument
    add("--epochs", type=non_negative_int, default=0, metavar="N", help="train each for N epochs (default: none)")
    add("--seeds", type=random_seed, nargs="+", default=[0], metavar="N", help="of the trainings (default: 0)")
    add("--train", default="", metavar="FLAGS", help='more flags of train.py, as in --train="--no-flip --amp bf16"')
    add("--project", default="runs/criteria", metavar="DIR", help="where networks are kept (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    args = parser.parse_args(argv)
    args.ours = OURS if args.ours is None else args.ours
    if args.peers:
        require("--peers", "torch_pruning")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Cut by every criterion, train, measure all at once, print a row for each network."""
    args = parse_args(argv)
    load_data(args.data)
    criteria = [f"slim_prune.py {flags}".strip() for flags in args.ours]
    criteria += [f"torch-pruning {peer}" for peer in args.peers]
    networks = [cut(args, criterion, kept) for kept in args.macs for criterion in criteria]
    trainings = [[trained(args, network, seed) for seed in args.seeds if args.epochs] for network in networks]
    files = [f"before={args.weights}"]
    for network, runs in zip(networks, trainings, strict=True):
        files += [f"{network['name']}={network['cfg']}:{network['weights']}"]
        files += [f"{path.name}={path / 'weights' / 'best.pt'}" for path in runs]
    document = json.loads(python("-m", "benchmarks.compare", *common(args), *files, "--json"))
    before, *found = [{key: figures[key] for key in FIGURES} for figures in document.pop("networks")]
    document |= {"epochs": args.epochs, "seeds": args.seeds, "before": before, "networks": []}
    for network, runs in zip(networks, trainings, strict=True):
        (figures, *after), found = found[: 1 + len(runs)], found[1 + len(runs) :]
        own = {"network": network["name"], **{key: network[key] for key in ("criterion", "share", "seconds")}}
        document["networks"].append({**own, **figures, "trained": after})
    print_json(document) if args.json else print(text(document))


def common(args: argparse.Namespace) -> list[str]:
    """Flags that all scripts have."""
    return ["--data", args.data, *(["--img_size", str(args.img_size)] if args.img_size else [])]


def cut(args: argparse.Namespace, criterion: str, kept: float) -> dict[str, Any]:
    """Prune by a criterion, or take what was pruned before: the document in --project, with the files of the network.

    Raises:
        InputError: --project has it of another network, data set or size.
    """
    name = re.sub(r"[^\w.]+", "-", f"{criterion} {kept:g}")
    path = Path(args.project) / f"{name}.json"
    made_of = {"source": sha256(Path(args.weights)), "data": args.data, "img_size": args.img_size}
    if path.exists():
        document = json.loads(read_text(path))
        if {key: document[key] for key in made_of} != made_of:
            raise InputError(f"{path}: of another network, data set or size; give another --project")
        return document
    path.parent.mkdir(parents=True, exist_ok=True)
    program, _, what = criterion.partition(" ")
    started = time.perf_counter()
    files = (by_slim_prune if program == "slim_prune.py" else by_peer)(args, what, kept, name)
    document = {"name": name, "criterion": criterion, "share": kept, **made_of, **files}
    document["seconds"] = round(time.perf_counter() - started, 1)
    atomic_write_text(path, json.dumps(document, indent=2) + "\n")
    return document


def by_slim_prune(args: argparse.Namespace, flags: str, kept: float, name: str) -> dict[str, str]:
    """Files of the network that slim_prune.py leaves."""
    command = ["slim_prune.py", "--weights", args.weights, *common(args), "--target-macs", str(kept), "--multiple-of",
               str(MULTIPLE), "--no-test", *shlex.split(flags), "--project", args.project, "--name", name]  # fmt: skip
    document = json.loads(python(*command, "--json"))
    return {key: document[key] for key in ("cfg", "weights")}


def by_peer(args: argparse.Namespace, criterion: str, kept: float, name: str) -> dict[str, str]:
    """Files of the network that torch-pruning leaves."""
    from benchmarks import peers
    from utils.checkpoint import load_model
    from utils.data.datasets import DetectionDataset, make_loader
    from utils.data.index import index
    from utils.training.state import write_darknet

    data, model = load_data(args.data), load_model(choose_model(None, args.weights)).model
    net, side = model.network.net, [args.img_size] if args.img_size else None
    size = input_size(side, max_stride(model.network), (net.height, net.width))
    if criterion == peers.GRADIENT:
        pictures = index(data.train, data.names)
        dataset = DetectionDataset(pictures, size=size, channels=picture_channels(model.network))
        peers.gradients(model, make_loader(dataset, BATCH))
    pruned = peers.prune(model, criterion, kept, size, MULTIPLE)
    folder = Path(args.project) / name
    folder.mkdir(exist_ok=True)
    files = {key: folder / f"model.{key}" for key in ("cfg", "weights")}
    atomic_write_text(files["cfg"], format_network(pruned.network))
    write_darknet(files["weights"], pruned)
    return {key: str(path) for key, path in files.items()}


def trained(args: argparse.Namespace, network: Mapping[str, Any], seed: int) -> Path:
    """Run directory of a distillation that is finished."""
    run_dir = Path(args.project) / f"{network['name']}-{args.epochs}-seed{seed}"
    command = ["train.py", "--cfg", network["cfg"], "--weights", network["weights"], *common(args), "--t_weights",
               args.weights, "--KDstr", "4", "--epochs", str(args.epochs), "--seed", str(seed), *TRAIN,
               *shlex.split(args.train), "--project", args.project, "--name", run_dir.name]  # fmt: skip
    train(run_dir, command)
    return run_dir


def text(document: Mapping[str, Any]) -> str:
    """The networks in one table, and how they were measured."""
    after = [Column("trained: AP50"), Column("±"), Column("AP50-95"), Column("±")] if document["epochs"] else []
    columns = ("criterion", Column("MACs ≤", ".2f"), Column("AP50"), Column("AP50-95"), "parameters", Column("GMACs"),
               Column("s", ".0f"), *after)  # fmt: skip
    before = document["before"]
    rows = [("before", None, before["map50"], before["map50_95"], before["parameters"], before["macs"] / 1e9, None,
             *(None for _ in after))]  # fmt: skip
    for n in document["networks"]:
        spreads = [figure for key in ("map50", "map50_95") if after for figure in spread(n["trained"], key)]
        rows.append((n["criterion"], n["share"], n["map50"], n["map50_95"], n["parameters"], n["macs"] / 1e9,
                     n["seconds"], *spreads))  # fmt: skip
    seeds = ", ".join(map(str, document["seeds"]))
    how = f"; trained for {document['epochs']} epochs, ± is the standard deviation over seeds {seeds}" if after else ""
    return (f"{markdown_table(columns, rows)}\n\n{document['images']} pictures{how}. {document['machine']}, "
            f"{document['threads']} threads, PyTorch {document['torch']}, commit "
            f"{(document['commit'] or 'unknown')[:9]}.")  # fmt: skip


def finish(name: str, row: Criteria) -> Finished:
    """Cut by all criteria, and train the networks if the row says so.

    Raises:
        InputError: the row of the network before is missing.
    """
    weights, data = weights_of(row.source), row.data.format(shared=shared())
    command = ["-m", "benchmarks.criteria", "--weights", str(weights), "--data", data, "--img_size", str(row.size),
               "--macs", *map(str, row.shares), "--project", str(RUNS / name.partition("-tuned")[0])]  # fmt: skip
    if row.trained:
        command += ["--epochs", str(row.epochs), "--seeds", "0", "1", "2", f"--train={row.flags}"]
    told = shlex.join(["python", *command]).replace(shared(), "../shared")
    document = json.loads(python(*command, "--json"))
    return Finished({"command": told, **document, "data": row.data.format(shared="../shared")})


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """Lines of docs/results.md for a row."""
    return [f"## {name}", "", f"{ROWS[name].what}.", "", f"    {document['command']}", "", text(document), ""]


if __name__ == "__main__":
    run(main)
