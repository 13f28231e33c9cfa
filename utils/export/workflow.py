"""An export from checked flags to the file: load, make, prove, write; and a function for each format.

Such a function makes model.SUFFIX in a folder and proves it. Packages that may be missing are imported where they are
used.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import Darknet, fuse
from utils.checkpoint import load_model, model_document, write_checkpoint
from utils.cli import command_of, input_size, log
from utils.darknet import weights as weights_file
from utils.darknet.blocks import BN_EPSILON, Convolutional, Network
from utils.darknet.cfg import format_network
from utils.darknet.data_file import Names, check_names
from utils.darknet.network import OPENCV_EPSILON, max_stride, opencv_warning, trace
from utils.darknet.targets import check
from utils.detection.decode import decode
from utils.errors import InfeasibleError, InputError
from utils.export.fpga import make_fpga
from utils.export.integers import codes_of
from utils.export.settings import COMPANIONS, GOES_WITH, MISH_OPSET, PAIRS, SUFFIXES, UNMEASURED, ExportSettings
from utils.export.verify import Agreement, Subject, check_same, picture, prove_onnx, prove_tflite, verify
from utils.files import atomic_path, foreign_errors
from utils.flags import ModelFiles, cfg_of
from utils.quantization.scheme import QuantSettings, simulated_only
from utils.report.run_dir import RunDirectory
from utils.runtime.engines import Engine, ncnn_engine, on_cpu, openvino_engine
from utils.runtime.exported import (
    DIGEST,
    IMAGE,
    OPENVINO_SECTION,
    Metadata,
    graph_digest,
    ncnn_description,
    sha256,
)

WAYS = {"fpga": "--format fpga", "tensorrt": "--format tensorrt", "cpu": "--format onnx --int8"}
"""Flags for the integers of a target; cpu stands for all whose files onnxruntime runs."""


def export(
    files: ModelFiles, settings: ExportSettings, names: Names | None = None, args: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make a file; returns the document of --json.

    Args:
        files: of the network.
        settings: of the file.
        names: of the classes; those of the weights, else numbers, when None.
        args: every flag and its value, for args.yaml of a new run directory.

    Raises:
        InputError: names, size or weights that do not fit.
        InfeasibleError: the file would not compute what PyTorch does; nothing is written.
        NumericsError: the network puts out NaN or infinity.
    """
    subject = load_subject(files, settings, names)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        proof, facts = MAKERS[settings.format](subject, settings, Path(folder))
        path = settings.path
        if path is None:
            run = RunDirectory.create(settings.project, settings.name, exist_ok=settings.exist_ok)
            ending.enter_context(run.until())
            run.describe(args=dict(args or {}))
            path = run.file(f"model{SUFFIXES[settings.format]}")
        size = publish(Path(folder), path)
    document = describe(settings, subject.metadata, path, size, proof, facts)
    if settings.format not in (*UNMEASURED, *PAIRS):
        document["next"] = command_of("test.py", data=(args or {}).get("data") or "DATA.data", weights=path)
    return document


def load_subject(files: ModelFiles, settings: ExportSettings, names: Names | None = None) -> Subject:
    """The model with the input size of its file, and the metadata of the file."""
    loaded = load_model(files)
    log(*loaded.notes)
    network = loaded.model.network
    check_names(names, network, files.weights)
    check_quantization(loaded.quantization, settings, files.weights)
    if settings.target:
        log(*check(network, settings.target))
    default = network.net.height, network.net.width
    height, width = input_size(settings.sides, max_stride(network), default)
    trace(network, height, width)
    network = replace(network, net=replace(network.net, height=height, width=width))
    metadata = Metadata(
        network,
        (names and names.names) or loaded.names or tuple(map(str, range(network.classes))),
        output=settings.output,
        mode=settings.mode,
        precision=settings.precision,
        conf_thres=settings.conf_thres,
        iou_thres=settings.iou_thres,
        lineage=loaded.lineage(),
        quantization=loaded.quantization,
    )
    model = copy.copy(loaded.model)
    model.network = network
    return Subject(model.eval().requires_grad_(False), metadata)


def check_quantization(quantization: QuantSettings | None, settings: ExportSettings, path: Path | None) -> None:
    """Refuse integers of a float network, float files of a quantized one, and integers that the format has not.

    Raises:
        InputError: names the way out.
    """
    target = quantization and quantization.target
    wanted, kind = settings.integers, target if target in (None, *WAYS) else "cpu"
    way = WAYS.get(kind or "")
    flag = "--int8" if wanted == "cpu" else f"--format {wanted}"
    if kind == wanted:
        if quantization and kind != "fpga" and (reason := simulated_only(quantization)):
            raise InputError(f"{flag}: {path} {reason}")
    elif wanted is None:
        way = f"--format {settings.format} --int8" if kind == "cpu" and settings.format in GOES_WITH["int8"] else way
        raise InputError(
            f"{path}: is quantized, and this file would be float; take {way}, or give the weights it was made from"
        )
    else:
        state = f"is quantized with --target {target}; take {way}, or" if quantization else "is float;"
        weights = "FLOAT" if quantization else path
        inputs = {"cfg": None if quantization or path is None else cfg_of(path), "data": "DATA.data"}
        ways = [
            command_of(script, weights=weights, **inputs, **more, target=wanted)
            for script, more in (("quantize.py", {}), ("train.py", {"quantized": 1}))
        ]
        raise InputError(f"{flag}: {path} {state} `{ways[0]}` or `{ways[1]}` makes one of the float network")


def publish(folder: Path, path: Path) -> int:
    """Copy what was made as model.* in a folder to `path` and its companions; returns the bytes, without a cfg."""
    size = 0
    if path.is_dir():  # with --exist-ok; a network that was there before may have had more blocks
        for old in (path / "layout.json", *path.glob("hex/*.hex")):
            old.unlink(missing_ok=True)
    for file in sorted(folder.rglob("*"), key=lambda file: (file.suffix == path.suffix, file.name == "layout.json")):
        if file.is_dir():
            continue
        inner = file.relative_to(folder).parts[1:]
        target = path.joinpath(*inner) if inner else path.with_suffix(file.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:  # what is named comes last: it is never without the others
            shutil.copyfile(file, temporary)
        size += file.stat().st_size * (file.suffix != ".cfg")
    return size


def describe(
    settings: ExportSettings, metadata: Metadata, path: Path, size: int, proof: Agreement, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The document of --json."""
    document = {
        "format": settings.format,
        "path": str(path),
        "bytes": size,
        "max_abs_error": proof.max_abs_error,
        "error": proof.error,
        "tolerance": proof.tolerance,
        "runtime": proof.runtime,
        "input": [metadata.network.net.channels, *metadata.size],
        "classes": metadata.network.classes,
    }
    if settings.format in PAIRS:
        return document | {"cfg": str(path.with_suffix(".cfg"))}
    if companions := COMPANIONS.get(settings.format):
        document["files"] = [str(path.with_suffix(suffix)) for suffix in companions]
    if settings.format == "tensorrt":
        # Tensors have the types of the graph: in TensorRT 10 with this flag, in 11 always, where the flag has no effect
        # and --int8 and --fp16 are errors (NVIDIA, "Migrating trtexec Usage from TensorRT 10.x to 11.x").
        engine = f"--saveEngine={path.with_suffix('.engine')}"
        document["command"] = shlex.join(["trtexec", f"--onnx={path}", "--stronglyTyped", engine])
    return document | {"output": metadata.output, "precision": metadata.precision, **facts}


def text(document: Mapping[str, Any]) -> str:
    """The document for people."""
    size = f"{document['bytes'] / 1e6:.2f} MB"
    if "cfg" in document:
        return f"{document['path']}: {size}, read back the same; with {document['cfg']}"
    channels, height, width = document["input"]
    kind = {"heads": "raw heads", "rows": "decoded rows", "detections": "detections"}[document["output"]]
    opset = f", opset {document['opset']}" if "opset" in document else ""
    image = "a random image" if (picture := document.get("picture", "random")) == "random" else picture
    lines = [
        f"{document['path']}: {size}, {document['precision']}{opset}, {kind} of {channels} × {height} × {width}",
        f"its outputs for {image} differ from PyTorch's by at most {document['max_abs_error']:.2g}, which is "
        f"{100 * document['error']:.2g} % of the largest value, or of 1 if that is larger ({document['runtime']})",
    ]
    if "layers" in document:
        lines.append(
            f"roundings that fall differently add up: on the same input each of {document['layers']} layers is off by "
            f"{document['steps']} step of its integers at most, in {document['share']:.2%} of the values"
        )
    if "float32" in document:
        rough, most = document["float32"], max(document["accumulator_bits"])
        lines.append(
            f"the same in every bit of {document['codes']} codes; in float32 {rough['share']:.2%} of them differ, "
            f"heads by {rough['max_abs_error']:.2g}; sums have at most {most} bits"
        )
    if "command" in document:
        lines.append(document["command"])
    if "next" in document:
        lines.append(f"next: {document['next']}")
    return "\n".join(lines)


def make_onnx(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """NAME.onnx, for onnxruntime and its like, or with explicit integers for TensorRT."""
    data, proof, facts = emit_onnx(subject, settings)
    (folder / "model.onnx").write_bytes(data)
    return proof, facts


def emit_whole(subject: Subject, settings: ExportSettings) -> tuple[bytes, Agreement, dict[str, Any]]:
    """An ONNX file for a converter: weights in float16 are rounded last."""
    metadata = subject.metadata
    plain = replace(metadata, precision="float32") if settings.half else metadata
    return emit_onnx(subject._replace(metadata=plain), settings)


def emit_onnx(subject: Subject, settings: ExportSettings) -> tuple[bytes, Agreement, dict[str, Any]]:
    """An ONNX file, its distance from PyTorch in onnxruntime, and facts for --json.

    Raises:
        InfeasibleError: it differs, the checker of ONNX refuses it, or a weight is too large for float16.
    """
    import onnx

    from utils.export.onnx_graph import onnx_model

    model, metadata = subject.model, subject.metadata
    codes = codes_of(model, explicit=settings.format == "tensorrt") if settings.integers else None
    made = onnx_model(model, metadata, settings, codes)
    proof, gap = prove_onnx(made, subject, settings, codes)
    metadata = replace(metadata, reference=proof.reference)
    onnx.helper.set_model_props(made, {**metadata.properties(), DIGEST: graph_digest(made)})
    facts = {"opset": settings.opset, "batch": settings.batch, "mish": settings.mish}
    return made.SerializeToString(), proof, facts | (gap._asdict() if gap else {})


def make_ncnn(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """NAME.ncnn.param, NAME.ncnn.bin and NAME.ncnn.json.

    Raises:
        InfeasibleError: pnnx cannot convert the ONNX file, or ncnn computes something else.
    """
    metadata = subject.metadata
    onnx, *_ = emit_whole(subject, settings)
    param = convert(onnx, folder / "model.ncnn.param", metadata)
    proof = verify("--format ncnn", subject, ncnn_engine(param, metadata.tensors))
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


def make_openvino(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """NAME.xml and NAME.bin.

    Raises:
        InfeasibleError: OpenVINO cannot read the ONNX file, or computes something else.
    """
    onnx, onnx_proof, facts = emit_whole(subject, settings)
    metadata, path = replace(subject.metadata, reference=onnx_proof.reference), folder / "model.xml"
    save(onnx, path, metadata)
    engine = openvino_engine(path, metadata.tensors, settings.batch)
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
    with foreign_errors("--format openvino", f"OpenVINO {version} cannot read the ONNX file", InfeasibleError):
        model = openvino.Core().read_model(onnx)
    model.set_rt_info(metadata.properties(), [OPENVINO_SECTION])
    weights, half = path.with_suffix(".bin"), metadata.precision == "float16"
    openvino.save_model(model, path, compress_to_fp16=half)
    model.set_rt_info(sha256(weights), [OPENVINO_SECTION, DIGEST])
    openvino.save_model(model, path, compress_to_fp16=half)


def make_tflite(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """NAME.tflite, for LiteRT and compilers of TensorFlow Lite files.

    Raises:
        InfeasibleError: LiteRT computes something else.
    """
    from utils.export.onnx_graph import onnx_model
    from utils.export.tflite import tflite_file

    metadata = subject.metadata
    plain = replace(metadata, precision="float32") if settings.half else metadata
    codes = codes_of(subject.model) if settings.integers else None
    nodes = onnx_model(subject.model, plain, replace(settings, opset=MISH_OPSET, mish="op"), codes)
    proof, gap = prove_tflite(nodes, subject, settings, codes)
    data = tflite_file(nodes, replace(metadata, reference=proof.reference))
    (folder / "model.tflite").write_bytes(data)
    return proof, {"batch": 1} | (gap._asdict() if gap else {})


class _Traced(nn.Module):
    """A network as a function from a tensor to tensors."""

    def __init__(self, model: Darknet, size: tuple[int, int], decodes: bool) -> None:
        super().__init__()
        self.model, self.size, self.decodes = model, size, decodes

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Raw heads, or decoded rows."""
        heads = self.model(images).heads
        return decode(heads, self.model.network.yolos, self.size) if self.decodes else heads


def make_torchscript(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """TorchScript: the folded network traced and frozen."""
    metadata = subject.metadata
    module = _Traced(fuse(subject.model), metadata.size, settings.decode).eval()
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # sizes become constants, as they should; and PyTorch advises torch.export
        frozen = torch.jit.freeze(torch.jit.trace(module, picture(metadata), check_trace=False))
        extra = {"metadata.json": json.dumps(metadata.properties())}
        torch.jit.save(frozen, folder / "model.torchscript", _extra_files=extra)
    runtime = on_cpu(f"TorchScript {torch.__version__}")
    return verify("--format torchscript", subject, _engine(frozen, runtime)), {"batch": 1}


def _engine(function: nn.Module, runtime: str) -> Engine:
    @torch.inference_mode()
    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = function(torch.from_numpy(images))
        return [output.numpy() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]

    return Engine(run, 1, runtime)


def make_darknet(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """Darknet's files, read back and compared value by value; what is folded is compared in PyTorch, too."""
    model, proof, path = subject.model, Agreement(), folder / "model.weights"
    if settings.fold:
        model = fuse(model)
        proof = verify("--fold", subject, _engine(_Traced(model, subject.metadata.size, False), proof.runtime))
    network, arrays = model.network, {key: value.numpy() for key, value in model.state_dict().items()}
    if settings.fold:
        network, arrays = with_biases(network, arrays)
    weights_file.write(path, network, arrays)
    check_same("--format darknet", arrays, weights_file.read(path, network))
    path.with_suffix(".cfg").write_text(format_network(network))
    if warning := opencv_warning(network):
        log(warning)
    elif any(getattr(block, "batch_normalize", False) for block in network.blocks):
        log(
            f"Darknet adds {BN_EPSILON:g} to a variance, as this suite does, and OpenCV's reader {OPENCV_EPSILON:g}: "
            "where variances are tiny its heads differ by up to 0.8 %; with --fold all readers compute the same"
        )
    return proof, {}


def with_biases(network: Network, arrays: dict[str, np.ndarray]) -> tuple[Network, dict[str, np.ndarray]]:
    """A folded network where every convolution has a bias, as other readers expect without batch normalisation."""
    arrays, blocks = dict(arrays), list(network.blocks)
    for index, block in enumerate(blocks):
        if isinstance(block, Convolutional) and not block.bias:
            blocks[index] = replace(block, bias=True)
            arrays[f"layers.{index}.conv.bias"] = np.zeros(block.filters, np.float32)
    return replace(network, blocks=tuple(blocks)), arrays


def make_checkpoint(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """A .pt of this suite, read back and compared value by value."""
    metadata, path = subject.metadata, folder / "model.pt"
    state = {key: value.contiguous() for key, value in subject.model.state_dict().items()}
    write_checkpoint(path, model_document(state, metadata.network, metadata.names, metadata.lineage))
    path.with_suffix(".cfg").write_text(format_network(metadata.network))
    back = load_model(ModelFiles(None, path, True)).model.state_dict()
    arrays = {key: value.numpy() for key, value in state.items()}
    check_same("--format pt", arrays, {key: value.numpy() for key, value in back.items()})
    return Agreement(), {}


MAKERS: dict[str, Callable[[Subject, ExportSettings, Path], tuple[Agreement, dict[str, Any]]]] = {
    "onnx": make_onnx,
    "tensorrt": make_onnx,
    "ncnn": make_ncnn,
    "openvino": make_openvino,
    "tflite": make_tflite,
    "torchscript": make_torchscript,
    "darknet": make_darknet,
    "pt": make_checkpoint,
    "fpga": make_fpga,
}
"""Results are the distance from PyTorch, and facts for --json."""
