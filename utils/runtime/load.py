"""The network of `--weights` in the runtime that was chosen, ready to evaluate and to detect."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from models import Darknet, Outputs, fuse, reduced
from utils.checkpoint import load_model
from utils.darknet.blocks import Network
from utils.darknet.network import OPENCV_EPSILON
from utils.errors import InfeasibleError, InputError, WeightsError
from utils.runtime.choice import RuntimeFiles
from utils.runtime.engines import (
    Engine,
    ncnn_engine,
    onnxruntime_engine,
    opencv_darknet_engine,
    opencv_onnx_engine,
    openvino_engine,
)
from utils.runtime.exported import ExportedFile
from utils.runtime.metadata import Metadata, distance, parts, picture, reference, sample


class ForeignModel(nn.Module):
    """A network that another program than PyTorch runs; it has no parameters and stands in for a `Darknet`.

    Args:
        network: its blocks.
        engine: what runs it.
        decodes: whether the engine puts out rows [B, N, 5 + C] in place of raw heads.
    """

    def __init__(self, network: Network, engine: Engine, *, decodes: bool = False) -> None:
        super().__init__()
        self.network, self.engine, self.decodes = network, engine, decodes

    def forward(self, images: Tensor, features: Collection[int] = ()) -> Outputs:
        """Raw head outputs of images [B, C, H, W], 0…1."""
        assert not self.decodes and not features, "there are raw heads only"
        heads = self._run(images)
        if len(heads) != len(self.network.heads):
            raise WeightsError(f"{self.engine.name}: {len(heads)} heads came out of {len(self.network.heads)}")
        return Outputs(tuple(heads), {})

    def rows(self, images: Tensor) -> Tensor:
        """Decoded rows [B, N, 5 + C], as `utils.detection.decode.decode` returns them."""
        assert self.decodes, "there are raw heads only"
        return self._run(images)[0]

    def _run(self, images: Tensor) -> list[Tensor]:
        outputs = self.engine(np.ascontiguousarray(images.cpu().numpy()))
        return [torch.from_numpy(output) for output in outputs]


@dataclass(frozen=True)
class Loaded:
    """A network that is ready to run."""

    model: Darknet | ForeignModel
    """In evaluation mode; a `Darknet` with its batch normalisations folded."""
    network: Network
    """As the cfg has it."""
    names: tuple[str, ...] | None
    """Class names; None where the file has none."""
    runtime: str
    """What runs it, for people."""
    notes: tuple[str, ...] = ()
    """What was adapted, to be said."""


def load(files: RuntimeFiles, device: torch.device, size: tuple[int, int] | None = None) -> Loaded:
    """The network of checked files.

    Args:
        files: of `choose_runtime`.
        device: of PyTorch; other programs run on the CPU with as many threads as PyTorch.
        size: height and width of the input; the network's own by default.

    Raises:
        WeightsError: damaged, or the runtime cannot read it.
        InputError: --half on a CPU, or of a quantized network.
        InfeasibleError: the runtime computes something else than the file was written with.
    """
    threads = torch.get_num_threads()
    if files.runtime == "torch":
        if files.half and device.type == "cpu":
            raise InputError("--half: float16 needs a GPU, and the network runs on the CPU; leave --half out")
        loaded = load_model(files)
        if files.half and loaded.quantization is not None:
            raise InputError(
                f"--half: {files.weights} is quantized, and float16 has other values than its grids; leave --half out"
            )
        model = fuse(loaded.model)
        if files.half:
            model = reduced(model, torch.float16)
        model.to(device).to(memory_format=torch.channels_last)
        gpu = device.type == "cuda"
        where = torch.cuda.get_device_name(device) if gpu else f"CPU, threads: {threads}"
        return Loaded(model, loaded.model.network, loaded.names, f"PyTorch {torch.__version__}, {where}", loaded.notes)
    network, file = files.network, files.exported
    assert network is not None, "only a .pt is read without its cfg"
    if file is None:
        size = size or (network.net.height, network.net.width)
        engine = opencv_darknet_engine(network, files.weights, size, threads)
        check_engine(engine, _darknet_files(files, network, size))
    else:
        engine = ENGINES[files.runtime](files, file, threads)
        check_engine(engine, file, half=files.half)
    decodes = file is not None and file.metadata.output == "rows"
    return Loaded(ForeignModel(network, engine, decodes=decodes).eval(), network, files.names, engine.name)


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


@torch.inference_mode()
def _darknet_files(files: RuntimeFiles, network: Network, size: tuple[int, int]) -> ExportedFile:
    """Darknet files with what PyTorch puts out for them, computed with OpenCV's epsilon, as their reference."""
    network = replace(network, net=replace(network.net, height=size[0], width=size[1]))
    model = load_model(files).model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = OPENCV_EPSILON
    heads = [head.numpy() for head in model(torch.from_numpy(picture(network))).heads]
    return ExportedFile(files.weights, Metadata(network, (), reference=reference(heads, heads, "float32")), 1)


ENGINES: dict[str, Callable[[RuntimeFiles, ExportedFile, int], Engine]] = {
    "onnxruntime": lambda files, file, threads: onnxruntime_engine(
        file.path, file.metadata.tensors, file.batch, threads, wide=file.metadata.wide
    ),
    "opencv": lambda files, file, threads: opencv_onnx_engine(
        file.path, file.metadata.tensors, threads, integers=file.metadata.precision == "int8"
    ),
    "ncnn": lambda files, file, threads: ncnn_engine(file.path, file.metadata.tensors, threads, half=files.half),
    "openvino": lambda files, file, threads: openvino_engine(file.path, file.metadata.tensors, file.batch, threads),
}
"""What runs files of export.py, with so many threads."""
