"""What export.py was asked for, checked. No torch, no onnx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.model_files import ModelFiles
from utils.runtime.names import Names

SUFFIXES = {"onnx": ".onnx", "ncnn": ".ncnn.param", "openvino": ".xml", "tensorrt": ".onnx",
            "torchscript": ".torchscript", "darknet": ".weights", "pt": ".pt", "fpga": ".fpga"}  # fmt: skip
"""Formats and how their files end; .fpga is a folder."""
ALIASES = {"weights": "darknet"}
"""Other names of formats."""
PAIRS = ("darknet", "pt")
"""Formats whose files have a cfg beside them."""
COMPANIONS = {"ncnn": (".bin", ".json"), "openvino": (".bin",), **dict.fromkeys(PAIRS, (".cfg",))}
"""Last suffixes of the files that belong to the one that is named."""
PACKAGES = {
    "onnx": ("onnx", "onnxruntime"),
    "tensorrt": ("onnx", "onnxruntime"),
    "ncnn": ("onnx", "onnxruntime", "ncnn", "pnnx"),
    "openvino": ("onnx", "onnxruntime", "openvino"),
}
"""What a format needs beside the suite's own packages."""
ONNX_LIKE = ("onnx", "openvino", "tensorrt")
"""Formats that are ONNX files or made of them."""
GOES_WITH = {
    "--int8": ("onnx", "openvino", "tensorrt"),
    "--nms": ("onnx", "tensorrt"),
    "--multi-label": ("onnx", "tensorrt"),
    "--opset": ONNX_LIKE,
    "--dynamic-batch": ONNX_LIKE,
    "--half": ("onnx", "ncnn", "openvino"),
    "--mish": ONNX_LIKE,
    "--decode": (*ONNX_LIKE, "torchscript"),
    "--sample": ("fpga",),
    "--fold": ("darknet",),
}
"""Flags and the formats they go with."""
OPSETS = range(13, 22)
"""Versions of ONNX's operators that onnx 1.16 and onnxruntime 1.18 know, the oldest ones that will do."""
DEFAULT_OPSET = 17
"""Read by onnxruntime and by OpenCV 4.14; all blocks have an operator of their own from 14 on."""
MISH_FORMS = ("exp", "softplus", "op")
"""Ways to write mish; `activations.MISH` has them."""
MISH_OPSET = 18
"""From here on ONNX has the operator."""


@dataclass(frozen=True)
class OnnxOptions:
    """How an ONNX file is made."""

    opset: int = DEFAULT_OPSET
    dynamic_batch: bool = False
    """Any number of pictures at a time, not one."""
    mish: str = "exp"
    """One of MISH_FORMS."""
    multi_label: bool = False
    """A row may give a detection of every class, in a file of detections."""
    int8: bool = False
    """The integers of a quantized network."""


@dataclass(frozen=True)
class ExportRequest:
    """A network, and the file to be made of it."""

    files: ModelFiles
    format: str
    """A key of SUFFIXES."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Every flag and its value, for args.yaml."""
    given: Names | None = None
    """Class names; those of the weights, else numbers, when None."""
    sides: tuple[int, ...] | None = None
    """Of --img_size."""
    mode: str = "letterbox"
    """How pictures will be fitted."""
    output: str = "heads"
    """A key of `metadata.OUTPUTS`."""
    precision: str = "float32"
    conf_thres: float = 0.3
    iou_thres: float = 0.6
    options: OnnxOptions = OnnxOptions()
    sample: Path | None = None
    """Picture whose codes a folder of --format fpga has; None: a random one."""
    fold: bool = False
    """Darknet files without batch normalisations."""
    path: Path | None = None
    """The file to write; None: model.SUFFIX in a new run directory."""
    project: Path = Path("runs/export")
    name: str = "exp"
    exist_ok: bool = False
    as_json: bool = False
