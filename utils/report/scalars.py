"""`events.out.tfevents.*`: the columns of results.csv, for TensorBoard.

The records are written here and not by `torch.utils.tensorboard`, whose writer works in a thread of its own: what fails
there ends in a traceback that nobody can catch. Format and messages are the package tensorboard's.
"""

from __future__ import annotations

import importlib.util
import io
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """Say how to get the package tensorboard where it is missing.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: needs the package tensorboard; pip install tensorboard")


class Scalars:
    """One run's events. A write that fails is told once, and the run goes on without them.

    Args:
        folder: run directory.
        first: the epoch that comes first; what older files of the folder say of it and of later ones is not shown.
    """

    def __init__(self, folder: Path, first: int = 1) -> None:
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
        self._writes = True
        start = {"status": "START"}
        self._write({"file_version": "brain.Event:2"}, {"step": first, "session_log": start})

    def append(self, epoch: int, row: Mapping[str, float | None]) -> None:
        """Write the values of one epoch; a column without a value, or with None, is left out."""
        values = [
            {"tag": TAGS.get(column, f"run/{column}"), "simple_value": float(value)}
            for column, value in row.items()
            if value is not None
        ]
        self._write({"step": epoch, "summary": {"value": values}})

    def _write(self, *events: Mapping[str, Any]) -> None:
        """Append events, given by the fields of `tensorboard.compat.proto.event_pb2.Event`, as one write."""
        if not self._writes:
            return
        try:
            with self.path.open("ab") as file:
                file.write(_records(*events))
        except OSError as failure:
            self._writes = False
            log(f"warning: {self.path}: {failure.strerror}; the run goes on without TensorBoard's events")


def _records(*events: Mapping[str, Any]) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    stream = io.BytesIO()
    records = RecordWriter(stream)
    for event in events:
        records.write(Event(wall_time=time.time(), **event).SerializeToString())
    return stream.getvalue()
