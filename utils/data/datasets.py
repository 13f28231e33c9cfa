"""Samples and batches for the network: uint8 pictures and normalised targets, the same whatever number of workers.

What a sample is made of depends on the seed, the epoch and its position in the data set only. The epoch and the size
travel with each request from the sampler to the worker, so workers that live for the whole training see them change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.data.augment import (
    Augmentation,
    Placement,
    blend,
    draw,
    flip,
    hide_behind_fence,
    jitter_colours,
    mosaic_regions,
    move_boxes,
    random_placement,
    sample_generator,
)
from utils.data.fit import Fit, FitMode, fit, place
from utils.data.images import Channels, read_image
from utils.data.index import Index

Size = tuple[int, int]
"""Height and width."""


class Request(NamedTuple):
    """One sample asked of a data set."""

    epoch: int
    position: int
    size: Size


class Sample(NamedTuple):
    """One picture as the network sees it."""

    image: NDArray[np.uint8]
    """[C, h, w], RGB or grey."""
    targets: NDArray[np.float32]
    """[n, 5]: class, cx, cy, w, h as shares of the input."""
    position: int
    """Position in the index."""
    fit: Fit | None
    """How the picture lies in the input; None if it was augmented."""


class Batch(NamedTuple):
    """What a loader yields."""

    images: Tensor
    """uint8 [B, C, h, w]."""
    targets: Tensor
    """float32 [N, 6]: picture in the batch, class, cx, cy, w, h as shares of the input."""
    positions: Tensor
    """int64 [B], positions in the index."""
    fits: tuple[Fit | None, ...]


class DetectionDataset(Dataset):
    """Pictures and boxes of an index as samples for the network.

    Args:
        index: the usable pictures and their labels.
        size: height and width of the input; a `Request` may ask for another one.
        mode: how a picture is fitted to the input.
        augment: how samples vary; None gives each picture as it is.
        seed: with epoch and position it determines a sample.
        channels: 3 for RGB, 1 for grey.
        cache: "ram" keeps the decoded pictures, shrunk to the longer side of `size`; filled here, before workers start.
    """

    def __init__(
        self,
        index: Index,
        *,
        size: Size,
        mode: FitMode = "letterbox",
        augment: Augmentation | None = None,
        seed: int = 0,
        channels: Channels = 3,
        cache: Literal["ram"] | None = None,
    ) -> None:
        self.index, self.size, self.mode, self.augment = index, size, mode, augment
        self.seed, self.channels = seed, channels
        self.epoch = 0
        self._cache: list[NDArray[np.uint8]] | None = None
        if cache == "ram":
            self._cache = [self._shrunk(position) for position in range(len(index))]

    def __len__(self) -> int:
        return len(self.index)

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the samples that are asked for by position alone."""
        self.epoch = epoch

    def __getitem__(self, request: Request | int) -> Sample:
        if not isinstance(request, Request):
            request = Request(self.epoch, int(request), self.size)
        if self.augment is None:
            return self._plain(request)
        return self._varied(request, self.augment)

    def _plain(self, request: Request) -> Sample:
        image, placed = fit(self._read(request.position), request.size, self.mode)
        placed = place(tuple(self.index.shapes[request.position].tolist()), request.size, self.mode)
        height, width = request.size
        targets = self.index.labels[request.position].copy()
        inner = np.array(placed.original[::-1]) * (placed.scale_x, placed.scale_y)
        targets[:, 1:] *= np.tile(inner, 2)
        targets[:, 1:3] += placed.left, placed.top
        targets[:, 1:] /= (width, height, width, height)
        return Sample(_planes(image), targets, request.position, placed)

    def _varied(self, request: Request, augment: Augmentation) -> Sample:
        rng = sample_generator(self.seed, request.epoch, request.position)
        image, boxes = self._composed(rng, augment, request.position, request.size)
        if rng.random() < augment.mixup:
            other, more = self._composed(rng, augment, int(rng.integers(len(self))), request.size)
            image, boxes = blend(rng, image, other), np.concatenate([boxes, more])
        image = jitter_colours(rng, augment, image)
        image, boxes = flip(rng, augment, image, boxes)
        if rng.random() < augment.fence:
            image = hide_behind_fence(rng, image)
        return Sample(_planes(image), _normalised(boxes, request.size), request.position, None)

    def _composed(
        self, rng: np.random.Generator, augment: Augmentation, position: int, size: Size
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """One picture, or a mosaic of it and three others; boxes [n, 5]: class, x1, y1, x2, y2 in pixels."""
        positions, regions = [position], ((0, 0, size[1], size[0]),)
        if rng.random() < augment.mosaic:
            positions += rng.integers(len(self), size=3).tolist()
            regions = mosaic_regions(rng, size)
        canvas = np.empty((*size, self.channels), np.uint8)
        placements: list[Placement] = []
        for at, region in zip(positions, regions, strict=True):
            shape = tuple(self.index.shapes[at].tolist())
            placed = place(shape, size, self.mode)
            scale = placed.scale_x, placed.scale_y
            placements.append(random_placement(rng, augment, scale, shape, region, size))
            draw(canvas, self._read(at), placements[-1], shape)
        return canvas, move_boxes([self._pixel_boxes(at) for at in positions], placements)

    def _pixel_boxes(self, position: int) -> NDArray[np.float64]:
        """[n, 5]: class, x1, y1, x2, y2 in pixels of the picture, clipped to it."""
        height, width = self.index.shapes[position]
        rows = self.index.labels[position].astype(np.float64)
        low = np.clip(rows[:, 1:3] - rows[:, 3:] / 2, 0, 1) * (width, height)
        high = np.clip(rows[:, 1:3] + rows[:, 3:] / 2, 0, 1) * (width, height)
        return np.concatenate([rows[:, :1], low, high], 1)

    def _read(self, position: int) -> NDArray[np.uint8]:
        if self._cache is not None:
            return self._cache[position]
        return read_image(self.index.images[position], self.channels)

    def _shrunk(self, position: int) -> NDArray[np.uint8]:
        image = read_image(self.index.images[position], self.channels)
        height, width = image.shape[:2]
        scale = max(self.size) / max(height, width)
        if scale >= 1:
            return image
        small = cv2.resize(image, (max(round(width * scale), 1), max(round(height * scale), 1)))
        return small.reshape(*small.shape[:2], self.channels)


def _planes(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, C] → contiguous [C, H, W]."""
    planes = np.empty((image.shape[2], *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))
    return planes


def _normalised(boxes: NDArray[np.floating], size: Size) -> NDArray[np.float32]:
    """Class, x1, y1, x2, y2 in pixels → class, cx, cy, w, h as shares of the input."""
    low, high = boxes[:, 1:3], boxes[:, 3:]
    sides = (size[1], size[0])
    return np.concatenate([boxes[:, :1], (low + high) / 2 / sides, (high - low) / sides], 1).astype(np.float32)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size to a batch."""
    numbers = np.repeat(np.arange(len(samples), dtype=np.float32), [len(sample.targets) for sample in samples])
    targets = np.column_stack([numbers, np.concatenate([sample.targets for sample in samples])])
    return Batch(
        torch.from_numpy(np.stack([sample.image for sample in samples])),
        torch.from_numpy(targets.astype(np.float32)),
        torch.tensor([sample.position for sample in samples]),
        tuple(sample.fit for sample in samples),
    )


class BatchSampler(Sampler[list[Request]]):
    """Batches of requests; their order follows from the seed and the epoch.

    When shuffled (training), a last batch of one picture is merged into the batch before it, because batch
    normalisation has no statistics of one value; no picture is dropped.
    """

    def __init__(self, dataset: DetectionDataset, batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed

    def _starts(self) -> list[int]:
        count = len(self.dataset)
        starts = list(range(0, count, self.batch_size))
        if self.shuffle and len(starts) > 1 and count - starts[-1] == 1:
            starts.pop()
        return starts

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[Request]]:
        epoch, count = self.dataset.epoch, len(self.dataset)
        order = np.arange(count)
        if self.shuffle:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(count)
        starts = self._starts()
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            yield [Request(epoch, position, self.dataset.size) for position in order[start:stop].tolist()]


def make_loader(
    dataset: DetectionDataset, batch_size: int, *, workers: int = 0, shuffle: bool = False, seed: int = 0
) -> DataLoader:
    """Loader of `Batch`es. Call `dataset.set_epoch` before iterating over it."""
    return DataLoader(
        dataset,
        batch_sampler=BatchSampler(dataset, batch_size, shuffle=shuffle, seed=seed),
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
