"""Samples and batches for the network: uint8 pictures and normalised targets, the same whatever number of workers.

What a sample is made of depends on the seed, the epoch, its position, its size and its partners only. All of these
travel with each request to the worker, so workers that live for the whole training see the epoch change. The samples of
a batch are made together, since small operations on arrays cost the same for one picture as for all.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, islice
from multiprocessing import get_all_start_methods
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.cli import SIGNALS
from utils.data import augment as variation
from utils.data.augment import Augmentation, Tile
from utils.data.images import Channels, Fit, FitMode, Size, fitted_sizes, paste, place
from utils.data.index import Boxes, Index
from utils.data.store import CacheKind, PictureStore
from utils.errors import SuiteError

POOL = 64
"""Pictures that mosaics are made of at a time."""


class Request(NamedTuple):
    """Everything that a sample depends on beside the data set itself."""

    epoch: int
    position: int
    size: Size
    partners: Sequence[int] = ()
    """Positions that the other pictures of a mosaic and mixup are from; empty: all."""


def cut_batches(positions: list[int], batch_size: int, *, least: int = 1) -> list[list[int]]:
    """Consecutive positions as batches; nothing is dropped.

    A last batch of fewer than `least` pictures joins the batch before it. Batch normalisation has no statistics of a
    single value per channel, and one picture would weigh as much as a batch.
    """
    batches = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < least:
        few = batches.pop()
        batches[-1] += few
    return batches


def partners(order: Sequence[int], start: int, count: int) -> Sequence[int]:
    """Pictures of which the mosaics of a batch are made: POOL consecutive ones of an epoch, or the batch if larger.

    If they were from the whole data set, a picture would be decoded four times an epoch. Every POOL-th picture begins
    another pool, so consecutive batches share one.

    Args:
        order: positions of the epoch.
        start: of the batch in it.
        count: pictures in the batch.
    """
    first = max(min(start - start % POOL, len(order) - POOL), 0)
    return order[first : max(first + POOL, start + count)]


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


Drawn = tuple[Boxes, NDArray[np.int64], tuple[Fit | None, ...]]
"""Samples of a batch: boxes [n, 5] as shares of the input, the sample of each box, the fit of each sample."""


class DetectionDataset(Dataset[Batch]):
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

    def __getitems__(self, requests: Sequence[Request]) -> Batch | SuiteError:
        """A batch of one epoch and size. An error is returned: a worker would wrap what it raises in a traceback."""
        images = torch.empty((len(requests), self.channels, *requests[0].size), dtype=torch.uint8)
        self.store.drop(keep=requests[0].partners)
        draw = partial(self._varied, self.augment) if self.augment else self._plain
        try:
            boxes, samples, fits = draw(requests, images.numpy())
        except SuiteError as error:
            return error
        rows = torch.from_numpy(np.column_stack([samples.astype(np.float32), boxes]))
        marked = rows[:, 1] < 0
        targets, ignored = rows[~marked], rows[marked]
        ignored[:, 1] = -1 - ignored[:, 1]
        return Batch(images, targets, ignored, torch.tensor([request.position for request in requests]), fits)

    def _plain(self, requests: Sequence[Request], images: NDArray[np.uint8]) -> Drawn:
        """Pictures as they are, drawn into `images`, uint8 [B, C, h, w]."""
        size, positions = requests[0].size, np.array([request.position for request in requests])
        fits = [place((height, width), size, self.mode) for height, width in self.index.shapes[positions].tolist()]
        for position, planes, fit in zip(positions.tolist(), images, fits, strict=True):
            cv2.split(paste(self.store.read(position), fit), list(planes))
        boxes, owners = self._boxes(positions)
        # In pixels of the input, then as shares of it.
        boxes[:, 1:] *= np.array([fit.inner[::-1] * 2 for fit in fits])[owners]
        boxes[:, 1:3] += np.array([(fit.left, fit.top) for fit in fits])[owners]
        boxes[:, 1:] /= size[::-1] * 2
        return boxes, owners, tuple(fits)

    def _varied(self, augment: Augmentation, requests: Sequence[Request], images: NDArray[np.uint8]) -> Drawn:
        """Augmented samples, drawn into `images`, uint8 [B, C, h, w]."""
        size = requests[0].size
        if self.plain_from is not None and requests[0].epoch >= self.plain_from:
            augment = replace(augment, mosaic=0.0, mixup=0.0)
        rngs = [variation.sample_generator(self.seed, request.epoch, request.position) for request in requests]
        scenes = [self._scenes(rng, augment, request) for rng, request in zip(rngs, requests, strict=True)]
        tiles = [tile for sample in scenes for scene in sample for tile in scene]
        positions = np.array([tile.position for tile in tiles])
        fitted = fitted_sizes(self.index.shapes[positions], size, self.mode)
        placements = variation.random_placements(augment, tiles, fitted, self.store.shapes[positions], size)
        numbers, flips = iter(range(len(tiles))), []
        *canvases, scratch = np.empty((3, *size, self.channels), np.uint8)
        for rng, sample, planes in zip(rngs, scenes, images, strict=True):
            for scene, canvas in zip(sample, canvases, strict=False):
                for tile in scene:
                    variation.draw(canvas, self.store.read(tile.position), placements, next(numbers))
            image = canvases[0] if len(sample) == 1 else variation.blend(rng, *canvases)
            flips.append(variation.random_flips(rng, augment))
            variation.jitter_colours(rng, augment, image, planes, scratch)
            variation.flip_planes(planes, flips[-1])
            if rng.random() < augment.fence:
                variation.hide_behind_fence(rng, planes)
        boxes, owners = self._boxes(positions)
        moved, keep = variation.move_boxes(boxes, owners, placements)
        samples = np.repeat(np.arange(len(scenes)), [sum(map(len, sample)) for sample in scenes])[owners[keep]]
        shares = _as_shares(variation.flip_boxes(moved, np.array(flips)[samples], size), size)
        return shares, samples, (None,) * len(requests)

    def _scenes(self, rng: Generator, augment: Augmentation, request: Request) -> list[list[Tile]]:
        """A picture or a mosaic, and what is blended with it, if anything."""
        partners = request.partners or range(len(self))
        scenes = [variation.random_tiles(rng, augment, request.position, partners, request.size)]
        if rng.random() < augment.mixup:
            other = partners[int(rng.integers(len(partners)))]
            scenes.append(variation.random_tiles(rng, augment, other, partners, request.size))
        return scenes

    def _boxes(self, positions: NDArray[np.int64]) -> tuple[Boxes, NDArray[np.int64]]:
        """Labels and ignored boxes of pictures, and the picture of each; ignored ones have -1 - c for their class c."""
        labels, owners = self.index.labels.gather(positions)
        ignored, others = self.index.ignored.gather(positions)
        ignored[:, 0] = -1 - ignored[:, 0]
        return np.concatenate([labels, ignored]), np.concatenate([owners, others])


def _as_shares(boxes: NDArray[np.float64], size: Size) -> Boxes:
    """Class, x1, y1, x2, y2 in pixels → class, cx, cy, w, h as shares of the input."""
    low, high, sides = boxes[:, 1:3], boxes[:, 3:], size[::-1]
    return np.concatenate([boxes[:, :1], (low + high) / 2 / sides, (high - low) / sides], 1).astype(np.float32)


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
        order = list(chain.from_iterable(batches))
        numbered = islice(zip(accumulate(map(len, batches), initial=0), batches, strict=False), self.skip, None)
        requests = (self._requests(batch, partners(order, start, len(batch))) for start, batch in numbered)
        return (part[self.rank :: self.processes] for part in requests)

    def _requests(self, positions: list[int], pool: Sequence[int] = ()) -> list[Request]:
        dataset, size = self.dataset, self.dataset.size
        if dataset.stride is not None:
            size = rectangle(dataset.index.shapes[positions], max(size), dataset.stride)
        return [Request(dataset.epoch, position, size, pool) for position in positions]

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


class Loader(DataLoader[Batch]):
    """Batches of a data set; an error in a worker is raised here as itself, with the file that it names."""

    dataset: DetectionDataset
    batch_sampler: BatchPlan

    def begin(self, epoch: int, skip: int = 0) -> None:
        """Let the next pass yield the batches of an epoch without the first `skip`."""
        self.dataset.epoch = epoch
        self.batch_sampler.skip = skip

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # the stub names torch's own class
        with _stops_wait():
            batches = super().__iter__()
        for batch in batches:
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
    """Loader of `Batch`es; set `dataset.epoch` before each pass.

    Every picture comes once an epoch. When shuffled, as in training, a last batch of one picture a process is merged
    into the batch before it; a data set of one picture is a batch of one.

    Args:
        dataset: what to load; the size of its batches and their order depend on its `rect`.
        batch_size: pictures a batch.
        workers: processes that make samples; 0: the calling one. They live as long as the loader.
        shuffle: in an order that follows from the seed and the epoch.
        share: rank and number of processes that work together. When shuffled, each gets `batch_size` pictures of every
            common batch. Otherwise rank r of n gets the batches r, r + n, r + 2 n … of those that one process would
            have.
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


@contextmanager
def _stops_wait() -> Iterator[None]:
    """Inside, signals that stop a script wait: processes that start here are not in a group of their own yet."""
    if hasattr(signal, "pthread_sigmask"):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    else:
        yield


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism
    if hasattr(os, "setpgid"):  # Ctrl-C and a signal to the group are for the main process, which ends the workers
        os.setpgid(0, 0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # also those that came before and wait
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the main process's wish to save first
    sys.excepthook = _report  # the thread that hands over the memory of batches calls it


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error, but not that of a main process that was killed while it took a batch."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
