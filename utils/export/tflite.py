"""A network as a TensorFlow Lite file: TFLite's operators for the ONNX nodes that `onnx_graph` writes of each block.

So a block has one form, and a kind of node one operator. Feature maps are [1, H, W, C], but for nodes that rearrange
memory. Nodes between DequantizeLinear and QuantizeLinear become one operator on integers where TFLite has one; all
others compute in float32 between DEQUANTIZE and QUANTIZE. Integers are int8, as TFLite's quantization specification
asks: unsigned codes are moved down by 128, with their zero point, which leaves their values as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import ArrayLike, NDArray
from onnx import NodeProto, helper, numpy_helper

from utils.darknet.blocks.block import activated
from utils.export.onnx_graph import MISH_CAP
from utils.runtime.exported import DIGEST, IMAGE, UNSTAMPED, Metadata, stamped

Array = NDArray[Any]
LOW, HIGH = -128, 127
"""Of int8."""
SHIFT = 128
"""Between codes of uint8 and those of int8."""
ALIGNMENT = 16
"""Bytes, of constants: the schema asks for it, and flatbuffers for Python does not see to it."""
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""Axes that bring channels to the end, and back."""
AXIS = (0, 3, 1, 2)
"""Of a map with channels last, for each axis of one with channels first."""
KINDS = {np.dtype(kind): getattr(schema.TensorType, kind.upper()) for kind in ("float32", "float16", "int32", "int8")}
OPTIONS = {
    "CONV_2D": "Conv2D",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2D",
    "MAX_POOL_2D": "Pool2D",
    "MEAN": "Reducer",
    "MINIMUM": "MaximumMinimum",
    "PADV2": "PadV2",
    **dict.fromkeys(("LOGISTIC", "RELU", "RELU6"), ""),
}
"""Names of the options of an operator that are not its own; some have none."""


class Affine(NamedTuple):
    """Affine quantization of a tensor: value = scale · (code − zero)."""

    scale: float | Array
    """Of all, or for each entry of an axis."""
    zero: int = 0
    axis: int = 0


LOGISTIC = Affine(1 / 256, LOW)
"""Codes that TFLite's LOGISTIC puts out."""


class Value(NamedTuple):
    """A tensor of the file."""

    number: int
    shape: tuple[int, ...]
    """As it is stored."""
    codes: Affine | None = None
    """Of int8; None: float32."""
    last: bool = True
    """Channels are last, if it has four dimensions."""


class AlignedBuffer(schema.BufferT):
    """Bytes of a constant."""

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 - of the schema
        """Write it; returns its place."""
        payload = self.data.tobytes()
        builder.StartVector(1, len(payload), ALIGNMENT)
        builder.head -= len(payload)
        builder.Bytes[builder.head : builder.head + len(payload)] = payload
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


class FileBuilder:
    """Tensors, operators and constants of a file so far."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[str] = []
        self.buffers: list[Any] = [schema.BufferT()]  # number 0 is that of tensors without a constant

    def buffer(self, data: Array) -> int:
        """Add bytes; returns their number."""
        self.buffers.append(AlignedBuffer(data))
        return len(self.buffers) - 1

    def tensor(
        self, name: str, shape: Sequence[int], codes: Affine | None = None, *, last: bool = True, **more: Any
    ) -> Value:
        """Add a tensor.

        Args:
            name: of it.
            shape: as it is stored.
            codes: meaning of its int8; None: float32.
            last: channels are last.
            more: `data` of a constant, or the `dtype` where it is another one.
        """
        data, quantization = more.get("data"), None
        dtype = more.get("dtype", "float32" if codes is None else "int8") if data is None else data.dtype
        if codes is not None:  # the schema stores arrays as they are, in place of the numbers in them
            scales = np.atleast_1d(np.float32(codes.scale))
            zeros = np.full(len(scales), codes.zero, np.int64)
            quantization = schema.QuantizationParametersT(scale=scales, zeroPoint=zeros, quantizedDimension=codes.axis)
        buffer = 0 if data is None else self.buffer(data)
        kind = KINDS[np.dtype(dtype)]
        self.tensors.append(schema.TensorT(list(shape), kind, buffer, name, quantization, hasRank=True))
        return Value(len(self.tensors) - 1, tuple(shape), codes, last)

    def constant(self, name: str, array: Array, codes: Affine | None = None) -> Value:
        """Add a constant."""
        return self.tensor(name, array.shape, codes, data=array)

    def operator(self, code: str, inputs: Sequence[Value], output: Value, **options: Any) -> Value:
        """Add an operator; returns its output.

        Args:
            code: name of the operator.
            inputs: what it reads.
            output: what it makes.
            options: the ones that are not 0, as the schema names them.
        """
        if code not in self.codes:
            self.codes.append(code)
        made = schema.OperatorT(self.codes.index(code), [value.number for value in inputs], [output.number])
        if kind := OPTIONS.get(code, code.title().replace("_", "")):
            made.builtinOptionsType = getattr(schema.BuiltinOptions, f"{kind}Options")
            made.builtinOptions = getattr(schema, f"{kind}OptionsT")(**options)
        self.operators.append(made)
        return output

    def file(self, images: Value, outputs: dict[str, Value], properties: dict[str, str]) -> bytes:
        """The finished file.

        Args:
            images: its input.
            outputs: what it puts out, by name.
            properties: metadata.
        """
        numbers = {name: value.number for name, value in outputs.items()}
        for name, number in ((IMAGE, images.number), *numbers.items()):
            self.tensors[number].name = name
        codes = []
        for name in self.codes:
            number = getattr(schema.BuiltinOperator, name)
            codes.append(schema.OperatorCodeT(min(number, 127), builtinCode=number))
        ends = list(dict.fromkeys(numbers.values()))
        signature = schema.SignatureDefT(
            [schema.TensorMapT(IMAGE, images.number)],
            [schema.TensorMapT(name, number) for name, number in numbers.items()],
            "serving_default",
        )
        metadata = [
            schema.MetadataT(key, self.buffer(np.frombuffer(text.encode(), np.uint8)))
            for key, text in properties.items()
        ]
        graph = schema.SubGraphT(self.tensors, [images.number], ends, self.operators, "detector")
        model = schema.ModelT(3, codes, [graph], "", self.buffers, metadata=metadata, signatureDefs=[signature])
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


class Lowering:
    """A graph of ONNX nodes, and the file that is made of them.

    Args:
        made: the file of `onnx_graph.onnx_model`.
        outputs: names of the tensors that are put out.
        half: float constants of four dimensions are stored in float16.
    """

    def __init__(self, made: onnx.ModelProto, outputs: Sequence[str], half: bool) -> None:
        self.graph = onnx.shape_inference.infer_shapes(made).graph
        self.outputs, self.half, self.writer = outputs, half, FileBuilder()
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}
        self.readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        known = (*self.graph.input, *self.graph.value_info, *self.graph.output)
        self.shapes = {
            value.name: tuple(side.dim_value for side in value.type.tensor_type.shape.dim) for value in known
        }
        self.values: dict[str, Value] = {}
        self.floats: dict[int, Value] = {}
        """Tensors of float32 by the number of the codes they were made of."""
        self.done: set[str] = set()
        """Outputs of nodes that an operator has taken in."""

    def file(self, properties: dict[str, str]) -> bytes:
        """Lower all nodes; returns the file."""
        rounding = self.reader(IMAGE, "QuantizeLinear")
        start = IMAGE if rounding is None else rounding.output[0]
        images = self.make(IMAGE, None if rounding is None else self.meaning(rounding))
        self.values[start] = images
        self.done.add(start)
        for node in self.graph.node:
            if node.output[0] not in self.done:
                LOWERINGS[node.op_type](self, node)
        outputs = {name: self.value(name) for name in self.outputs}
        return self.writer.file(images, outputs, properties)

    def make(self, name: str, codes: Affine | None = None, *, last: bool = True) -> Value:
        """Add the tensor of a node's output."""
        shape = self.shapes[name]
        return self.writer.tensor(name, permuted(shape, LAST) if last else shape, codes, last=last)

    def value(self, name: str, *, last: bool = True) -> Value:
        """A tensor, with channels last or first where it has four dimensions."""
        if name in self.constants:
            array = self.constants[name]
            self.values[name] = self.number(name, array.transpose(permuted(range(array.ndim), LAST)))
        value = self.values[name]
        if len(value.shape) == 4 and value.last != last:
            axes = LAST if last else FIRST
            made = self.writer.tensor(f"{name}/turned", permuted(value.shape, axes), value.codes, last=last)
            value = self.writer.operator("TRANSPOSE", [value, self.whole(axes)], made)
        return value

    def number(self, name: str, values: ArrayLike) -> Value:
        """Add a float constant."""
        array = np.asarray(values, np.float32)
        if not self.half or array.ndim < 4:
            return self.writer.constant(name, array)
        stored = self.writer.constant(f"{name}/half", array.astype(np.float16))
        return self.writer.operator("DEQUANTIZE", [stored], self.writer.tensor(name, array.shape))

    def whole(self, numbers: Any) -> Value:
        """Add sizes, axes or places."""
        return self.writer.constant(f"integers{len(self.writer.tensors)}", np.array(numbers, np.int32))

    def real(self, value: Value) -> Value:
        """A tensor in float32."""
        if value.codes is None:
            return value
        if value.number not in self.floats:
            made = self.writer.tensor(f"real{value.number}", value.shape, last=value.last)
            self.floats[value.number] = self.writer.operator("DEQUANTIZE", [value], made)
        return self.floats[value.number]

    def recoded(self, value: Value, codes: Affine, name: str) -> Value:
        """A tensor in codes of this meaning."""
        if value.codes == codes:
            return value
        made = self.writer.tensor(name, value.shape, codes, last=value.last)
        return self.writer.operator("QUANTIZE", [value], made)

    def meaning(self, node: NodeProto) -> Affine:
        """Codes that a QuantizeLinear makes, moved to int8."""
        scale, zero = (self.constants[name] for name in node.input[1:])
        return Affine(float(scale), int(zero) - SHIFT * (zero.dtype == np.uint8))

    def reader(self, name: str, *kinds: str) -> NodeProto | None:
        """The only node that reads a tensor, if it is of these kinds."""
        readers = self.readers[name]
        one = len(readers) == 1 and name not in self.outputs and readers[0].op_type in kinds
        return readers[0] if one else None

    def compute(
        self,
        code: str,
        inputs: Sequence[Value],
        node: NodeProto,
        more: Sequence[Value] = (),
        **options: Any,
    ) -> None:
        """Add the operator of a node that computes; a relu and a rounding behind it become part of it.

        It works on integers where all inputs are codes and a rounding follows, otherwise on floats.

        Args:
            code: of the operator.
            inputs: values that it computes with.
            node: the node.
            more: axes and the like.
            options: of the operator.
        """
        name = node.output[0]
        if code in FUSING and (relu := self.reader(name, *RELUS)):
            options["fusedActivationFunction"] = getattr(schema.ActivationFunctionType, RELUS[relu.op_type])
            name = self.take(relu)
        rounding = self.reader(name, "QuantizeLinear")
        codes = None
        if rounding is not None and all(value.codes for value in inputs):
            codes, name = self.meaning(rounding), self.take(rounding)
        else:
            inputs = [self.real(value) for value in inputs]
        if codes is not None and code == "CONCATENATION":  # its kernel hands codes on
            inputs = [self.recoded(value, codes, f"{name}/part{number}") for number, value in enumerate(inputs)]
        self.values[name] = self.writer.operator(code, [*inputs, *more], self.make(name, codes), **options)

    def hand_on(self, code: str, inputs: Sequence[Value], node: NodeProto, **options: Any) -> None:
        """Add the operator of a node that puts out values of its first input, in the same codes."""
        made = self.make(node.output[0], inputs[0].codes, last=inputs[0].last)
        self.values[node.output[0]] = self.writer.operator(code, inputs, made, **options)

    def take(self, node: NodeProto) -> str:
        """Let an operator before a node do its work, too; returns the name of its output."""
        self.done.add(node.output[0])
        return node.output[0]

    def stored(self, name: str) -> tuple[Array, Array | None]:
        """A weight or bias, and the scales of its codes; None where it is float."""
        if name in self.constants:
            return self.constants[name], None
        return self.constants[f"{name}/codes"], self.constants[f"{name}/scale"]


def permuted(sides: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Sides of a map in another order of axes; those of other tensors as they are."""
    return tuple(sides[axis] for axis in axes) if len(sides) == len(axes) else tuple(sides)


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _convolution(low: Lowering, node: NodeProto) -> None:
    facts = WINDOW | attributes(node)
    (weight, scale), (rows, columns) = low.stored(node.input[1]), facts["strides"]
    x = low.value(node.input[0]) if scale is not None else low.real(low.value(node.input[0]))
    depthwise, filters, name = 1 < facts["group"] == x.shape[3], len(weight), node.output[0]
    if len(node.input) > 2:
        bias, bias_scale = low.stored(node.input[2])
    else:
        bias = np.zeros(filters, np.float32 if scale is None else np.int32)
        bias_scale = None if x.codes is None or scale is None else scale * np.float32(x.codes.scale)
    weight = weight.transpose((1, 2, 3, 0) if depthwise else LAST)
    if scale is None or bias_scale is None:
        tensors = [low.number(f"{name}/weight", weight), low.number(f"{name}/bias", bias)]
    else:
        codes = Affine(scale, axis=3 if depthwise else 0)
        tensors = [low.writer.constant(f"{name}/weight", weight, codes)]
        tensors.append(low.writer.constant(f"{name}/bias", bias, Affine(bias_scale)))
    x, padding = _framed(low, x, node, facts)
    options = {"padding": padding, "strideW": columns, "strideH": rows}
    options |= {"dilationWFactor": facts["dilations"][1], "dilationHFactor": facts["dilations"][0]}
    if depthwise:
        options["depthMultiplier"] = filters // x.shape[3]
    low.compute("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", [x, *tensors], node, **options)


def _framed(
    low: Lowering, x: Value, node: NodeProto, facts: dict[str, Any], *, lowest: bool = False
) -> tuple[Value, int]:
    """The input of a window, and TFLite's word for its padding; padded before where neither word means the same.

    Args:
        low: the graph.
        x: the input.
        node: of the window.
        facts: its attributes.
        lowest: pad with the least value, not with 0.
    """
    frames, same, valid = [(0, 0)], True, True
    for axis, side in enumerate(x.shape[1:3]):
        before, stride, end = facts["pads"][axis], facts["strides"][axis], low.shapes[node.output[0]][2 + axis]
        reach = (facts["kernel_shape"][axis] - 1) * facts["dilations"][axis] + 1
        missing = (end - 1) * stride + reach - side
        same &= end == -(-side // stride) and before == max(0, missing) // 2
        valid &= before == 0 and missing <= 0
        frames.append((before, max(0, missing - before)))
    if same or valid:
        return x, schema.Padding.VALID if valid else schema.Padding.SAME
    frames, name, least = [*frames, (0, 0)], f"{node.output[0]}/framed", []
    if lowest:
        value = np.array([np.finfo(np.float32).min], np.float32) if x.codes is None else np.array([LOW], np.int8)
        least = [low.writer.constant(f"{name}/least", value, x.codes)]
    made = low.writer.tensor(name, [side + sum(frame) for side, frame in zip(x.shape, frames, strict=True)], x.codes)
    code = "PADV2" if lowest else "PAD"
    return low.writer.operator(code, [x, low.whole(frames), *least], made), schema.Padding.VALID


def _maxpool(low: Lowering, node: NodeProto) -> None:
    facts = WINDOW | attributes(node)
    (rows, columns), (height, width) = facts["strides"], facts["kernel_shape"]
    x, padding = _framed(low, low.value(node.input[0]), node, facts, lowest=True)
    options = {"strideW": columns, "strideH": rows, "filterWidth": width, "filterHeight": height}
    low.hand_on("MAX_POOL_2D", [x], node, padding=padding, **options)


def _mean(low: Lowering, node: NodeProto) -> None:
    low.compute("MEAN", [low.value(node.input[0])], node, [low.whole([1, 2])], keepDims=True)


def _resize(low: Lowering, node: NodeProto) -> None:
    """Where 1 / stride is no exact float, cells are looked up by their middles, which no rounding moves to another."""
    x, sides = low.value(node.input[0]), low.shapes[node.output[0]][2:]
    stride = sides[0] // x.shape[1]
    middles = stride & (stride - 1) != 0
    inputs = [x, low.whole(sides)]
    low.hand_on("RESIZE_NEAREST_NEIGHBOR", inputs, node, halfPixelCenters=middles)


def _slice(low: Lowering, node: NodeProto) -> None:
    x = low.value(node.input[0])
    first, last, axis = (int(low.constants[name][0]) for name in node.input[1:4])
    axis = AXIS[axis] if len(x.shape) == 4 else axis
    begin, size = [0] * len(x.shape), list(x.shape)
    begin[axis], size[axis] = first, last - first
    low.hand_on("SLICE", [x, low.whole(begin), low.whole(size)], node)


def _concatenation(low: Lowering, node: NodeProto) -> None:
    inputs, axis = [low.value(name) for name in node.input], attributes(node)["axis"]
    axis = AXIS[axis] if len(inputs[0].shape) == 4 else axis
    low.compute("CONCATENATION", inputs, node, axis=axis)


def _reshape(low: Lowering, node: NodeProto) -> None:
    sides = low.shapes[node.output[0]]
    inputs = [low.value(node.input[0], last=False), low.whole(sides)]
    low.hand_on("RESHAPE", inputs, node, newShape=list(sides))


def _transpose(low: Lowering, node: NodeProto) -> None:
    inputs = [low.value(node.input[0], last=False), low.whole(attributes(node)["perm"])]
    low.hand_on("TRANSPOSE", inputs, node)


def _elementwise(low: Lowering, node: NodeProto) -> None:
    options = {"alpha": attributes(node)["alpha"]} if node.op_type == "LeakyRelu" else {}
    names = node.input[:1] if node.op_type == "Clip" else node.input
    low.compute(ELEMENTWISE[node.op_type], [low.value(name) for name in names], node, **options)


def _sigmoid(low: Lowering, node: NodeProto) -> None:
    """Its codes are TFLite's own: so `ActivationQuantizer` rounds it, and the product of swish reads them."""
    x, product = low.value(node.input[0]), low.reader(node.output[0], "Mul")
    if x.codes and product is not None and low.reader(product.output[0], "QuantizeLinear"):
        made = low.make(node.output[0], LOGISTIC)
        low.values[node.output[0]] = low.writer.operator("LOGISTIC", [x], made)
    else:
        low.compute("LOGISTIC", [x], node)


def _mish(low: Lowering, node: NodeProto) -> None:
    """In float as x n / (n + 2), with n = e (e + 2) and e = exp(x)."""
    if _table(low, node, "mish"):
        return
    name, x = node.output[0], low.real(low.value(node.input[0]))
    cap, two = low.number(f"{name}/cap", [MISH_CAP[np.dtype(np.float32)]]), low.number(f"{name}/two", [2.0])

    def step(code: str, inputs: Sequence[Value]) -> Value:
        return low.writer.operator(code, inputs, low.writer.tensor(f"{name}/{len(low.writer.tensors)}", x.shape))

    e = step("EXP", [step("MINIMUM", [x, cap])])
    n = step("MUL", [e, step("ADD", [e, two])])
    low.compute("MUL", [x, step("DIV", [n, step("ADD", [n, two])])], node)


def _hard_sigmoid(low: Lowering, node: NodeProto) -> None:
    """In float as relu6(x + 3) / 6."""
    if _table(low, node, "hardsigmoid"):
        return
    name, x = node.output[0], low.real(low.value(node.input[0]))
    three, sixth = (low.number(f"{name}/{value:g}", [value]) for value in (3.0, 1 / 6))
    options = {"fusedActivationFunction": schema.ActivationFunctionType.RELU6}
    gate = low.writer.operator("ADD", [x, three], low.writer.tensor(f"{name}/gate", x.shape), **options)
    low.compute("MUL", [gate, sixth], node)


def _table(low: Lowering, node: NodeProto, activation: str) -> bool:
    """Add an activation between two roundings as a table of its 256 codes; returns False where it is in float."""
    x, rounding = low.value(node.input[0]), low.reader(node.output[0], "QuantizeLinear")
    if x.codes is None or rounding is None:
        return False
    codes, name = low.meaning(rounding), low.take(rounding)
    values = activated(activation, (np.arange(LOW, HIGH + 1.0) - x.codes.zero) * x.codes.scale)
    entries = np.clip(np.rint(values / codes.scale) + codes.zero, LOW, HIGH).astype(np.int8)
    table = low.writer.constant(f"{name}/table", entries, codes)
    whole, place = (low.writer.tensor(f"{name}/{key}", x.shape, dtype="int32") for key in ("whole", "place"))
    kinds = {"inDataType": schema.TensorType.INT8, "outDataType": schema.TensorType.INT32}
    low.writer.operator("CAST", [x], whole, **kinds)
    low.writer.operator("ADD", [whole, low.whole([-LOW])], place)
    low.values[name] = low.writer.operator("GATHER", [table, place], low.make(name, codes))
    return True


def _round(low: Lowering, node: NodeProto) -> None:
    if node.input[0] not in low.constants:
        low.values[node.output[0]] = low.recoded(low.value(node.input[0]), low.meaning(node), node.output[0])


def _dequantize(low: Lowering, node: NodeProto) -> None:
    """Nothing: what needs floats makes them. Constants are read by what computes with them."""
    if node.input[0] not in low.constants:
        low.values[node.output[0]] = low.values[node.input[0]]


def _identity(low: Lowering, node: NodeProto) -> None:
    """The tensor itself: a raw head, or a factor."""
    low.values[node.output[0]] = low.value(node.input[0])


WINDOW: dict[str, Any] = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": 1}
RELUS = {"Relu": "RELU", "Clip": "RELU6"}
FUSING = ("CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "MUL")
"""Operators that a relu behind them melts into."""
ELEMENTWISE = {
    "Add": "ADD",
    "Mul": "MUL",
    "Min": "MINIMUM",
    "Exp": "EXP",
    "Relu": "RELU",
    "Clip": "RELU6",
    "LeakyRelu": "LEAKY_RELU",
    "HardSwish": "HARD_SWISH",
}
"""Operators that compute each value alone. A Clip is a relu6."""
LOWERINGS: dict[str, Callable[[Lowering, NodeProto], None]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "Conv": _convolution,
    "MaxPool": _maxpool,
    "GlobalAveragePool": _mean,
    "Resize": _resize,
    "Slice": _slice,
    "Concat": _concatenation,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Sigmoid": _sigmoid,
    "Mish": _mish,
    "HardSigmoid": _hard_sigmoid,
    "QuantizeLinear": _round,
    "DequantizeLinear": _dequantize,
    "Identity": _identity,
}


def tflite_file(made: onnx.ModelProto, metadata: Metadata, outputs: Sequence[str] = ()) -> bytes:
    """The file of a network.

    Args:
        made: its nodes, as `onnx_graph.onnx_model` writes them in float32 with mish as one node.
        metadata: of the file.
        outputs: names of the tensors to put out; those of the metadata when empty.
    """
    lowering = Lowering(made, outputs or metadata.tensors, metadata.precision == "float16")
    properties = replace(metadata, channels_last=True).properties()
    return stamped(lowering.file({**properties, DIGEST: UNSTAMPED.decode()}))
