"""A training from its checked flags to its last picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.checkpoint import load_model
from utils.cli import log
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.data_file import DataConfig
from utils.darknet.opencv import opencv_warning
from utils.darknet.shapes import max_stride
from utils.data.anchors import auto_anchors
from utils.data.datasets import Batch, DetectionDataset, make_loader
from utils.data.draw import draw_grid, targets_as_detections
from utils.data.images import write_image
from utils.data.index import Index, index
from utils.device import select_device
from utils.errors import DataError
from utils.evaluation import Evaluation, evaluate
from utils.model_files import ModelFiles
from utils.report import plots
from utils.report.cost import network_cost
from utils.report.run_dir import RunDirectory, read_results
from utils.training.loop import Source, Trainer
from utils.training.optim import LEAST_STEPS, accumulation
from utils.training.settings import Hyperparameters, TrainSettings
from utils.training.start import initial_model, resumable

DRAWN_CONFIDENCE = 0.25
"""Least confidence of the boxes in val_batch0_pred.jpg."""


@dataclass(frozen=True)
class TrainPlan:
    """Everything train.py was asked for, checked as far as it can be without torch and without the pictures."""

    files: ModelFiles
    """The network, adapted to the data, and the weights to start from."""
    data: DataConfig
    hyp: Hyperparameters
    settings: TrainSettings
    batch_size: int
    nominal_batch: int
    args: Mapping[str, Any]
    """The flags, for args.yaml."""
    project: Path
    name: str
    exist_ok: bool = False
    resume: Path | None = None
    """Run directory to go on with."""
    pretrained: bool = False
    single_class: bool = False
    rect: bool = False
    cache: bool = False
    workers: int = 0
    device: str = ""
    strict: bool = False
    anchors: bool = False
    """Cluster the anchors anew."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of the run."""
        return ("object",) if self.single_class else self.data.names


def run_training(plan: TrainPlan) -> dict[str, Any]:
    """Train, evaluate the best weights, draw the pictures of the run.

    Returns:
        The values of `train.py --json`.
    """
    device = select_device(plan.device)
    train, valid = _indices(plan)
    files = plan.files
    if plan.anchors and plan.resume is None:
        network, text = auto_anchors(files.network, train, plan.settings.size, "letterbox", plan.settings.seed)
        files = dataclasses.replace(files, network=network)
        log(text)
    height, width = plan.settings.test_size
    net = dataclasses.replace(files.network.net, height=height, width=width)
    files = dataclasses.replace(files, network=dataclasses.replace(files.network, net=net))
    torch.manual_seed(plan.settings.seed)
    start = initial_model(files, plan.pretrained)
    lineage = start.lineage
    if plan.resume is None:
        log(start.note)
    else:
        checkpoint = resumable(plan.resume / "weights" / "last.pt", start.model)
        lineage = tuple(checkpoint["lineage"])
    train_loader, val_loader = _loaders(plan, train, valid, files.network)
    settings = dataclasses.replace(plan.settings, accumulate=_accumulate(plan, len(train_loader)))
    run = _run_directory(plan, files)
    model = start.model.to(device, memory_format=torch.channels_last)
    source = Source(plan.names, lineage, plan.args)
    trainer = Trainer(model, train_loader, val_loader, plan.hyp, settings, run, source, device)
    if plan.resume is not None:
        trainer.restore(checkpoint)
        log(f"going on after epoch {trainer.progress.epoch} of {settings.epochs}")
    else:
        _draw_start(run, train_loader, train, plan.names)
    progress = trainer.train()
    best = run.weights / "best.pt"
    plots.plot_results(read_results(run.file("results.csv")), run.file("results.png"), progress.best_epoch or None)
    evaluation = _finish(plan, run, best, val_loader, device) if val_loader is not None else None
    scores = {"map50": None, "map50_95": None}
    if evaluation is not None:
        scores = {"map50": evaluation.metrics.map50, "map50_95": evaluation.metrics.map50_95}
    return {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        **scores,
        "run_dir": str(run.path),
        "best": str(best),
        "last": str(run.weights / "last.pt"),
    }


def _indices(plan: TrainPlan) -> tuple[Index, Index | None]:
    """The training pictures, and those to evaluate on; what is wrong with either is said once."""
    found = []
    for role, source in (("train", plan.data.train), ("valid", plan.data.valid)):
        if source is None:
            if role == "train":
                raise DataError(f"{plan.data.path}: names no training pictures; add a line train = list.txt")
            log(f"{plan.data.path}: names no valid pictures; nothing is evaluated, and best is the last epoch")
            found.append(None)
            continue
        part = index(source, plan.data.names, strict=plan.strict)
        log(f"{role}: {part.report.summary()}")
        found.append(part.single_class() if plan.single_class else part)
    return found[0], found[1]


def _loaders(
    plan: TrainPlan, train: Index, valid: Index | None, network: Network
) -> tuple[DataLoader, DataLoader | None]:
    settings = plan.settings
    shared = {
        "channels": network.net.channels,
        "rect": plan.rect,
        "stride": max_stride(network),
        "cache": "ram" if plan.cache else None,
    }
    plain_from = settings.epochs - round(plan.hyp.optimizer.plain_end * settings.epochs)
    dataset = DetectionDataset(
        train,
        size=settings.size,
        augment=plan.hyp.augmentation,
        seed=settings.seed,
        plain_from=plain_from,
        **shared,
    )
    loader = make_loader(dataset, plan.batch_size, workers=plan.workers, shuffle=True)
    if valid is None:
        return loader, None
    plain = DetectionDataset(valid, size=settings.test_size, **shared)
    return loader, make_loader(plain, plan.batch_size, workers=plan.workers)


def _accumulate(plan: TrainPlan, batches: int) -> int:
    count = accumulation(plan.batch_size, plan.nominal_batch, batches, plan.settings.epochs)
    steps = plan.settings.epochs * -(-batches // count)
    wanted = max(1, round(plan.nominal_batch / plan.batch_size))
    why = f" (fewer than the {wanted} of --nominal-batch, for at least {LEAST_STEPS} steps)" if count < wanted else ""
    log(f"{batches} batches of {plan.batch_size} an epoch, {count} in an optimizer step{why}, {steps} steps in the run")
    return count


def _run_directory(plan: TrainPlan, files: ModelFiles) -> RunDirectory:
    if plan.resume is not None:
        return RunDirectory(plan.resume)
    run = RunDirectory.create(plan.project, plan.name, exist_ok=plan.exist_ok)
    run.describe(args=plan.args, hyp=plan.hyp.flat, cfg=format_network(files.network), data=_data_yaml(plan))
    if warning := opencv_warning(files.network):
        log(f"{run.path}: {warning}")
    cost = network_cost(files.network, *plan.settings.size)
    log(f"{run.path}: {cost.parameters} parameters, {cost.macs / 1e9:.3f} GMACs at {plan.settings.size}")
    return run


def _data_yaml(plan: TrainPlan) -> dict[str, Any]:
    """The data set as a data.yaml that works from any folder."""
    paths = {}
    for key, source in (("train", plan.data.train), ("val", plan.data.valid)):
        if source is not None:
            several = [str(path.absolute()) for path in ((source,) if isinstance(source, Path) else source)]
            paths[key] = several[0] if len(several) == 1 else several
    return {**paths, "nc": len(plan.names), "names": list(plan.names)}


def _draw_start(run: RunDirectory, loader: DataLoader, train: Index, names: Sequence[str]) -> None:
    """labels.jpg and the first training batch as it is augmented."""
    plots.plot_labels(np.concatenate(train.labels), names, run.file("labels.jpg"))
    loader.dataset.set_epoch(0)
    requests = next(iter(loader.batch_sampler))
    batch = loader.collate_fn([loader.dataset[request] for request in requests])
    _draw_batch(run.file("train_batch0.jpg"), batch, names)


def _draw_batch(path: Path, batch: Batch, names: Sequence[str], found: Sequence[Tensor] | None = None) -> None:
    """A grid of a batch with its labels, or with what was found."""
    size = tuple(batch.images.shape[2:])
    if found is None:
        rows = targets_as_detections(batch.targets.numpy(), len(batch.images), size)
    else:
        rows = [boxes[boxes[:, 4] >= DRAWN_CONFIDENCE].numpy() for boxes in found]
    write_image(path, draw_grid(batch.images.numpy(), rows, names))


def _finish(plan: TrainPlan, run: RunDirectory, best: Path, loader: DataLoader, device: torch.device) -> Evaluation:
    """Evaluate the best weights as they lie on the disk, and draw."""
    model = load_model(ModelFiles(None, best, True)).model.to(device, memory_format=torch.channels_last)

    def draw(number: int, batch: Batch, found: list[Tensor]) -> None:
        if number == 0:
            _draw_batch(run.file("val_batch0_labels.jpg"), batch, plan.names)
            _draw_batch(run.file("val_batch0_pred.jpg"), batch, plan.names, found)

    settings = plan.settings
    thresholds = {"conf_thres": settings.conf_thres, "iou_thres": settings.iou_thres}
    evaluation = evaluate(model, loader, plan.names, device=device, on_batch=draw, **thresholds)
    plots.plot_pr_curve(evaluation.metrics, run.file("PR_curve.png"))
    plots.plot_f1_curve(evaluation.metrics, run.file("F1_curve.png"))
    plots.plot_confusion(evaluation.metrics.confusion, plan.names, run.file("confusion_matrix.png"))
    return evaluation
