"""Networks in integers: codes of weights and biases, roundings of tensors, and the proof layer by layer.

The file has the numbers that training computed with, so its values are those of the simulation. A convolution reads
x = s_x (q − z). Its weights are s_w[c] · codes, with batch normalisation folded in. Its bias has the scale
s_x · s_w[c], because integer kernels add it to the sums of products.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Computing, ConvBlock, Darknet, normalisation
from utils.errors import InfeasibleError
from utils.quantization.quantizers import ActivationQuantizer, Scale
from utils.quantization.quantizers import codes as round_to_codes
from utils.quantization.scheme import passes
from utils.runtime.exported import IMAGE, TOLERANCES, compare

MOST_STEPS = 1
"""A layer's output may differ by that much: sums are scaled in another order there, and a tie falls elsewhere."""
LARGEST_BIAS = 2**30
"""In codes; leaves sums of products as much again in 32 bits."""
SPREAD = 63
"""Largest code of weights of 7 bits, whose products no target lets saturate."""


@dataclass(frozen=True)
class Kernel:
    """A convolution in integers."""

    codes: NDArray[np.int8]
    """[O, I, k, k]."""
    scale: NDArray[np.float32]
    """[O]."""
    bias: NDArray[np.int32] | None
    """[O], in units of `bias_scale`."""
    bias_scale: NDArray[np.float32]
    """[O]."""


@dataclass(frozen=True)
class Codes:
    """The integers of a network."""

    slots: Mapping[int, ActivationQuantizer]
    """What rounds the outputs of blocks, and the picture (−1). Blocks that only pass values on are there, too."""
    kernels: Mapping[int, Kernel]
    """Of blocks whose weights are rounded; but for those that read a float head, whose weights are floats in a file."""
    explicit: bool = False
    """Weights are written in float and rounded in the file, biases are float, as TensorRT reads them."""


def codes_of(model: Darknet, *, explicit: bool = False) -> Codes:
    """The integers of a quantized model, whose batch normalisations are not folded yet."""
    slots = {-1: model.quantize_image}
    kernels = {}
    for index, (block, layer) in enumerate(zip(model.blocks, model.layers, strict=True)):
        source = block.reads(index)[0]
        slot = layer.quantize_output if isinstance(layer, Computing) else None
        if slot is not None:
            slots[index] = slot
        elif passes(block) and source in slots:
            slots[index] = slots[source]
        if isinstance(layer, ConvBlock) and layer.quantize_weight is not None and source in slots:
            kernels[index] = kernel(layer, slots[source].scale().scale.item())
    return Codes(slots, kernels, explicit)


@torch.no_grad()
def kernel(layer: ConvBlock, input_scale: float) -> Kernel:
    """Codes of a convolution whose input has the scale `input_scale`.

    The bias has the scale of input times weights. So weights of few bits get smaller steps, a whole fraction of theirs,
    to give the bias fine steps. A channel with weights so small that its bias exceeds 32 bits gets larger steps, one
    whose weights are all 0 those of its bias.
    """
    weight, gain, bias = layer.conv.weight, None, layer.conv.bias
    if layer.bn is not None:
        gain, bias = normalisation(layer.bn)
        if layer.fold is not None:
            weight, gain = weight * gain.view(-1, 1, 1, 1), None
    quantizer = layer.quantize_weight
    steps = quantizer.scale(weight)
    finer = max(1, SPREAD // quantizer.grid.high)
    whole = quantizer.codes(weight) * finer
    scale = steps.scale.expand(len(weight)).double() / finer
    if gain is not None:  # scales are above 0, so the sign of γ goes into the codes: a narrow grid has −q for every q
        whole, scale = whole * torch.sign(gain).view(-1, 1, 1, 1), scale * gain.abs().double()
    if bias is not None:
        needed = scale * whole.flatten(1).any(dim=1)
        wider = torch.maximum(needed, bias.abs().double() / (input_scale * LARGEST_BIAS))
        whole = torch.round(whole * torch.nan_to_num(scale / wider).view(-1, 1, 1, 1))
        scale = wider
    scale = torch.where(scale > 0, scale, 1.0).float()
    bias_scale = scale * input_scale
    added = None if bias is None else torch.round(bias.double() / bias_scale.double()).int().numpy()
    return Kernel(whole.to(torch.int8).numpy(), scale.numpy(), added, bias_scale.numpy())


class Gap(NamedTuple):
    """How far the layers of a file are from the simulation, each on the input it had in the file."""

    steps: int
    """Largest difference of two codes."""
    share: float
    """Share of the codes that differ at all."""
    layers: int
    """How many were compared."""


def stages(model: Darknet, codes: Codes, tensors: Collection[str]) -> list[str]:
    """Names of all tensors of a file that hold codes, and of heads that are float."""
    names = [f"{IMAGE}/codes"]
    for index in range(len(model.blocks)):
        names += [f"block{index}/linear/codes", f"block{index}/codes"]
    floats = [f"block{head - 1}" for head in model.network.heads if head - 1 not in codes.slots]
    return [name for name in names if name in tensors] + floats


@torch.inference_mode()
def layer_gaps(model: Darknet, codes: Codes, tensors: Mapping[str, NDArray[Any]]) -> Gap:
    """Compare every layer of a file with the simulation, fed with what the layer read in the file.

    Args:
        model: quantized, in evaluation mode.
        codes: of the model.
        tensors: those of `stages`, as the file computed them.

    Raises:
        InfeasibleError: a layer differs by more than MOST_STEPS; names it.
    """
    different = total = steps = layers = 0
    for index, layer in enumerate(model.layers):
        inputs = [_values(model, codes, tensors, source) for source in model.blocks[index].reads(index)]
        linear, name = f"block{index}/linear/codes", f"block{index}/codes"
        pairs = []
        if isinstance(layer, ConvBlock) and linear in tensors:
            before = codes.slots[index].scale_before()
            pairs.append((layer.sums(inputs[0]), linear, before))
            pairs.append((layer.activation(_dequantized(tensors[linear], before)), name, codes.slots[index].scale()))
        elif name in tensors:
            pairs.append((layer(*inputs), name, codes.slots[index].scale()))
        elif isinstance(layer, ConvBlock):
            _check_float(layer(*inputs), tensors[f"block{index}"], model.network.where(index))
        for values, tensor, scale in pairs:
            want = round_to_codes(values, scale, codes.slots[index].grid)
            apart = (want - torch.from_numpy(tensors[tensor]).to(want.dtype)).abs()
            worst = int(apart.max())
            if worst > MOST_STEPS:
                raise InfeasibleError(
                    f"{model.network.where(index)}: differs from the simulation by {worst} steps in the file; "
                    "nothing is written"
                )
            steps, different, total = max(steps, worst), different + int((apart > 0).sum()), total + apart.numel()
        layers += bool(pairs)
    if not layers:
        raise InfeasibleError("no layer of the network is in integers; nothing is written")
    return Gap(steps, different / max(1, total), layers)


def _check_float(want: Tensor, head: NDArray[np.floating], where: str) -> None:
    """Refuse a head in float that differs."""
    gap = compare([want.numpy()], [head])[1]
    if not gap <= TOLERANCES["float32"]:
        raise InfeasibleError(f"{where}: differs from PyTorch by {gap:.3g} of the largest value; nothing is written")


def _values(model: Darknet, codes: Codes, tensors: Mapping[str, NDArray[Any]], block: int) -> Tensor:
    """The output of a block as the file has it, or as it hands on what it reads there; of a picture with −1."""
    name = f"block{block}/codes" if block >= 0 else f"{IMAGE}/codes"
    if name in tensors:
        return _dequantized(tensors[name], codes.slots[block].scale())
    if f"block{block}" in tensors:
        return torch.from_numpy(tensors[f"block{block}"])
    (source,) = model.blocks[block].reads(block)
    return model.layers[block](_values(model, codes, tensors, source))


def _dequantized(values: NDArray[np.integer], scale: Scale) -> Tensor:
    return (torch.from_numpy(values).float() - scale.zero) * scale.scale
