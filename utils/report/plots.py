"""Pictures of runs and networks.

matplotlib is imported when the first picture is drawn. Figures have their own Agg canvas: no display, no pyplot, no
state that another part of a program could see. Colours are told apart by colour-blind readers, too (Okabe and Ito,
"Color Universal Design", 2008).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.cli import one_line
from utils.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from utils.detection.average_precision import Metrics

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a8a8a"
SKY, PURPLE = "#56b4e9", "#cc79a7"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)
"""Colours of families and chains in their order, then again from the first."""
MARKERS = "os^DvPX*"
"""Marks of the families of networks. As there are 8 and 7 colours, 56 families look different."""
MOST_NAMED = 30
"""Classes that a legend or an axis names one by one; more are drawn without names."""
MOST_POINTS = 20_000
"""Boxes drawn in the scatter plots of the labels; of more, every n-th."""
MOST_TICKS = 60
"""Convolutions that the axis of `plot_noise` names; of more, every n-th."""
LIGHT = 0.25
"""Opacity of the channels that are removed."""
MOST_RANGE = 1e7
"""Ratio of the strongest |γ| to the weakest that is drawn at its own height."""
WIDE_RANGE = 8
"""Ratio of the largest value to the smallest from which on an axis is logarithmic."""
PANELS = (("parameters", "million parameters", 1e6), ("macs", "GMACs", 1e9), ("ms", "ms a picture", 1))
"""Field of a point, title of the axis, and its unit."""


@dataclass(frozen=True)
class LayerBar:
    """A convolution before and after pruning."""

    block: int
    """Number of its block in the network before."""
    before: int
    """Its channels before."""
    after: int
    """Its channels after; not drawn if the unit was removed."""
    chain: int | None
    """Number of the residual chain that ties it; None for none."""
    candidate: bool
    """The strategy may remove its channels."""
    removed: bool
    """The residual unit that it belongs to was removed whole."""

    @property
    def kept(self) -> int:
        """Channels that stay."""
        return 0 if self.removed else self.after


@dataclass(frozen=True)
class LayerNoise:
    """A convolution of a quantized network."""

    name: str
    sqnr: float | None
    """dB, with all of the network rounded; None: nothing was changed."""
    alone: float | None
    """dB of the heads when it alone is rounded; None: not measured, or nothing was changed."""
    kept: bool
    """Its weights are float."""


@dataclass(frozen=True)
class ParetoPoint:
    """A network and what it costs."""

    name: str
    family: str
    """Networks of a family share a colour and a mark."""
    ap50: float
    """0..1."""
    low: float
    """Ends of its interval, e.g. of `utils.detection.bootstrap`; `ap50` may lie outside."""
    high: float
    parameters: int
    macs: int
    ms: float
    """Milliseconds a picture."""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"{self.name}: the interval {self.low}..{self.high} ends before it begins")
        if not all(cost > 0 for cost in (self.parameters, self.macs, self.ms)):
            raise ValueError(f"{self.name}: parameters, macs and ms must be above 0")


def grid(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of `size` inches with its panels, row by row; `layout` as of matplotlib's `Figure.subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **layout).flat)


def finish(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    """Name a panel and its axes, and lay a quiet grid under it."""
    ax.set_title(title, fontsize=11)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(True, color="#e5e5e5", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write the figure atomically; the suffix of `path` names the format."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names may be in any script
        figure.savefig(stream, format=path.suffix[1:], dpi=120)
    atomic_write_bytes(path, stream.getvalue())


def short_name(text: str) -> str:
    """Return a name as matplotlib shows it: at most 24 characters, no mathematics, kept in a legend."""
    text = one_line(text)
    text = text if len(text) <= 24 else text[:23] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def spaced(number: int) -> str:
    """Return an integer with its thousands apart, as in the tables."""
    return f"{number:,}".replace(",", " ")


def colours(count: int) -> Sequence[str | tuple[float, ...]]:
    """Return as many colours that are told apart."""
    if count <= 4:
        return [BLUE, ORANGE, GREEN, RED][:count]
    from matplotlib import colormaps

    return [colormaps["turbo"](share) for share in np.linspace(0.05, 0.95, count)]


def draw_course(ax: Axes, epochs: ArrayLike, values: ArrayLike, name: str, colour: Any) -> None:
    """Draw one column over the epochs it has values for; a lone value is seen by its mark."""
    x, y = np.asarray(epochs, float), np.asarray(values, float)
    known = np.isfinite(y)
    mark = "." if known.sum() <= 30 else ""
    ax.plot(x[known], y[known], color=colour, linewidth=1.6, marker=mark, label=short_name(name))


def whole_epochs(ax: Axes) -> None:
    """Put ticks of the x axis at whole numbers."""
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # of a MaxNLocator


def _name_ticks(ax: Axes, names: Sequence[str]) -> None:
    """Write class names along the x axis if they are few."""
    if len(names) <= MOST_NAMED + 1:
        ax.set_xticks(range(len(names)), list(map(short_name, names)), rotation=60, ha="right", fontsize=8)


def plot_results(results: Mapping[str, Sequence[float]], path: Path, best_epoch: int | None = None) -> None:
    """Draw the columns of results.csv over the epochs: losses, learning rates, P, R and F1, AP.

    Args:
        results: `epoch`, and any columns whose names contain `loss` or begin with `lr`, `precision`, `recall`, `f1`,
            `map50`; NaN where an epoch has no value. Other columns are not drawn.
        path: the picture, .png or .jpg.
        best_epoch: marked by a vertical line.
    """
    panels = (
        ("loss", [name for name in results if "loss" in name]),
        ("learning rate", [name for name in results if name.startswith("lr")]),
        ("precision, recall, F1", [name for name in ("precision", "recall", "f1") if name in results]),
        ("average precision", [name for name in ("map50", "map50_95") if name in results]),
    )
    figure, axes = grid(2, 2, (11, 7))
    for (title, names), ax in zip(panels, axes, strict=True):
        for name, colour in zip(names, colours(len(names)), strict=True):
            draw_course(ax, results["epoch"], results[name], name, colour)
        if best_epoch is not None:
            ax.axvline(best_epoch, color=GREY, linestyle=":", label=f"best epoch: {best_epoch}")
        finish(ax, title, "epoch", "")
        whole_epochs(ax)
        if names:
            ax.legend(frameon=False, fontsize=8)
        if title.startswith(("precision", "average")):
            ax.set_ylim(0, 1)
    save(figure, path)


def plot_search(
    numbers: Sequence[int],
    values: Sequence[float],
    columns: Mapping[str, Sequence[float]],
    path: Path,
    logarithmic: Collection[str] = (),
) -> None:
    """Draw the fitness of the trials of a search in their order, and over each of the values that were searched.

    Args:
        numbers: of the trials, at least one.
        values: their fitness.
        columns: the values of each trial, by name.
        path: the picture, .png or .jpg.
        logarithmic: names of columns that are drawn over their logarithms.
    """
    down = -(-(len(columns) + 1) // 4)
    figure, axes = grid(down, 4, (14.4, 2.8 * down))
    best = int(np.argmax(values))
    axes[0].step(numbers, np.maximum.accumulate(values), where="post", color=GREY, linewidth=1)
    for ax, (name, column) in zip(axes, {"trial": numbers, **columns}.items(), strict=False):
        ax.scatter(column, values, s=14, color=BLUE, linewidths=0, alpha=0.7)
        ax.scatter(column[best], values[best], s=45, color=RED, marker="D")
        if name in logarithmic:
            ax.set_xscale("log")
            ax.tick_params(axis="x", which="minor", labelbottom=False)
        finish(ax, f"{name}, best {column[best]:.4g}", "", "fitness")
    whole_epochs(axes[0])
    for ax in axes[len(columns) + 1 :]:
        ax.set_axis_off()
    save(figure, path)


def plot_labels(labels: NDArray[np.floating], names: Sequence[str], path: Path) -> None:
    """Draw how many boxes each class has, where their centres lie, and how wide and high they are.

    Args:
        labels: [n, 5]: class, centre x, centre y, width, height, as shares of the picture; n may be 0.
        names: of the classes.
        path: the picture, .png or .jpg.
    """
    figure, (left, middle, right) = grid(1, 3, (15, 4.6))
    counts = np.bincount(np.asarray(labels)[:, 0].astype(int), minlength=len(names))
    left.bar(range(len(counts)), counts, color=BLUE, width=0.8)
    finish(left, f"boxes of each class, {len(labels)} in all", "", "")
    _name_ticks(left, names)
    few = labels[:: max(1, -(-len(labels) // MOST_POINTS))]
    opacity = float(np.clip(300 / max(len(few), 1), 0.05, 0.6))
    for ax, (x, y), title, measures in (
        (middle, (1, 2), "box centres", "xy"),
        (right, (3, 4), "box sizes", ("width", "height")),
    ):
        ax.scatter(few[:, x], few[:, y], s=5, alpha=opacity, color=BLUE, linewidths=0)
        finish(ax, title, f"{measures[0]} / picture width", f"{measures[1]} / picture height")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    middle.invert_yaxis()
    save(figure, path)


def plot_pr_curve(metrics: Metrics, path: Path) -> None:
    """Draw precision against recall at IoU 0.5, a line a class and a thick one for their mean."""
    curves = metrics.curves
    figure, (ax,) = grid(1, 1, (9, 6))
    finish(ax, "precision and recall at IoU 0.5", "recall", "precision")
    labels = [f"{short_name(c.name)} {c.ap50:.3f}" for c in metrics.per_class]
    _draw_curves(ax, curves.recall_points, curves.envelope, labels, f"all classes {metrics.map50:.3f}")
    save(figure, path)


def plot_f1_curve(metrics: Metrics, path: Path) -> None:
    """Draw F1 at IoU 0.5 over the confidence threshold, a line a class and a thick one for their mean."""
    curves = metrics.curves
    figure, (ax,) = grid(1, 1, (9, 6))
    finish(ax, "F1 at IoU 0.5", "confidence threshold", "F1")
    labels = [short_name(c.name) for c in metrics.per_class]
    _draw_curves(ax, curves.confidence, curves.f1, labels, f"all classes {metrics.f1:.3f} at {metrics.confidence:.3f}")
    save(figure, path)


def _draw_curves(
    ax: Axes, x: NDArray[np.floating], lines: NDArray[np.floating], labels: Sequence[str], mean_label: str
) -> None:
    """Draw one line of `lines` [K, len(x)] a class, named if they are few, and their mean."""
    ax.set(xlim=(0, 1), ylim=(0, 1.01))
    for line, label, colour in zip(lines, labels, colours(len(labels)), strict=True):
        if len(labels) <= MOST_NAMED:
            ax.plot(x, line, color=colour, linewidth=1, alpha=0.9, label=label)
        else:
            ax.plot(x, line, color=GREY, linewidth=1, alpha=0.3)
    if len(lines):
        ax.plot(x, np.mean(lines, axis=0), color="black", linewidth=2.5, label=mean_label)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def plot_confusion(matrix: NDArray[np.integer], names: Sequence[str], path: Path) -> None:
    """Draw which class was taken for which, as shares of the objects of each true class.

    Args:
        matrix: [C + 1, C + 1] counts, true class by predicted class. The last column holds the objects that were
            missed, the last row the detections where there is nothing, as shares of all such detections.
        names: of the C classes.
        path: the picture, .png or .jpg.
    """
    matrix = np.asarray(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = float(np.clip(3 + 0.45 * len(matrix), 5, 16))
    figure, (ax,) = grid(1, 1, (side + 1, side))
    image = ax.imshow(np.where(matrix > 0, shares, np.nan), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, shrink=0.8)
    finish(ax, "confusion at IoU 0.45, confidence 0.25; rows add up to 1", "predicted", "true")
    ax.grid(False)
    _name_ticks(ax, [*names, "background"])
    if len(names) <= MOST_NAMED:
        ax.set_yticks(range(len(matrix)), [*map(short_name, names), "background"], fontsize=8)
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            value = shares[row, column]
            colour = "white" if value > 0.6 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    save(figure, path)


def plot_channels(bars: Sequence[LayerBar], path: Path) -> None:
    """Draw one bar a convolution: the channels before, light, and over them those that stay.

    Args:
        bars: in the order of the network; may be empty.
        path: the picture, .png or .jpg; as wide as the network is deep.
    """
    figure, (ax,) = grid(1, 1, (float(np.clip(2.5 + 0.2 * len(bars), 7, 30)), 5))
    numbers = np.arange(len(bars))
    before, kept = np.array([(bar.before, bar.kept) for bar in bars], int).reshape(-1, 2).T
    tints = _tints(bars)
    hatches = ["////" if bar.removed else "" for bar in bars]
    ax.bar(numbers, before, color=tints, alpha=LIGHT, hatch=hatches or None)
    ax.bar(numbers, kept, color=tints)
    if len(before) and before.max() >= WIDE_RANGE * before.min():
        powers = 2 ** np.arange(int(np.log2(before.max())) + 1)
        ax.set_yscale("log", base=2)
        ax.set_yticks(powers, [str(power) for power in powers])
        ax.set_ylim(0.7, 5 * before.max())
    else:
        ax.set_ylim(0, 1.25 * before.max(initial=1))
    _write_numbers(ax, bars)
    share = f", {100 * kept.sum() / before.sum():.1f} % stay" if before.sum() else ""
    finish(ax, f"channels: {spaced(int(before.sum()))} → {spaced(int(kept.sum()))}{share}", "block", "")
    ax.grid(False, axis="x")
    ax.set_xlim(-0.7, max(len(bars), 1) - 0.3)
    if bars:
        _channel_legend(figure, bars, tints)
    save(figure, path)


def _tints(bars: Sequence[LayerBar]) -> list[str]:
    """Return a colour a bar: grey for no candidate, blue without a chain, else that of its chain."""
    chains = sorted({bar.chain for bar in bars if bar.candidate and bar.chain is not None})
    of_chain: dict[int | None, str] = {chain: COLOURS[1 + number % 5] for number, chain in enumerate(chains)}
    return [of_chain.get(bar.chain, BLUE) if bar.candidate else GREY for bar in bars]


def _write_numbers(ax: Axes, bars: Sequence[LayerBar]) -> None:
    """Write the channels kept of all above every bar, and its block below."""
    look: dict[str, Any] = {"fontsize": 7, "rotation": 90}
    for number, bar in enumerate(bars):
        text = str(bar.before) if bar.kept == bar.before else f"{bar.kept}/{bar.before}"
        ax.annotate(text, (number, bar.before), (0, 3), textcoords="offset points", ha="center", va="bottom", **look)
    ax.set_xticks(range(len(bars)), [str(bar.block) for bar in bars], **look)


def _channel_legend(figure: Figure, bars: Sequence[LayerBar], tints: Sequence[str]) -> None:
    """Say what the looks of the bars mean."""
    from matplotlib.patches import Patch

    dark = "#404040"
    handles = [Patch(color=dark, label="stays"), Patch(color=dark, alpha=LIGHT, label="goes")]
    if any(bar.removed for bar in bars):
        handles.append(Patch(facecolor="none", edgecolor=dark, hatch="////", label="unit removed whole"))
    if any(bar.candidate and bar.chain is None for bar in bars):
        handles.append(Patch(color=BLUE, label="not tied"))
    chains: dict[int, dict[int, str]] = {}
    for bar, tint in zip(bars, tints, strict=True):
        if bar.candidate and bar.chain is not None:
            chains.setdefault(bar.chain, {})[bar.block] = tint
    for _, blocks in sorted(chains.items())[:12]:
        first, *_, last = (*blocks, *blocks)
        handles.append(Patch(color=blocks[first], label=f"{len(blocks)} tied, blocks {first}–{last}"))
    if not all(bar.candidate for bar in bars):
        handles.append(Patch(color=GREY, label="no candidate"))
    columns = int(np.clip(figure.get_figwidth() / 2.1, 4, 8))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


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
    count = len(ranked)
    if not 0 <= removed <= count:
        raise ValueError(f"removed {removed}: there are {count} candidate channels")
    figure, (curve, histogram) = grid(1, 2, (11, 5), sharey=True, width_ratios=(2, 1))
    high = ranked.max(initial=0) or 1.0
    low = max(high / MOST_RANGE, ranked.min(where=ranked > 0, initial=high)) / 2
    drawn, bins, ranks = np.maximum(ranked, low), np.geomspace(low, 2 * high, 60), np.arange(count)
    below = np.zeros(len(bins) - 1)
    for part, name, colour in ((slice(removed), "below the cut", ORANGE), (slice(removed, None), "above", BLUE)):
        curve.fill_between(ranks[part], low, drawn[part], color=colour, alpha=0.3, linewidth=0)
        curve.plot(ranks[part], drawn[part], color=colour, linewidth=2.2)
        look: dict[str, Any] = {"orientation": "horizontal", "fill": True, "color": colour}
        counts = np.histogram(drawn[part], bins)[0]
        label = f"{name}: {spaced(len(drawn[part]))}"
        histogram.stairs(below + counts, bins, baseline=below, label=label, **look)
        below = below + counts
    curve.set(yscale="log", xlim=(0, max(count, 1)), ylim=(low, 2 * high))
    finish(curve, _cut(ranked, removed), "rank of the channel, the weakest first", "|γ|")
    zeros = int((ranked == 0).sum())
    finish(histogram, f"{spaced(zeros)} of the γ are 0" if zeros else "", "channels in each bin", "")
    histogram.set_xlim(0, max(1.1 * below.max(), 1))
    histogram.legend(frameon=False, fontsize=9)
    if removed < count:
        curve.plot(removed, drawn[removed], "o", color="black", markersize=6)
        curve.axvline(removed, color="black", linestyle=":", linewidth=1.2)
        for ax in (curve, histogram):
            ax.axhline(drawn[removed], color="black", linestyle=":", linewidth=1.2)
    save(figure, path)


def _cut(ranked: NDArray[np.float64], removed: int) -> str:
    """Return where the ranking is cut, in numbers."""
    if not len(ranked):
        return "no candidate channels"
    rank = f"cut at rank {spaced(removed)} of {spaced(len(ranked))} ({100 * removed / len(ranked):.1f} %)"
    return f"{rank}, where |γ| = {ranked[removed]:.4g}" if removed < len(ranked) else rank


def plot_noise(layers: Sequence[LayerNoise], path: Path) -> None:
    """Draw a bar a convolution, and the noise that it makes alone as a point, where that was measured.

    Args:
        layers: in the order of the network.
        path: the picture, .png or .jpg; as wide as the network is deep.
    """
    from matplotlib.patches import Patch

    figure, (ax,) = grid(1, 1, (float(np.clip(2.5 + 0.2 * len(layers), 7, 30)), 4.5))
    numbers = np.arange(len(layers))
    values, alone = np.array([(layer.sqnr, layer.alone) for layer in layers], float).reshape(-1, 2).T
    ax.bar(numbers, values, width=0.8, color=[GREY if layer.kept else BLUE for layer in layers])
    handles: list[Artist] = [Patch(color=BLUE, label="its output, all of the network rounded")]
    if any(layer.kept for layer in layers):
        handles.append(Patch(color=GREY, label="the same, weights float"))
    if np.isfinite(alone).any():
        handles += ax.plot(numbers, alone, "D", color=ORANGE, markersize=5, label="the heads, it alone rounded")
    every = max(1, -(-len(layers) // MOST_TICKS))
    ax.set_xticks(numbers[::every], [short_name(layer.name) for layer in layers[::every]], fontsize=7, rotation=90)
    finish(ax, "signal to quantization noise", "block", "SQNR, dB")
    ax.legend(handles=handles, frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 1.02), ncols=3)
    drawn = [*values, *alone, 0.0]
    ax.set(xlim=(-0.7, len(layers) - 0.3), ylim=(np.nanmin(drawn), 1.18 * max(np.nanmax(drawn), 1)))
    save(figure, path)


def plot_pareto(points: Sequence[ParetoPoint], path: Path) -> None:
    """Draw AP50 against each cost, with the front of the networks that no other beats in both.

    Points have numbers; the legend has their names.

    Args:
        points: in the order of the legend; may be empty.
        path: the picture, .png, .jpg or .svg.
    """
    figure, axes = grid(1, len(PANELS), (15, 6), sharey=True)
    families = list(dict.fromkeys(point.family for point in points))
    for ax, (field, label, unit) in zip(axes, PANELS, strict=True):
        costs = [getattr(point, field) / unit for point in points]
        for number, (cost, point) in enumerate(zip(costs, points, strict=True), 1):
            family = families.index(point.family)
            colour, mark = COLOURS[family % len(COLOURS)], MARKERS[family % len(MARKERS)]
            ax.vlines(cost, point.low, point.high, color=colour, linewidth=1.3, alpha=0.7)
            name = f"{number} {short_name(point.name)}"
            ax.plot(cost, point.ap50, mark, color=colour, markersize=7, markeredgecolor="white", label=name)
            ax.annotate(str(number), (cost, point.ap50), (5, 4), textcoords="offset points", fontsize=9)
        if costs and max(costs) >= WIDE_RANGE * min(costs):
            _logarithmic(ax)
        else:
            ax.set_xlim(0, 1.15 * max(costs, default=1))
        best = front(costs, [point.ap50 for point in points])
        x = [*(costs[number] for number in best), ax.get_xlim()[1]]
        y = [points[number].ap50 for number in (*best, *best[-1:])]
        ax.step(x[: len(y)], y, where="post", color=GREY, linewidth=1.4, linestyle=(0, (4, 2)), zorder=1, label="front")
        finish(ax, "", label, "AP50" if ax is axes[0] else "")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    save(figure, path)


def _logarithmic(ax: Axes) -> None:
    """Make the x axis logarithmic, with numbers that are read at once."""
    from matplotlib.ticker import LogLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")


def front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the points that no other beats, by rising cost: each is worth more than all that cost no more.

    Args:
        costs: [N], the less the better.
        values: [N], the more the better; of points that are equal in both the first counts.
    """
    best: list[int] = []
    for number in sorted(range(len(costs)), key=lambda number: (costs[number], -values[number])):
        if not best or values[number] > values[best[-1]]:
            best.append(number)
    return best


def plot_course(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw AP over the epochs of all runs, one after the other; a run without epochs is one mark.

    Args:
        runs: of the document of a report.
        path: the picture, .png, .jpg or .svg.
    """
    figure, (ax,) = grid(1, 1, (10.5, 4.2))
    start = 0.0
    for number, run in enumerate(runs, 1):
        epochs = np.array(run["epochs"].get("epoch") or [1.0], float)
        for key, name, colour in (("map50", "AP50", BLUE), ("map50_95", "AP50-95", ORANGE)):
            label = name if number == 1 else ""
            values = np.array(run["epochs"].get(key) or [run["figures"][key]], float)
            draw_course(ax, start + epochs, values, label, colour)
            chosen = epochs == (run["best_epoch"] or 1.0)
            ax.plot(start + epochs[chosen], values[chosen], "o", color=colour, markersize=7, markeredgecolor="white")
        end = start + epochs.max() + 1
        ax.annotate(str(number), ((start + end) / 2, 1), (0, 5), textcoords="offset points", ha="center", fontsize=9)
        ax.axvline(end, color="#e5e5e5", linewidth=1.2)
        start = end
    finish(ax, "", "epochs of all stages, one after the other; numbers are those of the stages", "average precision")
    ax.grid(False, axis="x")
    ax.set(xlim=(0, start), ylim=(0, 1))
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, path)
