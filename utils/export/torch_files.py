"""Files that PyTorch reads back: TorchScript, Darknet's .weights with a .cfg, and checkpoints of this suite."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import Darknet, fuse
from utils.checkpoint import load_model, model_document, write_checkpoint
from utils.cli import log
from utils.darknet import weights as weights_file
from utils.darknet.blocks import BN_EPSILON, Convolutional, Network
from utils.darknet.cfg import format_network
from utils.darknet.network import OPENCV_EPSILON, opencv_warning
from utils.detection.decode import decode
from utils.export.settings import ExportSettings
from utils.export.verify import Agreement, Subject, check_same, picture, verify
from utils.model_files import ModelFiles
from utils.runtime.engines import Engine


class _Traced(nn.Module):
    """A network as a function from a tensor to tensors."""

    def __init__(self, model: Darknet, size: tuple[int, int], decodes: bool) -> None:
        super().__init__()
        self.model, self.size, self.decodes = model, size, decodes

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Raw heads, or decoded rows."""
        heads = self.model(images).heads
        return decode(heads, self.model.network.yolos, self.size) if self.decodes else heads


def make_torchscript(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """TorchScript: the folded network traced and frozen."""
    metadata = subject.metadata
    module = _Traced(fuse(subject.model), metadata.size, settings.decode).eval()
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # sizes become constants, as they should; and PyTorch advises torch.export
        frozen = torch.jit.freeze(torch.jit.trace(module, picture(metadata), check_trace=False))
        extra = {"metadata.json": json.dumps(metadata.properties())}
        torch.jit.save(frozen, folder / "model.torchscript", _extra_files=extra)
    runtime = f"TorchScript {torch.__version__}, CPU, threads: {torch.get_num_threads()}"
    return verify("--format torchscript", subject, _engine(frozen, runtime)), {"batch": 1}


def _engine(function: nn.Module, runtime: str) -> Engine:
    @torch.inference_mode()
    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = function(torch.from_numpy(images))
        return [output.numpy() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]

    return Engine(run, 1, runtime)


def make_darknet(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """Darknet's files, read back and compared value by value; what is folded is compared in PyTorch, too."""
    network, model, proof = subject.metadata.network, subject.model, Agreement()
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    if settings.fold:
        model = fuse(model)
        proof = verify("--fold", subject, _engine(_Traced(model, subject.metadata.size, False), proof.runtime))
        arrays = {key: value.numpy() for key, value in model.state_dict().items()}
        network, arrays = with_biases(model.network, arrays)
    path = folder / "model.weights"
    weights_file.write(path, network, arrays)
    check_same("--format darknet", arrays, weights_file.read(path, network))
    path.with_suffix(".cfg").write_text(format_network(network))
    if warning := opencv_warning(network):
        log(warning)
    elif any(getattr(block, "batch_normalize", False) for block in network.blocks):
        log(
            f"Darknet adds {BN_EPSILON:g} to a variance, as this suite does, and OpenCV's reader {OPENCV_EPSILON:g}: "
            "where variances are tiny its heads differ by up to 0.8 %; with --fold all readers compute the same"
        )
    return proof, {}


def with_biases(network: Network, arrays: dict[str, np.ndarray]) -> tuple[Network, dict[str, np.ndarray]]:
    """The same function where every convolution has a bias, as other readers expect without batch normalisation."""
    arrays, blocks = dict(arrays), list(network.blocks)
    for index, block in enumerate(blocks):
        if isinstance(block, Convolutional) and not block.batch_normalize and not block.bias:
            blocks[index] = replace(block, bias=True)
            arrays[f"layers.{index}.conv.bias"] = np.zeros(block.filters, np.float32)
    return replace(network, blocks=tuple(blocks)), arrays


def make_checkpoint(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """A .pt of this suite, read back and compared value by value."""
    metadata, path = subject.metadata, folder / "model.pt"
    state = {key: value.contiguous() for key, value in subject.model.state_dict().items()}
    write_checkpoint(
        path, model_document(state, metadata.network, metadata.names, metadata.lineage, kept=subject.loaded.kept)
    )
    path.with_suffix(".cfg").write_text(format_network(metadata.network))
    back = load_model(ModelFiles(None, path, True)).model.state_dict()
    arrays = {key: value.numpy() for key, value in state.items()}
    check_same("--format pt", arrays, {key: value.numpy() for key, value in back.items()})
    return Agreement(), {}
