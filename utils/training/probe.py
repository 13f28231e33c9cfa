"""Which memory format a network trains faster in."""

from __future__ import annotations

import copy
import time

import torch

from models import Darknet

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""By the names of `--memory-format`; the first is taken unless another one is clearly faster."""
CLEARLY = 0.9
"""Share of the first format's time that is clearly less: noise must not change the numbers that a seed gives."""
PICTURES = 8
"""Most pictures in a batch that is tried."""


def faster_format(model: Darknet, size: tuple[int, int], batch: int, device: torch.device) -> str:
    """Name of the format: one step with each is timed, after one that is not. On a GPU it is always the first.

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
    seconds = {}
    for _ in range(2):
        for name, candidate in copies.items():
            started = time.perf_counter()
            heads = candidate(images.contiguous(memory_format=FORMATS[name])).heads
            sum(head.square().mean() for head in heads).backward()
            seconds[name] = time.perf_counter() - started
    best = min(others, key=seconds.__getitem__)
    return best if seconds[best] < CLEARLY * seconds[first] else first
