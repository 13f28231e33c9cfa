"""Flags of export.py as values, the formats, and how their files are run. No torch, no onnx."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.cli import bounded, flag, integer, threshold
from utils.darknet.targets import HARDWARE
from utils.data.images import GREY
from utils.flags import cfg_of
from utils.runtime.choice import KINDS
from utils.runtime.exported import IMAGE, ExportedFile

UNMEASURED = ("torchscript", "fpga")
"""Formats whose files test.py does not run."""
SUFFIXES = {
    "onnx": ".onnx",
    "ncnn": ".ncnn.param",
    "openvino": ".xml",
    "tflite": ".tflite",
    "tensorrt": ".onnx",
    "torchscript": ".torchscript",
    "darknet": ".weights",
    "pt": ".pt",
    "fpga": ".fpga",
}
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
    "tflite": ("onnx", "ai_edge_litert"),
}
"""What a format needs beside the suite's own packages."""
ONNX_LIKE = ("onnx", "openvino", "tensorrt")
"""Formats that are ONNX files or made of them."""
GOES_WITH = {
    "int8": ("onnx", "openvino", "tensorrt", "tflite"),
    "nms": ("onnx", "tensorrt"),
    "multi_label": ("onnx", "tensorrt"),
    "opset": ONNX_LIKE,
    "dynamic_batch": ONNX_LIKE,
    "half": ("onnx", "ncnn", "openvino", "tflite"),
    "mish": ONNX_LIKE,
    "decode": (*ONNX_LIKE, "tflite", "torchscript"),
    "sample": ("fpga", "tflite"),
    "fold": ("darknet",),
}
"""Flags and the formats they go with."""
OPSETS = range(13, 22)
"""Versions of ONNX's operators that onnx 1.16 and onnxruntime 1.18 know, the oldest ones that will do."""
VERSIONS = f"{OPSETS[0]} to {OPSETS[-1]}"
operator_version = bounded(integer, OPSETS.__contains__, f": allowed are {VERSIONS}")
DEFAULT_OPSET = 17
"""Read by onnxruntime and by OpenCV 4.14; h_swish has an operator of its own from 14 on."""
MISH_FORMS = ("exp", "softplus", "op")
"""Ways to write mish; `onnx_graph.mish` has them."""
MISH_OPSET = 18
"""From here on ONNX has the operator."""
MISH_HELP = f"exp: fastest in onnxruntime; softplus: OpenCV recognises it; op: ONNX's own, from opset {MISH_OPSET} on"


CLIENTS = {".weights": "opencv"} | {suffix: kind.runtimes[0] for suffix, kind in KINDS.items()}
"""Programs in examples/, NAME_client.py, by how the file ends that they run."""
FITS = {"letterbox": f"as large as fits, centred on a border of {GREY}", "stretch": "stretched to the input"}
"""What is done to a picture, by how it is fitted to the input."""


@dataclass(frozen=True)
class ExportSettings:
    """The file that is made of a network."""

    format: str = flag("onnx", "kind of the file; weights is another name of darknet", choices=(*SUFFIXES, *ALIASES))
    target: str | None = flag(None, "hardware that the network is checked for (default: none)", choices=tuple(HARDWARE))
    int8: bool = flag(False, "the integers that a quantized network was trained or calibrated with")
    sample: Path | None = flag(
        None, "image that fpga and tflite --int8 are checked on (default: random)", type=Path, metavar="FILE"
    )
    decode: bool = flag(False, "put out rows (cx, cy, w, h, objectness, classes), not raw heads")
    nms: bool = flag(False, "put out detections (image, x1, y1, x2, y2, confidence, class)")
    conf_thres: float = flag(0.3, "least confidence with --nms; else noted in the file", type=threshold, metavar="C")
    iou_thres: float = flag(0.6, "overlap of which the worse box of a class is dropped", type=threshold, metavar="T")
    multi_label: bool = flag(False, "with --nms: all classes of a box above C, not only the best")
    opset: int = flag(DEFAULT_OPSET, f"ONNX's operators, {VERSIONS}", type=operator_version, metavar="N")
    dynamic_batch: bool = flag(False, "any number of images at a time (default: one)")
    half: bool = flag(False, "onnx: weights and feature maps in float16; others: weights are stored in it")
    fold: bool = flag(False, "darknet: batch normalisations become biases (default: left as they are)")
    mish: str = flag(MISH_FORMS[0], MISH_HELP, choices=MISH_FORMS)
    sides: tuple[int, ...] | None = None
    """Of --img_size."""
    mode: Literal["letterbox", "stretch"] = "letterbox"
    """How pictures will be fitted."""
    path: Path | None = None
    """The file to write; None: model.SUFFIX in a new run directory."""
    project: Path = Path("runs/export")
    name: str = "exp"
    exist_ok: bool = False

    @property
    def integers(self) -> str | None:
        """The --target whose integers the file has, cpu for all that are written with --int8; None: it is float."""
        return self.format if self.format in ("fpga", "tensorrt") else "cpu" if self.int8 else None

    @property
    def batch(self) -> int | None:
        """Pictures that the file takes at a time; None: any number."""
        return None if self.dynamic_batch else 1

    @property
    def output(self) -> str:
        """A key of `exported.OUTPUTS`."""
        return "detections" if self.nms else "rows" if self.decode else "heads"

    @property
    def precision(self) -> str:
        """Of weights and feature maps."""
        return "float16" if self.half else "int8" if self.integers in ("cpu", "tensorrt") else "float32"


def usage(path: str, file: ExportedFile | None) -> dict[str, str | None]:
    """Return what a file needs beside it, its input and output, what is done to a picture, and commands; None: unknown.

    Args:
        path: of the file.
        file: what it says of itself; None: nothing.
    """
    told: dict[str, str | None] = dict.fromkeys(("input", "picture", "output"))
    if file is not None:
        metadata, net = file.metadata, file.metadata.network.net
        order, sides, kind = "RGB, one plane after the other", [1, net.channels, net.height, net.width], "float32"
        if metadata.channels_last:
            order, sides = "RGB", [1, net.height, net.width, net.channels]
            kind = "int8 with scale and zero point" if metadata.precision == "int8" else kind
        shape = f"{IMAGE}, {kind}, {sides}, {'grey' if net.channels == 1 else order}, values / 255"
        told |= {"input": shape, "picture": FITS[metadata.mode], "output": metadata.what}
    ends = [end for kind, ends in COMPANIONS.items() if kind != "pt" and path.endswith(SUFFIXES[kind]) for end in ends]
    cfg, client = cfg_of(Path(path)), CLIENTS.get(Path(path).suffix)
    words = ["python", "detect.py", *(("--cfg", str(cfg)) if cfg else ()), "--weights", path, "--source", "PICTURES"]
    program = client and shlex.join(["python", f"examples/{client}_client.py", str(cfg or path), "PICTURE"])
    return told | {
        "beside": ", ".join(Path(path).with_suffix(end).name for end in ends) or None,
        "command": None if path.endswith(".torchscript") else shlex.join(words),
        "client": program,
    }
