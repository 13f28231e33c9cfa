"""Pictures of changing size."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from utils.training.settings import TrainSettings

SIZE_PERIOD = 10
"""Batches that a multi-scale run trains at one size, as Darknet's `random=1`."""


def rescaled(images: Tensor, settings: TrainSettings, stride: int, epoch: int, position: int) -> Tensor:
    """A batch at the size that a multi-scale run drew for this stretch of batches.

    The run begins with the largest size, so that it runs out of memory at once or not at all. It stays until a batch
    follows the first optimizer step, which makes the optimizer's state.

    Args:
        images: [B, C, H, W].
        settings: with the smallest and largest side in `sizes`, and the batches of a step in `accumulate`.
        stride: the sides are multiples of it.
        epoch: epochs done.
        position: of the batch in its epoch.
    """
    low, high = settings.sizes
    rng = np.random.default_rng([settings.seed, epoch, position // SIZE_PERIOD])
    side = stride * int(rng.integers(-(-low // stride), high // stride + 1))
    if epoch == 0 and position < max(SIZE_PERIOD, settings.accumulate + 1):
        side = high // stride * stride
    longest = max(images.shape[2:])
    size = [max(stride, round(old * side / longest / stride) * stride) for old in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
