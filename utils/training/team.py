"""Processes that train one model together, started by torchrun, and the little they tell each other beside gradients.

A process on its own is a team of one, and every exchange returns what was given.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.device import select_device
from utils.errors import InputError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, e.g. while the first one evaluates."""


@dataclass(frozen=True)
class Team:
    """One process among `size`; the first, rank 0, evaluates and writes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process evaluates and writes."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sum over the processes of each value."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        return [count > 0 for count in self.total(*map(float, flags))]

    def positives(self, count: float) -> float:
        """What a process divides its sums by, so that the mean of all gradients is that of one batch of all pictures.

        With W processes and P positives in all of them this is max(1, P) / W.
        """
        return max(1.0, self.total(count)[0]) / self.size

    def share(self, text: str) -> str:
        """The text that the first process gave."""
        if self.size == 1:
            return text
        data = text.encode("utf-8", "surrogateescape")
        length = torch.tensor([len(data)], device=self.device)
        dist.broadcast(length, 0)
        buffer = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.leads:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, 0)
        return bytes(buffer.tolist()).decode("utf-8", "surrogateescape")

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The first process runs the block before the others, which find what it has cached."""
        if not self.leads:
            self.total(0)
        yield
        if self.leads:
            self.total(0)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, with gradients averaged over the processes after every backward pass."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def unsynchronised(self, model: nn.Module, alone: bool) -> AbstractContextManager[None]:
        """A context for a batch whose gradient is only added up (`alone`); the last of a step exchanges them."""
        return model.no_sync() if alone and self.size > 1 else nullcontext()


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team that torchrun's environment tells of (RANK, WORLD_SIZE, LOCAL_RANK); without it, a team of one.

    Args:
        device: of `--device`; with GPUs each process takes the one of its local rank.

    Raises:
        InputError: a machine has fewer GPUs than processes, or `device` names one GPU for all of them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(select_device(device))
        return
    local, rank = int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"])
    if device not in ("", "cpu", "cuda"):
        raise InputError(f"--device {device}: with torchrun each process takes a GPU of its own; leave it out")
    chosen = select_device(device)
    if chosen.type == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"torchrun: {torch.cuda.device_count()} GPUs for process {local} of this machine; lower "
                             "--nproc-per-node, or add --device cpu")  # fmt: skip
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    importlib.import_module("torch.distributed.nn.functional")  # imported later, its defaults keep the group for ever
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(chosen, rank, size)
    finally:
        dist.destroy_process_group()
        gc.collect()  # the last reference ends the group's threads, which must not outlive the interpreter
