"""Quantizers in the slots of a model, and what they do in each phase of a training."""

from __future__ import annotations

from enum import Enum

from torch import nn

from models import Darknet
from utils.darknet.blocks import Route
from utils.layers import Computing, ConvBlock
from utils.quantization.fold import Folding
from utils.quantization.grid import Grid
from utils.quantization.quantizers import ActivationQuantizer, DorefaQuantizer, WeightQuantizer
from utils.quantization.scheme import QuantSettings, activations, place


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
    model.quantize_image = ActivationQuantizer(activations(settings, 8))
    for index, layer in enumerate(model.layers):
        if isinstance(layer, ConvBlock):
            found = place(network, index, settings)
            if found.output is not None:
                layer.quantize_output = ActivationQuantizer(found.output, twice=found.before)
            if found.weights is not None:
                layer.quantize_weight = _weight_quantizer(found.weights, settings)
                layer.fold = Folding() if settings.fold and layer.bn is not None else None
        elif isinstance(layer, Computing) and not _passes(network.blocks[index]):
            layer.quantize_output = ActivationQuantizer(activations(settings))
    set_phase(model, Phase.OFF)
    return model


def _passes(block: object) -> bool:
    """Whether a block hands on what it reads."""
    return isinstance(block, Route) and len(block.layers) == 1


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
