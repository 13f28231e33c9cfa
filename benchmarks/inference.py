"""What folding and the memory format are worth in PyTorch: a network as test.py runs it, and as it was trained.

test.py and detect.py fold batch normalisations into convolutions and lay tensors out channels-last. Both ways are timed
in turn, A B A B, one picture at a time; weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from models import Darknet, fuse
from utils.cli import Parser, image_side, positive_int, run
from utils.darknet import cfg as cfg_file
from utils.report.latency import interleaved
from utils.report.run_dir import environment
from utils.report.tables import Column, markdown_table

EXAMPLE = "python -m benchmarks.inference cfg/yolov4-tiny.cfg cfg/yolov3-tiny.cfg"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.inference")
    add = parser.add_argument_group("what is measured").add_argument
    add("networks", nargs="+", metavar="CFG", help="networks")
    add("--img_size", type=image_side, metavar="N", help="side of the input (default: the cfg's width)")
    add("--threads", type=positive_int, default=2, metavar="N", help="of PyTorch (default: %(default)s)")
    add("--rounds", type=positive_int, default=50, metavar="N", help="of both (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row a network."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for path in args.networks:
        network = cfg_file.load(path)
        torch.manual_seed(0)
        model = Darknet(network).eval()
        side = args.img_size or network.net.width
        image = torch.rand(1, network.net.channels, side, side)
        fused, laid_out = (thing.to(memory_format=torch.channels_last) for thing in (fuse(model), image))
        before, after = timed(((model, image), (fused, laid_out)), args.rounds)
        rows.append((path, f"{side} × {side}", before, after, before / after))
    columns = ("network", "input", Column("contiguous, ms", ".1f"), Column("folded, channels-last, ms", ".1f"),
               Column("×", ".2f"))  # fmt: skip
    print(markdown_table(columns, rows))
    print(f"medians of at most {args.rounds} turns; {environment()['cpu']}, threads: {args.threads}, PyTorch "
          f"{torch.__version__}")  # fmt: skip


@torch.inference_mode()
def timed(pairs: Sequence[tuple[Darknet, Tensor]], rounds: int) -> list[float]:
    """Median milliseconds of each model on its picture, in turn."""
    runs = {str(number): partial(*pair) for number, pair in enumerate(pairs)}
    return [latency.median for latency in interleaved(runs, rounds=rounds, seconds=60).values()]


if __name__ == "__main__":
    run(main)
