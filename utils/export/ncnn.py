"""export.py --format ncnn: pnnx makes ncnn's files of the ONNX file; ncnn runs them before they are written."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from utils.errors import InfeasibleError
from utils.export.agreement import TOLERANCES, Agreement, picture, raw_heads
from utils.export.made import Made, Subject
from utils.files import atomic_write_bytes
from utils.runtime.engines import ncnn_engine
from utils.runtime.metadata import IMAGE, Metadata
from utils.runtime.ncnn_file import description
from utils.runtime.reference import compare, reference


def make_ncnn(subject: Subject, onnx: bytes) -> Made:
    """NAME.ncnn.param, NAME.ncnn.bin and NAME.ncnn.json.

    Args:
        subject: the network.
        onnx: its ONNX file in float32, which was proved.

    Raises:
        InfeasibleError: pnnx cannot convert it, or ncnn computes something else.
    """
    metadata = subject.metadata
    images = picture(metadata, 1)
    with tempfile.TemporaryDirectory() as folder:
        param = convert(onnx, Path(folder), metadata)
        contents = {suffix: param.with_suffix(suffix).read_bytes() for suffix in (".bin", ".param")}
        engine = ncnn_engine(param, metadata.tensors, torch.get_num_threads())
        heads = engine(images.numpy())
    want = raw_heads(subject.model, images)
    agreement = Agreement(*compare(want, heads), TOLERANCES[metadata.precision], engine.name)
    agreement.check("--format ncnn")
    metadata = replace(metadata, reference=reference(want, heads, metadata.precision))
    contents = {".json": description(metadata, contents[".param"], contents[".bin"]).encode(), **contents}

    def write(path: Path) -> None:
        for suffix, data in contents.items():  # what is named comes last: it is never without the others
            atomic_write_bytes(path.with_suffix(suffix), data)

    return Made(agreement, write, {"bytes": sum(map(len, contents.values())), "batch": 1})


def convert(onnx: bytes, folder: Path, metadata: Metadata) -> Path:
    """Let pnnx write its files into a folder; returns the .param file, whose blobs bear this suite's names.

    Raises:
        InfeasibleError: pnnx fails.
    """
    import pnnx

    (folder / "model.onnx").write_bytes(onnx)
    half = int(metadata.precision == "float16")
    command = [pnnx.EXEC_PATH, "model.onnx", f"fp16={half}"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    param = folder / "model.ncnn.param"
    if done.returncode or not param.exists():
        last = done.stdout.strip().rpartition("\n")[2]
        raise InfeasibleError(
            f"--format ncnn: pnnx {pnnx.__version__} cannot convert the ONNX file (status {done.returncode}): {last}"
        )
    names = {"in0": IMAGE} | {f"out{number}": name for number, name in enumerate(metadata.tensors)}
    param.write_text(re.sub(r"\b(in|out)\d+\b", lambda match: names[match[0]], param.read_text()))
    return param
