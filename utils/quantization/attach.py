"""Quantizers in the slots of a model, and what they do in each phase of a training."""

from __future__ import annotations

from enum import Enum

from torch import nn

from models import Darknet
from utils.layers import Computing, ConvBlock
from utils.quantization.fold import BiasRounding, Folding
from utils.quantization.grid import Grid
from utils.quantization.quantizers import ActivationQuantizer, DorefaQuantizer, WeightQuantizer
from utils.quantization.scheme import Place, QuantSettings, activations, check, passes, place


class Phase(Enum):
    """What quantizers do."""

    OFF = "off"
    """Nothing: the network computes in float."""
    OBSERVING = "observing"
    """Weights are rounded, bounds of activations are found."""
    ROUNDING = "rounding"
    """All is rounded, bounds follow the batches."""
    FROZEN = "frozen"
    """All is rounded; bounds and folded statistics stay."""


def quantize(model: Darknet, settings: QuantSettings) -> Darknet:
    """Put quantizers into the slots of a model, which is changed; they are in phase OFF.

    Raises:
        InputError: the target cannot compute an activation of the network.
    """
    network = model.network
    check(network, settings)
    model.quantize_image = ActivationQuantizer(activations(settings, 8))
    grids = {-1: model.quantize_image}
    """What rounds the output of each block."""
    for index, (block, layer) in enumerate(zip(network.blocks, model.layers, strict=True)):
        source = grids.get(block.reads(index)[0])
        if isinstance(layer, ConvBlock):
            _fill(layer, place(network, index, settings), settings, source)
        elif isinstance(layer, Computing) and not passes(block):
            layer.quantize_output = ActivationQuantizer(activations(settings))
        if isinstance(getattr(layer, "activation", None), nn.LeakyReLU) and settings.kernels.leaky_slope is not None:
            layer.activation = nn.LeakyReLU(settings.kernels.leaky_slope, inplace=True)
        grids[index] = source if passes(block) else layer.quantize_output
    set_phase(model, Phase.OFF)
    return model


def _fill(layer: ConvBlock, found: Place, settings: QuantSettings, source: ActivationQuantizer | None) -> None:
    """Fill the slots of a convolution, which reads what `source` rounds."""
    if found.output is not None:
        layer.quantize_output = ActivationQuantizer(found.output, twice=found.before)
    if found.weights is not None:
        layer.quantize_weight = _weight_quantizer(found.weights, settings)
        if found.bias is not None:
            layer.fold = Folding(BiasRounding(found.bias, source))
        elif settings.fold and layer.bn is not None:
            layer.fold = Folding()


def _weight_quantizer(grid: Grid, settings: QuantSettings) -> nn.Module:
    if settings.scheme == "dorefa":
        whole = Grid(grid.bits, power_of_two=grid.power_of_two, half_even=grid.half_even)
        return DorefaQuantizer(whole, settings.published)
    return WeightQuantizer(grid)


def set_phase(model: Darknet, phase: Phase) -> None:
    """Let all quantizers of a model do what a phase says."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.observing = phase in (Phase.OBSERVING, Phase.ROUNDING)
            module.rounding = phase in (Phase.ROUNDING, Phase.FROZEN)
        elif isinstance(module, WeightQuantizer):
            module.rounding = phase is not Phase.OFF
        elif isinstance(module, ConvBlock) and module.fold is not None:
            module.fold.frozen = phase is Phase.FROZEN
            if module.fold.bias is not None:
                module.fold.bias.rounding = phase in (Phase.ROUNDING, Phase.FROZEN)
