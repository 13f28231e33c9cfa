"""Cross-layer equalization (Nagel et al., "Data-free quantization", arXiv:1906.04721, section 4.1).

Where f(s x) = s f(x) for s > 0, a channel may be divided by s in the convolution that makes it and multiplied by s in
the one that reads it: the network computes the same. With r¹ and r² the largest weights that make and that read it

    s = √(r¹ / r²)

makes both √(r¹ r²), so that no channel is lost between the steps of a grid that the others need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models import Darknet
from utils.darknet.blocks import Block, Convolutional, Dropout, Maxpool, Network, Route, Upsample
from utils.errors import InputError
from utils.layers import ConvBlock

HOMOGENEOUS = ("linear", "relu", "leaky")
"""Activations with f(s x) = s f(x) for s > 0."""
MOST_ROUNDS = 20
SETTLED = 1e-3
"""A round that changes no channel by a larger share is the last one."""


class Pair(NamedTuple):
    """Two convolutions, of which the second alone reads what the first makes."""

    maker: int
    reader: int


class Pairs(NamedTuple):
    """The pairs of a network."""

    usable: tuple[Pair, ...]
    curved: tuple[Pair, ...]
    """Those between which there is another activation than HOMOGENEOUS."""


def find_pairs(network: Network) -> Pairs:
    """The pairs of a network, also where only pooling, upsampling or dropout lie between."""
    readers: dict[int, list[int]] = {}
    for index, block in enumerate(network.blocks):
        for source in block.reads(index):
            readers.setdefault(source, []).append(index)
    pairs = []
    for maker, block in enumerate(network.blocks):
        if isinstance(block, Convolutional):
            at = readers.get(maker, [])
            while len(at) == 1 and _passes(network.blocks[at[0]]):
                at = readers.get(at[0], [])
            if len(at) == 1 and isinstance(network.blocks[at[0]], Convolutional):
                pairs.append(Pair(maker, at[0]))
    straight = [network.blocks[pair.maker].activation in HOMOGENEOUS for pair in pairs]
    return Pairs(*(tuple(pair for pair, fits in zip(pairs, straight, strict=True) if fits is wanted)
                   for wanted in (True, False)))  # fmt: skip


def _passes(block: Block) -> bool:
    """Whether a block hands on every channel by itself, and a multiple of it as the same multiple."""
    whole = isinstance(block, Route) and len(block.layers) == 1 and block.groups == 1
    return whole or isinstance(block, Maxpool | Upsample | Dropout)


@torch.no_grad()
def equalize(model: Darknet) -> Pairs:
    """Equalize the pairs of a float model, which is changed: conv.weight, γ and β (or the bias).

    The rounds end when nothing moves. No constant γ 0 + β is made larger than the largest that its layer has: paired
    with next to no weight it would, and take the range of the activation with it.

    Returns:
        what was equalized, and what could not be.

    Raises:
        InputError: there is nothing to equalize.
    """
    pairs = find_pairs(model.network)
    if not pairs.usable:
        path, curves = model.network.path, sorted({model.blocks[pair.maker].activation for pair in pairs.curved})
        why = f"{', '.join(curves)} {'do' if len(curves) > 1 else 'does'} not scale" if curves else "none is alone"
        raise InputError(f"--equalize: {path or 'the network'} has no pair of convolutions that can be equalized "
                         f"({why}); it takes {', '.join(HOMOGENEOUS)} between; leave it out")  # fmt: skip
    for _ in range(MOST_ROUNDS):
        moved = [_equalize(model.layers[pair.maker], model.layers[pair.reader]) for pair in pairs.usable]
        if max(moved) < SETTLED:
            break
    return pairs


def _equalize(maker: ConvBlock, reader: ConvBlock) -> float:
    """Equalize a pair; returns the largest change of a channel, as |log s|."""
    weight, bias = folded(maker)
    made, read = weight.abs().flatten(1).amax(1), _columns(folded(reader)[0], reader).amax(1)
    alive = (made > 0) & (read > 0)
    scale = torch.where(alive, (made / torch.where(alive, read, 1.0)).sqrt(), 1.0)
    constant = bias.abs()
    scale = torch.maximum(scale, torch.where(alive, constant / constant.amax().clamp(min=1e-30), 1.0).clamp(max=1.0))
    affine = maker.conv if maker.bn is None else maker.bn
    affine.weight /= scale.view(-1, *(1,) * (affine.weight.dim() - 1))
    if affine.bias is not None:
        affine.bias /= scale
    groups = reader.conv.groups
    columns = reader.conv.weight.view(groups, -1, *reader.conv.weight.shape[1:])
    columns *= scale.view(groups, 1, -1, 1, 1)
    return float(scale.log().abs().amax())


def _columns(weight: Tensor, layer: ConvBlock) -> Tensor:
    """|weights| that read each input channel, [C_in, n], of a weight [O, C_in / groups, k, k]."""
    groups = layer.conv.groups
    split = weight.abs().view(groups, -1, *weight.shape[1:])
    return split.transpose(1, 2).reshape(layer.conv.in_channels, -1)


def folded(layer: ConvBlock) -> tuple[Tensor, Tensor]:
    """Weight and bias of a float layer with its batch normalisation folded in."""
    if layer.bn is not None:
        return layer.fused()
    weight = layer.conv.weight
    return weight, weight.new_zeros(len(weight)) if layer.conv.bias is None else layer.conv.bias
