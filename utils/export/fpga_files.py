"""The folder of a network in integers: layout.json, model.npz, and text for $readmemh of a simulator of hardware."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.darknet.blocks import Convolutional, Maxpool, Network, Reorg, Route, Upsample
from utils.errors import InputError
from utils.export.fpga_reference import SHIFT_FACTOR, SHIFT_PLACES, Codes, Program, Step
from utils.files import atomic_write_bytes

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
    "accumulator": "sum of weight * code, plus bias << up; accumulator_bits hold it, and its sign, for any picture",
    "leaky": f"accumulator << {SHIFT_PLACES} where it is not negative, {SHIFT_FACTOR} * accumulator elsewhere",
    "down": "places to the right with rounding, to the left where negative; then limits low, high",
    "shortcut": "every source << up, added over the channels that the first has in common with it; then leaky, down",
    "route": "the group_id-th of groups parts of every source, each of several down and to the limits",
    "hex": "one code a line, hexadecimal two's complement, for $readmemh; activations are [C, H, W]",
}
"""What the numbers of layout.json mean."""


def files(
    made: Program, codes: Mapping[int, Codes], bits: Sequence[int], network: Network, facts: Mapping[str, Any]
) -> Iterator[tuple[str, bytes]]:
    """Names in the folder and contents; layout.json is the last.

    Args:
        made: the network.
        codes: of a picture, by block; the picture's own are −1.
        bits: of the accumulators, by block.
        network: the blocks.
        facts: what layout.json says besides.
    """
    arrays: dict[str, np.ndarray] = {}
    blocks = []
    for index, step in enumerate(made.steps):
        own = {"weight": (step.weight, width_of(step.weight)), "bias": (step.bias, width_of(step.bias))}
        own |= {key: (np.array(places), 8) for key, places in (("up", step.up), ("down", step.down)) if places}
        if step.kind != "pass":
            own["output"] = (codes[index], step.bits)
        for key, (array, width) in own.items():
            if array is not None:
                name = f"block{index:03d}.{key}"
                arrays[name] = array.astype(_kind(width))
                yield f"hex/{name}.hex", hexadecimal(array, width)
        blocks.append(_described(index, step, network, codes[index]) | {"accumulator_bits": bits[index]})
    arrays["image"] = codes[-1].astype(_kind(made.image.bits))
    yield "hex/image.hex", hexadecimal(codes[-1], made.image.bits)
    saved = io.BytesIO()
    np.savez_compressed(saved, **arrays)
    yield "model.npz", saved.getvalue()
    image = {"shape": codes[-1].shape, "exponent": made.image.exponent, "bits": made.image.bits}
    layout = {**facts, "about": ABOUT, "image": image, "heads": made.heads}
    yield "layout.json", _json(layout, blocks).encode()


def _json(layout: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> str:
    """A document whose blocks have a line each."""
    head = json.dumps(layout, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(block, ensure_ascii=False) for block in blocks)
    return f'{head},\n "blocks": [\n  {lines}\n ]\n}}\n'


def width_of(array: Codes | None) -> int:
    """Bits of a weight or bias in the files: 8, or 16."""
    return 8 if array is None or np.abs(array).max(initial=0) < 2**7 else 16


def _kind(bits: int) -> type[np.signedinteger]:
    return np.int8 if bits <= 8 else np.int16


def hexadecimal(array: np.ndarray, bits: int) -> bytes:
    """One code a line, two or four digits of two's complement."""
    digits = 2 if bits <= 8 else 4
    mask = 16**digits - 1
    values, places = np.unique(array, return_inverse=True)
    lines = np.array([f"{int(value) & mask:0{digits}x}\n".encode() for value in values])
    return lines[places.ravel()].tobytes()


def _described(index: int, step: Step, network: Network, codes: Codes) -> dict[str, Any]:
    """A block in layout.json."""
    kind = type(network.blocks[index]).__name__.lower()
    activation = "leaky" if step.leaky else getattr(network.blocks[index], "activation", "linear")
    found: dict[str, Any] = {
        "block": index,
        "section": kind,
        "computes": step.kind,
        "reads": step.reads,
        "shape": codes.shape,
        "exponent": step.exponent,
        "bits": step.bits,
        "low": step.low,
        "high": step.high,
        "activation": activation,
    }
    found |= {key: getattr(step.block, key) for key in GEOMETRY.get(type(step.block), ())}
    if step.weight is not None:
        found |= {"weight_bits": width_of(step.weight), "bias_bits": width_of(step.bias)}
    return found | {key: list(getattr(step, key)) for key in ("up", "down") if getattr(step, key)}


def write_folder(folder: Path, contents: Iterator[tuple[str, bytes]]) -> None:
    """Write files into a new folder.

    Raises:
        InputError: it exists.
        ResourceError: the disk is full; without its layout.json the folder is not complete.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder}: exists; choose another name")
    (folder / "hex").mkdir(parents=True)
    for name, data in contents:
        atomic_write_bytes(folder / name, data)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
