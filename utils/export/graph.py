"""An ONNX graph while it is written: nodes and constants in the order they are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import helper, numpy_helper

from utils import __version__
from utils.export.codes import Point
from utils.runtime.metadata import PRODUCER

Shape = Sequence[int | str]
"""Of a tensor that a file takes or returns; a name stands for a side that may vary."""


class Graph:
    """Nodes and constants so far. A node bears the name of the tensor it makes.

    Args:
        opset: version of ONNX's operators.
        dtype: of the values that the network computes with, float32 or float16.
    """

    def __init__(self, opset: int, dtype: DTypeLike = np.float32) -> None:
        self.opset, self.dtype = opset, np.dtype(dtype)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._outputs: list[onnx.ValueInfoProto] = []

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node of one tensor; returns its name, `output`."""
        self.add_many(op, inputs, [output], **attributes)
        return output

    def add_many(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Append a node of several tensors."""
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), name=outputs[-1], **attributes))

    def constant(self, name: str, values: ArrayLike, dtype: DTypeLike | None = None) -> str:
        """Add a constant, in the type the network computes with unless another is given; returns its name."""
        array = np.asarray(values, self.dtype if dtype is None else dtype)
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def round(self, tensor: str, point: Point) -> str:
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
            whole = self.add("QuantizeLinear", [self.constant(f"{name}/values", values), *scales], f"{name}/codes",
                             axis=0)  # fmt: skip
        else:
            whole = self.constant(f"{name}/codes", codes, codes.dtype)
        return self.add("DequantizeLinear", [whole, *scales], name, axis=0)

    def integers(self, name: str, values: ArrayLike) -> str:
        """Add sizes, axes or indices."""
        return self.constant(name, values, np.int64)

    def cast(self, tensor: str, output: str, dtype: DTypeLike) -> str:
        """Append a conversion to another type."""
        return self.add("Cast", [tensor], output, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def give(self, tensor: str, shape: Shape) -> None:
        """Make a float32 tensor an output of the file."""
        self._outputs.append(helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, list(shape)))

    def model(self, image: str, shape: Shape, properties: Mapping[str, str]) -> onnx.ModelProto:
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
