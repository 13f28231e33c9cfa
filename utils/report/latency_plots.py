"""A picture of latencies: a panel for every input size and number of threads, a bar for every network and runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, finish, grid, save, short_name

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)
"""Of the runtimes in the order they appear, then again from the first."""


@dataclass(frozen=True)
class LatencyBar:
    """One network in one runtime."""

    panel: str
    """Input and threads."""
    network: str
    runtime: str
    median: float
    """Milliseconds, like `p90`."""
    p90: float


def plot_latency(bars: Sequence[LatencyBar], path: Path) -> None:
    """Draw medians as bars and 90th percentiles as their whiskers.

    Args:
        bars: in the order of the panels, of the networks from above, and of the runtimes; may be empty.
        path: the picture, .png or .jpg.
    """
    panels = list(dict.fromkeys(bar.panel for bar in bars))
    runtimes = list(dict.fromkeys(bar.runtime for bar in bars))
    most = max((sum(bar.panel == panel for bar in bars) for panel in panels), default=1)
    figure, axes = grid(1, max(1, len(panels)), (7 * max(1, len(panels)), 1.5 + 0.35 * most))
    for ax, panel in zip(axes, panels, strict=False):
        own = [bar for bar in bars if bar.panel == panel]
        for place, bar in enumerate(own):
            colour = COLOURS[runtimes.index(bar.runtime) % len(COLOURS)]
            ax.barh(place, bar.median, color=colour, xerr=[[0], [max(0.0, bar.p90 - bar.median)]], ecolor=GREY)
            ax.annotate(f"{bar.median:.1f}", (max(bar.median, bar.p90), place), (4, 0), textcoords="offset points",
                        va="center", fontsize=8)  # fmt: skip
        ax.set_yticks(range(len(own)), [f"{short_name(bar.network)}, {bar.runtime}" for bar in own], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.12 * max(max(bar.median, bar.p90) for bar in own))
    for ax, title in zip(axes, panels or ["nothing was measured"], strict=True):
        finish(ax, title, "ms a picture", "")
    save(figure, path)
