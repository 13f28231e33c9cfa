"""The ncnn form of every kind of block and activation: one function or value each, two tables. The cfg is the graph.

Every function adds the layers of its block and returns the name of the blob that holds the block's output: `block7` for
block 7; a block that computes nothing returns what it reads. All blobs have three sides, also where ncnn would drop two
of length 1. Layers and the numbers of their parameters: docs/developer-guide/operators.md of ncnn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import (
    Avgpool,
    Block,
    Convolutional,
    Dropout,
    Maxpool,
    Network,
    Reorg,
    Route,
    Sam,
    ScaleChannels,
    Se,
    Shape,
    Shortcut,
    Upsample,
    Yolo,
)
from utils.darknet.shapes import trace
from utils.export.blocks import Arrays
from utils.export.ncnn_graph import NcnnFiles, NcnnGraph, Value
from utils.layers import LEAKY_SLOPE
from utils.pruning.constants import shortcut_scales
from utils.runtime.metadata import IMAGE

ADD, MULTIPLY = 0, 2
"""Kinds of `BinaryOp`."""
MAXIMUM, AVERAGE, PADDED_AS_SAID = 0, 1, 1
"""Kinds of `Pooling`, and of its padding."""
NEAREST = 1
"""Kind of `Interp`."""
CELLS_FIRST = 1
"""Kind of `Reorg`: output channel (y · stride + x) · C + c."""


@dataclass(frozen=True)
class Activation:
    """How ncnn computes an activation."""

    kind: str
    """A layer of its own; empty: none."""
    params: Mapping[int, Value]
    fused: tuple[int, tuple[float, ...]] | None
    """The same at the end of a convolution: number and parameters; None where ncnn cannot."""


GATE = (1 / 6, 0.5)
"""Slope and offset of the hard sigmoid."""
ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation("", {}, (0, ())),
    "leaky": Activation("ReLU", {0: LEAKY_SLOPE}, (2, (LEAKY_SLOPE,))),
    "relu": Activation("ReLU", {}, (1, ())),
    "relu6": Activation("Clip", {0: 0.0, 1: 6.0}, (3, (0.0, 6.0))),
    "mish": Activation("Mish", {}, (5, ())),
    "swish": Activation("Swish", {}, None),
    "logistic": Activation("Sigmoid", {}, (4, ())),
    "h_swish": Activation("HardSwish", dict(enumerate(GATE)), (6, GATE)),
    "hardsigmoid": Activation("HardSigmoid", dict(enumerate(GATE)), None),
}


@dataclass(frozen=True)
class Site:
    """Where a block stands in the graph."""

    graph: NcnnGraph
    name: str
    """Of the blob it makes."""
    block: Block
    inputs: tuple[str, ...]
    """Blobs of the blocks it reads."""
    shapes: tuple[Shape, ...]
    """Of these."""
    arrays: Arrays
    """Its weights, by their names in the block."""

    @property
    def linear(self) -> str:
        """Name of the blob before an activation that is a layer of its own; the block's own where there is none."""
        return f"{self.name}/linear" if ACTIVATIONS[self.block.activation].kind else self.name

    def activate(self) -> str:
        """Add the activation of the block behind its blob `linear`."""
        curve = ACTIVATIONS[self.block.activation]
        return self.graph.add(curve.kind, [self.linear], self.name, curve.params) if curve.kind else self.name

    def channels(self, blob: str, first: int, last: int, output: str) -> str:
        """Add the channels first, …, last - 1 of a blob."""
        return self.graph.add("Crop", [blob], output, {9: [first], 10: [last], 11: [0]})

    def convolution(
        self,
        blob: str,
        output: str,
        block: Convolutional,
        weight: NDArray[np.floating],
        bias: NDArray[np.floating] | None = None,
    ) -> str:
        """Add a convolution with its activation; weight [filters, C / groups, k, k]."""
        curve = ACTIVATIONS[block.activation]
        linear = output if curve.fused else f"{output}/linear"
        params: dict[int, Value] = {
            0: block.filters,
            1: block.size,
            2: block.dilation,
            3: block.stride_x,
            4: block.padding * block.dilation,
            5: int(bias is not None),
            6: weight.size,
            13: block.stride_y,
        }
        if block.groups > 1:
            params[7] = block.groups
        if curve.fused and curve.fused[0]:
            params[9] = curve.fused[0]
            if curve.fused[1]:
                params[10] = curve.fused[1]
        stored = (self.graph.kernel(weight), *(() if bias is None else (self.graph.vector(bias),)))
        self.graph.add("ConvolutionDepthWise" if block.groups > 1 else "Convolution", [blob], linear, params, *stored)
        return output if curve.fused else self.graph.add(curve.kind, [linear], output, curve.params)

    def mean(self, output: str) -> str:
        """Add the mean over all cells of the first input."""
        flat = self.graph.add("Pooling", self.inputs[:1], f"{output}/flat", {0: AVERAGE, 4: 1})
        return self.graph.add("Reshape", [flat], output, {0: 1, 1: 1, 2: self.shapes[0].channels})


def _convolution(site: Site) -> str:
    block: Convolutional = site.block
    assert not block.batch_normalize, "batch normalisation is folded before"
    weight, bias = site.arrays["conv.weight"], site.arrays.get("conv.bias")
    return site.convolution(site.inputs[0], site.name, block, weight, bias)


def _squeeze_excite(site: Site) -> str:
    x = site.mean(f"{site.name}/mean")
    for layer, activation in (("fc1", "relu"), ("fc2", "hardsigmoid")):
        weight = site.arrays[f"{layer}.weight"]
        x = site.convolution(
            x, f"{site.name}/{layer}", Convolutional(filters=len(weight), activation=activation), weight
        )
    return site.graph.add("BinaryOp", [site.inputs[0], x], site.name, {0: MULTIPLY})


def _maxpool(site: Site) -> str:
    block: Maxpool = site.block
    before = block.padding // 2
    after = block.padding - before
    params = {0: MAXIMUM, 1: block.size, 2: block.stride_x, 12: block.stride_y, 5: PADDED_AS_SAID}
    return site.graph.add("Pooling", site.inputs, site.name, {**params, 3: before, 13: before, 14: after, 15: after})


def _avgpool(site: Site) -> str:
    return site.mean(site.name)


def _upsample(site: Site) -> str:
    stride = float(site.block.stride)
    return site.graph.add("Interp", site.inputs, site.name, {0: NEAREST, 1: stride, 2: stride})


def _route(site: Site) -> str:
    block: Route = site.block
    blobs = list(site.inputs)
    if block.groups > 1:
        for number, (blob, shape) in enumerate(zip(site.inputs, site.shapes, strict=True)):
            width = shape.channels // block.groups
            name = site.name if len(blobs) == 1 else f"{site.name}/part{number}"
            blobs[number] = site.channels(blob, width * block.group_id, width * (block.group_id + 1), name)
    return blobs[0] if len(blobs) == 1 else site.graph.add("Concat", blobs, site.name, {0: 0})


def _shortcut(site: Site) -> str:
    block: Shortcut = site.block
    scales = shortcut_scales(block, site.arrays.get("weights"))
    total, width = site.inputs[0], site.shapes[0].channels
    if scales is not None:
        total = _scaled(site, total, scales[0], width, f"{site.name}/scaled0")
    for number, (blob, shape) in enumerate(zip(site.inputs[1:], site.shapes[1:], strict=True), 1):
        common = min(width, shape.channels)
        if common < shape.channels:
            blob = site.channels(blob, 0, common, f"{site.name}/cut{number}")
        if scales is not None:
            blob = _scaled(site, blob, scales[number], common, f"{site.name}/scaled{number}")
        if common < width:
            blob = site.graph.add("Padding", [blob], f"{site.name}/wide{number}", {8: width - common})
        output = site.linear if number == len(block.sources) else f"{site.name}/sum{number}"
        total = site.graph.add("BinaryOp", [total, blob], output, {0: ADD})
    return site.activate()


def _scaled(site: Site, blob: str, scale: NDArray[np.floating], width: int, output: str) -> str:
    """Add the product with one factor, or one a channel."""
    factors = np.broadcast_to(scale[:width], width)
    return site.graph.add("Scale", [blob], output, {0: width}, site.graph.vector(factors))


def _product(site: Site) -> str:
    scale, source = site.inputs
    site.graph.add("BinaryOp", [source, scale], site.linear, {0: MULTIPLY})
    return site.activate()


def _reorg(site: Site) -> str:
    """Darknet reads the memory of [C, H, W] as [C / s², s · H, s · W] before it takes the cells apart."""
    stride, (channels, height, width) = site.block.stride, site.shapes[0]
    graph, name = site.graph, site.name
    wide = {0: width * stride, 1: height * stride, 2: channels // stride**2}
    deep = {0: width // stride, 1: height // stride, 2: channels * stride**2}
    x = graph.add("Reshape", site.inputs, f"{name}/reread", wide)
    x = graph.add("Reorg", [x], f"{name}/cells", {0: stride, 1: CELLS_FIRST})
    return graph.add("Reshape", [x], name, deep)


def _pass(site: Site) -> str:
    return site.inputs[0]


EMITTERS: dict[type[Block], Callable[[Site], str]] = {
    Convolutional: _convolution,
    Se: _squeeze_excite,
    Maxpool: _maxpool,
    Avgpool: _avgpool,
    Upsample: _upsample,
    Route: _route,
    Shortcut: _shortcut,
    ScaleChannels: _product,
    Sam: _product,
    Dropout: _pass,
    Reorg: _reorg,
    Yolo: _pass,
}


def ncnn_files(network: Network, arrays: Arrays, *, half: bool = False) -> NcnnFiles:
    """The network as ncnn reads it: one picture `images` in, raw heads `head0`, `head1`, … out.

    Args:
        network: without batch normalisation (`models.fuse`); its width and height are those of the input.
        arrays: its state dict.
        half: store the kernels of convolutions in float16.
    """
    graph, net = NcnnGraph(half=half), network.net
    shapes = {-1: Shape(net.channels, net.height, net.width), **dict(enumerate(trace(network)))}
    blobs = {-1: graph.add("Input", (), IMAGE, {0: net.width, 1: net.height, 2: net.channels})}
    for index, block in enumerate(network.blocks):
        reads, prefix = block.reads(index), f"layers.{index}."
        own = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        inputs = tuple(blobs[source] for source in reads)
        site = Site(graph, f"block{index}", block, inputs, tuple(shapes[source] for source in reads), own)
        blobs[index] = EMITTERS[type(block)](site)
    return graph.files({blobs[head]: f"head{number}" for number, head in enumerate(network.heads)})
