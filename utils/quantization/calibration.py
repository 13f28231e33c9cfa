"""Bounds and biases of a quantized network from pictures, without training, and the noise that rounding makes.

Values are looked at in the float network, in two passes: one for the range of every tensor that is rounded, one for its
histogram. Everything else follows from the histograms, so that grids and kept blocks may change afterwards.

An observer clips a range, so that what is left gets smaller steps. It tries ranges on a histogram of the values and
takes the one of least cost. Bin i has h_i values near x_i, which the grid rounds to x̂_i:

    minmax        the whole range
    mse           Σ h_i (x_i − x̂_i)² / Σ h_i
    cosine        1 − Σ h_i x_i x̂_i / √(Σ h_i x_i² · Σ h_i x̂_i²); over powers of two as in SpursLipu's suite

Costs compare what is made of the values, f(x) and f(x̂), where that is known. An integer kernel that rounds what an
activation function gets, too: below −4 mish is flat, so what is clipped there costs next to nothing. And a head: its
logits go through the logistic function.

Noise is measured as SQNR = 10 log₁₀ (Σ x² / Σ (x − x̂)²) dB, with x of the float network and x̂ of the rounded one. Heads
are measured behind the logistic function, too: how far below 0 the logit of nothing lies, is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from models import Computing, ConvBlock, Darknet
from utils.cli import ProgressBar
from utils.errors import NumericsError
from utils.quantization.quantizers import ActivationQuantizer, Phase, fake_quantize, gate_scale, scale_of, set_phase
from utils.quantization.scheme import Grid

BINS = 2048
"""Of a histogram, as in TensorRT and ONNX Runtime."""
CHUNK = 1 << 24
"""Values counted at once: float32 counts no further."""
RATIOS = 100
"""Clip ratios that are tried for an end of the range, evenly from 0.01 to 1."""
OCTAVES = 16
"""Halvings that are tried where scales are powers of two."""
GOLDEN = 0.6180339887498949


class Point(NamedTuple):
    """A tensor that is rounded."""

    block: int
    """Whose output it is."""
    before: bool = False
    """The input of its activation function, not the output."""


class Curve(NamedTuple):
    """Function that the values at a point go through."""

    function: Callable[[Tensor], Tensor]
    again: bool
    """Its result is rounded, too."""
    gate: bool = False
    """To codes of its own and not to the same."""


class Range(NamedTuple):
    """Ends of the values that a grid represents."""

    low: float
    high: float


class Histogram:
    """Number of values in each of BINS equal bins, one of which is centred at 0.

    Args:
        low: smallest value that will be counted.
        high: largest one.
    """

    def __init__(self, low: float, high: float) -> None:
        self.range = Range(min(low, 0.0), max(high, 0.0))
        self.step = (self.range.high - self.range.low) / (BINS - 2) or 1.0
        self.zero = round(-self.range.low / self.step)
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the values of a tensor."""
        low, high = (edge * self.step for edge in (-self.zero - 0.5, BINS - self.zero - 0.5))
        for part in x.detach().float().flatten().split(CHUNK):
            self.counts += torch.histc(part, BINS, low, high).double().cpu()

    @property
    def values(self) -> Tensor:
        """float64 [BINS], a value for each bin.

        They lie at different places in their bins, as the levels of a grid might otherwise meet the centre of every
        bin and seem exact; 0 is 0.
        """
        number = torch.arange(BINS, dtype=torch.float64) - self.zero
        return (number + torch.where(number == 0, 0.0, (number * GOLDEN) % 1 - 0.5)) * self.step


Cost = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Counts [BINS], values [1, BINS] and rounded values [K, BINS] to the costs of K ranges."""


def squared_error(counts: Tensor, x: Tensor, rounded: Tensor) -> Tensor:
    """Mean square of the change, [K]."""
    return ((x - rounded).square() * counts).sum(-1) / counts.sum()


def angle(counts: Tensor, x: Tensor, rounded: Tensor) -> Tensor:
    """1 minus the cosine of the angle between values and rounded values, [K]."""
    product, one, other = ((a * b * counts).sum(-1) for a, b in ((x, rounded), (x, x), (rounded, rounded)))
    return 1 - product / (one * other).sqrt().clamp(min=torch.finfo(torch.float64).tiny)


COSTS: Mapping[str, Cost | None] = {"minmax": None, "mse": squared_error, "cosine": angle}
"""--observer; `scheme.OBSERVED` says what they are. None: nothing is clipped."""


def best_range(histogram: Histogram, grid: Grid, cost: Cost | None, curve: Curve | None = None) -> Range:
    """Clipped range of least cost: both ends at once on a symmetric grid, else one after the other."""
    low, high = histogram.range
    if cost is None:
        return histogram.range
    if grid.power_of_two:
        ratios = torch.exp2(-torch.arange(OCTAVES, dtype=torch.float64))
    else:
        ratios = torch.arange(RATIOS, 0, -1, dtype=torch.float64) / RATIOS

    def best(lows: Tensor, highs: Tensor) -> float:
        costs = cost(histogram.counts, *_outcomes(histogram, lows, highs, grid, curve))
        return ratios[int(costs.numpy().argmin())].item()  # numpy's argmin is the first of equal ones

    if grid.symmetric:
        most = max(-low, high)
        ratio = best(-most * ratios, most * ratios)
        return Range(max(low, -most * ratio), min(high, most * ratio)) if ratio < 1 else histogram.range
    one = torch.ones_like(ratios)
    high *= best(low * one, high * ratios)
    low *= best(low * ratios, high * one)
    return Range(low, high)


def _outcomes(
    histogram: Histogram, low: Tensor, high: Tensor, grid: Grid, curve: Curve | None
) -> tuple[Tensor, Tensor]:
    """Values as they are handed on, [1, BINS], and with rounding to each of K ranges, [K, BINS]."""
    each = replace(grid, per_channel=True)
    scale, x = scale_of(low, high, each), histogram.values[None]
    rounded = fake_quantize(x.expand(len(low), -1), scale, each)
    if curve is None:
        return x, rounded
    result = curve.function(rounded)
    after = gate_scale(low, each) if curve.gate else scale
    return curve.function(x.clone()), fake_quantize(result, after, each) if curve.again else result


def quantizers(model: Darknet) -> Iterator[tuple[Point, ActivationQuantizer]]:
    """The quantizers of the layers' activations, and the points whose bounds they have."""
    for index, layer in enumerate(model.layers):
        if isinstance(layer, Computing) and layer.quantize_output is not None:
            yield Point(index, layer.quantize_output.twice), layer.quantize_output


@dataclass(frozen=True, eq=False)
class Statistics:
    """Values of a float network for the calibration pictures."""

    histograms: Mapping[Point, Histogram]
    pictures: int

    def calibrate(self, model: Darknet, cost: Cost | None) -> None:
        """Set the bounds of a model's quantizers, which are changed; those of pictures are 0 and 1 always."""
        bounds = [(model.quantize_image, Range(0.0, 1.0))]
        for point, quantizer in quantizers(model):
            curve = curve_behind(model, point)
            bounds.append((quantizer, best_range(self.histograms[point], quantizer.grid, cost, curve)))
        for quantizer, ends in bounds:
            quantizer.low.fill_(ends.low)
            quantizer.high.fill_(ends.high)
            quantizer.seen.fill_(self.pictures)


def curve_behind(model: Darknet, point: Point) -> Curve | None:
    """The activation function behind a point, or the logistic function that the decoding of a head begins with."""
    layer = model.layers[point.block]
    if point.before and isinstance(layer, ConvBlock):
        return Curve(layer.activation, again=True, gate=layer.quantize_output.gate)
    head = model.blocks[point.block + 1] if point.block + 1 in model.network.heads else None
    return None if getattr(head, "new_coords", True) else Curve(torch.sigmoid, again=False)


@torch.no_grad()
def observe(model: Darknet, batches: Iterable[Tensor]) -> Statistics:
    """Look at all that will be rounded; the model computes in float and nothing of it changes.

    Args:
        model: with quantizers in its slots, in evaluation mode.
        batches: float images [B, C, H, W], 0…1, on its device; gone through twice.

    Raises:
        NumericsError: a value is not finite.
    """
    set_phase(model, Phase.OFF)
    ranges: dict[Point, Range] = {}

    def widen(point: Point, x: Tensor) -> None:
        low, high = (float(bound) for bound in x.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            where = model.network.where(point.block)
            raise NumericsError(f"{where}: puts out what is not finite; its weights are damaged")
        before = ranges.get(point, Range(low, high))
        ranges[point] = Range(min(low, before.low), max(high, before.high))

    pictures = _watch(model, batches, widen)
    histograms = {point: Histogram(*ends) for point, ends in ranges.items()}
    _watch(model, batches, lambda point, x: histograms[point].add(x))
    return Statistics(histograms, pictures)


def _watch(model: Darknet, batches: Iterable[Tensor], see: Callable[[Point, Tensor], None]) -> int:
    """Call `see` with all that is rounded, or would be if a block were kept float; returns the number of pictures."""
    pictures = 0
    with ExitStack() as hooks:
        for point, _ in quantizers(model):
            layer, output = model.layers[point.block], Point(point.block)
            hooks.enter_context(layer.register_forward_hook(lambda _, __, x, point=output: see(point, x)))
            if point.before and isinstance(layer, ConvBlock):
                entry = layer.activation.register_forward_pre_hook(lambda _, inputs, point=point: see(point, inputs[0]))
                hooks.enter_context(entry)
        for images in ProgressBar("calibration", batches, unit="batches"):
            model(images)
            pictures += len(images)
    return pictures


def biased(model: Darknet) -> dict[int, Tensor]:
    """β of the batch normalisation, or the bias, of every convolution that has one."""
    biases = {}
    for index, layer in convolutions(model):
        bias = layer.conv.bias if layer.bn is None else layer.bn.bias
        if bias is not None:
            biases[index] = bias
    return biases


def convolutions(model: Darknet) -> list[tuple[int, ConvBlock]]:
    """Convolutions and their blocks."""
    return [(index, layer) for index, layer in enumerate(model.layers) if isinstance(layer, ConvBlock)]


@torch.no_grad()
def means(
    model: Darknet, images: Tensor, correct: Callable[[int, Tensor], None] = lambda _, __: None
) -> dict[int, Tensor]:
    """Mean input of the activation function of each convolution, float64 [C]; `correct` is called with each first."""
    averages: dict[int, Tensor] = {}

    def see(index: int, layer: ConvBlock, inputs: tuple[Tensor, ...]) -> None:
        averages[index] = layer.sums(inputs[0]).mean(dim=(0, 2, 3), dtype=torch.float64)
        correct(index, averages[index])

    with ExitStack() as hooks:
        for index, layer in convolutions(model):
            hooks.enter_context(layer.register_forward_pre_hook(partial(see, index)))
        model(images)
    return averages


@torch.no_grad()
def correct_biases(model: Darknet, images: Tensor) -> None:
    """Correct the biases of a quantized model with calibrated bounds, which is changed; it rounds afterwards.

    Rounding moves the means of what a convolution puts out, and errors of the mean add up from layer to layer. They go
    into the bias, layer by layer, each behind the layers that are corrected already (Nagel et al., "Data-free
    quantization", arXiv:1906.04721, section 4.2):

        b ← b − E[Ŵ x̂ − W x]

    Args:
        model: in evaluation mode.
        images: [B, C, H, W], 0…1, all at once, as each layer needs all pictures behind corrected layers.
    """
    set_phase(model, Phase.OFF)
    expected, biases = means(model, images), biased(model)
    set_phase(model, Phase.FROZEN)

    def correct(index: int, mean: Tensor) -> None:
        if index in biases:
            biases[index] -= (mean - expected[index]).to(biases[index].dtype)

    means(model, images, correct)


class Noise:
    """Sums of squares of signals and of their errors."""

    def __init__(self) -> None:
        self.signal, self.noise = 0.0, 0.0

    def add(self, signal: Tensor, rounded: Tensor) -> None:
        """Count a tensor and its rounded values."""
        self.signal += float(signal.square().sum(dtype=torch.float64))
        self.noise += float((signal - rounded).square().sum(dtype=torch.float64))

    @property
    def decibels(self) -> float | None:
        """SQNR; None where it has no finite value: nothing was changed, or all was 0."""
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise > 0 else None


def block_noise(model: Darknet, images: Iterable[Tensor]) -> dict[int, float | None]:
    """SQNR of what each convolution puts out, with all of the network rounded: what came before is in it.

    Args:
        model: quantized, with bounds, in evaluation mode; it rounds afterwards.
        images: [B, C, H, W], 0…1; small batches, as the outputs of all blocks are held.
    """
    noise = {index: Noise() for index, _ in convolutions(model)}
    _compare(model, images, noise)
    return {index: block.decibels for index, block in noise.items()}


def whole_noise(model: Darknet, images: Iterable[Tensor]) -> float | None:
    """SQNR of all heads together with all of the network rounded; arguments as of `block_noise`."""
    noise = Noise()
    _compare(model, images, {head - 1: noise for head in model.network.heads})
    return noise.decibels


@torch.no_grad()
def _compare(model: Darknet, images: Iterable[Tensor], noise: Mapping[int, Noise]) -> None:
    """Count the outputs of some blocks in float and rounded."""
    for batch in images:
        set_phase(model, Phase.OFF)
        signals = model(batch, features=noise).features
        set_phase(model, Phase.FROZEN)
        rounded = model(batch, features=noise).features
        for block, sums in noise.items():
            sums.add(_decoded(model, block, signals[block]), _decoded(model, block, rounded[block]))


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
    signals, decibels = [_heads(model, batch) for batch in images], {}
    for index, layer in ProgressBar("noise of each convolution", convolutions(model), unit="convolutions"):
        if layer.quantize_weight is None:
            continue
        layer.quantize_weight.rounding = True
        layer.quantize_output.rounding = layer.quantize_output.twice or index + 1 in model.network.heads
        noise = Noise()
        for batch, heads in zip(images, signals, strict=True):
            for signal, rounded in zip(heads, _heads(model, batch), strict=True):
                noise.add(signal, rounded)
        decibels[index] = noise.decibels
        set_phase(model, Phase.OFF)
    set_phase(model, Phase.FROZEN)
    return decibels


def _heads(model: Darknet, batch: Tensor) -> list[Tensor]:
    """Heads of a batch as decoding begins with them."""
    return [_decoded(model, head - 1, x) for head, x in zip(model.network.heads, model(batch).heads, strict=True)]


def _decoded(model: Darknet, block: int, x: Tensor) -> Tensor:
    curve = curve_behind(model, Point(block))
    return x if curve is None else curve.function(x)
