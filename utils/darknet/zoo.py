"""Write the networks of cfg/ anew from their recipes (utils/darknet/recipes.py).

An edited recipe reaches its file in this way; files of other names in the folder are left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from utils.cli import Parser, log, run
from utils.darknet import recipes
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.files import atomic_write_text

FOLDER = Path(__file__).resolve().parents[2] / "cfg"
EXAMPLE = "python -m utils.darknet.zoo --output runs/cfg"


class Entry(NamedTuple):
    """One file of cfg/."""

    build: Callable[[], Network]
    comment: str
    """What the reader of the file should know first."""


ZOO: dict[str, Entry] = {
    "yolov3": Entry(
        partial(recipes.yolov3, 416),
        "YOLOv3 (Redmon & Farhadi 2018, arXiv:1804.02767): Darknet-53 with heads at strides 32, 16 and 8.",
    ),
    "yolov3-spp": Entry(
        partial(recipes.yolov3, 608, (5, 9, 13)),
        "YOLOv3 with spatial pyramid pooling before its first head.",
    ),
    "yolov3-tiny": Entry(
        recipes.yolov3_tiny,
        "YOLOv3-tiny: seven convolutions with max pools between them, heads at strides 32 and 16.\n"
        "mask of the second head: 0,1,2, as Darknet's own file has it, so that every anchor belongs to one head. "
        "The public yolov3-tiny.weights were trained with 1,2,3 there: to run those, change that one line. They load "
        "either way, but with 0,1,2 that head's boxes come out too small.",
    ),
    "yolov4": Entry(
        recipes.yolov4,
        "YOLOv4 (Bochkovskiy et al. 2020, arXiv:2004.10934): CSPDarknet-53 with mish, SPP, path aggregation, heads at "
        "strides 8, 16 and 32, in this order.",
    ),
    "yolov4-leaky": Entry(
        partial(recipes.yolov4, "leaky"),
        "YOLOv4 with leaky ReLU where the original has mish: for hardware and compilers without mish.",
    ),
    "yolov4-leaky-spp557": Entry(
        partial(recipes.yolov4, "leaky", (5, 5, 7)),
        "YOLOv4 with leaky ReLU and max pools of 5, 5 and 7 in the SPP: for accelerators that know neither mish nor "
        "pools over more than 8 cells (Xilinx DPU, Vitis AI 1.3). Weights of yolov4-leaky.cfg load; fine-tune them.",
    ),
    "yolov4-tiny": Entry(
        recipes.yolov4_tiny,
        "YOLOv4-tiny: cross-stage partial stages that split by a route over half of the channels, heads at strides 32 "
        "and 16.",
    ),
    "yolov4-csp": Entry(
        recipes.yolov4_csp,
        "YOLOv4-CSP (Wang et al. 2020, Scaled-YOLOv4, arXiv:2011.08036): SPP and path aggregation are cross-stage "
        "partial, too; the heads end in a logistic convolution and are decoded with new_coords.",
    ),
    "mobilenetv2-yolov3": Entry(
        recipes.mobilenetv2_yolov3,
        "MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) of width 1.0 with YOLOv3's three heads, made light by "
        "depthwise 3x3 convolutions (groups = channels).\n"
        "relu where the paper has relu6: OpenCV's reader refuses relu6.",
    ),
    "yolo-fastest": Entry(
        recipes.yolo_fastest,
        "A network in the style of Yolo-Fastest 1.1: inverted residuals of 4 to 48 channels, depthwise 5x5 heads at "
        "strides 32 and 16. The public yolo-fastest-1.1.weights load.",
    ),
    "demo": Entry(
        recipes.demo,
        "The small network of `make demo`: residual units and two heads, at strides 16 and 8, for 12 classes.",
    ),
}


def text(name: str) -> str:
    """Content of cfg/`name`.cfg."""
    entry = ZOO[name]
    lines = [line for paragraph in entry.comment.split("\n") for line in wrap(paragraph, 117)]
    lines.append(f'Written by `python -m utils.darknet.zoo` from the recipe "{name}".')
    return "".join(f"# {line}\n" for line in lines) + "\n" + format_network(entry.build())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags of this script."""
    parser = Parser(__doc__, EXAMPLE, "python -m utils.darknet.zoo")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="folder of the files (default: cfg)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write every file of the zoo."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ZOO:
        path = args.output / f"{name}.cfg"
        atomic_write_text(path, text(name))
        log(f"{path}")


if __name__ == "__main__":
    run(main)
