"""ONNX files of export.py: what they are is checked before a runtime gets them. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import WeightsError
from utils.files import regular_file
from utils.runtime.exported import DIGEST, ExportedFile, Sides, changed, check_sides
from utils.runtime.metadata import read_metadata
from utils.runtime.packages import require

if TYPE_CHECKING:
    import onnx


def digest(model: onnx.ModelProto) -> str:
    """sha256 of the graph: nodes, weights, inputs and outputs."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


def read_onnx(path: Path) -> ExportedFile:
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
    batch = check_sides(path, metadata, _sides(model.graph.input), _sides(model.graph.output))
    other = properties.get(DIGEST) != digest(model)
    return ExportedFile(path, metadata, batch, (changed(path),) * other)


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0][:120]


def _sides(values: Sequence[onnx.ValueInfoProto]) -> Sides:
    """Sides of tensors by name; None where one may vary."""
    return {
        value.name: tuple(
            side.dim_value if side.HasField("dim_value") else None for side in value.type.tensor_type.shape.dim
        )
        for value in values
    }
