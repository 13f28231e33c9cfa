"""Files with integers: what can be one, and the proof that each layer computes what the training computed with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet
from utils.errors import InfeasibleError, InputError
from utils.export.codes import Codes, Point
from utils.layers import ConvBlock
from utils.quantization.quantizers import Scale, codes
from utils.quantization.scheme import QuantSettings, simulated_only
from utils.runtime.metadata import IMAGE

MOST_STEPS = 1
"""A layer's output may differ by that much: sums are scaled in another order there, and a tie falls elsewhere."""
FLOAT_TOLERANCE = 1e-3
"""max|a - b| / max(1, max|a|) of a head that is not rounded."""


class Gap(NamedTuple):
    """How far the layers of a file are from the simulation, each on the input it had in the file."""

    steps: int
    """Largest difference of two codes."""
    share: float
    """Share of the codes that differ at all."""
    layers: int
    """How many were compared."""


def check_integers(settings: QuantSettings | None, path: Path, tensorrt: bool) -> None:
    """Refuse a network that has no form in 8-bit integers.

    Args:
        settings: how it is quantized; None: it is not.
        path: its file.
        tensorrt: the file is meant for TensorRT.

    Raises:
        InputError: names the way out.
    """
    flag = "--format tensorrt" if tensorrt else "--int8"
    wanted = "tensorrt" if tensorrt else "cpu"
    if settings is None:
        raise InputError(f"{flag}: {path} is float; `quantize.py --weights {path} --target {wanted}` or `train.py "
                         f"--weights {path} --quantized 1 --target {wanted}` quantizes it first")  # fmt: skip
    again = f"quantize the float network with --target {wanted}"
    if settings.target == "fpga":
        raise InputError(f"{flag}: {path} is quantized for an FPGA; take --format fpga, or {again}")
    if tensorrt != (settings.target == "tensorrt"):
        way = f"; take --format {'onnx --int8' if tensorrt else 'tensorrt'}, or {again}"
        raise InputError(f"{flag}: {path} is quantized with --target {settings.target}{way}")
    if reason := simulated_only(settings):
        raise InputError(f"{flag}: {path} {reason}")


def stages(model: Darknet, integers: Codes, tensors: Sequence[str]) -> list[str]:
    """Names of all tensors of a file that hold codes, and of heads that are float."""
    names = [f"{IMAGE}/codes"]
    for index in range(len(model.blocks)):
        names += [f"block{index}/linear/codes", f"block{index}/codes"]
    known = set(tensors)
    floats = [f"block{head - 1}" for head in model.network.heads if head - 1 not in integers.points]
    return [name for name in names if name in known] + floats


@torch.inference_mode()
def layer_gaps(model: Darknet, integers: Codes, found: dict[str, NDArray[np.generic]]) -> Gap:
    """Compare every layer of a file with the simulation, fed with what the layer read in the file.

    Args:
        model: quantized, in evaluation mode.
        integers: of the model.
        found: the tensors of `stages`, as the file computed them.

    Raises:
        InfeasibleError: a layer differs by more than MOST_STEPS; names it.
    """
    different = total = steps = layers = 0
    for index, layer in enumerate(model.layers):
        inputs = [_values(model, integers, found, source) for source in model.blocks[index].reads(index)]
        linear, name, point = f"block{index}/linear/codes", f"block{index}/codes", integers.points.get(index)
        pairs = []
        if linear in found:
            pairs.append((layer.sums(inputs[0]), linear))
            pairs.append((layer.activation(_dequantized(found[linear], point)), name))
        elif name in found:
            pairs.append((layer(*inputs), name))
        elif isinstance(layer, ConvBlock):
            _check_float(layer(*inputs), found[f"block{index}"], model.network.where(index))
        for values, place in pairs:
            want = codes(values, _scale(point), point.grid)
            apart = (want - torch.from_numpy(found[place]).to(want.dtype)).abs()
            worst = int(apart.max())
            if worst > MOST_STEPS:
                raise InfeasibleError(f"{model.network.where(index)}: differs from the simulation by {worst} steps "
                                      "in the file; nothing is written")  # fmt: skip
            steps, different, total = max(steps, worst), different + int((apart > 0).sum()), total + apart.numel()
        layers += bool(pairs)
    if not layers:
        raise InfeasibleError("no layer of the network is in integers; nothing is written")
    return Gap(steps, different / max(1, total), layers)


def _check_float(want: Tensor, found: NDArray[np.floating], where: str) -> None:
    gap = float((want - torch.from_numpy(found)).abs().max()) / max(1.0, float(want.abs().max()))
    if not gap <= FLOAT_TOLERANCE:
        raise InfeasibleError(f"{where}: differs from PyTorch by {gap:.3g} of the largest value; nothing is written")


def _values(model: Darknet, integers: Codes, found: dict[str, NDArray[np.generic]], block: int) -> Tensor:
    """The output of a block as the file has it; of a picture with −1."""
    name = f"block{block}/codes" if block >= 0 else f"{IMAGE}/codes"
    if name in found:
        return _dequantized(found[name], integers.points[block])
    if f"block{block}" in found:
        return torch.from_numpy(found[f"block{block}"])
    return _values(model, integers, found, model.blocks[block].reads(block)[0])


def _dequantized(values: NDArray[np.generic], point: Point) -> Tensor:
    return (torch.from_numpy(values).float() - point.zero) * torch.tensor(point.scale)


def _scale(point: Point) -> Scale:
    return Scale(torch.tensor(point.scale), torch.tensor(point.zero, dtype=torch.int32))


def types(tensors: Sequence[str], integers: Codes) -> dict[str, int]:
    """ONNX's type of each tensor of `stages`."""
    import onnx

    kind = onnx.TensorProto.INT8 if integers.points[-1].grid.signed else onnx.TensorProto.UINT8
    return {name: kind if name.endswith("/codes") else onnx.TensorProto.FLOAT for name in tensors}
