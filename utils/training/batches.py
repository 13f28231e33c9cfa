"""Whether batch normalisation can learn from the batches of a run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Network
from utils.darknet.network import max_stride, normalised_cell
from utils.data.datasets import rectangle
from utils.data.images import Size
from utils.errors import InputError
from utils.training.settings import TrainSettings


def check_batches(
    network: Network,
    settings: TrainSettings,
    shapes: NDArray[np.int64],
    batch_size: int,
    *,
    rect: bool = False,
    processes: int = 1,
) -> None:
    """Refuse batches of one picture where a normalised map has a single cell: one value has no variance.

    Args:
        network: what is trained.
        settings: of the run.
        shapes: [N, 2], height and width of the training pictures.
        batch_size: pictures a batch of one process.
        rect: batches have the shapes of their pictures.
        processes: that train together.

    Raises:
        InputError: names the block and the size of the input.
    """
    if batch_size > 1 and len(shapes) >= 2 * processes:  # a last batch of one picture joins the one before it
        return
    for height, width in sorted(_sizes(network, settings, shapes, rect)):
        if (number := normalised_cell(network, height, width)) is not None:
            raise InputError(
                f"{network.path}: block {number} has 1 x 1 cells at {width} x {height}, and a batch has one "
                "picture; batch normalisation needs two values: use a larger --img_size or more pictures"
            )


def _sizes(network: Network, settings: TrainSettings, shapes: NDArray[np.int64], rect: bool) -> set[Size]:
    """Height and width of the smallest inputs."""
    stride, longest = max_stride(network), max(settings.size)
    if rect:
        return {rectangle(shape[None], longest, stride) for shape in np.unique(shapes, axis=0)}
    low = settings.sizes[0] if settings.sizes else longest
    height, width = (max(stride, round(side * low / longest / stride) * stride) for side in settings.size)
    return {(height, width)}
