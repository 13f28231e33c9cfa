"""Pieces of the terms whose gradient is written by hand.

Autograd finds the same gradients, but with several more tensors of the size of a head or a feature, some of them in
another memory format, which slows what comes after. `python -m benchmarks.distil` measures it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED = 1 << 18
"""Numbers that a cache holds several times."""
LEAST_NORM = 1e-12
"""Keeps the norm of an empty attention map from dividing by 0."""


class Columns(NamedTuple):
    """Raw outputs [B, A, H, W, 5 + C] of a head apart: views, but for the objectness, which is dense."""

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


def magnitude(features: Tensor) -> Tensor:
    """Σ_c |F_c| of features [B, C, H, W], as [B, H, W]."""
    return _Magnitude.apply(features)


def attention_distance(student: Tensor, teacher: Tensor, near: Tensor | None = None) -> Tensor:
    """Σ ‖ A^s / ‖A^s‖ − A^t / ‖A^t‖ ‖² over pictures, of attention maps [B, H, W].

    Args:
        student: maps, whose gradient is taken.
        teacher: maps without a gradient.
        near: bool [B, H, W], where A counts; elsewhere it is 0. None: everywhere.
    """
    return _AttentionDistance.apply(student, teacher, near)


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
        return values[..., :4], values[..., 4:5].contiguous(), values[..., 5:], values[..., 4:]

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> Tensor:
        """The gradient in the memory format of the values."""
        gradient = torch.empty_like(ctx.values)
        places = gradient[..., :4], gradient[..., 4:5], gradient[..., 5:]
        *parts, scores = parts
        for place, part in zip(places, parts, strict=True):
            place.zero_() if part is None else place.copy_(part)
        if scores is not None:
            gradient[..., 4:] += scores
        return gradient


class _Magnitude(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return torch.stack([picture.abs().sum(dim=0) for picture in features])  # a picture fits the cache

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """sgn(F_c), in the memory format of F."""
        (features,) = ctx.saved_tensors
        return features.sign().mul_(gradient[:, None])


class _AttentionDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, near: Tensor | None) -> Tensor:
        (mine, norm), (theirs, _) = (_unit(maps, near) for maps in (student, teacher))
        apart = mine - theirs
        value = apart.square().sum()
        along = (mine * apart).sum(dim=(1, 2), keepdim=True)
        ctx.save_for_backward(apart.addcmul_(mine, along, value=-1).mul_(2 / norm))
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """With u = A / ‖A‖ and d = u^s − u^t: 2 (d − u^s (u^s · d)) / ‖A^s‖; 0 where both maps are."""
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None


def _unit(maps: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor]:
    """A / ‖A‖ [B, H, W] and ‖A‖ [B, 1, 1]."""
    if near is not None:
        maps = torch.where(near, maps, 0.0)
    norm = torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True).clamp_(min=LEAST_NORM)
    return maps / norm, norm


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, t: float, dim: int) -> Tensor:
        excess, values = torch.empty_like(student), []
        for mine, theirs, difference in zip(*map(_parts, (student, teacher, excess)), strict=True):
            log_s, log_t = (F.log_softmax(_over(logits, t), dim=dim) for logits in (mine, theirs))
            wanted = log_t.exp()
            values.append(log_t.sub_(log_s).mul_(wanted).sum(dim=dim))
            torch.sub(log_s.exp_(), wanted, out=difference)
        ctx.t, ctx.dim = t, dim
        ctx.save_for_backward(excess)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """(softmax(z^s / T) − softmax(z^t / T)) / T."""
        (excess,) = ctx.saved_tensors
        return excess * (gradient / ctx.t).unsqueeze(ctx.dim), None, None, None


class _BinaryKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, t: float) -> Tensor:
        excess, values = torch.empty_like(student), []
        for mine, theirs, difference in zip(*map(_parts, (student, teacher, excess)), strict=True):
            mine, theirs = _over(mine, t), _over(theirs, t)
            found, wanted = mine.sigmoid(), theirs.sigmoid()
            value = mine.clamp(min=0).sub_(theirs.clamp(min=0)).addcmul_(wanted, mine - theirs, value=-1)
            value += _larger(wanted).div_(_larger(found)).log_()
            values.append(value.sum(dim=-1))
            torch.sub(found, wanted, out=difference)
        ctx.t = t
        ctx.save_for_backward(excess)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """(σ(z^s / T) − σ(z^t / T)) / T."""
        (excess,) = ctx.saved_tensors
        return excess * (gradient / ctx.t)[..., None], None, None


def _larger(probability: Tensor) -> Tensor:
    """σ(|z|) of σ(z). With it log(1 + e^z) is max(z, 0) − log σ(|z|), in half the time of a softplus."""
    return torch.maximum(probability, 1 - probability)


def _parts(values: Tensor) -> tuple[Tensor, ...]:
    """A few pictures at a time on a CPU, whose cache then holds what is computed on the way; elsewhere all at once."""
    return values.split(max(1, CACHED // values[0].numel())) if values.device.type == "cpu" else (values,)


def _over(logits: Tensor, t: float) -> Tensor:
    return logits if t == 1 else logits / t
