"""Which memory format a network trains faster in."""

from __future__ import annotations

import copy
import time

import torch

from models import Darknet

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""By the names of `--memory-format`; the first is taken unless another one is clearly faster."""
CLEARLY = 0.9
"""Share of the first format's CPU time that is clearly less: noise must not change the numbers that a seed gives."""
STEPS = 2
"""Steps that are timed with each format, in turn, after one that is not."""
PICTURES = 8
"""Most pictures in a batch that is tried."""


def faster_format(model: Darknet, size: tuple[int, int], batch: int, device: torch.device) -> str:
    """Name of the format. On a GPU it is always the first.

    Another one is taken only if its slowest step is clearly faster than the first's fastest, in CPU seconds, which
    other work on the machine changes little.

    Args:
        model: its copies are tried.
        size: height and width of the input.
        batch: pictures in a batch.
        device: where the training will run.
    """
    first, *others = FORMATS
    if device.type == "cuda":
        return first
    images = torch.rand(min(batch, PICTURES), model.network.net.channels, *size)
    copies = {name: copy.deepcopy(model).to(memory_format=format_).train() for name, format_ in FORMATS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in copies}
    for _ in range(1 + STEPS):
        for name, candidate in copies.items():
            started = time.process_time()
            heads = candidate(images.contiguous(memory_format=FORMATS[name])).heads
            sum(head.square().mean() for head in heads).backward()
            seconds[name].append(time.process_time() - started)
    best = min(others, key=lambda name: max(seconds[name][1:]))
    return best if max(seconds[best][1:]) < CLEARLY * min(seconds[first][1:]) else first
