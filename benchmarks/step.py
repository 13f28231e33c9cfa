"""A whole training step against the bare convolutions.

The whole step is that of train.py: normalising, forward, loss, backward, clipping, optimizer and averaged weights;
"model + loss" is its forward and backward pass with the loss, as training speeds are often given. The bare stack is the
same convolutions, batch normalisations, activations, routes and pools, called one by one from PyTorch, forward and
backward from the sum of the heads, in the same memory format. All in turn, in one process; the least time of each
counts, since other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Darknet
from utils.cli import Parser, image_side, positive_int, run
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import BN_EPSILON, Convolutional, Maxpool, Route, Upsample, Yolo
from utils.data.datasets import Batch
from utils.report.run_dir import RunDirectory
from utils.report.tables import Column, markdown_table
from utils.training.loop import Trainer
from utils.training.settings import Hyperparameters, TrainSettings
from utils.training.state import Source
from utils.training.team import Team

EXAMPLE = "python -m benchmarks.step --img_size 224 --batch-size 16"
CFGS = ("cfg/yolov4-tiny.cfg", "cfg/yolov3-tiny.cfg")
OBJECTS = 3
"""Boxes in a picture."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.step")
    add = parser.add_argument_group("what is measured").add_argument
    add("--cfg", nargs="+", default=CFGS, metavar="FILE", help=f"networks (default: {' '.join(CFGS)})")
    add("--img_size", type=image_side, default=224, metavar="N", help="side of the input (default: %(default)s)")
    add("--batch-size", type=positive_int, default=16, metavar="N", help="pictures (default: %(default)s)")
    add("--rounds", type=positive_int, default=20, metavar="N", help="steps of each kind (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row a network."""
    args = parse_args(argv)
    milliseconds = (Column(title, ".1f") for title in ("stack ms", "model + loss ms", "step ms"))
    columns = ("cfg", *milliseconds, Column("model + loss / stack"), Column("step / stack"))
    rows = [(Path(path).name, *measure(path, args)) for path in args.cfg]
    print(markdown_table(columns, rows))
    print(f"least of {args.rounds} rounds, {args.img_size} x {args.img_size}, batch {args.batch_size}, "
          f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")  # fmt: skip


def measure(path: str, args: argparse.Namespace) -> list[float]:
    """Least milliseconds of stack, model and loss, and step; the ratios of the last two to the first."""
    training = Training(path, args.img_size, args.batch_size)
    kinds = {"stack": training.stack, "model": training.model_and_loss, "step": training.step}
    least = [min(times) for times in training.laps(kinds, args.rounds).values()]
    return [*least, *(value / least[0] for value in least[1:])]


class Training:
    """A model, random pictures with boxes, and a trainer.

    Args:
        path: cfg.
        side: of a picture, in pixels.
        count: pictures in a batch.
    """

    def __init__(self, path: str, side: int, count: int) -> None:
        torch.manual_seed(0)
        network = cfg_file.load(path)
        self.net = Darknet(network).train().to(memory_format=torch.channels_last)
        self.targets = torch.rand(count * OBJECTS, 6)
        self.targets[:, 0] = torch.arange(count).repeat_interleave(OBJECTS)
        self.targets[:, 1] = (self.targets[:, 1] * network.classes).floor()
        self.targets[:, 4:] = 0.05 + 0.4 * self.targets[:, 4:]
        pictures = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        self.batch = Batch(pictures, self.targets, self.targets[:0], torch.arange(count), ())
        self.images = (pictures.float() / 255).contiguous(memory_format=torch.channels_last)
        settings = TrainSettings(epochs=100, size=(side, side), test_size=(side, side))
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = Trainer(self.net, _Hundred(), None, Hyperparameters(), settings, RunDirectory(Path(folder)),
                                   Source((), (), {}, {}, {}), Team(torch.device("cpu")))  # fmt: skip

    def stack(self) -> None:
        """Forward and backward of the bare stack with the model's parameters."""
        drop_gradients(self.net, sum(head.sum() for head in stack(self.net, self.images)))

    def model_and_loss(self) -> None:
        """Forward and backward of the model with its loss."""
        drop_gradients(self.net, self.trainer.objective(self.images, self.targets)["total"])

    def step(self) -> None:
        """What train.py does with a batch."""
        self.trainer._batch(self.batch, 0)

    def laps(self, kinds: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
        """Milliseconds of everything in turn; the first of each is not counted."""
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds + 1):
            for kind, call in kinds.items():
                elapsed = timed(call)
                if number:
                    found[kind].append(1e3 * elapsed)
        return found


class _Hundred:
    """Stands for a loader of a hundred batches."""

    def __len__(self) -> int:
        return 100


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def drop_gradients(model: Darknet, loss: Tensor) -> None:
    """Backward pass of a loss whose gradients nobody wants."""
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def stack(model: Darknet, x: Tensor) -> list[Tensor]:
    """Heads of a network made of convolutions, routes, pools and upsampling only."""
    outputs: list[Tensor] = []
    heads = []
    for block, layer in zip(model.network.blocks, model.layers, strict=True):
        if isinstance(block, Convolutional):
            conv = layer.conv
            x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            if block.batch_normalize:
                bn = layer.bn
                x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, 0.03, BN_EPSILON)
            x = F.leaky_relu(x, 0.1, inplace=True) if block.activation == "leaky" else x
        elif isinstance(block, Route):
            parts = [outputs[source] for source in block.layers]
            x = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).chunk(block.groups, 1)[block.group_id]
        elif isinstance(block, Maxpool):
            before, after = block.padding // 2, block.padding - block.padding // 2
            x = F.pad(x, (before, after, before, after), value=-torch.inf) if after else x
            x = F.max_pool2d(x, block.size, (block.stride_y, block.stride_x))
        elif isinstance(block, Upsample):
            x = F.interpolate(x, scale_factor=block.stride)
        elif isinstance(block, Yolo):
            heads.append(x)
        outputs.append(x)
    return heads


if __name__ == "__main__":
    run(main)
