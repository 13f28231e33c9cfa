"""What a quantized network is made of in integers: codes of weights and biases, and where its tensors are rounded.

Everything is what the training computed with, so the values of the file are those of the simulation: a convolution
reads x = s_x (q − z), its weights are s_w[c] · codes with batch normalisation folded in, and its bias has the scale
s_x · s_w[c], at which integer kernels add it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models import Darknet
from utils.layers import Computing, ConvBlock, normalisation
from utils.quantization.quantizers import ActivationQuantizer
from utils.quantization.scheme import Grid, passes

LARGEST_BIAS = 2**30
"""In codes; leaves sums of products as much again in 32 bits."""
SPREAD = 63
"""Largest code of weights of 7 bits, whose products no target lets saturate."""


@dataclass(frozen=True)
class Point:
    """A tensor that is rounded: x̂ = scale · (q − zero)."""

    scale: np.float32
    zero: int
    grid: Grid


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

    points: Mapping[int, Point]
    """The roundings of what blocks put out, and of the picture (−1). Blocks that only pass values on are there, too."""
    before: frozenset[int]
    """Blocks that round before their activation as well, to the same codes."""
    kernels: Mapping[int, Kernel]
    """Of blocks whose weights are rounded; but for those that read a float head, whose weights are floats in a file."""
    explicit: bool = False
    """Weights are written in float and rounded in the file, biases are float, as TensorRT reads them."""


def codes_of(model: Darknet, *, explicit: bool = False) -> Codes:
    """The integers of a quantized model, whose batch normalisations are not folded yet."""
    points = {-1: point(model.quantize_image)}
    before, kernels = set(), {}
    for index, layer in enumerate(model.layers):
        source = model.blocks[index].reads(index)[0]
        slot = layer.quantize_output if isinstance(layer, Computing) else None
        if slot is not None:
            points[index] = point(slot)
            if slot.twice:
                before.add(index)
        elif passes(model.blocks[index]) and source in points:
            points[index] = points[source]
        if isinstance(layer, ConvBlock) and layer.quantize_weight is not None and source in points:
            kernels[index] = kernel(layer, points[source])
    return Codes(points, frozenset(before), kernels, explicit)


def point(slot: ActivationQuantizer) -> Point:
    """Scale and zero point of a slot."""
    scale, zero = slot.scale()
    return Point(np.float32(scale.item()), int(zero), slot.grid)


@torch.no_grad()
def kernel(layer: ConvBlock, source: Point) -> Kernel:
    """Codes of a convolution that reads a rounded tensor.

    Codes of few bits are spread over more, in smaller steps that divide theirs, so that the bias has small ones, too. A
    channel whose weights are so small that its bias would leave 32 bits gets larger steps for both.
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
    if gain is not None:
        whole, scale = whole * torch.sign(gain).view(-1, 1, 1, 1), scale * gain.abs().double()
    if bias is not None:
        wider = torch.maximum(scale, bias.abs().double() / (float(source.scale) * LARGEST_BIAS))
        whole = torch.round(whole * torch.nan_to_num(scale / wider).view(-1, 1, 1, 1))
        scale = wider
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scale = scale.float()
    bias_scale = scale * float(source.scale)
    added = None if bias is None else torch.round(bias.double() / bias_scale.double()).int().numpy()
    return Kernel(whole.to(torch.int8).numpy(), scale.numpy(), added, bias_scale.numpy())
