"""ONNX files of export.py: what they are is checked before a runtime gets them. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.darknet.shapes import trace
from utils.errors import WeightsError
from utils.files import regular_file
from utils.runtime.metadata import IMAGE, Metadata, read_metadata
from utils.runtime.packages import require

if TYPE_CHECKING:
    import onnx

DIGEST = "sha256"
"""Property with the digest of the graph as it was written."""


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that export.py made."""

    path: Path
    metadata: Metadata
    batch: int | None
    """Pictures it takes at a time; None: any number."""
    notes: tuple[str, ...] = ()
    """What is to be said of it."""


def digest(model: onnx.ModelProto) -> str:
    """sha256 of the graph: nodes, weights, inputs and outputs."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


def read_onnx(path: Path) -> OnnxFile:
    """Read what a file says of itself and compare it with its inputs and outputs.

    Raises:
        InputError: the package onnx is missing.
        WeightsError: damaged, made by another program, or with tensors in other files.
    """
    if not regular_file(path, WeightsError).st_size:
        raise WeightsError(f"{path}: is empty; take another copy")
    require(str(path), "onnx")
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except MemoryError:
        raise
    except Exception as failure:  # protobuf's own kinds of errors
        raise WeightsError(f"{path}: no ONNX file, or damaged ({_first_line(failure)}); take another copy") from None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise WeightsError(f"{path}: keeps tensors in other files; files of export.py do not")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    metadata = read_metadata(properties, str(path))
    batch = _check_sides(path, metadata, _sides(model.graph.input), _sides(model.graph.output))
    changed = properties.get(DIGEST) != digest(model)
    note = f"{path}: is not as export.py wrote it: changed by another program, or damaged"
    return OnnxFile(path, metadata, batch, (note,) * changed)


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0][:120]


def _sides(values: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[int | None, ...]]:
    """Sides of tensors by name; None where one may vary."""
    return {
        value.name: tuple(
            side.dim_value if side.HasField("dim_value") else None for side in value.type.tensor_type.shape.dim
        )
        for value in values
    }


def _check_sides(
    path: Path,
    metadata: Metadata,
    inputs: Mapping[str, tuple[int | None, ...]],
    outputs: Mapping[str, tuple[int | None, ...]],
) -> int | None:
    """Compare the sides of inputs and outputs with what the metadata say; returns the batch."""
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
