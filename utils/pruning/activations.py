"""Activations as functions of numbers; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def _softplus(x: Vector) -> Vector:
    return np.logaddexp(0, x)


def _logistic(x: Vector) -> Vector:
    return np.exp(-_softplus(-x))


FUNCTIONS: Mapping[str, Callable[[Vector], Vector]] = {
    "linear": lambda x: x,
    "leaky": lambda x: np.where(x > 0, x, 0.1 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "swish": lambda x: x * _logistic(x),
    "logistic": _logistic,
    "h_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
}
"""By their names in a cfg."""


def keeps_zero(activation: str) -> bool:
    """Whether a channel that is 0 before the activation is 0 behind it."""
    return not FUNCTIONS[activation](np.zeros(1)).any()
