"""A training from its checked flags to its last picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models import fuse
from utils.checkpoint import load_model
from utils.cli import log
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.data_file import DataConfig
from utils.darknet.network import max_stride, opencv_warning
from utils.data.anchors import auto_anchors
from utils.data.datasets import Batch, Loader
from utils.data.draw import draw_grid, targets_as_detections
from utils.data.images import write_image
from utils.data.index import Index
from utils.data.store import CacheKind
from utils.detection.evaluate import Evaluation, evaluate
from utils.errors import DataError, InputError
from utils.model_files import ModelFiles
from utils.quantization.attach import quantize
from utils.report import plots
from utils.report.cost import network_cost
from utils.report.run_dir import RunDirectory, last_epochs, read_results
from utils.report.scalars import Scalars
from utils.training.batches import check_batches
from utils.training.distil_flags import DistillationPlan
from utils.training.loop import Trainer
from utils.training.objective import load_teacher
from utils.training.optim import LEAST_STEPS, accumulation
from utils.training.pictures import indices, loaders
from utils.training.settings import Hyperparameters, TrainSettings, unused_keys
from utils.training.sparse_record import SparseRecord
from utils.training.start import initial_model, resumable
from utils.training.state import Progress, Source
from utils.training.team import Team, joined

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
    cache: CacheKind | None = None
    """Where decoded pictures are kept."""
    cache_dir: Path | None = None
    workers: int = 0
    device: str = ""
    strict: bool = False
    anchors: bool = False
    """Cluster the anchors anew."""
    tensorboard: bool = False
    """Write events for TensorBoard."""
    distillation: DistillationPlan | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of the run."""
        return ("object",) if self.single_class else self.data.names


def run_training(plan: TrainPlan, watch: Callable[[int, Mapping[str, float]], None] | None = None) -> dict[str, Any]:
    """Train, evaluate the best weights, draw the pictures of the run.

    Args:
        plan: what to do.
        watch: called with the number of each epoch and its row of results.csv; what it raises ends the training.

    Returns:
        The values of `train.py --json`.
    """
    with joined(plan.device) as team, ExitStack() as ending:
        return _train(plan, team, watch, ending)


def _train(
    plan: TrainPlan, team: Team, watch: Callable[[int, Mapping[str, float]], None] | None, ending: ExitStack
) -> dict[str, Any]:
    with team.one_by_one():
        train, valid = indices(plan.data, strict=plan.strict, single_class=plan.single_class)
    files = _fitted(plan, train)
    check_batches(files.network, plan.settings, train.shapes, plan.batch_size, rect=plan.rect, processes=team.size)
    batches: dict[str, Any] = {"data": train.fingerprint(), "batch": plan.batch_size * team.size}
    torch.manual_seed(plan.settings.seed)
    start = initial_model(files, plan.pretrained)
    lineage, kept = start.lineage, start.kept
    if plan.settings.quant is not None:
        quantize(start.model, plan.settings.quant.settings)
    if plan.settings.sync_bn:
        team.synchronised(start.model)
    if plan.resume is None:
        log(start.note)
    else:
        with team.one_by_one():
            checkpoint = resumable(plan.resume / "weights", start.model)
        lineage, kept = tuple(checkpoint["lineage"]), checkpoint.get("kept")
    distiller = None
    if plan.distillation is not None:
        teacher = load_teacher(plan.distillation, start.model, kept, plan.settings, plan.hyp, team, plan.rect)
        distiller, batches["teacher"] = teacher.distiller, teacher.digest
        lineage = lineage if plan.resume else (*lineage, teacher.origin)
    if plan.resume is not None:
        _check_unchanged(plan.resume, checkpoint["plan"], batches)
    train_loader, val_loader = _loaders(plan, train, valid, files.network, team, ending)
    settings = dataclasses.replace(plan.settings, accumulate=_accumulate(plan, len(train_loader), team.size))
    run = _run_directory(plan, files, team, ending)
    model = start.model.to(team.device, memory_format=torch.channels_last)
    quant = plan.settings.quant and plan.settings.quant.settings.document()
    source = Source(plan.names, lineage, plan.args, plan.hyp.flat, batches, kept, quant)
    trainer = Trainer(model, train_loader, val_loader, plan.hyp, settings, run, source, team, distiller)
    if plan.resume is not None:
        trainer.state.restore(checkpoint)
        log(_standing(trainer, run))
    elif team.leads:
        _draw_start(run, train_loader, train, plan.names)
    record = _watch(plan, trainer, run, watch) if team.leads else None
    progress = trainer.train()
    evaluation = _finish(plan, run, progress, val_loader, team)
    if record is not None:
        record.finish(trainer.state.kept)
    return _document(run, progress, evaluation) | (
        last_epochs(read_results(run.file("results.csv"))) if team.leads else {}
    )


def _document(run: RunDirectory, progress: Progress, evaluation: Evaluation | None) -> dict[str, Any]:
    """The values of `train.py --json`."""
    scores = {key: evaluation and getattr(evaluation.metrics, key) for key in ("map50", "map50_95")}
    return {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        **scores,
        "run_dir": str(run.path),
        "best": str(run.weights / "best.pt"),
        "last": str(run.weights / "last.pt"),
    }


def _fitted(plan: TrainPlan, train: Index) -> ModelFiles:
    """The network with the input size of the run, and with new anchors where they were asked for."""
    network = plan.files.network
    if plan.anchors and plan.resume is None:
        network, text = auto_anchors(network, train, plan.settings.size, "letterbox", plan.settings.seed)
        log(text)
    height, width = plan.settings.test_size
    net = dataclasses.replace(network.net, height=height, width=width)
    return dataclasses.replace(plan.files, network=dataclasses.replace(network, net=net))


def _watch(
    plan: TrainPlan,
    trainer: Trainer,
    run: RunDirectory,
    watch: Callable[[int, Mapping[str, float]], None] | None,
) -> SparseRecord | None:
    """Let all that is interested know of each epoch; the record of a sparse training."""
    events = Scalars(run.path, trainer.progress.epoch + 1) if plan.tensorboard else None
    if events is not None:
        trainer.watchers.append(events.append)
    record = None if trainer.sparsity is None else SparseRecord(trainer, run, events)
    if record is not None:
        record.begin()
    if watch is not None:
        trainer.watchers.append(watch)
    return record


def _standing(trainer: Trainer, run: RunDirectory) -> str:
    """Where a resumed run stands, for the log."""
    done, epochs = trainer.progress, trainer.settings.epochs
    if trainer.finished:
        return f"{run.path}: is finished, after epoch {done.epoch} of {epochs}; its best weights are evaluated again"
    return f"going on after epoch {done.epoch} of {epochs}, batch {done.batch}"


def _check_unchanged(run: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other pictures or batches: the rest of the epoch would be another one."""
    if then["data"] != now["data"]:
        raise InputError(
            f"--resume {run}: its training pictures or labels were changed; start a new run from its last.pt"
        )
    if then["batch"] != now["batch"]:
        raise InputError(f"--resume {run}: it has {then['batch']} pictures in a batch of all processes, now "
                         f"{now['batch']}; start as many processes as before")  # fmt: skip
    if then.get("teacher") != now.get("teacher"):
        raise InputError(f"--resume {run}: its teacher was changed; start a new run from its last.pt")


def _loaders(
    plan: TrainPlan, train: Index, valid: Index | None, network: Network, team: Team, ending: ExitStack
) -> tuple[Loader, Loader | None]:
    shared = {
        "channels": network.net.channels,
        "rect": plan.rect,
        "stride": max_stride(network),
        "cache_dir": plan.cache_dir,
    }
    if len(train) < team.size:
        raise DataError(f"{plan.data.path}: {len(train)} training pictures for {team.size} processes")
    made = loaders(
        train,
        valid,
        shared=shared,
        settings=plan.settings,
        augmentation=plan.hyp.augmentation,
        plain_end=plan.hyp.optimizer.plain_end,
        cache=plan.cache,
        batch_size=plan.batch_size,
        workers=plan.workers,
        team=team,
    )
    for loader in made:
        if loader is not None:
            ending.callback(loader.close)
    return made


def _accumulate(plan: TrainPlan, batches: int, processes: int) -> int:
    batch = plan.batch_size * processes
    count = accumulation(batch, plan.nominal_batch, batches, plan.settings.epochs)
    steps = plan.settings.epochs * -(-batches // count)
    wanted = max(1, round(plan.nominal_batch / batch))
    why = f" (fewer than the {wanted} of --nominal-batch, for at least {LEAST_STEPS} steps)" if count < wanted else ""
    log(f"{batches} batches of {batch} an epoch, {count} in an optimizer step{why}, {steps} steps in the run")
    return count


def _run_directory(plan: TrainPlan, files: ModelFiles, team: Team, ending: ExitStack) -> RunDirectory:
    """The folder of the run, made and described by the first process."""
    if plan.resume is not None:
        run = RunDirectory(plan.resume)
        if team.leads:
            run.sweep()
        return run
    run = RunDirectory.create(plan.project, plan.name, exist_ok=plan.exist_ok) if team.leads else None
    path = Path(team.share(str(run and run.path)))
    if run is None:
        return RunDirectory(path)
    ending.enter_context(run.until("results.csv", "weights/last.pt"))
    run.describe(args=plan.args, hyp=plan.hyp.flat, cfg=format_network(files.network), data=_data_yaml(plan))
    if warning := opencv_warning(files.network):
        log(f"{run.path}: {warning}")
    if warning := unused_keys(files.network):
        log(warning)
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
    batch = loader.dataset.__getitems__(requests)
    _draw_batch(run.file("train_batch0.jpg"), batch, names)


def _draw_batch(path: Path, batch: Batch, names: Sequence[str], found: Sequence[Tensor] | None = None) -> None:
    """A grid of a batch with its labels, or with what was found."""
    size = tuple(batch.images.shape[2:])
    if found is None:
        rows = targets_as_detections(batch.targets.numpy(), len(batch.images), size)
    else:
        rows = [boxes[boxes[:, 4] >= DRAWN_CONFIDENCE].numpy() for boxes in found]
    write_image(path, draw_grid(batch.images.numpy(), rows, names))


def _finish(
    plan: TrainPlan, run: RunDirectory, progress: Progress, loader: DataLoader | None, team: Team
) -> Evaluation | None:
    """Draw the course of the run; evaluate the best weights as they lie on the disk, and draw what they find."""
    model = None
    if team.leads:
        plots.plot_results(read_results(run.file("results.csv")), run.file("results.png"), progress.best_epoch or None)
        model = fuse(load_model(ModelFiles(None, run.weights / "best.pt", True)).model)
    if loader is None:
        return None

    def draw(number: int, batch: Batch, found: list[Tensor]) -> None:
        if number == 0 and team.leads:
            _draw_batch(run.file("val_batch0_labels.jpg"), batch, plan.names)
            _draw_batch(run.file("val_batch0_pred.jpg"), batch, plan.names, found)

    options = {key: getattr(plan.settings, key) for key in ("conf_thres", "iou_thres")}
    options |= {"device": team.device, "gather": team.gather}
    evaluation = evaluate(team.share_model(model), loader, plan.names, on_batch=draw, **options)
    if team.leads:
        plots.plot_pr_curve(evaluation.metrics, run.file("PR_curve.png"))
        plots.plot_f1_curve(evaluation.metrics, run.file("F1_curve.png"))
        plots.plot_confusion(evaluation.metrics.confusion, plan.names, run.file("confusion_matrix.png"))
    return evaluation
