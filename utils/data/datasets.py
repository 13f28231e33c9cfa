"""Samples and batches for the network: uint8 pictures and normalised targets, the same whatever number of workers.

What a sample is made of depends on the seed, the epoch, its position and its size only. All of these travel with each
request to the worker, so workers that live for the whole training see the epoch change.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data import augment as variation
from utils.data.augment import Augmentation
from utils.data.images import Channels, Fit, FitMode, Image, Size, inner_size, paste, place
from utils.data.index import Boxes, Index
from utils.data.store import CacheKind, PictureStore
from utils.errors import SuiteError


class Request(NamedTuple):
    """Everything that a sample depends on beside the data set itself."""

    epoch: int
    position: int
    size: Size


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


class Sample(NamedTuple):
    """A picture as the network sees it."""

    image: NDArray[np.uint8]
    """[C, h, w], RGB or grey, contiguous."""
    targets: Boxes
    """As shares of the input."""
    ignored: Boxes
    """The same of the ignored boxes."""
    position: int
    """In the index."""
    fit: Fit | None
    """Position of the picture in the input; None if the sample was augmented."""


class Batch(NamedTuple):
    """Samples of one size, as a loader yields them."""

    images: Tensor
    """uint8 [B, C, h, w]."""
    targets: Tensor
    """float32 [N, 6]: picture in the batch, class, cx, cy, w, h as shares of the input."""
    ignored: Tensor
    """float32 [M, 6]: the same of the ignored boxes."""
    positions: Tensor
    """int64 [B]: positions in the index."""
    fits: tuple[Fit | None, ...]
    """Position of each picture in the input; None where the sample was augmented."""


class DetectionDataset(Dataset[Sample]):
    """Pictures and boxes of an index as samples for the network.

    Args:
        index: the usable pictures and their labels.
        size: height and width of the input.
        mode: how a picture is fitted to the input.
        augment: how samples vary; None gives each picture as it is.
        seed: what is random follows from it, the epoch and the position.
        channels: 3 for RGB, 1 for grey.
        rect: batches of pictures of like aspect ratio, each as small as they allow; without mosaic.
        stride: of the network; the sides of rectangular batches are its multiples.
        plain_from: epoch from which samples are varied without mosaic and mixup; None: never.
        cache: where decoded pictures are kept, see `PictureStore.keep`; samples are the same with and without it.
        cache_dir: folder of the cache on the disk; None: the user's cache folder.
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
        rect: bool = False,
        stride: int = 32,
        plain_from: int | None = None,
        cache: CacheKind | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        if rect and mode != "letterbox":
            raise ValueError("rectangular batches keep the aspect ratio: rect and stretch exclude each other")
        self.index, self.size, self.mode, self.seed, self.channels = index, size, mode, seed, channels
        self.plain_from = plain_from
        self.augment = replace(augment, mosaic=0.0) if rect and augment else augment
        self.stride = stride if rect else None
        self.epoch = 0
        square = (max(size), max(size)) if rect else size  # what the narrow batches are cut from
        self.store = PictureStore(index, channels, square, mode, exact=augment is None)
        if cache is not None:
            self.store.keep(cache, cache_dir)

    def __len__(self) -> int:
        return len(self.index)

    def set_epoch(self, epoch: int) -> None:
        """Epoch of the next pass over a loader, and of samples asked for by position."""
        self.epoch = epoch

    def __getitem__(self, request: Request | int) -> Sample:
        if not isinstance(request, Request):
            request = Request(self.epoch, int(request), self.size)
        return self._sample(request, np.empty((self.channels, *request.size), np.uint8))

    def __getitems__(self, requests: Sequence[Request]) -> Batch | SuiteError:
        """The samples of a batch. An error is returned: raised in a worker it would arrive wrapped in a traceback."""
        images = torch.empty((len(requests), self.channels, *requests[0].size), dtype=torch.uint8)
        try:
            samples = list(map(self._sample, requests, images.numpy()))
        except SuiteError as error:
            return error
        targets, ignored = _numbered([one.targets for one in samples]), _numbered([one.ignored for one in samples])
        positions = torch.tensor([sample.position for sample in samples])
        return Batch(images, targets, ignored, positions, tuple(sample.fit for sample in samples))

    def _sample(self, request: Request, planes: NDArray[np.uint8]) -> Sample:
        """A sample whose picture is drawn into `planes`, uint8 [C, h, w]."""
        if self.augment is None:
            return self._plain(request, planes)
        augment = self.augment
        if self.plain_from is not None and request.epoch >= self.plain_from:
            augment = replace(augment, mosaic=0.0, mixup=0.0)
        return self._varied(request, augment, planes)

    def _place(self, position: int, size: Size) -> Fit:
        height, width = self.index.shapes[position].tolist()
        return place((height, width), size, self.mode)

    def _plain(self, request: Request, planes: NDArray[np.uint8]) -> Sample:
        placed = self._place(request.position, request.size)
        image = paste(self.store.read(request.position), placed)
        targets = self._boxes(request.position)
        # In pixels of the input, then as shares of it.
        targets[:, 1:] *= inner_size(placed)[::-1] * 2
        targets[:, 1:3] += placed.left, placed.top
        targets[:, 1:] /= request.size[::-1] * 2
        cv2.split(image, list(planes))
        return Sample(planes, *_split_ignored(targets), request.position, placed)

    def _varied(self, request: Request, augment: Augmentation, planes: NDArray[np.uint8]) -> Sample:
        rng = variation.sample_generator(self.seed, request.epoch, request.position)
        image, boxes = self._composed(rng, augment, request.position, request.size)
        if rng.random() < augment.mixup:
            other, more = self._composed(rng, augment, int(rng.integers(len(self))), request.size)
            image, boxes = variation.blend(rng, image, other), np.concatenate([boxes, more])
        image, boxes = variation.flip(rng, augment, image, boxes)
        variation.jitter_colours(rng, augment, image, planes)
        if rng.random() < augment.fence:
            variation.hide_behind_fence(rng, planes)
        return Sample(planes, *_split_ignored(_as_shares(boxes, request.size)), request.position, None)

    def _composed(
        self, rng: Generator, augment: Augmentation, position: int, size: Size
    ) -> tuple[Image, NDArray[np.float64]]:
        """A picture, or a mosaic of it and three others, and their boxes [n, 5]: class, x1, y1, x2, y2 in pixels.

        Ignored boxes among them are marked.
        """
        positions, regions = [position], [(0, 0, size[1], size[0])]
        if rng.random() < augment.mosaic:
            positions += rng.integers(len(self), size=3).tolist()
            regions = list(variation.mosaic_regions(rng, size))
        canvas = np.empty((*size, self.channels), np.uint8)
        placements = []
        for at, region in zip(positions, regions, strict=True):
            placement = variation.random_placement(rng, augment, inner_size(self._place(at, size)), region, size)
            placements.append(variation.draw(canvas, self.store.read(at), placement))
        return canvas, variation.move_boxes([self._boxes(at) for at in positions], placements)

    def _boxes(self, position: int) -> Boxes:
        """Labels and marked ignored boxes of a picture, so that both are moved alike."""
        return np.concatenate([self.index.labels[position], _marked(self.index.ignored[position])])


def _marked(boxes: Boxes) -> Boxes:
    """Ignored boxes with -1 - c for their class c, or the class again."""
    return np.concatenate([-1 - boxes[:, :1], boxes[:, 1:]], 1)


def _split_ignored(boxes: Boxes) -> tuple[Boxes, Boxes]:
    """Labels and ignored boxes: the parts that `_boxes` puts together."""
    ignored = boxes[:, 0] < 0
    return boxes[~ignored], _marked(boxes[ignored])


def _as_shares(boxes: NDArray[np.float64], size: Size) -> Boxes:
    """Class, x1, y1, x2, y2 in pixels → class, cx, cy, w, h as shares of the input."""
    low, high, sides = boxes[:, 1:3], boxes[:, 3:], size[::-1]
    return np.concatenate([boxes[:, :1], (low + high) / 2 / sides, (high - low) / sides], 1).astype(np.float32)


def _numbered(boxes: Sequence[Boxes]) -> Tensor:
    """[n, 5] of every picture → [N, 6] with the number of the picture before them."""
    numbers = np.repeat(np.arange(len(boxes), dtype=np.float32), [len(part) for part in boxes])
    return torch.from_numpy(np.column_stack([numbers, np.concatenate(boxes)]))


class BatchPlan:
    """This process's requests of the data set's current epoch, without the first `skip` batches.

    The order is a function of (seed, epoch) and not of the number of workers. A training shares each batch, whose
    pictures are drawn anyway. An evaluation shares whole batches: what is computed of a picture depends, to rounding,
    on the batch that it is in, and must not on the number of processes.

    Args:
        dataset: with its `stride`, pictures are sorted by aspect ratio, and each batch gets the smallest shape that
            holds its pictures.
        batch_size: pictures a batch of one process; the last one may have fewer.
        shuffle: another order in every epoch. Sorted pictures stay together, and the batches are shuffled.
        rank: of this process.
        processes: that work together.
    """

    def __init__(self, dataset: DetectionDataset, batch_size: int, shuffle: bool, rank: int, processes: int) -> None:
        self.dataset, self.shuffle, self.rank, self.processes = dataset, shuffle, rank, processes
        self.batch_size = batch_size * processes if shuffle else batch_size
        self.least = processes * min(2, batch_size) if shuffle else 1
        self.skip = 0
        self.total = len(cut_batches(list(range(len(dataset))), self.batch_size, least=self.least))
        """Batches of an epoch, of all processes."""

    def __len__(self) -> int:
        return self.total if self.shuffle else len(range(self.rank, self.total, self.processes))

    def __iter__(self) -> Iterator[list[Request]]:
        batches = self._ordered()
        if not self.shuffle:
            return map(self._requests, batches[self.rank :: self.processes])
        return (self._requests(batch)[self.rank :: self.processes] for batch in batches[self.skip :])

    def _requests(self, positions: list[int]) -> list[Request]:
        dataset, size = self.dataset, self.dataset.size
        if dataset.stride is not None:
            size = rectangle(dataset.index.shapes[positions], max(size), dataset.stride)
        return [Request(dataset.epoch, position, size) for position in positions]

    def _ordered(self) -> list[list[int]]:
        shapes, rectangular = self.dataset.index.shapes, self.dataset.stride is not None
        order = list(range(len(shapes)))
        if rectangular:
            order = np.argsort(shapes[:, 0] / shapes[:, 1], kind="stable").tolist()
        elif self.shuffle:
            order = self._permutation(len(order))
        batches = cut_batches(order, self.batch_size, least=self.least)
        if rectangular and self.shuffle:
            batches = [batches[number] for number in self._permutation(len(batches))]
        return batches

    def _permutation(self, count: int) -> list[int]:
        seeds = np.random.SeedSequence([self.dataset.seed, self.dataset.epoch])
        return np.random.default_rng(seeds).permutation(count).tolist()


class Loader(DataLoader[Sample]):
    """Batches of a data set; an error in a worker is raised here as itself, with the file that it names."""

    dataset: DetectionDataset
    batch_sampler: BatchPlan

    def begin(self, epoch: int, skip: int = 0) -> None:
        """Let the next pass yield the batches of an epoch without the first `skip`."""
        self.dataset.set_epoch(epoch)
        self.batch_sampler.skip = skip

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # the stub names torch's own class
        for batch in super().__iter__():
            if isinstance(batch, SuiteError):
                try:
                    raise batch
                finally:
                    del batch  # else error and frame hold each other, and the workers are not told to stop
            yield batch

    def close(self) -> None:
        """End the workers. Those that live until the interpreter ends are killed by it, which torch reports."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # torch has no other way


def make_loader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    workers: int = 0,
    shuffle: bool = False,
    share: tuple[int, int] = (0, 1),
    device: torch.device | None = None,
) -> Loader:
    """Loader of `Batch`es; call `dataset.set_epoch` before each pass.

    Every picture comes once an epoch. When shuffled, as in training, a last batch of one picture a process is merged
    into the batch before it; a data set of one picture is a batch of one.

    Args:
        dataset: what to load; the size of its batches and their order depend on its `rect`.
        batch_size: pictures a batch.
        workers: processes that make samples; 0: the calling one. They live as long as the loader.
        shuffle: in an order that follows from the seed and the epoch.
        share: rank and number of processes that work together. When shuffled each gets `batch_size` pictures of every
            common batch, otherwise every so many-th batch of those that one process would have.
        device: where the batches go; those for a GPU are pinned.
    """
    return Loader(
        dataset,
        batch_sampler=BatchPlan(dataset, batch_size, shuffle, *share),
        num_workers=workers,
        collate_fn=_unchanged,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers and "fork" in get_all_start_methods() else None,
        worker_init_fn=_start_worker,
        pin_memory=device is not None and device.type == "cuda",
    )


def _unchanged(batch: object) -> object:
    """The batch as `__getitems__` made it."""
    return batch


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the main process's wish to save first
    if hasattr(os, "setpgid"):  # Ctrl-C and a signal to the group are for the main process, which ends the workers
        os.setpgid(0, 0)
