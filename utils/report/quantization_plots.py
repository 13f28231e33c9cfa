"""The picture of a quantization: signal and noise of every convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.report.figures import BLUE, GREY, ORANGE, finish, grid, save, short_name

MOST_NAMED = 60
"""Bars that are named; of more, every n-th."""


@dataclass(frozen=True)
class LayerNoise:
    """One convolution."""

    name: str
    sqnr: float | None
    """dB, with all of the network rounded; None: nothing was changed."""
    alone: float | None
    """dB of the heads when it alone is rounded; None: not measured, or nothing was changed."""
    kept: bool
    """Whether its weights are float."""


def plot_noise(layers: Sequence[LayerNoise], path: Path) -> None:
    """Draw a bar a convolution, and what it does alone as a point, where that was measured.

    Args:
        layers: in the order of the network.
        path: the picture, .png or .jpg; as wide as the network is deep.
    """
    from matplotlib.patches import Patch

    figure, (ax,) = grid(1, 1, (float(np.clip(2.5 + 0.2 * len(layers), 7, 30)), 4.5))
    places = np.arange(len(layers))
    values = np.array([np.nan if layer.sqnr is None else layer.sqnr for layer in layers])
    ax.bar(places, values, width=0.8, color=[GREY if layer.kept else BLUE for layer in layers])
    alone = np.array([np.nan if layer.alone is None else layer.alone for layer in layers])
    handles = [Patch(color=BLUE, label="its output, all of the network rounded")]
    if any(layer.kept for layer in layers):
        handles.append(Patch(color=GREY, label="the same, weights float"))
    if np.isfinite(alone).any():
        handles += ax.plot(places, alone, "D", color=ORANGE, markersize=5, label="the heads, it alone rounded")
    every = max(1, -(-len(layers) // MOST_NAMED))
    ax.set_xticks(places[::every], [short_name(layer.name) for layer in layers][::every], fontsize=7, rotation=90)
    ax.set_xlim(-0.7, len(layers) - 0.3)
    finish(ax, "signal to quantization noise", "block", "SQNR, dB")
    ax.legend(handles=handles, frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 1.02), ncols=3)
    top = np.nanmax([*values, *alone, 1.0])
    ax.set_ylim(min(0.0, np.nanmin([*values, *alone, 0.0])), 1.18 * top)
    save(figure, path)
