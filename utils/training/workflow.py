"""A training from its checked flags to its last picture."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from models import Darknet, fuse
from utils.checkpoint import load_model, origin
from utils.cli import command_of, log, memory_for
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.data_file import DataConfig
from utils.darknet.data_file import Source as PictureSource
from utils.darknet.network import max_stride, normalised_cell, opencv_warning, picture_channels
from utils.data.anchors import auto_anchors
from utils.data.augment import Augmentation
from utils.data.datasets import Batch, DetectionDataset, Loader, make_loader, rectangle
from utils.data.draw import draw_grid, targets_as_detections
from utils.data.images import Size, write_image
from utils.data.index import Index, index, label_path
from utils.data.store import PictureStore
from utils.detection.evaluate import Evaluation, evaluate
from utils.detection.settings import ASSIGNMENTS
from utils.device import training_type
from utils.distillation.strategies import distillation
from utils.distillation.terms import Distiller, Teacher
from utils.errors import CheckpointError, DataError, InputError, NumericsError, ResourceError, SuiteError
from utils.files import foreign_errors
from utils.flags import ModelFiles, default_workers
from utils.quantization.quantizers import quantize
from utils.quantization.scheme import export_command
from utils.report import plots
from utils.report.run_dir import RunDirectory, last_epochs, read_results
from utils.report.tables import network_cost
from utils.training.checkpointing import Progress, Source, Start, initial_model, resumable
from utils.training.distributed import Team, joined
from utils.training.hyperparameters import unused_keys
from utils.training.loop import FREEZE_FROM, ROUND_FROM, Trainer, rescaled_size
from utils.training.optimizer import LEAST_STEPS, accumulation
from utils.training.settings import AUTO, ScheduleFlags, TrainPlan, TrainSettings
from utils.training.sparsity import SCRIPTS, SparseRecord

DRAWN_CONFIDENCE = 0.25
"""Least confidence of the boxes in val_batch0_pred.jpg."""
MEMORY_SHARE = 0.8
"""Share of a GPU's memory that --batch-size auto may use; trial steps lack some of what a run needs: DDP's buckets."""
TAGS = {
    "box_loss": "loss/box",
    "objectness_loss": "loss/objectness",
    "class_loss": "loss/class",
    "precision": "score/precision",
    "recall": "score/recall",
    "f1": "score/f1",
    "map50": "score/AP50",
    "map50_95": "score/AP50-95",
}
"""Names of the curves by the columns of results.csv; others are called `run/COLUMN`."""


def run_training(plan: TrainPlan) -> dict[str, Any]:
    """Train, evaluate the best weights, draw the pictures of the run, and return the values of `train.py --json`."""
    with joined(plan.settings.device) as team, ExitStack() as ending:
        return _train(plan, team, ending)


def _train(plan: TrainPlan, team: Team, ending: ExitStack) -> dict[str, Any]:
    settings = plan.settings
    if plan.resume is not None and team.leads:
        ending.enter_context(RunDirectory(plan.resume).until())
    with team.one_by_one():
        train, valid = indices(plan.data, single_class=settings.single_cls)
    plan = _fitted(plan, train)
    start = _start(plan, team)
    batches: dict[str, Any] = {"data": train.fingerprint()}
    lineage, distiller = start.lineage, None
    if plan.teacher is not None:
        distiller, teacher, batches["teacher"] = load_teacher(plan, start, team)
        lineage = lineage if start.checkpoint else (*lineage, teacher)
    count = chosen_batch(plan, train, start, distiller, team)
    ending.enter_context(memory_for(count, resumed=plan.resume is not None))
    plan = dataclasses.replace(plan, settings=dataclasses.replace(settings, batch_size=count))
    check_batches(plan.network, plan.settings, train.shapes, team.size)
    if settings.sync_bn:  # after trial steps, in which no process waits for another
        team.synchronised(start.model)
    batches["batch"] = count * team.size
    if start.checkpoint is not None:
        _check_unchanged(plan, start.checkpoint["plan"], batches)
    train_loader, val_loader = loaders(plan, train, valid, team)
    for loader in filter(None, (train_loader, val_loader)):
        ending.callback(loader.close)
    settings = dataclasses.replace(plan.settings, accumulate=_accumulate(plan, len(train_loader), team.size))
    run = _run_directory(plan, team, ending)
    model = start.model.to(team.device).to(memory_format=torch.channels_last)
    quant = None if settings.quant is None else settings.quant.document()
    source = Source(plan.names, lineage, plan.args, plan.hyp.flat, batches, quant)
    trainer = Trainer(model, train_loader, val_loader, plan.hyp, settings, run, source, team, distiller)
    if start.checkpoint is not None:
        with foreign_errors(run.weights, "no state that a training can go on from", CheckpointError):
            trainer.state.restore(start.checkpoint)
        log(_standing(trainer, run))
    elif team.leads:
        _draw_start(run, train_loader, train, plan.names)
    record = _watch(trainer) if team.leads else None
    progress = trainer.train()
    evaluation = _finish(plan, run, progress, val_loader, team)
    if record is not None:
        record.finish()
    document = _document(run, progress, evaluation)
    document["next"] = next_step(plan, document["best"], pruned=any("pruned" in entry for entry in start.lineage))
    return document | (last_epochs(read_results(run.file("results.csv"))) if team.leads else {})


def _start(plan: TrainPlan, team: Team) -> Start:
    """Return the model that the run starts from; that of a resumed one waits for its checkpoint."""
    settings = plan.settings
    torch.manual_seed(settings.seed)
    start = Start(Darknet(plan.network)) if plan.resume else initial_model(plan.files, settings.pretrain)
    if settings.quant is not None:
        quantize(start.model, settings.quant)
    if plan.resume is None:
        return start
    with team.one_by_one():
        checkpoint = resumable(plan.resume / "weights", start.model)
    return Start(start.model, tuple(checkpoint["lineage"]), checkpoint)


def _document(run: RunDirectory, progress: Progress, evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the values of `train.py --json`."""
    scores = {key: evaluation and getattr(evaluation.metrics, key) for key in ("map50", "map50_95")}
    return {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "start_map50": progress.start_map50,
        **scores,
        "run_dir": str(run.path),
        "best": str(run.weights / "best.pt"),
        "last": str(run.weights / "last.pt"),
    }


def next_step(plan: TrainPlan, best: str, *, pruned: bool) -> str:
    """Return the command that comes next: a network is pruned, then quantized, then exported."""
    settings = plan.settings
    data = None if settings.single_cls else plan.data.path  # other scripts count the classes of --data
    unmeasured = data is None or plan.data.valid is None
    if settings.quant is not None:
        return export_command(settings.quant, plan.data, best, single_cls=settings.single_cls)
    if pruned and not settings.sr:
        if data is None:
            return command_of("export.py", weights=best)
        return command_of("quantize.py", data=data, weights=best, **{"no-test": unmeasured})
    number = settings.prune if settings.sr else 1
    # All residual units of most networks hold less than half of the multiply-adds.
    amount: dict[str, Any] = {"shortcuts": 1} if number == 2 else {"target-macs": 0.5}
    return command_of(SCRIPTS[number], data=data, weights=best, **amount, **{"no-test": unmeasured})


def _fitted(plan: TrainPlan, train: Index) -> TrainPlan:
    """Return the plan with the input size of the run, and with new anchors where --auto-anchors wants them."""
    network, settings = plan.network, plan.settings
    if settings.auto_anchors and plan.resume is None:
        network, text = auto_anchors(network, train, settings.size, settings.seed)
        log(text)
    height, width = settings.test_size
    network = dataclasses.replace(network, net=dataclasses.replace(network.net, height=height, width=width))
    return dataclasses.replace(plan, files=dataclasses.replace(plan.files, network=network))


def _watch(trainer: Trainer) -> SparseRecord | None:
    """Let TensorBoard, and the record of a sparse training, which is returned, know of each epoch."""
    events = Scalars(trainer.run.path, trainer.progress.epoch + 1) if trainer.settings.tensorboard else None
    if events is not None:
        trainer.watchers.append(events.append)
    record = None if trainer.sparsity is None else SparseRecord(trainer, events)
    if record is not None:
        record.begin()
    return record


class Scalars:
    """`events.out.tfevents.*` of a run: the columns of results.csv and histograms, for TensorBoard.

    Summaries are those of `torch.utils.tensorboard`. Its SummaryWriter is not used: it writes in a thread, which prints
    a traceback of its own when a write fails. Here a failure is logged once, and the run goes on without events.

    Args:
        folder: run directory.
        first: the epoch that comes first; what older files of the folder say of it and of later ones is not shown.
    """

    def __init__(self, folder: Path, first: int = 1) -> None:
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self._writes = True
        self._write({"file_version": "brain.Event:2"}, {"step": first, "session_log": {"status": "START"}})

    def append(self, epoch: int, row: Mapping[str, float | None]) -> None:
        """Write the values of one epoch; a column without a value, or with None, is left out."""
        from torch.utils.tensorboard.summary import scalar

        known = {TAGS.get(column, f"run/{column}"): value for column, value in row.items() if value is not None}
        self._write(*({"step": epoch, "summary": scalar(tag, value)} for tag, value in known.items()))

    def histogram(self, epoch: int, tag: str, values: ArrayLike) -> None:
        """Write how the values of one epoch are distributed.

        Args:
            epoch: 1 and later.
            tag: name of the histogram, e.g. `gamma/all`.
            values: of any shape. NaN and infinite ones are left out; without any other, nothing is written.
        """
        from torch.utils.tensorboard.summary import histogram

        values = np.asarray(values, np.float64).ravel()
        values = values[np.isfinite(values)]
        if values.size:
            self._write({"step": epoch, "summary": histogram(tag, values, "auto")})

    def _write(self, *events: Mapping[str, Any]) -> None:
        """Append events, given by the fields of an Event message."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if not self._writes:
            return
        try:
            with self.path.open("ab") as file:
                for event in events:
                    RecordWriter(file).write(Event(wall_time=time.time(), **event).SerializeToString())
        except OSError as failure:
            self._writes = False
            log(f"warning: {self.path}: {failure.strerror}; the run goes on without TensorBoard's events")


def _standing(trainer: Trainer, run: RunDirectory) -> str:
    """Where a resumed run stands, for the log."""
    done, epochs = trainer.progress, trainer.settings.epochs
    if trainer.finished:
        return f"{run.path}: is finished, after epoch {done.epoch} of {epochs}; its best weights are evaluated again"
    return f"going on after epoch {done.epoch} of {epochs}, batch {done.batch}"


def _check_unchanged(plan: TrainPlan, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other pictures or batches: the rest of the epoch would be another one."""
    changes = {
        "data": "its training images or labels were changed; start a new run from its last.pt",
        "batch": f"it has {then['batch']} images in a batch of all processes, now {now['batch']}; start as many "
        "processes as before",
        "teacher": "its teacher was changed; start a new run from its last.pt",
    }
    for key, change in changes.items():
        if then.get(key) != now.get(key):
            raise InputError(f"--resume {plan.resume}: {change}")


def _accumulate(plan: TrainPlan, batches: int, processes: int) -> int:
    batch, epochs = int(plan.settings.batch_size) * processes, plan.settings.epochs
    count = accumulation(batch, batches, epochs)
    steps = epochs * -(-batches // count)
    log(f"{batches} batches of {batch} an epoch, {count} in an optimizer step, {steps} steps in the run")
    return count


def _run_directory(plan: TrainPlan, team: Team, ending: ExitStack) -> RunDirectory:
    """Return the folder of the run, made and described by the first process."""
    if plan.resume is not None:
        return RunDirectory(plan.resume)
    settings, run = plan.settings, None
    if team.leads:
        run = RunDirectory.create(settings.project, settings.name, exist_ok=settings.exist_ok)
    path = Path(team.share(str(run and run.path)))
    if run is None:
        return RunDirectory(path)
    ending.enter_context(run.until("results.csv", "weights/last.pt"))
    for name in ("results.csv", "weights/last.pt", "weights/prev.pt"):  # of an earlier run, with --exist-ok
        run.file(name).unlink(missing_ok=True)  # with the new flags a resume would go on from them
    run.describe(args=plan.args, hyp=plan.hyp.flat, cfg=format_network(plan.network), data=plan.data.document())
    if warning := opencv_warning(plan.network):
        log(f"{run.path}: {warning}")
    if warning := unused_keys(plan.network):
        log(warning)
    cost = network_cost(plan.network, *settings.size)
    log(f"{run.path}: {cost.parameters} parameters, {cost.macs / 1e9:.3f} GMACs at {settings.size}")
    return run


def _draw_start(run: RunDirectory, loader: Loader, train: Index, names: Sequence[str]) -> None:
    """labels.jpg and the first training batch as it is augmented."""
    plots.plot_labels(train.labels.rows, names, run.file("labels.jpg"))
    loader.dataset.epoch = 0
    requests = next(iter(loader.batch_sampler))
    batch = loader.dataset.__getitems__(requests)
    if isinstance(batch, SuiteError):
        raise batch
    _draw_batch(run.file("train_batch0.jpg"), batch, names)


def _draw_batch(path: Path, batch: Batch, names: Sequence[str], detections: Sequence[Tensor] | None = None) -> None:
    """Draw a grid of a batch with its labels, or with detections."""
    size = (batch.images.shape[2], batch.images.shape[3])
    if detections is None:
        boxes = targets_as_detections(batch.targets.numpy(), len(batch.images), size)
    else:
        boxes = [rows[rows[:, 4] >= DRAWN_CONFIDENCE].numpy() for rows in detections]
    write_image(path, draw_grid(batch.images.numpy(), boxes, names))


def _finish(
    plan: TrainPlan, run: RunDirectory, progress: Progress, loader: Loader | None, team: Team
) -> Evaluation | None:
    """Draw the course of the run; evaluate the best weights as they lie on the disk, and draw what they find."""
    model = None
    if team.leads:
        plots.plot_results(read_results(run.file("results.csv")), run.file("results.png"), progress.best_epoch or None)
        model = fuse(load_model(ModelFiles(None, run.weights / "best.pt", True)).model)
    if loader is None:
        return None

    def draw(number: int, batch: Batch, detections: list[Tensor]) -> None:
        if number == 0 and team.leads:
            _draw_batch(run.file("val_batch0_labels.jpg"), batch, plan.names)
            _draw_batch(run.file("val_batch0_pred.jpg"), batch, plan.names, detections)

    model = team.share_model(model)
    evaluation = evaluate(model, loader, plan.names, on_batch=draw, device=team.device, gather=team.gather)
    if team.leads:
        plots.plot_pr_curve(evaluation.metrics, run.file("PR_curve.png"))
        plots.plot_f1_curve(evaluation.metrics, run.file("F1_curve.png"))
        plots.plot_confusion(evaluation.metrics.confusion, plan.names, run.file("confusion_matrix.png"))
    return evaluation


def indices(data: DataConfig, *, single_class: bool) -> tuple[Index, Index | None]:
    """Return the training pictures, and those to evaluate on; what is wrong with either is logged.

    Raises:
        DataError: there are no training pictures, or they have no boxes.
    """
    if data.train is None:
        raise DataError(f"{data.path}: names no training images; add a line train = list.txt")

    def part(role: str, source: PictureSource) -> Index:
        found = index(source, data.names)
        log(f"{role}: {found.summary()}")
        return found.single_class() if single_class else found

    train = part("train", data.train)
    if not len(train.labels.rows):
        first = train.images[0]
        raise DataError(
            f"{data.path}: no box in {len(train)} training images; the label of {first} is looked for as "
            f"{label_path(str(first))}, and beside it"
        )
    if data.valid is None:
        log(f"{data.path}: names no valid images; nothing is evaluated, and best is the last epoch")
        return train, None
    return train, part("valid", data.valid)


def loaders(plan: TrainPlan, train: Index, valid: Index | None, team: Team) -> tuple[Loader, Loader | None]:
    """Return loaders of the training pictures, augmented, and of those to evaluate on, for this process's share.

    Raises:
        DataError: there are fewer training pictures than processes.
    """
    settings = plan.settings
    if len(train) < team.size:
        raise DataError(f"{plan.data.path}: {len(train)} training images for {team.size} processes")
    channels, stride = picture_channels(plan.network), max_stride(plan.network)
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
            int(settings.batch_size),
            workers=default_workers() if settings.workers is None else settings.workers,
            shuffle=augment is not None,
            share=(team.rank, team.size),
            device=team.device,
        )

    loader = load(train, settings.size, plan.hyp.augmentation)
    return loader, None if valid is None else load(valid, settings.test_size)


def chosen_batch(plan: TrainPlan, train: Index, start: Start, distiller: Distiller | None, team: Team) -> int:
    """Return the pictures in a batch of each process; what --batch-size auto stands for is logged.

    On a GPU that is the largest power of two with which steps stay within MEMORY_SHARE of its memory. More than the
    default are taken only where the run keeps LEAST_STEPS optimizer steps. A resumed run keeps its number.
    """
    if plan.settings.batch_size != AUTO:
        return plan.settings.batch_size
    if start.checkpoint is not None:
        return start.checkpoint["plan"]["batch"] // team.size
    count = most = int(ScheduleFlags.batch_size)
    if team.device.type == "cuda":
        count, most = 1, max(most, len(train) * plan.settings.epochs // LEAST_STEPS // team.size)
        while 2 * count <= most and _fits(plan, train, start, distiller, 2 * count, Team(team.device)):
            count *= 2
    count = min(team.gather(count))
    log(f"--batch-size {AUTO}: {count}, of at most {most}")
    return count


def _fits(plan: TrainPlan, train: Index, start: Start, distiller: Distiller | None, count: int, alone: Team) -> bool:
    """Whether steps with copies of all that they change stay within MEMORY_SHARE of a GPU's memory."""
    device, run, source = alone.device, RunDirectory(Path(os.devnull)), Source((), (), {}, {}, {})
    changes: dict[str, Any] = {"batch_size": count, "workers": 0, "cache": None, "rect": False, "compiled": False}
    plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, **changes))
    torch.cuda.empty_cache()
    try:
        with memory_for(count), torch.random.fork_rng([device]):
            model = copy.deepcopy(start.model).to(device).to(memory_format=torch.channels_last).train()
            if distiller is not None:
                distiller = copy.copy(distiller)
                distiller.divisor = alone.positives
            loader, _ = loaders(plan, train, None, alone)
            trainer = Trainer(model, loader, None, plan.hyp, plan.settings, run, source, alone, distiller)
            trainer.state.scaler = torch.amp.GradScaler(enabled=False)  # it would skip the first steps
            batch = next(iter(loader))
            for share in (0, (ROUND_FROM + FREEZE_FROM) / 2):  # the second phase of a quantization rounds activations
                trainer.progress.step = round(share * trainer.schedule.steps)
                with suppress(NumericsError):
                    trainer.train_batch(batch, 0)
        free, memory = torch.cuda.mem_get_info(device)  # what was freed is still reserved
        return memory - free <= MEMORY_SHARE * memory
    except ResourceError:
        return False


def share_pictures(store: PictureStore, team: Team) -> None:
    """Let all processes use the pictures that the first one keeps; where they cannot, they keep their own."""
    address = team.share(store.address)
    if not team.leads and address:
        store.join(address)
        if not store.address:
            store.keep("ram")


def check_batches(network: Network, settings: TrainSettings, shapes: NDArray[np.int64], processes: int = 1) -> None:
    """Refuse inputs on which the network cannot work, and batches of one picture where a normalised map is one cell.

    One value has no variance.

    Args:
        network: what is trained.
        settings: of the run.
        shapes: [N, 2], height and width of the training pictures.
        processes: that train together.

    Raises:
        CfgError: a window does not fit into a map of an input, or maps that go together have other sizes.
        InputError: names the block and the size of the input.
    """
    # A last batch of one picture joins the one before it.
    alone = int(settings.batch_size) == 1 or len(shapes) < 2 * processes
    for height, width in sorted(_inputs(network, settings, shapes)):
        number = normalised_cell(network, height, width)
        if alone and number is not None:
            raise InputError(
                f"{network.path}: block {number} has 1 x 1 cells at {width} x {height}, and a batch has one "
                "image; batch normalisation needs two values: use a larger --img_size or more images"
            )


def _inputs(network: Network, settings: TrainSettings, shapes: NDArray[np.int64]) -> set[Size]:
    """Height and width of all inputs of a run."""
    stride, longest = max_stride(network), max(settings.size)
    if settings.rect:
        return {rectangle(shape[None], longest, stride) for shape in np.unique(shapes, axis=0)}
    low, high = settings.sizes or (longest, longest)
    return {rescaled_size(settings.size, side, stride) for side in range(low, high + 1, stride)}


def load_teacher(plan: TrainPlan, start: Start, team: Team) -> tuple[Distiller, dict[str, str], str]:
    """Load the teacher and pair it with the student.

    Args:
        plan: of a run with a teacher.
        start: the student.
        team: on whose device the teacher runs.

    Returns:
        The distillation, the teacher's entry in the lineage, and a digest of its file and its network, which may be
        that of another file.

    Raises:
        WeightsError: the teacher's file cannot be used.
        InputError: teacher and student have nothing in common that is compared, or other input sizes.
        DataError: the teacher has the class names in another order.
    """
    assert plan.teacher is not None and plan.teacher.weights is not None  # choose_model has found them
    settings, loaded = plan.settings, load_model(plan.teacher)
    log(*loaded.notes)
    _check_sizes(start.model, loaded.model, settings, str(loaded.path))
    if not settings.single_cls:
        plan.data.check_order(loaded.names, loaded.path)
    teacher = Teacher(loaded.model, team.device, training_type(settings.precision, team.device))
    chosen = distillation(settings.KDstr, settings.AT_str, settings.kd_weight)
    rule = ASSIGNMENTS[plan.hyp.loss.assignment]
    distiller = Distiller(start.model, teacher, chosen, rule, team.positives)
    for note in distiller.notes:
        log(f"{loaded.path}: {note}")
    terms = ", ".join(f"{weight:g} · {term}" for term, weight in distiller.distillation.terms.items())
    log(f"{chosen.name}: learns {terms} from {loaded.path} ({_comparison(distiller)})")
    entry = {**origin(plan.teacher.weights), "teacher": chosen.name}
    network = format_network(teacher.network)
    return distiller, entry, hashlib.sha256(f"{entry['sha256']}\n{network}".encode()).hexdigest()


def _comparison(distiller: Distiller) -> str:
    """Return what is compared, for the log."""
    heads, features = distiller.pairing.heads, distiller.pairing.features
    parts = [f"{len(heads)} heads"] if heads else []
    if features:
        parts.append(f"features of blocks {', '.join(str(feature.student) for feature in features)}")
    return "; ".join(parts)


def _check_sizes(student: Darknet, teacher: Darknet, settings: TrainSettings, path: str) -> None:
    mine, theirs = max_stride(student.network), max_stride(teacher.network)
    varied = settings.rect or settings.sizes is not None
    sides = (*settings.size, mine) if varied else settings.size
    if bad := next((side for side in sides if side % theirs), None):
        what = f"sides are multiples of {mine}" if varied else f"a side is {bad}"
        raise InputError(f"{path}: needs an input with sides that are multiples of {theirs}; {what} here")
