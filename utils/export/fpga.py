"""A network trained with powers of two, as the integers that an FPGA computes with, and the proof that they are it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import Darknet, fuse, network_input
from utils.darknet.blocks import Block, Maxpool, Reorg, Upsample
from utils.darknet.cfg import format_network
from utils.darknet.network import picture_channels
from utils.data.images import fit, read_image
from utils.errors import InfeasibleError, InputError
from utils.export.fpga_files import files, folder_bytes, write_folder
from utils.export.fpga_reference import EXACT_BITS, Codes, Program, Step, bits_needed
from utils.layers import ConvBlock
from utils.quantization.quantizers import ActivationQuantizer
from utils.quantization.scheme import SHIFT_PLACES, QuantSettings, passes
from utils.runtime.metadata import Metadata

HANDS_ON = {Maxpool: "maxpool", Upsample: "upsample", Reorg: "reorg"}
RELU6 = 6.0


class Proof(NamedTuple):
    """What was found when the integers were compared with the simulation of the training."""

    codes: dict[int, Codes]
    """Of all blocks for the picture, whose own are −1; the same as in float64 in every bit."""
    compared: int
    """How many codes those are."""
    float32_error: float
    """Largest difference of a head in float32, in its own unit."""
    float32_share: float
    """Share of the codes of all blocks that are others in float32."""
    accumulator_bits: tuple[int, ...]
    """Of each block, for any picture; 0 for one that only hands codes on."""


def check_shifts(settings: QuantSettings | None, path: Path) -> None:
    """Refuse a network that was not made for shifts.

    Raises:
        InputError: names the command that makes one.
    """
    if settings is None or not settings.kernels.power_of_two:
        how = "is float" if settings is None else f"is quantized with --target {settings.target}"
        way = "train.py --weights FILE --quantized 1 --FPGA"
        raise InputError(f"--format fpga: {path} {how}; `{way}` makes one of shifts of the float network, or "
                         "`quantize.py --weights FILE --target fpga`")  # fmt: skip


class Folder(NamedTuple):
    """What can be written."""

    write: Callable[[Path], None]
    facts: Mapping[str, Any]
    """For --json."""


def sample(path: Path, metadata: Metadata) -> Tensor:
    """A picture as the network sees it, [1, C, H, W], 0…1.

    Raises:
        DataError, CfgError: it cannot be read, or not as the network takes it.
    """
    pixels, _ = fit(read_image(path, picture_channels(metadata.network)), metadata.size, metadata.mode)
    return network_input(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()), torch.device("cpu"))


def make_folder(
    model: Darknet, picture: Tensor, settings: QuantSettings, metadata: Metadata, source: Path | None
) -> Folder:
    """The integers of a model, proved on a picture.

    Args:
        model: in evaluation mode, rounding.
        picture: [1, C, H, W], 0…1.
        settings: of the model.
        metadata: what layout.json says of it.
        source: where the picture is from; None: it is random.

    Raises:
        InfeasibleError: the integers are not the simulation.
    """
    made = program(model)
    proof = prove(made, model, picture)
    facts: dict[str, Any] = {
        "codes": proof.compared,
        "float32": {"max_abs_error": proof.float32_error, "share": proof.float32_share},
    }
    described = {
        "names": metadata.names,
        "picture": "random" if source is None else str(source),
        "rounding": "half to even" if settings.half_even else "half away from 0",
        "quantization": settings.document(),
        "lineage": metadata.lineage,
        **facts,
        "cfg": format_network(metadata.network),
    }

    def write(folder: Path) -> None:
        bits = proof.accumulator_bits
        write_folder(folder, files(made, proof.codes, bits, metadata.network, described))
        facts["bytes"] = folder_bytes(folder)

    facts["accumulator_bits"] = proof.accumulator_bits
    facts["precision"] = f"integers, weights of {settings.weight_bits} bits"
    return Folder(write, facts)


@torch.no_grad()
def program(model: Darknet) -> Program:
    """The integers of a model in evaluation mode, whose quantizers round."""
    image = _Grid.of(model.quantize_image)
    grids = {-1: image}
    steps = []
    for index, (block, layer) in enumerate(zip(model.blocks, model.layers, strict=True)):
        reads = block.reads(index)
        sources = [grids[read] for read in reads]
        if passes(block):
            grids[index] = sources[0]
            kind = "route" if hasattr(block, "layers") else HANDS_ON.get(type(block), "pass")
            steps.append(sources[0].step(kind, block, reads))
            continue
        grids[index] = own = _Grid.of(layer.quantize_output).limited(getattr(layer, "activation", None))
        steps.append(_computed(own, block, layer, reads, sources))
    return Program(image.step("pass", model.network.net, ()), tuple(steps), model.network.heads)


class _Grid(NamedTuple):
    """The codes a tensor may have."""

    exponent: int
    low: int
    high: int
    bits: int
    half_even: bool
    leaky: bool = False

    @classmethod
    def of(cls, slot: ActivationQuantizer) -> _Grid:
        grid = slot.grid
        return cls(_exponents(slot.scale().scale)[0], grid.low, grid.high, grid.bits, grid.half_even)

    def limited(self, activation: nn.Module | None) -> _Grid:
        """With the limits of an activation."""
        if isinstance(activation, nn.ReLU6):  # codes of 6 are rounded as all are
            six = math.ldexp(RELU6, -self.exponent)
            most = round(six) if self.half_even else math.floor(six + 0.5)
            return self._replace(low=0, high=min(self.high, most))
        if isinstance(activation, nn.ReLU):
            return self._replace(low=0)
        return self._replace(leaky=isinstance(activation, nn.LeakyReLU))

    def step(self, kind: str, block: Block, reads: tuple[int, ...], **more: object) -> Step:
        return Step(kind, block, reads, self.exponent, self.low, self.high, self.bits, half_even=self.half_even, **more)


def _computed(own: _Grid, block: Block, layer: nn.Module, reads: tuple[int, ...], sources: list[_Grid]) -> Step:
    """The step of a block that computes."""
    leaky = {"leaky": own.leaky}
    further = own.exponent + SHIFT_PLACES * own.leaky
    if isinstance(layer, ConvBlock):
        weight, bias, scale, bias_scale = layer.fold.folded(layer.conv, layer.bn, layer.quantize_weight)
        units = [sources[0].exponent + e for e in _exponents(scale.expand(len(weight)))]
        up = [] if bias is None else [e - unit for e, unit in zip(_exponents(bias_scale), units, strict=True)]
        return own.step("convolution", block, reads, **leaky,
                        up=tuple(up), down=tuple(further - unit for unit in units),
                        weight=_integers(weight, scale.reshape(-1, 1, 1, 1)),
                        bias=None if bias is None else _integers(bias, bias_scale))  # fmt: skip
    if hasattr(block, "layers"):
        return own.step("route", block, reads, down=tuple(own.exponent - source.exponent for source in sources))
    if hasattr(block, "sources"):
        unit = min(source.exponent for source in sources)
        up = tuple(source.exponent - unit for source in sources)
        return own.step("shortcut", block, reads, **leaky, up=up, down=(further - unit,))
    unit = sum(source.exponent for source in sources)
    return own.step("product", block, reads, **leaky, down=(further - unit,))


def _exponents(scale: Tensor) -> list[int]:
    """log₂ of powers of two."""
    mantissa, exponent = np.frexp(np.atleast_1d(scale.detach().cpu().numpy()))
    assert (mantissa == 0.5).all(), "scales are powers of two"
    return [int(e) - 1 for e in exponent]


def _integers(values: Tensor, scale: Tensor) -> Codes:
    """Values on a grid by their codes."""
    codes = (values.double() / scale.double()).cpu().numpy()
    assert (codes == np.rint(codes)).all(), "values lie on their grid"
    return codes.astype(np.int64)


@torch.inference_mode()
def prove(made: Program, model: Darknet, picture: Tensor) -> Proof:
    """Compare every block with the simulation in float64, for one picture, and measure float32.

    Args:
        made: of the model.
        model: in evaluation mode, rounding.
        picture: [1, C, H, W], 0…1.

    Raises:
        InfeasibleError: a code differs, or an accumulator may leave what float64 computes exactly; names the block.
    """
    everything = dict(enumerate(made.steps)) | {-1: made.image}
    bits = tuple(bits_needed(step, everything) for step in made.steps)
    for index, needed in enumerate(bits):
        if needed + SHIFT_PLACES > EXACT_BITS:
            most = EXACT_BITS - SHIFT_PLACES
            raise InfeasibleError(f"{model.network.where(index)}: sums may need {needed} bits, and at most {most} can "
                                  "be proved; take fewer --w_bit or --a_bit")  # fmt: skip
    single = fuse(model)
    double = copy.deepcopy(single).double()
    codes = {-1: made.encode(picture[0].double().numpy())}
    codes = made.run(codes[-1])
    want, rough = (_features(network, picture) for network in (double, single))
    different = compared = 0
    for index, step in everything.items():
        exact = np.ldexp(codes[index].astype(np.float64), step.exponent)
        if not np.array_equal(exact, want[index]):
            place = "the picture" if index < 0 else model.network.where(index)
            raise InfeasibleError(f"{place}: {int((exact != want[index]).sum())} of {exact.size} codes differ from the "
                                  "simulation in float64; nothing is written")  # fmt: skip
        different, compared = different + int((exact != rough[index]).sum()), compared + exact.size
    error = max(float(np.abs(want[head] - rough[head]).max()) for head in made.heads)
    return Proof(codes, compared, error, different / compared, bits)


def _features(network: Darknet, picture: Tensor) -> Mapping[int, np.ndarray]:
    """What all blocks put out, and the rounded picture as −1, [C, H, W] in float64."""
    kind = next(network.parameters()).dtype
    picture = picture.to(kind)
    found = dict(network(picture, features=range(len(network.layers))).features)
    found[-1] = network.quantize_image(picture)
    return {index: value[0].double().numpy() for index, value in found.items()}
