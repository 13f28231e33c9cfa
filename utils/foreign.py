"""State dicts that other suites saved, e.g. ultralytics/yolov3 of 2019 to 2021 and the suites that grew from it.

Names differ between them (`module_list.0.Conv2d.weight`, `module_list.0.conv_0.weight`), the order does not: that of
the blocks, and in a block the convolution before its batch normalisation. So tensors are matched by order and shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils.darknet.blocks import Network
from utils.darknet.network import adapt_classes, head_convolutions, tensors
from utils.errors import WeightsError

COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
"""Ends of names that are no weights; the last two come from thop, which counts operations."""
ORDER = ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
"""Tensors of a convolution as PyTorch's modules register them."""


def numpy_types() -> list[Any]:
    """Return what torch.load needs to read numpy's numbers and arrays; older suites stored `best_fitness` so."""
    functions: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    old_names = [(function, f"numpy.core.multiarray.{function.__name__}") for function in functions]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    return [*functions, *old_names, *kinds, np.ndarray, np.dtype]


def state_dict(contents: Any) -> dict[str, Tensor] | None:
    """Return the state dict of a loaded file, bare or under a usual key; None where there is none."""
    if not isinstance(contents, Mapping):
        return None
    for inner in (contents.get("model"), contents.get("state_dict"), contents):
        if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
            return {str(key): value for key, value in inner.items()}
    return None


def fitted(state: Mapping[str, Tensor], network: Network, path: Path) -> tuple[dict[str, Tensor], Network]:
    """Give the tensors of another suite the names of ours.

    Args:
        state: its state dict.
        network: of `--cfg`.
        path: of the file, for messages.

    Returns:
        The state dict, and the network with the class count of its heads.

    Raises:
        WeightsError: number, order or shapes are not those of the network.
    """
    theirs = [(name, tensor) for name, tensor in state.items() if not name.endswith(COUNTERS)]
    network = _with_classes(network, theirs)
    specs = _specs(network)
    for spec, (name, tensor) in zip(specs, theirs, strict=False):
        if tuple(tensor.shape) != spec.shape or not _same_role(spec.name, name):
            raise WeightsError(
                f"{path}: {name} has shape {tuple(tensor.shape)} where {network.path} has {spec.key} with shape "
                f"{spec.shape}; give the cfg that it was trained with"
            )
    if len(theirs) != len(specs):
        raise WeightsError(
            f"{path}: {len(theirs)} tensors, but {network.path} has {len(specs)}; give the cfg that it was trained with"
        )
    return {spec.key: tensor for spec, (_, tensor) in zip(specs, theirs, strict=True)}, network


def _specs(network: Network) -> list[Any]:
    """Tensors of the network in the order of PyTorch's modules."""
    rank = {name: number for number, name in enumerate(ORDER)}
    return sorted(tensors(network), key=lambda spec: (spec.block, rank.get(spec.name, 0)))


def _with_classes(network: Network, theirs: list[tuple[str, Tensor]]) -> Network:
    """The network with the class count that the width of the first head says."""
    keys = [(spec.block, spec.name) for spec in _specs(network)]
    head = keys.index((head_convolutions(network)[0], "conv.weight"))
    if head < len(theirs) and theirs[head][1].ndim:
        classes, rest = divmod(len(theirs[head][1]), len(network.yolos[0].mask))
        if not rest and classes > 5:
            return adapt_classes(network, classes - 5)
    return network


def _same_role(ours: str, theirs: str) -> bool:
    """Whether the last words of two names agree; shortcuts and gates have words of their own."""
    return ours not in ORDER or ours.rpartition(".")[2] == theirs.rpartition(".")[2]
