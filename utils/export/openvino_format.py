"""export.py --format openvino: OpenVINO's own files made of the ONNX file, compared before they are written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from utils.detection.decode import decode
from utils.errors import InfeasibleError
from utils.export.agreement import TOLERANCES, Agreement, picture, raw_heads
from utils.export.made import Made, Subject
from utils.export.request import ExportRequest
from utils.files import atomic_write_bytes
from utils.runtime.engines import OPENVINO_PLACES, Engine, first_line, openvino_engine
from utils.runtime.exported import DIGEST, sha256
from utils.runtime.metadata import Metadata
from utils.runtime.openvino_file import SECTION
from utils.runtime.reference import compare, parts, relative


def make_openvino(subject: Subject, asked: ExportRequest, onnx: bytes, facts: dict[str, object]) -> Made:
    """NAME.xml and NAME.bin.

    Args:
        subject: the network.
        asked: what was asked for.
        onnx: its ONNX file, which was proved.
        facts: what --json says of that.

    Raises:
        InfeasibleError: OpenVINO cannot read it, or computes something else.
    """
    metadata, batch = subject.metadata, None if asked.options.dynamic_batch else 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        save(onnx, path, metadata)
        contents = {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".bin", ".xml")}
        engine = openvino_engine(path, metadata.tensors, batch, torch.get_num_threads())
        agreement = agree(engine, subject, 2 if batch is None else 1)

    def write(path: Path) -> None:
        for suffix, data in contents.items():  # what is named comes last: it is never without the other
            atomic_write_bytes(path.with_suffix(suffix), data)

    return Made(agreement, write, {**facts, "bytes": sum(map(len, contents.values()))})


def save(onnx: bytes, path: Path, metadata: Metadata) -> None:
    """Write NAME.xml and NAME.bin, twice: the xml has the digest of the other, whose bytes do not depend on it.

    Raises:
        InfeasibleError: OpenVINO has no form for an operator.
    """
    import openvino

    try:
        model = openvino.Core().read_model(onnx)
    except RuntimeError as failure:
        raise InfeasibleError(f"--format openvino: OpenVINO {openvino.__version__} cannot read the ONNX file: "
                              f"{first_line(failure, OPENVINO_PLACES)}") from None  # fmt: skip
    model.set_rt_info(metadata.properties(), [SECTION])
    weights, half = path.with_suffix(".bin"), metadata.precision == "float16"
    openvino.save_model(model, path, compress_to_fp16=half)
    model.set_rt_info(sha256(weights), [SECTION, DIGEST])
    openvino.save_model(model, path, compress_to_fp16=half)


def agree(engine: Engine, subject: Subject, count: int) -> Agreement:
    """Compare what OpenVINO puts out with PyTorch.

    Raises:
        InfeasibleError: they differ.
    """
    metadata = subject.metadata
    images = picture(metadata, count)
    want, found = raw_heads(subject.model, images), engine(images.numpy())
    if metadata.output == "rows":
        rows = decode([torch.from_numpy(head) for head in want], metadata.network.yolos, metadata.size)
        want, found = parts(rows.numpy()), parts(found[0])
    agreement = Agreement(*compare(want, found), TOLERANCES[metadata.precision], engine.name)
    agreement.check("--format openvino")
    limit = metadata.reference.limit(metadata.precision)
    if metadata.precision == "int8" and not (gap := relative(want, found)) <= limit:
        raise InfeasibleError(f"--format openvino: its integers differ from the simulation by {gap:.3g}, more than "
                              f"{limit:.3g} ({engine.name}); quantize with --target cpu, or take --format onnx; "
                              "nothing is written")  # fmt: skip
    return agreement
