"""Which tensors a network has, in the order of its .weights file: pure arithmetic on the cfg, no file, no numpy.

Reading and writing (weights.py), costs (report/cost.py) and model building walk this one list.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from utils.darknet.blocks import Network
from utils.darknet.shapes import trace

FLOAT_BYTES = 4
HEADER_BYTES = 20
"""Header of the files written today: three int32 and a uint64."""


class TensorSpec(NamedTuple):
    """One float32 tensor of a .weights file."""

    block: int
    """Number of the block it belongs to."""
    name: str
    """Relative to the block: bn.bias, bn.weight, bn.running_mean, bn.running_var, conv.weight, conv.bias, …"""
    shape: tuple[int, ...]
    """As in the module: [filters, inputs / groups, k, k] for `conv.weight`, [out, in] for `fc1.weight`, …"""

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return FLOAT_BYTES * self.size

    @property
    def trained(self) -> bool:
        """Whether it is a parameter; running statistics are not."""
        return not self.name.startswith("bn.running_")


def tensors(network: Network) -> tuple[TensorSpec, ...]:
    """All tensors of a network in file order (AlexeyAB/darknet, `load_weights_upto`; algorithms: β, γ, μ, σ², W).

    Raises:
        CfgError: the network has an impossible shape.
    """
    shapes = trace(network)
    widths = [network.net.channels, *(shape.channels for shape in shapes)]
    return tuple(
        TensorSpec(index, name, shape)
        for index, block in enumerate(network.blocks)
        for name, shape in block.tensors(widths[index])
    )


def key(spec: TensorSpec) -> str:
    """Name of a tensor in the state dict of the model: `layers.23.conv.weight`."""
    return f"layers.{spec.block}.{spec.name}"


def by_block(arrays: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tensors of a state dict by the number of their block, and then by their names in it; others are left out."""
    blocks: dict[int, dict[str, Any]] = {}
    for name, array in arrays.items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            blocks.setdefault(int(index), {})[rest] = array
    return blocks


def parameter_count(network: Network) -> int:
    """Trained values: convolution weights and biases, γ and β; running statistics are not counted."""
    return sum(spec.size for spec in tensors(network) if spec.trained)


def file_bytes(network: Network) -> int:
    """Size of the network's .weights file with the header of today."""
    return HEADER_BYTES + sum(spec.bytes for spec in tensors(network))


def grouped(number: int) -> str:
    """Digits of a large count in groups of three: 61 949 149."""
    return f"{number:,}".replace(",", " ")
