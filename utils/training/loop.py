"""The training loop: epochs of steps, an evaluation after each, checkpoints that an exact resume starts from.

The random numbers of a step depend on (seed, epoch, position) only, not on the steps before. So a step is the same in a
resumed run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Computing, Darknet, fuse, network_input, reduced
from utils.cli import EPOCHS_AFTER, ProgressBar, duration, log
from utils.darknet.network import max_stride, unread
from utils.data.datasets import Batch, Loader
from utils.detection.average_precision import Metrics
from utils.detection.evaluate import evaluate
from utils.detection.losses import detection_loss
from utils.detection.settings import LossSettings
from utils.device import training_type
from utils.distillation.terms import Distiller
from utils.errors import Interrupted, NumericsError
from utils.quantization.quantizers import ActivationQuantizer, Phase, WeightQuantizer, set_phase
from utils.quantization.scheme import MOST_BITS
from utils.report.run_dir import Results, RunDirectory
from utils.training.checkpointing import Progress, Source, State
from utils.training.distributed import StopRequest, Team
from utils.training.hyperparameters import Hyperparameters, fitness
from utils.training.optimizer import AveragedModel, Schedule, build_optimizer, set_step
from utils.training.settings import TrainSettings
from utils.training.sparsity import Sparsity

LOSS_COLUMNS = {"box": "box_loss", "objectness": "objectness_loss", "classes": "class_loss"}
"""Columns in results.csv of the terms of the detection loss."""
SCORES = ("precision", "recall", "f1", "map50", "map50_95")
COLUMNS = (*SCORES, "lr", "seconds", "loading", "test_seconds")
"""Columns of results.csv after the epoch and the losses; `loading` is the share of `seconds` spent waiting for data."""
SIZE_PERIOD = 10
"""Batches that a multi-scale run trains at one size, as Darknet's `random=1`."""
MOST_SKIPPED = 20
"""Steps in a row that a gradient scaler may skip for infinite gradients before the run ends."""
ROUND_FROM, FREEZE_FROM = 0.1, 0.5
"""Shares of the steps of a quantization-aware training. Before the first, bounds of activations are observed, but not
applied. From the second on, bounds and folded statistics are frozen."""
EXTRA_BITS = 4
"""Extra bits at the start of --bit-warmup, which is divided into as many equal parts; each part has one bit less."""


class Objective:
    """The loss of a batch and its terms.

    Args:
        model: on the team's device. Freeze parameters before: DDP decides here which gradients are exchanged.
        settings: of the detection loss.
        dtype: of 16 bits, that autocast computes in; None: float32 throughout.
        team: the processes that train together.
        distiller: what else is learnt; None: nothing.
    """

    def __init__(
        self,
        model: Darknet,
        settings: LossSettings,
        dtype: torch.dtype | None,
        team: Team,
        distiller: Distiller | None = None,
    ) -> None:
        self.yolos, self.settings, self.dtype, self.team = model.network.yolos, settings, dtype, team
        # A quantized forward pass reads bounds and running statistics, so all processes must have the same ones.
        self.model = team.parallel(model, buffers=model.quantize_image is not None)
        """The model, which averages gradients over the processes."""
        self._distiller = distiller
        terms = () if distiller is None else distiller.distillation.terms
        self.columns: Mapping[str, str] = LOSS_COLUMNS | {f"kd_{term}": f"kd_{term}_loss" for term in terms}
        """Column of results.csv for every term."""

    def __call__(self, images: Tensor, targets: Tensor, ignored: Tensor | None = None) -> dict[str, Tensor]:
        """Return `total`, which is minimised, and its terms: those of `detection_loss`, and weighted `kd_…` terms.

        Args:
            images: [B, C, H, W], 0…1.
            targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input.
            ignored: the same of the ignored boxes, see `detection_loss`. Boxes are on the CPU.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        distiller = self._distiller
        teacher = None if distiller is None else distiller.teach(images)
        wanted = () if distiller is None else distiller.wanted
        with torch.autocast(self.team.device.type, self.dtype, enabled=self.dtype is not None):
            outputs = self.model(images, maps=wanted)
        size = (images.shape[-2], images.shape[-1])
        options = (self.settings, self.team.positives, ignored)
        terms = detection_loss(outputs.heads, targets, self.yolos, size, *options)._asdict()
        if distiller is not None and teacher is not None:
            learnt = distiller(teacher, outputs, targets, size)
            terms["total"] = terms["total"] + sum(learnt.values())
            terms |= {f"kd_{term}": value for term, value in learnt.items()}
        return terms


class Trainer:
    """One run.

    Args:
        model: on the team's device, with the weights to start from.
        train_loader: batches of training pictures, those of this process.
        val_loader: batches of the pictures to evaluate on; None: there are none.
        hyp: hyper-parameters.
        settings: of the run.
        run: its directory.
        source: names, lineage and flags, stored in the checkpoints.
        team: the processes that train together.
        distiller: what the model learns beside the labels; None: nothing.
    """

    def __init__(
        self,
        model: Darknet,
        train_loader: Loader,
        val_loader: Loader | None,
        hyp: Hyperparameters,
        settings: TrainSettings,
        run: RunDirectory,
        source: Source,
        team: Team,
        distiller: Distiller | None = None,
    ) -> None:
        self.model, self.train_loader, self.val_loader = model, train_loader, val_loader
        self.hyp, self.settings, self.run, self.source, self.team = hyp, settings, run, source, team
        self.batches = len(train_loader)
        self.schedule = Schedule(hyp.optimizer, settings.epochs, self.batches, settings.accumulate)
        self.stride = max_stride(model.network)
        _freeze(model, settings.freeze)
        self.dtype = training_type(settings.precision, team.device)
        torch.backends.cudnn.benchmark = settings.sizes is None and not settings.rect  # it tries ways for every size
        if settings.compiled:
            model.compile()
        self.objective = Objective(model, hyp.loss, self.dtype, team, distiller)
        self.state = State(
            model,
            AveragedModel(model, self.schedule.ema_decay),
            build_optimizer(model, hyp.optimizer, settings.adam),
            torch.amp.GradScaler(team.device.type, enabled=self.dtype is torch.float16),
            Progress(),
        )
        self.sparsity = Sparsity(model, settings, self.schedule) if settings.sr else None
        if self.sparsity is not None:
            self.progress.control = self.sparsity.control()
        self.rounding = None
        if settings.quant is not None:
            models = [model, self.state.average.model]
            self.rounding = Rounding(models, self.schedule.steps, settings.bit_warmup)
        self.results = Results(run.file("results.csv"), (*self.objective.columns.values(), *COLUMNS))
        self.watchers: list[Callable[[int, Mapping[str, float]], None]] = []
        """Called in the first process with the number and the row of each epoch, before it is saved."""
        self.stop = StopRequest()
        self._skipped = 0
        self._stops = 0.0
        """Processes that had got a signal when the last step was taken."""
        self._terms: list[tuple[int, Tensor, Tensor]] = []
        """Place in the epoch, pictures and loss terms of the batches of the step that is under way."""

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.state.progress

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or patience was at its end."""
        done, patience = self.progress, self.settings.patience
        exhausted = patience > 0 and done.best_epoch > 0 and done.epoch - done.best_epoch >= patience
        return done.epoch >= self.settings.epochs or exhausted

    def train(self) -> Progress:
        """Run what is left of the epochs.

        Raises:
            NumericsError: a loss or gradient is not finite; the step is not taken.
            Interrupted: a signal asked for it; `last.pt` holds the state after the step that was under way.
            ResourceError: a checkpoint cannot be written; the one before it is intact.
        """
        with self.stop:
            if not self.settings.nosave and self.progress == Progress(control=self.progress.control):
                self._save()
            if self.rounding is not None:  # a run may begin with an evaluation
                self.rounding.begin(self.progress.step - 1)
            try:
                self._train_epochs()
            except Interrupted:
                raise
            except Exception:
                if self.team.leads and self.run.new and self.progress.step == 0:  # the `last.pt` above is no result
                    (self.run.weights / "last.pt").unlink(missing_ok=True)
                raise
        return self.progress

    def _train_epochs(self) -> None:
        ends = self.finished
        if self.progress.step == 0:
            self._measure_start()
        while not ends:
            torch.backends.cudnn.allow_tf32 = self.dtype is None and self.settings.quant is None
            row = self._train_epoch()
            torch.backends.cudnn.allow_tf32 = False
            ends = self._close_epoch(row)
        self._leave_if_asked()  # a signal came while the last epoch was saved

    def _measure_start(self) -> None:
        """Evaluate before the first step: a fine-tuning can end below its weights, and s = auto compares with them."""
        trained = any(entry.get("teacher") is None for entry in self.source.lineage) and not self.settings.notest
        if self.val_loader is not None and (trained or self.progress.control is not None):
            metrics = self._evaluate(self.dtype)
            self.progress.start_map50 = metrics.map50
            self._steer(metrics)
            if self.team.leads:
                log(f"before the first step: AP50 {metrics.map50:.4f}, AP50-95 {metrics.map50_95:.4f}")

    def _steer(self, metrics: Metrics) -> None:
        """Report AP50 to `--s auto`; not before a quantization has its final bits, as AP50 drops anyway until then."""
        if self.progress.control is not None and (self.rounding is None or self.rounding.complete):
            self.progress.control.see_ap50(metrics.map50, self.settings.s_drop)

    def _train_epoch(self) -> dict[str, float]:
        """What is left of a pass over the training pictures; the epoch's means."""
        done = self.progress
        self.train_loader.begin(done.epoch, done.batch)
        self.model.train()
        _freeze_statistics(self.model, self.settings.freeze)
        title = f"epoch {done.epoch + 1}/{self.settings.epochs}"
        bar = ProgressBar(title, self.train_loader, self.batches, "batches", done.batch)
        pending: dict[str, float] = {}
        last = time.perf_counter()
        for position, batch in enumerate(bar, start=done.batch):
            waited = time.perf_counter() - last
            values = self.train_batch(batch, position)
            now = time.perf_counter()
            _add(pending, {"seconds": now - last, "waited": waited})
            last = now
            if self._closes_step(position):
                bar.note = " ".join(f"{name} {value:.3f}" for name, value in values[-1].items())
                for terms in (pending, *values):
                    _add(done.sums, terms)
                done.batch, pending = position + 1, {}
                self._leave_if_asked(self._stops > 0)
        return self._means()

    def _means(self) -> dict[str, float]:
        """The epoch's row of results.csv, without the scores."""
        sums = self.progress.sums
        columns = self.objective.columns
        means = [value / self.batches / self.team.size for value in self.team.total(*(sums[name] for name in columns))]
        return dict(zip(columns.values(), means, strict=True)) | {
            "lr": self.state.optimizer.param_groups[0]["lr"],
            "seconds": sums["seconds"],
            "loading": sums["waited"] / sums["seconds"],
        }

    def train_batch(self, batch: Batch, position: int) -> list[dict[str, float]]:
        """Add the gradient of one batch; if it closes a step, take it and return the loss terms of all its batches."""
        done = self.progress
        seed = (self.settings.seed * 1_000_003 + done.epoch) * 1_000_003 + position
        torch.manual_seed(seed % 2**64)  # PyTorch takes 64 bits
        images = network_input(batch.images, self.team.device)
        if self.settings.sizes is not None:
            images = rescaled(images, self.settings, self.stride, done.epoch, position, self.batches)
        closes = self._closes_step(position)
        if self.rounding is not None:
            self.rounding.begin(done.step)
        with self.team.unsynchronised(self.objective.model, accumulates=not closes):
            terms = self.objective(images, batch.targets, batch.ignored)
            self._terms.append((position, batch.positions, torch.stack([value.detach() for value in terms.values()])))
            first = position - position % self.settings.accumulate
            group = min(self.settings.accumulate, self.batches - first)
            self.state.scaler.scale(terms["total"] / group).backward()
        return self._step() if closes else []

    def _closes_step(self, position: int) -> bool:
        """Whether the batch at a position of the epoch is the last of an optimizer step."""
        return (position + 1) % self.settings.accumulate == 0 or position + 1 == self.batches

    def _step(self) -> list[dict[str, float]]:
        """Take one optimizer step with the gradient that has been added up, or none if the gradient is not finite.

        Here the CPU waits for a GPU, once: for the norm of the gradient and the loss terms, which are returned.

        With float16 the first steps often have such a gradient, until the scaler has found its scale. They count
        nowhere: not in the schedule, the averaged weights, the sparse training, or the phases of a quantization.
        """
        optimizer, scaler, done = self.state.optimizer, self.state.scaler, self.progress
        set_step(optimizer, self.schedule, done.step)
        scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm, values = self._measured(nn.utils.get_total_norm(gradients))
        finite, limit = math.isfinite(norm), self.hyp.optimizer.clip_norm
        if finite and 0 < limit < norm:
            torch._foreach_mul_(gradients, limit / norm)
        # Not scaler.step: it calls a fused optimizer for a skipped step, too, which then goes on from a momentum that
        # was allocated and never written.
        if finite:
            if self.sparsity is not None:
                self.sparsity.add_gradient(done)
            optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if not finite:
            self._skip()
            return values
        self._skipped = 0
        if self.sparsity is not None:
            self.sparsity.shrink(done)
        done.step += 1
        self.state.average.update()
        if self.sparsity is not None:
            self.sparsity.keep_zeros(self.state.average.model)
        return values

    def _measured(self, norm: Tensor) -> tuple[float, list[dict[str, float]]]:
        """Return the norm of the gradient and the loss terms of each batch, as numbers.

        Raises:
            NumericsError: a loss is not finite in any process.
        """
        positions, pictures, terms = zip(*self._terms, strict=True)
        self._terms = []
        table = torch.stack(terms)
        sums = self.team.summed(torch.cat((table[:, 0], table.new_full((1,), bool(self.stop)))))
        length, *numbers = torch.cat((norm[None], sums, table.flatten())).tolist()
        *totals, self._stops = numbers[: len(sums)]
        names, columns = ("total", *self.objective.columns), np.reshape(numbers[len(sums) :], table.shape)
        values = [dict(zip(names, row, strict=True)) for row in columns.tolist()]
        for total, *batch in zip(totals, values, positions, pictures, strict=True):
            if not math.isfinite(total):
                self._fail(*batch)
        return length, values

    def _skip(self) -> None:
        """Count a step that was not taken.

        Raises:
            NumericsError: there is no scaler that could help, or it did not in MOST_SKIPPED steps.
        """
        self._skipped += 1
        if self._skipped >= MOST_SKIPPED or not self.state.scaler.is_enabled():
            place = f"step {self.progress.step + 1}"
            raise NumericsError(f"{place}: the gradient is not finite{self._computed()}; the last checkpoint is intact")
        _add(self.progress.sums, {"skipped": 1})

    def _computed(self) -> str:
        """In which type a loss or gradient was computed, where that may be why it is not finite."""
        return f", computed in {self.dtype} (--amp off computes in float32)" if self.dtype else ""

    def _fail(self, terms: Mapping[str, float], position: int, pictures: Tensor) -> None:
        """Stop before a step that would spoil the weights."""
        place = f"epoch {self.progress.epoch + 1}, batch {position + 1}, step {self.progress.step + 1}"
        if math.isfinite(terms["total"]):
            raise NumericsError(f"{place}: loss is not finite in another process; the last checkpoint is intact")
        values = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        files = ", ".join(str(self.train_loader.dataset.index.images[int(i)]) for i in pictures)
        raise NumericsError(
            f"{place}: loss is not finite ({values}){self._computed()}; images {files}; the last checkpoint is "
            "intact; try a smaller lr0"
        )

    def _close_epoch(self, row: dict[str, float]) -> bool:
        """Evaluate, record and save; whether the run ends here."""
        last = self.progress.epoch + 1 == self.settings.epochs
        if self.team.leads and (skipped := self.progress.sums.get("skipped")):
            log(f"epoch {self.progress.epoch + 1}: steps skipped, as float16 did not hold their gradient: {skipped:g}")
        metrics = None
        if self.val_loader is not None and (last or not self.settings.notest):
            started = time.perf_counter()
            metrics = self._evaluate(self.dtype)
            row["test_seconds"] = time.perf_counter() - started
        self._leave_if_asked()
        if metrics is not None:
            self._steer(metrics)
        self.progress.epoch, self.progress.batch, self.progress.sums = self.progress.epoch + 1, 0, {}
        ends = last
        if self.team.leads:
            self._record(row, metrics)
            ends = self.finished
            if ends or not self.settings.nosave:
                self._save()
        return self.team.any(ends)

    def _evaluate(self, dtype: torch.dtype | None) -> Metrics:
        """Return the scores of the model that is kept, with weights of a type; in float32 where 16 bits overflow.

        Only a copy of the first process's model is shared: running statistics differ between processes, and stay so.

        Raises:
            NumericsError: the network returns NaN, in float32 or in one of several processes.
            Interrupted: a signal came to any process meanwhile.
        """
        assert self.val_loader is not None  # nobody evaluates without
        loader, model = self.val_loader, fuse(self.state.kept)

        def poll(number: int, *_: object) -> None:
            if number < loader.batch_sampler.total // self.team.size:  # every process has a batch of this number
                self._leave_if_asked()

        try:
            return evaluate(
                self.team.share_model(model if dtype is None else reduced(model, dtype)),
                loader,
                self.source.names,
                device=self.team.device,
                by_size=False,
                on_batch=poll,
                gather=self.team.gather,
            ).metrics
        except NumericsError as failure:
            if dtype is None:
                raise
            if self.team.size > 1:  # the others do not know of it
                raise NumericsError(f"{failure}{self._computed()}") from None
            log(f"evaluation in {dtype}: {failure}; float32 is taken")
        return self._evaluate(None)

    def _leave_if_asked(self, signalled: bool | None = None) -> None:
        """Save and stop, all processes at the same step, if any of them got a signal; None: they are asked."""
        if not (self.team.any(bool(self.stop)) if signalled is None else signalled):
            return
        sums = self.team.gather(self.progress.sums)  # each goes on with what the first one saves, the mean
        self.progress.sums = {name: sum(part[name] for part in sums) / len(sums) for name in sums[0]}
        if self.team.leads:
            self.state.write_last(self.run, self.source)
        # Behind the save, for which all wait: as soon as one process ends, torchrun sends the others a signal.
        number = next(filter(None, self.team.gather(self.stop.signal)))
        done = self.progress
        raise Interrupted(
            number,
            f"{signal.Signals(number).name} after epoch {done.epoch}, batch {done.batch}: saved; "
            f"--resume {self.run.path} goes on",
        )

    def _record(self, row: dict[str, float], metrics: Metrics | None) -> None:
        """One row in results.csv and one line on stderr; keep what is best."""
        done = self.progress
        losses = "  ".join(f"{name} {row[name]:.3f}" for name in self.objective.columns.values())
        line = f"epoch {done.epoch}/{self.settings.epochs}  {losses}"
        if metrics is not None:
            scores = {key: getattr(metrics, key) for key in SCORES}
            row |= scores
            line += f"  P {metrics.precision:.3f}  R {metrics.recall:.3f}  AP50 {metrics.map50:.4f}"
            line += f"  AP50-95 {metrics.map50_95:.4f}"
            value = fitness(metrics.map50, metrics.map50_95)
            counts = self.rounding is None or self.rounding.complete
            # The last epoch is best with --nosave, which keeps no earlier one, with -sr, whose γ shrink to the end, and
            # where the pictures have no object to find.
            last = self.settings.nosave or self.settings.sr or not metrics.objects
            if counts and (value > done.best_fitness or last):
                done.best_fitness, done.best_epoch, done.metrics = value, done.epoch, scores
        elif self.val_loader is None:
            done.best_epoch = done.epoch
        try:
            self.results.append(done.epoch, row)
        except (OSError, ValueError) as failure:  # a table is not worth a training; another program may have changed it
            log(f"warning: {self.results.path}: epoch {done.epoch} is missing: {failure}")
        log(f"{line}  {row['seconds']:.1f} s{self._left(row)}")
        for watch in self.watchers:
            watch(done.epoch, row)

    def _left(self, row: Mapping[str, float]) -> str:
        """Return the time that the rest of the run will take at the pace of an epoch, and what follows it."""
        left, later = self.settings.epochs - self.progress.epoch, int(os.environ.get(EPOCHS_AFTER, "0"))
        seconds = row["seconds"] + row.get("test_seconds", 0.0)
        more = f", about {duration(seconds * (left + later))} with the trainings after it" if later else ""
        return f", {duration(seconds * left)} left{more}" if left else ""

    def _save(self) -> None:
        """The checkpoints of the epochs done; best.pt and best.weights if the last one is the best, or none is yet."""
        if not self.team.leads:
            return
        done = self.progress
        if done.epoch and done.best_epoch in (0, done.epoch):
            self.state.write_best(self.run, self.source, len(self.train_loader.dataset))
        self.state.write_last(self.run, self.source)


def rescaled(images: Tensor, settings: TrainSettings, stride: int, epoch: int, position: int, batches: int) -> Tensor:
    """Return a batch at the size that a multi-scale run drew for this stretch of batches.

    The run begins with the largest size, so that it runs out of memory at once or not at all. That size stays for at
    least one batch after the first optimizer step, because this step allocates the optimizer's state.

    Args:
        images: [B, C, H, W].
        settings: with the smallest and largest side in `sizes`, and the batches of a step in `accumulate`.
        stride: the sides are multiples of it.
        epoch: epochs done.
        position: of the batch in its epoch.
        batches: of an epoch.
    """
    assert settings.sizes is not None  # it is a multi-scale run
    low, high = settings.sizes
    rng = np.random.default_rng([settings.seed, epoch, position // SIZE_PERIOD])
    side = stride * int(rng.integers(-(-low // stride), high // stride + 1))
    if epoch * batches + position < max(SIZE_PERIOD, settings.accumulate + 1):
        side = high // stride * stride
    size = rescaled_size((images.shape[2], images.shape[3]), side, stride)
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def rescaled_size(size: tuple[int, int], longest: int, stride: int) -> tuple[int, int]:
    """Return height and width in about the same ratio, the longer side `longest`, in multiples of a stride."""
    height, width = (max(stride, round(side * longest / max(size) / stride) * stride) for side in size)
    return height, width


class Rounding:
    """Phases of a quantization: bounds are found first, then all is rounded, then bounds and statistics stay.

    All follows from the number of a step, so that a run that is resumed goes on as it would have.

    Args:
        models: with quantizers in their slots: the one that is trained, and its average.
        steps: optimizer steps of the run.
        warmup: share of the steps in which weights and activations have more bits.
    """

    def __init__(self, models: Sequence[Darknet], steps: int, warmup: float = 0.0) -> None:
        self._models, self._steps, self._warmup = models, steps, warmup
        # A single step finds bounds, too: frozen at 0 they would clip all that is negative or above 1.
        self._starts = (round(ROUND_FROM * steps), max(1, round(FREEZE_FROM * steps)))
        modules = (module for model in models for module in model.modules())
        self._grids = [(m, m.grid) for m in modules if isinstance(m, ActivationQuantizer | WeightQuantizer)]
        self._now: tuple[Phase, int] | None = None

    @property
    def complete(self) -> bool:
        """Whether all is rounded to the final bits, so that a score is that of the network that is kept."""
        return self._now in ((Phase.ROUNDING, 0), (Phase.FROZEN, 0))

    def begin(self, step: int) -> None:
        """Enter the phase of a step, 0 for the first one; -1: no bounds are found yet."""
        begins, freezes = self._starts
        phase = Phase.OBSERVING if step < begins else Phase.ROUNDING if step < freezes else Phase.FROZEN
        surplus = surplus_bits(self._warmup, max(0, step), self._steps)
        if (phase, surplus) == self._now:
            return
        self._now = (phase, surplus)
        for model in self._models:
            set_phase(model, phase)
        for module, grid in self._grids:
            bits = min(MOST_BITS, grid.bits + surplus)
            module.grid = dataclasses.replace(grid, bits=bits) if surplus else grid


def surplus_bits(warmup: float, step: int, steps: int) -> int:
    """Return the bits beyond the final ones at a step of a run of `steps`; none in its last step."""
    parts = min(round(warmup * steps), steps - 1)
    return 0 if step >= parts else math.ceil(EXTRA_BITS * (parts - step) / parts)


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _freeze(model: Darknet, blocks: int) -> None:
    """Leave the first blocks as they are, and those that no head reads: processes would wait for their gradients."""
    for block in unread(model.network).union(range(blocks)):
        model.layers[block].requires_grad_(False)


def _freeze_statistics(model: Darknet, blocks: int) -> None:
    for layer in model.layers[:blocks]:
        layer.eval()
        if isinstance(layer, Computing) and layer.quantize_output is not None:
            layer.quantize_output.train()  # a frozen block's output has bounds to be found, too
