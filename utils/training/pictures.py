"""The pictures of a run: what is indexed, how processes load and share it, and sizes that vary."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from utils.cli import log
from utils.darknet.blocks import Network
from utils.darknet.data_file import DataConfig, Source
from utils.darknet.network import max_stride, normalised_cell, picture_channels
from utils.data.augment import Augmentation
from utils.data.datasets import DetectionDataset, Loader, make_loader, rectangle
from utils.data.images import Size
from utils.data.index import Index, index
from utils.data.store import PictureStore
from utils.errors import DataError, InputError
from utils.training.distributed import Team
from utils.training.settings import TrainPlan, TrainSettings

SIZE_PERIOD = 10
"""Batches that a multi-scale run trains at one size, as Darknet's `random=1`."""


def indices(data: DataConfig, *, single_class: bool) -> tuple[Index, Index | None]:
    """Return the training pictures, and those to evaluate on; what is wrong with either is logged.

    Raises:
        DataError: there are no training pictures.
    """
    if data.train is None:
        raise DataError(f"{data.path}: names no training pictures; add a line train = list.txt")

    def part(role: str, source: Source) -> Index:
        found = index(source, data.names)
        log(f"{role}: {found.summary()}")
        return found.single_class() if single_class else found

    train = part("train", data.train)
    if data.valid is None:
        log(f"{data.path}: names no valid pictures; nothing is evaluated, and best is the last epoch")
        return train, None
    return train, part("valid", data.valid)


def loaders(
    plan: TrainPlan, train: Index, valid: Index | None, network: Network, team: Team
) -> tuple[Loader, Loader | None]:
    """Return loaders of the training pictures, augmented, and of those to evaluate on, for this process's share.

    Args:
        plan: of the run.
        train: training pictures.
        valid: pictures to evaluate on.
        network: tells channels and stride.
        team: the processes that train together.

    Raises:
        DataError: there are fewer training pictures than processes.
    """
    settings = plan.settings
    if len(train) < team.size:
        raise DataError(f"{plan.data.path}: {len(train)} training pictures for {team.size} processes")
    channels, stride = picture_channels(network), max_stride(network)
    kind = partial(DetectionDataset, seed=settings.seed, channels=channels, rect=settings.rect, stride=stride)
    plain_from = settings.epochs - round(plan.hyp.optimizer.plain_end * settings.epochs)

    def load(pictures: Index, size: Size, augment: Augmentation | None = None) -> Loader:
        with team.one_by_one():
            cache = settings.cache if team.leads or settings.cache == "disk" else None
            dataset = kind(pictures, size=size, augment=augment, plain_from=plain_from, cache=cache)
        if settings.cache == "ram":
            share_pictures(dataset.store, team)
        return make_loader(
            dataset,
            settings.batch_size,
            workers=settings.workers,
            shuffle=augment is not None,
            share=(team.rank, team.size),
            device=team.device,
        )

    loader = load(train, settings.size, plan.hyp.augmentation)
    return loader, None if valid is None else load(valid, settings.test_size)


def share_pictures(store: PictureStore, team: Team) -> None:
    """Let all processes use the pictures that the first one keeps; where they cannot, they keep their own."""
    address = team.share(store.address)
    if not team.leads and address:
        store.join(address)
        if not store.address:
            store.keep("ram")


def check_batches(network: Network, settings: TrainSettings, shapes: NDArray[np.int64], processes: int = 1) -> None:
    """Refuse batches of one picture where a normalised map has a single cell: one value has no variance.

    Args:
        network: what is trained.
        settings: of the run.
        shapes: [N, 2], height and width of the training pictures.
        processes: that train together.

    Raises:
        InputError: names the block and the size of the input.
    """
    if settings.batch_size > 1 and len(shapes) >= 2 * processes:  # a last batch of one picture joins the one before it
        return
    for height, width in sorted(_smallest_inputs(network, settings, shapes)):
        if (number := normalised_cell(network, height, width)) is not None:
            raise InputError(
                f"{network.path}: block {number} has 1 x 1 cells at {width} x {height}, and a batch has one "
                "picture; batch normalisation needs two values: use a larger --img_size or more pictures"
            )


def _smallest_inputs(network: Network, settings: TrainSettings, shapes: NDArray[np.int64]) -> set[Size]:
    stride, longest = max_stride(network), max(settings.size)
    if settings.rect:
        return {rectangle(shape[None], longest, stride) for shape in np.unique(shapes, axis=0)}
    low = settings.sizes[0] if settings.sizes else longest
    height, width = (max(stride, round(side * low / longest / stride) * stride) for side in settings.size)
    return {(height, width)}


def rescaled(images: Tensor, settings: TrainSettings, stride: int, epoch: int, position: int) -> Tensor:
    """Return a batch at the size that a multi-scale run drew for this stretch of batches.

    The run begins with the largest size, so that it runs out of memory at once or not at all. It stays until a batch
    follows the first optimizer step, which makes the optimizer's state.

    Args:
        images: [B, C, H, W].
        settings: with the smallest and largest side in `sizes`, and the batches of a step in `accumulate`.
        stride: the sides are multiples of it.
        epoch: epochs done.
        position: of the batch in its epoch.
    """
    assert settings.sizes is not None  # it is a multi-scale run
    low, high = settings.sizes
    rng = np.random.default_rng([settings.seed, epoch, position // SIZE_PERIOD])
    side = stride * int(rng.integers(-(-low // stride), high // stride + 1))
    if epoch == 0 and position < max(SIZE_PERIOD, settings.accumulate + 1):
        side = high // stride * stride
    longest = max(images.shape[2:])
    size = [max(stride, round(old * side / longest / stride) * stride) for old in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
