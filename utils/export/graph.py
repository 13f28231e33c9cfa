"""An ONNX graph while it is written: nodes and constants in the order they are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike
from onnx import helper, numpy_helper

from utils import __version__
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

    def weight(self, name: str, values: ArrayLike) -> str:
        """Add the kernel of a convolution."""
        return self.constant(name, values)

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
