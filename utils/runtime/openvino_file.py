"""OpenVINO files of export.py: NAME.xml, with what it is in its rt_info, and its weights in NAME.bin. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import WeightsError
from utils.files import regular_file
from utils.runtime.engines import OPENVINO_PLACES, first_line
from utils.runtime.exported import DIGEST, ExportedFile, Sides, changed, check_sides, sha256
from utils.runtime.metadata import read_metadata
from utils.runtime.packages import require

if TYPE_CHECKING:
    import openvino

SECTION = "darknet"
"""Of rt_info, where the metadata are."""


def read_openvino(path: Path) -> ExportedFile:
    """Read what a file says of itself and compare it with its inputs and outputs.

    Raises:
        InputError: the package openvino is missing.
        WeightsError: damaged, made by another program, or without its weights.
    """
    regular_file(path, WeightsError)
    weights = path.with_suffix(".bin")
    digest = sha256(weights)
    require(str(path), "openvino")
    import openvino

    try:
        model = openvino.Core().read_model(str(path))
    except RuntimeError as failure:
        raise WeightsError(
            f"{path}: no OpenVINO file, or damaged ({first_line(failure, OPENVINO_PLACES)}); take another copy"
        ) from None
    found = model.get_rt_info([SECTION]).value if model.has_rt_info([SECTION]) else {}
    entries = found.items() if isinstance(found, dict) else ()
    properties = {key: str(getattr(value, "value", value)) for key, value in entries}
    metadata = read_metadata(properties, str(path))
    batch = check_sides(path, metadata, _sides(model.inputs), _sides(model.outputs))
    return ExportedFile(path, metadata, batch, (changed(weights),) * (properties.get(DIGEST) != digest))


def _sides(ports: list[openvino.Output]) -> Sides:
    """Sides of tensors by name; None where one may vary."""
    return {
        port.get_any_name(): tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
        for port in ports
    }
