"""`events.out.tfevents.*`: the columns of results.csv and histograms, for TensorBoard.

Summaries are those of `torch.utils.tensorboard`. Its SummaryWriter is not used: it writes in a thread, which prints a
traceback of its own when a write fails.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from utils.cli import log
from utils.errors import InputError

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


def require_tensorboard() -> None:
    """Refuse --tensorboard where its package is missing.

    Raises:
        InputError: says how to get it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: needs the package tensorboard; pip install tensorboard")


class Scalars:
    """Events of a run. A write that fails is logged once, and the run goes on without them.

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
