"""Pictures of pruning: what every convolution keeps of its channels, and where the ranking of |γ| is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, finish, grid, save, spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

CHAIN_COLOURS = (ORANGE, GREEN, PURPLE, SKY, RED)
"""Of residual chains, in their order; then again from the first."""
LIGHT = 0.25
"""Opacity of what is removed."""
MOST_CHAINS = 12
"""Residual chains that the legend names."""
LOG_FLOOR = 0.7
"""Where bars stand on a logarithmic axis: a lone channel is still seen."""
MOST_RANGE = 1e7
"""Between the strongest |γ| and the weakest that has a place of its own."""
LEGEND_INCHES = 2.1
"""Width of an entry of the legend."""
WIDE_RANGE = 8
"""Ratio of the widest to the narrowest layer from which on the axis is logarithmic."""
MOST_UPRIGHT = 15
"""Bars whose numbers are written across; of more, along them."""


@dataclass(frozen=True)
class LayerBar:
    """One convolution before and after pruning."""

    block: int
    """Number of its block in the network before."""
    before: int
    """Its channels before."""
    after: int
    """Its channels after; not drawn if the unit was removed."""
    chain: int | None
    """Number of the residual chain that ties it; None for none."""
    candidate: bool
    """Whether the strategy may remove its channels."""
    removed: bool
    """Whether the residual unit that it belongs to was removed whole."""

    @property
    def kept(self) -> int:
        """Channels that stay."""
        return 0 if self.removed else self.after


def plot_channels(bars: Sequence[LayerBar], path: Path) -> None:
    """Draw one bar a convolution: what stays, solid, and above it what goes, light.

    Args:
        bars: in the order of the network; may be empty.
        path: the picture, .png or .jpg; as wide as the network is deep.
    """
    from matplotlib.colors import to_rgba

    figure, (ax,) = grid(1, 1, (float(np.clip(2.5 + 0.2 * len(bars), 7, 30)), 5))
    places = np.arange(len(bars))
    before, kept = np.array([(bar.before, bar.kept) for bar in bars], int).reshape(-1, 2).T
    floor = _height_axis(ax, before)
    tops, cuts = np.maximum(before, floor), np.maximum(kept, floor)
    tints = _tints(bars)
    pale = [to_rgba(tint, LIGHT) for tint in tints]
    ax.bar(places, cuts - floor, bottom=floor, color=tints)
    ax.bar(places, tops - cuts, bottom=cuts, color=pale)
    gone = np.array([bar.removed for bar in bars], bool)
    hatched = [tint for tint, removed in zip(tints, gone, strict=True) if removed]
    ax.bar(
        places[gone], tops[gone] - floor, bottom=floor, facecolor="none", edgecolor=hatched, hatch="////", linewidth=0
    )
    _write_numbers(ax, bars, tops)
    share = f", {100 * kept.sum() / before.sum():.1f} % stay" if before.sum() else ""
    finish(ax, f"channels: {spaced(int(before.sum()))} → {spaced(int(kept.sum()))}{share}", "block", "")
    ax.grid(False, axis="x")
    ax.set_xlim(-0.7, max(len(bars), 1) - 0.3)
    if bars:
        columns = int(np.clip(figure.get_figwidth() / LEGEND_INCHES, 4, 8))
        figure.legend(
            handles=_legend(bars, tints), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )
    save(figure, path)


def plot_threshold(scores: ArrayLike, removed: int, path: Path) -> None:
    """Draw the candidate channels from the weakest to the strongest, their histogram, and where the ranking is cut.

    Args:
        scores: [N], |γ| of every candidate channel, in any order; N may be 0.
        removed: rank of the cut, 0 to N: how many of the weakest go, before chains are merged and layers get a floor.
        path: the picture, .png or .jpg.

    Raises:
        ValueError: `removed` is not in that range.
    """
    ranked = np.sort(np.asarray(scores, float).ravel())
    if not 0 <= removed <= len(ranked):
        raise ValueError(f"removed {removed}: there are {len(ranked)} candidate channels")
    figure, (curve, histogram) = grid(1, 2, (11, 5), sharey=True, width_ratios=(2, 1))
    high = ranked.max(initial=0) or 1.0
    low = max(high / MOST_RANGE, ranked.min(where=ranked > 0, initial=high)) / 2
    drawn, bins = np.maximum(ranked, low), np.geomspace(low, 2 * high, 60)
    stacked = np.zeros(len(bins) - 1)
    for part, name, colour in ((slice(None, removed), "below the cut", ORANGE), (slice(removed, None), "above", BLUE)):
        curve.fill_between(np.arange(len(drawn))[part], low, drawn[part], color=colour, alpha=0.3, linewidth=0)
        curve.plot(np.arange(len(drawn))[part], drawn[part], color=colour, linewidth=2.2)
        below, stacked = stacked, stacked + np.histogram(drawn[part], bins)[0]
        histogram.stairs(stacked, bins, baseline=below, orientation="horizontal", fill=True, color=colour,
                         label=f"{name}: {spaced(len(drawn[part]))}")  # fmt: skip
    curve.set_yscale("log")
    curve.set(xlim=(0, max(len(ranked), 1)), ylim=(low, 2 * high))
    finish(curve, _cut(ranked, removed), "rank of the channel, the weakest first", "|γ|")
    zeros = int((ranked == 0).sum())
    finish(histogram, f"{spaced(zeros)} of the γ are 0" if zeros else "", "channels in each bin", "")
    histogram.set_xlim(0, max(1.1 * stacked.max(), 1))
    histogram.legend(frameon=False, fontsize=9)
    if removed < len(ranked):
        curve.axvline(removed, color="black", linestyle=":", linewidth=1.2)
        curve.plot(removed, drawn[removed], "o", color="black", markersize=6)
        for ax in (curve, histogram):
            ax.axhline(drawn[removed], color="black", linestyle=":", linewidth=1.2)
    save(figure, path)


def _height_axis(ax: Axes, before: NDArray[np.integer]) -> float:
    """Make y linear, or logarithmic if the widths differ much, with room for numbers; returns where the bars stand."""
    upright = len(before) <= MOST_UPRIGHT
    widest = int(before.max(initial=1))
    if widest < WIDE_RANGE * max(1, int(before.min(initial=widest))):
        ax.set_ylim(0, (1.1 if upright else 1.25) * widest)
        return 0.0
    powers = 2 ** np.arange(int(np.log2(widest)) + 1)
    ax.set_yscale("log", base=2)
    ax.set_yticks(powers, [str(power) for power in powers])
    ax.set_ylim(LOG_FLOOR, (2 if upright else 5) * widest)
    return LOG_FLOOR


def _write_numbers(ax: Axes, bars: Sequence[LayerBar], tops: NDArray[np.number]) -> None:
    """Channels kept of all above every bar, its block below; upright if there is room."""
    upright = len(bars) <= MOST_UPRIGHT
    look = {"fontsize": 8 if upright else 7, "rotation": 0 if upright else 90}
    for place, (bar, top) in enumerate(zip(bars, tops, strict=True)):
        text = str(bar.before) if bar.kept == bar.before else f"{bar.kept}/{bar.before}"
        ax.annotate(text, (place, top), (0, 3), textcoords="offset points", ha="center", va="bottom", **look)
    ax.set_xticks(range(len(bars)), [str(bar.block) for bar in bars], **look)


def _tints(bars: Sequence[LayerBar]) -> list[str]:
    """A colour a bar: grey for what is no candidate, else that of its chain."""
    chains = sorted({bar.chain for bar in bars if bar.candidate and bar.chain is not None})
    of_chain = {chain: CHAIN_COLOURS[n % len(CHAIN_COLOURS)] for n, chain in enumerate(chains)}
    return [of_chain.get(bar.chain, BLUE) if bar.candidate else GREY for bar in bars]


def _legend(bars: Sequence[LayerBar], tints: Sequence[str]) -> list[Patch]:
    """What the looks of the bars that there are mean."""
    from matplotlib.patches import Patch

    found = [Patch(color="#404040", label="stays"), Patch(color="#404040", alpha=LIGHT, label="goes")]
    if any(bar.removed for bar in bars):
        found.append(Patch(facecolor="none", edgecolor="#404040", hatch="////", label="unit removed whole"))
    chains: dict[int, list[int]] = {}
    tint_of = {}
    for bar, tint in zip(bars, tints, strict=True):
        if bar.candidate and bar.chain is not None:
            chains.setdefault(bar.chain, []).append(bar.block)
            tint_of[bar.chain] = tint
    if any(bar.candidate and bar.chain is None for bar in bars):
        found.append(Patch(color=BLUE, label="not tied"))
    for chain in sorted(chains)[:MOST_CHAINS]:
        blocks = chains[chain]
        found.append(Patch(color=tint_of[chain], label=f"{len(blocks)} tied, blocks {blocks[0]}–{blocks[-1]}"))
    if not all(bar.candidate for bar in bars):
        found.append(Patch(color=GREY, label="no candidate"))
    return found


def _cut(ranked: NDArray[np.float64], removed: int) -> str:
    """Where the ranking is cut, in numbers."""
    if not len(ranked):
        return "no candidate channels"
    rank = f"cut at rank {spaced(removed)} of {spaced(len(ranked))} ({100 * removed / len(ranked):.1f} %)"
    return f"{rank}, where |γ| = {ranked[removed]:.4g}" if removed < len(ranked) else rank
