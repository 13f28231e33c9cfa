"""Costs of a network, counted from the cfg alone, and its time; tables of them and of the results of test.py.

Costs are parameters, multiply-adds and Darknet's BFLOPs, as AlexeyAB/darknet prints them. A multiply-add of a
convolution counts two, a cell that a max pooling looks at one, a value that a shortcut adds one, or two with weights.
pjreddie/darknet printed the convolutions only (`2 · macs / 1e9`).
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, TypeAlias

from utils.cli import ProgressBar, one_line
from utils.darknet.blocks import Network, Shape
from utils.darknet.network import tensors, trace

if TYPE_CHECKING:
    from utils.detection.average_precision import Metrics

LEAST_ROUNDS = 5
"""Measured whatever time they take."""


@dataclass(frozen=True)
class Cost:
    """Costs of a block or a network, for one picture."""

    parameters: int
    """Trained values: convolution weights and biases, γ and β."""
    macs: int
    """Multiply-adds of convolutions and fully connected layers."""
    flops: int
    """Darknet's count: 2 · macs, and max poolings and shortcuts."""

    @property
    def bflops(self) -> float:
        """Billions of `flops`."""
        return self.flops / 1e9


def block_costs(network: Network, height: int | None = None, width: int | None = None) -> tuple[Cost, ...]:
    """Cost of every block for an input of height × width pixels, the cfg's own size by default.

    Raises:
        CfgError: the network has an impossible shape at that size.
    """
    shapes = trace(network, height, width)
    image = Shape(network.net.channels, height or network.net.height, width or network.net.width)
    parameters = [0] * len(shapes)
    for spec in tensors(network):
        parameters[spec.block] += spec.size if spec.trained else 0
    costs = []
    for block, source, output, count in zip(network.blocks, (image, *shapes), shapes, parameters, strict=False):
        macs = block.macs(source.channels, output)
        costs.append(Cost(count, macs, 2 * macs + block.operations(output)))
    return tuple(costs)


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of several costs."""
    costs = tuple(costs)
    return Cost(*(sum(getattr(cost, name) for cost in costs) for name in ("parameters", "macs", "flops")))


def network_cost(network: Network, height: int | None = None, width: int | None = None) -> Cost:
    """Cost of the whole network for an input of height × width pixels, the cfg's own size by default."""
    return total(block_costs(network, height, width))


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run."""

    median: float
    p90: float
    """90 % of the runs were no slower."""
    rounds: int
    """Number of runs."""


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 50,
    warm: int = 2,
    seconds: float = 10.0,
    pause: float = 0.0,
) -> dict[str, Latency]:
    """Run everything in turn, A B A B …, so that other work of the machine meets all alike; return how long each took.

    Args:
        runs: what to measure, by name; a function returns when its work is done (on a GPU it synchronises).
        rounds: most rounds, at least 1.
        warm: rounds before, which do not count.
        seconds: no round begins after this time, but the first `LEAST_ROUNDS` do.
        pause: seconds of rest before every turn, and then a run that does not count. It is for libraries whose threads
            wait for work in a loop when a run is over: they would take the cores from the next one.
    """
    import numpy as np  # utils.darknet.info answers without it

    for _ in range(warm):
        for run in runs.values():
            run()
    laps: dict[str, list[float]] = {name: [] for name in runs}
    begin = perf_counter()
    for number in ProgressBar("timing", range(rounds), unit="rounds"):
        if number >= LEAST_ROUNDS and perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            if pause:
                sleep(pause)
                run()
            start = perf_counter()
            run()
            laps[name].append(1000 * (perf_counter() - start))
    return {name: Latency(float(np.percentile(t, 50)), float(np.percentile(t, 90)), len(t)) for name, t in laps.items()}


Cell: TypeAlias = str | int | float | None
"""None is shown as a dash."""


@dataclass(frozen=True)
class Column:
    """Title and format of a column."""

    title: str
    spec: str = ".3f"
    """Format of the floats in it, e.g. `.1f`; integers get thousands apart, text stays as it is."""


ACCURACY_COLUMNS = ("Class", "Images", "Objects", "P", "R", "F1", "AP50", "AP50-95")
BENCHMARK_COLUMNS = (
    Column("Input"),
    Column("NMS", ".2f"),
    *(Column(title) for title in ("P", "R", "F1", "AP50", "AP50-95", "GMACs")),
    *(Column(title, ".1f") for title in ("pre ms", "net ms", "nms ms")),
)


def text_table(columns: Iterable[Column | str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return aligned plain text: titles, a rule, one line a row; numbers to the right, text to the left.

    Args:
        columns: a bare string is a Column with the default format.
        rows: as many cells each as there are columns.

    Returns:
        lines without trailing blanks, joined by newlines, no newline at the end.
    """
    columns = _columns(columns)
    shown, numeric = shown_cells(columns, rows)
    lines = [[column.title for column in columns], *shown]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["─" * width for width in widths])
    return "\n".join("  ".join(map(_pad, line, widths, numeric)).rstrip() for line in lines)


def markdown_table(columns: Iterable[Column | str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return the same table in Markdown, padded so that its source is readable, too."""
    columns = _columns(columns)
    shown, numeric = shown_cells(columns, rows)
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [[column.title for column in columns], *shown]]
    widths = [max(3, *map(_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)])
    return "\n".join("| " + " | ".join(map(_pad, line, widths, numeric)) + " |" for line in lines)


def csv_table(titles: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return CSV with a line of titles; cells as they are, None is an empty one."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([titles, *rows])
    return out.getvalue()


def _columns(columns: Iterable[Column | str]) -> list[Column]:
    return [column if isinstance(column, Column) else Column(column) for column in columns]


def shown_cells(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> tuple[list[list[str]], list[bool]]:
    """Return cells as text, and for each column whether it holds numbers: no text, and one number at least."""
    rows = list(rows)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {row!r} has {len(row)} cells; the table has {len(columns)} columns")
    shown = [[_text(cell, column.spec) for cell, column in zip(row, columns, strict=True)] for row in rows]
    numeric = [
        bool(cells) and not any(isinstance(cell, str) for cell in cells)
        for cells in ([row[number] for row in rows if row[number] is not None] for number in range(len(columns)))
    ]
    return shown, numeric


def used_columns(columns: Sequence[str | tuple[str, str]], rows: Sequence[Sequence[Cell]]) -> dict[str, Any]:
    """Return titles and rows as text, each cell with whether its column holds numbers; empty columns are left out.

    Args:
        columns: a title, or a title and a format where that is not the usual one.
        rows: as many cells each as there are columns.
    """
    used = [number for number in range(len(columns)) if any(row[number] is not None for row in rows)]
    titled = [Column(t) if isinstance(t, str) else Column(*t) for t in (columns[number] for number in used)]
    text, numeric = shown_cells(titled, [[row[number] for number in used] for row in rows])
    pairs = [list(zip(row, numeric, strict=True)) for row in ([column.title for column in titled], *text)]
    return {"titles": pairs[0], "rows": pairs[1:]}


def _text(cell: Cell, spec: str) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return one_line(cell)
    return f"{cell:,}".replace(",", " ") if isinstance(cell, Integral) else format(cell, spec)


def _width(text: str) -> int:
    """Return the columns a terminal needs: none for combining marks, two for wide East Asian characters."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _pad(text: str, width: int, right: bool) -> str:
    blanks = " " * (width - _width(text))
    return blanks + text if right else text + blanks


def accuracy_table(metrics: Metrics, *, per_class: bool = False) -> str:
    """Return a row for all classes, with `per_class` one a class, and one for each size of objects that occurs.

    P, R and F1 are those at IoU 0.5 and the confidence `metrics.confidence`; a size has none.
    """
    m = metrics
    rows: list[tuple[Cell, ...]] = [("all", m.images, m.objects, m.precision, m.recall, m.f1, m.map50, m.map50_95)]
    if per_class:
        rows += [(c.name, c.images, c.objects, c.precision, c.recall, c.f1, c.ap50, c.ap50_95) for c in m.per_class]
    rows += [
        (size.name, None, size.objects, None, None, None, size.ap50, size.ap50_95) for size in m.by_size if size.objects
    ]
    return text_table(ACCURACY_COLUMNS, rows)


def measurement_document(
    metrics: Metrics, ms: Mapping[str, float], cost: Cost, size: tuple[int, int], iou_thres: float
) -> dict[str, Any]:
    """Return one measurement of test.py as JSON values.

    All but counts are fractions, 0..1, and only classes with objects are listed. `ms` has a time for each stage, `size`
    is height and width.
    """
    means = ("images", "objects", "map50", "map50_95", "precision", "recall", "f1", "confidence")
    of_class = ("name", "images", "objects", "ap50", "ap50_95", "precision", "recall", "f1")
    return {
        **{key: getattr(metrics, key) for key in means},
        "per_class": [{"class": c.index, **{key: getattr(c, key) for key in of_class}} for c in metrics.per_class],
        "by_size": [asdict(group) for group in metrics.by_size],
        "parameters": cost.parameters,
        "macs": cost.macs,
        "ms": dict(ms),
        "size": list(size),
        "iou_thres": iou_thres,
    }


def measurement_text(document: Mapping[str, Any], metrics: Metrics, *, per_class: bool = False) -> str:
    """Return one measurement of test.py for people: the network, the table, the times; `document` is that of --json."""
    height, width = document["size"]
    ms = document["ms"]
    parameters = f"{document['parameters']:,}".replace(",", " ")
    return "\n".join(
        [
            f"{document['weights']}: {parameters} parameters, {document['macs'] / 1e9:.3f} GMACs at {height} × {width}",
            accuracy_table(metrics, per_class=per_class),
            f"P, R, F1 at IoU 0.5 and confidence {metrics.confidence:.3f}, where the mean F1 is highest",
            f"ms an image: {ms['preprocess']:.1f} pre-process, {ms['inference']:.1f} inference, {ms['nms']:.1f} NMS; "
            f"{height} × {width}, batch {document['batch_size']}, {document['runtime']}",
        ]
    )


def benchmark_text(document: Mapping[str, Any]) -> str:
    """Return the measurements of `test.py --task benchmark` for people, from the document of --json: one a row."""
    rows = [
        (
            "{} × {}".format(*row["size"]),
            row["iou_thres"],
            *(row[key] for key in ("precision", "recall", "f1", "map50", "map50_95")),
            row["macs"] / 1e9,
            *(row["ms"][key] for key in ("preprocess", "inference", "nms")),
        )
        for row in document["benchmark"]
    ]
    title = f"{document['weights']}: ms an image, batch {document['batch_size']}, {document['runtime']}"
    return f"{title}\n{text_table(BENCHMARK_COLUMNS, rows)}"
