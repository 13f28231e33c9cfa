"""What all pictures have in common: colours, panels, names that fit, and the file.

matplotlib is imported when the first figure is made. Figures have their own Agg canvas: no display, no pyplot, no
state that another part of a program could see.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.cli import one_line
from utils.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a8a8a"
SKY, PURPLE = "#56b4e9", "#cc79a7"
"""Told apart by colour-blind readers, too (Okabe and Ito, "Color Universal Design", 2008)."""
MOST_NAMED = 30
"""Classes that a legend or an axis names one by one; more are drawn without names."""


def grid(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches with its panels, row by row; `layout` as of matplotlib's `Figure.subplots`."""
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
    """A name as matplotlib shows it: at most 24 characters, no mathematics, not left out for a leading underscore."""
    text = one_line(text)
    text = text if len(text) <= 24 else text[:23] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def spaced(number: int) -> str:
    """An integer with its thousands apart, as in the tables."""
    return f"{number:,}".replace(",", " ")


def colours(count: int) -> list[str | tuple[float, ...]]:
    """As many colours that are told apart."""
    if count <= 4:
        return [BLUE, ORANGE, GREEN, RED][:count]
    from matplotlib import colormaps

    return [colormaps["turbo"](share) for share in np.linspace(0.05, 0.95, count)]


def name_ticks(ax: Axes, names: Sequence[str]) -> None:
    """Class names along the x axis if they are few."""
    if len(names) <= MOST_NAMED + 1:
        ax.set_xticks(range(len(names)), list(map(short_name, names)), rotation=60, ha="right", fontsize=8)


def draw_course(ax: Axes, epochs: Sequence[float], values: Sequence[float], name: str, colour: Any) -> None:
    """One column over the epochs it has values for; a lone value is seen by its mark."""
    x, y = np.asarray(epochs, float), np.asarray(values, float)
    known = np.isfinite(y)
    ax.plot(
        x[known], y[known], color=colour, linewidth=1.6, marker="." if known.sum() <= 30 else "", label=short_name(name)
    )
