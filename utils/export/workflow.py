"""An export from checked flags to the file: load, make, prove, write."""

from __future__ import annotations

import copy
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.checkpoint import load_model
from utils.cli import input_size, log, print_json
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.network import max_stride, trace
from utils.errors import InputError
from utils.export.formats import FORMATS
from utils.export.fpga import check_shifts
from utils.export.integers import check_integers
from utils.export.made import Made, Subject
from utils.export.request import COMPANIONS, ONNX_LIKE, PAIRS, SUFFIXES, ExportRequest
from utils.files import atomic_write_text
from utils.quantization.scheme import QuantSettings
from utils.report.run_dir import RunDirectory
from utils.runtime.metadata import Metadata
from utils.runtime.names import check_names


def export(asked: ExportRequest) -> None:
    """Carry out a request and print what came of it.

    Raises:
        InputError: names, size or weights that do not fit.
        InfeasibleError: the file would not compute what PyTorch does; nothing is written.
    """
    subject = load_subject(asked)
    made = FORMATS[asked.format](subject, asked)
    path = write(asked, subject.metadata.network, made)
    document = describe(asked, subject.metadata, made, path)
    print_json(document) if asked.as_json else print(text(document))


def load_subject(asked: ExportRequest) -> Subject:
    """The model, with the input size that was asked for, and what its file will say of it."""
    loaded = load_model(asked.files)
    for note in loaded.notes:
        log(note)
    network = loaded.model.network
    check_names(asked.given, network, asked.files.weights)
    check_quantization(asked, loaded.quantization)
    network = sized(network, input_size(asked.sides, max_stride(network), (network.net.height, network.net.width)))
    names = (asked.given and asked.given.names) or loaded.names or tuple(map(str, range(network.classes)))
    metadata = Metadata(
        network,
        names,
        output=asked.output,
        mode=asked.mode,
        precision=asked.precision,
        conf_thres=asked.conf_thres,
        iou_thres=asked.iou_thres,
        lineage=loaded.lineage(),
        quantization=loaded.quantization and loaded.quantization.document(),
    )
    model = copy.copy(loaded.model)
    model.network = network
    return Subject(loaded, model.requires_grad_(False).eval(), metadata)


def check_quantization(asked: ExportRequest, settings: QuantSettings | None) -> None:
    """Refuse integers of a float network, and float files of a quantized one.

    Raises:
        InputError: names the way out.
    """
    if asked.format == "fpga":
        check_shifts(settings, asked.files.weights)
    elif asked.options.int8:
        check_integers(settings, asked.files.weights, asked.format == "tensorrt")
    elif settings is not None:
        way = "add --int8" if asked.format in ONNX_LIKE else "take --format onnx --int8"
        way = "take --format fpga" if settings.kernels.power_of_two else way
        raise InputError(f"{asked.files.weights}: is quantized, and this file would be float; {way}, or give the "
                         "weights it was made from")  # fmt: skip


def sized(network: Network, size: tuple[int, int]) -> Network:
    """The network with another input.

    Raises:
        CfgError: its blocks cannot work on it.
    """
    trace(network, *size)
    return replace(network, net=replace(network.net, height=size[0], width=size[1]))


def write(asked: ExportRequest, network: Network, made: Made) -> Path:
    """Write the file, and its cfg where it needs one: last, so that a cfg is never without its weights."""
    with ExitStack() as ending:
        path = asked.path
        if path is None:
            run = RunDirectory.create(asked.project, asked.name, exist_ok=asked.exist_ok)
            ending.enter_context(run.until())
            run.describe(args=asked.flags)
            path = run.file(f"model{SUFFIXES[asked.format]}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        made.write(path)
        if asked.format in PAIRS:
            atomic_write_text(path.with_suffix(".cfg"), format_network(made.network or network))
    return path


def describe(asked: ExportRequest, metadata: Metadata, made: Made, path: Path) -> dict[str, Any]:
    """The document of --json."""
    found = made.agreement
    document = {
        "format": asked.format,
        "path": str(path),
        "bytes": path.stat().st_size,
        "max_abs_error": found.max_abs_error,
        "error": found.error,
        "tolerance": found.tolerance,
        "runtime": found.runtime,
        "input": [metadata.network.net.channels, *metadata.size],
        "classes": metadata.network.classes,
    }
    if asked.format in PAIRS:
        return document | {"cfg": str(path.with_suffix(".cfg"))}
    files = [str(path.with_suffix(suffix)) for suffix in COMPANIONS.get(asked.format, ())]
    document |= {"files": files} if files else {}
    if asked.format == "tensorrt":
        # Tensors have the types of the graph: in TensorRT 10 with this flag, in 11 always, where the flag has no effect
        # and --int8 and --fp16 are errors (NVIDIA, "Migrating trtexec Usage from TensorRT 10.x to 11.x").
        document["command"] = shlex.join(
            ["trtexec", f"--onnx={path}", "--stronglyTyped", f"--saveEngine={path.with_suffix('.engine')}"]
        )
    return document | {"output": metadata.output, "precision": metadata.precision, **made.facts}


def text(document: dict[str, Any]) -> str:
    """The document for people."""
    size = f"{document['bytes'] / 1e6:.2f} MB"
    if "cfg" in document:
        return f"{document['path']}: {size}, read back the same; with {document['cfg']}"
    channels, height, width = document["input"]
    kind = {"heads": "raw heads", "rows": "decoded rows", "detections": "detections"}[document["output"]]
    opset = f", opset {document['opset']}" if "opset" in document else ""
    made = (
        f"{document['path']}: {size}, {document['precision']}{opset}, {kind} of {channels} × {height} × {width}\n"
        f"differs from PyTorch by {document['error']:.2g} of the largest value, {document['max_abs_error']:.2g} in all "
        f"({document['runtime']})"
    )
    if "layers" in document:
        made += (f"\neach of {document['layers']} layers, on the same integers: {document['steps']} step at most, "
                 f"{document['share']:.2%} of the values differ")  # fmt: skip
    if "float32" in document:
        found, most = document["float32"], max(document["accumulator_bits"])
        made += (f"\nthe same in every bit of {document['codes']} codes; in float32 {found['share']:.2%} of them "
                 f"differ, heads by {found['max_abs_error']:.2g}; sums have at most {most} bits")  # fmt: skip
    return made + (f"\n{document['command']}" if "command" in document else "")
