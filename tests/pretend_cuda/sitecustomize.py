"""Every Python process with this folder on PYTHONPATH finds pretend GPUs: install() runs when torch is imported.

    PYTHONPATH=tests/pretend_cuda PRETEND_CUDA=libpretend.so python train.py --device 0 …

PRETEND_CUDA names the library that test_cuda.py compiles from device.cpp, where a comment says what is replaced, what
is refused, and what cannot be shown. There are two devices of 16 GiB, which they share; `torch.cuda.pretend` changes
that, and has the device's counts. PRETEND_MEMORY=BYTES,BYTES changes it for processes that torchrun starts.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.util
import os
import sys
from types import SimpleNamespace

DEVICES = 2
NAME = "pretend GPU"
COUNTS = ("kernels", "waits", "pageable", "pinnings")
BYTES = ("held", "reserved", "memory")
MEMORY = ",".join(DEVICES * [str(1 << 34)])


def install() -> None:
    """Make torch believe that this machine has GPUs; a process cannot undo it."""
    import batch_norm
    import torch
    import torchvision  # noqa: F401  its operators are replaced, too

    library = ctypes.CDLL(os.environ["PRETEND_CUDA"])
    counters = {name: getattr(library, f"pretend_{name}") for name in (*COUNTS, *BYTES)}
    for counter in counters.values():
        counter.restype = ctypes.c_long
    memory, reserved = counters["memory"], counters["reserved"]
    library.pretend_limit.argtypes = [ctypes.c_long]
    sizes = os.environ.get("PRETEND_MEMORY", MEMORY).split(",")
    library.pretend_limit(int(sizes[int(os.environ.get("LOCAL_RANK", 0))]))
    library.pretend_install(DEVICES)

    def index(device: object) -> int:
        number = device if isinstance(device, int) else None if device is None else torch.device(device).index
        return library.pretend_get_device() if number is None else number

    facts = {
        "is_available": True,
        "is_initialized": True,
        "device_count": DEVICES,
        "get_device_name": NAME,
        **dict.fromkeys(("_is_in_bad_fork", "is_current_stream_capturing"), False),
        **dict.fromkeys(("_lazy_init", "init", "synchronize", "manual_seed_all", "set_rng_state"), None),
        "get_rng_state": torch.empty(0),
    }
    for function, value in facts.items():
        setattr(torch.cuda, function, lambda *_, value=value, **__: value)
    torch.cuda.pretend = SimpleNamespace(
        library=library,
        capability=(8, 0),
        batch_norm=batch_norm.install(),
        counts=lambda: {name: counters[name]() for name in COUNTS},
    )
    torch.cuda.is_bf16_supported = lambda including_emulation=True: (
        including_emulation or torch.cuda.pretend.capability >= (8, 0)
    )
    torch.cuda.mem_get_info = lambda _: (memory() - reserved(), memory())
    torch.cuda.empty_cache = library.pretend_release
    torch.cuda.current_device = library.pretend_get_device
    torch.cuda.set_device = lambda device: library.pretend_set_device(index(device))
    torch._C._cuda_getDeviceCount = lambda: DEVICES
    torch.backends.cudnn.enabled = False

    plain_clone = torch.UntypedStorage.clone

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:  # torch's own asks CUDA's allocator
        if storage.device.type != "cuda":
            return plain_clone(storage)
        bytes_ = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device)
        return bytes_.untyped_storage().copy_(storage)

    torch.UntypedStorage.clone = clone
    if "WORLD_SIZE" in os.environ:
        _replace_nccl()


def _replace_nccl() -> None:
    """Let gloo take NCCL's place; it copies tensors to the CPU's memory and back."""
    import torch.distributed as dist

    plain = dist.init_process_group

    def init_process_group(backend: str | None = None, **options: object) -> None:
        plain("gloo" if backend == "nccl" else backend, **options)

    dist.init_process_group = init_process_group


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch where it is, and lets install() follow its import."""

    def find_spec(self, name: str, path: object, target: object = None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        load = spec.loader.exec_module

        def load_and_install(module: object) -> None:
            load(module)
            install()

        spec.loader.exec_module = load_and_install
        return spec


if "PRETEND_CUDA" in os.environ:
    sys.meta_path.insert(0, _AfterTorch())
