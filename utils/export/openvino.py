"""export.py --format openvino: OpenVINO's own files made of the ONNX file, compared before they are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from utils.errors import InfeasibleError
from utils.export.onnx_file import emit_whole
from utils.export.settings import ExportSettings
from utils.export.verify import Agreement, Subject, verify
from utils.runtime.engines import openvino_engine
from utils.runtime.exported import DIGEST, OPENVINO_SECTION, Metadata, sha256, told_as


def make_openvino(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """NAME.xml and NAME.bin.

    Raises:
        InfeasibleError: OpenVINO cannot read the ONNX file, or computes something else.
    """
    onnx, onnx_proof, facts = emit_whole(subject, settings)
    metadata, path = replace(subject.metadata, reference=onnx_proof.reference), folder / "model.xml"
    save(onnx, path, metadata)
    engine = openvino_engine(path, metadata.tensors, settings.batch, torch.get_num_threads())
    proof = verify("--format openvino", subject, engine)
    assert proof.reference is not None and metadata.reference is not None, "both were compared"
    gap, limit = proof.reference.gap, metadata.reference.limit(metadata.precision)
    if metadata.precision == "int8" and not gap <= limit:
        raise InfeasibleError(
            f"--format openvino: its integers differ from the simulation by {gap:.3g}, more than {limit:.3g} "
            f"({engine.name}); quantize with --target cpu, or take --format onnx; nothing is written"
        )
    return proof, facts


def save(onnx: bytes, path: Path, metadata: Metadata) -> None:
    """Write NAME.xml and NAME.bin, twice: the xml has the digest of the other, whose bytes do not depend on it.

    Raises:
        InfeasibleError: OpenVINO cannot run an operator.
    """
    import openvino

    version = openvino.__version__
    with told_as(InfeasibleError, f"--format openvino: OpenVINO {version} cannot read the ONNX file", RuntimeError):
        model = openvino.Core().read_model(onnx)
    model.set_rt_info(metadata.properties(), [OPENVINO_SECTION])
    weights, half = path.with_suffix(".bin"), metadata.precision == "float16"
    openvino.save_model(model, path, compress_to_fp16=half)
    model.set_rt_info(sha256(weights), [OPENVINO_SECTION, DIGEST])
    openvino.save_model(model, path, compress_to_fp16=half)
