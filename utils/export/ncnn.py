"""export.py --format ncnn: pnnx makes ncnn's files of the ONNX file; ncnn runs them before they are written."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from utils.errors import InfeasibleError
from utils.export.onnx_file import emit_whole
from utils.export.settings import ExportSettings
from utils.export.verify import Agreement, Subject, verify
from utils.runtime.engines import ncnn_engine
from utils.runtime.exported import IMAGE, Metadata, ncnn_description


def make_ncnn(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """NAME.ncnn.param, NAME.ncnn.bin and NAME.ncnn.json.

    Raises:
        InfeasibleError: pnnx cannot convert the ONNX file, or ncnn computes something else.
    """
    metadata = subject.metadata
    onnx, *_ = emit_whole(subject, settings)
    param = convert(onnx, folder / "model.ncnn.param", metadata)
    proof = verify("--format ncnn", subject, ncnn_engine(param, metadata.tensors, torch.get_num_threads()))
    description = ncnn_description(replace(metadata, reference=proof.reference), param)
    param.with_suffix(".json").write_text(description, encoding="utf-8")
    return proof, {"batch": 1}


def convert(onnx: bytes, param: Path, metadata: Metadata) -> Path:
    """Let pnnx write a .param file and the .bin file beside it; returns the first. Blobs bear this suite's names.

    Raises:
        InfeasibleError: pnnx fails.
    """
    import pnnx

    with tempfile.TemporaryDirectory() as folder:  # it writes seven files
        made = Path(folder) / "model.ncnn.param"
        (made.parent / "model.onnx").write_bytes(onnx)
        command = [pnnx.EXEC_PATH, "model.onnx", f"fp16={int(metadata.precision == 'float16')}"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not made.exists():
            last = done.stdout.strip().rpartition("\n")[2]
            raise InfeasibleError(
                f"--format ncnn: pnnx {pnnx.__version__} cannot convert the ONNX file, status {done.returncode}: {last}"
            )
        names = {"in0": IMAGE} | {f"out{number}": name for number, name in enumerate(metadata.tensors)}
        param.write_text(re.sub(r"\b(in|out)\d+\b", lambda match: names[match[0]], made.read_text()))
        shutil.copyfile(made.with_suffix(".bin"), param.with_suffix(".bin"))
    return param
