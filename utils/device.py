"""Where tensors live."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from utils.errors import InputError

if TYPE_CHECKING:
    import torch

AMP = ("auto", "bf16", "fp16", "off")
"""What --amp may say."""
DEVICES = re.compile(r"cpu|cuda|[0-9]{1,3}|")
ALLOWED = "allowed are cpu, cuda and the number of one GPU"


def select_device(text: str) -> torch.device:
    """The device that `--device` names: "" (a GPU if there is one), "cpu", "cuda" (the first GPU), or a GPU's number.

    Raises:
        InputError: no such device.
    """
    import torch

    if not DEVICES.fullmatch(text):
        raise InputError(f"--device {text}: {ALLOWED}")
    gpus = torch.cuda.device_count()
    if text == "cpu" or (text == "" and gpus == 0):
        return torch.device("cpu")
    if text in ("", "cuda") and gpus:
        return torch.device("cuda", 0)
    if text == "cuda" or int(text) >= gpus:
        raise InputError(f"--device {text}: this machine has {gpus} GPUs that PyTorch can use; --device cpu works")
    return torch.device("cuda", int(text))


def training_type(amp: str, device: torch.device) -> torch.dtype | None:
    """Type of 16 bits that the network of a training computes in, by --amp; None: float32, as always on a CPU.

    Raises:
        InputError: the GPU has no bfloat16 and `amp` is "bf16".
    """
    import torch

    if amp == "off" or device.type != "cuda":
        return None
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not native:
        raise InputError("--amp bf16: this GPU has no bfloat16; --amp fp16 and --amp off work")
    return torch.bfloat16 if native and amp != "fp16" else torch.float16
