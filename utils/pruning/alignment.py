"""Which number widths are best rounded up to a multiple of: a latency table of single layers decides.

Rounding up adds multiply-adds and may still save time, where a runtime works on so many channels at once. So the time
decides, not the efficiency (gain in time over gain in multiply-adds), which grows with every channel that is put back.
What is timed follows from the network, its input size and the policy, not from γ or pictures: plans are drawn, each is
left ragged and rounded up to every multiple, and the times of its convolutions and max poolings are added up. Poolings
count because in PyTorch on a CPU ragged widths cost them most: 15 channels of 224 × 224 take 1.3 times as long as 16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from utils.darknet.blocks import Convolutional, Depthwise, Maxpool, Network, Shape
from utils.darknet.shapes import trace
from utils.graph import ChannelGraph
from utils.layers import as_convolutional, build_layer
from utils.pruning.candidates import candidates
from utils.pruning.plan import Size
from utils.pruning.policy import ChannelPolicy, families_of
from utils.pruning.ranking import Family
from utils.pruning.removal import Removal
from utils.pruning.shares import keep_shares
from utils.pruning.surgery import compact_network
from utils.report.cost import block_costs
from utils.report.latency import interleaved

MULTIPLES = (1, 4, 8, 16)
"""What is compared; 1: widths as they come."""
DEFAULT = 8
"""Chosen unless another is faster by more than `TIE`, in every plan."""
TIE = 0.05
"""Share of the time that a table cannot tell: by as much it differs from the times of whole networks, where layers find
other things in the caches (docs/pruning.md), and, on a busy CPU, from the next table."""
KEPT = (0.4, 0.9)
"""Least and largest share of a family's channels in a drawn plan."""
DRAWS = 5
"""Plans."""
SEED = 0
SECONDS = 8.0
"""For the table; layers that come after that, the smallest, are left out for all multiples alike."""
MOST_ROUNDS = 100
"""In which a layer is timed."""


class Layer(NamedTuple):
    """A convolution as it runs, with bias and activation and without batch normalisation, or a max pooling."""

    block: Convolutional | Maxpool
    source: Shape
    """What it reads."""
    operations: int
    """As Darknet counts them."""


Site = tuple[Layer, ...]
"""A layer of a plan, as each of `MULTIPLES` leaves it."""
Timer = Callable[[Sequence[Layer], float], Sequence[float]]
"""A runtime: times layers in turn, in about so many seconds together; milliseconds of each."""


@dataclass(frozen=True)
class TorchTimer:
    """Layers in PyTorch as `measure.Clock` runs networks: channels-last, one picture."""

    device: torch.device

    def __call__(self, layers: Sequence[Layer], seconds: float) -> list[float]:
        """Median milliseconds of each."""
        with torch.inference_mode():
            runs = {str(number): self._run(one) for number, one in enumerate(layers)}
            return [times.median for times in interleaved(runs, rounds=MOST_ROUNDS, warm=1, seconds=seconds).values()]

    def _run(self, of: Layer) -> Callable[[], None]:
        """Its forward pass. All values are constants, so that no random number is drawn."""
        with torch.device("meta"):
            layer = build_layer(of.block, of.source).eval()
        layer = layer.to_empty(device=self.device).to(memory_format=torch.channels_last)
        for parameter in layer.parameters():
            parameter.fill_(0.01)
        image = torch.full((1, *of.source), 0.5, device=self.device).to(memory_format=torch.channels_last)

        def forward() -> None:
            layer(image)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return forward


@dataclass(frozen=True)
class Alignment:
    """A multiple, and why."""

    multiple_of: int
    ms: Mapping[int, float]
    """Of the layers of a drawn plan, by multiple; the mean over the plans."""
    timed: float
    """Share of their operations that was timed."""

    def document(self, runtime: str) -> dict[str, Any]:
        """The part of --json and plan.json that says so; `runtime` as a reader knows it."""
        ms = {str(multiple): time for multiple, time in self.ms.items()}
        return {"multiple_of": self.multiple_of, "ms": ms, "timed": self.timed, "runtime": runtime}


def words(document: Mapping[str, Any]) -> str:
    """One line on the choice."""
    names = {str(multiple): f"multiples of {multiple}" if multiple > 1 else "ragged" for multiple in MULTIPLES}
    times = ", ".join(f"{names[multiple]} {ms:.2f} ms" for multiple, ms in document["ms"].items())
    part = "" if document["timed"] > 0.995 else f" ({100 * document['timed']:.0f} % of their operations)"
    return (f"--multiple-of auto: {document['multiple_of']}; layers of random plans{part}: {times}; "
            f"{document['runtime']}; {DEFAULT} where nothing else is clearly faster")  # fmt: skip


def align(graph: ChannelGraph, policy: ChannelPolicy, size: Size, timer: Timer, seconds: float = SECONDS) -> Alignment:
    """Choose the multiple for a network.

    Args:
        graph: of the network.
        policy: whose candidates and floors hold; its `multiple_of` does not count.
        size: of the network input.
        timer: the runtime.
        seconds: when no further layer is timed; the largest one always is.
    """
    plans = draw(graph, policy, size)
    work = {site: count * site[0].operations for site, count in sum(plans, Counter()).items()}
    table = latency_table(work, timer, seconds)
    zero = np.zeros(len(MULTIPLES))
    ms = np.stack([sum((count * table[site] for site, count in plan.items() if site in table), zero) for plan in plans])
    timed = sum(work[site] for site in table) / sum(work.values())
    return Alignment(fastest(ms), dict(zip(MULTIPLES, ms.mean(0).tolist(), strict=True)), timed)


def fastest(ms: NDArray[np.float64]) -> int:
    """The multiple to take.

    Args:
        ms: [plans, multiples], the time of each plan.

    Returns:
        That of the shortest mean, if it is shorter than that of `DEFAULT` by more than `TIE` and no plan contradicts;
        else `DEFAULT`.
    """
    default, best = MULTIPLES.index(DEFAULT), int(ms.mean(0).argmin())
    sure = (ms[:, best] < ms[:, default]).all() and (1 + TIE) * ms[:, best].mean() < ms[:, default].mean()
    return MULTIPLES[best] if sure else DEFAULT


def latency_table(work: Mapping[Site, int], timer: Timer, seconds: float) -> dict[Site, NDArray[np.float64]]:
    """Milliseconds [multiples] of each layer, those with most operations first; of the others only if there is time.

    Args:
        work: operations of each, wherever the layer is used; their share is its share of the time.
        timer: the runtime.
        seconds: for all.
    """
    begin, rest, table = perf_counter(), sum(work.values()), {}
    for site in sorted(work, key=lambda site: -work[site]):
        left = seconds - (perf_counter() - begin)
        if table and left <= 0:
            break
        different = list(dict.fromkeys(site))
        times = dict(zip(different, timer(different, left * work[site] / rest), strict=True))
        table[site] = np.array([times[one] for one in site])
        rest -= work[site]
    return table


def draw(graph: ChannelGraph, policy: ChannelPolicy, size: Size) -> list[Counter[Site]]:
    """The layers of random plans, each as every multiple leaves it, and how often a plan has it.

    Families of layers with the same kernels and outputs keep the same share of their channels, so that the repeated
    units of a network are timed once.
    """
    layers = candidates(graph, policy.prune, policy.all_convs)
    families = families_of(graph, layers)
    alike = _alike(graph.network, families, size)
    scores = {layer: np.ones(len(graph.labels[layer])) for layer in layers}
    random, plans = np.random.default_rng(SEED), []
    for _ in range(DRAWS):
        gone = 1 - random.uniform(*KEPT, size=len(families))
        shares = {family: float(gone[place]) for family, place in zip(families, alike, strict=True)}
        rounded = (replace(policy, multiple_of=multiple) for multiple in MULTIPLES)
        networks = (compact_network(graph, Removal(keep_shares(graph, scores, shares, one))) for one in rounded)
        plans.append(Counter(zip(*(timed_layers(network, size) for network in networks), strict=True)))
    return plans


def _alike(network: Network, families: Sequence[Family], size: Size) -> list[int]:
    """For each family the place of the first one whose layers have the same kernels and outputs."""
    shapes = trace(network, *size)
    kinds = [frozenset((network.blocks[layer].size, shapes[layer]) for layer in family) for family in families]
    return [kinds.index(kind) for kind in kinds]


def timed_layers(network: Network, size: Size) -> Iterator[Layer]:
    """The convolutions and max poolings of a network, in order, as they run."""
    shapes = (Shape(network.net.channels, *size), *trace(network, *size))
    costs = block_costs(network, *size)
    for block, source, cost in zip(network.blocks, shapes, costs, strict=False):
        if isinstance(block, Convolutional | Depthwise):
            folded = replace(as_convolutional(block, source.channels), batch_normalize=False, bias=True)
            yield Layer(folded, source, cost.flops)
        elif isinstance(block, Maxpool):
            yield Layer(block, source, cost.flops)
