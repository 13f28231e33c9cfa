"""Which pictures make a batch, in which order and at which size; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
"""Height and width."""


class Request(NamedTuple):
    """One sample asked of a data set; all that it depends on beside the data set itself."""

    epoch: int
    position: int
    size: Size


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """0..count - 1 in an order that follows from the seed and the epoch."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(count).tolist()


def cut_batches(positions: list[int], batch_size: int, *, least: int = 1) -> list[list[int]]:
    """Consecutive positions as batches; nothing is dropped.

    A last batch of fewer than `least` pictures joins the batch before it: batch normalisation has no statistics of a
    single value per channel, and one picture would weigh as much as a batch.
    """
    batches = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < least:
        few = batches.pop()
        batches[-1] += few
    return batches


def rectangle(shapes: NDArray[np.int64], side: int, stride: int) -> Size:
    """The smallest multiples of `stride` that hold pictures whose longer side is scaled to `side`.

    Args:
        shapes: [n, 2], height and width of the pictures.
        side: their longer side in the input, before it is rounded up.
        stride: of the network.
    """
    fitted = shapes * (side / shapes.max(1, keepdims=True))
    height, width = (np.ceil(np.round(fitted.max(0) / stride, 6)) * stride).astype(int).tolist()
    return height, width


class BatchPlan:
    """The batches of every epoch. What shuffles is a function of (seed, epoch) and not of the number of workers.

    Args:
        shapes: [N, 2], height and width of the pictures.
        batch_size: pictures a batch; the last one may have fewer.
        size: height and width of a batch.
        stride: sort by aspect ratio and give each batch the smallest shape that holds its pictures, in multiples of
            `stride`; None gives all batches the same size.
        shuffle: another order in every epoch. Sorted pictures stay together, and the batches are shuffled.
        seed: of the shuffling.
        least: a last batch of fewer pictures joins the one before it.
    """

    def __init__(
        self,
        shapes: NDArray[np.int64],
        batch_size: int,
        size: Size,
        *,
        stride: int | None,
        shuffle: bool,
        seed: int,
        least: int = 1,
    ) -> None:
        self.shapes, self.batch_size, self.size = shapes, batch_size, size
        self.stride, self.shuffle, self.seed, self.least = stride, shuffle, seed, least

    def batches(self, epoch: int) -> Iterator[list[Request]]:
        """The batches of one epoch."""
        for positions in self._ordered(epoch):
            size = self.size
            if self.stride is not None:
                size = rectangle(self.shapes[positions], max(self.size), self.stride)
            yield [Request(epoch, position, size) for position in positions]

    def __len__(self) -> int:
        return len(cut_batches(list(range(len(self.shapes))), self.batch_size, least=self.least))

    def _ordered(self, epoch: int) -> list[list[int]]:
        order = list(range(len(self.shapes)))
        if self.stride is not None:
            order = np.argsort(self.shapes[:, 0] / self.shapes[:, 1], kind="stable").tolist()
        elif self.shuffle:
            order = shuffled(len(order), self.seed, epoch)
        batches = cut_batches(order, self.batch_size, least=self.least)
        if self.stride is not None and self.shuffle:
            batches = [batches[number] for number in shuffled(len(batches), self.seed, epoch)]
        return batches
