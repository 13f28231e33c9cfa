"""export.py --format darknet: .weights and .cfg as Darknet reads them, batch normalisations folded or as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from models import fuse
from utils.cli import log
from utils.darknet import weights as weights_file
from utils.darknet.blocks import BN_EPSILON, Convolutional, Network
from utils.darknet.network import OPENCV_EPSILON, opencv_warning
from utils.export.agreement import TOLERANCES, Agreement, picture, raw_heads
from utils.export.made import Made, Subject, check_same, read_back
from utils.export.request import ExportRequest
from utils.files import atomic_path
from utils.runtime.reference import compare


def make_darknet(subject: Subject, asked: ExportRequest) -> Made:
    """Darknet's .weights, read back and compared value by value; what is folded is compared in PyTorch, too.

    Raises:
        InfeasibleError: the folded network computes something else.
    """
    network, model, agreement = subject.metadata.network, subject.model, read_back()
    if asked.fold:
        model = fuse(model)
        images = picture(subject.metadata, 1)
        gaps = compare(raw_heads(subject.model, images), raw_heads(model, images))
        agreement = Agreement(*gaps, TOLERANCES["float32"], agreement.runtime)
        agreement.check("--fold")
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    if asked.fold:
        network, arrays = with_biases(model.network, arrays)

    def write(path: Path) -> None:
        with atomic_path(path) as temporary:
            weights_file.write(temporary, network, arrays)
            check_same(path, arrays, weights_file.read(temporary, network))

    if warning := opencv_warning(network):
        log(warning)
    elif any(getattr(block, "batch_normalize", False) for block in network.blocks):
        log(
            f"Darknet adds {BN_EPSILON:g} to a variance, as this suite does, and OpenCV's reader {OPENCV_EPSILON:g}: "
            "where variances are tiny its heads differ by up to 0.8 %; with --fold all readers compute the same"
        )
    return Made(agreement, write, {}, network)


def with_biases(network: Network, arrays: dict[str, np.ndarray]) -> tuple[Network, dict[str, np.ndarray]]:
    """The same function where every convolution has a bias, as other readers expect without batch normalisation."""
    arrays, blocks = dict(arrays), list(network.blocks)
    for index, block in enumerate(blocks):
        if isinstance(block, Convolutional) and not block.batch_normalize and not block.bias:
            blocks[index] = replace(block, bias=True)
            arrays[f"layers.{index}.conv.bias"] = np.zeros(block.filters, np.float32)
    return replace(network, blocks=tuple(blocks)), arrays
