"""Batch statistics of a pruned network, taken anew: adaptive batch normalisation (EagleEye, arXiv:2007.02491, 3.3)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import load_arrays
from utils.darknet.blocks import Network
from utils.errors import InputError, NumericsError
from utils.pruning.surgery import Arrays

STATISTICS = ("running_mean", "running_var")


@torch.no_grad()
def recalibrate(
    network: Network, arrays: Arrays, batches: Iterable[Tensor], device: torch.device | str = "cpu"
) -> dict[str, NDArray[np.floating]]:
    """The tensors with the running statistics of every batch normalisation averaged over the batches.

    Each mean and variance is the plain mean of those of the batches, whatever it was before, so to recalibrate twice on
    the same batches is to do it once. What removed channels added to a mean is in it: do not absorb it as well.

    Args:
        network: whose tensors they are.
        arrays: left as they are.
        batches: float images [B, C, H, W], 0…1, on the device; one at least.
        device: where it is computed.

    Raises:
        InputError: a batch has one value a channel somewhere, which has no variance.
        NumericsError: the network puts out NaN or infinity.
    """
    copied = {name: array.copy() if name.endswith(STATISTICS) else array for name, array in arrays.items()}
    model = load_arrays(network, {name: torch.from_numpy(np.asarray(array)) for name, array in copied.items()}).eval()
    model.to(device, memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # PyTorch's word for the cumulative average
            layer.train()
    for images in batches:
        try:
            model(images)
        except ValueError as failure:
            raise InputError(f"--recalibrate: a batch is too small ({failure}); use a larger --batch-size") from None
    state = model.state_dict()
    changed = {name: state[name].cpu().numpy() for name in copied if name.endswith(STATISTICS)}
    if not all(np.isfinite(values).all() for values in changed.values()):
        raise NumericsError("--recalibrate: the statistics are not finite; the weights are damaged")
    return dict(arrays) | changed
