"""What a file's own network puts out for one picture, so that whatever runs the file can be compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Network
from utils.errors import InfeasibleError

if TYPE_CHECKING:
    from utils.runtime.engines import Engine
    from utils.runtime.exported import ExportedFile

Arrays = Sequence[NDArray[np.floating]]
BOX_COLUMNS = 4
VALUES = 256
"""Of each array that a file keeps."""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, are spread evenly, and in step with no side of an array."""
FLOORS = {"float32": 1e-3, "float16": 2e-2, "int8": 0.1}
"""Differences that always pass, by precision. Measured: 1e-6 in float32, 6e-3 in float16; with integers of seven
trained networks 0.02 to 0.16 in onnxruntime, OpenVINO and OpenCV, as a rounding that falls otherwise is carried on."""
MOST = 3
"""So many times the difference that the file was written with passes, too.

Measured on these networks in int8: programs that compute right differ by up to 1.9 times as much as onnxruntime, where
every layer was proved; OpenCV 5.0's new engine, which computes wrong, by 4.3 to 24 times as much.
"""


@dataclass(frozen=True)
class Reference:
    """Outputs of the network that a file was made of, for `picture`."""

    values: tuple[tuple[float, ...], ...]
    """VALUES of each array, as `sample` takes them."""
    gap: float
    """Difference of the program that the file was proved with."""

    def limit(self, precision: str) -> float:
        """Largest difference that passes."""
        return max(FLOORS[precision], MOST * self.gap)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"values": self.values, "gap": self.gap}


def reference(want: Arrays, found: Arrays, precision: str) -> Reference:
    """What to keep of the first picture's arrays: those of the network, and those of a program that was proved."""
    kept, other = ([sample(array[:1]) for array in arrays] for arrays in (want, found))
    values = tuple(tuple(float(f"{value:.7g}") for value in array) for array in kept)
    return Reference(values, distance(kept, other, precision))


def read_reference(document: Mapping[str, Any] | None) -> Reference | None:
    """The reference of a file; None of one that has none, as those of versions before."""
    if document is None:
        return None
    return Reference(tuple(tuple(map(float, values)) for values in document["values"]), float(document["gap"]))


def check_engine(engine: Engine, file: ExportedFile, *, half: bool = False) -> None:
    """Run an engine once and compare it with the reference of its file; files of versions before have none.

    Args:
        engine: of the file.
        file: what is known of it.
        half: the engine may compute in float16.

    Raises:
        InfeasibleError: it computes something else; names it, the file and the difference.
    """
    metadata, wanted = file.metadata, file.metadata.reference
    if wanted is None:
        return
    precision = "float16" if half else metadata.precision
    outputs = engine(picture(metadata.network))
    arrays = parts(outputs[0]) if metadata.output == "rows" else outputs
    gap = distance([np.array(values) for values in wanted.values], [sample(array) for array in arrays], precision)
    limit = wanted.limit(precision)
    if not gap <= limit:  # NaN, too
        raise InfeasibleError(
            f"{file.path}: {engine.name} computes another network than the file was made of: its outputs differ by "
            f"{gap:.3g}, allowed is {limit:.3g}; take another --runtime, or another version of it"
        )


def picture(network: Network, count: int = 1) -> NDArray[np.float32]:
    """Random pictures [count, C, H, W], 0…1, the same every time and everywhere: NumPy keeps RandomState as it is."""
    net = network.net
    values = np.random.RandomState(0).random_sample((count, net.channels, net.height, net.width))
    return values.astype(np.float32)


def sample(array: NDArray[np.floating]) -> NDArray[np.float64]:
    """At most VALUES of an array, spread over all of it."""
    flat = array.ravel()
    places = np.arange(min(VALUES, flat.size)) * GOLDEN % 1 * flat.size
    return flat[places.astype(int)].astype(np.float64)


def parts(rows: NDArray[np.floating]) -> Arrays:
    """Boxes, and scores, which are much smaller numbers."""
    return rows[..., :BOX_COLUMNS], rows[..., BOX_COLUMNS:]


def distance(want: Arrays, found: Arrays, precision: str) -> float:
    """How far arrays are from those wanted: for integers `relative`, as single values say little; else `compare`'s."""
    gap, error = compare(want, found)
    return relative(want, found) if precision == "int8" and np.isfinite(gap) else error


def compare(want: Arrays, found: Arrays) -> tuple[float, float]:
    """max|a - b|, and the largest max|a - b| / max(1, max|a|) of one array; infinite where shapes differ."""
    if [array.shape for array in want] != [array.shape for array in found]:
        return float("inf"), float("inf")
    gaps = [np.abs(a - b).max(initial=0) for a, b in zip(want, found, strict=True)]
    errors = [gap / max(1, np.abs(a).max(initial=0)) for gap, a in zip(gaps, want, strict=True)]
    return float(np.max(gaps)), float(np.max(errors))  # NaN stays NaN


def relative(want: Arrays, found: Arrays) -> float:
    """√(Σ(a − b)² / Σa²) of the worst array, of equal shapes."""
    return max(_norm(a - b) / max(_norm(a), np.finfo(np.float32).tiny) for a, b in zip(want, found, strict=True))


def _norm(values: NDArray[np.floating]) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))
