"""The pictures of a run: what is indexed, and how processes load and share it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.cli import log
from utils.darknet.data_file import DataConfig
from utils.data.augment import Augmentation
from utils.data.datasets import DetectionDataset, Loader, make_loader
from utils.data.index import Index, index
from utils.data.store import CacheKind, PictureStore
from utils.errors import DataError
from utils.training.settings import TrainSettings
from utils.training.team import Team


def indices(data: DataConfig, *, strict: bool, single_class: bool) -> tuple[Index, Index | None]:
    """The training pictures, and those to evaluate on; what is wrong with either is said once.

    Raises:
        DataError: there are no training pictures, or with `strict` anything is wrong.
    """
    found = []
    for role, source in (("train", data.train), ("valid", data.valid)):
        if source is None:
            if role == "train":
                raise DataError(f"{data.path}: names no training pictures; add a line train = list.txt")
            log(f"{data.path}: names no valid pictures; nothing is evaluated, and best is the last epoch")
            found.append(None)
            continue
        part = index(source, data.names, strict=strict)
        log(f"{role}: {part.report.summary()}")
        found.append(part.single_class() if single_class else part)
    return found[0], found[1]


def loaders(
    train: Index,
    valid: Index | None,
    *,
    shared: Mapping[str, Any],
    settings: TrainSettings,
    augmentation: Augmentation,
    plain_end: float,
    cache: CacheKind | None,
    batch_size: int,
    workers: int,
    team: Team,
) -> tuple[Loader, Loader | None]:
    """Loaders of the training pictures, augmented, and of those to evaluate on, for this process's share of both.

    Args:
        train: training pictures.
        valid: pictures to evaluate on.
        shared: arguments of DetectionDataset for both.
        settings: of the run.
        augmentation: of the training pictures.
        plain_end: last share of the epochs, without mosaic and mixup.
        cache: where decoded pictures are kept.
        batch_size: pictures in a batch of a process.
        workers: processes that read.
        team: the processes that train together.
    """

    def load(pictures: Index, shuffle: bool, **options: Any) -> Loader:
        with team.one_by_one():
            kept = cache if team.leads or cache == "disk" else None
            dataset = DetectionDataset(pictures, cache=kept, **options, **shared)
        if cache == "ram":
            share_pictures(dataset.store, team)
        part = {"share": (team.rank, team.size), "device": team.device}
        return make_loader(dataset, batch_size, workers=workers, shuffle=shuffle, **part)

    plain_from = settings.epochs - round(plain_end * settings.epochs)
    varied = {"augment": augmentation, "seed": settings.seed, "plain_from": plain_from}
    loader = load(train, True, size=settings.size, **varied)
    return loader, None if valid is None else load(valid, False, size=settings.test_size)


def share_pictures(store: PictureStore, team: Team) -> None:
    """Let all processes use the pictures that the first one keeps; where they cannot, they keep their own."""
    address = team.share(store.address)
    if not team.leads and address:
        store.join(address)
        if not store.address:
            store.keep("ram")
