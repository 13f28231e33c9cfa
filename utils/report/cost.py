"""Costs of a network: parameters, multiply-adds and Darknet's BFLOPs, counted from the cfg alone.

BFLOPs are counted as AlexeyAB/darknet prints them: two for each multiply-add of a convolution, one for each cell a max
pooling looks at, one for each value a shortcut adds. pjreddie/darknet printed the convolutions only (`2 · macs / 1e9`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from utils.darknet.blocks import Network, Shape
from utils.darknet.network import tensors, trace


@dataclass(frozen=True)
class Cost:
    """Costs of a block or a network, for one picture."""

    parameters: int
    """Trained values: convolution weights and biases, γ and β."""
    macs: int
    """Multiply-adds of convolutions and fully connected layers."""
    flops: int
    """Darknet's count: 2 · macs, and max poolings and shortcuts."""

    @property
    def bflops(self) -> float:
        """Billions of `flops`."""
        return self.flops / 1e9


def block_costs(network: Network, height: int | None = None, width: int | None = None) -> tuple[Cost, ...]:
    """Cost of every block for an input of height × width pixels, the cfg's own size by default.

    Raises:
        CfgError: the network has an impossible shape at that size.
    """
    shapes = trace(network, height, width)
    image = Shape(network.net.channels, height or network.net.height, width or network.net.width)
    parameters = [0] * len(shapes)
    for spec in tensors(network):
        parameters[spec.block] += spec.size if spec.trained else 0
    costs = []
    for block, source, output, count in zip(network.blocks, (image, *shapes), shapes, parameters, strict=False):
        macs = block.macs(source.channels, output)
        costs.append(Cost(count, macs, 2 * macs + block.operations(output)))
    return tuple(costs)


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of several costs."""
    costs = tuple(costs)
    return Cost(*(sum(getattr(cost, name) for cost in costs) for name in ("parameters", "macs", "flops")))


def network_cost(network: Network, height: int | None = None, width: int | None = None) -> Cost:
    """Cost of the whole network for an input of height × width pixels, the cfg's own size by default."""
    return total(block_costs(network, height, width))
