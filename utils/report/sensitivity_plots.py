"""The picture of a sensitivity analysis: what groups lose as lines, what layers lose as a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.report.figures import colours, finish, grid, save, short_name

MOST_ROWS = 40
"""Layers whose numbers are written in the heat map; of more, every n-th."""
SMALLEST_SCALE = 1.0
"""Points at which the colours of the heat map end, at least: noise is not drawn as loss."""


def plot_sensitivity(
    shares: Sequence[float],
    groups: Mapping[str, Sequence[float]],
    layers: Mapping[str, Sequence[float]],
    map50: float,
    path: Path,
) -> None:
    """Draw AP50 against the share removed, a line for each group, and the points lost by each layer in colours.

    Args:
        shares: [S], increasing.
        groups: points of AP50 [S] that each group lost, by its name.
        layers: the same of each layer, in the order of the network; may be empty.
        map50: AP50 of the network before, 0…1.
        path: the picture, .png or .jpg.
    """
    height = float(np.clip(2 + 0.16 * len(layers), 5, 18))
    figure, (lines, heat) = grid(1, 2, (13, height), width_ratios=(1.2, 1))
    for (name, drops), colour in zip(groups.items(), colours(len(groups)), strict=True):
        values = 100 * map50 - np.array([0.0, *drops])
        lines.plot([0.0, *shares], values, color=colour, linewidth=1.8, marker="o", markersize=4, label=name)
    finish(lines, "one group loses channels", "share of its channels, the weakest first", "AP50, points")
    lines.set(xlim=(0, 1), ylim=(min(0.0, lines.get_ylim()[0]), None))
    if groups:
        lines.legend(frameon=False, fontsize=9, loc="lower left")
    table = np.array(list(layers.values()), float).reshape(-1, len(shares))
    top = max(SMALLEST_SCALE, float(table.max(initial=0.0)))
    if len(table):
        drawn = heat.imshow(np.maximum(table, 0), aspect="auto", cmap="Reds", vmin=0, vmax=top)
        figure.colorbar(drawn, ax=heat, label="points of AP50 lost", fraction=0.05)
    every = max(1, -(-len(table) // MOST_ROWS))
    names = [short_name(name) for name in layers]
    heat.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    heat.set_xticks(range(len(shares)), [f"{share:g}" for share in shares])
    finish(heat, "one layer loses channels", "share of its channels", "block")
    heat.grid(False)
    save(figure, path)
