"""export.py --format ncnn: the three files, compared in ncnn before they are written."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from models import fuse
from utils.export.agreement import TOLERANCES, Agreement, picture, raw_heads
from utils.export.made import Made, Subject
from utils.export.ncnn_blocks import ncnn_files
from utils.export.onnx_model import check_half
from utils.export.request import ExportRequest
from utils.files import atomic_write_bytes
from utils.runtime.engines import ncnn_engine
from utils.runtime.ncnn_file import description
from utils.runtime.reference import compare, reference


def make_ncnn(subject: Subject, asked: ExportRequest) -> Made:
    """Layers and weights of ncnn, emitted from the blocks and compared in ncnn.

    Raises:
        InfeasibleError: ncnn computes something else, or a weight is too large for float16.
    """
    metadata, fused = subject.metadata, fuse(subject.model)
    arrays = {key: value.numpy() for key, value in fused.state_dict().items()}
    half = metadata.precision == "float16"
    if half:
        check_half(fused.network, arrays)
    made = ncnn_files(fused.network, arrays, half=half)
    param = made.param.encode()
    contents = {".bin": made.weights, ".param": param}
    images = picture(metadata, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.param"
        for suffix, data in contents.items():
            path.with_suffix(suffix).write_bytes(data)
        engine = ncnn_engine(path, metadata.tensors, torch.get_num_threads())
        found = engine(images.numpy())
    want = raw_heads(subject.model, images)
    agreement = Agreement(*compare(want, found), TOLERANCES[metadata.precision], engine.name)
    agreement.check("--format ncnn")
    metadata = replace(metadata, reference=reference(want, found, metadata.precision))
    contents = {".json": description(metadata, param, made.weights).encode(), **contents}

    def write(path: Path) -> None:
        for suffix, data in contents.items():  # what is named comes last: it is never without the others
            atomic_write_bytes(path.with_suffix(suffix), data)

    return Made(agreement, write, {"bytes": sum(map(len, contents.values())), "batch": 1})
