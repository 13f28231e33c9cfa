"""Files of one network for every runtime: written and proved as export.py does, or taken as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.cli import log
from utils.darknet import cfg as cfg_file
from utils.errors import InputError
from utils.export.request import COMPANIONS
from utils.model_files import ModelFiles, choose_model
from utils.runtime.choice import KINDS, RuntimeFiles, choose_runtime

if TYPE_CHECKING:
    from utils.runtime.load import Loaded

FORMATS = {"opencv": "darknet", "onnxruntime": "onnx", "openvino": "openvino", "ncnn": "ncnn"}
"""Formats of export.py by what runs them here."""

Size = tuple[int, int]
"""Height and width of the input."""


class Named(NamedTuple):
    """A network as the command line names it: [NAME=]FILE."""

    name: str
    file: str
    """.pt, .cfg, CFG:WEIGHTS, or a file of export.py."""

    @property
    def exported(self) -> bool:
        """Whether it is run as it is."""
        return Path(self.file).suffix.lower() in KINDS


def total_bytes(files: RuntimeFiles) -> int:
    """Of the weights, or of an exported file and what belongs to it."""
    path = files.weights
    beside = COMPANIONS[FORMATS[files.runtime]] if path.suffix in (".param", ".xml") else ()
    return sum(file.stat().st_size for file in (path, *map(path.with_suffix, beside)))


def named(text: str) -> Named:
    """A network of the command line; argparse type."""
    name, _, file = ("", "", text) if Path(text).exists() else text.rpartition("=")
    return Named(name or Path(file.rpartition(":")[2]).name.partition(".")[0], file)


def source(network: Named, folder: Path) -> ModelFiles | None:
    """Files of a network that others are made of; None for one that is run as it is."""
    if network.exported:
        return None
    cfg, _, weights = ("", "", network.file) if Path(network.file).exists() else network.file.rpartition(":")
    if Path(weights).suffix != ".cfg":
        return choose_model(cfg_file.load(cfg) if cfg else None, weights)
    import torch

    from models import Darknet
    from utils.training.state import write_darknet

    torch.manual_seed(0)
    read, path = cfg_file.load(weights), folder / f"{network.name}.random.weights"
    write_darknet(path, Darknet(read))
    return choose_model(read, str(path))


def prepare(
    network: Named, files: ModelFiles | None, side: int | None, runtimes: Sequence[str], folder: Path
) -> list[tuple[RuntimeFiles, Size]]:
    """The network's files for every runtime that can have one, and the input they take."""
    found = []
    for runtime in runtimes:
        try:
            chosen = exported(network, side, runtime) if files is None else made(network, files, side, runtime, folder)
        except InputError as refusal:
            log(f"{network.name} in {runtime}: {refusal}; left out")
            continue
        if chosen is not None:
            found.append(chosen)
    return found


def exported(network: Named, side: int | None, runtime: str) -> tuple[RuntimeFiles, Size] | None:
    """A file of export.py, and its input; None where it is for another runtime or size."""
    if runtime not in KINDS[Path(network.file).suffix.lower()].runtimes:
        return None
    files = choose_runtime(None, network.file, runtime)
    size = files.exported.metadata.size
    if side not in (None, *size):
        log(f"{network.name}: takes {size[0]} × {size[1]}, not {side}; left out there")
        return None
    return files, size


def made(
    network: Named, files: ModelFiles, side: int | None, runtime: str, folder: Path
) -> tuple[RuntimeFiles, Size] | None:
    """A file for a runtime, written and proved, and its input.

    Raises:
        InputError: the runtime cannot run it.
    """
    from utils.export.formats import FORMATS as MAKERS
    from utils.export.request import SUFFIXES, ExportRequest
    from utils.export.workflow import load_subject, write

    format_ = FORMATS.get(runtime)
    asked = ExportRequest(files, format_ or "pt", sides=(side,) if side else None)
    subject = load_subject(asked)
    size = subject.metadata.size
    if format_ is None:
        return RuntimeFiles(*(getattr(files, field.name) for field in fields(ModelFiles))), size
    path = folder / f"{network.name}-{size[0]}-{size[1]}{SUFFIXES[format_]}"
    asked = ExportRequest(files, format_, sides=asked.sides, path=path)
    write(asked, subject.metadata.network, MAKERS[format_](subject, asked))
    cfg = cfg_file.load(path.with_suffix(".cfg")) if format_ == "darknet" else None
    return choose_runtime(cfg, str(path), runtime), size


def load(files: RuntimeFiles, size: Size) -> Loaded:
    """The network, ready to run."""
    import torch

    from utils.runtime.load import load as load_runtime

    return load_runtime(files, torch.device("cpu"), size)
