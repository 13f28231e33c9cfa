"""Pictures of sparse training: |γ| before and after, |γ| epoch by epoch, accuracy while the γ fall.

Histograms of |γ| come as `edges` [B + 1], of which the first is 0 and the rest are log spaced, and counts [B]. The bin
that begins at 0 has no end on a logarithmic axis; it is drawn first, as wide as the function says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.report.figures import BLUE, ORANGE, RED, colours, draw_course, finish, grid, save, spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = 0.01
"""|γ| below which a channel counts as squeezed in the title of `plot_gamma_change`."""
MOST_RIDGES = 25
"""Ridges in one picture; of more epochs, every n-th."""
RIDGE_HEIGHT = 2.8
"""Height of the highest bin of all ridges, in distances between two of them."""
ZERO_BINS = 5
"""Bins that the lowest one is as wide as in the ridges; its height is divided by them, so that areas are channels."""


def share_below(edges: ArrayLike, counts: ArrayLike, limit: float) -> float:
    """Share of |γ| below `limit`: exact at an edge, log-linear between two; NaN without any γ.

    Args:
        edges: [B + 1], 0 and then increasing.
        counts: [B].
        limit: not below the first edge after 0.
    """
    edges, counts = np.asarray(edges, float), np.asarray(counts, float)
    if not counts.sum():
        return float("nan")
    return float(np.interp(np.log(limit), np.log(edges[1:]), np.cumsum(counts)) / counts.sum())


def plot_gamma_change(edges: ArrayLike, before: ArrayLike, after: ArrayLike, path: Path) -> None:
    """Draw the histograms of |γ| before and after a sparse training in one panel.

    Args:
        edges: [B + 1], 0 and then log spaced.
        before: [B], channels in each bin.
        after: the same.
        path: the picture, .png or .jpg.
    """
    from matplotlib.colors import to_rgba

    figure, (ax,) = grid(1, 1, (9, 4.8))
    bounds = _log_axis(ax, edges)
    for counts, name, colour, hatch in ((before, "before", BLUE, ""), (after, "after", ORANGE, "////")):
        counts = np.asarray(counts)
        look = {"facecolor": to_rgba(colour, 0.3), "edgecolor": colour, "hatch": hatch, "linewidth": 1.6}
        ax.stairs(counts, bounds, fill=True, label=f"{name}, {spaced(int(counts.sum()))} γ", **look)
    shares = [_percent(share_below(edges, counts, SMALL)) for counts in (before, after)]
    finish(ax, f"|γ| below {SMALL:g}: {shares[0]} before → {shares[1]} after", "|γ|", "channels in each bin")
    ax.axvline(SMALL, color="black", linestyle=":", linewidth=1.2)
    ax.set_ylim(0, None if np.any(before) or np.any(after) else 1)
    ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.27, 1))
    save(figure, path)


def plot_gamma_ridges(
    epochs: Sequence[float], edges: ArrayLike, counts: ArrayLike, path: Path, turn: float | None = None
) -> None:
    """Draw the histograms of |γ| one below the other, the oldest on top, all to one scale.

    Args:
        epochs: [E], increasing, at least one.
        edges: [B + 1], 0 and then log spaced.
        counts: [E, B], channels in each bin.
        path: the picture, .png or .jpg.
        turn: epoch where the schedule turns; the ridge next to it is marked.
    """
    epochs, counts = np.asarray(epochs, float), np.asarray(counts, float)
    marked = None if turn is None else int(np.argmin(np.abs(epochs - turn)))
    shown = drawn_ridges(len(epochs), marked)
    figure, (ax,) = grid(1, 1, (8, float(np.clip(2.2 + 0.28 * len(shown), 3.2, 9.5))))
    bounds = _log_axis(ax, edges, ZERO_BINS)
    heights = counts[shown] / ([ZERO_BINS] + [1] * (counts.shape[1] - 1))
    heights *= RIDGE_HEIGHT / max(heights.max(), 1)
    for place, (row, height) in enumerate(zip(shown, heights, strict=True)):
        base = len(shown) - 1 - place
        top = np.where(height > 0.02, base + height, np.nan)  # lower ones would break the line below
        colour = RED if row == marked else _age(place / max(len(shown) - 1, 1))
        ax.stairs(top, bounds, baseline=base, fill=True, color=colour, linewidth=0, zorder=2 + place)
        ax.stairs(top, bounds, baseline=base, color="white", linewidth=0.8, zorder=2 + place)
        if row == marked:
            ax.text(1.01, base, "rate turns", transform=ax.get_yaxis_transform(), color=RED, fontsize=9)
    finish(ax, f"|γ| of {spaced(int(counts[-1].sum()))} channels over the epochs", "|γ|", "epoch")
    ax.set_yticks(range(len(shown)), [f"{epochs[row]:g}" for row in reversed(shown)], fontsize=8)
    peaks = np.arange(len(shown))[::-1] + heights.max(1)
    ax.set_ylim(-0.3, float(peaks.max()) + 0.3)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    save(figure, path)


def drawn_ridges(count: int, marked: int | None = None) -> list[int]:
    """Numbers of the epochs that get a ridge: all if they are few; else every n-th, the last, and the marked one."""
    step = 1 if count <= MOST_RIDGES else -(-count // (MOST_RIDGES - 2))
    return sorted({*range(0, count, step), count - 1} | ({marked} if marked is not None else set()))


def plot_sparse_course(
    results: Mapping[str, Sequence[float]],
    path: Path,
    turn: float | None = None,
    shares: Mapping[str, Sequence[float]] | None = None,
    pressure: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw accuracy over the epochs of a sparse training; below it how many γ have fallen, and what s = auto did.

    Args:
        results: `epoch`, and `map50` and `map50_95` if there are any; NaN where an epoch was not evaluated.
        path: the picture, .png or .jpg.
        turn: epoch where the schedule turns; a dotted line.
        shares: by the limit, e.g. `0.01`: share of the γ whose magnitude is below it, one an epoch.
        pressure: columns of pressure.csv.
    """
    rows = 1 + bool(shares) + bool(pressure)
    figure, axes = grid(rows, 1, (9, 1.4 + 2.8 * rows), sharex=True)
    names = [name for name in ("map50", "map50_95") if name in results]
    for name, colour in zip(names, colours(2), strict=False):
        draw_course(axes[0], results["epoch"], results[name], {"map50": "AP50", "map50_95": "AP50-95"}[name], colour)
    finish(axes[0], "average precision", "" if shares else "epoch", "")
    for ax in axes[1:2]:
        for (limit, values), colour in zip(shares.items(), colours(len(shares)), strict=True):
            draw_course(ax, results["epoch"], values, f"|γ| < {limit}", colour)
        if pressure:
            draw_course(ax, pressure["epoch"], pressure["weak"], "weak", RED)
            draw_course(ax, pressure["epoch"], pressure["plan"], "weak by the plan", "black")
        finish(ax, "share of the γ that are small", "" if pressure else "epoch", "")
    for ax in axes[2:]:
        draw_course(ax, pressure["epoch"], pressure["s"], "s", BLUE)
        finish(ax, "pressure on the γ that are not weak", "epoch", "")
    for ax in axes[:2]:
        ax.set_ylim(0, 1)
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
        if turn is not None:
            ax.axvline(turn, color="black", linestyle=":", linewidth=1.2, label="rate turns")
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    save(figure, path)


def _log_axis(ax: Axes, edges: ArrayLike, zero_bins: float = 1) -> NDArray[np.float64]:
    """Make x logarithmic; returns the edges as they are drawn, the lowest bin `zero_bins` times as wide as the next."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    bounds = np.array(edges, float)
    ratio = bounds[2] / bounds[1] if len(bounds) > 2 else 10
    bounds[0] = bounds[1] / ratio**zero_bins
    ax.set_xscale("log")
    ax.set_xlim(bounds[0], bounds[-1])
    first, last = np.floor(np.log10(bounds[[1, -1]]) + 1e-9).astype(int)
    decades = [10.0**n for n in range(first + 1, last + 1)]
    ax.xaxis.set_major_locator(FixedLocator([np.sqrt(bounds[0] * bounds[1]), *decades]))
    ax.xaxis.set_major_formatter(FixedFormatter([f"< {_number(bounds[1])}", *map(_number, decades)]))
    ax.xaxis.set_minor_locator(NullLocator())
    return bounds


def _number(value: float) -> str:
    """A number as a tick says it, a small power of ten as a power."""
    n = round(np.log10(value))
    return f"$10^{{{n}}}$" if n < -2 and np.isclose(value, 10.0**n) else f"{value:.3g}"


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"


def _age(share: float) -> Any:
    """Colour of a ridge, from old (0, light) to new (1, dark)."""
    from matplotlib import colormaps

    return colormaps["Blues"](0.4 + 0.55 * share)
