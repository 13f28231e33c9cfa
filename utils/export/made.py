"""What goes into a format of export.py, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from models import Darknet
from utils.checkpoint import LoadedModel
from utils.darknet.blocks import Network
from utils.errors import InfeasibleError
from utils.export.agreement import Agreement
from utils.runtime.metadata import Metadata


class Subject(NamedTuple):
    """What is exported."""

    loaded: LoadedModel
    model: Darknet
    """On the network of `metadata`, in evaluation mode."""
    metadata: Metadata


class Made(NamedTuple):
    """A file that can be written."""

    agreement: Agreement
    write: Callable[[Path], None]
    """Writes it and those that belong to it (`request.COMPANIONS`) but a cfg."""
    facts: Mapping[str, Any]
    """What --json says of the format."""
    network: Network | None = None
    """What the cfg beside it describes; None: the network of the subject."""


def read_back() -> Agreement:
    """Of a file that gives back what was put in."""
    return Agreement(0.0, 0.0, 0.0, f"PyTorch {torch.__version__}")


def check_same(path: Path, written: Mapping[str, np.ndarray], read: Mapping[str, np.ndarray]) -> None:
    """Refuse a file that does not give back what was put in.

    Raises:
        InfeasibleError: names the tensor.
    """
    for key, array in read.items():
        if not np.array_equal(array, written[key]):
            raise InfeasibleError(f"{path}: {key} comes back with other values; nothing is written")
