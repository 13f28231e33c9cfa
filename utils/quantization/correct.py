"""Bias correction (Nagel et al., "Data-free quantization", arXiv:1906.04721, section 4.2).

Rounding moves the means of what a convolution puts out, and errors of the mean add up from layer to layer. They go into
the bias, layer by layer, each behind the layers that are corrected already:

    b ← b − E[Ŵ x̂ − W x]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import Darknet
from utils.layers import ConvBlock
from utils.quantization.attach import Phase, set_phase


def biased(model: Darknet) -> dict[int, nn.Parameter]:
    """β of the batch normalisation, or the bias, of every convolution that has one."""
    layers = {index: layer for index, layer in enumerate(model.layers) if isinstance(layer, ConvBlock)}
    found = {index: layer.conv.bias if layer.bn is None else layer.bn.bias for index, layer in layers.items()}
    return {index: bias for index, bias in found.items() if bias is not None}


@torch.no_grad()
def means(model: Darknet, images: Tensor) -> dict[int, Tensor]:
    """Mean of what the activation function of each convolution gets, float64 [C], by its block."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[ConvBlock, tuple[Tensor, ...]], None]:
        def see(layer: ConvBlock, inputs: tuple[Tensor, ...]) -> None:
            found[index] = mean_sums(layer, inputs[0])

        return see

    _run(model, images, keep)
    return found


def mean_sums(layer: ConvBlock, x: Tensor) -> Tensor:
    """Mean over pictures and cells of what the activation function gets for an input, float64 [C]."""
    return layer.sums(x).mean(dim=(0, 2, 3), dtype=torch.float64)


@torch.no_grad()
def correct_biases(model: Darknet, images: Tensor) -> None:
    """Correct the biases of a quantized model with calibrated bounds, which is changed; it rounds afterwards.

    Args:
        model: in evaluation mode.
        images: [B, C, H, W], 0…1, all at once, as each layer needs all pictures behind corrected layers.
    """
    set_phase(model, Phase.OFF)
    expected, biases = means(model, images), biased(model)
    set_phase(model, Phase.FROZEN)

    def correct(index: int) -> Callable[[ConvBlock, tuple[Tensor, ...]], None]:
        def see(layer: ConvBlock, inputs: tuple[Tensor, ...]) -> None:
            if index in biases:
                biases[index] -= (mean_sums(layer, inputs[0]) - expected[index]).to(biases[index].dtype)

        return see

    _run(model, images, correct)


def _run(model: Darknet, images: Tensor, entry: Callable[[int], Callable[..., None]]) -> None:
    """A forward pass that calls `entry(block)` with each convolution and its inputs before it computes."""
    handles = [
        layer.register_forward_pre_hook(entry(index))
        for index, layer in enumerate(model.layers)
        if isinstance(layer, ConvBlock)
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
