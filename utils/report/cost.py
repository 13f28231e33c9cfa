"""Costs of a network: parameters, multiply-adds and Darknet's BFLOPs, counted from the cfg alone, and its time.

BFLOPs are those that AlexeyAB/darknet prints. A multiply-add of a convolution counts two, a cell that a max pooling
looks at one, a value that a shortcut adds one, or two with weights. pjreddie/darknet printed the convolutions only
(`2 · macs / 1e9`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter, sleep

from utils.cli import ProgressBar
from utils.darknet.blocks import Network, Shape
from utils.darknet.network import tensors, trace

LEAST_ROUNDS = 5
"""Measured whatever time they take."""


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


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run."""

    median: float
    p90: float
    """90 % of the runs were no slower."""
    rounds: int
    """Number of runs."""


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 50,
    warm: int = 2,
    seconds: float = 10.0,
    pause: float = 0.0,
) -> dict[str, Latency]:
    """Run everything in turn, A B A B …, so that other work of the machine meets all alike; return how long each took.

    Args:
        runs: what to measure, by name; a function returns when its work is done (on a GPU it synchronises).
        rounds: most rounds, at least 1.
        warm: rounds before, which do not count.
        seconds: no round begins after this time, but the first `LEAST_ROUNDS` do.
        pause: seconds of rest before every turn, and then a run that does not count. It is for libraries whose threads
            wait for work in a loop when a run is over: they would take the cores from the next one.
    """
    import numpy as np  # utils.darknet.info answers without it

    for _ in range(warm):
        for run in runs.values():
            run()
    laps: dict[str, list[float]] = {name: [] for name in runs}
    begin = perf_counter()
    for number in ProgressBar("timing", range(rounds), unit="rounds"):
        if number >= LEAST_ROUNDS and perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            if pause:
                sleep(pause)
                run()
            start = perf_counter()
            run()
            laps[name].append(1000 * (perf_counter() - start))
    return {name: Latency(float(np.percentile(t, 50)), float(np.percentile(t, 90)), len(t)) for name, t in laps.items()}
