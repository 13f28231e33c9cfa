"""The training loop: epochs of steps, an evaluation after each, checkpoints that an exact resume starts from.

What is random in a step is drawn from (seed, epoch, position) and never from a generator that runs on, so an epoch is
the same whether or not the run was interrupted before it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models import Darknet
from utils.checkpoint import write_checkpoint
from utils.darknet import weights as weights_file
from utils.darknet.cfg import format_network
from utils.darknet.shapes import max_stride
from utils.detection.losses import LossTerms, detection_loss
from utils.detection.metrics import Metrics
from utils.errors import NumericsError
from utils.evaluation import evaluate, network_input
from utils.report.run_dir import Results, RunDirectory
from utils.training.ema import AveragedModel
from utils.training.optim import Schedule, build_optimizer, set_step
from utils.training.settings import Hyperparameters, TrainSettings

COLUMNS = (
    "box_loss", "objectness_loss", "class_loss", "precision", "recall", "f1", "map50", "map50_95", "lr", "seconds",
    "loading",
)  # fmt: skip
"""Columns of results.csv after the epoch; `loading` is the share of the epoch spent waiting for data."""
SIZE_PERIOD = 10
"""Batches that a multi-scale run trains at one size, as Darknet's `random=1`."""


@dataclass
class Progress:
    """Where a run stands; all that a checkpoint needs beside tensors."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Optimizer steps done."""
    best_fitness: float = -1.0
    best_epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the best epoch."""


class Source(NamedTuple):
    """What a checkpoint says of itself."""

    names: Sequence[str]
    lineage: Sequence[Mapping[str, Any]]
    args: Mapping[str, Any]


def fitness(metrics: Metrics) -> float:
    """What `best.pt` is best at: 0.1 · AP50 + 0.9 · AP50-95."""
    return 0.1 * metrics.map50 + 0.9 * metrics.map50_95


class Trainer:
    """One run.

    Args:
        model: on `device`, with the weights to start from.
        train_loader: batches of training pictures; its data set has `set_epoch`.
        val_loader: batches of the pictures to evaluate on; None: there are none.
        hyp: hyper-parameters.
        settings: what the run is asked to do.
        run: its directory.
        source: names, lineage and flags, stored in the checkpoints.
        device: where the model is.
    """

    def __init__(
        self,
        model: Darknet,
        train_loader: DataLoader,
        val_loader: DataLoader | None,
        hyp: Hyperparameters,
        settings: TrainSettings,
        run: RunDirectory,
        source: Source,
        device: torch.device,
    ) -> None:
        self.model, self.train_loader, self.val_loader = model, train_loader, val_loader
        self.hyp, self.settings, self.run, self.source, self.device = hyp, settings, run, source, device
        self.schedule = Schedule(hyp.optimizer, settings.epochs, len(train_loader), settings.accumulate)
        _freeze(model, settings.freeze)
        self.optimizer = build_optimizer(model, hyp.optimizer, settings.adam)
        self.average = AveragedModel(model, self.schedule.ema_decay) if settings.average else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.progress = Progress()
        self.results = Results(run.file("results.csv"), COLUMNS)

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue where a checkpoint of this run stopped."""
        self.model.load_state_dict(checkpoint["model"])
        if self.average is not None and checkpoint["ema"] is not None:
            self.average.model.load_state_dict(checkpoint["ema"])
            self.average.updates = checkpoint["ema_updates"]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.progress = Progress(**checkpoint["progress"])

    def train(self) -> Progress:
        """Run the epochs that are left.

        Raises:
            NumericsError: the loss is not finite; the step is not taken.
        """
        for epoch in range(self.progress.epoch, self.settings.epochs):
            row = self._train_epoch(epoch)
            last = epoch + 1 == self.settings.epochs
            metrics = self._evaluate() if self.val_loader is not None and (self.settings.test or last) else None
            self._record(epoch, row, metrics)
            stop = self._out_of_patience()
            if self.settings.save or last or stop:
                self._save(epoch)
            if stop:
                break
        return self.progress

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training pictures; the epoch's means."""
        torch.manual_seed(self.settings.seed * 1_000_003 + epoch)
        self.train_loader.dataset.set_epoch(epoch)
        self.model.train()
        _freeze_statistics(self.model, self.settings.freeze)
        totals, waited, started = np.zeros(3), 0.0, time.perf_counter()
        bar = tqdm(self.train_loader, desc=f"epoch {epoch + 1}/{self.settings.epochs}", file=sys.stderr, disable=None,
                   leave=False)  # fmt: skip
        asked = time.perf_counter()
        for position, batch in enumerate(bar):
            waited += time.perf_counter() - asked
            images = self._resize(network_input(batch.images, self.device), epoch, position)
            terms = self._loss(images, batch.targets.to(self.device))
            values = {name: float(value.detach()) for name, value in terms._asdict().items()}
            self._check(values, epoch, position, batch)
            self._backward(terms.total, position)
            totals += list(values.values())[1:]
            bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in values.items()))
            asked = time.perf_counter()
        seconds = time.perf_counter() - started
        box, objectness, classes = totals / len(self.train_loader)
        rate = self.optimizer.param_groups[0]["lr"]
        return {"box_loss": box, "objectness_loss": objectness, "class_loss": classes, "lr": rate,
                "seconds": seconds, "loading": waited / seconds}  # fmt: skip

    def _loss(self, images: Tensor, targets: Tensor) -> LossTerms:
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            heads = self.model(images).heads
        size = (images.shape[-2], images.shape[-1])
        return detection_loss(heads, targets, self.model.network.yolos, size, self.hyp.loss)

    def _backward(self, loss: Tensor, position: int) -> None:
        """Add a batch's gradient; step when the accumulated batches are complete."""
        count = self.settings.accumulate
        start = position - position % count
        group = min(count, len(self.train_loader) - start)
        self.scaler.scale(loss / group).backward()
        if position + 1 < start + group:
            return
        set_step(self.optimizer, self.schedule, self.progress.step)
        self.scaler.unscale_(self.optimizer)
        limit = self.hyp.optimizer.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if not (math.isfinite(norm) or self.scaler.is_enabled()):  # with a scaler, such a step is skipped
            raise NumericsError(
                f"step {self.progress.step + 1}: the gradient is not finite; the last checkpoint is intact"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        if self.average is not None:
            self.average.update(self.model)

    def _resize(self, images: Tensor, epoch: int, position: int) -> Tensor:
        """The batch at the size that a multi-scale run drew for this stretch of batches."""
        if self.settings.sizes is None:
            return images
        low, high = self.settings.sizes
        stride = max_stride(self.model.network)
        rng = np.random.default_rng([self.settings.seed, epoch, position // SIZE_PERIOD])
        side = stride * int(rng.integers(-(-low // stride), high // stride + 1))
        longest = max(images.shape[2:])
        size = [max(stride, round(old * side / longest / stride) * stride) for old in images.shape[2:]]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def _check(self, terms: Mapping[str, float], epoch: int, position: int, batch: Any) -> None:
        """Stop before a step that would spoil the weights."""
        if math.isfinite(terms["total"]):
            return
        values = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        files = [str(self.train_loader.dataset.index.images[int(i)]) for i in batch.positions[:4]]
        raise NumericsError(
            f"epoch {epoch + 1}, batch {position + 1}, step {self.progress.step + 1}: loss is not finite ({values}); "
            f"pictures {', '.join(files)}…; the last checkpoint is intact; try a smaller lr0"
        )

    def _evaluate(self) -> Metrics:
        model = self.model if self.average is None else self.average.model
        return evaluate(
            model,
            self.val_loader,
            self.source.names,
            device=self.device,
            conf_thres=self.settings.conf_thres,
            iou_thres=self.settings.iou_thres,
            by_size=False,
        ).metrics

    def _record(self, epoch: int, row: dict[str, float], metrics: Metrics | None) -> None:
        """One row in results.csv and one line on stderr; keep what is best."""
        self.progress.epoch = epoch + 1
        losses = "  ".join(f"{name} {row[name]:.3f}" for name in COLUMNS[:3])
        line = f"epoch {epoch + 1}/{self.settings.epochs}  {losses}"
        if metrics is not None:
            scores = {key: getattr(metrics, key) for key in ("precision", "recall", "f1", "map50", "map50_95")}
            row |= scores
            line += f"  P {metrics.precision:.3f}  R {metrics.recall:.3f}  AP50 {metrics.map50:.4f}"
            line += f"  AP50-95 {metrics.map50_95:.4f}"
            value = fitness(metrics)
            if value > self.progress.best_fitness or not self.settings.save:
                self.progress.best_fitness, self.progress.best_epoch = value, epoch + 1
                self.progress.metrics = scores
        elif self.val_loader is None:
            self.progress.best_epoch = epoch + 1
        self.results.append(epoch + 1, row)
        print(f"{line}  {row['seconds']:.1f} s", file=sys.stderr, flush=True)

    def _out_of_patience(self) -> bool:
        waited = self.progress.epoch - self.progress.best_epoch
        return self.settings.patience > 0 and self.progress.best_epoch > 0 and waited >= self.settings.patience

    def _save(self, epoch: int) -> None:
        """last.pt with all that a resume needs; best.pt and best.weights when this epoch is the best."""
        folder = self.run.weights
        best = self.progress.best_epoch in (0, epoch + 1)
        if best:
            model = self.model if self.average is None else self.average.model
            write_checkpoint(folder / "best.pt", {**self._description(), "model": _tensors(model), "ema": None})
            write_darknet(folder / "best.weights", model, self.progress.epoch * len(self.train_loader.dataset))
        state = {
            "model": _tensors(self.model),
            "ema": None if self.average is None else _tensors(self.average.model),
            "ema_updates": 0 if self.average is None else self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        write_checkpoint(folder / "last.pt", {**self._description(), **state}, keep_previous=folder / "prev.pt")
        if self.settings.save_period and (epoch + 1) % self.settings.save_period == 0:
            write_checkpoint(folder / f"epoch{epoch + 1}.pt", {**self._description(), **state})

    def _description(self) -> dict[str, Any]:
        return {
            "cfg": format_network(self.model.network),
            "names": list(self.source.names),
            "lineage": [dict(entry) for entry in self.source.lineage],
            "args": dict(self.source.args),
            "hyp": self.hyp.flat,
            "progress": vars(self.progress).copy(),
        }


def write_darknet(path: Path, model: Darknet, seen: int = 0) -> None:
    """Write a model as a Darknet .weights file; `seen` is the number of pictures it was trained with."""
    arrays = {key: value.detach().cpu().float().numpy() for key, value in model.state_dict().items()}
    weights_file.write(path, model.network, arrays, weights_file.Header(seen=seen))


def _tensors(model: Darknet) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}


def _freeze(model: Darknet, blocks: int) -> None:
    for layer in model.layers[:blocks]:
        layer.requires_grad_(False)


def _freeze_statistics(model: Darknet, blocks: int) -> None:
    for layer in model.layers[:blocks]:
        layer.eval()
