"""The tensors of a network without some of its channels and units, and the proof that it does what it did.

Nothing is changed in place: new blocks and new arrays are returned, which can be pruned again.

A removed channel with γ = 0 still puts out a constant, f(β), whatever the picture. So does a removed residual unit:
with γ = 0 in its last convolution it adds f(β) to what goes round it. The constants are carried through every block to
all the convolutions that read them. There they are added to the bias, or subtracted from the running mean of the batch
normalisation (Ye et al., arXiv:1802.00124; the suites before this one reach only the next block). This is exact for
1 × 1 kernels and away from the zero-padded border. Where a constant meets a gate that depends on the picture
(squeeze-excite, scale_channels, sam), it counts as 0.

The proof compares forward passes of the network before and after. The difference of two sets of heads is
max|a - b| / max(1, max|a|, max|b|), over all heads and cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet, load_arrays
from utils.darknet.blocks import Convolutional, Network
from utils.darknet.blocks.block import IMAGE, Vector
from utils.darknet.network import by_block, max_stride, normalised_cell, tensors
from utils.errors import InfeasibleError, NumericsError
from utils.pruning.channel_graph import ChannelGraph, Removal, numbers, prune_blocks

Arrays = Mapping[str, NDArray[np.floating]]
"""Tensors by their keys in the state dict of the model."""
FLOAT32, FLOAT64 = 1e-4, 1e-9
"""Largest difference between a masked network and the pruned one that always passes."""
ROUNDINGS = 30
"""Factor on the noise that passes, too, in float64 and up to FLOAT32: on what one unit in the last place of noise after
every block does to the heads.

Sums in another order (contiguous or channels-last tensors, one thread or two) move heads by up to 4.6 times that noise:
measured on csresnext50-panet-spp, yolov4-tiny and yolo-fastest with random weights. A fault changes a layer by far more
than 30 units in the last place, and a network that enlarges noise enlarges the fault as well.
"""
SMALLEST_SIDE, CELLS = 64, 2
"""The input has this side at least, and this many cells of the coarsest head."""


class PrunedNetwork(NamedTuple):
    """A network and its tensors."""

    network: Network
    arrays: dict[str, NDArray[np.floating]]


def prune_network(graph: ChannelGraph, arrays: Arrays, removal: Removal) -> PrunedNetwork:
    """Remove the labels that go from every block that makes, passes or reads them, and the units that go.

    Args:
        graph: of the network.
        arrays: its tensors; others are left out.
        removal: what goes.
    """
    number = numbers(graph.network, removal)
    sliced = {}
    for spec in tensors(graph.network):
        if spec.block in number:
            name = spec._replace(block=number[spec.block]).key
            keep, read = (removal.keep[graph.output(i)] for i in (spec.block, spec.block - 1))
            block = graph.network.blocks[spec.block]
            sliced[name] = np.ascontiguousarray(block.sliced(spec.name, arrays[spec.key], keep, read))
    return PrunedNetwork(prune_blocks(graph, removal), sliced)


def fold_constants(graph: ChannelGraph, arrays: Arrays, removal: Removal) -> dict[str, NDArray[np.floating]]:
    """The tensors with the constants of what is removed folded into what reads them; shapes as before.

    Args:
        graph: of the network.
        arrays: its tensors.
        removal: what goes.
    """
    changed = dict(arrays)
    outputs: dict[int, Vector] = {IMAGE: np.zeros(len(graph.image))}
    masked = {unit.last for unit in removal.units}
    tensors_of = by_block(arrays)
    for index, block in enumerate(graph.network.blocks):
        sources = [outputs[i] for i in block.reads(index)]
        stays, tensor = removal.stays(graph, index), tensors_of.get(index, {})
        changed |= {f"layers.{index}.{name}": array for name, array in block.take_up(tensor, sources[0]).items()}
        if isinstance(block, Convolutional) and index in masked:
            constant = block.shifted(tensor)
        else:
            constant = block.constant(tensor, sources, len(stays))
        outputs[index] = np.where(stays, constant if block.hands_on() else 0.0, constant)
    return changed


def arrays_of(model: Darknet) -> dict[str, NDArray[np.floating]]:
    """The tensors of a model on the CPU, without the counters; where they are there they are not copied."""
    return {name: value.cpu().numpy() for name, value in model.state_dict().items() if "num_batches" not in name}


def gammas_of(network: Network, arrays: Arrays) -> dict[int, NDArray[np.floating]]:
    """γ of every batch normalisation, by block number."""
    names = ((i, f"layers.{i}.bn.weight") for i in range(len(network.blocks)))
    return {i: arrays[name] for i, name in names if name in arrays}


@dataclass(frozen=True)
class Certificate:
    """Differences of heads; the first three must vanish but for rounding."""

    compact_vs_silenced: float
    """Without folded constants, in float32: the pruned network and the one whose removed channels put out 0."""
    compact_vs_silenced_float64: float
    """The same in float64, and the larger of two: with the networks' own statistics, and with those of the picture
    (of two, where one has a single value to normalise), which keep the signals of an untrained network alive."""
    compact_vs_keep_size: float
    """The pruned network that is written and the masked one of full size with the same readers, in float32."""
    border: float | None
    """The pruned network and the one in which removed channels have γ = 0 and keep β: what zero padding makes of the
    constants, and where a gate depends on the picture. None where readers were fitted, who get more than constants."""
    side: int
    """Side of the input, in pixels."""
    allowed_float64: float = FLOAT64
    """Largest difference in float64 that rounding explains in this network."""

    def check(self) -> None:
        """Refuse a pruned network that is not what was to be made.

        Raises:
            InfeasibleError: a difference is above its tolerance.
            NumericsError: heads are not finite, so that nothing can be compared.
        """
        for name, limit in (
            ("compact_vs_silenced", FLOAT32),
            ("compact_vs_silenced_float64", self.allowed_float64),
            ("compact_vs_keep_size", FLOAT32),
        ):
            value = getattr(self, name)
            if math.isnan(value):
                raise NumericsError("certificate: the heads are not finite; the weights overflow, take other ones")
            if not value <= limit:
                raise InfeasibleError(f"certificate: {name} is {value:.1e}, allowed is {limit:.2g}; nothing is written")


@torch.no_grad()
def certify(
    graph: ChannelGraph,
    arrays: Arrays,
    whole: Arrays,
    removal: Removal,
    bare: PrunedNetwork,
    written: PrunedNetwork,
    *,
    fitted: bool = False,
) -> Certificate:
    """Compare the networks on a random picture.

    Args:
        graph: of the network before.
        arrays: its tensors.
        whole: its tensors, in which readers make up for what goes; the same if they do not.
        removal: what goes.
        bare: `arrays`, pruned.
        written: `whole`, pruned.
        fitted: readers were fitted to pictures, and do not just get the constants.
    """
    network = graph.network
    side = max(SMALLEST_SIDE, CELLS * max_stride(network))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, network.net.channels, side, side, generator=generator)
    images = image.double()
    if normalised_cell(network, side, side) is not None:
        images = torch.cat([images, torch.rand(image.shape, generator=generator).double()])
    small, large = model_of(*bare), model_of(network, arrays)
    with masked(large, graph, removal):
        float32 = difference(small(image).heads, large(image).heads)
        pairs = [_in_float64(small.double(), large.double(), image.double())]
        for module in (*small.modules(), *large.modules()):
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train()  # normalise by the statistics of the picture
        pairs.append(_in_float64(small, large, images))
    float64, allowed = max(pairs, key=lambda pair: np.nan_to_num(pair[0] / pair[1], nan=np.inf))
    final = model_of(*written)(image).heads
    large = model_of(network, whole)
    with masked(large, graph, removal):
        keep_size = difference(final, large(image).heads)
    border = None
    if not fitted:
        constant = model_of(network, without_gamma(graph, arrays, removal))
        border = difference(final, constant(image).heads)
    return Certificate(float32, float64, keep_size, border, side, allowed)


def _in_float64(pruned: Darknet, full: Darknet, images: Tensor) -> tuple[float, float]:
    """Difference of the heads of two networks, and the largest that rounding explains."""
    heads = full(images).heads
    value = difference(pruned(images).heads, heads)
    if value <= FLOAT64:
        return value, FLOAT64
    generator = torch.Generator().manual_seed(0)

    def disturb(layer: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=generator, dtype=output.dtype)
        return output * (1 + torch.finfo(output.dtype).eps * (2 * noise - 1))

    with ExitStack() as hooks:
        for layer in full.layers:
            hooks.callback(layer.register_forward_hook(disturb).remove)
        noise = difference(full(images).heads, heads)
    return value, float(np.clip(np.nan_to_num(ROUNDINGS * noise), FLOAT64, FLOAT32))


def difference(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """max|a - b| / max(1, max|a|, max|b|) over pairs of heads; NaN where a head is not finite."""
    gaps = [
        float((a - b).abs().max() / max(1.0, float(a.abs().max()), float(b.abs().max())))
        for a, b in zip(ones, others, strict=True)
    ]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


@contextmanager
def masked(model: Darknet, graph: ChannelGraph, removal: Removal) -> Iterator[None]:
    """Context in which the channels of labels that go put out 0 in every block, and units that go add 0."""
    with ExitStack() as hooks:
        for index, layer in enumerate(model.layers):
            mask = removal.stays(graph, index)
            if not mask.all():
                factor = torch.from_numpy(mask).view(1, -1, 1, 1)
                handle = layer.register_forward_hook(
                    lambda _, inputs, output, factor=factor: output * factor.to(output.device)
                )
                hooks.callback(handle.remove)
        yield


def without_gamma(graph: ChannelGraph, arrays: Arrays, removal: Removal) -> dict[str, np.ndarray]:
    """The tensors with γ = 0 for every removed channel, and for the last convolution of every removed unit."""
    changed = dict(arrays)
    for index in {*graph.makers(), *(unit.last for unit in removal.units)}:
        name = f"layers.{index}.bn.weight"
        if name in changed:
            stays = removal.stays(graph, index)
            changed[name] = np.where(stays, changed[name], np.zeros_like(changed[name]))
    return changed


def model_of(network: Network, arrays: Arrays) -> Darknet:
    """A network as a model in evaluation mode; its tensors share the memory of the arrays."""
    return load_arrays(network, {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}).eval()
