"""Pictures of runs and networks, each written to `path`, which ends in .png, .jpg or .svg.

matplotlib is imported when the first picture is drawn. Figures have their own Agg canvas: no display, no pyplot, no
state that another part of a program could see. Colours are told apart by colour-blind readers, too (Okabe and Ito,
"Color Universal Design", 2008).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.cli import one_line
from utils.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from utils.detection.average_precision import Metrics

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a8a8a"
SKY, PURPLE = "#56b4e9", "#cc79a7"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)
"""Colours of families in their order, then again from the first; chains have five of them, from the second on."""
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
SMALL = 0.01
"""|γ| below which a channel counts as squeezed in the title of `plot_gamma_change`."""
EDGES = np.concatenate([[0.0], np.logspace(-5, 1, 61)])
"""Edges of the bins of gamma_histogram.csv; larger |γ| count in the last one."""
BOUNDS = np.concatenate([[EDGES[1] ** 2 / EDGES[2]], EDGES[1:]])
"""The same as they are drawn: on a logarithmic axis 0 has no place, so its bin is as wide as the next one."""
AP = {"map50": "AP50", "map50_95": "AP50-95"}
"""Columns of average precision, and what they are called."""
PANELS = (("parameters", "million parameters", 1e6), ("macs", "GMACs", 1e9), ("ms", "ms an image", 1.0))
"""Field of a point, title of the axis, and its unit."""
Columns = Mapping[str, Sequence[float] | NDArray[np.floating]]
"""Columns of a table of epochs, by name; NaN where an epoch has no value."""


class LayerBar(NamedTuple):
    """A convolution before and after pruning."""

    block: int
    """Number of its block in the network before."""
    before: int
    """Its channels before."""
    after: int
    """Its channels after."""
    chain: int | None
    """Number of the residual chain that ties it; None for none."""
    candidate: bool
    """The strategy may remove its channels."""
    removed: bool
    """The residual unit that it belongs to was removed whole."""


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


def _draw_courses(
    ax: Axes, title: str, courses: Mapping[str, tuple[ArrayLike, ArrayLike]], marked: float | None, label: str
) -> None:
    """Draw a panel of columns, (epochs, values) by name, and a vertical line at the epoch `marked`."""
    for (name, (epochs, values)), colour in zip(courses.items(), colours(len(courses)), strict=True):
        draw_course(ax, epochs, values, name, colour)
    if marked is not None:
        ax.axvline(marked, color="black", linestyle=":", linewidth=1.2, label=label)
    finish(ax, title, "epoch", "")
    whole_epochs(ax)
    if title.startswith(("precision", "average", "share")):
        ax.set_ylim(0, 1)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def whole_epochs(ax: Axes) -> None:
    """Put ticks of the x axis at whole numbers."""
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # of a MaxNLocator


def _name_ticks(ax: Axes, names: Sequence[str]) -> None:
    """Write class names along the x axis if they are few."""
    if len(names) <= MOST_NAMED + 1:
        ax.set_xticks(range(len(names)), list(map(short_name, names)), rotation=60, ha="right", fontsize=8)


def plot_results(results: Columns, path: Path, best_epoch: int | None = None) -> None:
    """Draw the columns of results.csv over the epochs: losses, learning rates, P, R and F1, AP.

    `best_epoch` is marked by a vertical line. Columns of other names are not drawn.
    """
    panels = (
        ("loss", [name for name in results if "loss" in name]),
        ("learning rate", [name for name in results if name.startswith("lr")]),
        ("precision, recall, F1", [name for name in ("precision", "recall", "f1") if name in results]),
        ("average precision", [name for name in AP if name in results]),
    )
    figure, axes = grid(2, 2, (12, 7))
    for (title, names), ax in zip(panels, axes, strict=True):
        courses = {AP.get(name, name): (results["epoch"], results[name]) for name in names}
        _draw_courses(ax, title, courses, best_epoch, f"best epoch: {best_epoch}")
    save(figure, path)


def plot_gamma_change(before: ArrayLike, after: ArrayLike, path: Path) -> None:
    """Draw the histograms of |γ| before and after a sparse training, [B] channels in each bin of EDGES."""
    figure, (ax,) = grid(1, 1, (9, 4.8))
    shares = []
    for counts, name, colour, hatch in ((before, "before", BLUE, ""), (after, "after", ORANGE, "////")):
        count = int(np.sum(counts))
        ax.stairs(counts, BOUNDS, fill=True, alpha=0.3, color=colour, hatch=hatch)
        ax.stairs(counts, BOUNDS, color=colour, linewidth=1.6, label=f"{name}, {spaced(count)} γ")
        shares.append(f"{100 * np.sum(counts, where=EDGES[:-1] < 0.999 * SMALL) / count:.1f} %" if count else "–")
    finish(ax, f"|γ| below {SMALL:g}: {shares[0]} before → {shares[1]} after", "|γ|", "channels in each bin")
    ax.axvline(SMALL, color="black", linestyle=":", linewidth=1.2)
    ax.set_xscale("log")
    ax.set(xlim=(BOUNDS[0], BOUNDS[-1]), ylim=(0, None if np.any(before) or np.any(after) else 1))
    _name_zero(ax.xaxis)
    ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.27, 1))
    save(figure, path)


def plot_gamma_epochs(epochs: Sequence[float], counts: ArrayLike, path: Path, turn: float | None = None) -> None:
    """Draw the histograms of |γ| as columns of a map, an epoch each.

    Args:
        epochs: [E], increasing, at least one.
        counts: [E, B], channels in each bin of EDGES.
        path: the picture.
        turn: epoch where the schedule turns; a dotted line.
    """
    figure, (ax,) = grid(1, 1, (9, 4.8))
    counts = np.asarray(counts, float)
    sides = np.append(epochs, epochs[-1] + 1) - 0.5
    colours_of_counts = ax.pcolormesh(sides, BOUNDS, counts.T, cmap="Blues", vmin=0)
    figure.colorbar(colours_of_counts, ax=ax, label="channels in each bin")
    finish(ax, f"|γ| of {spaced(int(counts[-1].sum()))} channels over the epochs", "epoch", "|γ|")
    ax.grid(False)
    ax.set_yscale("log")
    _name_zero(ax.yaxis)
    whole_epochs(ax)
    if turn is not None:
        ax.axvline(turn, color=RED, linestyle=":", linewidth=1.2, label="rate turns")
        ax.legend(frameon=False, fontsize=9, loc="lower left")
    save(figure, path)


def _name_zero(axis: Axis) -> None:
    """Write powers of ten along a logarithmic axis of |γ|, and what the lowest bin holds."""
    powers = [10.0**n for n in range(-4, 2)]
    labels = [f"< {EDGES[1]:g}", *(f"{power:g}" for power in powers)]
    axis.set_ticks([np.sqrt(BOUNDS[0] * BOUNDS[1]), *powers], labels)
    axis.set_ticks([], minor=True)


def plot_sparse_course(
    results: Columns, shares: Columns, pressure: Columns, path: Path, turn: float | None = None
) -> None:
    """Draw accuracy over the epochs of a sparse training; below it how many γ have fallen, and what s = auto did.

    Args:
        results: columns of results.csv.
        shares: `epoch`, and by the limit, e.g. `0.01`, the share of the γ whose magnitude is below it.
        pressure: columns of pressure.csv; empty without s = auto.
        path: the picture.
        turn: epoch where the schedule turns; a dotted line.
    """
    small = "share of the γ that are small"
    panels: dict[str, dict[str, tuple[ArrayLike, ArrayLike]]] = {
        "average precision": {AP[key]: (results["epoch"], results[key]) for key in AP if key in results},
        small: {f"|γ| < {limit}": (shares["epoch"], shares[limit]) for limit in shares if limit != "epoch"},
    }
    if pressure:
        for name, column in (("weak", "weak"), ("weak by the plan", "plan")):
            panels[small][name] = (pressure["epoch"], pressure[column])
        panels["pressure on the γ that are not weak"] = {"s": (pressure["epoch"], pressure["s"])}
    figure, axes = grid(len(panels), 1, (9, 1.4 + 2.8 * len(panels)), sharex=True)
    for ax, (title, courses) in zip(axes, panels.items(), strict=True):
        _draw_courses(ax, title, courses, turn, "rate turns")
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
        path: the picture.
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
        path: the picture.
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
        finish(ax, title, f"{measures[0]} / image width", f"{measures[1]} / image height")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    middle.invert_yaxis()
    save(figure, path)


def plot_pr_curve(metrics: Metrics, path: Path) -> None:
    """Draw precision against recall at IoU 0.5, a line a class and a thick one for their mean."""
    labels = [f"{short_name(c.name)} {c.ap50:.3f}" for c in metrics.per_class]
    curves, mean = metrics.curves, f"all classes {metrics.map50:.3f}"
    titles = ("precision and recall at IoU 0.5", "recall", "precision")
    _draw_curves(curves.recall_points, curves.envelope, labels, mean, titles, path)


def plot_f1_curve(metrics: Metrics, path: Path) -> None:
    """Draw F1 at IoU 0.5 over the confidence threshold, a line a class and a thick one for their mean."""
    labels = [short_name(c.name) for c in metrics.per_class]
    curves, mean = metrics.curves, f"all classes {metrics.f1:.3f} at {metrics.confidence:.3f}"
    _draw_curves(curves.confidence, curves.f1, labels, mean, ("F1 at IoU 0.5", "confidence threshold", "F1"), path)


def _draw_curves(
    x: NDArray[np.floating],
    lines: NDArray[np.floating],
    labels: Sequence[str],
    mean_label: str,
    titles: tuple[str, str, str],
    path: Path,
) -> None:
    """Draw one line of `lines` [K, len(x)] a class, named if they are few, and their mean."""
    figure, (ax,) = grid(1, 1, (9, 6))
    finish(ax, *titles)
    ax.set(xlim=(0, 1), ylim=(0, 1.01))
    for line, label, colour in zip(lines, labels, colours(len(labels)), strict=True):
        if len(labels) <= MOST_NAMED:
            ax.plot(x, line, color=colour, linewidth=1, alpha=0.9, label=label)
        else:
            ax.plot(x, line, color=GREY, linewidth=1, alpha=0.3)
    if len(lines):
        ax.plot(x, np.mean(lines, axis=0), color="black", linewidth=2.5, label=mean_label)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    save(figure, path)


def plot_confusion(matrix: NDArray[np.integer], names: Sequence[str], path: Path) -> None:
    """Draw which class was taken for which: counts, and by colour the shares of the objects of each true class.

    Args:
        matrix: [C + 1, C + 1] counts, true class by predicted class. The last column holds the objects that were
            missed, the last row the detections where there is nothing, as shares of all such detections.
        names: of the C classes.
        path: the picture.
    """
    matrix = np.asarray(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = float(np.clip(3 + 0.45 * len(matrix), 5, 16))
    figure, (ax,) = grid(1, 1, (side + 1, side))
    image = ax.imshow(np.where(matrix > 0, shares, np.nan), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, shrink=0.8, label="share of the row")
    finish(ax, "objects at IoU 0.45, confidence 0.25", "predicted", "true")
    ax.grid(False)
    _name_ticks(ax, [*names, "background"])
    if len(names) <= MOST_NAMED:
        ax.set_yticks(range(len(matrix)), [*map(short_name, names), "background"], fontsize=8)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.6 else "black"
            ax.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=colour)
    save(figure, path)


def plot_channels(bars: Sequence[LayerBar], path: Path) -> None:
    """Draw one bar a convolution of a network: the channels before, light, and over them those that stay."""
    figure, (ax,) = grid(1, 1, (float(np.clip(2.5 + 0.2 * len(bars), 7, 30)), 5))
    numbers = np.arange(len(bars))
    before, kept = np.array([(bar.before, bar.after) for bar in bars], int).reshape(-1, 2).T
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
        _channel_legend(figure, bars)
    save(figure, path)


def _chain_colours(bars: Sequence[LayerBar]) -> dict[int | None, str]:
    """Return a colour for each chain of candidates."""
    chains = sorted({bar.chain for bar in bars if bar.candidate and bar.chain is not None})
    return {chain: COLOURS[1 + number % 5] for number, chain in enumerate(chains)}


def _tints(bars: Sequence[LayerBar]) -> list[str]:
    """Return a colour a bar: grey for no candidate, blue without a chain, else that of its chain."""
    of_chain = _chain_colours(bars)
    return [of_chain.get(bar.chain, BLUE) if bar.candidate else GREY for bar in bars]


def _write_numbers(ax: Axes, bars: Sequence[LayerBar]) -> None:
    """Write the channels kept of all above every bar, and its block below."""
    look: dict[str, Any] = {"fontsize": 7, "rotation": 90}
    for number, bar in enumerate(bars):
        text = str(bar.before) if bar.after == bar.before else f"{bar.after}/{bar.before}"
        ax.annotate(text, (number, bar.before), (0, 3), textcoords="offset points", ha="center", va="bottom", **look)
    ax.set_xticks(range(len(bars)), [str(bar.block) for bar in bars], **look)


def _channel_legend(figure: Figure, bars: Sequence[LayerBar]) -> None:
    """Say what the looks of the bars mean."""
    from matplotlib.patches import Patch

    dark = "#404040"
    handles = [Patch(color=dark, label="stays"), Patch(color=dark, alpha=LIGHT, label="goes")]
    if any(bar.removed for bar in bars):
        handles.append(Patch(facecolor="none", edgecolor=dark, hatch="////", label="unit removed whole"))
    if any(bar.candidate and bar.chain is None for bar in bars):
        handles.append(Patch(color=BLUE, label="not tied"))
    for chain, colour in list(_chain_colours(bars).items())[:12]:
        blocks = [bar.block for bar in bars if bar.candidate and bar.chain == chain]
        handles.append(Patch(color=colour, label=f"{len(blocks)} tied, blocks {blocks[0]}–{blocks[-1]}"))
    if not all(bar.candidate for bar in bars):
        handles.append(Patch(color=GREY, label="no candidate"))
    columns = int(np.clip(figure.get_figwidth() / 2.1, 4, 8))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def plot_threshold(scores: ArrayLike, removed: int, path: Path) -> None:
    """Draw the candidate channels from the weakest to the strongest, their histogram, and where the ranking is cut.

    Args:
        scores: [N], |γ| of every candidate channel, in any order; N may be 0.
        removed: rank of the cut, 0 to N: how many of the weakest go, before chains are merged and layers get a floor.
        path: the picture.
    """
    ranked = np.sort(np.asarray(scores, float).ravel())
    count = len(ranked)
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


def plot_noise(layers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a bar a convolution, and the noise that it makes alone as a point, where that was measured.

    `layers` are those of quantize.json: `bits` is 32 where weights are float, `sqnr_db` None where nothing was changed.
    """
    from matplotlib.patches import Patch

    figure, (ax,) = grid(1, 1, (float(np.clip(2.5 + 0.2 * len(layers), 7, 30)), 4.5))
    numbers, is_float = np.arange(len(layers)), [layer["bits"] == 32 for layer in layers]
    values, alone = (np.array([layer[key] for layer in layers], float) for key in ("sqnr_db", "alone_db"))
    ax.bar(numbers, values, width=0.8, color=[GREY if kept else BLUE for kept in is_float])
    handles: list[Artist] = [Patch(color=BLUE, label="its output, all of the network rounded")]
    if any(is_float):
        handles.append(Patch(color=GREY, label="the same, weights float"))
    if np.isfinite(alone).any():
        handles += ax.plot(numbers, alone, "D", color=ORANGE, markersize=5, label="the heads, it alone rounded")
    every = max(1, -(-len(layers) // MOST_TICKS))
    ax.set_xticks(numbers[::every], [str(layer["block"]) for layer in layers[::every]], fontsize=7, rotation=90)
    finish(ax, "signal to quantization noise", "block", "SQNR, dB")
    ax.legend(handles=handles, frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 1.02), ncols=3)
    drawn = [*values, *alone, 0.0]
    ax.set(xlim=(-0.7, len(layers) - 0.3), ylim=(np.nanmin(drawn), 1.18 * max(np.nanmax(drawn), 1)))
    save(figure, path)


def plot_pareto(points: Sequence[Mapping[str, Any]], path: Path, program: str | None = None) -> None:
    """Draw AP50 against each cost, with the front of the networks that no other beats in both.

    Args:
        points: those of `baselines` in the document of a report, with a `number`, which stands beside the point, and a
            `family`, which shares a colour and a mark. A point without a cost is left out of its panel.
        path: the picture.
        program: that the times are of.
    """
    figure, axes = grid(1, len(PANELS), (15, 6), sharey=True)
    families = list(dict.fromkeys(point["family"] for point in points))
    for ax, (field, label, unit) in zip(axes, PANELS, strict=True):
        known = [point for point in points if point[field] is not None]
        costs = [point[field] / unit for point in known]
        for cost, point in zip(costs, known, strict=True):
            family = families.index(point["family"])
            colour, mark = COLOURS[family % len(COLOURS)], MARKERS[family % len(MARKERS)]
            ax.vlines(cost, point["low"], point["high"], color=colour, linewidth=1.3, alpha=0.7)
            name = f"{point['number']} {short_name(point['name'])}"
            ax.plot(cost, point["map50"], mark, color=colour, markersize=7, markeredgecolor="white", label=name)
            ax.annotate(str(point["number"]), (cost, point["map50"]), (5, 4), textcoords="offset points", fontsize=9)
        if costs and max(costs) >= WIDE_RANGE * min(costs):
            _logarithmic(ax)
        else:
            ax.set_xlim(0, 1.15 * max(costs, default=1))
        best = front(costs, [point["map50"] for point in known])
        x = [*(costs[number] for number in best), ax.get_xlim()[1]]
        y = [known[number]["map50"] for number in (*best, *best[-1:])]
        ax.step(x[: len(y)], y, where="post", color=GREY, linewidth=1.4, linestyle=(0, (4, 2)), zorder=1, label="front")
        finish(ax, "", f"{label}, {program}" if program and field == "ms" else label, "AP50" if ax is axes[0] else "")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(low, 0), min(high, 1))
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
    """Draw AP over the epochs of all runs of a report's document in turn; a run without epochs is one mark."""
    figure, (ax,) = grid(1, 1, (10.5, 4.2))
    start = 0.0
    for number, run in enumerate(runs, 1):
        epochs = np.array(run["epochs"].get("epoch") or [1.0], float)
        for (key, name), colour in zip(AP.items(), (BLUE, ORANGE), strict=True):
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
