"""Darknet's .weights files: a header, then float32 tensors in the order of `network.tensors`, little-endian.

The header is three int32 (major, minor, revision) and the number of pictures seen: a uint64 from version 0.2 on, a
uint32 before (AlexeyAB/darknet, `load_weights_upto`). Nothing in the file says which network it belongs to. So its size
is compared with that which the cfg needs before a value is read. No decision depends on a file's name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np

from utils.darknet.blocks import BN_EPSILON, Network
from utils.darknet.network import TensorSpec, adapt_classes, grouped, head_convolutions, tensors
from utils.errors import CfgError, NumericsError, WeightsError
from utils.files import atomic_path, regular_file

_VERSION = struct.Struct("<3i")
_LARGEST_VERSION = 999
"""Darknet marks transposed weights by a major or minor above 1000; a big-endian or foreign file has more, too."""


@dataclass(frozen=True)
class Header:
    """Head of a .weights file; the default is what AlexeyAB/darknet writes."""

    major: int = 0
    minor: int = 2
    revision: int = 5
    seen: int = 0
    """Pictures the network was trained with."""

    @property
    def wide(self) -> bool:
        """Whether `seen` takes 8 bytes; 4 before version 0.2."""
        return self.major * 10 + self.minor >= 2

    @property
    def size(self) -> int:
        """Size in the file: 20, or 16 before version 0.2."""
        return _VERSION.size + (8 if self.wide else 4)

    def pack(self) -> bytes:
        """The header as it is stored."""
        return struct.pack("<3iQ" if self.wide else "<3iI", self.major, self.minor, self.revision, self.seen)


@dataclass(frozen=True)
class Contents:
    """What a .weights file holds of a network."""

    header: Header
    blocks: int
    """Blocks 0 … blocks - 1 are in the file; what follows has no tensors or is not there."""
    of: int
    """Number of blocks of the network."""
    classes: int
    """Class count the file was made for."""
    skipped: tuple[int, ...] = ()
    """Blocks that are made for another class count, and not read: heads, and what else reads their channels."""
    partial: bool = False
    """Whether the file ends before the network does."""

    @property
    def complete(self) -> bool:
        """Whether every tensor of the network is read from the file."""
        return not self.partial and not self.skipped

    def __str__(self) -> str:
        """One line for the log: `layers 0–56 of 80 loaded`."""
        line = f"layers 0–{self.blocks - 1} of {self.of} loaded" if self.partial else f"all {self.of} layers loaded"
        if not self.skipped:
            return line
        heads = ", ".join(map(str, self.skipped))
        return f"{line} but {heads}: heads made for {self.classes} classes"


def read_header(path: Path | str) -> Header:
    """Header of a .weights file.

    Raises:
        WeightsError: not a regular file, shorter than a header, or with numbers that Darknet does not write.
    """
    size = regular_file(path, WeightsError).st_size
    with open(path, "rb") as file:
        data = file.read(_VERSION.size + 8)
    if len(data) < _VERSION.size + 4:
        raise WeightsError(f"{path}: ends inside the header: {size} bytes; 16 or 20 were expected")
    version = _VERSION.unpack_from(data)
    if min(version) < 0 or max(version[:2]) > _LARGEST_VERSION:
        raise WeightsError(
            f"{path}: its header says version {'.'.join(map(str, version))}: not a Darknet .weights file, or one with "
            f"transposed weights, which are not supported"
        )
    header = Header(*version)
    if len(data) < header.size:
        raise WeightsError(f"{path}: ends inside the header: {size} bytes; {header.size} were expected")
    seen = int.from_bytes(data[_VERSION.size : header.size], "little")
    if seen >= 1 << 63:
        raise WeightsError(f"{path}: its header says {seen - (1 << 64)} images were seen; 0 or more were expected")
    return replace(header, seen=seen)


def check(path: Path | str, network: Network, *, partial: bool = False) -> Contents:
    """What a file holds of `network`, told by its header and size alone.

    Args:
        path: the file.
        network: what it should fit.
        partial: also accept a backbone (a file that ends where a block ends) and a file of the same network with
            another class count, whose heads are skipped.

    Raises:
        WeightsError: the file does not fit; the message names the block, its line in the cfg, and both sizes.
    """
    header = read_header(path)
    layout = tensors(network)
    size = regular_file(path, WeightsError).st_size - header.size
    count, expected = len(network.blocks), sum(spec.bytes for spec in layout)
    if size == expected:
        return Contents(header, count, count, network.classes)
    classes = _fitting_classes(network, size)
    if partial and classes is not None:
        others = tensors(adapt_classes(network, classes))
        skipped = dict.fromkeys(spec.block for spec, other in zip(layout, others, strict=True) if spec != other)
        return Contents(header, count, count, classes, tuple(skipped))
    blocks = _backbone(layout, size)
    if partial and blocks:
        return Contents(header, blocks, count, network.classes, partial=True)
    raise WeightsError(
        f"{path}: {_problem(network, layout, size, blocks)}; expected {grouped(header.size + expected)} bytes, "
        f"found {grouped(header.size + size)}; {_cause(network, size < expected, classes)}"
    )


def fitting_classes(path: Path | str, network: Network) -> int | None:
    """Class count for which the file fits `network` as a whole, told by its size; None if there is none."""
    size = regular_file(path, WeightsError).st_size - read_header(path).size
    return _fitting_classes(network, size)


def read(path: Path | str, network: Network, *, partial: bool = False) -> dict[str, np.ndarray]:
    """Tensors of a file by their names in the model's state dict (`key`).

    Args:
        path: the file.
        network: what it must fit.
        partial: as in `check`; what the file does not hold, and skipped heads, are left out.

    Returns:
        float32 views of the mapped file, copied page by page when written to; the file itself never changes.

    Raises:
        WeightsError: as in `check`, or a value is NaN or infinite, or a variance negative.
    """
    contents = check(path, network, partial=partial)
    values = np.memmap(path, dtype="<f4", mode="c", offset=contents.header.size).view(np.ndarray)
    arrays, start = {}, 0
    for spec in tensors(adapt_classes(network, contents.classes)):
        if spec.block >= contents.blocks:
            break
        array = values[start : start + spec.size].reshape(spec.shape)
        start += spec.size
        if spec.block not in contents.skipped:
            if fault := _fault(spec, array):
                raise WeightsError(f"{path}: {_where(network, spec)} {fault}; the file is damaged or of another cfg")
            arrays[spec.key] = array
    return arrays


def write(path: Path | str, network: Network, arrays: Mapping[str, np.ndarray], header: Header | None = None) -> None:
    """Write a .weights file atomically.

    Args:
        path: the file, replaced as a whole.
        network: says which tensors are written, and their order.
        arrays: floating-point tensors by `key`; further entries are left out.
        header: version and pictures seen; that of AlexeyAB/darknet with none seen by default.

    Raises:
        ValueError: a tensor is missing or has another shape or type.
        NumericsError: a value is NaN or infinite, also as float32, or a variance negative.
    """
    stored = []
    for spec in tensors(network):
        array = arrays.get(spec.key)
        if array is None or array.shape != spec.shape or array.dtype.kind != "f":
            actual = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{_where(network, spec)}: float {list(spec.shape)} was expected; got {actual}")
        with np.errstate(over="ignore"):
            stored.append(np.ascontiguousarray(array, dtype="<f4"))
        if fault := _fault(spec, stored[-1]):
            raise NumericsError(f"{path}: not written, {_where(network, spec)} {fault}")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write((header or Header()).pack())
        for array in stored:
            file.write(array.data)


def _fitting_classes(network: Network, size: int) -> int | None:
    """Class count for which the tensors take `size` bytes; the size is linear in it."""

    def size_of(classes: int) -> int:
        return sum(spec.bytes for spec in tensors(adapt_classes(network, classes)))

    convolutions: Any = [network.blocks[i] for i in head_convolutions(network)]
    step = lcm(*(block.groups for block in convolutions))  # the groups divide the filters of so many classes more
    try:
        here, there = size_of(network.classes), size_of(network.classes + step)
        classes = network.classes + (size - here) * step // (there - here)
        return classes if classes >= 1 and size_of(classes) == size else None
    except CfgError:  # a block cannot read a head of so many classes
        return None


def _backbone(layout: Sequence[TensorSpec], size: int) -> int:
    """Number of blocks in a file of `size` bytes of tensors that ends where a block ends; 0 for any other file."""
    ends = accumulate(spec.bytes for spec in layout)
    for end, (spec, following) in zip(ends, pairwise(layout), strict=False):
        if end == size and spec.block != following.block:
            return spec.block + 1
    return 0


def _problem(network: Network, layout: Sequence[TensorSpec], size: int, blocks: int) -> str:
    """Where a file of `size` bytes of tensors ends; `blocks` as told by `_backbone`."""
    if blocks:
        return f"ends after {network.where(blocks - 1)} of {len(network.blocks)}, as a backbone for train.py -pt does"
    end = 0
    for spec in layout:
        end += spec.bytes
        if size < end:
            return f"ends inside {_where(network, spec)}: {grouped(end - size)} of {grouped(spec.bytes)} bytes missing"
    surplus = f"{grouped(size - end)} surplus byte" + ("s" if size - end > 1 else "")
    return f"{surplus} after {_where(network, layout[-1])}, the last tensor"


def _fault(spec: TensorSpec, array: np.ndarray) -> str | None:
    """What is wrong with the values of a tensor, if anything."""
    flat = array.reshape(-1)
    with np.errstate(all="ignore"):
        power = np.dot(flat, flat)  # one fast pass; not finite if a value is not, or if it overflows
    if not np.isfinite(power) and (count := np.count_nonzero(~np.isfinite(flat))):
        return f"is NaN or infinite in {count} of {flat.size} places"
    if spec.name == "bn.running_var" and flat.min() <= -BN_EPSILON:  # dead channels of public files have -7e-44
        return "has negative variances"
    return None


def _where(network: Network, spec: TensorSpec) -> str:
    """A tensor for a message: `block 23 (cfg/a.cfg:187), conv.weight`."""
    return f"{network.where(spec.block)}, {spec.name}"


def _cause(network: Network, short: bool, classes: int | None) -> str:
    """Why a file may be too short or too long."""
    if classes is not None:
        return f"it fits {classes} classes, and {network.path or 'the network'} has {network.classes}"
    return "it is cut short or belongs to another cfg" if short else "it belongs to another cfg"
