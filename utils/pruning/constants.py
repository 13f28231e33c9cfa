"""What removed channels would have added: a channel with γ = 0 puts out the constant f(β), whatever the picture.

A residual unit that is removed is such a case, too: with γ = 0 in its last convolution it adds f(β) to what goes round.

The constants are carried through every block to all the convolutions that read them, and added to their bias or taken
from the running mean of their batch normalisation (Ye et al., arXiv:1802.00124; algorithms of the suites before reach
only the next block). Exact for 1 × 1 kernels and away from the zero-padded border; where a constant meets a gate that
depends on the picture (squeeze-excite, scale_channels, sam) it is not a constant any more and counts as 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import (
    BN_EPSILON,
    SHORTCUT_EPSILON,
    Avgpool,
    Block,
    Convolutional,
    Dropout,
    Maxpool,
    Route,
    Shortcut,
    Upsample,
)
from utils.graph import IMAGE, ChannelGraph, is_depthwise
from utils.pruning.activations import FUNCTIONS, Vector
from utils.pruning.removal import Removal
from utils.pruning.surgery import Arrays


def absorb(graph: ChannelGraph, arrays: Arrays, removal: Removal) -> dict[str, NDArray[np.floating]]:
    """The tensors with the constants of what is removed taken up by what reads them; shapes as before.

    Args:
        graph: of the network.
        arrays: its tensors.
        removal: what goes.
    """
    changed = dict(arrays)
    outputs: list[Vector] = []
    silent = {unit.last for unit in removal.units}
    for index, block in enumerate(graph.network.blocks):
        sources = [_output(graph, outputs, source) for source in block.reads(index)]
        stays = removal.stays(graph, index)
        if isinstance(block, Convolutional):
            _take_up(changed, arrays, index, block, sources[0])
        if index in silent:
            constant = _shifted(arrays, index, block, len(stays))
        else:
            constant = _constant(arrays, index, block, sources, len(stays))
        outputs.append(np.where(stays, _passed(block, constant), constant))
    return changed


def _output(graph: ChannelGraph, outputs: list[Vector], source: int) -> Vector:
    return np.zeros(len(graph.image)) if source == IMAGE else outputs[source]


def _take_up(changed: dict[str, NDArray[np.floating]], arrays: Arrays, index: int, block: Block, read: Vector) -> None:
    """Shift the bias or the running mean of a convolution by what the constants it reads add."""
    if not read.any():
        return
    sums = arrays[f"layers.{index}.conv.weight"].astype(np.float64).sum((2, 3))
    groups = len(read) // sums.shape[1]
    shift = (sums.reshape(groups, -1, sums.shape[1]) @ read.reshape(groups, -1, 1)).ravel()
    name, sign = ("bn.running_mean", -1) if block.batch_normalize else ("conv.bias", 1)
    name = f"layers.{index}.{name}"
    if name in arrays:  # a convolution without bias cannot take it up
        changed[name] = (arrays[name] + sign * shift).astype(arrays[name].dtype)


def _passed(block: Block, constant: Vector) -> Vector:
    """What is left of a constant in channels that stay: nothing behind a convolution, which takes it up, or a curve."""
    plain = not isinstance(block, Convolutional) and getattr(block, "activation", "linear") == "linear"
    return constant if plain else np.zeros_like(constant)


def _constant(arrays: Arrays, index: int, block: Block, sources: list[Vector], width: int) -> Vector:
    """What a block's channels put out when they are removed and what they read is constant."""
    match block:
        case Convolutional() if is_depthwise(block, len(sources[0])):
            kernel = arrays[f"layers.{index}.conv.weight"].astype(np.float64).sum((1, 2, 3))
            return _activated(block, _normalised(arrays, index, block, kernel * sources[0]))
        case Convolutional():
            return _shifted(arrays, index, block, width)
        case Maxpool() | Upsample() | Dropout() | Avgpool():
            return sources[0]
        case Route():
            parts = [np.split(source, block.groups)[block.group_id] for source in sources]
            return np.concatenate(parts)
        case Shortcut():
            scales = shortcut_scales(block, arrays.get(f"layers.{index}.weights"))
            scales = np.broadcast_to(1.0 if scales is None else scales, (len(sources), width))
            total = np.zeros(width)
            for other, scale in zip(sources, scales, strict=True):
                common = min(width, len(other))
                total[:common] += scale[:common] * other[:common]
            return _activated(block, total)
    return np.zeros(width)


def shortcut_scales(block: Shortcut, weights: NDArray[np.floating] | None) -> NDArray[np.floating] | None:
    """Normalised weights [inputs, C or 1] of a shortcut, as `layers.Addition` computes them; None without weights."""
    if weights is None:
        return None
    weights = weights.reshape(len(weights), -1)
    if block.weights_normalization == "none":
        return weights
    softmax = block.weights_normalization == "softmax"
    weights = np.exp(weights - weights.max(axis=0)) if softmax else np.maximum(weights, 0)
    return weights / (weights.sum(axis=0) + SHORTCUT_EPSILON)


def _shifted(arrays: Arrays, index: int, block: Convolutional, width: int) -> Vector:
    """What a convolution puts out with γ = 0: f(β); nothing is known without batch normalisation."""
    beta = arrays.get(f"layers.{index}.bn.bias") if block.batch_normalize else None
    return np.zeros(width) if beta is None else _activated(block, beta.astype(np.float64))


def _normalised(arrays: Arrays, index: int, block: Block, values: Vector) -> Vector:
    """Batch normalisation, or the bias, on constants."""
    tensor = {name: arrays.get(f"layers.{index}.{name}") for name in (
        "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "conv.bias")}  # fmt: skip
    if not block.batch_normalize:
        return values if tensor["conv.bias"] is None else values + tensor["conv.bias"]
    scale = tensor["bn.weight"] / np.sqrt(tensor["bn.running_var"].astype(np.float64) + BN_EPSILON)
    return (values - tensor["bn.running_mean"]) * scale + tensor["bn.bias"]


def _activated(block: Block, values: Vector) -> Vector:
    return FUNCTIONS[block.activation](values)
