"""What aligned widths are worth: one pruning left ragged and rounded up to multiples, timed in turn with the original.

Efficiency is the gain in time over the gain in multiply-adds: 1 where every multiply-add that goes saves its time.
Channels are ranked by γ; without --weights these are random, so that all layers are thinned alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from utils.checkpoint import load_model
from utils.cli import Parser, fraction, image_side, input_size, positive_int, run
from utils.darknet import cfg as cfg_file
from utils.darknet.network import max_stride
from utils.graph import channel_graph
from utils.model_files import ModelFiles, choose_model
from utils.pruning.policy import ChannelPolicy
from utils.pruning.surgery import arrays_of, gammas_of, prune_network
from utils.pruning.target import Amount, make_plan
from utils.pruning.workflow import Clock
from utils.report.cost import network_cost
from utils.report.run_dir import environment
from utils.report.tables import Column, markdown_table

DEFAULT = "cfg/yolov4-tiny.cfg"
EXAMPLE = "python -m benchmarks.widths --cfg cfg/yolov4-tiny.cfg --percent 0.25 0.5 --multiples 1 8"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.widths")
    add = parser.add_argument_group("what is measured").add_argument
    add("--cfg", default=None, metavar="FILE", help=f"network (default: {DEFAULT}, or the one in --weights)")
    add("--weights", metavar="FILE", help="its weights (default: random γ)")
    add("--img_size", type=image_side, nargs="+", metavar="N", help="network input (default: the cfg's)")
    shares = "shares of the channels that go (default: 0.25 0.5 0.75)"
    add("--percent", type=fraction, nargs="+", default=[0.25, 0.5, 0.75], metavar="P", help=shares)
    multiples = "what widths are rounded up to (default: 1 4 8 16)"
    add("--multiples", type=positive_int, nargs="+", default=[1, 4, 8, 16], metavar="N", help=multiples)
    add("--rounds", type=positive_int, default=30, metavar="N", help="rounds in turn (default: %(default)s)")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Prune in all these ways, time all, print a table."""
    args = parse_args(argv)
    files = (
        choose_model(args.cfg, args.weights)
        if args.weights
        else ModelFiles(cfg_file.load(args.cfg or DEFAULT), None, False)
    )
    model = load_model(files).model
    network = model.network
    size = input_size(args.img_size, max_stride(network), (network.net.height, network.net.width))
    if not args.weights:
        generator = torch.Generator().manual_seed(0)
        for name, value in model.state_dict().items():
            if name.endswith("bn.weight"):
                value.copy_(torch.rand(value.shape, generator=generator))
    arrays = arrays_of(model)
    graph, gammas, clock = channel_graph(network), gammas_of(network, arrays), Clock(torch.device("cpu"), size)
    models, macs = {"original": clock.model(network, arrays)}, {"original": network_cost(network, *size).macs}
    for percent in args.percent:
        for multiple in args.multiples:
            policy = ChannelPolicy(0.0, layer_keep=0.01, multiple_of=multiple)
            removal = make_plan(graph, gammas, policy, Amount(percent, None)).removal
            small = prune_network(graph, arrays, removal)
            name = f"{percent:g}, multiples of {multiple}" if multiple > 1 else f"{percent:g}, ragged"
            models[name], macs[name] = clock.model(*small), network_cost(small.network, *size).macs
    times = clock.latency(models, rounds=args.rounds)
    columns = ("percent and widths", Column("GMACs", ".3f"), Column("ms", ".2f"), Column("MACs ÷", ".2f"),
               Column("time ÷", ".2f"), Column("efficiency", ".2f"))  # fmt: skip
    rows = []
    for name, latency in times.items():
        less, faster = macs["original"] / macs[name], times["original"].median / latency.median
        rows.append((name, macs[name] / 1e9, latency.median, less, faster, faster / less))
    print(markdown_table(columns, rows))
    machine = environment()["cpu"]
    print(f"{network.path}, {size[0]} × {size[1]}, batch 1, medians of {times['original'].rounds} rounds in turn; "
          f"{machine}, {clock.runtime()}, PyTorch {torch.__version__}, seed 0")  # fmt: skip


if __name__ == "__main__":
    run(main)
