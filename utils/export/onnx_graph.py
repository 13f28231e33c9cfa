"""A network as an ONNX graph: the ONNX form of every activation and kind of block, of the decoding and of suppression.

Nothing is traced; the cfg is the graph. `emit` adds the nodes of one block after the other. Block 7 makes the tensor
`block7`, and `block7/linear` before its activation; a block that computes nothing hands on what it reads. What
follows the raw heads is always in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import helper, numpy_helper

from models import LEAKY_SLOPE, Darknet, fuse, oversized
from utils import __version__
from utils.darknet import blocks
from utils.darknet.blocks import Block, Network, Shape, Yolo
from utils.darknet.network import by_block, trace
from utils.detection.decode import LARGEST_EXPONENT, MAX_DETECTIONS
from utils.errors import InfeasibleError
from utils.export.integers import Codes
from utils.export.settings import ExportSettings
from utils.quantization.quantizers import ActivationQuantizer
from utils.runtime.exported import IMAGE, PRODUCER, Metadata

Arrays = Mapping[str, NDArray[np.floating]]
Sides = Sequence[int | str]
"""Of a tensor that a file takes or returns; a name stands for a side that may vary."""
FLOAT = Codes({}, {})
"""No integers."""
BATCH = "batch"
"""Name of the batch side where it may vary."""
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

    def round(self, tensor: str, slot: ActivationQuantizer, *, before: bool = False) -> str:
        """Append the rounding of a tensor to integers and back; returns the name of what comes back.

        `before`: the tensor is what an activation function gets, and not what the block puts out. `integers.stages` and
        `layer_gaps` find the codes by their name, TENSOR/codes.
        """
        scale, zero = (value.numpy() for value in (slot.scale_before() if before else slot.scale()))
        kind = np.int8 if slot.grid.signed else np.uint8
        scales = [self.constant(f"{tensor}/scale", scale, np.float32), self.constant(f"{tensor}/zero", zero, kind)]
        codes = self.add("QuantizeLinear", [tensor, *scales], f"{tensor}/codes")
        return self.add("DequantizeLinear", [codes, *scales], f"{tensor}/rounded")

    def integral(
        self, name: str, codes: NDArray[np.integer], scale: NDArray[np.floating], *, explicit: bool = False
    ) -> str:
        """Add a constant of integers with a scale for each channel of dimension 0.

        `explicit`: what is stored are the values, which the file rounds to these integers.
        """
        scales = [self.constant(f"{name}/scale", scale, np.float32)]
        if explicit:
            values = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
            stored = self.constant(f"{name}/values", values)
            scales.append(self.constant(f"{name}/zero", np.zeros(len(scale)), codes.dtype))  # it says the type
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
        return mish(graph, x, y)
    if activation == "h_swish" and graph.opset >= HARDSWISH_OPSET:
        return graph.add("HardSwish", [x], y)
    gate = {"swish": "logistic", "h_swish": "hardsigmoid"}[activation]
    return graph.add("Mul", [x, activate(graph, gate, x, f"{y}/gate")], y)


def mish(graph: Graph, x: str, y: str) -> str:
    """Append x tanh(ln(1 + exp(x))) in a form of `--mish`; the function is the same in each.

    exp: x n / (n + 2), with n = e (e + 2) and e = exp(x). In onnxruntime 1.32 it takes a tenth of the time of
    softplus and of op, because Exp and arithmetic are vectorised there and Softplus is not.
    softplus: the three nodes that OpenCV recognises and computes as one. op: ONNX's own, from opset 18 on.
    """
    if graph.mish == "op":
        return graph.add("Mish", [x], y)
    if graph.mish == "softplus":
        gate = graph.add("Tanh", [graph.add("Softplus", [x], f"{y}/softplus")], f"{y}/gate")
        return graph.add("Mul", [x, gate], y)
    cap, two = graph.constant(f"{y}/cap", MISH_CAP[graph.dtype]), graph.constant(f"{y}/two", 2.0)
    e = graph.add("Exp", [graph.add("Min", [x, cap], f"{y}/capped")], f"{y}/e")
    n = graph.add("Mul", [e, graph.add("Add", [e, two], f"{y}/e+2")], f"{y}/n")
    gate = graph.add("Div", [n, graph.add("Add", [n, two], f"{y}/n+2")], f"{y}/gate")
    return graph.add("Mul", [x, gate], y)


@dataclass(frozen=True)
class Site:
    """Where a block stands in the graph."""

    graph: Graph
    number: int
    block: Any
    """Of the kind that the function in EMITTERS is for."""
    inputs: tuple[str, ...]
    """Tensors of the blocks it reads."""
    shapes: tuple[Shape, ...]
    """Of these."""
    arrays: Arrays
    """Its weights, by their names in the block."""
    codes: Codes

    @property
    def name(self) -> str:
        """Name of the tensor it makes."""
        return f"block{self.number}"

    @property
    def linear(self) -> str:
        """Name of the tensor before the activation; the block's own where there is none."""
        return self.name if self.block.activation == "linear" else f"{self.name}/linear"

    def activate(self) -> str:
        """Add the activation of the block behind its tensor `linear`, which may be rounded first."""
        linear, slot = self.linear, self.codes.slots.get(self.number)
        if slot is not None and slot.twice:
            linear = self.graph.round(linear, slot, before=True)
        return activate(self.graph, self.block.activation, linear, self.name)

    def weights(self) -> list[str]:
        """Add the kernel of the block's convolution, and its bias."""
        graph, weight, bias = self.graph, f"{self.name}/weight", f"{self.name}/bias"
        kernel, explicit = self.codes.kernels.get(self.number), self.codes.explicit
        if kernel is None:
            tensors = {weight: self.arrays["conv.weight"], bias: self.arrays.get("conv.bias")}
            return [graph.constant(name, array) for name, array in tensors.items() if array is not None]
        names = [graph.integral(weight, kernel.codes, kernel.scale, explicit=explicit)]
        if kernel.bias is not None and explicit:
            names.append(graph.constant(bias, kernel.bias * kernel.bias_scale))
        elif kernel.bias is not None:
            names.append(graph.integral(bias, kernel.bias, kernel.bias_scale))
        return names


def _convolution(site: Site) -> str:
    block: blocks.Convolutional = site.block
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
    return _multiply(graph, [site.inputs[0], x], name)


def _maxpool(site: Site) -> str:
    block: blocks.Maxpool = site.block
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
    block: blocks.Route = site.block
    tensors = list(site.inputs)
    if block.groups > 1:
        for number, (tensor, shape) in enumerate(zip(site.inputs, site.shapes, strict=True)):
            width = shape.channels // block.groups
            name = site.name if len(tensors) == 1 else f"{site.name}/part{number}"
            tensors[number] = site.graph.slice(tensor, width * block.group_id, width * (block.group_id + 1), 1, name)
    return tensors[0] if len(tensors) == 1 else site.graph.add("Concat", tensors, site.name, axis=1)


def _shortcut(site: Site) -> str:
    block: blocks.Shortcut = site.block
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
    _multiply(site.graph, [source, scale], site.linear)
    return site.activate()


def _multiply(graph: Graph, factors: Sequence[str], output: str) -> str:
    """Append a product. OpenCV 4.14 takes one that reads a HardSigmoid for a hard swish, unless a node is between."""
    between = [graph.add("Identity", [factor], f"{output}/factor{number}") for number, factor in enumerate(factors)]
    return graph.add("Mul", between, output)


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
    blocks.Convolutional: _convolution,
    blocks.Se: _squeeze_excite,
    blocks.Maxpool: _maxpool,
    blocks.Avgpool: _avgpool,
    blocks.Upsample: _upsample,
    blocks.Route: _route,
    blocks.Shortcut: _shortcut,
    blocks.ScaleChannels: _product,
    blocks.Sam: _product,
    blocks.Dropout: _pass,
    blocks.Reorg: _reorg,
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
    tensors = {-1: graph.round(image, codes.slots[-1]) if -1 in codes.slots else image}
    stored = by_block(arrays)
    for index, block in enumerate(network.blocks):
        reads, slot = block.reads(index), codes.slots.get(index)
        inputs = tuple(tensors[source] for source in reads)
        widths = tuple(shapes[source] for source in reads)
        site = Site(graph, index, block, inputs, widths, stored.get(index, {}), codes)
        made = EMITTERS[type(block)](site)  # the input itself if nothing is computed, which has been rounded already
        tensors[index] = made if slot is None or made in site.inputs else graph.round(made, slot)
    return [tensors[head] for head in network.heads]


def onnx_model(
    model: Darknet, metadata: Metadata, settings: ExportSettings, codes: Codes | None = None
) -> onnx.ModelProto:
    """The file, with its metadata.

    Args:
        model: in evaluation mode; its batch normalisations are folded in.
        metadata: of the file; `output` and `precision` decide what it is.
        settings: the rest.
        codes: the integers of a quantized network; None: it is float.

    Raises:
        InfeasibleError: a weight is too large for float16.
    """
    fused, half = fuse(model), metadata.precision == "float16"
    if half and (fault := oversized(fused, torch.float16)):
        raise InfeasibleError(f"--half: {fault}; leave --half out")
    network = fused.network
    arrays = {key: value.numpy() for key, value in fused.state_dict().items()}
    graph = Graph(settings.opset, np.float16 if half else np.float32, settings.mish)
    pictures = graph.cast(IMAGE, "images/half", np.float16) if half else IMAGE
    heads = []
    for number, head in enumerate(emit(graph, network, arrays, pictures, codes)):
        name = f"head{number}"
        heads.append(graph.cast(head, name, np.float32) if half else graph.add("Identity", [head], name))
    batch = BATCH if settings.dynamic_batch else 1
    every = trace(network)
    shapes = [every[head] for head in network.heads]
    if metadata.output == "heads":
        for head, shape in zip(heads, shapes, strict=True):
            graph.give(head, (batch, *shape))
    else:
        rows = add_rows(graph, heads, network, shapes)
        if metadata.output == "rows":
            columns = 5 + network.classes
            graph.give(rows, (batch, sum(map(prod, shapes)) // columns, columns))
        else:
            graph.give(add_detections(graph, rows, network.classes, metadata, settings), ("detections", 7))
    return graph.model(IMAGE, (batch, *network.image), metadata.properties())


def add_rows(graph: Graph, heads: Sequence[str], network: Network, shapes: Sequence[Shape]) -> str:
    """Add the decoding of all heads: the tensor `rows` [B, N, 5 + C], as `utils.detection.decode.decode` returns it.

    Args:
        graph: what the nodes are added to.
        heads: float32 tensors [B, A · (5 + C), H, W].
        network: whose heads they are.
        shapes: of the heads.
    """
    parts = [
        _add_head(graph, head, yolo, shape, network.image, f"rows{number}")
        for number, (head, yolo, shape) in enumerate(zip(heads, network.yolos, shapes, strict=True))
    ]
    return graph.add("Concat", parts, "rows", axis=1)


def _add_head(graph: Graph, head: str, yolo: Yolo, shape: Shape, image: Shape, name: str) -> str:
    """Rows [B, A · H · W, 5 + C] of one head."""
    anchors, columns, cells = len(yolo.mask), 5 + yolo.classes, shape.height * shape.width
    split = graph.integers(f"{name}/split", [0, anchors, columns, cells])
    flat = graph.integers(f"{name}/flat", [0, anchors * cells, columns])
    x = graph.add("Reshape", [head, split], f"{name}/planes")
    x = graph.add("Transpose", [x], f"{name}/cells", perm=[0, 1, 3, 2])
    x = graph.add("Reshape", [x, flat], f"{name}/values")
    place, size, scores = (
        graph.slice(x, first, last, 2, f"{name}/{what}")
        for what, first, last in (("place", 0, 2), ("size", 2, 4), ("scores", 4, columns))
    )
    if not yolo.new_coords:
        place = graph.add("Sigmoid", [place], f"{name}/position")
        scores = graph.add("Sigmoid", [scores], f"{name}/probabilities")
    parts = [_centres(graph, place, yolo, shape, image, name), _sizes(graph, size, yolo, cells, name), scores]
    return graph.add("Concat", parts, name, axis=2)


def _centres(graph: Graph, position: str, yolo: Yolo, shape: Shape, image: Shape, name: str) -> str:
    """(s · position - (s - 1) / 2 + cell) · stride, as position · factor + offset."""
    stride = np.array((image.width / shape.width, image.height / shape.height))
    rows, columns = np.divmod(np.arange(shape.height * shape.width), shape.width)
    offsets = (np.stack((columns, rows), axis=1) - (yolo.scale_x_y - 1) / 2) * stride
    factor = graph.constant(f"{name}/factor", yolo.scale_x_y * stride, np.float32)
    offset = graph.constant(f"{name}/offset", np.tile(offsets, (len(yolo.mask), 1))[None], np.float32)
    return graph.add("Add", [graph.add("Mul", [position, factor], f"{name}/scaled"), offset], f"{name}/centres")


def _sizes(graph: Graph, size: str, yolo: Yolo, cells: int, name: str) -> str:
    """Anchor · exp(size), or with new_coords anchor · (2 size)²."""
    anchors = np.repeat(np.array(yolo.head_anchors), cells, axis=0)[None]
    if yolo.new_coords:
        factor = graph.add("Mul", [size, size], f"{name}/square")
        anchors = 4 * anchors
    else:
        most = graph.constant(f"{name}/most", LARGEST_EXPONENT, np.float32)
        factor = graph.add("Exp", [graph.add("Min", [size, most], f"{name}/exponent")], f"{name}/power")
    return graph.add("Mul", [factor, graph.constant(f"{name}/anchors", anchors, np.float32)], f"{name}/sizes")


def add_detections(graph: Graph, rows: str, classes: int, metadata: Metadata, settings: ExportSettings) -> str:
    """Add non-maximum suppression: `detections` [K, 7], best first.

    The columns are picture, x1, y1, x2, y2 in pixels of the network input, confidence, class. There are three
    differences to `utils.detection.decode.non_max_suppression` with the same thresholds. All candidates enter
    suppression, not the best 3000 of a picture. Overlaps are float32, not float64. And with a dynamic batch the best
    300 of each class are kept, not the best 300 of a picture.

    Args:
        graph: what the nodes are added to.
        rows: of `add_rows`.
        classes: their number.
        metadata: its thresholds.
        settings: its `multi_label` and batch.
    """
    corners = _corners(graph, rows)
    scores = _scores(graph, rows, classes, settings.multi_label)
    limits = [
        graph.integers("most", [MAX_DETECTIONS]),
        graph.constant("iou_thres", [metadata.iou_thres], np.float32),
        graph.constant("conf_thres", [metadata.conf_thres], np.float32),
    ]
    selected = graph.add("NonMaxSuppression", [corners, scores, *limits], "found")
    picture, label, row = (
        graph.add("Gather", [selected, graph.integers(f"{name}_axis", [axis])], name, axis=1)
        for axis, name in enumerate(("picture", "label", "row"))
    )
    confidence = graph.add("GatherND", [scores, selected], "confidence")
    box = graph.add("GatherND", [corners, graph.add("Concat", [picture, row], "place", axis=1)], "box")
    columns = [
        graph.cast(picture, "picture_column", np.float32),
        box,
        graph.add("Unsqueeze", [confidence, graph.integers("column", [1])], "confidence_column"),
        graph.cast(label, "label_column", np.float32),
    ]
    unsorted = graph.add("Concat", columns, "unsorted", axis=1)
    count = graph.add("Shape", [confidence], "count")
    if settings.batch == 1:
        count = graph.add("Min", [count, graph.integers("limit", [MAX_DETECTIONS])], "kept")
    graph.add("TopK", [confidence, count], "sorted", "order", axis=0, largest=1, sorted=1)
    return graph.add("Gather", [unsorted, "order"], "detections", axis=0)


def _corners(graph: Graph, rows: str) -> str:
    """x1, y1, x2, y2 [B, N, 4] of centres and sizes."""
    centre = graph.slice(rows, 0, 2, 2, "centre")
    half = graph.add("Mul", [graph.slice(rows, 2, 4, 2, "extent"), graph.constant("half", 0.5, np.float32)], "reach")
    low, high = graph.add("Sub", [centre, half], "low"), graph.add("Add", [centre, half], "high")
    return graph.add("Concat", [low, high], "corners", axis=2)


def _scores(graph: Graph, rows: str, classes: int, multi_label: bool) -> str:
    """Confidences [B, C, N]; 0 but for the best class of a row unless several may count."""
    probabilities = graph.slice(rows, 5, 5 + classes, 2, "probabilities")
    scores = graph.add("Mul", [probabilities, graph.slice(rows, 4, 5, 2, "objectness")], "products")
    if not multi_label and classes > 1:
        best = graph.add("ArgMax", [scores], "best", axis=2, keepdims=1)
        is_best = graph.add("Equal", [best, graph.integers("numbers", np.arange(classes)[None, None])], "own")
        scores = graph.add("Where", [is_best, scores, graph.constant("none", 0.0, np.float32)], "best_only")
    return graph.add("Transpose", [scores], "scores", perm=[0, 2, 1])
