"""How much each channel and each residual unit matters: what silencing it does to the loss, or |γ|.

`taylor` is Taylor-FO-BN of Molchanov et al. ("Importance Estimation for Neural Network Pruning", arXiv:1906.10771) with
β added, as the constant goes with the channel: I = sqrt(mean over batches of (γ ∂L/∂γ + β ∂L/∂β)²), with the training
loss L and frozen statistics. For a residual unit the sum runs over all channels of its last convolution before it is
squared: what masking the unit does. `gamma` is |γ|, which says something after sparse training only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models import load_arrays
from utils.darknet.blocks import Network
from utils.data.datasets import Batch
from utils.detection.evaluate import network_input
from utils.detection.losses import detection_loss
from utils.detection.settings import LossSettings
from utils.errors import NumericsError
from utils.pruning.surgery import Arrays
from utils.pruning.units import residual_units


def taylor(
    network: Network, arrays: Arrays, batches: Iterable[Batch], loss: LossSettings, device: torch.device | str = "cpu"
) -> dict[int, NDArray[np.float64]]:
    """Importance of all channels and residual units, by block number.

    Args:
        network: whose tensors they are.
        arrays: are not changed.
        batches: training pictures and boxes; one at least.
        loss: settings of the detection loss.
        device: where it is computed.

    Raises:
        NumericsError: the loss or a gradient is not finite.
    """
    model = load_arrays(network, {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()})
    model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    scaled = {i: layer.bn for i, layer in enumerate(model.layers) if getattr(layer, "bn", None) is not None}
    parameters = [p.requires_grad_() for bn in scaled.values() for p in (bn.weight, bn.bias)]
    units = residual_units(network)
    sums: dict[int, NDArray[np.float64]] = {}
    count = 0
    for batch in tqdm(batches, "importance", unit="batch", file=sys.stderr, disable=None, leave=False):
        outputs = model(network_input(batch.images, device))
        size = (batch.images.shape[-2], batch.images.shape[-1])
        boxes = (batch.targets.to(device), network.yolos, size, loss)
        total = detection_loss(outputs.heads, *boxes, ignored=batch.ignored.to(device)).total
        # of a convolution that no head reads it is 0; without parameters PyTorch refuses
        gradients = torch.autograd.grad(total, parameters, materialize_grads=True) if parameters else ()
        change = {
            i: (bn.weight * of_gamma + bn.bias * of_beta).detach().double().cpu().numpy()
            for (i, bn), of_gamma, of_beta in zip(scaled.items(), gradients[::2], gradients[1::2], strict=True)
        }
        change |= {unit.shortcut: change[unit.last].sum(keepdims=True) for unit in units}
        sums = {i: values**2 + sums.get(i, 0.0) for i, values in change.items()}
        count += 1
    found = {i: np.sqrt(values / count) for i, values in sums.items()}
    if not all(np.isfinite(values).all() for values in found.values()):
        raise NumericsError("--importance taylor: the loss has no finite gradient; the weights are damaged")
    return found
