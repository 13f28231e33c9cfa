"""The proof of a file: its network computes what the model computes in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet
from utils.checkpoint import LoadedModel
from utils.detection.decode import decode
from utils.errors import InfeasibleError, NumericsError
from utils.runtime.engines import Engine
from utils.runtime.exported import TOLERANCES, Arrays, Metadata, ReferenceOutputs, compare, parts, reference
from utils.runtime.exported import picture as random_pictures


class Subject(NamedTuple):
    """A network that is exported."""

    loaded: LoadedModel
    model: Darknet
    """On the network of `metadata`, in evaluation mode."""
    metadata: Metadata


@dataclass(frozen=True)
class Agreement:
    """Distance of a file from PyTorch."""

    max_abs_error: float = 0.0
    """max|a - b| over all raw heads, or over all rows."""
    error: float = 0.0
    """max|a - b| / max(1, max|a|), of the worst head."""
    tolerance: float | None = 0.0
    """None: layers with integers are compared one by one, as a step in one is carried on to the next."""
    runtime: str = f"PyTorch {torch.__version__}"
    """What ran it."""
    reference: ReferenceOutputs | None = None
    """Values that the file keeps."""

    def check(self, what: str) -> None:
        """Refuse a file that is too far off.

        Raises:
            InfeasibleError: says how far.
        """
        limit = sys.float_info.max if self.tolerance is None else self.tolerance
        if not self.error <= limit:  # NaN, too
            raise InfeasibleError(
                f"{what}: differs from PyTorch by {self.error:.3g} of the largest value, more than "
                f"{limit:g} ({self.runtime}); nothing is written"
            )


def picture(metadata: Metadata, count: int = 1) -> Tensor:
    """Random pictures of a file's size, [count, C, H, W]."""
    return torch.from_numpy(random_pictures(metadata.network, count))


@torch.inference_mode()
def raw_heads(model: Darknet, images: Tensor) -> Arrays:
    """Heads of the model in PyTorch.

    Raises:
        NumericsError: they are not finite, so that nothing can be compared.
    """
    heads = model(images).heads
    if not all(head.isfinite().all() for head in heads):
        raise NumericsError("the network puts out NaN or infinity; its weights overflow, take other ones")
    return [head.numpy() for head in heads]


def decoded(heads: Arrays, metadata: Metadata) -> Arrays:
    """Boxes and scores of the rows that raw heads stand for."""
    rows = decode([torch.from_numpy(head) for head in heads], metadata.network.yolos, metadata.size)
    return parts(rows.numpy())


def agreement(want: Arrays, outputs: Arrays, metadata: Metadata, runtime: str) -> Agreement:
    """Distance of outputs from those of PyTorch, with the tolerance of the file's precision."""
    tolerance = None if metadata.precision == "int8" else TOLERANCES[metadata.precision]
    kept = reference(want, outputs, metadata.precision)
    return Agreement(*compare(want, outputs), tolerance, runtime, kept)


def verify(what: str, subject: Subject, engine: Engine) -> Agreement:
    """Compare the raw heads or rows of a program with PyTorch.

    Args:
        what: flag that asked for the file.
        subject: the network.
        engine: the program with the file.

    Raises:
        InfeasibleError: they differ.
    """
    metadata = subject.metadata
    images = picture(metadata, engine.batch or 2)
    want, outputs = raw_heads(subject.model, images), engine(images.numpy())
    if metadata.output == "rows":
        want, outputs = decoded(want, metadata), parts(outputs[0])
    proof = agreement(want, outputs, metadata, engine.name)
    proof.check(what)
    return proof


def check_same(what: str, written: Mapping[str, NDArray[Any]], read: Mapping[str, NDArray[Any]]) -> None:
    """Refuse a file that does not give back what was put in.

    Raises:
        InfeasibleError: names the tensor.
    """
    for key, array in read.items():
        if not np.array_equal(array, written[key]):
            raise InfeasibleError(f"{what}: {key} comes back with other values; nothing is written")
