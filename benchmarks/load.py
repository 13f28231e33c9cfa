"""How long a Darknet .weights file takes to become a model, in units of torch.load of the same tensors.

Both are timed in turn, A B A B, in one process with the files in the page cache. ours: read the cfg, check the file's
size, map it, look for values that are not finite, build the model on it. torch: `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from models import Darknet
from utils.checkpoint import load_model
from utils.cli import Parser, positive_int, print_json, run
from utils.darknet import cfg as cfg_file
from utils.model_files import choose_model
from utils.training.state import write_darknet


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, "python -m benchmarks.load --cfg cfg/yolov4.cfg", program="python -m benchmarks.load")
    parser.add_argument("--cfg", default="cfg/yolov4.cfg", metavar="FILE", help="network (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="pairs (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Time both and print medians and the median of the ratios pair by pair."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        weights, saved = Path(folder) / "n.weights", Path(folder) / "n.pt"
        model = Darknet(cfg_file.load(args.cfg))
        write_darknet(weights, model)
        torch.save(model.state_dict(), saved)
        ours = [0.0] * args.rounds
        theirs = [0.0] * args.rounds
        for pair in range(args.rounds):
            ours[pair] = seconds(lambda: load_model(choose_model(args.cfg, str(weights))))
            theirs[pair] = seconds(lambda: torch.load(saved, weights_only=True))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print_json({
        "cfg": args.cfg,
        "rounds": args.rounds,
        "ours_ms": 1000 * statistics.median(ours),
        "torch_load_ms": 1000 * statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_min_max": [min(ratios), max(ratios)],
    })  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
