"""Where a run stands, and the checkpoints that an exact resume starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import Darknet
from utils.checkpoint import write_checkpoint
from utils.darknet import weights as weights_file
from utils.darknet.cfg import format_network
from utils.errors import NumericsError
from utils.pruning.sparsity import Control
from utils.report.run_dir import RunDirectory
from utils.training.ema import AveragedModel


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
    """Loss terms and seconds, summed over those batches."""
    best_fitness: float = -1.0
    best_epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the best epoch."""
    control: Control | None = None
    """Of a sparse training with s = auto."""

    def __post_init__(self) -> None:
        if isinstance(self.control, dict):  # as a checkpoint holds it
            self.control = Control(**self.control)


class Source(NamedTuple):
    """What a checkpoint says of itself."""

    names: Sequence[str]
    lineage: Sequence[Mapping[str, Any]]
    args: Mapping[str, Any]
    hyp: Mapping[str, Any]
    plan: Mapping[str, Any]
    """What a resume needs to be the same: `data` (fingerprint), `batch` (pictures of all processes), with a teacher its
    digest."""
    kept: Mapping[str, Any] | None = None
    """Of a pruned network: where its channels come from, as `pruning.report.kept` writes it."""
    quantization: Mapping[str, Any] | None = None
    """Of a quantized network: `QuantSettings.document`."""


@dataclass
class State:
    """Everything that a training step changes."""

    model: Darknet
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    adapters: torch.nn.Module | None = None
    """What a distillation trains beside the model; it is saved for a resume only."""
    _scale: dict[str, Any] = field(default_factory=dict, init=False)
    """State of the scaler that a resumed run had, kept for the next GPU while it computes without one."""

    @property
    def kept(self) -> Darknet:
        """The model that is evaluated and kept: the averaged one where there is one."""
        return self.model if self.average is None else self.average.model

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue where a checkpoint of this run stopped."""
        self.model.load_state_dict(checkpoint["model"])
        if self.average is not None and checkpoint["ema"] is not None:
            self.average.model.load_state_dict(checkpoint["ema"])
            self.average.updates = checkpoint["ema_updates"]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self._scale = checkpoint["scaler"]
        if self.scaler.is_enabled() and self._scale:  # empty where no process before this one had a scaler
            self.scaler.load_state_dict(self._scale)
        self.progress = Progress(**checkpoint["progress"])
        if self.adapters is not None:
            self.adapters.load_state_dict(checkpoint["adapters"])

    def write_last(self, run: RunDirectory, source: Source) -> None:
        """`last.pt` with all that a resume needs; the one before it stays as `prev.pt`.

        Raises:
            NumericsError: a weight is not finite; nothing is written.
            ResourceError: the disk is full or broken; `last.pt` is as it was.
        """
        path = run.weights / "last.pt"
        write_checkpoint(path, self._complete(source), keep_previous=path.with_name("prev.pt"))

    def write_epoch(self, run: RunDirectory, source: Source) -> None:
        """`epochN.pt`, the same under a name that is not written again."""
        write_checkpoint(run.weights / f"epoch{self.progress.epoch}.pt", self._complete(source))

    def write_best(self, run: RunDirectory, source: Source, pictures: int) -> None:
        """`best.pt` and `best.weights`: the model without the state of the training.

        Args:
            run: where to.
            source: what the file says of itself.
            pictures: in an epoch, for the count of pictures seen in the Darknet file.
        """
        document = {**self._description(source), "model": _tensors(self.kept), "ema": None}
        write_checkpoint(run.weights / "best.pt", document)
        write_darknet(run.weights / "best.weights", self.kept, self.progress.epoch * pictures)

    def _complete(self, source: Source) -> dict[str, Any]:
        return {
            **self._description(source),
            "model": _tensors(self.model),
            "ema": None if self.average is None else _tensors(self.average.model),
            "ema_updates": 0 if self.average is None else self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() or self._scale,
            "adapters": {} if self.adapters is None else _tensors(self.adapters),
        }

    def _description(self, source: Source) -> dict[str, Any]:
        return {
            "cfg": format_network(self.model.network),
            "names": list(source.names),
            "lineage": [dict(entry) for entry in source.lineage],
            "args": dict(source.args),
            "hyp": dict(source.hyp),
            "plan": dict(source.plan),
            "progress": asdict(self.progress),
            "kept": source.kept,
            "quantization": source.quantization,
        }


def write_darknet(path: Path, model: Darknet, seen: int = 0) -> None:
    """Write a model as a Darknet .weights file; `seen` is the number of pictures it was trained with."""
    arrays = {key: value.detach().cpu().float().numpy() for key, value in model.state_dict().items()}
    weights_file.write(path, model.network, arrays, weights_file.Header(seen=seen))


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    broken = next((key for key, value in state.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise NumericsError(f"{broken} is not finite and is not written; the last checkpoint is intact")
    return state
