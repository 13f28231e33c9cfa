"""The weights a training starts from, where it stands, and the checkpoints that an exact resume goes on from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import Darknet
from utils.checkpoint import (
    check_state,
    link_file,
    load_model,
    model_document,
    origin,
    read_checkpoint,
    write_checkpoint,
    write_darknet,
)
from utils.cli import log
from utils.darknet import weights as weights_file
from utils.darknet.network import tensors
from utils.errors import CheckpointError, NumericsError, WeightsError
from utils.files import foreign_errors
from utils.flags import ModelFiles, other_classes
from utils.report.run_dir import RunDirectory
from utils.training.optimizer import AveragedModel
from utils.training.sparsity import Control

STATE_KEYS = ("optimizer", "ema", "scaler", "ema_updates", "progress", "lineage", "plan")
"""What a checkpoint of a training has beside a model."""


@dataclass
class Progress:
    """Where a run stands; all that a checkpoint needs beside tensors."""

    epoch: int = 0
    """Epochs done."""
    batch: int = 0
    """Batches done of the epoch after those; always at the end of an optimizer step."""
    step: int = 0
    """Optimizer steps done."""
    sums: dict[str, float] = field(default_factory=dict)
    """Loss terms and seconds, summed over those batches; in a file the mean of all processes."""
    best_fitness: float = -1.0
    best_epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the best epoch."""
    control: Control | None = None
    """Of a sparse training with s = auto."""
    start_map50: float | None = None
    """AP50 before the first step; None: new weights, or not measured."""

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> Progress:
        """Return the progress that a checkpoint holds; older versions had more entries in the control."""
        control = stored.get("control")
        if control is not None:
            known = {entry.name for entry in fields(Control)}
            control = Control(**{name: value for name, value in control.items() if name in known})
        return cls(**{**stored, "control": control})


class Source(NamedTuple):
    """What a checkpoint says of itself."""

    names: Sequence[str]
    lineage: Sequence[Mapping[str, Any]]
    args: Mapping[str, Any]
    hyp: Mapping[str, Any]
    plan: Mapping[str, Any]
    """What a resume needs to be the same: `data` (fingerprint), `batch` (pictures of all processes), with a teacher its
    digest."""
    quantization: Mapping[str, Any] | None = None


@dataclass
class State:
    """Everything that a training step changes."""

    model: Darknet
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    _scale: dict[str, Any] = field(default_factory=dict, init=False)
    """State of the scaler that a resumed run had, kept for the next GPU while it computes without one."""

    @property
    def kept(self) -> Darknet:
        """The model that is evaluated and kept: the averaged one."""
        return self.average.model

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue where a checkpoint of this run stopped.

        Raises:
            ValueError, KeyError, RuntimeError: the state of optimizer or scaler is of another training.
        """
        self.model.load_state_dict(checkpoint["model"])
        self.average.model.load_state_dict(checkpoint["ema"])
        self.average.updates = checkpoint["ema_updates"]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            shapes = {value.shape for value in moments.values() if isinstance(value, Tensor)}
            if shapes - {torch.Size(), parameter.shape}:
                raise ValueError(f"moments of another shape than {tuple(parameter.shape)}")
        self._scale = checkpoint["scaler"]
        if self.scaler.is_enabled() and self._scale:  # empty where no process before this one had a scaler
            self.scaler.load_state_dict(self._scale)
        self.progress = Progress.restored(checkpoint["progress"])

    def write_last(self, run: RunDirectory, source: Source) -> None:
        """Write `last.pt` with all that a resume needs; the one before it stays as `prev.pt`.

        Raises:
            NumericsError: a weight is not finite; nothing is written.
            ResourceError: the disk is full or broken; `last.pt` is as it was.
        """
        path = run.weights / "last.pt"
        write_checkpoint(path, self.complete(source), keep_previous=path.with_name("prev.pt"))

    def write_best(self, run: RunDirectory, source: Source, pictures: int) -> None:
        """Write `best.pt` and `best.weights`: the model without the state of the training.

        Args:
            run: where to.
            source: what the file says of itself.
            pictures: in an epoch, for the count of pictures in the Darknet file.

        Raises:
            NumericsError, ResourceError: as of `write_last`.
        """
        write_checkpoint(run.weights / "best.pt", self._document(self.kept, source))
        write_darknet(run.weights / "best.weights", self.kept, self.progress.epoch * pictures)

    def complete(self, source: Source) -> dict[str, Any]:
        """Return the content of `last.pt`."""
        return self._document(self.model, source) | {
            "ema": _tensors(self.average.model),
            "ema_updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() or self._scale,
        }

    def _document(self, model: Darknet, source: Source) -> dict[str, Any]:
        return model_document(_tensors(model), model.network, **source._asdict(), progress=asdict(self.progress))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    broken = next((key for key, value in state.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise NumericsError(f"{broken} is not finite and is not written; the last checkpoint is intact")
    return state


class Start(NamedTuple):
    """A model ready to be trained."""

    model: Darknet
    lineage: tuple[Mapping[str, Any], ...] = ()
    """What the weights were made from, oldest first; empty for new ones."""
    checkpoint: Mapping[str, Any] | None = None
    """Of the run that goes on; None for a new run."""


def initial_model(files: ModelFiles, pretrained: bool) -> Start:
    """Return the network with new weights, or with those of a file; what was loaded is logged.

    Args:
        files: the network, adapted to the data, and perhaps weights.
        pretrained: `-pt`: accept a backbone file, and heads of another class count, which start with new weights.

    Raises:
        WeightsError: the file does not fit.
    """
    assert files.network is not None  # train.py has found one
    model = Darknet(files.network)
    if files.weights is None:
        log("new weights")
        return Start(model)
    if files.is_checkpoint:
        return _from_checkpoint(model, files, pretrained)
    contents = weights_file.check(files.weights, files.network, partial=pretrained)
    arrays = weights_file.read(files.weights, files.network, partial=pretrained)
    _copy(model, {key: torch.from_numpy(array) for key, array in arrays.items()})
    log(f"{files.weights}: {contents}")
    return Start(model, (origin(files.weights),))


def _from_checkpoint(model: Darknet, files: ModelFiles, pretrained: bool) -> Start:
    loaded = load_model(files)
    assert loaded.path is not None  # it is a checkpoint
    network = loaded.model.network
    state = {key: value for key, value in loaded.model.state_dict().items() if "quantize_" not in key}
    note = f"{files.weights}: all {len(network.blocks)} layers loaded"
    if network.classes != model.network.classes:
        if not pretrained:
            raise other_classes(loaded.path, network.classes, model.network.classes)
        pairs = zip(tensors(network), tensors(model.network), strict=True)
        heads = dict.fromkeys(spec.block for spec, other in pairs if spec != other)  # and what else reads them
        state = {key: value for key, value in state.items() if int(key.split(".")[1]) not in heads}  # layers.BLOCK.…
        note += f" but the heads of {network.classes} classes (layers {', '.join(map(str, heads))}), which start anew"
    if loaded.quantization is not None:
        target = loaded.quantization.target
        note += f"; it was quantized with --target {target}: its weights before rounding are taken, and nothing else"
    _copy(model, state)
    log(note)
    return Start(model, tuple(dict(entry) for entry in loaded.lineage()))


def _copy(model: Darknet, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model; what the state does not have stays."""
    targets = model.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            targets[key].copy_(value)


def resumable(folder: Path, model: Darknet) -> dict[str, Any]:
    """Return the checkpoint that a run goes on from: `last.pt`, or `prev.pt` where that cannot be used.

    A `last.pt` that cannot be used is kept as `damaged.pt`, so that the next save does not make it the `prev.pt`.

    Args:
        folder: the run's folder of weights.
        model: of the run's network.

    Raises:
        CheckpointError: both are damaged, of another network, or without the state of a training.
    """
    last, previous = folder / "last.pt", folder / "prev.pt"
    reasons: list[str] = []
    for path in filter(Path.exists, (last, previous)):
        try:
            checkpoint = _training_state(path, model)
        except (WeightsError, CheckpointError) as failure:
            reasons.append(str(failure))
            continue
        if reasons:
            log(f"{reasons[0]}; going on from {previous}")
            os.replace(last, folder / "damaged.pt")
            link_file(previous, last)
        return checkpoint
    raise CheckpointError("; and ".join(reasons))


def _training_state(path: Path, model: Darknet) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    missing = [key for key in STATE_KEYS if checkpoint.get(key) is None]
    if missing:
        raise CheckpointError(f"{path}: has no {missing[0]!r}, so no training can go on from it")
    for part in ("model", "ema"):
        check_state(checkpoint[part], model, path)
    with foreign_errors(path, "no progress of a training", CheckpointError):
        Progress.restored(checkpoint["progress"])
    return checkpoint
