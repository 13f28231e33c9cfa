"""Pieces of the terms whose gradient is written by hand.

Autograd finds the same gradients, but with several more tensors of the size of a head or a feature, some of them in
another memory format, which slows what comes after. `python -m benchmarks.distil` measures it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1e-12
"""Keeps the norm of an empty attention map from dividing by 0."""


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


def strength(features: Tensor, p: int) -> Tensor:
    """Σ_c |F_c|^p of features [B, C, H, W], as [B, H, W], for p = 1 or 2."""
    return _Strength.apply(features, p)


def attention_distance(student: Tensor, teacher: Tensor, near: Tensor | None = None) -> Tensor:
    """Σ ‖ A^s / ‖A^s‖ − A^t / ‖A^t‖ ‖² over pictures, A = mean_c F_c² of features [B, C, H, W].

    Args:
        student: features, whose gradient is taken.
        teacher: features without a gradient, with the same cells; their channels may be others.
        near: bool [B, H, W], where A counts; None: everywhere.
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
        return values[..., :4], values[..., 4:5], values[..., 5:], values[..., 4:]

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


class _Strength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, p: int) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(features)
        if p == 1:  # a picture fits the cache
            return torch.stack([picture.abs().sum(dim=0) for picture in features])
        return torch.linalg.vector_norm(features, dim=1).square_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """sgn(F_c) or 2 F_c, in the memory format of F."""
        (features,) = ctx.saved_tensors
        if ctx.p == 1:
            return features.sign().mul_(gradient[:, None]), None
        return features * (2 * gradient)[:, None], None


class _AttentionDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, near: Tensor | None) -> Tensor:
        (mine, norm), (theirs, _) = (_unit_map(features, near) for features in (student, teacher))
        apart = mine - theirs
        value = apart.square().sum()
        along = (mine * apart).sum(dim=(1, 2), keepdim=True)
        slope = apart.addcmul_(mine, along, value=-1).mul_(4 / (student.shape[1] * norm))
        ctx.save_for_backward(student, slope if near is None else slope * near)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """With u = A / ‖A‖ and d = u^s − u^t: 4 F_c (d − u^s (u^s · d)) / (C ‖A^s‖), in the memory format of F."""
        student, slope = ctx.saved_tensors
        return student * (gradient * slope)[:, None], None, None


def _unit_map(features: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor]:
    """A / ‖A‖ [B, H, W] and ‖A‖ [B, 1, 1]."""
    attention = torch.linalg.vector_norm(features, dim=1).square_().div_(features.shape[1])
    if near is not None:
        attention *= near
    norm = torch.linalg.vector_norm(attention, dim=(1, 2), keepdim=True).clamp_(min=SMALL)
    return attention.div_(norm), norm


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
            wanted = theirs.sigmoid()
            value = F.softplus(mine).sub_(F.softplus(theirs)).addcmul_(wanted, mine - theirs, value=-1)
            values.append(value.sum(dim=-1))
            torch.sub(mine.sigmoid(), wanted, out=difference)
        ctx.t = t
        ctx.save_for_backward(excess)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """(σ(z^s / T) − σ(z^t / T)) / T."""
        (excess,) = ctx.saved_tensors
        return excess * (gradient / ctx.t)[..., None], None, None


def _parts(values: Tensor) -> tuple[Tensor, ...]:
    """Pictures one at a time on a CPU, whose cache then holds what is computed on the way; elsewhere all at once."""
    return values.split(1) if values.device.type == "cpu" else (values,)


def _over(logits: Tensor, t: float) -> Tensor:
    return logits if t == 1 else logits / t
