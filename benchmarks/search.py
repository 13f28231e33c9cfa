"""The search of slim_prune.py beside its ranking: one network, one budget of multiply-adds, no fine-tuning.

The ranking removes the weakest |γ| of all layers. The search (--search) draws networks whose layers lose random shares,
and takes the one with the highest AP50 on the valid pictures. Both are cut in two ways: constants of what goes are
absorbed, or batch statistics are taken anew from training pictures (--recalibrate), in which case the candidates of the
search are scored with them, too; slim_prune.py searches in the second way only.

A network is flattered by the pictures that it was chosen by, the more the more there were to choose from. So the search
also chooses by a random half of the pictures and is compared with the ranking on the others, again and again. Intervals
are those of benchmarks/compare.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.compare import Measured, describe, measure, signed, text
from models import load_arrays
from utils.checkpoint import load_model
from utils.cli import Parser, image_side, input_size, positive_int, random_seed, run
from utils.darknet.data_file import load_data
from utils.darknet.shapes import max_stride
from utils.data.index import Index, index
from utils.detection.bootstrap import Matches, average_precision, bootstrap
from utils.device import select_device
from utils.flags import add_device_flags
from utils.graph import channel_graph
from utils.model_files import choose_model
from utils.pruning.command import SEARCH_BATCHES, share
from utils.pruning.plan import arrays_of, gammas_of, make_plan
from utils.pruning.policy import ChannelPolicy, Importance
from utils.pruning.removal import Removal
from utils.pruning.request import Amount, PruneRequest
from utils.pruning.search import Drawer
from utils.pruning.settlement import settle
from utils.pruning.target import Target
from utils.pruning.trials import Trials
from utils.report.tables import Column, markdown_table

EXAMPLE = "python -m benchmarks.search --weights runs/train/exp/weights/best.pt --data data/voc.data --search 50"
SLIM = ChannelPolicy(0.0, layer_keep=0.01)
"""That of slim_prune.py."""


class Way(NamedTuple):
    """What the ranking and the search lead to, cut in one way."""

    name: str
    ranking: Measured
    candidates: tuple[Measured, ...]

    @property
    def search(self) -> Measured:
        """The candidate that would be written."""
        return max(self.candidates, key=lambda one: one.metrics.map50)._replace(name=f"search, {self.name}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.search")
    group = parser.add_argument_group("what is pruned")
    add = group.add_argument
    add("--weights", required=True, metavar="FILE", help="sparsity-trained .pt, or Darknet .weights")
    add("--cfg", metavar="FILE", help="network (default: the one in --weights)")
    add("--data", required=True, metavar="FILE", help="data set with train and valid pictures: .data or data.yaml")
    add("--img_size", type=image_side, nargs="+", metavar="N", help="network input (default: the cfg's)")
    left = "share of the multiply-adds that is left, 0 < S < 1 (default: %(default)s)"
    add("--target-macs", type=share, default=0.5, metavar="S", help=left)
    add("--search", type=positive_int, default=50, metavar="N", help="candidates (default: %(default)s)")
    anew = "batches of training pictures for new statistics (default: %(default)s)"
    add("--recalibrate", type=positive_int, default=SEARCH_BATCHES, metavar="N", help=anew)
    add("--batch-size", type=positive_int, default=16, metavar="N", help="pictures at a time (default: %(default)s)")
    add_device_flags(group, half=False)
    add = parser.add_argument_group("intervals").add_argument
    add("--draws", type=positive_int, default=1000, metavar="N", help="data sets drawn (default: %(default)s)")
    add("--halves", type=positive_int, default=200, metavar="N", help="times the pictures are halved (default: 200)")
    seed = "of the candidates, the draws and the halves; slim_prune.py has 0 (default: %(default)s)"
    add("--seed", type=random_seed, default=0, metavar="N", help=seed)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prune in all ways, measure all, print two tables."""
    args = parse_args(argv)
    data = load_data(args.data)
    files = choose_model(args.cfg, args.weights, classes=data.classes)
    asked = PruneRequest(
        "slim",
        files,
        SLIM,
        (Amount(None, None),),
        data,
        vars(args),
        target=Target("macs", args.target_macs),
        search=args.search,
        batch_size=args.batch_size,
    )
    model = load_model(files).model
    network, arrays = model.network, arrays_of(model)
    asked.check_classes(network)
    size = input_size(args.img_size, max_stride(network), (network.net.height, network.net.width))
    graph, gammas, pictures = channel_graph(network), gammas_of(network, arrays), index(data.valid, data.names)
    device = select_device(args.device)
    requests = {
        "constants absorbed": asked,
        "statistics anew": replace(asked, absorb=False, recalibrate=args.recalibrate),
    }
    trials = {name: Trials(request, graph, arrays, size, device) for name, request in requests.items()}
    ways = [contest(name, trial, gammas, args.seed, pictures) for name, trial in trials.items()]
    everything = Removal(np.ones(graph.count, np.bool_))
    before = measured("before pruning", trials["constants absorbed"], everything, pictures)
    networks = [network for way in ways for network in (way.ranking, way.search)] + [before]
    spreads = bootstrap([network.matches for network in networks], args.draws, args.seed)
    print(text(describe(args, len(pictures), networks, spreads)))
    print(f"\n{args.weights}: slim, {args.target_macs:g} of the multiply-adds, {len(ways[0].candidates)} candidates, "
          f"statistics of {len(trials['statistics anew'].batches)} batches of {args.batch_size}\n")  # fmt: skip
    print(gains(ways, args))


def contest(name: str, trials: Trials, gammas: Importance, seed: int, pictures: Index) -> Way:
    """Cut by the ranking, and by all candidates of the search; measure all."""
    asked, graph = trials.asked, trials.graph
    ranked = settle(replace(trials, asked=replace(asked, search=0)), gammas).asked
    plan = make_plan(graph, gammas, ranked.channels, ranked.amounts[0])
    drawn = Drawer(graph, gammas, asked.channels, trials.size).draw(asked.search, asked.target, seed)
    return Way(
        name,
        measured(f"ranking, {name}", trials, plan.removal, pictures),
        tuple(
            measured(f"candidate {number}, {name}", trials, Removal(one.keep), pictures)
            for number, one in enumerate(drawn, 1)
        ),
    )


def measured(name: str, trials: Trials, removal: Removal, pictures: Index) -> Measured:
    """The network that would be written, on the valid pictures."""
    network, arrays = trials.cut(removal)
    model = load_arrays(network, {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()})
    return measure(name, model, trials.size, pictures=pictures, names=trials.asked.data.names, device=trials.device,
                   batch_size=trials.asked.batch_size)  # fmt: skip


def gains(ways: Sequence[Way], args: argparse.Namespace) -> str:
    """A table of what the search has over the ranking, AP50: where it chose, and where it did not."""
    columns = ("", Column("ranking"), Column("candidates, median"), Column("the best"), "best less ranking",
               "chosen by other pictures, less ranking")  # fmt: skip
    rows = []
    for way in ways:
        pair = bootstrap([way.ranking.matches, way.search.matches], args.draws, args.seed)
        halves = held_out([one.matches for one in way.candidates], way.ranking.matches, args.halves, args.seed)
        low, high = np.quantile(halves, [0.025, 0.975])
        median = float(np.median([one.metrics.map50 for one in way.candidates]))
        rows.append((way.name, way.ranking.metrics.map50, median, way.search.metrics.map50, signed(pair[1].gain50),
                     signed((float(halves.mean()), low, high))))  # fmt: skip
    note = f"The last column: mean of {args.halves} random halves, and between what 95 % of them are."
    return f"{markdown_table(columns, rows)}\n{note}"


def held_out(candidates: Sequence[Matches], ranking: Matches, count: int, seed: int) -> NDArray[np.float64]:
    """[count], AP50 of the candidate that is best on a random half of the images, less the ranking's, on the others.

    Args:
        candidates: what each found.
        ranking: what the network of the ranking found in the same images.
        count: how often the images are halved.
        seed: of the halves.
    """
    order = np.random.default_rng(seed).random((count, ranking.images)).argsort(axis=1)
    half = (order < ranking.images // 2).astype(np.int64)
    chosen = np.stack([average_precision(one, half)[:, 0] for one in candidates]).argmax(axis=0)
    others = np.stack([average_precision(one, 1 - half)[:, 0] for one in candidates])
    return others[chosen, np.arange(count)] - average_precision(ranking, 1 - half)[:, 0]


if __name__ == "__main__":
    run(main)
