"""Networks that are made and measured on the way to the one that is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import Darknet
from utils.cli import log
from utils.darknet.blocks import Network
from utils.data.augment import Augmentation
from utils.detection.evaluate import network_input
from utils.detection.settings import LossSettings
from utils.errors import InputError
from utils.graph import ChannelGraph
from utils.pruning.constants import absorb
from utils.pruning.importance import taylor
from utils.pruning.measure import Bench, Clock, make_bench, training_batches
from utils.pruning.plan import Size, gammas_of
from utils.pruning.policy import Importance
from utils.pruning.reconstruct import most_pictures, reconstruct
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
    hyp: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters that the network was trained with; the defaults where they are not known."""

    @cached_property
    def bench(self) -> Bench:
        """The validation pictures."""
        return make_bench(self.asked, self.graph.network, self.size, self.device)

    @cached_property
    def fitted(self) -> list[Tensor]:
        """The training pictures of --reconstruct, in batches [B, C, H, W]."""
        asked, network = self.asked, self.graph.network
        most = min(asked.reconstruct, most_pictures(network, self.size))
        batches = training_batches(asked, network, self.size, self.device, None, math.ceil(most / asked.batch_size))
        images = [network_input(batch.images, self.device) for batch in batches]
        found = list(torch.cat(images)[:most].split(asked.batch_size))
        if (count := sum(map(len, found))) < asked.reconstruct:
            why = "more would not fit into memory" if count == most else "there are no more"
            log(f"--reconstruct {asked.reconstruct}: {count} pictures are used; {why}")
        return [batch.contiguous(memory_format=torch.channels_last) for batch in found]

    def importance(self, network: Network, arrays: Arrays) -> Importance:
        """Importance of a network's channels and residual units, as the request computes it."""
        if self.asked.importance == "gamma":
            return {i: np.abs(gamma) for i, gamma in gammas_of(network, arrays).items()}
        augment, loss = (_chosen(kind, self.hyp) for kind in (Augmentation, LossSettings))
        asked = self.asked
        batches = training_batches(asked, network, self.size, self.device, augment, asked.importance_batches)
        return taylor(network, arrays, batches, loss, self.device)

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

    def compensated(self, removal: Removal) -> Arrays:
        """The tensors of the network before, in which readers make up for what goes."""
        if self.asked.reconstruct and not removal.nothing:
            return reconstruct(self.graph, self.arrays, removal, self.fitted, self.device, self.asked.seed)
        return absorb(self.graph, self.arrays, removal) if self.asked.absorb else self.arrays

    def cut(self, removal: Removal) -> Compacted:
        """The network that would be written."""
        return compact(self.graph, self.compensated(removal), removal)

    def drop(self, name: str, removal: Removal) -> float:
        """Points of AP50 that the network which would be written has lost; `name` for the progress."""
        before = self.map50
        return 100 * (before - self.bench.accuracy(name, self.bench.model(*self.cut(removal)))[0].map50)

    def time_share(self, removal: Removal, **pace: int) -> float:
        """Median time of what is left, as a share of that of the network before; both run in turn."""
        clock = Clock(self.device, self.size)
        left = clock.model(*compact(self.graph, self.arrays, removal))
        times = clock.latency({"before": self.original, "after": left}, **pace)
        return times["after"].median / times["before"].median


def _chosen(kind: type, hyp: Mapping[str, Any]) -> Any:
    """Settings with those values of a hyper-parameter file that are theirs."""
    return kind(**{field.name: hyp[field.name] for field in dataclasses.fields(kind) if field.name in hyp})
