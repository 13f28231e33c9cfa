"""The integer function of a network with scales that are powers of two, in numpy: what an FPGA computes. No torch.

The value of a code q is q · 2^e, with one exponent e for all that a block puts out. With ⌊a / 2^n⌉ a shift to the right
that rounds (to the left for n < 0, which is exact) and `sat` the limits of the block's codes:

    convolution   A[o] = Σ w[o] x + (b[o] << up[o])         y = sat(⌊act(A[o]) / 2^down[o]⌉)
    shortcut      A = Σ_i (x_i << up_i)                     y = sat(⌊act(A) / 2^down⌉)
    product       A = x_1 x_2                               y = sat(⌊act(A) / 2^down⌉)
    route         of several sources                        y_i = sat(⌊x_i / 2^down_i⌉)

The accumulator A of channel o is in units of 2^(e_x + e_w[o]), that of a shortcut in units of its finest source, to
which all others are shifted. Leaky is act(A) = A << 7 where A >= 0 and 13 A elsewhere, in units 2^7 as fine, so `down`
has 7 places more. Relu and relu6 are limits: 0, and the code of 6. Max pooling, nearest upsampling, reorg, dropout and
a route of one source hand codes on with their exponent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Convolutional, Maxpool, Reorg, Route, Upsample
from utils.quantization.scheme import SHIFT_FACTOR, SHIFT_PLACES

Codes = NDArray[np.int64]
"""[C, H, W]."""
EXACT_BITS = 53
"""Of an integer in float64, sign aside."""
FURTHEST = 62
"""Places after which nothing of 64 bits is left."""


@dataclass(frozen=True, eq=False)
class Step:
    """What one block computes."""

    kind: str
    """convolution, shortcut, product, route, or what hands on: maxpool, upsample, reorg, pass."""
    block: object
    """Its geometry."""
    reads: tuple[int, ...]
    exponent: int
    """Of what it puts out."""
    low: int
    high: int
    """Limits of its codes, those of a relu included."""
    bits: int
    leaky: bool = False
    half_even: bool = True
    """Ties go to the even neighbour; otherwise away from 0."""
    up: tuple[int, ...] = ()
    """Places to the left: of each bias, or of each source of a shortcut."""
    down: tuple[int, ...] = ()
    """Places to the right: of each channel of a convolution, of each source of a route, or of all."""
    weight: Codes | None = None
    """[O, I, k, k]."""
    bias: Codes | None = None
    """[O]."""


@dataclass(frozen=True, eq=False)
class Program:
    """A network in integers."""

    image: Step
    """How pictures become codes."""
    steps: tuple[Step, ...]
    """One a block."""
    heads: tuple[int, ...]

    def run(self, image: Codes) -> dict[int, Codes]:
        """The codes of all blocks for those of a picture, which are there as −1."""
        codes = {-1: image.astype(np.int64)}
        for index, step in enumerate(self.steps):
            codes[index] = KINDS[step.kind](step, [codes[source] for source in step.reads])
        return codes

    def encode(self, picture: NDArray[np.floating]) -> Codes:
        """The codes of a picture [C, H, W], 0…1."""
        scaled = np.ldexp(picture.astype(np.float64), -self.image.exponent)
        whole = np.trunc(scaled)
        away = whole + np.sign(scaled) * (np.abs(scaled - whole) >= 0.5)
        rounded = np.rint(scaled) if self.image.half_even else away
        return np.clip(rounded, self.image.low, self.image.high).astype(np.int64)


def shift(a: Codes, places: Codes | int, half_even: bool) -> Codes:
    """⌊a / 2^places⌉; ties go to the even neighbour, or away from 0."""
    right = np.clip(places, 0, FURTHEST)
    half = np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), 0)
    magnitude = np.abs(a)
    floor = magnitude >> right
    rest = magnitude - (floor << right)
    more = (rest > half) | ((rest == half) & (floor & 1 == 1)) if half_even else rest >= half
    rounded = np.sign(a) * (floor + (more & (right > 0)))
    return rounded << np.clip(-np.asarray(places), 0, FURTHEST)


def _finish(step: Step, a: Codes, down: Codes | int) -> Codes:
    """Activation, rounding shift, limits."""
    if step.leaky:
        a = np.where(a >= 0, a << SHIFT_PLACES, a * SHIFT_FACTOR)
    if np.any(np.asarray(down) < 0):  # a shift to the left keeps what is at a limit there
        a = np.where(np.asarray(down) < 0, np.clip(a, min(step.low, 0) - 1, step.high + 1), a)
    return np.clip(shift(a, down, step.half_even), step.low, step.high)


def accumulators(x: Codes, weight: Codes, block: Convolutional) -> Codes:
    """Σ w x, [O, H', W'].

    The products are added in float64, whose integers are exact up to 2^53; `bits_needed` says that they are smaller.
    """
    pad, size = block.padding * block.dilation, block.size
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad))).astype(np.float64)
    reach = (size - 1) * block.dilation + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (reach, reach), axis=(1, 2))
    windows = windows[:, :: block.stride_y, :: block.stride_x, :: block.dilation, :: block.dilation]
    _, height, width = windows.shape[:3]
    sums = []
    for group in range(block.groups):
        own = windows[group * weight.shape[1] : (group + 1) * weight.shape[1]]
        columns = own.transpose(0, 3, 4, 1, 2).reshape(-1, height * width)
        filters = len(weight) // block.groups
        rows = weight[group * filters : (group + 1) * filters].reshape(filters, -1).astype(np.float64)
        sums.append(rows @ columns)
    return np.concatenate(sums).astype(np.int64).reshape(-1, height, width)


def _convolution(step: Step, sources: Sequence[Codes]) -> Codes:
    a = accumulators(sources[0], step.weight, step.block)
    if step.bias is not None:
        a = a + (step.bias << np.array(step.up))[:, None, None]
    return _finish(step, a, np.array(step.down)[:, None, None])


def _shortcut(step: Step, sources: Sequence[Codes]) -> Codes:
    total = sources[0] << step.up[0]
    for x, up in zip(sources[1:], step.up[1:], strict=True):
        common = min(len(total), len(x))
        total[:common] += x[:common] << up
    return _finish(step, total, step.down[0])


def _product(step: Step, sources: Sequence[Codes]) -> Codes:
    return _finish(step, sources[0] * sources[1], step.down[0])


def _route(step: Step, sources: Sequence[Codes]) -> Codes:
    block: Route = step.block
    parts = [np.split(x, block.groups)[block.group_id] for x in sources]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([_finish(step, x, down) for x, down in zip(parts, step.down, strict=True)])


def _maxpool(step: Step, sources: Sequence[Codes]) -> Codes:
    block: Maxpool = step.block
    before = block.padding // 2
    around = (before, block.padding - before)
    padded = np.pad(sources[0], ((0, 0), around, around), constant_values=np.iinfo(np.int64).min)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (block.size, block.size), axis=(1, 2))
    return windows[:, :: block.stride_y, :: block.stride_x].max(axis=(3, 4))


def _upsample(step: Step, sources: Sequence[Codes]) -> Codes:
    block: Upsample = step.block
    return sources[0].repeat(block.stride, axis=1).repeat(block.stride, axis=2)


def _reorg(step: Step, sources: Sequence[Codes]) -> Codes:
    block: Reorg = step.block
    s, (channels, height, width) = block.stride, sources[0].shape
    cells = sources[0].reshape(channels // s**2, height, s, width, s).transpose(2, 4, 0, 1, 3)
    return cells.reshape(channels * s**2, height // s, width // s)


KINDS = {
    "convolution": _convolution,
    "shortcut": _shortcut,
    "product": _product,
    "route": _route,
    "maxpool": _maxpool,
    "upsample": _upsample,
    "reorg": _reorg,
    "pass": lambda step, sources: sources[0],
}


def bits_needed(step: Step, sources: Mapping[int, Step]) -> int:
    """Bits, sign included, of the largest accumulator that any input could give; 0 for what only hands codes on.

    Args:
        step: of a block.
        sources: the steps it reads, whose limits bound what comes in.
    """
    most = [max(-sources[read].low, sources[read].high) for read in step.reads]
    if step.kind == "convolution":
        sums = np.abs(step.weight).sum(axis=(1, 2, 3), dtype=np.float64) * most[0]
        added = 0 if step.bias is None else np.ldexp(np.abs(step.bias).astype(np.float64), np.array(step.up))
        largest = float(np.max(sums + added))
    elif step.kind == "shortcut":
        largest = float(sum(np.ldexp(float(x), up) for x, up in zip(most, step.up, strict=True)))
    elif step.kind == "product":
        largest = float(most[0]) * most[1]
    else:
        return 0
    return int(np.frexp(largest)[1]) + 1
