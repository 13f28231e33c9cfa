"""An ncnn network while it is written: the lines of its .param file and the bytes of its .bin file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAGIC = 7767517
"""First line of a .param file."""
FLOAT32, FLOAT16 = (np.array(tag, "<u4").tobytes() for tag in (0, 0x01306B47))
"""Four bytes before the kernel of a convolution, that say how it is stored."""
ARRAY = -23300
"""Minus the number of a parameter: the key of one that is an array."""
WORD = 4
"""Bytes that kernels are rounded up to."""

Value = int | float | Sequence[float]
"""Of a parameter of a layer."""


@dataclass(frozen=True)
class Layer:
    """One line of the file."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: Mapping[int, Value]

    def line(self) -> str:
        """As the file has it: kind, name, how many blobs it reads and makes, their names, parameters."""
        blobs = (*self.inputs, *self.outputs)
        keys = (_parameter(*item) for item in sorted(self.params.items()))
        head = f"{self.kind:<24} {self.outputs[-1]:<24} {len(self.inputs)} {len(self.outputs)}"
        return " ".join((head, *blobs, *keys))


def _parameter(key: int, value: Value) -> str:
    if isinstance(value, int):
        return f"{key}={value}"
    if isinstance(value, float):
        return f"{key}={value:.8e}"
    return ",".join((f"{ARRAY - key}={len(value)}", *(str(x) if isinstance(x, int) else f"{x:.8e}" for x in value)))


class NcnnFiles(NamedTuple):
    """A network as ncnn reads it."""

    param: str
    """Text of the .param file."""
    weights: bytes
    """Of the .bin file."""


class NcnnGraph:
    """Layers and weights so far. A layer bears the name of the last blob it makes.

    Args:
        half: store the kernels of convolutions in float16; ncnn computes in float32 all the same, unless it is told
            otherwise.
    """

    def __init__(self, *, half: bool = False) -> None:
        self.half = half
        self._layers: list[Layer] = []
        self._weights: list[bytes] = []

    def add(
        self, kind: str, inputs: Sequence[str], output: str, params: Mapping[int, Value] | None = None, *weights: bytes
    ) -> str:
        """Append a layer that makes one blob; returns its name, `output`.

        Args:
            kind: of the layer, as ncnn names it.
            inputs: blobs it reads.
            output: the blob it makes.
            params: by number; docs/developer-guide/operators.md of ncnn.
            weights: of `kernel` and `vector`, in the order the layer reads them.
        """
        self._layers.append(Layer(kind, tuple(inputs), (output,), dict(params or {})))
        self._weights += weights
        return output

    def kernel(self, values: NDArray[np.floating]) -> bytes:
        """Weights of a convolution, as they are stored."""
        if not self.half:
            return FLOAT32 + np.ascontiguousarray(values, "<f4").tobytes()
        data = FLOAT16 + np.ascontiguousarray(values, "<f2").tobytes()
        return data + bytes(-len(data) % WORD)

    @staticmethod
    def vector(values: ArrayLike) -> bytes:
        """A bias or factors, which are always float32."""
        return np.ascontiguousarray(values, "<f4").tobytes()

    def files(self, outputs: Mapping[str, str]) -> NcnnFiles:
        """The finished network.

        Args:
            outputs: names under which blobs leave it, by blob.
        """
        layers = list(split(self._layers, outputs))
        blobs = sum(len(layer.outputs) for layer in layers)
        lines = [str(MAGIC), f"{len(layers)} {blobs}", *(layer.line() for layer in layers)]
        return NcnnFiles("\n".join(lines) + "\n", b"".join(self._weights))


def split(layers: Sequence[Layer], outputs: Mapping[str, str]) -> Iterator[Layer]:
    """Layers in which every blob has one reader at most, as ncnn wants it: a `Split` copies those that have more.

    Args:
        layers: in the order they are run.
        outputs: names under which blobs leave the network, by blob.
    """
    readers = Counter(blob for layer in layers for blob in layer.inputs)
    readers.update(outputs.keys())
    read: Counter[str] = Counter()

    def copy(blob: str) -> str:
        """Name of the blob for its next reader."""
        if readers[blob] == 1:
            return blob
        read[blob] += 1
        return f"{blob}/copy{read[blob]}"

    for layer in layers:
        (made,) = layer.outputs
        name = outputs[made] if made in outputs and readers[made] == 1 else made
        yield replace(layer, inputs=tuple(map(copy, layer.inputs)), outputs=(name,))
        if readers[made] > 1:
            copies = [f"{made}/copy{number}" for number in range(1, readers[made] + (made not in outputs))]
            yield Layer("Split", (made,), (*([outputs[made]] if made in outputs else ()), *copies), {})
