"""How much of a network can go before it hurts, as far as its γ tell; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

FREE_SHARE = 0.01
"""Channels that together hold this share of the sum of |γ| are taken to do nothing."""


def advised_percent(scores: Mapping[int, NDArray[np.floating]], max_percent: float = 1.0) -> float:
    """Share of the channels that can go: the weakest, as long as they hold no more than `FREE_SHARE` of all scores.

    Args:
        scores: of each candidate's channels.
        max_percent: the largest percentage that works.

    Returns:
        0 … `max_percent`, cut to two decimals.
    """
    every = np.sort(np.concatenate([np.zeros(0), *(np.asarray(part, np.float64) for part in scores.values())]))
    if not len(every):
        return 0.0
    free = int((np.cumsum(every) <= FREE_SHARE * every.sum()).sum())
    return math.floor(min(free / len(every), max_percent) * 100 + 1e-9) / 100
