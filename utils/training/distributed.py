"""Processes that train one model together, started by torchrun, what they exchange beside gradients, and signals.

A process on its own is a team of one, and every exchange returns its own value.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.cli import SIGNALS, processes
from utils.device import select_device
from utils.errors import InputError

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
PATIENCE = timedelta(hours=2)
"""How long a process waits for the others before it takes one for lost (one that ends is noticed at once, by torchrun).

They share training and evaluation, so the longest that they wait for is what the first one does alone: it decodes all
pictures for `--cache`. COCO's 118 000 take 20 minutes at 100 a second, and some disks are slower than that.
"""


@dataclass(frozen=True)
class Team:
    """One process among `size`; the first, rank 0, writes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sum over the processes of each value."""
        if self.size == 1:
            return list(values)
        return self.summed(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        return self.total(float(flag))[0] > 0

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the processes of each value on the device, which is changed; a GPU is not waited for."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def positives(self, count: float | Tensor) -> Tensor:
        """What a process divides its sums by, so that the mean of all gradients is that of one batch of all pictures.

        With W processes and P positives in all of them this is max(1, P) / W.
        """
        total = self.summed(torch.zeros((), dtype=torch.float64, device=self.device) + count)
        return total.clamp_(min=1) / self.size

    def share(self, value: T) -> T:
        """The value that the first process gave."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def share_model(self, model: Model | None) -> Model:
        """The model that the first process gave, with its buffers, on the device of each."""
        if self.size > 1:
            model = self.share(model.cpu() if model is not None and self.leads else None)
        assert model is not None  # the first process has one
        return model.to(self.device).to(memory_format=torch.channels_last)

    def gather(self, value: T) -> list[T]:
        """What each process gave, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The first process runs the block before the others, which find what it has cached."""
        if not self.leads:
            self.total(0)
        yield
        if self.leads:
            self.total(0)

    def parallel(self, model: nn.Module, *, buffers: bool = False) -> nn.Module:
        """The model, with gradients averaged over the processes after every backward pass.

        Args:
            model: on the team's device.
            buffers: each optimizer step begins with the first process's buffers in all of them. Needed where a forward
                pass in training reads them; running statistics are only written, so each process keeps its own.
        """
        if self.size == 1:
            return model
        parallel = DistributedDataParallel(model)  # with `device_ids` it would move labels to the GPU
        parallel.broadcast_buffers = buffers  # the argument of this name warns in newer versions, and has no other yet
        return parallel

    def synchronised(self, model: nn.Module) -> nn.Module:
        """The model, changed: its batch normalisations use the pictures of all processes. Its tensors keep their keys.

        Raises:
            InputError: they are on the CPU.
        """
        if self.device.type != "cuda":
            raise InputError("--sync-bn: PyTorch's SyncBatchNorm works on GPUs only; leave it out")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def unsynchronised(self, model: nn.Module, accumulates: bool) -> AbstractContextManager[None]:
        """A context for a batch that only accumulates gradients; the last batch of a step exchanges them."""
        return model.no_sync() if accumulates and isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team that torchrun's environment tells of (RANK, WORLD_SIZE, LOCAL_RANK); without it, a team of one.

    Args:
        device: of `--device`; with GPUs each process takes the one of its local rank.

    Raises:
        InputError: a machine has fewer GPUs than processes, or `device` names one GPU for all of them.
    """
    size = processes()
    if size == 1:
        yield Team(select_device(device))
        return
    local, rank = int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"])
    if device not in ("", "cpu", "cuda"):
        raise InputError(f"--device {device}: with torchrun each process takes a GPU of its own; leave it out")
    gpus = torch.cuda.device_count()
    if device != "cpu" and local >= gpus and (gpus or device):
        raise InputError(
            f"torchrun: {gpus} GPUs for process {local} of this machine; lower --nproc-per-node, or add --device cpu"
        )
    chosen = select_device(str(local) if device != "cpu" and gpus else "cpu")
    importlib.import_module("torch.distributed.nn.functional")  # imported later, its defaults keep the group for ever
    gpu = chosen if chosen.type == "cuda" else None
    # With its GPU named, the group is connected here and not in the first exchange, and a wrong one shows at once.
    dist.init_process_group("gloo" if gpu is None else "nccl", timeout=PATIENCE, device_id=gpu)
    try:
        yield Team(chosen, rank, size)
    finally:
        dist.destroy_process_group()
        gc.collect()  # the last reference ends the group's threads, which must not outlive the interpreter


class StopRequest:
    """Context in which the first signal is only noted; a second one does at once what it did before.

    `signal` is the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
