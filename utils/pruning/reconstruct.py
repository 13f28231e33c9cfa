"""Convolutions that read removed channels, fitted again so that they put out what they did before.

Feature-map reconstruction by least squares (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks",
arXiv:1707.06168, section 3.2). The network before and the one that is left see the same pictures, block by block. For a
convolution with the weights W [O, C, k, k], the inputs x [C] before and z [K] now, K channels being left, the map

    A [K, C], b [C] = argmin E |x - Aᵀ z - b|² + ridge

gives the weights W Aᵀ and a shift of W b, which the bias or the running mean takes. So each of them makes up for what
the blocks before it have lost as well. Folded constants (`fold_constants`) are the case A = identity on what stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from utils.cli import ProgressBar
from utils.darknet.blocks import Network
from utils.darknet.blocks.block import IMAGE
from utils.darknet.network import trace
from utils.errors import NumericsError
from utils.layers import ConvBlock
from utils.pruning.channel_graph import ChannelGraph, Removal
from utils.pruning.surgery import Arrays, model_of

RIDGE = 1e-4
"""Of the mean power of the inputs: enough where channels repeat one another, too little to move other solutions."""
MEMORY = 4 << 30
"""Bytes that the outputs of blocks may take."""
POSITIONS = 40_000
"""Of the inputs of a convolution that are used, drawn at random from all pictures; far more than unknowns a channel."""


def most_pictures(network: Network, size: tuple[int, int]) -> int:
    """Pictures whose outputs fit into MEMORY, two networks at a time; one at least."""
    shapes, sources = trace(network, *size), [block.reads(i) for i, block in enumerate(network.blocks)]
    last_reader = {source: i for i, reads in enumerate(sources) for source in reads}
    sizes = [math.prod(shape) for shape in shapes]
    alive = (sum(sizes[j] for j in range(i + 1) if j == i or last_reader.get(j, -1) >= i) for i in range(len(shapes)))
    return max(1, MEMORY // (2 * 4 * max(alive)))


@torch.no_grad()
def reconstruct(
    graph: ChannelGraph,
    arrays: Arrays,
    removal: Removal,
    pictures: Sequence[Tensor],
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, NDArray[np.floating]]:
    """The tensors of the network before, with what reads removed channels fitted anew; shapes as before.

    Args:
        graph: of the network.
        arrays: its tensors, which are left as they are.
        removal: what goes.
        pictures: float [B, C, H, W], 0…1, on the device; the outputs of the blocks for all of them are held at a time.
        device: where it is computed.
        seed: of the positions that are drawn.

    Raises:
        NumericsError: a fitted weight is not finite.
    """
    before = model_of(graph.network, arrays).to(device).to(memory_format=torch.channels_last)
    after = deepcopy(before)  # its weights change, and those of `before` may be the caller's arrays
    generator = torch.Generator().manual_seed(seed)
    sources = [block.reads(i) for i, block in enumerate(graph.network.blocks)]
    last_reader = {source: i for i, reads in enumerate(sources) for source in reads}
    images = list(pictures)
    outputs: dict[int, tuple[list[Tensor], list[Tensor]]] = {IMAGE: (images, images)}
    for i, reads in enumerate(ProgressBar("fitting readers", sources, unit="blocks")):
        was, now = (
            [list(of) for of in zip(*(outputs[source][side] for source in reads), strict=True)] for side in (0, 1)
        )
        whole = all(outputs[source][0] is outputs[source][1] for source in reads)
        layer = after.layers[i]
        if not whole and isinstance(layer, ConvBlock) and layer.conv.groups == 1:  # its outputs read all of its inputs
            kept = torch.from_numpy(np.flatnonzero(removal.keep[graph.reads(i)]))
            _refit(layer, *_moments(was, now, kept, generator), kept)
        full = [before.layers[i](*inputs) for inputs in was]
        stays = removal.stays(graph, i)
        if whole and stays.all():
            left = full
        else:
            mask = torch.from_numpy(stays).to(device).view(1, -1, 1, 1)
            left = [layer(*inputs) * mask for inputs in now]
        for source in reads:
            if last_reader[source] == i:
                outputs.pop(source, None)
        if i in last_reader:
            outputs[i] = full, left
    state = after.state_dict()
    fitted = {name: state[name].cpu().numpy() for name in arrays}
    if not all(np.isfinite(array).all() for array in fitted.values()):
        raise NumericsError("--reconstruct: a fitted weight is not finite; the weights are damaged")
    return fitted


def _moments(
    was: Sequence[Sequence[Tensor]], now: Sequence[Sequence[Tensor]], kept: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Means of z zᵀ [K + 1, K + 1] and z xᵀ [K + 1, C] over positions, with a last z that is 1; float64, on the CPU."""
    square = cross = torch.zeros((), dtype=torch.float64)
    count, most = 0, max(1, POSITIONS // len(was))
    for (x,), (z,) in zip(was, now, strict=True):
        places = torch.randperm(x.shape[0] * x.shape[2] * x.shape[3], generator=generator)[:most].to(x.device)
        x, z = (values.permute(0, 2, 3, 1).reshape(-1, values.shape[1])[places] for values in (x, z))
        z = nn.functional.pad(z[:, kept.to(z.device)], (0, 1), value=1.0)
        square = square + (z.T @ z).double().cpu()
        cross = cross + (z.T @ x).double().cpu()
        count += len(places)
    return square / count, cross / count


def _refit(layer: ConvBlock, square: Tensor, cross: Tensor, kept: Tensor) -> None:
    """Give a convolution the weights and the shift of the solution; see the head of this module."""
    count = len(kept)
    shifts = layer.bn is not None or layer.conv.bias is not None  # else nothing can take b, and the best A has none
    square, cross = square[: count + shifts, : count + shifts], cross[: count + shifts]
    same = torch.zeros_like(cross)
    same[torch.arange(count), kept] = 1.0
    tiny = torch.finfo(square.dtype).eps  # where all channels are 0 in all pictures
    ridge = torch.full((len(square),), RIDGE * float(square.diagonal()[:count].mean()) + tiny, dtype=square.dtype)
    ridge[count:] = 0.0
    solution = torch.linalg.solve(square + torch.diag(ridge), cross + ridge[:, None] * same)
    weight = layer.conv.weight
    exact = weight.double().cpu()
    weight.zero_()
    weight[:, kept.to(weight.device)] = torch.einsum("ochw,kc->okhw", exact, solution[:count]).to(weight)
    shift = torch.einsum("ochw,kc->o", exact, solution[count:])
    if layer.bn is not None and layer.bn.running_mean is not None:
        layer.bn.running_mean -= shift.to(layer.bn.running_mean)
    elif layer.conv.bias is not None:
        layer.conv.bias += shift.to(layer.conv.bias)
