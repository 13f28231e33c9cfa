"""Pictures of a run: the course of training, the labels, precision against recall, F1, the confusion matrix.

matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from utils.report.figures import (
    BLUE,
    GREY,
    MOST_NAMED,
    RED,
    colours,
    draw_course,
    finish,
    grid,
    name_ticks,
    save,
    short_name,
)

if TYPE_CHECKING:
    from utils.detection.average_precision import Metrics

MOST_POINTS = 20_000
"""Boxes drawn in the scatter plots of the labels; of more, every n-th."""


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
        ax.xaxis.get_major_locator().set_params(integer=True)
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
        columns: what each trial took, by name.
        path: the picture, .png or .jpg.
        logarithmic: names of columns that are drawn over their logarithms.
    """
    across = 4
    down = -(-(len(columns) + 1) // across)
    figure, (course, *panels) = grid(down, across, (3.6 * across, 2.8 * down))
    best = int(np.argmax(values))
    course.step(numbers, np.maximum.accumulate(values), where="post", color=GREY, linewidth=1)
    drawn = [(course, "trial", numbers), *((ax, *column) for ax, column in zip(panels, columns.items(), strict=False))]
    for ax, name, found in drawn:
        ax.scatter(found, values, s=14, color=BLUE, linewidths=0, alpha=0.7)
        ax.scatter(found[best], values[best], s=45, color=RED, marker="D")
        if name in logarithmic:
            ax.set_xscale("log")
            ax.tick_params(axis="x", which="minor", labelbottom=False)
        finish(ax, f"{name}, best {found[best]:.4g}", "", "fitness")
    course.xaxis.get_major_locator().set_params(integer=True)
    for ax in panels[len(columns) :]:
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
    labels = np.asarray(labels, np.float64).reshape(-1, 5)
    counts = np.bincount(labels[:, 0].astype(int), minlength=len(names))
    left.bar(range(len(counts)), counts, color=BLUE, width=0.8)
    finish(left, f"boxes of each class, {len(labels)} in all", "", "")
    name_ticks(left, names)
    few = labels[:: max(1, -(-len(labels) // MOST_POINTS))]
    marks = {"s": 5, "alpha": float(np.clip(300 / max(len(few), 1), 0.05, 0.6)), "color": BLUE, "linewidths": 0}
    middle.scatter(few[:, 1], few[:, 2], **marks)
    finish(middle, "box centres", "x / picture width", "y / picture height")
    right.scatter(few[:, 3], few[:, 4], **marks)
    finish(right, "box sizes", "width / picture width", "height / picture height")
    for ax in (middle, right):
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    middle.invert_yaxis()
    save(figure, path)


def plot_pr_curve(metrics: Metrics, path: Path) -> None:
    """Draw precision against recall at IoU 0.5, a line a class and a thick one for their mean."""
    curves = metrics.curves
    labels = [f"{short_name(c.name)} {c.ap50:.3f}" for c in metrics.per_class]
    mean = f"all classes {metrics.map50:.3f}"
    _plot_curves(path, "precision and recall at IoU 0.5", "recall", "precision",
                 curves.recall_points, curves.envelope, labels, mean)  # fmt: skip


def plot_f1_curve(metrics: Metrics, path: Path) -> None:
    """Draw F1 at IoU 0.5 over the confidence threshold, a line a class and a thick one for their mean."""
    curves = metrics.curves
    labels = [short_name(c.name) for c in metrics.per_class]
    mean = f"all classes {metrics.f1:.3f} at {metrics.confidence:.3f}"
    _plot_curves(path, "F1 at IoU 0.5", "confidence threshold", "F1", curves.confidence, curves.f1, labels, mean)


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
    name_ticks(ax, [*names, "background"])
    if len(names) <= MOST_NAMED:
        ax.set_yticks(range(len(matrix)), [*map(short_name, names), "background"], fontsize=8)
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            value = shares[row, column]
            colour = "white" if value > 0.6 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    save(figure, path)


def _plot_curves(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    x: NDArray[np.floating],
    lines: NDArray[np.floating],
    labels: Sequence[str],
    mean_label: str,
) -> None:
    """One line of `lines` [K, len(x)] a class, named if they are few, and their mean."""
    figure, (ax,) = grid(1, 1, (9, 6))
    named = len(labels) <= MOST_NAMED
    for line, label, colour in zip(lines, labels, colours(len(labels)), strict=True):
        ax.plot(x, line, color=colour if named else GREY, linewidth=1, alpha=0.9 if named else 0.3,
                label=label if named else None)  # fmt: skip
    if len(lines):
        ax.plot(x, np.mean(lines, axis=0), color="black", linewidth=2.5, label=mean_label)
    finish(ax, title, x_label, y_label)
    ax.set(xlim=(0, 1), ylim=(0, 1.01))
    if len(lines):
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    save(figure, path)
