"""export.py --format fpga: a network trained with powers of two as the integers that an FPGA computes with.

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

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models import Computing, ConvBlock, Darknet, build_layer, fuse
from utils.darknet.blocks import Block, Convolutional, Maxpool, Reorg, Route, Shape, Shortcut, Upsample
from utils.darknet.cfg import format_network
from utils.errors import InfeasibleError
from utils.export.settings import ExportSettings
from utils.export.verify import Agreement, Subject, picture
from utils.quantization.quantizers import ActivationQuantizer
from utils.quantization.scheme import SHIFT_FACTOR, SHIFT_PLACES, passes

Codes = NDArray[np.float64]
"""Whole numbers, of a tensor [C, H, W]. Sums, products and shifts of them are exact in float64 up to 2^53."""
EXACT_BITS = 53
"""Of an integer in float64, sign aside."""
HANDS_ON = {Maxpool: "maxpool", Upsample: "upsample", Reorg: "reorg", Route: "route"}
RELU6 = 6.0
GEOMETRY = {
    Convolutional: ("filters", "size", "stride_x", "stride_y", "padding", "dilation", "groups"),
    Maxpool: ("size", "stride_x", "stride_y", "padding"),
    Upsample: ("stride",),
    Reorg: ("stride",),
    Route: ("groups", "group_id"),
}
"""Keys of a block that say what it computes."""
ABOUT = {
    "value": "code * 2^exponent",
    "weights": "[filters, channels / groups, size, size], last index fastest; two's complement",
    "accumulator": "sum of weight * code, plus bias << up; accumulator_bits hold it, and its sign, for any image",
    "leaky": f"accumulator << {SHIFT_PLACES} where it is not negative, {SHIFT_FACTOR} * accumulator elsewhere",
    "down": "places to the right with rounding, to the left where negative; then limits low, high",
    "shortcut": "every source << up, added over the channels that the first has in common with it; then leaky, down",
    "route": "the group_id-th of groups parts of every source, each of several down and to the limits",
    "hex": "one code a line, hexadecimal two's complement, for $readmemh; activations are [C, H, W]",
}
"""What the numbers of layout.json mean."""


class CodeRange(NamedTuple):
    """The codes that a tensor may have."""

    exponent: int
    low: int
    high: int
    """Limits, those of a relu included."""
    bits: int
    half_even: bool = True
    """Ties go to the even neighbour; otherwise away from 0."""
    leaky: bool = False
    """Leaky comes before the rounding."""

    def finish(self, sums: Codes, down: NDArray[np.integer] | int) -> Codes:
        """Activation, rounding shift, limits."""
        if self.leaky:
            sums = np.where(sums >= 0, sums * 2**SHIFT_PLACES, sums * SHIFT_FACTOR)
        return np.clip(shift(sums, down, self.half_even), self.low, self.high)


@dataclass(frozen=True, eq=False)
class Step:
    """The integer function of one block."""

    kind: str
    """convolution, shortcut, product, route, or what hands on: maxpool, upsample, reorg, pass."""
    block: Block
    reads: tuple[int, ...]
    range: CodeRange
    """Of what it puts out."""
    up: tuple[int, ...] = ()
    """Places to the left: of each bias, or of each source of a shortcut."""
    down: tuple[int, ...] = ()
    """Places to the right: of each channel of a convolution, of each source of a route, or of all."""
    weight: Codes | None = None
    """[O, I, k, k]."""
    bias: Codes | None = None
    """[O]."""

    def run(self, sources: Sequence[Codes]) -> Codes:
        """Codes of the block for those that it reads."""
        if isinstance(self.block, Convolutional) and self.weight is not None:
            bias = None if self.bias is None else np.ldexp(self.bias, self.up)
            sums = accumulators(sources[0], self.weight, self.block, bias)
            return self.range.finish(sums, np.reshape(self.down, (-1, 1, 1)))
        if self.kind == "shortcut":
            sources = [np.ldexp(codes, up) for codes, up in zip(sources, self.up, strict=True)]
        if self.kind == "route" and self.down:
            sources = [self.range.finish(codes, down) for codes, down in zip(sources, self.down, strict=True)]
        output = exactly(self.block, sources)
        return self.range.finish(output, self.down[0]) if self.kind in ("shortcut", "product") else output

    def accumulator_bits(self, sources: Sequence[CodeRange]) -> int:
        """Bits, sign included, of the largest accumulator that any input could give; 0 for what hands codes on.

        Args:
            sources: of the blocks it reads; their limits bound what comes in.
        """
        most = np.array([max(-source.low, source.high) for source in sources], np.float64)
        if self.weight is not None:
            largest = np.abs(self.weight).sum(axis=(1, 2, 3)) * most[0]
            if self.bias is not None:
                largest = largest + np.ldexp(np.abs(self.bias), self.up)
        elif self.kind == "shortcut":
            largest = np.ldexp(most, self.up).sum()
        elif self.kind == "product":
            largest = most.prod()
        else:
            return 0
        return int(np.frexp(np.max(largest))[1]) + 1

    def described(self, index: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """The step in layout.json."""
        block = self.block
        document: dict[str, Any] = {
            "block": index,
            "section": type(block).__name__.lower(),
            "computes": self.kind,
            "reads": self.reads,
            "shape": shape,
            **{key: getattr(self.range, key) for key in ("exponent", "bits", "low", "high")},
            "activation": "leaky" if self.range.leaky else getattr(block, "activation", "linear"),
            **{key: getattr(block, key) for key in GEOMETRY.get(type(block), ())},
        }
        if self.weight is not None:
            bias_bits = 8 if self.bias is None else stored_bits(self.bias)
            document |= {"weight_bits": stored_bits(self.weight), "bias_bits": bias_bits}
        return document | {key: getattr(self, key) for key in ("up", "down") if getattr(self, key)}


class Program(NamedTuple):
    """A network in integers."""

    image: CodeRange
    """Of pictures."""
    steps: tuple[Step, ...]
    """One a block."""

    def run(self, image: Codes) -> dict[int, Codes]:
        """The codes of all blocks for those of a picture, which are there as −1."""
        codes = {-1: image}
        for index, step in enumerate(self.steps):
            codes[index] = step.run([codes[source] for source in step.reads])
        return codes

    @property
    def ranges(self) -> list[CodeRange]:
        """Those of the blocks and, as −1, of pictures."""
        return [*(step.range for step in self.steps), self.image]

    def accumulator_bits(self) -> list[int]:
        """Bits of the accumulators of every block."""
        return [step.accumulator_bits([self.ranges[source] for source in step.reads]) for step in self.steps]


def shift(a: Codes, places: NDArray[np.integer] | int, half_even: bool) -> Codes:
    """⌊a / 2^places⌉; ties go to the even neighbour, or away from 0."""
    scaled = np.ldexp(a, np.negative(places))
    return np.rint(scaled) if half_even else np.trunc(scaled + np.copysign(0.5, scaled))


def exactly(block: Block, sources: Sequence[Codes]) -> Codes:
    """A block without its activation on codes."""
    linear: dict[str, Any] = {"activation": "linear"} if hasattr(block, "activation") else {}
    layer = build_layer(replace(block, **linear), Shape(*sources[0].shape)).eval()
    return layer(*(torch.from_numpy(codes)[None] for codes in sources))[0].numpy()


def accumulators(x: Codes, weight: Codes, block: Convolutional, bias: Codes | None) -> Codes:
    """Σ w x + b, [O, H', W']; `accumulator_bits` says that they are small enough to be exact."""
    sums = F.conv2d(
        torch.from_numpy(x)[None],
        torch.from_numpy(weight),
        None if bias is None else torch.from_numpy(bias),
        stride=(block.stride_y, block.stride_x),
        padding=block.padding * block.dilation,
        dilation=block.dilation,
        groups=block.groups,
    )
    return sums[0].numpy()


@torch.no_grad()
def program(model: Darknet) -> Program:
    """The integers of a model in evaluation mode, whose quantizers round."""
    image = _range(model.quantize_image)
    ranges, steps = {-1: image}, []
    for index, (block, layer) in enumerate(zip(model.blocks, model.layers, strict=True)):
        reads = block.reads(index)
        sources = [ranges[read] for read in reads]
        if passes(block):
            steps.append(Step(HANDS_ON.get(type(block), "pass"), block, reads, sources[0]._replace(leaky=False)))
        elif isinstance(layer, Computing):
            steps.append(_computing(block, layer, reads, sources))
        ranges[index] = steps[-1].range
    return Program(image, tuple(steps))


def _range(slot: ActivationQuantizer, activation: nn.Module | None = None) -> CodeRange:
    """The codes of a slot, within the limits of the activation before it."""
    grid, exponent = slot.grid, _exponents(slot.scale().scale)[0]
    low, high = grid.low, grid.high
    if isinstance(activation, nn.ReLU6):  # codes of 6 are rounded as all are
        six = math.ldexp(RELU6, -exponent)
        high = min(high, round(six) if grid.half_even else math.floor(six + 0.5))
    if isinstance(activation, nn.ReLU | nn.ReLU6):
        low = 0
    return CodeRange(exponent, low, high, grid.bits, grid.half_even, isinstance(activation, nn.LeakyReLU))


def _computing(block: Block, layer: Computing, reads: tuple[int, ...], sources: Sequence[CodeRange]) -> Step:
    """The step of a block that computes."""
    codes = _range(layer.quantize_output, getattr(layer, "activation", None))
    exponents = [source.exponent for source in sources]
    finer = codes.exponent + SHIFT_PLACES * codes.leaky
    if isinstance(layer, ConvBlock):
        weight, bias, scale, bias_scale = layer.fold.folded(layer.conv, layer.bn, layer.quantize_weight)
        units = [exponents[0] + exponent for exponent in _exponents(scale.expand(len(weight)))]
        down = tuple(finer - unit for unit in units)
        whole = _integers(weight, scale.reshape(-1, 1, 1, 1))
        step = Step("convolution", block, reads, codes, down=down, weight=whole)
        if bias is None:
            return step
        up = tuple(exponent - unit for exponent, unit in zip(_exponents(bias_scale), units, strict=True))
        return replace(step, up=up, bias=_integers(bias, bias_scale))
    if isinstance(block, Route):
        return Step("route", block, reads, codes, down=tuple(codes.exponent - exponent for exponent in exponents))
    if isinstance(block, Shortcut):
        unit = min(exponents)
        up = tuple(exponent - unit for exponent in exponents)
        return Step("shortcut", block, reads, codes, up, (finer - unit,))
    return Step("product", block, reads, codes, down=(finer - sum(exponents),))


def _exponents(scale: Tensor) -> list[int]:
    """log₂ of powers of two."""
    mantissa, exponent = np.frexp(np.atleast_1d(scale.detach().cpu().numpy()))
    assert (mantissa == 0.5).all(), "scales are powers of two"
    return [int(e) - 1 for e in exponent]


def _integers(values: Tensor, scale: Tensor) -> Codes:
    """Values on a grid by their codes."""
    codes = (values.double() / scale.double()).cpu().numpy()
    assert (codes == np.rint(codes)).all(), "values lie on their grid"
    return codes


@torch.inference_mode()
def prove(made: Program, model: Darknet, image: Tensor) -> tuple[Mapping[int, Codes], list[int], dict[str, Any]]:
    """Compare every code of every block with the simulation of the training in float64, for one picture.

    Args:
        made: of the model.
        model: in evaluation mode, rounding.
        image: [1, C, H, W], 0…1.

    Returns:
        The codes of all blocks, and of the picture as −1.
        The bits of the accumulators of each block, for any picture.
        Facts for --json: how many codes were compared, and how far float32 is from them, in heads and in all codes.

    Raises:
        InfeasibleError: a code differs, or an accumulator may leave what float64 computes exactly; names the block.
    """
    bits, most = made.accumulator_bits(), EXACT_BITS - SHIFT_PLACES
    for index, needed in enumerate(bits):
        if needed > most:
            raise InfeasibleError(
                f"{model.network.where(index)}: sums may need {needed} bits, and at most {most} can be proved; take "
                "fewer --w_bit or --a_bit"
            )
    single = fuse(model)
    want, rough = (_features(network, image) for network in (copy.deepcopy(single).double(), single))
    codes = made.run(made.image.finish(image[0].double().numpy(), made.image.exponent))
    different = compared = 0
    for index, values in codes.items():
        exact = np.ldexp(values, made.ranges[index].exponent)
        if wrong := int((exact != want[index]).sum()):
            where = "the image" if index < 0 else model.network.where(index)
            raise InfeasibleError(
                f"{where}: {wrong} of {exact.size} codes differ from the simulation in float64; nothing is written"
            )
        different, compared = different + int((exact != rough[index]).sum()), compared + exact.size
    error = max(float(np.abs(want[head] - rough[head]).max()) for head in model.network.heads)
    return codes, bits, {"codes": compared, "float32": {"max_abs_error": error, "share": different / compared}}


def _features(network: Darknet, image: Tensor) -> Mapping[int, NDArray[np.float64]]:
    """What all blocks put out, and the rounded picture as −1, [C, H, W]."""
    image = image.to(next(network.parameters()).dtype)
    features = dict(network(image, features=range(len(network.layers))).features)
    features[-1] = network.quantize_image(image)
    return {index: value[0].double().numpy() for index, value in features.items()}


def make_fpga(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """A folder: layout.json, model.npz, and text for $readmemh of a simulator of hardware.

    Raises:
        InfeasibleError: the integers are not the simulation.
        DataError, CfgError: the picture of --sample cannot be read, or not as the network takes it.
    """
    metadata, quantization = subject.metadata, subject.metadata.quantization
    assert quantization is not None, "check_quantization refuses a float network"
    image = picture(metadata, sample=settings.sample)
    made = program(subject.model)
    codes, bits, facts = prove(made, subject.model, image)
    facts["picture"] = "random" if settings.sample is None else str(settings.sample)
    description = {
        "names": metadata.names,
        "rounding": "half to even" if quantization.half_even else "half away from 0",
        "quantization": quantization.document(),
        "lineage": metadata.lineage,
        **facts,
        "cfg": format_network(metadata.network),
        "about": ABOUT,
        "image": {"shape": codes[-1].shape, "exponent": made.image.exponent, "bits": made.image.bits},
        "heads": metadata.network.heads,
    }
    write_folder(folder / "model.fpga", made, codes, bits, description)
    facts |= {"accumulator_bits": bits, "precision": f"integers, weights of {quantization.weight_bits} bits"}
    return Agreement(runtime="integers against float64 in PyTorch"), facts


def write_folder(
    folder: Path, made: Program, codes: Mapping[int, Codes], bits: Sequence[int], description: Mapping[str, Any]
) -> None:
    """Write the integers, and the codes of the picture that they were proved on."""
    tensors = {"image": (codes[-1], made.image.bits)}
    blocks = []
    for index, step in enumerate(made.steps):
        for key in ("weight", "bias", "up", "down"):
            values = getattr(step, key)
            if values is not None and len(values):
                tensors[f"block{index:03d}.{key}"] = np.array(values), stored_bits(values)
        if step.kind != "pass":
            tensors[f"block{index:03d}.output"] = codes[index], step.range.bits
        blocks.append(step.described(index, codes[index].shape) | {"accumulator_bits": bits[index]})
    (folder / "hex").mkdir(parents=True)
    for name, (values, width) in tensors.items():
        (folder / "hex" / f"{name}.hex").write_bytes(hexadecimal(values, width))
    arrays = {name: values.astype(np.int8 if width <= 8 else np.int16) for name, (values, width) in tensors.items()}
    np.savez_compressed(folder / "model.npz", **arrays)  # type: ignore[arg-type]  # the stub: one may be allow_pickle
    head = json.dumps(description, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(block, ensure_ascii=False) for block in blocks)
    (folder / "layout.json").write_text(f'{head},\n "blocks": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def stored_bits(codes: Codes | Sequence[int]) -> int:
    """Bits of weights, biases and places in the files: 8, or 16."""
    return 8 if np.abs(codes).max(initial=0) < 2**7 else 16


def hexadecimal(codes: Codes, bits: int) -> bytes:
    """One code a line, two or four digits of two's complement."""
    digits = 2 if bits <= 8 else 4
    lines = np.array([f"{code:0{digits}x}\n".encode() for code in range(16**digits)])
    return lines[codes.ravel().astype(int) % 16**digits].tobytes()
