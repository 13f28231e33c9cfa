"""Where tensors live, and how memory is taken from the system and given back."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from utils.errors import InputError

if TYPE_CHECKING:
    import torch

AMP = ("auto", "bf16", "fp16", "off")
"""What --amp may say."""
DEVICES = re.compile(r"cpu|cuda|(cuda:)?[0-9]{1,3}|")
SEVERAL = re.compile(r"[0-9]{1,3}(,[0-9]{1,3})+")
ALLOWED = "allowed are cpu, cuda, and the number of one GPU, as 1 or cuda:1"

LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Lets PyTorch ask for pages of 2 MiB; read when torch allocates first."""
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let what is freed stay with the process for the next allocation, and come in large pages.

    glibc gives blocks of more than 32 MiB back to the system at once, and the next feature map of a training step pays
    for all its pages anew: a sixth to a quarter of the step. What is kept makes the peak a fifth to a third higher
    (`python -m benchmarks.ratios memory`). To be called before torch allocates. Whoever has set up glibc's allocator by
    its environment variables (MALLOC_*, GLIBC_TUNABLES) is not overruled.

    Returns:
        Whether it was done: with glibc only.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    os.environ.setdefault(LARGE_PAGES, "1")
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))


def why_no_device(text: str) -> str:
    """Reason why `--device` cannot say this; empty if it can. Whether the machine has the device is not looked at."""
    if DEVICES.fullmatch(text):
        return ""
    numbers = text.replace("cuda:", "")
    if SEVERAL.fullmatch(numbers):
        count = numbers.count(",") + 1
        return (
            f"{text!r} is several GPUs, and a process has one; train.py takes them as "
            f"CUDA_VISIBLE_DEVICES={numbers} torchrun --nproc-per-node {count} train.py …, without --device"
        )
    return f"{text!r} is not a device; {ALLOWED}"


def named_device(text: str) -> torch.device:
    """Device that `--device` names: "" (a GPU if there is one), "cpu", "cuda" (the first GPU), or a GPU's number.

    Raises:
        InputError: no such device.
    """
    import torch

    if reason := why_no_device(text):
        raise InputError(f"--device: {reason}")
    gpus = torch.cuda.device_count()
    if text == "cpu" or (text == "" and gpus == 0):
        return torch.device("cpu")
    index = 0 if text in ("", "cuda") else int(text.removeprefix("cuda:"))
    if index >= gpus:
        raise InputError(f"--device {text}: this machine has {gpus} GPUs that PyTorch can use; --device cpu works")
    return torch.device("cuda", index)


def select_device(text: str) -> torch.device:
    """Device that `--device` names, to be worked on: a GPU becomes PyTorch's current one, and computes float32 in full.

    Raises:
        InputError: no such device.
    """
    import torch

    device = named_device(text)
    if device.type == "cuda":  # or pinned memory and whatever takes no device would make a context on the first GPU
        torch.cuda.set_device(device)
        # Else cuDNN rounds what float32 convolutions read to 11 bits: not the heads and grids of evaluations and files.
        torch.backends.cudnn.allow_tf32 = False
    return device


def training_type(amp: str, device: torch.device) -> torch.dtype | None:
    """Type of 16 bits that the network of a training computes in, by --amp; None: float32.

    A CPU computes in bfloat16 only with --amp bf16: it is faster with AMX or AVX512-BF16, and slower without. `fp16`
    is for GPUs; on a CPU it means float32 without a warning, so that a run of a GPU can be resumed there.

    Raises:
        InputError: the GPU has no bfloat16 and `amp` is "bf16".
    """
    import torch

    if amp == "off" or device.type != "cuda":
        return torch.bfloat16 if amp == "bf16" and device.type == "cpu" else None
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not native:
        raise InputError("--amp bf16: this GPU has no bfloat16; --amp fp16 and --amp off work")
    return torch.bfloat16 if native and amp != "fp16" else torch.float16


@lru_cache(maxsize=1024)
def constant(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of a tuple of numbers, or of such tuples; it is kept and must not be changed.

    A copy from memory that is not pinned, as of `torch.tensor(values, device=…)`, waits for a GPU.
    """
    import torch

    with torch.inference_mode(False):  # a training may need what an evaluation made
        return torch.tensor(values, dtype=dtype, device=device)


def uploaded(tensors: Iterable[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the CPU on a device; a GPU copies them from pinned memory, so that nothing waits."""
    if device.type == "cpu":
        return list(tensors)
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
