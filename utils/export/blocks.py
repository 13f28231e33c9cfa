"""The ONNX form of every kind of block: one function each, one table. Nothing is traced; the cfg is the graph.

Every function adds the nodes of its block and returns the name of the tensor that holds the block's output. That is
`block7` for block 7, and `block7/linear` before its activation; a block that computes nothing returns what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from utils.darknet.network import by_block, trace
from utils.export.activations import Form
from utils.export.codes import Codes, Kernel, Point
from utils.export.graph import Graph

Arrays = Mapping[str, NDArray[np.floating]]
FLOAT = Codes({}, frozenset(), {})
"""No integers."""


@dataclass(frozen=True)
class Site:
    """Where a block stands in the graph."""

    graph: Graph
    name: str
    """Of the tensor it makes."""
    block: Block
    inputs: tuple[str, ...]
    """Tensors of the blocks it reads."""
    shapes: tuple[Shape, ...]
    """Of these."""
    arrays: Arrays
    """Its weights, by their names in the block."""
    activations: Mapping[str, Form]
    kernel: Kernel | None = None
    """Its weights in integers, where it is rounded."""
    before: Point | None = None
    """The rounding of what its activation gets, if that is rounded."""
    explicit: bool = False
    """As in `Codes`."""

    @property
    def linear(self) -> str:
        """Name of the tensor before the activation; the block's own where there is none."""
        return self.name if self.block.activation == "linear" else f"{self.name}/linear"

    def activate(self) -> str:
        """Add the activation of the block behind its tensor `linear`."""
        linear = self.linear if self.before is None else self.graph.round(self.linear, self.before)
        return self.activations[self.block.activation](self.graph, linear, self.name)

    def weights(self) -> list[str]:
        """Add the kernel of the block's convolution, and its bias."""
        names = f"{self.name}/weight", f"{self.name}/bias"
        if self.kernel is not None:
            return self._integral(*names)
        arrays = [self.arrays.get("conv.weight"), self.arrays.get("conv.bias")]
        return [self.graph.constant(name, of) for name, of in zip(names, arrays, strict=True) if of is not None]

    def _integral(self, name: str, bias_name: str) -> list[str]:
        kernel = self.kernel
        weight = self.graph.integral(name, kernel.codes, kernel.scale, explicit=self.explicit)
        if kernel.bias is None:
            return [weight]
        if self.explicit:
            return [weight, self.graph.constant(bias_name, kernel.bias * kernel.bias_scale)]
        return [weight, self.graph.integral(bias_name, kernel.bias, kernel.bias_scale)]

    def channels(self, tensor: str, first: int, last: int, output: str) -> str:
        """Add the channels first, …, last - 1 of a tensor."""
        bounds = [
            self.graph.integers(f"{output}/{key}", [value])
            for key, value in (("first", first), ("last", last), ("axis", 1))
        ]
        return self.graph.add("Slice", [tensor, *bounds], output)


def _convolution(site: Site) -> str:
    block: Convolutional = site.block
    assert not block.batch_normalize, "batch normalisation is folded before"
    site.graph.add(
        "Conv",
        [site.inputs[0], *site.weights()],
        site.linear,
        kernel_shape=[block.size] * 2,
        strides=[block.stride_y, block.stride_x],
        pads=[block.padding * block.dilation] * 4,
        dilations=[block.dilation] * 2,
        group=block.groups,
    )
    return site.activate()


def _squeeze_excite(site: Site) -> str:
    graph, name = site.graph, site.name
    x = graph.add("GlobalAveragePool", [site.inputs[0]], f"{name}/mean")
    for layer, op, attributes in (("fc1", "Relu", {}), ("fc2", "HardSigmoid", {"alpha": 1 / 6, "beta": 0.5})):
        weight = graph.constant(f"{name}/{layer}/weight", site.arrays[f"{layer}.weight"][:, :, None, None])
        x = graph.add("Conv", [x, weight], f"{name}/{layer}/linear", kernel_shape=[1, 1])
        x = graph.add(op, [x], f"{name}/{layer}", **attributes)
    return graph.add("Mul", [site.inputs[0], x], name)


def _maxpool(site: Site) -> str:
    block: Maxpool = site.block
    before = block.padding // 2
    return site.graph.add(
        "MaxPool",
        site.inputs,
        site.name,
        kernel_shape=[block.size] * 2,
        strides=[block.stride_y, block.stride_x],
        pads=[before] * 2 + [block.padding - before] * 2,
    )


def _avgpool(site: Site) -> str:
    return site.graph.add("GlobalAveragePool", site.inputs, site.name)


def _upsample(site: Site) -> str:
    stride = site.block.stride
    scales = site.graph.constant(f"{site.name}/scales", [1, 1, stride, stride], np.float32)
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return site.graph.add("Resize", [site.inputs[0], "", scales], site.name, **how)


def _route(site: Site) -> str:
    block: Route = site.block
    tensors = list(site.inputs)
    if block.groups > 1:
        for number, (tensor, shape) in enumerate(zip(site.inputs, site.shapes, strict=True)):
            width = shape.channels // block.groups
            name = site.name if len(tensors) == 1 else f"{site.name}/part{number}"
            tensors[number] = site.channels(tensor, width * block.group_id, width * (block.group_id + 1), name)
    return tensors[0] if len(tensors) == 1 else site.graph.add("Concat", tensors, site.name, axis=1)


def _shortcut(site: Site) -> str:
    block: Shortcut = site.block
    scales = block.scales(site.arrays.get("weights"))
    total, width = site.inputs[0], site.shapes[0].channels
    if scales is not None:
        total = _scaled(site, total, scales[0], f"{site.name}/scaled0")
    for number, (tensor, shape) in enumerate(zip(site.inputs[1:], site.shapes[1:], strict=True), 1):
        common = min(width, shape.channels)
        if common < shape.channels:
            tensor = site.channels(tensor, 0, common, f"{site.name}/cut{number}")
        if scales is not None:
            scale = scales[number] if scales[number].size == 1 else scales[number][:common]
            tensor = _scaled(site, tensor, scale, f"{site.name}/scaled{number}")
        output = site.linear if number == len(block.sources) else f"{site.name}/sum{number}"
        if common == width:
            total = site.graph.add("Add", [total, tensor], output)
        else:  # pnnx has no form for Pad along channels
            rest = site.channels(total, common, width, f"{output}/rest")
            low = site.channels(total, 0, common, f"{output}/low")
            total = site.graph.add(
                "Concat", [site.graph.add("Add", [low, tensor], f"{output}/added"), rest], output, axis=1
            )
    return site.activate()


def _scaled(site: Site, tensor: str, scale: NDArray[np.floating], output: str) -> str:
    factor = site.graph.constant(f"{output}/factor", scale.reshape(1, -1, 1, 1))
    return site.graph.add("Mul", [tensor, factor], output)


def _product(site: Site) -> str:
    scale, source = site.inputs
    site.graph.add("Mul", [source, scale], site.linear)
    return site.activate()


def _reorg(site: Site) -> str:
    """Darknet reads the memory of [C, H, W] as [C / s², s · H, s · W] before it takes the cells apart.

    Columns are taken apart first, then rows; pnnx gives SpaceToDepth another order of channels.
    """
    s, (channels, height, width) = site.block.stride, site.shapes[0]
    graph, name = site.graph, site.name
    sides = {
        "columns": [0, channels // s**2, height * s, width, s],
        "rows": [0, channels // s, height, s, width],
        "deep": [0, channels * s**2, height // s, width // s],
    }
    x = site.inputs[0]
    for key, axes in (("columns", [0, 4, 1, 2, 3]), ("rows", [0, 3, 1, 2, 4])):
        x = graph.add("Reshape", [x, graph.integers(f"{name}/{key}/sides", sides[key])], f"{name}/{key}")
        x = graph.add("Transpose", [x], f"{name}/{key}/first", perm=axes)
    return graph.add("Reshape", [x, graph.integers(f"{name}/deep", sides["deep"])], name)


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


def emit(
    graph: Graph,
    network: Network,
    arrays: Arrays,
    image: str,
    activations: Mapping[str, Form],
    codes: Codes | None = None,
) -> Sequence[str]:
    """Add the nodes of all blocks.

    Args:
        graph: what they are added to.
        network: without batch normalisation; its width and height are those of the input.
        arrays: its state dict.
        image: tensor of the pictures, in the type the graph computes with.
        activations: their forms.
        codes: the integers of a quantized network; None: all is float.

    Returns:
        The tensors of the heads, in the order of the cfg.
    """
    codes = codes or FLOAT
    shapes = {-1: network.image, **dict(enumerate(trace(network)))}
    tensors = {-1: graph.round(image, codes.points[-1]) if -1 in codes.points else image}
    stored = by_block(arrays)
    for index, block in enumerate(network.blocks):
        reads, point = block.reads(index), codes.points.get(index)
        site = Site(
            graph,
            f"block{index}",
            block,
            tuple(tensors[source] for source in reads),
            tuple(shapes[source] for source in reads),
            stored.get(index, {}),
            activations,
            codes.kernels.get(index),
            point if index in codes.before else None,
            codes.explicit,
        )
        made = EMITTERS[type(block)](site)
        tensors[index] = made if point is None or made in site.inputs else graph.round(made, point)
    return [tensors[head] for head in network.heads]
