"""Importance of channels and residual units: the change of the loss by masking one, or |γ|; and that per saved cost.

`taylor` is Taylor-FO-BN of Molchanov et al. ("Importance Estimation for Neural Network Pruning", arXiv:1906.10771) with
β added, as masking sets both to 0: I = sqrt(mean over batches of (γ ∂L/∂γ + β ∂L/∂β)²). L is the training loss;
running statistics are frozen. Masking a residual unit masks all channels of its last convolution, so their terms are
added up before squaring. `gamma` is |γ|, which is meaningful only after sparse training.

To remove a set of channels changes the loss by about Σ I², and a target bounds Σ savings. The set with the least change
for a bound takes channels by I² / saving (the fractional knapsack), which is the order of I / sqrt(saving).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from models import ConvBlock, network_input
from utils.cli import ProgressBar
from utils.darknet.blocks import Convolutional, Network
from utils.darknet.network import trace
from utils.data.datasets import Batch
from utils.detection.losses import detection_loss
from utils.detection.settings import LossSettings
from utils.errors import NumericsError
from utils.pruning.channel_graph import ChannelGraph, Importance, residual_units
from utils.pruning.surgery import Arrays, model_of
from utils.report.tables import block_costs, total

Counted = Literal["parameters", "macs"]
"""Cost that a channel saves."""


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
    model = model_of(network, arrays)
    model.requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    scaled = {i: layer.bn for i, layer in enumerate(model.layers) if isinstance(layer, ConvBlock) and layer.bn}
    parameters = [p.requires_grad_() for bn in scaled.values() for p in (bn.weight, bn.bias)]
    units = residual_units(network)
    sums: dict[int, NDArray[np.float64]] = {}
    count = 0
    for batch in ProgressBar("importance", batches, unit="batches"):
        outputs = model(network_input(batch.images, device))
        size = (batch.images.shape[-2], batch.images.shape[-1])
        boxes = (batch.targets, network.yolos, size, loss)
        value = detection_loss(outputs.heads, *boxes, ignored=batch.ignored).total
        if value.requires_grad:
            # materialize_grads: 0 for a convolution that no head depends on
            gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        else:
            gradients = tuple(map(torch.zeros_like, parameters))
        change = {
            i: (bn.weight * of_gamma + bn.bias * of_beta).detach().double().cpu().numpy()
            for (i, bn), of_gamma, of_beta in zip(scaled.items(), gradients[::2], gradients[1::2], strict=True)
        }
        change |= {unit.shortcut: change[unit.last].sum(keepdims=True) for unit in units}
        sums = {i: values**2 + sums.get(i, 0.0) for i, values in change.items()}
        count += 1
    importance = {i: np.sqrt(values / count) for i, values in sums.items()}
    if not all(np.isfinite(values).all() for values in importance.values()):
        raise NumericsError("--importance taylor: the loss has no finite gradient; the weights are damaged")
    return importance


def savings(graph: ChannelGraph, counted: Counted, size: tuple[int, int]) -> NDArray[np.float64]:
    """[L], parameters or multiply-adds that go with a label, in what makes it and what reads it."""
    saved = np.zeros(graph.count)
    network = graph.network
    shapes, costs = trace(network, *size), block_costs(network, *size)
    for i, block in enumerate(network.blocks):
        if isinstance(block, Convolutional):
            np.add.at(saved, graph.labels[i], getattr(costs[i], counted) / len(graph.labels[i]))
            if graph.makes(i):
                read, cells = graph.reads(i), shapes[i].height * shapes[i].width
                # A reader saves kernel weights only, which are its multiply-adds for one cell: no γ, β or bias.
                np.add.at(saved, read, costs[i].macs / (cells if counted == "parameters" else 1) / len(read))
    return saved


def per_saving(graph: ChannelGraph, importance: Importance, counted: Counted, size: tuple[int, int]) -> Importance:
    """Importance over the root of what goes with a channel or a residual unit; their order is that of I² / saving.

    Args:
        graph: of the network.
        importance: of its channels and units.
        counted: what a channel saves.
        size: of the network input.
    """
    saved, costs = savings(graph, counted, size), block_costs(graph.network, *size)
    scale = saved[saved > 0].mean()
    units = {unit.shortcut: unit.blocks for unit in residual_units(graph.network)}
    divided = {}
    for i, values in importance.items():
        if i in units:
            saving = float(getattr(total(costs[block] for block in units[i]), counted))
        else:
            saving = saved[graph.labels[i]] / scale
        divided[i] = values / np.sqrt(saving)
    return divided
