"""|γ| in the course of a sparse training: gamma.csv and gamma_histogram.csv of a run, and its pictures. No torch.

Histograms have edges [B + 1], of which the first is 0 and the rest are log spaced. The bin that begins at 0 has no end
on a logarithmic axis, so it is drawn as wide as the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.report.plots import BLUE, ORANGE, RED, colours, draw_course, finish, grid, save, spaced, whole_epochs
from utils.report.run_dir import Results, RunDirectory, read_results

if TYPE_CHECKING:
    from matplotlib.axis import Axis

QUANTILES = {"min": 0, "q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9, "max": 1}
BELOW = (0.1, 0.01, 0.001)
"""Thresholds for which gamma.csv has the share of |γ| below."""
EDGES = np.concatenate([[0.0], np.logspace(-5, 1, 61)])
"""Edges of the bins of gamma_histogram.csv; larger |γ| count in the last one."""
CONTROLLED = ("s", "plan", "weak", "rested")
"""Columns of pressure.csv: s of the epoch's last step, the planned and the actual share of weak channels, and the
optimizer steps so far without pressure because of AP50 or the loss."""
EVERY = -1
"""`block` of the rows for all candidates."""
SMALL = 0.01
"""|γ| below which a channel counts as squeezed in the title of `plot_gamma_change`."""


class GammaLog:
    """The tables, a part for each epoch; epoch 0 is before the training.

    gamma.csv has a row for every candidate and one for all together, `block` -1: quantiles of |γ| and the shares below
    some thresholds. gamma_histogram.csv counts |γ| of all candidates; its columns are named by the lower edges.
    pressure.csv says what s = auto did.
    """

    def __init__(self, run: RunDirectory) -> None:
        shares = [f"below_{limit:g}" for limit in BELOW]
        self.run = run
        self._table = Results(run.file("gamma.csv"), ("block", "channels", *QUANTILES, *shares))
        self._pressure = Results(run.file("pressure.csv"), CONTROLLED)
        self._counts = Results(run.file("gamma_histogram.csv"), tuple(f"{edge:.4g}" for edge in EDGES[:-1]))

    def append(
        self,
        epoch: int,
        gammas: Mapping[int, NDArray[np.floating]],
        controlled: Mapping[str, float] | None = None,
    ) -> None:
        """Write γ after an epoch, by block number; a resumed run rewrites what it repeats.

        Args:
            epoch: its number.
            gammas: γ of each candidate.
            controlled: the values of pressure.csv; None: there are none.
        """
        sizes = {block: np.abs(np.asarray(values, np.float64)).ravel() for block, values in gammas.items()}
        together = np.concatenate(list(sizes.values()))
        self._table.extend(epoch, [_row(block, values) for block, values in {EVERY: together, **sizes}.items()])
        counts = np.histogram(np.minimum(together, EDGES[-1]), EDGES)[0]
        self._counts.append(epoch, dict(zip(self._counts.columns[1:], counts.tolist(), strict=True)))
        if controlled is not None:
            self._pressure.append(epoch, controlled)

    def draw(self, turn: float | None) -> None:
        """Draw gamma/histogram.png, epochs.png and course.png; `turn` is the epoch in which the rate turns."""
        folder = self.run.file("gamma")
        folder.mkdir(exist_ok=True)
        counts = read_results(self._counts.path)
        epochs = counts.pop("epoch")
        table = np.array(list(counts.values())).T
        plot_gamma_change(EDGES, table[0], table[-1], folder / "histogram.png")
        plot_gamma_epochs(epochs, EDGES, table, folder / "epochs.png", turn)
        if self.run.file("results.csv").exists():
            self._draw_course(folder / "course.png", turn)

    def _draw_course(self, path: Path, turn: float | None) -> None:
        """Draw the epochs that both results.csv and gamma.csv have."""
        table, results = read_results(self._table.path), read_results(self.run.file("results.csv"))
        whole = {table["epoch"][i]: i for i in np.flatnonzero(np.array(table["block"]) == EVERY)}
        shown = [i for i, epoch in enumerate(results["epoch"]) if epoch in whole]
        if not shown:
            return
        results = {name: [values[i] for i in shown] for name, values in results.items()}
        rows = [whole[epoch] for epoch in results["epoch"]]
        shares = {f"{limit:g}": [table[f"below_{limit:g}"][row] for row in rows] for limit in BELOW}
        pressure = read_results(self._pressure.path) if self._pressure.path.exists() else None
        plot_sparse_course(results, path, turn, shares, pressure)


def _row(block: int, values: NDArray[np.float64]) -> dict[str, float | int]:
    quantiles = np.quantile(values, list(QUANTILES.values()))
    shares = {f"below_{limit:g}": float((values < limit).mean()) for limit in BELOW}
    return {"block": block, "channels": len(values), **dict(zip(QUANTILES, quantiles.tolist(), strict=True)), **shares}


def share_below(edges: ArrayLike, counts: ArrayLike, limit: float) -> float:
    """Return the share of |γ| below `limit`: exact at an edge, log-linear between two; NaN without any γ.

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
    figure, (ax,) = grid(1, 1, (9, 4.8))
    bounds = _bounds(edges)
    for counts, name, colour, hatch in ((before, "before", BLUE, ""), (after, "after", ORANGE, "////")):
        label = f"{name}, {spaced(int(np.sum(counts)))} γ"
        ax.stairs(counts, bounds, fill=True, alpha=0.3, color=colour, hatch=hatch)
        ax.stairs(counts, bounds, color=colour, linewidth=1.6, label=label)
    shares = [_percent(share_below(edges, counts, SMALL)) for counts in (before, after)]
    finish(ax, f"|γ| below {SMALL:g}: {shares[0]} before → {shares[1]} after", "|γ|", "channels in each bin")
    ax.axvline(SMALL, color="black", linestyle=":", linewidth=1.2)
    ax.set_xscale("log")
    ax.set(xlim=(bounds[0], bounds[-1]), ylim=(0, None if np.any(before) or np.any(after) else 1))
    _name_zero(ax.xaxis, bounds)
    ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.27, 1))
    save(figure, path)


def plot_gamma_epochs(
    epochs: Sequence[float], edges: ArrayLike, counts: ArrayLike, path: Path, turn: float | None = None
) -> None:
    """Draw the histograms of |γ| as columns of a map, an epoch each.

    Args:
        epochs: [E], increasing, at least one.
        edges: [B + 1], 0 and then log spaced.
        counts: [E, B], channels in each bin.
        path: the picture, .png or .jpg.
        turn: epoch where the schedule turns; a dotted line.
    """
    figure, (ax,) = grid(1, 1, (9, 4.8))
    bounds = _bounds(edges)
    sides = np.append(epochs, epochs[-1] + 1) - 0.5
    drawn = ax.pcolormesh(sides, bounds, np.asarray(counts, float).T, cmap="Blues", vmin=0)
    figure.colorbar(drawn, ax=ax, label="channels in each bin")
    finish(ax, f"|γ| of {spaced(int(np.sum(np.asarray(counts)[-1])))} channels over the epochs", "epoch", "|γ|")
    ax.grid(False)
    ax.set_yscale("log")
    _name_zero(ax.yaxis, bounds)
    whole_epochs(ax)
    if turn is not None:
        ax.axvline(turn, color=RED, linestyle=":", linewidth=1.2, label="rate turns")
        ax.legend(frameon=False, fontsize=9, loc="lower left")
    save(figure, path)


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
    epochs = results["epoch"]
    accuracy = {
        name: (epochs, results[key]) for key, name in (("map50", "AP50"), ("map50_95", "AP50-95")) if key in results
    }
    panels = {"average precision": accuracy}
    if shares:
        panels["share of the γ that are small"] = {f"|γ| < {limit}": (epochs, shares[limit]) for limit in shares}
    if pressure:
        small = panels.setdefault("share of the γ that are small", {})
        small |= {
            "weak": (pressure["epoch"], pressure["weak"]),
            "weak by the plan": (pressure["epoch"], pressure["plan"]),
        }
        panels["pressure on the γ that are not weak"] = {"s": (pressure["epoch"], pressure["s"])}
    figure, axes = grid(len(panels), 1, (9, 1.4 + 2.8 * len(panels)), sharex=True)
    for ax, (title, courses) in zip(axes, panels.items(), strict=True):
        for (name, course), colour in zip(courses.items(), colours(len(courses)), strict=True):
            draw_course(ax, *course, name, colour)
        finish(ax, title, "epoch" if ax is axes[-1] else "", "")
        whole_epochs(ax)
        if not title.startswith("pressure"):
            ax.set_ylim(0, 1)
        if turn is not None:
            ax.axvline(turn, color="black", linestyle=":", linewidth=1.2, label="rate turns")
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    save(figure, path)


def _bounds(edges: ArrayLike) -> NDArray[np.float64]:
    """Return the edges as they are drawn: the bin that begins at 0 as wide as the next one."""
    bounds = np.array(edges, float)
    bounds[0] = bounds[1] / (bounds[2] / bounds[1] if len(bounds) > 2 else 10)
    return bounds


def _name_zero(axis: Axis, bounds: NDArray[np.float64]) -> None:
    """Write powers of ten along a logarithmic axis, and what the lowest bin holds."""
    first, last = np.floor(np.log10(bounds[[1, -1]]) + 1e-9).astype(int)
    powers = [10.0**n for n in range(first + 1, last + 1)]
    labels = [f"< {bounds[1]:.3g}", *(f"{power:g}" for power in powers)]
    axis.set_ticks([np.sqrt(bounds[0] * bounds[1]), *powers], labels)
    axis.set_ticks([], minor=True)


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"
