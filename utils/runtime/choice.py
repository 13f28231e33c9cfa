"""Which program runs a network, told by `--weights` and `--runtime`, and whether it can. No torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from utils.cli import flag_names, image_side, require
from utils.darknet.blocks import Network
from utils.darknet.network import opencv_warning, same_network
from utils.detection.settings import DetectionSettings
from utils.errors import InputError
from utils.files import regular_file
from utils.flags import Group, ModelFiles, adaptation, cfg_of, choose_model, other_network
from utils.runtime.exported import ExportedFile, Metadata, read_ncnn, read_onnx, read_openvino, read_tflite

READABLE = ".pt, .weights, .onnx, .tflite, ncnn's .param or OpenVINO's .xml"
"""Kinds of `--weights` that can be run."""
RUNTIMES = ("torch", "onnxruntime", "opencv", "ncnn", "openvino", "litert")
PACKAGES = {"onnxruntime": "onnxruntime", "ncnn": "ncnn", "openvino": "openvino", "litert": "ai_edge_litert"}
"""What a runtime needs beside the suite's own packages."""
WITH_NMS = ("onnxruntime", "openvino")
"""Runtimes of files that end in NMS."""
Settings = TypeVar("Settings", bound=DetectionSettings)


class ExportedKind(NamedTuple):
    """Files of one format of export.py."""

    format: str
    """Of --format."""
    read: Callable[[Path], ExportedFile]
    runtimes: tuple[str, ...]
    """What runs them, the usual one first."""


KINDS = {
    ".onnx": ExportedKind("onnx", read_onnx, ("onnxruntime", "opencv", "openvino")),
    ".param": ExportedKind("ncnn", read_ncnn, ("ncnn",)),
    ".xml": ExportedKind("openvino", read_openvino, ("openvino",)),
    ".tflite": ExportedKind("tflite", read_tflite, ("litert",)),
}
"""By how their names end."""


class Named(NamedTuple):
    """A network of the command line, [NAME=]FILE[@SIDE]."""

    name: str
    file: str
    """.pt, a file of export.py, .weights with its cfg beside it, or in the benchmarks CFG:WEIGHTS."""
    side: int | None
    """Of the network input; None: the network's own."""


def named(text: str) -> Named:
    """Return a network of the command line; an existing path is a path whatever its characters. Argparse type."""
    starts = [0, *(sign.end() for sign in re.finditer("=", text))]
    for start in starts:  # a path may have a =, as runs/lr=0.1/best.pt
        name, rest = text[: max(0, start - 1)], text[start:]
        file, at, side = ("", "", rest) if Path(rest).exists() else rest.rpartition("@")
        if Path(file if at else rest).exists():
            break
    return Named(name or rest, file, image_side(side)) if at else Named(name or rest, rest, None)


def named_file(flag: str, text: str) -> Named:
    """Return the network that a flag names, [NAME=]FILE[@SIDE].

    Raises:
        InputError: no such file, or no side of an input.
    """
    try:
        network = named(text)
    except argparse.ArgumentTypeError as failure:
        raise InputError(f"{flag} {text}: {failure}") from None
    regular_file(network.file, InputError)
    if (cfg := cfg_of(Path(network.file))) is not None and not cfg.is_file():
        raise InputError(f"{flag} {text}: a Darknet .weights file does not say its network; {cfg} is not there")
    return network


@dataclass(frozen=True)
class RuntimeFiles(ModelFiles):
    """Files of a model, and what runs it."""

    weights: Path
    """Never new ones."""
    runtime: str = "torch"
    """One of RUNTIMES."""
    exported: ExportedFile | None = None
    """The file of export.py; None where weights are read."""
    half: bool = False
    """Of --half; what that means is the runtime's."""

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse an input of another height and width than the file takes.

        Raises:
            InputError: says what it takes.
        """
        if self.exported is not None and size != self.exported.metadata.size:
            height, width = self.exported.metadata.size
            raise InputError(
                f"--img_size {size[0]} {size[1]}: {self.weights} takes {height} × {width} only; "
                f"export another one with --img_size {size[0]} {size[1]}"
            )

    @property
    def suppressed(self) -> Metadata | None:
        """Metadata of a file that ends in NMS; None for all others."""
        return self.exported.metadata if self.exported and self.exported.metadata.suppresses else None

    def thresholds(self, settings: Settings) -> Settings:
        """Settings of the detections. A file that ends in NMS has its own, and only `classes` may be chosen.

        Raises:
            InputError: names the flag that such a file cannot follow.
        """
        if (metadata := self.suppressed) is None:
            return settings
        inside = {"conf_thres": metadata.conf_thres, "iou_thres": metadata.iou_thres}
        for setting in fields(settings):
            value = getattr(settings, setting.name)
            if setting.name != "classes" and value not in (setting.default, inside.get(setting.name)):
                raise InputError(
                    f"{flag_names(setting)[0]}: {nms_note(self.weights, metadata)}, and no flag changes that; leave it "
                    "out, or export without --nms"
                )
        return replace(settings, conf_thres=metadata.conf_thres, iou_thres=metadata.iou_thres)

    @property
    def mode(self) -> Literal["letterbox", "stretch"] | None:
        """How pictures are fitted, if the file says so."""
        return self.exported.metadata.mode if self.exported else None

    @property
    def names(self) -> tuple[str, ...] | None:
        """Class names in a file of export.py."""
        return self.exported.metadata.names if self.exported else None


def add_runtime_flag(group: Group) -> None:
    """--runtime."""
    what = "what runs the network (default: the one a file was made for, onnxruntime for .onnx, else torch); opencv "
    what += "takes .onnx, and .weights where OpenCV reads Darknet files (4.x), openvino .onnx, too"
    group.add_argument("--runtime", choices=RUNTIMES, help=what)


def choose_runtime(
    network: Network | None,
    weights: str | None,
    runtime: str | None,
    *,
    classes: int | None = None,
    augment: bool = False,
    half: bool = False,
    device: str = "",
) -> RuntimeFiles:
    """The files that --cfg and --weights name, as `flags.choose_model` finds them, or a file of export.py.

    Args:
        network: of --cfg.
        weights: of --weights.
        runtime: of --runtime; None: the one that suits the file.
        classes: how many a run's network must have; None: any number.
        augment: of --augment.
        half: of --half.
        device: of --device.

    Raises:
        InputError: a runtime that cannot do what was asked for, or whose package is missing.
        CfgError, WeightsError: a file cannot be read, or does not fit.
    """
    if weights is not None and Path(weights).suffix.lower() in KINDS:
        files = _exported(network, Path(weights), runtime)
        if augment:
            raise InputError(f"--augment: looks at images of several sizes, and {weights} takes one; leave it out")
    else:
        files = _weights(choose_model(network, weights, classes=classes), runtime)
    if files.runtime != "torch":
        if half and files.runtime != "ncnn":
            raise InputError(f"--half: {files.runtime} computes as the file says; leave it out, or export with --half")
        check_device(files.runtime, device)
    return replace(files, half=half)


def check_device(runtime: str, device: str) -> None:
    """Refuse a GPU for a runtime that takes the CPU only.

    Raises:
        InputError: `device`, of --device, is a GPU.
    """
    if device not in ("", "cpu"):
        raise InputError(f"--device {device}: {runtime} runs on the CPU here; leave it out")


def _exported(network: Network | None, path: Path, runtime: str | None) -> RuntimeFiles:
    """Files of --weights FILE, where FILE is one of KINDS."""
    runtime = runtime_of(path, runtime)
    file = KINDS[path.suffix.lower()].read(path)
    stored = file.metadata.network
    notes = list(file.notes)
    if file.metadata.suppresses:
        notes.append(note := nms_note(path, file.metadata))
        if runtime not in WITH_NMS:
            raise InputError(f"--runtime {runtime}: {note}; take {' or '.join(WITH_NMS)}, or export without --nms")
    if network is not None:
        if not same_network(stored, network):
            raise other_network(path, stored, network)
        notes += adaptation(network, stored, f"the classes in {path}")
    return RuntimeFiles(stored, path, False, tuple(notes), runtime, file)


def nms_note(path: Path, metadata: Metadata) -> str:
    """A line about a file that ends in NMS."""
    return f"{path}: ends in NMS with confidence {metadata.conf_thres:g} and overlap {metadata.iou_thres:g}"


def runtime_of(path: Path, runtime: str | None) -> str:
    """The one of RUNTIMES that runs an exported file, which need not exist.

    Args:
        path: ends in one of KINDS.
        runtime: of --runtime; None: the usual one.

    Raises:
        InputError: the runtime does not run such files, or its package is missing.
    """
    kind = KINDS[path.suffix.lower()]
    runtime = runtime or kind.runtimes[0]
    if runtime not in kind.runtimes:
        *others, last = kind.runtimes
        told = f"{', '.join(others)} or {last}" if others else last
        way = "give the .pt or .weights file" if runtime == "torch" else made_for(runtime)
        raise InputError(f"--runtime {runtime}: {path} is run by {told}; {way}")
    if runtime in PACKAGES:
        require(str(path), PACKAGES[runtime])
    return runtime


def made_for(runtime: str) -> str:
    """How to get a file for a runtime."""
    suffixes = [suffix for suffix, kind in KINDS.items() if runtime in kind.runtimes]
    return f"it runs {' and '.join(suffixes)} files, which export.py makes"


def _weights(files: ModelFiles, runtime: str | None) -> RuntimeFiles:
    """Files of weights that a runtime can take."""
    if runtime in PACKAGES:
        raise InputError(f"--runtime {runtime}: {files.weights} is no file for it; {made_for(runtime)}")
    if runtime == "opencv":
        if files.is_checkpoint:
            raise InputError(
                f"--runtime opencv: {files.weights} is a .pt file; export.py makes .weights or .onnx of it"
            )
        import cv2

        if not hasattr(cv2.dnn, "readNetFromDarknet"):
            raise InputError(
                f"--runtime opencv: OpenCV {cv2.__version__} reads no Darknet files, 4.x does; both read .onnx files"
            )
        if files.network and (warning := opencv_warning(files.network)):
            raise InputError(f"--runtime opencv: {warning}")
    return RuntimeFiles(**vars(files), runtime=runtime or "torch")
