"""What each channel saves, so that a target is reached by the channels that matter least for what they save; no torch.

To remove a set of channels changes the loss by about Σ I², and a target bounds Σ savings. The set with the least change
for a bound takes channels by I² / saving (the fractional knapsack), which is the order of I / sqrt(saving).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Convolutional
from utils.darknet.shapes import trace
from utils.graph import ChannelGraph
from utils.pruning.plan import Size
from utils.pruning.policy import Importance
from utils.pruning.request import PruneRequest
from utils.pruning.target import Kind
from utils.pruning.units import residual_units
from utils.report.cost import block_costs, total


def savings(graph: ChannelGraph, kind: Kind, size: Size) -> NDArray[np.float64]:
    """[L], parameters (`kind` "params") or multiply-adds that go with a label, in what makes it and what reads it."""
    saved = np.zeros(graph.count)
    network = graph.network
    shapes, costs = trace(network, *size), block_costs(network, *size)
    for i, block in enumerate(network.blocks):
        if isinstance(block, Convolutional):
            own = costs[i].parameters if kind == "params" else costs[i].macs
            np.add.at(saved, graph.labels[i], own / len(graph.labels[i]))
            if graph.makes(i, block):
                read, cells = graph.reads(i), shapes[i].height * shapes[i].width
                np.add.at(saved, read, costs[i].macs / (cells if kind == "params" else 1) / len(read))
    return saved


def ranked(asked: PruneRequest, graph: ChannelGraph, importance: Importance, size: Size) -> Importance:
    """Importance as channels are ranked by: with a target by what they save, but for γ, of which no loss is known."""
    if asked.target is None or asked.importance == "gamma":
        return importance
    return per_saving(graph, importance, asked.target.kind, size)


def per_saving(graph: ChannelGraph, importance: Importance, kind: Kind, size: Size) -> Importance:
    """Importance over the root of what goes with a channel or a residual unit; their order is that of I² / saving.

    Args:
        graph: of the network.
        importance: of its channels and units.
        kind: what the target bounds: parameters, or else multiply-adds.
        size: of the network input.
    """
    saved, costs = savings(graph, kind, size), block_costs(graph.network, *size)
    units = {unit.shortcut: total(costs[i] for i in unit.blocks) for unit in residual_units(graph.network)}
    units = {i: float(cost.parameters if kind == "params" else cost.macs) for i, cost in units.items()}
    scale = saved[saved > 0].mean()
    return {i: values / np.sqrt(units[i] if i in units else saved[graph.labels[i]] / scale)
            for i, values in importance.items()}  # fmt: skip
