"""Files of export.py: what they are is checked before a runtime gets them. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils import files
from utils.cli import require
from utils.errors import WeightsError
from utils.files import read_text, regular_file
from utils.runtime.engines import told_as
from utils.runtime.metadata import IMAGE, Metadata, read_metadata

if TYPE_CHECKING:
    import onnx

DIGEST = "sha256"
"""Property with the digest of what was written."""
OPENVINO_SECTION = "darknet"
"""Of rt_info, where the metadata are."""
CFG = "cfg"
"""The property that is no JSON."""
HASHED = (".param", ".bin")
"""Files of ncnn whose digests are in the third, NAME.json."""


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


def graph_digest(model: onnx.ModelProto) -> str:
    """sha256 of the graph: nodes, weights, inputs and outputs."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


def read_onnx(path: Path) -> ExportedFile:
    """An ONNX file; its metadata are compared with its inputs and outputs.

    Raises:
        InputError: the package onnx is missing.
        WeightsError: damaged, made by another program, or with tensors in other files.
    """
    if not regular_file(path, WeightsError).st_size:
        raise WeightsError(f"{path}: is empty; take another copy")
    require(str(path), "onnx")
    import onnx

    with told_as(WeightsError, f"{path}: no ONNX file, or damaged; take another copy"):  # protobuf's own exceptions
        model = onnx.load(str(path), load_external_data=False)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise WeightsError(f"{path}: keeps tensors in other files; files of export.py do not")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    inputs = {}
    for value in model.graph.input:
        sides = value.type.tensor_type.shape.dim
        inputs[value.name] = [side.dim_value if side.HasField("dim_value") else None for side in sides]
    outputs = [value.name for value in model.graph.output]
    return _described(path, path, graph_digest(model), properties, inputs, outputs)


def read_openvino(path: Path) -> ExportedFile:
    """OpenVINO's NAME.xml, with the metadata in its rt_info, and its weights in NAME.bin.

    Raises:
        InputError: the package openvino is missing.
        WeightsError: damaged, made by another program, or without its weights.
    """
    regular_file(path, WeightsError)
    weights = path.with_suffix(".bin")
    digest = sha256(weights)
    require(str(path), "openvino")
    import openvino

    with told_as(WeightsError, f"{path}: no OpenVINO file, or damaged; take another copy", RuntimeError):
        model = openvino.Core().read_model(str(path))
    section = model.get_rt_info([OPENVINO_SECTION]).value if model.has_rt_info([OPENVINO_SECTION]) else {}
    entries = section.items() if isinstance(section, dict) else ()
    properties = {key: str(getattr(value, "value", value)) for key, value in entries}
    inputs = {}
    for port in model.inputs:
        sides = port.partial_shape
        inputs[port.get_any_name()] = [side.get_length() if side.is_static else None for side in sides]
    outputs = [port.get_any_name() for port in model.outputs]
    return _described(path, weights, digest, properties, inputs, outputs)


def _described(
    path: Path,
    hashed: Path,
    digest: str,
    properties: Mapping[str, str],
    inputs: Mapping[str, list[int | None]],
    outputs: Collection[str],
) -> ExportedFile:
    """The file that its properties describe, compared with the sides of its inputs and the names of its outputs.

    Raises:
        WeightsError: they differ.
    """
    metadata = read_metadata(properties, str(path))
    batch, *sides = inputs.get(IMAGE) or [0]
    image = [metadata.network.net.channels, *metadata.size]
    fits = len(inputs) == 1 and sides == image and sorted(outputs) == sorted(metadata.tensors)
    if not fits or batch not in (None, 1):
        raise WeightsError(f"{path}: its inputs and outputs are not those its metadata describe; damaged or changed")
    note = f"{hashed}: is not as export.py wrote it: changed by another program, or damaged"
    return ExportedFile(path, metadata, batch, () if properties.get(DIGEST) == digest else (note,))


def ncnn_description(metadata: Metadata, param: Path) -> str:
    """Text of NAME.json: the metadata as one document, with the digests of NAME.param and NAME.bin."""
    properties = {key: text if key == CFG else json.loads(text) for key, text in metadata.properties().items()}
    digests = {suffix: sha256(param.with_suffix(suffix)) for suffix in HASHED}
    return json.dumps({**properties, DIGEST: digests}, ensure_ascii=False, indent=1) + "\n"


def read_ncnn(path: Path) -> ExportedFile:
    """Ncnn's NAME.param and NAME.bin, compared with NAME.json: ncnn itself does not notice damage.

    Raises:
        WeightsError: a file is missing, damaged, or another than was written.
    """
    regular_file(path, WeightsError)
    beside = path.with_suffix(".json")
    if not beside.exists():
        raise WeightsError(
            f"{beside}: no such file, and it says what {path.name} is: export.py --format ncnn writes three files "
            "that belong together"
        )
    text = read_text(beside, WeightsError)
    try:
        document = json.loads(text)
        digests = {suffix: document[DIGEST][suffix] for suffix in HASHED}
        properties = {key: value if key == CFG else json.dumps(value) for key, value in document.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as failure:
        raise WeightsError(f"{beside}: damaged ({type(failure).__name__}: {failure}); export again") from None
    for suffix, digest in digests.items():
        if sha256(file := path.with_suffix(suffix)) != digest:
            raise WeightsError(f"{file}: is not as export.py wrote it: changed, or damaged; export again")
    metadata = read_metadata(properties, str(beside))
    if metadata.output != "heads":
        raise WeightsError(f"{beside}: its metadata are damaged: ncnn files put out raw heads")
    return ExportedFile(path, metadata, 1)
