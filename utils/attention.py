"""Where a feature is strong: its spatial attention map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attended(features: Tensor, fresh: bool = False) -> tuple[Tensor, Tensor]:
    """The features [B, C, H, W], to go on with, and their map Σ_c F_c² [B, H, W], in float32 at least.

    The map is F_sum with p = 2 of Zagoruyko & Komodakis (arXiv:1612.03928, section 3.1). Its gradient joins that of the
    features in one pass, while both are at hand; a map that is taken later costs several over memory.

    Args:
        features: F.
        fresh: nobody else holds the gradient that comes back for the features, so it may be written into. True if all
            that reads them computes one; an addition hands on the one that it gets, to everything it adds.
    """
    return _Attended.apply(features, fresh)


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, fresh: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.fresh = fresh
        ctx.save_for_backward(features)
        precision = torch.promote_types(features.dtype, torch.float32)
        return features, torch.linalg.vector_norm(features, dim=1, dtype=precision).square_()

    @staticmethod
    def backward(ctx: Any, passed: Tensor | None, slope: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient that comes back for the features, and 2 F_c times that of the map."""
        if slope is None:
            return passed, None
        (features,) = ctx.saved_tensors
        slope = (2 * slope)[:, None]
        if passed is None:
            return (features * slope).to(features.dtype), None
        if passed.dtype != slope.dtype:
            return (passed + features * slope).to(passed.dtype), None  # the product in float32
        return torch.addcmul(passed, features, slope, out=passed if ctx.fresh else None), None
