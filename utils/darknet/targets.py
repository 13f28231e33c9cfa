"""Hardware of --target: what it computes as its makers document it, and which blocks of a network it does not.

Sources were read on 2026-11-30. Where they say nothing of an operation, it counts as not documented.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from utils.darknet.blocks import Block, Convolutional, Maxpool, Network, Route, ScaleChannels, Se, Shortcut, Upsample
from utils.darknet.blocks.block import ACTIVATIONS
from utils.darknet.network import trace
from utils.errors import InputError

VERDICTS = ("does not run", "runs on the CPU", "runs in float", "not documented", "runs")
REFUSED, ON_CPU, IN_FLOAT, UNKNOWN, RUNS = VERDICTS
OPERATIONS = (
    *("convolution", "depthwise", "grouped", "dilation", "maxpool", "avgpool", "upsample", "reorg", "concat", "split"),
    *("sum", "weighted sum", "scale_channels", "sam", "se", *ACTIVATIONS[1:]),
)
SIMPLER = ("leaky", "relu6", "relu")
"""Activations to take in place of another one, the best first."""
LINK = 5
"""Largest side of a max pool in a chain, to which the rewrite `--pools chained` leads."""


class Operation(NamedTuple):
    """Part of what a block computes."""

    name: str
    """One of OPERATIONS."""
    size: int = 1
    """Side of a kernel or pool, or factor of an upsampling."""
    stride: int = 1
    rewrite: str = ""
    """Flag of utils.darknet.rewrite that replaces it; empty where there is none."""

    def __str__(self) -> str:
        """Its name and what differs from 1: `maxpool 2 x 2, stride 2`."""
        size = f" {self.size} x {self.size}" if self.size > 1 else ""
        return f"{self.name}{size}" + (f", stride {self.stride}" if self.stride > 1 else "")


class Bounds(NamedTuple):
    """Largest size and stride; 0: without a documented limit."""

    size: int = 0
    stride: int = 0

    def exceeded(self, operation: Operation) -> str:
        """Words on what is out of bounds; empty: nothing is."""
        pairs = (("size", operation.size, self.size), ("stride", operation.stride, self.stride))
        return " and ".join(f"the largest {name} is {limit}" for name, value, limit in pairs if value > limit > 0)


@dataclass(frozen=True)
class Hardware:
    """A row of the table."""

    what: str
    source: str
    """Document, section, version or date."""
    runs: Mapping[str, Bounds]
    lacks: Mapping[str, str] = field(default_factory=dict)
    """What is documented not to run, and the reason."""
    elsewhere: str = ""
    """ON_CPU or IN_FLOAT, where that and what is out of bounds is computed; empty: nowhere."""
    note: str = ""
    tools: str = ""
    """What quantizes for it from a float file; empty: quantize.py and train.py."""

    def verdict(self, operation: Operation) -> tuple[str, str]:
        """One of the verdicts, and the reason."""
        bounds = self.runs.get(operation.name)
        reason = self.lacks.get(operation.name) or (bounds and bounds.exceeded(operation))
        if reason:
            return self.elsewhere or REFUSED, reason
        return UNKNOWN if bounds is None else RUNS, ""


def _runs(names: str, **bounds: Bounds) -> dict[str, Bounds]:
    return dict.fromkeys(names.split(", "), Bounds()) | bounds


def _lacks(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(", "), reason)


def _but(*names: str, **bounds: Bounds) -> dict[str, Bounds]:
    return {name: Bounds() for name in OPERATIONS if name not in names} | bounds


COMMON = "convolution, depthwise, maxpool, avgpool, upsample, concat, split, sum, scale_channels, sam, relu, relu6"
ONNXRUNTIME = "docs/quantization.md, The int8 file"
FLOAT_MISH = _lacks("mish", "is computed between two roundings")
TABLE = _lacks("mish, hardsigmoid", "is a table, by CAST and GATHER, which are not in the list")
FLOATS = _lacks("se, weighted sum", "is float32 in the file")
CURVES = _lacks("mish, swish, logistic, h_swish, hardsigmoid, se, avgpool, weighted sum", "needs more than shifts")
NO_ODD_PADDING = "a [maxpool] with an odd padding above 1 is refused"
HARDWARE = {
    "cpu": Hardware("x86 without VNNI, onnxruntime", ONNXRUNTIME, _but(), FLOAT_MISH, IN_FLOAT),
    "cpu-vnni": Hardware("x86 with VNNI, onnxruntime", ONNXRUNTIME, _but(), FLOAT_MISH, IN_FLOAT),
    "arm": Hardware("ARM, onnxruntime", ONNXRUNTIME, _but(), FLOAT_MISH, IN_FLOAT),
    "tflite": Hardware("LiteRT", "docs/export.md, TensorFlow Lite", _but(), FLOATS, IN_FLOAT),
    "edgetpu": Hardware(
        "Coral Edge TPU",
        "coral.ai/docs/edgetpu/models-intro, Supported operations; github.com/google-coral/edgetpu, issue 272, 2020",
        _runs(f"{COMMON}, dilation, swish, logistic"),
        TABLE | FLOATS | _lacks("leaky, h_swish", "is not in the list"),
        ON_CPU,
        "what comes after the first operation on the CPU runs there, too",
    ),
    "ethos-u": Hardware(
        "Arm Ethos-U55 and U65 (Vela)",
        "Vela 5.2.0, `vela --supported-ops-report`, Ethos-U55 and U65 TFLite; the same compiler, by test_hardware.py",
        _but(convolution=Bounds(0, 3), depthwise=Bounds(0, 3), maxpool=Bounds(256)),
        TABLE | FLOATS,
        ON_CPU,
        "upsampling by 2, 4 and 8 only",
    ),
    "tensorrt": Hardware(
        "NVIDIA GPUs, TensorRT",
        "github.com/onnx/onnx-tensorrt, docs/operators.md for TensorRT 8.4, Supported Types",
        _but("h_swish"),
        _lacks("upsample, sum, weighted sum, scale_channels, sam, se, mish, swish", "has no INT8 among its types"),
        IN_FLOAT,
    ),
    "dpu": Hardware(
        "AMD DPUCZDX8G (Vitis AI)",
        "UG1414 3.0, Currently Supported Operators, 2023-02-24; PG338 3.4, Features, 2022-01-20; github.com/Xilinx/"
        "Vitis-AI-Tutorials, 07-yolov4-tutorial, section 2.1, for Vitis AI 1.4",
        _runs(
            "depthwise, dilation, avgpool, reorg, concat, sum, sam, relu, relu6, leaky",
            convolution=Bounds(16, 8),
            maxpool=Bounds(8),
        ),
        _lacks("mish", "is not supported by the DPU"),
        ON_CPU,
        "leaky is quantized with the slope 26/256 only (github.com/Xilinx/Vitis-AI, xnnc); Darknet's is 0.1",
        "Vitis AI",
    ),
    "rknn": Hardware(
        "Rockchip NPUs",
        "github.com/airockchip/rknn-toolkit2, doc/RKNNToolKit2_OP_Support-v2.1.0.md, ONNX OPs",
        _but("se"),
        note="limits of size and stride are in another document; the list has Mish, which export.py --mish op writes",
        tools="RKNN-Toolkit2",
    ),
    "hailo": Hardware(
        "Hailo-8 and later",
        "github.com/hailo-ai/hailo_model_zoo, cfg/networks/yolov4_leaky.yaml",
        _runs("convolution, leaky"),
        note="the list is section 5.5 of the Dataflow Compiler User Guide 3.30.0, which is not public",
        tools="the Dataflow Compiler",
    ),
    "ncnn": Hardware("ncnn, in float", "docs/export.md, ncnn", _but(), note=NO_ODD_PADDING, tools="ncnn2int8"),
    "fpga": Hardware("integers and shifts", "docs/fpga.md", _but(), CURVES),
}
"""By --target."""


def chainable(pool: Maxpool) -> bool:
    """Whether a pool is a chain of smaller ones: its map keeps its size, and has a middle in every window."""
    return pool.step() == (1, 1) and pool.size % 2 == 1 and pool.padding + 1 == pool.size


def operations(block: Block, channels: int, *, head: bool) -> Iterator[Operation]:
    """Operations of a block.

    Args:
        block: of a network.
        channels: of its input.
        head: a [yolo] follows, so that no rewrite changes its activation.
    """
    match block:
        case Convolutional():
            grouped = "depthwise" if block.depthwise(channels) else "grouped"
            yield Operation("convolution" if block.groups == 1 else grouped, block.size, max(block.step()))
            if block.dilation > 1:
                yield Operation("dilation", block.dilation)
        case Maxpool():
            longer = chainable(block) and block.size > LINK
            yield Operation("maxpool", block.size, max(block.step()), "--pools chained" if longer else "")
        case Upsample():
            yield Operation("upsample", block.stride)
        case Route():
            yield from [Operation("concat")] * (len(block.layers) > 1) + [Operation("split")] * (block.groups > 1)
        case Shortcut():
            yield Operation("sum" if block.weights_type == "none" else "weighted sum")
        case Se() | ScaleChannels(activation="linear"):
            yield Operation(block.SECTION, rewrite="--drop-se")
        case _ if block.SECTION in OPERATIONS:
            yield Operation(block.SECTION)
    if (activation := getattr(block, "activation", "linear")) != "linear":
        yield Operation(activation, rewrite="" if head else "--activation")


class Support(NamedTuple):
    """Equal operations of a network, and whether a piece of hardware computes them."""

    operation: Operation
    verdict: str
    why: str
    blocks: tuple[int, ...]
    rewrite: str
    """Flags of utils.darknet.rewrite that help; empty: none."""


def support_of(network: Network, target: str) -> list[Support]:
    """What hardware makes of a network, equal operations together; what does not run comes first."""
    row = HARDWARE[target]
    blocks: dict[Operation, list[int]] = {}
    shapes = (network.image, *trace(network))  # what block N reads unless it names its sources is shapes[N]
    for index, (block, before) in enumerate(zip(network.blocks, shapes, strict=False)):
        for operation in operations(block, before.channels, head=index + 1 in network.heads):
            blocks.setdefault(operation, []).append(index)
    result = []
    for operation, numbers in blocks.items():
        verdict, why = row.verdict(operation)
        flag = operation.rewrite if why else ""
        if flag == "--activation":
            simpler = [name for name in SIMPLER if row.verdict(Operation(name))[0] == RUNS]
            flag = f"--activation {operation.name}={simpler[0]}" if simpler else ""
        result.append(Support(operation, verdict, why, tuple(numbers), flag))
    return sorted(result, key=lambda support: VERDICTS.index(support.verdict))


def rewrite_command(network: Network, problems: Iterable[Support]) -> str:
    """The command of all rewrites that help; empty: there is none."""
    flags = dict.fromkeys(problem.rewrite for problem in problems if problem.rewrite)
    swaps = [flag.split()[1] for flag in flags if "=" in flag]
    words = [*(["--activation", *swaps] if swaps else []), *(flag for flag in flags if "=" not in flag)]
    path, inside, _ = (network.path or "CFG").partition("!cfg")
    cfg = f"CFG --weights {shlex.quote(path)}" if inside else shlex.quote(path)  # a .pt has its cfg inside
    return f"python -m utils.darknet.rewrite {cfg} {' '.join(words)} -o OUT.cfg" if words else ""


def _problems(network: Network, target: str, verdict: str) -> str:
    """Operations with a verdict in one line, with the way out; empty: there is none."""
    texts, problems = [], [support for support in support_of(network, target) if support.verdict == verdict]
    for operation, _, why, blocks, _ in problems:
        more = f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""
        texts.append(f"{network.where(blocks[0])}{more}: {operation} {why}")
    command = rewrite_command(network, problems)
    left = ", ".join(str(problem.operation) for problem in problems if not problem.rewrite)
    way_out = "take another --target, or a cfg without it"
    if command:
        way_out = f"`{command}` writes a cfg without that" + (f", except {left}" if left else "")
    return f"--target {target}: {', '.join(texts)}; {way_out}" if texts else ""


def check(network: Network, target: str) -> tuple[str, ...]:
    """A warning of what the CPU beside a target computes; empty if that is nothing.

    Raises:
        InputError: the target cannot compute some blocks; names them, and the way out.
    """
    if text := _problems(network, target, REFUSED):
        raise InputError(text)
    text = _problems(network, target, ON_CPU)
    return (f"warning: {text}; until then the CPU computes that",) if text else ()
