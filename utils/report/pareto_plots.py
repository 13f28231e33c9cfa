"""A picture of what accuracy costs: AP50 of several networks against their parameters, multiply-adds and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from utils.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, finish, grid, save, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

PANELS = (("parameters", "million parameters", 1e6), ("macs", "GMACs", 1e9), ("ms", "ms a picture", 1))
"""Field of a point, what the axis is called, and its unit."""
FAMILY_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, "#000000")
FAMILY_MARKERS = "os^DvPX*"
"""Of the families in their order, then again from the first; as the numbers of both differ, 56 families do."""
WIDE_RANGE = 5
"""Ratio of the largest cost to the smallest from which on the axis is logarithmic."""
LABEL_SIZE = 7.5
SAVED_DPI = 120
"""Of `figures.save`; at another, text would be a little wider or narrower than what it is placed by."""
MARK = 10
"""Pixels around the middle of a mark that a label should leave free."""
THIN = 2
"""The same around lines."""
LABEL_ROOM = (-4, -1, 4, 1)
"""The same around the name of another point: left, below, right, above."""
RADII = (13, 22, 34, 48, 64, 84)
"""Pixels between a mark and its label, the nearest first; from the second on a line leads from one to the other."""
ANGLES = (0, 180, 45, 315, 135, 225, 90, 270)
"""Directions of a label from its mark in degrees, the best first."""


@dataclass(frozen=True)
class ParetoPoint:
    """One network."""

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


def plot_pareto(points: Sequence[ParetoPoint], path: Path, size: tuple[float, float] = (16, 6)) -> None:
    """Draw AP50 against each cost, with the front of the networks that no other beats in both.

    Args:
        points: in the order of the legend; may be empty.
        path: the picture, .png or .jpg.
        size: its width and height, inches.
    """
    figure, axes = grid(1, len(PANELS), size, sharey=True)
    corners: list[Floats] = []
    for ax, (field, label, unit) in zip(axes, PANELS, strict=True):
        costs = np.array([getattr(point, field) / unit for point in points], float)
        _cost_axis(ax, costs)
        corners.append(_stairs(costs, np.array([point.ap50 for point in points], float), ax.get_xlim()[1]))
        ax.plot(*corners[-1].T, color=GREY, linewidth=1.4, linestyle=(0, (4, 2)), zorder=1, label="front")
        _draw_points(ax, costs, points)
        finish(ax, "", label, "AP50" if ax is axes[0] else "")
    if points:
        _accuracy_axis(axes[0], points)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    figure.set_dpi(SAVED_DPI)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in pixels: nothing may move any more
    for ax, (field, _, unit), line in zip(axes, PANELS, corners, strict=True):
        _name_points(ax, [getattr(point, field) / unit for point in points], points, line)
    save(figure, path)


def front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Places of the points that no other beats, by rising cost: each is worth more than all that cost no more.

    Args:
        costs: [N], the less the better.
        values: [N], the more the better; of points that are equal in both the first counts.
    """
    found: list[int] = []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], -values[place])):
        if not found or values[place] > values[found[-1]]:
            found.append(place)
    return found


def _cost_axis(ax: Axes, costs: Floats) -> None:
    """Logarithmic where costs differ much, else from 0, with room at the sides for labels."""
    low, high = (costs.min(), costs.max()) if len(costs) else (0.5, 1.0)
    if high < WIDE_RANGE * low:
        ax.set_xlim(0, 1.15 * high)
        return
    from matplotlib.ticker import FuncFormatter, LogLocator

    room = (high / low) ** 0.12
    ax.set_xscale("log")
    ax.set_xlim(low / room, high * room)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    ax.xaxis.set_minor_formatter("")


def _accuracy_axis(ax: Axes, points: Sequence[ParetoPoint]) -> None:
    """From the lowest to the highest end of the intervals, with room for labels."""
    low = min(min(point.low, point.ap50) for point in points)
    high = max(max(point.high, point.ap50) for point in points)
    room = max(0.08 * (high - low), 0.01)
    ax.set_ylim(low - room, high + room)


def _stairs(costs: Floats, values: Floats, right: float) -> Floats:
    """Corners [2 N, 2] of the line of the best value at every cost up to `right`, N points being on the front."""
    places = front(costs.tolist(), values.tolist())
    x, y = np.append(costs[places], right), values[places]
    return np.column_stack([np.column_stack([x[:-1], x[1:]]).ravel(), np.repeat(y, 2)])


def _draw_points(ax: Axes, costs: Floats, points: Sequence[ParetoPoint]) -> None:
    """Marks by family, and the intervals."""
    for number, family in enumerate(dict.fromkeys(point.family for point in points)):
        own = [place for place, point in enumerate(points) if point.family == family]
        colour = FAMILY_COLOURS[number % len(FAMILY_COLOURS)]
        marker = FAMILY_MARKERS[number % len(FAMILY_MARKERS)]
        ends = np.array([(points[place].low, points[place].high) for place in own]).T
        ax.vlines(costs[own], *ends, color=colour, linewidth=1.3, alpha=0.7, zorder=2)
        for end in ends:
            ax.plot(costs[own], end, "_", color=colour, markersize=7, alpha=0.7, zorder=2)
        values = [points[place].ap50 for place in own]
        ax.plot(costs[own], values, marker, color=colour, markersize=7, markeredgecolor="white",
                label=short_name(family), zorder=3)  # fmt: skip


def _name_points(ax: Axes, costs: Sequence[float], points: Sequence[ParetoPoint], line: Floats) -> None:
    """Write each name where it covers the least of marks, intervals, the corners [N, 2] of a line, and other names."""
    if not points:
        return
    in_pixels, values = ax.transData.transform, np.array([(point.ap50, point.low, point.high) for point in points])
    marks, lows, highs = (in_pixels(np.column_stack([costs, ends])) for ends in values.T)
    corners = in_pixels(line)
    taken = [*_boxes(marks, marks, MARK), *_boxes(lows, highs, THIN), *_boxes(corners[:-1], corners[1:], THIN)]
    frame, points_a_pixel = np.array(ax.bbox.extents), 72 / ax.figure.dpi
    for mark, cost, point in zip(marks, costs, points, strict=True):
        text = ax.annotate(short_name(point.name), (cost, point.ap50), fontsize=LABEL_SIZE)
        size = np.array(text.get_window_extent().size)
        text.remove()
        box, radius = _freest(mark, size, np.array(taken), frame)
        taken.append(box + LABEL_ROOM)
        offset = ((box[:2] + box[2:]) / 2 - mark) * points_a_pixel
        leader = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(short_name(point.name), (cost, point.ap50), offset, textcoords="offset points", ha="center",
                    va="center", fontsize=LABEL_SIZE, zorder=4, arrowprops=leader if radius > RADII[0] else None
        )  # fmt: skip


def _boxes(ends: Floats, others: Floats, room: float) -> Floats:
    """[N, 4], x1, y1, x2, y2 of straight lines between ends [N, 2], with room around them."""
    return np.hstack([np.minimum(ends, others) - room, np.maximum(ends, others) + room])


def _freest(mark: Floats, size: Floats, taken: Floats, frame: Floats) -> tuple[Floats, int]:
    """The box of a label [x1, y1, x2, y2] that overlaps least, and its distance; the first of equal ones.

    Args:
        mark: [2], pixels.
        size: [2], width and height of the label.
        taken: [N, 4], boxes that should stay free.
        frame: [4], the panel; what sticks out of it counts ten times.
    """
    best, least = None, math.inf
    for radius, angle in product(RADII, ANGLES):
        way = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))]).round(6)
        start = mark + radius * way + (np.sign(way) - 1) / 2 * size
        box = np.concatenate([start, start + size])
        covered = _overlap(box, taken).sum() + 10 * (size.prod() - _overlap(box, frame[None]).sum())
        if covered < least - 1e-6:
            best, least = (box, radius), covered
    return best


def _overlap(box: Floats, others: Floats) -> Floats:
    """[N], areas that a box shares with others [N, 4]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return sides.clip(0).prod(1)
