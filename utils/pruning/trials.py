"""Networks that are made and measured on the way to the one that is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models import Darknet
from utils.errors import InputError
from utils.graph import ChannelGraph
from utils.pruning.constants import absorb
from utils.pruning.measure import Bench, Clock, make_bench, training_batches
from utils.pruning.plan import Size
from utils.pruning.recalibrate import recalibrate
from utils.pruning.removal import Removal
from utils.pruning.request import PruneRequest
from utils.pruning.surgery import Arrays, Compacted, compact


@dataclass(frozen=True, eq=False)
class Trials:
    """What the networks that a request might lead to find and need."""

    asked: PruneRequest
    graph: ChannelGraph
    arrays: Arrays
    size: Size
    device: torch.device
    pictures: int | None = None
    """Valid pictures that are looked at, the first ones; None: all."""

    @cached_property
    def bench(self) -> Bench:
        """The validation pictures."""
        return make_bench(self.asked, self.graph.network, self.size, self.device, self.pictures)

    @cached_property
    def batches(self) -> list[Tensor]:
        """The pictures for new batch statistics."""
        return list(training_batches(self.asked, self.graph.network, self.size, self.device)[0])

    @cached_property
    def original(self) -> Darknet:
        """The network before, to be run."""
        return Clock(self.device, self.size).model(self.graph.network, self.arrays)

    @cached_property
    def map50(self) -> float:
        """AP50 of the network before.

        Raises:
            InputError: it finds nothing, so that nothing can be lost.
        """
        found = self.bench.accuracy("original", self.original)[0].map50
        if found == 0:
            raise InputError(f"{self.asked.files.weights}: finds nothing in {self.asked.data.valid}; its AP50 is 0")
        return found

    def cut(self, removal: Removal) -> Compacted:
        """The network that would be written."""
        absorbed = absorb(self.graph, self.arrays, removal) if self.asked.absorb else self.arrays
        network, arrays = compact(self.graph, absorbed, removal)
        return Compacted(network, recalibrate(network, arrays, self.batches, self.device) if self.asked.recalibrate
                         else arrays)  # fmt: skip

    def drop(self, name: str, removal: Removal) -> float:
        """Points of AP50 that the network which would be written has lost; `name` for the progress."""
        before = self.map50
        return 100 * (before - self.bench.accuracy(name, self.bench.model(*self.cut(removal)))[0].map50)

    def time_share(self, removal: Removal, **pace: int) -> float:
        """Median time of what is left, as a share of that of the network before; both run in turn."""
        clock = Clock(self.device, self.size)
        times = clock.latency({"before": self.original, "after": clock.model(*self.cut(removal))}, **pace)
        return times["after"].median / times["before"].median
