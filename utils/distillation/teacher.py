"""The network that is learnt from: it never changes, and never gets a gradient."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from models import Darknet, Outputs, fuse, reduced
from utils.darknet.blocks import Network
from utils.darknet.shapes import max_stride
from utils.errors import InputError


class Teacher:
    """A trained network, its batch normalisations folded, in evaluation mode; no module, so that nothing trains it.

    Args:
        model: with its weights; it is left as it is.
        device: where it runs.
        dtype: of 16 bits, for its weights; None: float32, as always for a quantized network.
    """

    def __init__(self, model: Darknet, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._model = fuse(model)
        if dtype is not None and model.quantize_image is None:
            self._model = reduced(self._model, dtype)
        self._model.to(device, memory_format=torch.channels_last)
        self.network: Network = model.network
        """The blocks as they were before folding; their numbers are the same."""
        self._stride = max_stride(self.network)

    @torch.no_grad()
    def __call__(self, images: Tensor, features: Collection[int] = (), maps: Collection[int] = ()) -> Outputs:
        """What `Darknet.forward` returns for images [B, C, H, W], 0…1.

        Raises:
            InputError: its stride does not divide a side, as it may be with --rect.
        """
        height, width = images.shape[-2:]
        if height % self._stride or width % self._stride:
            raise InputError(f"the teacher needs an input with sides that are multiples of {self._stride}; a batch is "
                             f"{width} x {height}: leave out --rect")  # fmt: skip
        return self._model(images, features, maps)
