"""What rounding does to each convolution: signal and noise in it, and what it alone does to the heads.

The measure is SQNR = 10 log₁₀ (Σ x² / Σ (x − x̂)²) dB, with x of the float network and x̂ of the rounded one. Heads are
measured behind the logistic function that decoding begins with: how far below 0 the logit of nothing lies, is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from models import Darknet
from utils.layers import ConvBlock
from utils.quantization.attach import Phase, set_phase
from utils.quantization.calibrate import Point, curve_behind


class Noise:
    """Sums of squares of signals and of their errors."""

    def __init__(self) -> None:
        self.signal, self.noise = 0.0, 0.0

    def add(self, signal: Tensor, rounded: Tensor) -> None:
        """Count a tensor and what rounding made of it."""
        self.signal += float(signal.square().sum(dtype=torch.float64))
        self.noise += float((signal - rounded).square().sum(dtype=torch.float64))

    @property
    def decibels(self) -> float | None:
        """SQNR; None where it has no finite value: nothing was changed, or all was 0."""
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise > 0 else None


def rounded_blocks(model: Darknet) -> tuple[int, ...]:
    """The convolutions whose weights are rounded."""
    layers = enumerate(model.layers)
    return tuple(i for i, layer in layers if isinstance(layer, ConvBlock) and layer.quantize_weight is not None)


@torch.no_grad()
def block_noise(model: Darknet, images: Iterable[Tensor]) -> dict[int, float | None]:
    """SQNR of what each convolution puts out, with all of the network rounded: what came before is in it.

    Args:
        model: quantized, with bounds, in evaluation mode; it rounds afterwards.
        images: [B, C, H, W], 0…1; small batches, as the outputs of all blocks are held.
    """
    blocks = [index for index, layer in enumerate(model.layers) if isinstance(layer, ConvBlock)]
    found = {index: Noise() for index in blocks}
    for batch in images:
        set_phase(model, Phase.OFF)
        signals = model(batch, features=blocks).features
        set_phase(model, Phase.FROZEN)
        for index, rounded in model(batch, features=blocks).features.items():
            found[index].add(*(_decoded(model, index, x) for x in (signals[index], rounded)))
    return {index: noise.decibels for index, noise in found.items()}


@torch.no_grad()
def whole_noise(model: Darknet, images: Iterable[Tensor]) -> float | None:
    """SQNR of all heads with all of the network rounded.

    Args:
        model: quantized, with bounds, in evaluation mode; it rounds afterwards.
        images: [B, C, H, W], 0…1.
    """
    noise = Noise()
    for batch in images:
        set_phase(model, Phase.OFF)
        signals = model(batch).heads
        set_phase(model, Phase.FROZEN)
        for head, *pair in zip(model.network.heads, signals, model(batch).heads, strict=True):
            noise.add(*(_decoded(model, head - 1, x) for x in pair))
    return noise.decibels


@torch.no_grad()
def head_noise(model: Darknet, images: Sequence[Tensor]) -> dict[int, float | None]:
    """SQNR of all heads when one convolution alone is rounded, the rest being float; by block.

    What is rounded is what would not be if the block were kept float (`QuantSettings.kept`): its weights, what its
    activation function gets, and the output of a head. What it hands on is rounded either way, and left out.

    Args:
        model: quantized, with bounds, in evaluation mode; it rounds afterwards.
        images: [B, C, H, W], 0…1; each goes through the network once for every convolution.
    """
    set_phase(model, Phase.OFF)
    signals = [model(batch) for batch in images]
    heads, found = model.network.heads, {}
    for index in rounded_blocks(model):
        layer = model.layers[index]
        layer.quantize_weight.rounding = True
        layer.quantize_output.rounding = layer.quantize_output.twice or index + 1 in heads
        noise = Noise()
        for batch, signal in zip(images, signals, strict=True):
            for at, *pair in zip(heads, signal.heads, model(batch).heads, strict=True):
                noise.add(*(_decoded(model, at - 1, x) for x in pair))
        found[index] = noise.decibels
        set_phase(model, Phase.OFF)
    set_phase(model, Phase.FROZEN)
    return found


def _decoded(model: Darknet, block: int, x: Tensor) -> Tensor:
    """The output of a block; of a head what is made of it."""
    curve = curve_behind(model, Point(block))
    return x if curve is None else curve.function(x)


def ranking(decibels: Mapping[int, float | None]) -> tuple[int, ...]:
    """Blocks from the one that does most harm; what does none comes last."""
    return tuple(sorted(decibels, key=lambda index: (math.inf if decibels[index] is None else decibels[index], index)))
