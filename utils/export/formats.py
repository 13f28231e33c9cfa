"""The formats of export.py: one function each, from a model to a file that was proved."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models import Darknet, fuse
from utils.checkpoint import load_model, model_document, write_checkpoint
from utils.detection.decode import decode
from utils.export.agreement import TOLERANCES, Agreement, onnx_agreement, picture, raw_heads
from utils.export.darknet_format import make_darknet
from utils.export.made import Made, Subject, check_same, read_back
from utils.export.request import ExportRequest
from utils.files import atomic_path, atomic_write_bytes
from utils.model_files import ModelFiles
from utils.runtime.reference import compare, parts


def emit_onnx(subject: Subject, asked: ExportRequest) -> tuple[bytes, Agreement, dict[str, object]]:
    """An ONNX file emitted from the blocks and compared in onnxruntime; how far it is off, and facts for --json."""
    import onnx

    from utils.export.codes import codes_of
    from utils.export.onnx_model import onnx_model
    from utils.runtime.onnx_file import DIGEST, digest

    fused = fuse(subject.model)
    arrays = {key: value.numpy() for key, value in fused.state_dict().items()}
    codes = codes_of(subject.model, explicit=asked.format == "tensorrt") if asked.options.int8 else None
    made = onnx_model(fused.network, arrays, subject.metadata, asked.options, codes)
    agreement = onnx_agreement(made, subject.model, subject.metadata, asked.options, codes)
    metadata = replace(subject.metadata, reference=agreement.reference)
    onnx.helper.set_model_props(made, {**metadata.properties(), DIGEST: digest(made)})
    data = made.SerializeToString()
    batch = None if asked.options.dynamic_batch else 1
    facts = {"opset": asked.options.opset, "batch": batch, "mish": asked.options.mish}
    if agreement.layers is not None:
        facts |= agreement.layers._asdict()
    return data, agreement, facts


def make_onnx(subject: Subject, asked: ExportRequest) -> Made:
    """ONNX."""
    data, agreement, facts = emit_onnx(subject, asked)
    return Made(agreement, lambda path: atomic_write_bytes(path, data), facts)


def emit_whole(subject: Subject, asked: ExportRequest) -> tuple[bytes, Agreement, dict[str, object]]:
    """An ONNX file for a converter: weights in float16 are rounded last."""
    metadata = subject.metadata
    plain = replace(metadata, precision="float32") if metadata.precision == "float16" else metadata
    return emit_onnx(subject._replace(metadata=plain), asked)


def make_openvino(subject: Subject, asked: ExportRequest) -> Made:
    """OpenVINO's own files, made of the ONNX file in memory."""
    from utils.export import openvino_format

    data, agreement, facts = emit_whole(subject, asked)
    subject = subject._replace(metadata=replace(subject.metadata, reference=agreement.reference))
    return openvino_format.make_openvino(subject, asked, data, facts)


def make_ncnn(subject: Subject, asked: ExportRequest) -> Made:
    """Files of ncnn."""
    from utils.export import ncnn

    return ncnn.make_ncnn(subject, emit_whole(subject, asked)[0])


def make_fpga(subject: Subject, asked: ExportRequest) -> Made:
    """A folder of integers, every block proved to be the simulation in float64."""
    from utils.export.fpga import make_folder, sample

    metadata = subject.metadata
    image = picture(metadata, 1) if asked.sample is None else sample(asked.sample, metadata)
    made = make_folder(subject.model, image, subject.loaded.quantization, metadata, asked.sample)
    agreement = Agreement(0.0, 0.0, 0.0, "integers in numpy against float64 in PyTorch")
    return Made(agreement, made.write, made.facts)


class _Traced(nn.Module):
    """A network as a function from a tensor to tensors."""

    def __init__(self, model: Darknet, size: tuple[int, int], decodes: bool) -> None:
        super().__init__()
        self.model, self.size, self.decodes = model, size, decodes

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Raw heads, or decoded rows."""
        heads = self.model(images).heads
        return decode(heads, self.model.network.yolos, self.size) if self.decodes else heads


def make_torchscript(subject: Subject, asked: ExportRequest) -> Made:
    """TorchScript: the folded network traced and frozen."""
    metadata = subject.metadata
    images, decodes = picture(metadata, 1), metadata.output == "rows"
    module = _Traced(fuse(subject.model), metadata.size, decodes).eval()
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # sizes become constants, as they should; and PyTorch advises torch.export
        frozen = torch.jit.freeze(torch.jit.trace(module, images, check_trace=False))
        saved = io.BytesIO()
        torch.jit.save(frozen, saved, _extra_files={"metadata.json": json.dumps(metadata.properties())})
    with torch.inference_mode():
        found = frozen(images)
    want = raw_heads(subject.model, images)
    if decodes:
        rows = decode([torch.from_numpy(head) for head in want], metadata.network.yolos, metadata.size)
        gaps = compare(parts(rows.numpy()), parts(found.numpy()))
    else:
        gaps = compare(want, [head.numpy() for head in found])
    runtime = f"TorchScript {torch.__version__}, CPU, threads: {torch.get_num_threads()}"
    agreement = Agreement(*gaps, TOLERANCES["float32"], runtime)
    agreement.check("--format torchscript")
    return Made(agreement, lambda path: atomic_write_bytes(path, saved.getbuffer()), {"batch": 1})


def make_checkpoint(subject: Subject, asked: ExportRequest) -> Made:
    """A .pt of this suite, read back and compared value by value."""
    state = {key: value.contiguous() for key, value in subject.model.state_dict().items()}
    metadata = subject.metadata
    checkpoint = model_document(state, metadata.network, metadata.names, metadata.lineage, kept=subject.loaded.kept)

    def write(path: Path) -> None:
        with atomic_path(path) as temporary:
            write_checkpoint(temporary, checkpoint)
            back = load_model(ModelFiles(None, temporary, True)).model.state_dict()
            arrays = {key: value.numpy() for key, value in state.items()}
            check_same(path, arrays, {key: value.numpy() for key, value in back.items()})

    return Made(read_back(), write, {})


FORMATS: dict[str, Callable[[Subject, ExportRequest], Made]] = {
    "onnx": make_onnx,
    "ncnn": make_ncnn,
    "openvino": make_openvino,
    "tensorrt": make_onnx,
    "torchscript": make_torchscript,
    "darknet": make_darknet,
    "pt": make_checkpoint,
    "fpga": make_fpga,
}
