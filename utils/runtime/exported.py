"""What is known of a file of export.py before a runtime gets it, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils import files
from utils.darknet.network import trace
from utils.errors import WeightsError
from utils.files import regular_file
from utils.runtime.metadata import IMAGE, Metadata

DIGEST = "sha256"
"""Property with the digest of what was written."""

Sides = Mapping[str, tuple[int | None, ...]]
"""Of tensors by name; None where a side may vary."""


@dataclass(frozen=True)
class ExportedFile:
    """A file that export.py made."""

    path: Path
    metadata: Metadata
    batch: int | None
    """Pictures it takes at a time; None: any number."""
    notes: tuple[str, ...] = ()
    """What is to be said of it."""


def sha256(path: Path) -> str:
    """Digest of a file.

    Raises:
        WeightsError: it is no regular file.
    """
    regular_file(path, WeightsError)
    return files.sha256(path)


def changed(path: Path) -> str:
    """Note on a file whose digest is another than when it was written."""
    return f"{path}: is not as export.py wrote it: changed by another program, or damaged"


def check_sides(path: Path, metadata: Metadata, inputs: Sides, outputs: Sides) -> int | None:
    """Compare the sides of inputs and outputs with what the metadata say; returns the batch.

    Raises:
        WeightsError: they differ.
    """
    network = metadata.network
    image = (network.net.channels, *metadata.size)
    batch = (inputs.get(IMAGE) or (0,))[0]
    expected = {"rows": [], "detections": []}.get(metadata.output)
    if expected is None:
        shapes = trace(network)
        expected = [tuple(shapes[head]) for head in network.heads]
    found = [outputs[name][1:] for name in metadata.tensors if name in outputs]
    fits = len(found) == len(outputs) == len(metadata.tensors) and found[: len(expected)] == expected
    if list(inputs) != [IMAGE] or inputs[IMAGE][1:] != image or batch not in (None, 1) or not fits:
        raise WeightsError(f"{path}: its inputs and outputs are not those its metadata describe; damaged or changed")
    return batch
