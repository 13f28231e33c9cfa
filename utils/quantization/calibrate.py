"""The bounds of activations from pictures, without training (post-training quantization).

Values are looked at in the float network, in two passes: one for the range of every tensor that is rounded, one for its
histogram. Everything else follows from the histograms, so that grids and kept blocks may change afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import Darknet
from utils.errors import NumericsError
from utils.layers import Computing
from utils.quantization.attach import Phase, set_phase
from utils.quantization.grid import Grid
from utils.quantization.observers import Curve, Histogram, Observer, Range
from utils.quantization.quantizers import ActivationQuantizer


class Point(NamedTuple):
    """A tensor that is rounded."""

    block: int
    """Whose output it is."""
    before: bool = False
    """What its activation function gets, not what it gives."""


def quantizers(model: Darknet) -> Iterator[tuple[Point, ActivationQuantizer]]:
    """The quantizers of the layers' activations, and what their bounds are the bounds of."""
    for index, layer in enumerate(model.layers):
        if isinstance(layer, Computing) and layer.quantize_output is not None:
            yield Point(index, layer.quantize_output.twice), layer.quantize_output


def points(model: Darknet) -> set[Point]:
    """The tensors that are rounded, or would be if a block were kept float: its output then."""
    found = {point for point, _ in quantizers(model)}
    return found | {Point(point.block) for point in found}


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a float network computes for the calibration pictures."""

    histograms: Mapping[Point, Histogram]
    pictures: int
    _found: dict[tuple[Point, Grid, Observer], Range] = field(default_factory=dict)

    def calibrate(self, model: Darknet, observer: Observer) -> None:
        """Set the bounds of a model's quantizers, which are changed; those of pictures are 0 and 1 always."""
        self._set(model.quantize_image, Range(0.0, 1.0))
        for point, quantizer in quantizers(model):
            curve = curve_behind(model, point)
            key = (point, quantizer.grid, observer)
            if key not in self._found:
                self._found[key] = observer(self.histograms[point], quantizer.grid, curve)
            self._set(quantizer, self._found[key])

    def _set(self, quantizer: ActivationQuantizer, bounds: Range) -> None:
        for buffer, value in ((quantizer.low, bounds.low), (quantizer.high, bounds.high),
                              (quantizer.seen, self.pictures)):  # fmt: skip
            buffer.fill_(value)


def curve_behind(model: Darknet, point: Point) -> Curve | None:
    """What is made of the values at a point: the activation function, or of a head's logits what decoding makes."""
    if point.before:
        return Curve(model.layers[point.block].activation, again=True)
    head = model.blocks[point.block + 1] if point.block + 1 in model.network.heads else None
    return None if head is None or head.new_coords else Curve(torch.sigmoid, again=False)


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
        if not low >= -torch.finfo(torch.float32).max or not high <= torch.finfo(torch.float32).max:
            raise NumericsError(f"{model.network.where(point.block)}: puts out what is not finite; its weights are "
                                "damaged")  # fmt: skip
        before = ranges.get(point, Range(low, high))
        ranges[point] = Range(min(low, before.low), max(high, before.high))

    wanted, pictures = points(model), 0
    with watched(model, wanted, widen):
        for images in batches:
            model(images)
            pictures += len(images)
    histograms = {point: Histogram(*found) for point, found in ranges.items()}
    with watched(model, wanted, lambda point, x: histograms[point].add(x)):
        for images in batches:
            model(images)
    return Statistics(histograms, pictures)


@contextmanager
def watched(model: Darknet, wanted: set[Point], see: Callable[[Point, Tensor], None]) -> Iterator[None]:
    """Inside, every forward pass of the model calls `see` with what it computes at the points."""

    def entry(point: Point) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(point, inputs[0])

    def outcome(point: Point) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, __, output: see(point, output)

    handles = []
    for point in wanted:
        layer = model.layers[point.block]
        if point.before:
            handles.append(layer.activation.register_forward_pre_hook(entry(point)))
        else:
            handles.append(layer.register_forward_hook(outcome(point)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
