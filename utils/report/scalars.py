"""`events.out.tfevents.*`: the columns of results.csv and histograms, for TensorBoard.

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

import numpy as np
from numpy.typing import ArrayLike, NDArray

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

LEAST, GROWTH = 1e-7, 1.1
"""Limits of the buckets of a histogram: 0, and on both sides of it this magnitude and those that follow, by factors."""


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

    def histogram(self, epoch: int, tag: str, values: ArrayLike) -> None:
        """Write how the values of one epoch are distributed.

        Args:
            epoch: 1 and later.
            tag: name of the histogram, e.g. `gamma/all`.
            values: of any shape. NaN and infinite ones are left out; without any other, nothing is written.
        """
        values = np.asarray(values, np.float64).ravel()
        values = values[np.isfinite(values)]
        if values.size:
            self._write({"step": epoch, "summary": {"value": [{"tag": tag, "histo": _histogram(values)}]}})

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


def _histogram(values: NDArray[np.float64]) -> dict[str, Any]:
    """Fields of `tensorboard.compat.proto.histogram_pb2.HistogramProto` for values [n], n > 0, finite.

    `bucket[i]` counts the values from `bucket_limit[i - 1]` (of the first: from `min`) to below `bucket_limit[i]`.
    """
    least, most = float(values.min()), float(values.max())
    powers = int(np.ceil(np.log(max(abs(least), abs(most), LEAST) / LEAST) / np.log(GROWTH))) + 1
    magnitudes = LEAST * GROWTH ** np.arange(powers + 1)
    limits = np.concatenate([-magnitudes[::-1], [0.0], magnitudes])
    first, last = np.searchsorted(limits, [least, most], side="right")
    counts, _ = np.histogram(values, limits[first - 1 : last + 1])
    return {
        "min": least,
        "max": most,
        "num": values.size,
        "sum": float(values.sum()),
        "sum_squares": float((values**2).sum()),
        "bucket_limit": limits[first : last + 1].tolist(),
        "bucket": counts.tolist(),
    }


def _records(*events: Mapping[str, Any]) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    stream = io.BytesIO()
    records = RecordWriter(stream)
    for event in events:
        records.write(Event(wall_time=time.time(), **event).SerializeToString())
    return stream.getvalue()
