"""Quantizers in the slots of a model, and what they do in each phase of a training."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from torch import nn

from models import Darknet
from utils.darknet.blocks import Network
from utils.layers import Computing, ConvBlock
from utils.quantization.folding import BiasRounding, Folding
from utils.quantization.quantizers import ActivationQuantizer, DorefaQuantizer, WeightQuantizer
from utils.quantization.scheme import QuantSettings, check, conv_grids, passes


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
    model.quantize_image = ActivationQuantizer(settings.activations(8))
    outputs: dict[int, ActivationQuantizer | None] = {-1: model.quantize_image}
    """Quantizer of the output of each block."""
    for index, (block, layer) in enumerate(zip(network.blocks, model.layers, strict=True)):
        source = outputs.get(block.reads(index)[0])
        if isinstance(layer, ConvBlock):
            _fill(layer, index, network, settings, source)
        elif isinstance(layer, Computing) and not passes(block):
            layer.quantize_output = ActivationQuantizer(settings.activations())
        if isinstance(getattr(layer, "activation", None), nn.LeakyReLU) and settings.kernels.leaky_slope is not None:
            layer.activation = nn.LeakyReLU(settings.kernels.leaky_slope, inplace=True)
        outputs[index] = layer.quantize_output if isinstance(layer, Computing) and not passes(block) else source
    set_phase(model, Phase.OFF)
    return model


def _fill(
    layer: ConvBlock, index: int, network: Network, settings: QuantSettings, source: ActivationQuantizer | None
) -> None:
    """Fill the slots of the convolution of block `index`, whose input `source` rounds."""
    grids = conv_grids(network, index, settings)
    if grids.output is not None:
        layer.quantize_output = ActivationQuantizer(grids.output, twice=grids.before)
    if grids.weights is None:
        return
    if settings.scheme == "dorefa":
        layer.quantize_weight = DorefaQuantizer(replace(grids.weights, per_channel=False), settings.published)
    else:
        layer.quantize_weight = WeightQuantizer(grids.weights)
    if grids.bias is not None:
        assert source is not None, "where biases are rounded, nothing is float"
        layer.fold = Folding(BiasRounding(grids.bias, source))
    elif settings.fold and layer.bn is not None:
        layer.fold = Folding()


def set_phase(model: Darknet, phase: Phase) -> None:
    """Let all quantizers of a model do what a phase says."""
    rounding = phase in (Phase.ROUNDING, Phase.FROZEN)
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.observing = phase in (Phase.OBSERVING, Phase.ROUNDING)
            module.rounding = rounding
        elif isinstance(module, WeightQuantizer):
            module.rounding = phase is not Phase.OFF
        elif isinstance(module, ConvBlock) and module.fold is not None:
            module.fold.frozen = phase is Phase.FROZEN
            if module.fold.bias is not None:
                module.fold.bias.rounding = rounding
