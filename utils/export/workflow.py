"""An export from checked flags to the file: load, make, prove, write."""

from __future__ import annotations

import copy
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.checkpoint import load_model
from utils.cli import input_size, log
from utils.darknet.data_file import Names, check_names
from utils.darknet.network import max_stride, trace
from utils.errors import InputError
from utils.export.formats import MAKERS
from utils.export.settings import COMPANIONS, PAIRS, SUFFIXES, ExportSettings
from utils.export.verify import Agreement, Subject
from utils.files import atomic_path
from utils.model_files import ModelFiles
from utils.quantization.scheme import QuantSettings, simulated_only
from utils.report.run_dir import RunDirectory
from utils.runtime.exported import Metadata

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
    return describe(settings, subject.metadata, path, size, proof, facts)


def load_subject(files: ModelFiles, settings: ExportSettings, names: Names | None = None) -> Subject:
    """The model with the input size of its file, and the metadata of the file."""
    loaded = load_model(files)
    log(*loaded.notes)
    network = loaded.model.network
    check_names(names, network, files.weights)
    check_quantization(loaded.quantization, settings, files.weights)
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
    return Subject(loaded, model.eval().requires_grad_(False), metadata)


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
        raise InputError(
            f"{path}: is quantized, and this file would be float; take {way}, or give the weights it was made from"
        )
    else:
        state = f"is quantized with --target {target}; take {way}, or" if quantization else "is float;"
        weights = "FLOAT" if quantization else path
        raise InputError(
            f"{flag}: {path} {state} `quantize.py --weights {weights} --target {wanted}` or `train.py --weights "
            f"{weights} --quantized 1 --target {wanted}` makes one of the float network"
        )


def publish(folder: Path, path: Path) -> int:
    """Copy what was made as model.* in a folder to `path` and its companions; returns the bytes, without a cfg."""
    size = 0
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
    lines = [
        f"{document['path']}: {size}, {document['precision']}{opset}, {kind} of {channels} × {height} × {width}",
        f"its outputs for a random picture differ from PyTorch's by at most {document['max_abs_error']:.2g}, which is "
        f"{100 * document['error']:.2g} % of the largest value ({document['runtime']})",
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
    return "\n".join(lines)
