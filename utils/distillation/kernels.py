"""Pieces of the terms whose gradient is written by hand.

Autograd finds the same gradients, but with several more tensors of the size of a head or a feature, some of them in
another memory format, which slows what comes after. `python -m benchmarks.distil` measures it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Columns(NamedTuple):
    """Views of raw outputs [B, A, H, W, 5 + C] of a head."""

    boxes: Tensor
    """[B, A, H, W, 4]."""
    objectness: Tensor
    """[B, A, H, W, 1]."""
    classes: Tensor
    """[B, A, H, W, C]."""
    scores: Tensor
    """Objectness and classes, [B, A, H, W, 1 + C]."""


def columns(values: Tensor) -> Columns:
    """Raw outputs [B, A, H, W, 5 + C] apart; not to be changed in place."""
    return Columns(*_Columns.apply(values))


def energy(features: Tensor) -> Tensor:
    """Σ_c F_c² of features [B, C, H, W], as [B, H, W]."""
    return _Energy.apply(features)


def softmax_kl(student: Tensor, teacher: Tensor, t: float, dim: int = -1) -> Tensor:
    """KL(softmax(z^t / T) ‖ softmax(z^s / T)) over a dimension, which goes."""
    return _SoftmaxKL.apply(student, teacher, t, dim)


def binary_kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """Σ KL(σ(z^t / T) ‖ σ(z^s / T)) over the last dimension, [..., C] to [...].

    That is the cross-entropy with soft targets, less what no student can avoid.
    """
    return _BinaryKL.apply(student, teacher, t)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.values = values.detach()
        return values[..., :4], values[..., 4:5], values[..., 5:], values[..., 4:]

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> Tensor:
        """The gradient in the memory format of the values."""
        gradient = torch.zeros_like(ctx.values)
        places = Columns(gradient[..., :4], gradient[..., 4:5], gradient[..., 5:], gradient[..., 4:])
        for place, part in zip(places, parts, strict=True):
            if part is not None:
                place += part
        return gradient


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return torch.linalg.vector_norm(features, dim=1).square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """2 F_c in the memory format of F."""
        (features,) = ctx.saved_tensors
        return features * (2 * gradient)[:, None]


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, t: float, dim: int) -> Tensor:
        log_s, log_t = (F.log_softmax(_over(logits, t), dim=dim) for logits in (student, teacher))
        wanted = log_t.exp()
        value = log_t.sub_(log_s).mul_(wanted).sum(dim=dim)
        ctx.t, ctx.dim = t, dim
        ctx.save_for_backward(log_s.exp_().sub_(wanted))
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """(softmax(z^s / T) − softmax(z^t / T)) / T."""
        (excess,) = ctx.saved_tensors
        return excess * (gradient / ctx.t).unsqueeze(ctx.dim), None, None, None


class _BinaryKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, t: float) -> Tensor:
        mine, theirs = _over(student, t), _over(teacher, t)
        wanted = theirs.sigmoid()
        value = F.softplus(mine).sub_(F.softplus(theirs)).addcmul_(wanted, mine - theirs, value=-1)
        ctx.t = t
        ctx.save_for_backward(mine.sigmoid().sub_(wanted))
        return value.sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """(σ(z^s / T) − σ(z^t / T)) / T."""
        (excess,) = ctx.saved_tensors
        return excess * (gradient / ctx.t)[..., None], None, None


def _over(logits: Tensor, t: float) -> Tensor:
    return logits if t == 1 else logits / t
