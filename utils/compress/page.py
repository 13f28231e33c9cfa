"""The page of a compression: report.html from page.html by Jinja2, and report.md and report.json that tell the same.

Jinja2 is no requirement of its own: PyTorch requires it.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from utils import __version__
from utils.cli import one_line
from utils.compress.document import MeasureSettings, Run, ancestors, baseline_network, gather, parent_of, read_baselines
from utils.darknet.data_file import load_data
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.report.plots import plot_course, plot_pareto
from utils.report.tables import Cell, Column, markdown_table, shown_cells

if TYPE_CHECKING:
    from utils.compress.measure import ComparedPicture

PAGE, MARKDOWN, DOCUMENT = "report.html", "report.md", "report.json"
"""Files of a report."""
BUSY = 1.5
"""Ratio of the slowest tenth of the rounds to the median from which on a machine is called busy."""
RATIOS = (
    ("Parameters", "parameters", 1e6, ".2f", "M"),
    ("Multiply-adds", "macs", 1e9, ".3f", "G"),
    ("File", "bytes", 1e6, ".2f", "MB"),
)
"""Title, figure, unit, format and suffix of a card that shows a ratio."""
_SPECIAL = re.compile(r"([\\`*_{}<>#~]|\](?=[(\[:]))")
Titled = str | tuple[str, str]
"""A column of the template: its title, and a format where that is not the usual one."""


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    data: Path | str | None = None,
    *,
    baselines: Sequence[str] = (),
    title: str | None = None,
    exist_ok: bool = True,
    device: str = "",
    settings: MeasureSettings | None = None,
) -> Path:
    """Write report.html, report.md and report.json.

    Args:
        runs: run directories of train.py, *_prune.py, quantize.py and export.py; they are ordered by lineage.
        out: folder, made if missing; other files in it stay.
        data: data set on whose `valid` pictures all networks are measured; None: figures are those of the runs.
        baselines: .json files of `benchmarks.compare --json --time`, or, with `data`, `[NAME=]FILE[@SIDE]`.
        title: of the page (default: the folder of the runs).
        exist_ok: replace the three files if they are there.
        device: of PyTorch, for measuring.
        settings: how networks are measured.

    Returns:
        the page.

    Raises:
        InputError: no run directory, a damaged one, a file that is there already, networks and data that do not fit.
    """
    out = Path(out)
    _check_folder(out, exist_ok)
    networks = [baseline_network(text) for text in baselines if not text.endswith(".json")]
    known = [network for text in baselines if text.endswith(".json") for network in read_baselines(Path(text))]
    if networks and data is None:
        raise InputError(f"--baselines {networks[0].file}: is measured with --data only; give a .json file of figures")
    config = None if data is None else load_data(data)
    report = gather(runs, title) | {"baselines": known}
    pictures: Sequence[ComparedPicture] = ()
    if config is not None:
        from utils.compress.measure import measure  # torch

        pictures = measure(report, config, networks, device, settings)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    values = {**template_values(report), "pictures": pictures, "classes": config.names if config else ()}
    page, source = (render(values, markdown=markdown) for markdown in (False, True))
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / DOCUMENT, text + "\n")
    atomic_write_text(out / MARKDOWN, source)
    atomic_write_text(out / PAGE, page)
    return out / PAGE


def _check_folder(out: Path, exist_ok: bool) -> None:
    """Refuse a folder that cannot take the files."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is no folder; choose another one")
    taken = [name for name in (PAGE, MARKDOWN, DOCUMENT) if (out / name).exists()]
    if taken and not exist_ok:
        raise InputError(f"--out {out}: {taken[0]} is there; choose another folder, or add --exist-ok")


def render(values: Mapping[str, Any], *, markdown: bool) -> str:
    """Return page.html filled with values. Text is escaped for HTML or Markdown, and control characters are shown."""

    def shown(value: Any) -> Any:
        if isinstance(value, Markup) or not isinstance(value, str):
            return value
        return Markup(plain(value)) if markdown else one_line(value)

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        extensions=["jinja2.ext.do"],
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    environment.globals |= {"html_table": html_table, "markdown_table": escaped_table, "costs": costs}
    environment.filters |= {"drawn": drawn, "file": lambda path: Path(path).name, "interval": interval, "per": per}
    environment.filters |= {"panels": shown_panels, "verbatim": lambda text: Markup(one_line(text))}
    text = environment.get_template("page.html").render(values, markdown=markdown, version=__version__)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def plain(words: str) -> str:
    """Return text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", one_line(words))


def _used(columns: Sequence[Titled], rows: Sequence[Sequence[Cell]]) -> tuple[list[Column], list[list[Cell]]]:
    """Return a table without the columns that no row has anything for."""
    used = [number for number in range(len(columns)) if any(row[number] is not None for row in rows)]
    titled = [Column(t) if isinstance(t, str) else Column(*t) for t in (columns[number] for number in used)]
    return titled, [[row[number] for number in used] for row in rows]


def html_table(columns: Sequence[Titled], rows: Sequence[Sequence[Cell]]) -> dict[str, Any]:
    """Return titles and rows of cells as text, each with whether its column holds numbers."""
    titled, rows = _used(columns, rows)
    cells, numeric = shown_cells(titled, rows)
    titles = [column.title for column in titled]
    pairs = [list(zip(row, numeric, strict=True)) for row in (titles, *cells)]
    return {"titles": pairs[0], "rows": pairs[1:]}


def escaped_table(columns: Sequence[Titled], rows: Sequence[Sequence[Cell]]) -> Markup:
    """Return the same table as Markdown."""
    titled, rows = _used(columns, rows)
    rows = [[plain(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    return Markup(markdown_table(titled, rows))


def costs(figures: Mapping[str, Any]) -> list[Cell]:
    """Return the cells of a network's input, accuracy, parameters and multiply-adds."""
    size = "{} × {}".format(*figures["size"]) if figures["size"] else None
    return [size, figures["map50"], figures["map50_95"], figures["parameters"], per(figures["macs"], 1e9)]


def per(value: float | None, unit: float) -> float | None:
    """Return a value in another unit, if it is known."""
    return None if value is None else value / unit


def interval(values: Sequence[float], spec: str) -> str:
    """Return a value and the ends of its interval."""
    value, low, high = (format(number, spec) for number in values)
    return f"{value} [{low}, {high}]"


def address(source: bytes, kind: str) -> str:
    """Return a picture as a page holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(source).decode('ascii')}"


def drawn(run: Run, name: str) -> str | None:
    """Return a picture that a run has drawn; None if it is not there."""
    path = Path(run["run_dir"]) / name
    return address(path.read_bytes(), "png") if path.is_file() else None


def plotted(draw: Callable[[Any, Path], None], content: Any) -> str:
    """Return a plot that is drawn for the page."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.svg"
        draw(content, path)
        return address(path.read_bytes(), "svg+xml")


def shown_panels(picture: ComparedPicture, first: str, last: str, classes: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Return the three panels of a picture, each with its caption."""
    from utils.compress.measure import jpeg, panels

    changed = f"{len(picture.lost)} lost, {len(picture.gained)} gained"
    captions = (
        f"ground truth: {len(picture.truth)}",
        f"{first}: boxes {len(picture.before)}",
        f"{last}: boxes {len(picture.after)}, {changed}",
    )
    images = (address(jpeg(panel), "jpeg") for panel in panels(picture, classes))
    return zip(images, captions, strict=True)


def template_values(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what page.html shows beside the document: sentences, cards and plots."""
    runs = report["runs"]
    goal = next(run for run in runs if run["name"] == report["goal"])
    measured = [run["measured"] for run in runs if run["measured"]]
    points = list(_points(runs))
    for network in report["baselines"]:  # those whose names begin with the same word are a family
        points.append({**network, "family": next(iter(network["name"].split()), "other")})
    compared = len(points) > 1 and (measured or report["baselines"])
    trained = any(run["median_epochs"] for run in runs)
    return {
        "report": report,
        "lead": lead(runs, goal),
        "cards": list(cards(_first_figures(runs, goal), goal["figures"])) if len(runs) > 1 else [],
        "busy": any(row["ms_p90"] > BUSY * row["ms"] for row in measured),
        "course": plotted(plot_course, runs) if trained else None,
        "course_words": "; ".join(
            f"{run['name']}: AP50 {run['figures']['map50']:.3f}" for run in runs if run["figures"]["map50"] is not None
        ),
        "pareto": plotted(plot_pareto, points) if compared else None,
        "pareto_words": "; ".join(
            f"{point['name']}: AP50 {point['map50']:.3f}, {point['macs'] / 1e9:.3f} GMACs, {point['ms']:.2f} ms"
            for point in points
        ),
    }


def lead(runs: Sequence[Run], goal: Run) -> str:
    """Return the sentence under the title: the steps, the data set, the days."""
    steps = " → ".join(run["title"] for run in runs if run is goal or run["name"] in ancestors(goal))
    data = [f"data set {Path(run['data']).stem}" for run in runs if run["data"]][:1]
    days = sorted(run["time"][:10] for run in runs if run["time"])
    return "; ".join([steps, *data, *([" to ".join(dict.fromkeys((days[0], days[-1])))] if days else [])])


def _first_figures(runs: Sequence[Run], goal: Run) -> dict[str, Any]:
    """Return the figures of the first network, with the times of the files exported from it."""
    times: dict[str, float] = {}
    for run in runs[1:]:
        parent = parent_of(run)
        if run["kind"] == "export" and run is not goal and parent and parent["run"] == runs[0]["name"]:
            times |= run["figures"]["ms"]
    return runs[0]["figures"] | {"ms": times | runs[0]["figures"]["ms"]}


def cards(first: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the few numbers that matter: title, value, and how it was before."""
    for title, key in (("AP50", "map50"), ("AP50-95", "map50_95")):
        old, new = first[key], last[key]
        if old is not None and new is not None:
            yield title, f"{new:.3f}", f"{new - old:+.3f} from {old:.3f}"
    for title, key, unit, spec, suffix in RATIOS:
        if (old := first[key]) and (new := last[key]):
            yield title, f"{new / unit:{spec}} {suffix}", f"{_factor(old, new)} from {old / unit:{spec}} {suffix}"
    for runtime, old in first["ms"].items():
        if new := last["ms"].get(runtime):
            yield "A picture", f"{new:.2f} ms", f"{_factor(old, new)} from {old:.2f} ms"


def _factor(old: float, new: float) -> str:
    return f"÷ {old / new:.2f}" if old >= new else f"× {new / old:.2f}"


def _points(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Yield the networks whose accuracy, costs and time are known, with the keys of `baselines`."""
    for number, run in enumerate(runs, 1):
        figures, ap50 = run["figures"], run["figures"]["map50"]
        if ap50 is not None and figures["parameters"] and figures["macs"] and figures["ms"]:
            low, high = run["measured"]["map50"][1:] if run["measured"] else (ap50, ap50)
            more = {"family": "journey", "low": low, "high": high, "ms": next(iter(figures["ms"].values()))}
            yield {**figures, **more, "name": f"{number} {run['name']}"}
