"""A network as an ONNX graph: its nodes, the ONNX form of every activation and of every kind of block.

Nothing is traced; the cfg is the graph. `emit` adds the nodes of one block after the other. Block 7 makes the tensor
`block7`, and `block7/linear` before its activation; a block that computes nothing hands on what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import helper, numpy_helper

from utils import __version__
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
from utils.export.integers import Codes, Kernel, RoundingPoint
from utils.layers import LEAKY_SLOPE
from utils.runtime.exported import PRODUCER

Arrays = Mapping[str, NDArray[np.floating]]
Sides = Sequence[int | str]
"""Of a tensor that a file takes or returns; a name stands for a side that may vary."""
FLOAT = Codes({}, frozenset(), {})
"""No integers."""
HARDSWISH_OPSET = 14
MISH_CAP = {np.dtype(np.float32): 20.0, np.dtype(np.float16): 5.0}
"""Above this mish(x) rounds to x, and the terms of its exponential form stay finite."""


class Graph:
    """Nodes and constants so far. A node bears the name of the tensor it makes.

    Args:
        opset: version of ONNX's operators.
        dtype: of the values that the network computes with, float32 or float16.
        mish: one of `settings.MISH_FORMS`.
    """

    def __init__(self, opset: int, dtype: DTypeLike, mish: str) -> None:
        self.opset, self.dtype, self.mish = opset, np.dtype(dtype), mish
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._outputs: list[onnx.ValueInfoProto] = []

    def add(self, op: str, inputs: Sequence[str], output: str, *others: str, **attributes: Any) -> str:
        """Append a node; returns the name of its first tensor, `output`."""
        self._nodes.append(helper.make_node(op, inputs, [output, *others], name=output, **attributes))
        return output

    def slice(self, tensor: str, first: int, last: int, axis: int, output: str) -> str:
        """Append the entries first, …, last - 1 of an axis of a tensor."""
        bounds = {"first": first, "last": last, "axis": axis}
        inputs = [self.integers(f"{output}/{key}", [value]) for key, value in bounds.items()]
        return self.add("Slice", [tensor, *inputs], output)

    def constant(self, name: str, values: ArrayLike, dtype: DTypeLike | None = None) -> str:
        """Add a constant, in the type the network computes with unless another is given; returns its name."""
        array = np.asarray(values, self.dtype if dtype is None else dtype)
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def round(self, tensor: str, point: RoundingPoint) -> str:
        """Append the rounding of a tensor to integers and back; returns the name of what comes back."""
        kind = np.int8 if point.grid.signed else np.uint8
        scale = self.constant(f"{tensor}/scale", point.scale, np.float32)
        zero = self.constant(f"{tensor}/zero", point.zero, kind)
        codes = self.add("QuantizeLinear", [tensor, scale, zero], f"{tensor}/codes")
        return self.add("DequantizeLinear", [codes, scale, zero], f"{tensor}/rounded")

    def integral(
        self, name: str, codes: NDArray[np.integer], scale: NDArray[np.floating], *, explicit: bool = False
    ) -> str:
        """Add a constant of integers with a scale for each channel of dimension 0.

        `explicit`: what is stored are the values, which the file rounds to these integers.
        """
        scales = [
            self.constant(f"{name}/scale", scale, np.float32),
            self.constant(f"{name}/zero", np.zeros(len(scale)), codes.dtype),
        ]
        if explicit:
            values = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
            stored = self.constant(f"{name}/values", values)
            whole = self.add("QuantizeLinear", [stored, *scales], f"{name}/codes", axis=0)
        else:
            whole = self.constant(f"{name}/codes", codes, codes.dtype)
        return self.add("DequantizeLinear", [whole, *scales], name, axis=0)

    def integers(self, name: str, values: ArrayLike) -> str:
        """Add sizes, axes or indices."""
        return self.constant(name, values, np.int64)

    def cast(self, tensor: str, output: str, dtype: DTypeLike) -> str:
        """Append a conversion to another type."""
        return self.add("Cast", [tensor], output, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def give(self, tensor: str, shape: Sides) -> None:
        """Make a float32 tensor an output of the file."""
        self._outputs.append(helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, list(shape)))

    def model(self, image: str, shape: Sides, properties: Mapping[str, str]) -> onnx.ModelProto:
        """The finished file.

        Args:
            image: name of the input, float32.
            shape: of the input.
            properties: metadata.
        """
        images = helper.make_tensor_value_info(image, onnx.TensorProto.FLOAT, list(shape))
        graph = helper.make_graph(self._nodes, "detector", [images], self._outputs, list(self._constants.values()))
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, opset_imports=[opset], producer_name=PRODUCER, producer_version=__version__)
        model.ir_version = helper.find_min_ir_version_for([opset])
        helper.set_model_props(model, dict(properties))
        return model


GATE = {"alpha": 1 / 6, "beta": 0.5}
"""Of the hard sigmoid."""
OPERATORS: dict[str, tuple[str, dict[str, float]]] = {
    "leaky": ("LeakyRelu", {"alpha": LEAKY_SLOPE}),
    "relu": ("Relu", {}),
    "logistic": ("Sigmoid", {}),
    "hardsigmoid": ("HardSigmoid", GATE),
}
"""Activations that ONNX has one operator for in every version."""


def activate(graph: Graph, activation: str, x: str, y: str) -> str:
    """Append an activation, the word of a cfg, from tensor x to y; returns y, or x where there is none."""
    if activation == "linear":
        return x
    if activation in OPERATORS:
        operator, attributes = OPERATORS[activation]
        return graph.add(operator, [x], y, **attributes)
    if activation == "relu6":
        return graph.add("Clip", [x, graph.constant(f"{y}/low", 0.0), graph.constant(f"{y}/high", 6.0)], y)
    if activation == "mish":
        return MISH[graph.mish](graph, x, y)
    if activation == "h_swish" and graph.opset >= HARDSWISH_OPSET:
        return graph.add("HardSwish", [x], y)
    gate = {"swish": "logistic", "h_swish": "hardsigmoid"}[activation]
    return graph.add("Mul", [x, activate(graph, gate, x, f"{y}/gate")], y)


def mish_exponential(graph: Graph, x: str, y: str) -> str:
    """mish(x) = x n / (n + 2), with n = e (e + 2) and e = exp(x), which is x tanh(ln(1 + exp(x))) written out.

    In onnxruntime 1.32 it takes a twelfth of the time of `mish_softplus` and a thirtieth of that of `mish_operator`,
    because Exp and arithmetic are vectorised there and Softplus is not.
    """
    cap, two = graph.constant(f"{y}/cap", MISH_CAP[graph.dtype]), graph.constant(f"{y}/two", 2.0)
    e = graph.add("Exp", [graph.add("Min", [x, cap], f"{y}/capped")], f"{y}/e")
    n = graph.add("Mul", [e, graph.add("Add", [e, two], f"{y}/e+2")], f"{y}/n")
    gate = graph.add("Div", [n, graph.add("Add", [n, two], f"{y}/n+2")], f"{y}/gate")
    return graph.add("Mul", [x, gate], y)


def mish_softplus(graph: Graph, x: str, y: str) -> str:
    """mish(x) = x tanh(softplus(x)): the three nodes that OpenCV recognises and computes as one."""
    gate = graph.add("Tanh", [graph.add("Softplus", [x], f"{y}/softplus")], f"{y}/gate")
    return graph.add("Mul", [x, gate], y)


def mish_operator(graph: Graph, x: str, y: str) -> str:
    """ONNX's own operator; from opset 18 on."""
    return graph.add("Mish", [x], y)


MISH: dict[str, Callable[[Graph, str, str], str]] = {
    "exp": mish_exponential,
    "softplus": mish_softplus,
    "op": mish_operator,
}
"""Forms of `--mish`; the same function in each."""


@dataclass(frozen=True)
class Site:
    """Where a block stands in the graph."""

    graph: Graph
    name: str
    """Of the tensor it makes."""
    block: Any
    """Of the kind that the function in EMITTERS is for."""
    inputs: tuple[str, ...]
    """Tensors of the blocks it reads."""
    shapes: tuple[Shape, ...]
    """Of these."""
    arrays: Arrays
    """Its weights, by their names in the block."""
    kernel: Kernel | None = None
    """Its weights in integers, where it is rounded."""
    before: RoundingPoint | None = None
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
        return activate(self.graph, self.block.activation, linear, self.name)

    def weights(self) -> list[str]:
        """Add the kernel of the block's convolution, and its bias."""
        names = f"{self.name}/weight", f"{self.name}/bias"
        if self.kernel is not None:
            return self._integral(self.kernel, *names)
        arrays = [self.arrays.get("conv.weight"), self.arrays.get("conv.bias")]
        return [self.graph.constant(name, of) for name, of in zip(names, arrays, strict=True) if of is not None]

    def _integral(self, kernel: Kernel, name: str, bias_name: str) -> list[str]:
        weight = self.graph.integral(name, kernel.codes, kernel.scale, explicit=self.explicit)
        if kernel.bias is None:
            return [weight]
        if self.explicit:
            return [weight, self.graph.constant(bias_name, kernel.bias * kernel.bias_scale)]
        return [weight, self.graph.integral(bias_name, kernel.bias, kernel.bias_scale)]


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
    for layer, op, attributes in (("fc1", "Relu", {}), ("fc2", "HardSigmoid", GATE)):
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
            tensors[number] = site.graph.slice(tensor, width * block.group_id, width * (block.group_id + 1), 1, name)
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
            tensor = site.graph.slice(tensor, 0, common, 1, f"{site.name}/cut{number}")
        if scales is not None:
            scale = scales[number] if scales[number].size == 1 else scales[number][:common]
            tensor = _scaled(site, tensor, scale, f"{site.name}/scaled{number}")
        output = site.linear if number == len(block.sources) else f"{site.name}/sum{number}"
        if common == width:
            total = site.graph.add("Add", [total, tensor], output)
        else:  # not padded: pnnx does not convert Pad along channels
            rest = site.graph.slice(total, common, width, 1, f"{output}/rest")
            low = site.graph.slice(total, 0, common, 1, f"{output}/low")
            low = site.graph.add("Add", [low, tensor], f"{output}/added")
            total = site.graph.add("Concat", [low, rest], output, axis=1)
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
    codes: Codes | None = None,
) -> Sequence[str]:
    """Add the nodes of all blocks.

    Args:
        graph: what they are added to.
        network: without batch normalisation; its width and height are those of the input.
        arrays: its state dict.
        image: tensor of the pictures, in the type the graph computes with.
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
            codes.kernels.get(index),
            point if index in codes.before else None,
            codes.explicit,
        )
        made = EMITTERS[type(block)](site)
        tensors[index] = made if point is None or made in site.inputs else graph.round(made, point)
    return [tensors[head] for head in network.heads]
