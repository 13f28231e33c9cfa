"""Plots of a report as <svg> that takes its ink from the page, so that it is readable on a light and a dark ground.

The suite's plots are drawn as SVG with their letters as text; black, white and the colours of rules become CSS
variables of the page, ids get a prefix of their own, and what would name an address is left out.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.report.figures import BLUE, GREY, ORANGE, SKY, colours, draw_course, finish, grid, save, short_name
from utils.report.journey.content import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from utils.report.journey.stages import Stage

INKS = {
    "#000000": "--ink",
    "#ffffff": "--ground",
    "#e5e5e5": "--rule",
    "#404040": "--soft",
    BLUE: "--blue",
    SKY: "--sky",
}
"""Colours of the plots that stand for ink and paper, and their CSS variables."""
LONE = 6.0
"""Epochs that a stage without epochs is as wide as."""
TRAINING = 10.0, 25.0
"""Epochs that a training is as wide as at least and at most."""
COURSE_INCHES, LETTERS_AN_INCH = 10.5, 11.0
"""Width of the plot of the course, and how many letters of a name go into an inch of it."""
PIXELS_A_POINT = 1.3
"""Largest scale: letters of 10 points are 13 pixels high."""


def drawing(name: str, draw: Callable[[Path], object], caption: str, words: str, least_width: int = 560) -> Drawing:
    """A plot as a block; `name` is unlike that of any other plot of the page."""
    return Drawing(as_svg(draw, name), f"{caption} {words}", caption, least_width)


def as_svg(draw: Callable[[Path], object], prefix: str) -> str:
    """What `draw` writes to a path, as one <svg> element for a page; `prefix` begins its ids."""
    import matplotlib

    style = {"svg.fonttype": "none", "svg.hashsalt": prefix, "savefig.transparent": True, "svg.image_inline": True}
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(style):
        path = Path(folder) / "plot.svg"
        draw(path)
        return for_page(path.read_text(encoding="utf-8"), prefix)


def for_page(text: str, prefix: str) -> str:
    """An SVG document of matplotlib as an element of a page."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)[1]
    width = float(box.split()[2])
    body = re.sub(r'\b(id=")', rf"\g<1>{prefix}-", body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}-', body)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r"font: ((?:\w+ )*[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", body)
    for colour, variable in INKS.items():
        body = re.sub(rf"{colour}\b", f"var({variable})", body, flags=re.IGNORECASE)
    body = re.sub(r'<style type="text/css">.*?</style>', "", body, flags=re.DOTALL)
    body = re.sub(r"[ \t]*\n[ \t]*", "\n", body)
    look = f"max-width: {PIXELS_A_POINT * width:.0f}px"
    return f'<svg viewBox="{box}" style="{look}" class="plot" role="img" aria-label="">{body.strip()}'


def plot_course(stages: Mapping[int, Stage], path: Path) -> None:
    """Draw AP over the epochs of all stages, one after the other; a stage without epochs is one mark.

    Args:
        stages: by their numbers, in their order, with accuracies or results; at least one.
        path: the picture.
    """
    figure, (ax,) = grid(1, 1, (COURSE_INCHES, 4.2))
    begin, whole = 0.0, sum(map(_width, stages.values()))
    places: list[float] = []
    epochs: list[str] = []
    for number, stage in stages.items():
        width = _width(stage)
        ticks = _draw_stage(ax, stage, begin, width, named=not begin)
        places += ticks.values()
        epochs += ticks
        name, room = f"{number} {short_name(stage.path.name)}", width / whole * COURSE_INCHES * LETTERS_AN_INCH
        ax.annotate(name if len(name) <= room else str(number), (begin + width / 2, 1), (0, 5), fontsize=9,
                    xycoords=("data", "axes fraction"), textcoords="offset points", ha="center")  # fmt: skip
        begin += width
        if begin < whole:
            ax.axvline(begin, color="#e5e5e5", linewidth=1.2)
    first = next((stage.figures.map50 for stage in stages.values() if stage.figures.map50 is not None), None)
    if first is not None:
        ax.axhline(first, color=GREY, linestyle=":", linewidth=1.2, label="AP50 of the first")
    finish(ax, "", "epochs of each stage", "average precision")
    ax.grid(False, axis="x")
    ax.set(xlim=(0, whole), ylim=(0, 1))
    ax.set_xticks(places, epochs, fontsize=8)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, path)


def _width(stage: Stage) -> float:
    """How wide a stage is drawn: a long training is not as much wider as it is longer."""
    epochs = stage.results.get("epoch")
    return float(np.clip(max(epochs), *TRAINING)) if epochs else LONE


def _draw_stage(ax: Axes, stage: Stage, begin: float, width: float, *, named: bool) -> dict[str, float]:
    """One stage from `begin` on; returns where its first and its last epoch are."""
    epochs = np.asarray(stage.results.get("epoch", ()), float)
    x = begin + width * epochs / (epochs.max(initial=0) + 1)
    for key, name, colour in (("map50", "AP50", BLUE), ("map50_95", "AP50-95", ORANGE)):
        label = name if named else "_nolegend_"
        if stage.results.get(key):
            y = np.asarray(stage.results[key], float)
            known = np.isfinite(y)
            ax.plot(x[known], y[known], color=colour, linewidth=1.8, marker=".", markersize=5, label=label)
            chosen = epochs == stage.best_epoch
            ax.plot(x[chosen], y[chosen], "o", color=colour, markersize=7, markeredgecolor="white")
        elif (value := getattr(stage.figures, key)) is not None:
            ax.plot(begin + width / 2, value, "D", color=colour, markersize=7, markeredgecolor="white", label=label)
    return {f"{epochs[place]:g}": float(x[place]) for place in ((0, -1) if len(epochs) else ())}


def plot_recovery(stages: Sequence[Stage], before: float | None, start: float | None, path: Path) -> None:
    """Draw AP50 of several trainings that began with the same network over their epochs, in one panel.

    Args:
        stages: with results.csv.
        before: AP50 before the compression, a dotted line.
        start: AP50 of the network that they began with, at epoch 0.
        path: the picture.
    """
    figure, (ax,) = grid(1, 1, (8.5, 4.2))
    for stage, colour in zip(stages, colours(len(stages)), strict=True):
        head = ([0.0], [start]) if start is not None else ([], [])
        epochs, values = ([*one, *other] for one, other in
                          zip(head, (stage.results["epoch"], stage.results["map50"]), strict=True))  # fmt: skip
        draw_course(ax, epochs, values, stage.name, colour)
    if before is not None:
        ax.axhline(before, color=GREY, linestyle=":", linewidth=1.2, label="before")
    finish(ax, "", "epoch", "AP50")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, path)
