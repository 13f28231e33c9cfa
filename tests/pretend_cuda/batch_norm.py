"""The kernels of torch.nn.SyncBatchNorm, which PyTorch has for GPUs only. Statistics are float32, [C]."""

from __future__ import annotations

import torch
from torch import Tensor


def install() -> torch.library.Library:
    """Register the kernels for the device; they stay as long as what is returned."""
    library = torch.library.Library("aten", "IMPL")
    for kernel in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):
        library.impl(kernel.__name__, kernel, "CUDA", allow_override=True)
    return library


def _rows(x: Tensor) -> Tensor:
    """[N, C, …] as float32 [N · …, C]."""
    return x.float().movedim(1, -1).flatten(0, -2)


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """[N · …, C] in shape and type of x."""
    return rows.view(x.movedim(1, -1).shape).movedim(-1, 1).to(x.dtype)


def _gain(invstd: Tensor, weight: Tensor | None) -> Tensor:
    return invstd if weight is None else invstd * weight


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / √(σ² + ε) of this process."""
    variance, mean = torch.var_mean(_rows(x), 0, correction=0)
    return mean, torch.rsqrt(variance + eps)


def batch_norm_gather_stats_with_counts(x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    """Mean and 1 / √(σ² + ε) of all processes; moves the running statistics."""
    share = (counts / counts.sum()).view(-1, 1)
    total_mean = (share * mean).sum(0)
    variance = (share * (invstd**-2 - eps + (mean - total_mean) ** 2)).sum(0)
    running_mean.lerp_(total_mean, momentum)
    running_var.lerp_(variance * (counts.sum() / (counts.sum() - 1)), momentum)
    return total_mean, torch.rsqrt(variance + eps)


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    """The normalised x."""
    return _like((_rows(x) - mean) * _gain(invstd, weight) + (0 if bias is None else bias), x)


def batch_norm_backward_reduce(grad, x, mean, invstd, weight, input_g, weight_g, bias_g):
    """Σ dy and Σ dy (x − μ) of this process; gradients of γ and β."""
    dy = _rows(grad)
    sum_dy, sum_dy_xmu = dy.sum(0), (dy * (_rows(x) - mean)).sum(0)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def batch_norm_backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    """Gradient of x from the sums of all processes."""
    centred = (_rows(x) - mean) * invstd**2 * (sum_dy_xmu / counts.sum())
    return _like((_rows(grad) - sum_dy / counts.sum() - centred) * _gain(invstd, weight), x)
