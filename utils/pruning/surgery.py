"""The tensors of a network without some of its channels and units, and the proof that it does what it did.

Nothing is changed in place: new blocks and new arrays are returned, which can be pruned again.

A removed channel with γ = 0 still puts out a constant, f(β), whatever the picture. So does a removed residual unit:
with γ = 0 in its last convolution it adds f(β) to what goes round it. The constants are carried through every block to
all the convolutions that read them. There they are added to the bias, or subtracted from the running mean of the batch
normalisation (Ye et al., arXiv:1802.00124). The suites before this one reach only the next block. The result is exact
for 1 × 1 kernels and away from the zero-padded border. A constant that is multiplied by a gate, which depends on the
picture (squeeze-excite, scale_channels, sam), counts as 0.

Convolutions that read removed channels can be fitted to put out what they did before: feature-map reconstruction by
least squares (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, section 3.2).
The original and the pruned network see the same images, block by block. For a convolution with the weights
W [O, C, k, k], the inputs x [C] in the original and z [K] in the pruned network, K channels being left, the map

    A [K, C], b [C] = argmin E |x - Aᵀ z - b|² + ridge

gives the weights W Aᵀ and a shift of W b, which the bias or the running mean takes. So each convolution also corrects
what the blocks before it have lost. Folded constants are the case in which A is the identity on what stays.

The proof compares forward passes of the network before and after. The difference of two sets of heads is the largest
max|a - b| / max(1, max|a|, max|b|) of a head, over its cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import ConvBlock, Darknet, load_arrays
from utils.cli import ProgressBar
from utils.darknet.blocks import Convolutional, Network
from utils.darknet.blocks.block import IMAGE, Vector
from utils.darknet.network import by_block, max_stride, normalised_cell, tensors, trace
from utils.errors import CfgError, InfeasibleError, NumericsError
from utils.pruning.channel_graph import ChannelGraph, Removal, numbers, prune_blocks

Arrays = Mapping[str, NDArray[np.floating]]
"""Tensors by their keys in the state dict of the model."""
FLOAT32, FLOAT64 = 1e-4, 1e-9
"""Largest difference between a masked network and the pruned one that always passes."""
ROUNDINGS = 30
"""A float64 difference passes, too, if it is below FLOAT32 and at most this many times the rounding noise of the heads.
The noise is measured: every block's output is disturbed by one unit in the last place.

Another order of additions (contiguous or channels-last tensors, one thread or two) moves heads by up to 4.6 times that
noise. This was measured on csresnext50-panet-spp, yolov4-tiny and yolo-fastest with random weights. A fault changes a
layer by far more than 30 units in the last place, and a network that amplifies noise amplifies the fault as well.
"""
SMALLEST_SIDE, CELLS = 64, 2
"""The input has this side at least, and this many cells of the coarsest head, if the network works on so few."""
RIDGE = 1e-4
"""Of the mean power of the inputs: enough where channels repeat one another, too little to move other solutions."""
MEMORY = 4 << 30
"""Bytes that the outputs of blocks may take."""
POSITIONS = 40_000
"""Positions of a convolution's input that are used, drawn at random from all pictures: many more than it has inputs."""


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
    """The same in float64, with running statistics or with those of the picture, whichever is nearer to its limit. The
    latter keep the signals of an untrained network from vanishing. Two pictures are taken where one gives a single
    value to normalise."""
    compact_vs_keep_size: float
    """The pruned network that is written and the masked one of full size with the same readers, in float32."""
    border: float | None
    """The pruned network and the one in which removed channels have γ = 0 and keep β: what zero padding makes of the
    constants, and where a gate depends on the picture. None where readers were fitted, who get more than constants."""
    side: int
    """Longer side of the input, in pixels."""
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
    compensated: Arrays,
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
        compensated: its tensors, where readers of removed channels make up for them; `arrays` itself if they do not.
        removal: what goes.
        bare: `arrays`, pruned.
        written: `compensated`, pruned.
        fitted: readers were fitted to pictures; otherwise they only got the constants.
    """
    network = graph.network
    generator = torch.Generator().manual_seed(0)
    height, width = _picture_size(network)
    image = torch.rand(1, network.net.channels, height, width, generator=generator)
    images = image.double()
    if normalised_cell(network, height, width) is not None:
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
    large = model_of(network, compensated)
    with masked(large, graph, removal):
        keep_size = difference(final, large(image).heads)
    border = None
    if not fitted:
        constant = model_of(network, without_gamma(graph, arrays, removal))
        border = difference(final, constant(image).heads)
    return Certificate(float32, float64, keep_size, border, max(height, width), allowed)


def _picture_size(network: Network) -> tuple[int, int]:
    """Height and width of the random picture: small, or those of the cfg where windows do not fit into a small one."""
    stride = max_stride(network)
    side = stride * max(CELLS, math.ceil(SMALLEST_SIDE / stride))
    try:
        trace(network, side, side)
    except CfgError:
        return network.net.height, network.net.width
    return side, side


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
    """Largest max|a - b| / max(1, max|a|, max|b|) of a pair of heads; NaN where a head is not finite."""
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
    """The tensors of the network before, with the readers of removed channels fitted again; shapes as before.

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
    shifts = layer.bn is not None or layer.conv.bias is not None  # without a place for b, A is solved for alone
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
