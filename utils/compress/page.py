"""The page of a compression: report.html from page.html by Jinja2, and report.md and report.json that tell the same.

report.json has the run directories in the order in which one network was made from another. Lineage proves the order: a
file names the sha256 of the files that it was made from. Values are plain, fractions 0…1. Jinja2 is no requirement of
its own: PyTorch requires it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from utils import __version__
from utils.cli import flag, non_negative_int, one_line, positive_int, random_seed
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.darknet.data_file import load_data
from utils.darknet.network import file_bytes
from utils.errors import InputError
from utils.export.settings import COMPANIONS, PAIRS, SUFFIXES, usage
from utils.files import atomic_write_text, foreign_errors, read_json, read_text, read_yaml, regular_file, sha256
from utils.report.plots import plot_course, plot_pareto
from utils.report.run_dir import last_epochs, read_results
from utils.report.tables import network_cost, used_columns
from utils.runtime.choice import KINDS, named_file
from utils.runtime.exported import ExportedFile
from utils.training.hyperparameters import fitness
from utils.training.settings import OFF

if TYPE_CHECKING:
    from utils.compress.measure import ComparedPicture

PAGE, MARKDOWN, DOCUMENT = "report.html", "report.md", "report.json"
"""Files of a report."""
NEAR = 1.1
"""Ratio of two times up to which they count as equal."""
BUSY = 1.5
"""Ratio of the slowest tenth of the rounds to the median from which on a machine is called busy."""
_SPECIAL = re.compile(r"([\\`*_{}<>#~|]|\](?=[(\[:]))")
FPGA = f"model{SUFFIXES['fpga']}"
"""Folder that export.py makes in place of a file."""
WEIGHTS = ("weights/best.pt", "weights/last.pt", "model.pt", *(f"model{suffix}" for suffix in SUFFIXES.values()))
"""Files that a run can have made; the first one that exists counts."""
TITLES = {
    "original": "original network",
    "train": "training",
    "sparse": "sparse training",
    "prune": "pruning",
    "tune": "fine-tuning",
    "distil": "distillation",
    "qat": "quantization-aware training",
    "quantize": "quantization",
    "export": "export",
}
"""Kinds of runs."""
TRAININGS = ("train", "sparse", "tune", "distil", "qat")
SQNR = {key: key for key in ("block", "name", "bits", "activation_bits")} | {"decibels": "sqnr_db", "alone": "alone_db"}
"""Names of the report for what quantize.json has of a layer."""
LARGEST_FILE = 16 << 20
"""Largest text file of a run that is read, in bytes."""

Run = dict[str, Any]  # entry of `runs` in the document


@dataclass(frozen=True)
class MeasureSettings:
    """Settings of the measurement of a report's networks."""

    batch_size: int = flag(16, "images at a time", type=positive_int, metavar="N")
    draws: int = flag(1000, "data sets drawn for the intervals", type=positive_int, metavar="N")
    seed: int = flag(0, "of the draws", type=random_seed, metavar="N")
    pictures: int = flag(6, "most images shown with lost and gained objects", type=non_negative_int, metavar="N")


def gather(paths: Sequence[Path | str], title: str | None = None) -> dict[str, Any]:
    """Return the document of run directories; runs that do not come from one another keep their order.

    Raises:
        InputError: one is given twice, or cannot be read.
    """
    folders = [Path(path) for path in paths]
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(f"{folders[number]}: is given twice")
    runs = []
    for folder in folders:
        with foreign_errors(folder, "not as this suite writes it"):
            runs.append(read_run(folder))
    for run, name in zip(runs, _names(places), strict=True):
        run["name"] = name
    runs = _ordered(runs)
    _link(runs)
    goal = max(reversed(runs), key=lambda run: len(ancestors(run)))
    same_folder = len(places) > 1 and len({place.parent for place in places}) == 1
    document = {
        "schema": 1,
        "title": title or (places[0].parent.name if same_folder else places[0].name),
        "goal": goal["name"],
        "runs": runs,
        "measurement": None,
        "baselines": [],
    }
    return document | {"deploy": deployment(document)}


def read_run(path: Path) -> Run:
    """Return what a run directory tells.

    Raises:
        InputError: no run directory, or one of its files is damaged.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no folder; a run directory is wanted, such as runs/train/exp")
    args, env, plan = (read_mapping(path / name) for name in ("args.yaml", "env.json", "plan.json"))
    document = read_mapping(path / "quantize.json")
    kind = _kind(path, args, plan, document)
    results = read_results(path / "results.csv") if kind in TRAININGS and (path / "results.csv").is_file() else {}
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    digest, lineage, kept = _origin(weights)
    best = best_epoch(results, kept, sparse=bool(args.get("sr")))
    figures = _figures(path, kind, weights, args, plan or document)
    if best is not None:
        row = results["epoch"].index(best)
        figures |= {key: results[key][row] for key in ("map50", "map50_95")}
    return {
        "kind": kind,
        "title": f"{plan['strategy']} pruning" if kind == "prune" else TITLES[kind],
        "run_dir": str(path),
        "command": shlex.join(["python", *env["command"]]) if env.get("command") else "",
        "git_commit": env.get("git_commit"),
        "time": env.get("time"),
        "machine": env.get("cpu"),
        "torch": env.get("packages", {}).get("torch"),
        "data": args.get("data"),
        "precision": None if (file := exported(weights)) is None else file.metadata.precision,
        "weights": None if weights is None else str(weights),
        "sha256": digest,
        "lineage": lineage,
        "figures": figures,
        "reported": dict(figures),
        "measured": None,
        "before_ms": _figures_of(plan, "before")["ms"] if kind == "prune" else {},
        "best_epoch": best,
        **last_epochs(results),
        "epochs": {key: _finite(results[key]) for key in ("epoch", "map50", "map50_95") if key in results},
        "channels": read_channels(path / "channels.csv") if kind == "prune" else [],
        "certificate": plan.get("certificate"),
        "sqnr": [{key: layer.get(name) for key, name in SQNR.items()} for layer in document.get("layers", ())],
    }


def _kind(path: Path, args: Mapping[str, Any], plan: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return the kind of a run, which its files tell, and the flags of a training."""
    if "strategy" in plan:
        return "prune"
    if "layers" in document:
        return "quantize"
    if (path / "results.csv").is_file() or (path / "weights" / "best.pt").is_file():
        if args.get("quantized") not in (None, *OFF):
            return "qat"
        if args.get("sr"):
            return "sparse"
        return "distil" if any(args.get(flag) for flag in ("KDstr", "AT_str", "t_weights")) else "train"
    if "format" in args and any((path / name).exists() for name in (*WEIGHTS, FPGA)):
        return "export"
    raise InputError(
        f"{path}: no run directory of train.py, *_prune.py, quantize.py or export.py: it has no results.csv, "
        "plan.json, layers with sqnr_db, or exported file"
    )


def _figures(
    path: Path, kind: str, weights: Path | None, args: Mapping[str, Any], document: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures of the network that a run made, as its files have them; None: not known."""
    figures = _figures_of(document, "after")
    if kind in ("prune", "quantize") and (sides := args.get("img_size")):  # model.cfg keeps the size that it had
        figures["size"] = [sides[0], sides[-1]]
    if kind == "prune":
        return figures
    if (path / "model.cfg").is_file():
        network = cfg_file.load(path / "model.cfg")
        # Rounded weights are small once they are exported; until then a .weights file says nothing of them.
        size = None if kind in ("quantize", "qat") else file_bytes(network)
        figures |= _costs(network, figures["size"] or [network.net.height, network.net.width]) | {"bytes": size}
    if (file := exported(weights)) is not None:
        figures |= _costs(file.metadata.network, file.metadata.size)
    if kind == "export":
        companions = () if args["format"] in PAIRS else COMPANIONS.get(args["format"], ())
        files = (path / FPGA).rglob("*") if weights is None else [weights, *map(weights.with_suffix, companions)]
        figures["bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    return figures


def _costs(network: Network, size: Sequence[int]) -> dict[str, Any]:
    cost = network_cost(network, *size)
    return {"parameters": cost.parameters, "macs": cost.macs, "size": list(size)}


def _figures_of(document: Mapping[str, Any], when: str) -> dict[str, Any]:
    """Return the figures under `before` or `after` in a document of a pruning or quantization."""
    values = document.get(when) or {}
    both = document.get("map50")
    latency = document.get("latency") or {}
    runtime = latency.get("runtime") or "PyTorch"
    ms = values.get("ms")
    return {
        "map50": values.get("map50", both.get(when) if isinstance(both, Mapping) else None),
        **{key: values.get(key) for key in ("map50_95", "parameters", "macs")},
        "bytes": values.get("weights_bytes"),
        "ms": {} if ms is None else {f"PyTorch, {runtime}" if runtime.startswith("CPU") else runtime: ms},
        "size": [latency["height"], latency["width"]] if latency else None,
    }


def best_epoch(results: Mapping[str, Sequence[float]], kept: int | None, *, sparse: bool) -> int | None:
    """Return the epoch of best.pt, `kept` where the file has it: else the fittest, or the last of a sparse training.

    The fittest row need not be it: --nosave keeps the last epoch, and --quantized none before all is rounded.
    """
    scores = zip(*(results.get(key, ()) for key in ("epoch", "map50", "map50_95")), strict=True)
    known = {int(epoch): fitness(*pair) for epoch, *pair in scores if all(map(math.isfinite, pair))}
    if kept in known:
        return kept
    if not known:
        return None
    return list(known)[-1] if sparse else max(known, key=known.__getitem__)


def _finite(values: Sequence[float]) -> list[float | None]:
    """Return values as JSON has them, None for an epoch without one."""
    return [value if math.isfinite(value) else None for value in values]


def exported(weights: Path | str | None) -> ExportedFile | None:
    """Return what a file for another runtime says of itself; None for another file."""
    kind = KINDS.get(Path(weights).suffix) if weights is not None else None
    return None if kind is None or weights is None else kind.read(Path(weights))


def _origin(weights: Path | None) -> tuple[str | None, list[dict[str, Any]], int | None]:
    """Return the sha256 of a file, the lineage inside it, and the epochs that it was trained for; None: not known.

    A .weights or .torchscript file has no lineage.
    """
    if weights is None:
        return None, [], None
    epoch = None
    if weights.suffix == ".pt":
        from utils.checkpoint import read_checkpoint  # torch

        checkpoint = read_checkpoint(weights)
        entries, epoch = checkpoint.get("lineage") or (), (checkpoint.get("progress") or {}).get("epoch")
    else:
        file = exported(weights)
        entries = () if file is None else file.metadata.lineage
    lineage = [
        {"path": str(entry["path"]), "sha256": str(entry["sha256"]), "teacher": entry.get("teacher")}
        for entry in entries
        if {"path", "sha256"} <= set(entry)
    ]
    return sha256(weights), lineage, epoch


def _ordered(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each after those it was made from."""
    makers = {run["sha256"]: run for run in runs if run["sha256"]}
    done: list[Run] = []

    def visit(run: Run) -> None:
        if run in done:
            return
        for entry in run["lineage"]:
            if entry["sha256"] in makers:
                visit(makers[entry["sha256"]])
        done.append(run)

    for run in runs:
        visit(run)
    return done


def _link(runs: Sequence[Run]) -> None:
    """Name the run that each lineage entry comes from, and take from it what it tells of the other run."""
    makers = {run["sha256"]: run["name"] for run in runs if run["sha256"]}
    files = {Path(run["weights"]).resolve() for run in runs if run["weights"]}
    named = {run["name"]: run for run in runs}
    for run in runs:
        for entry in run["lineage"]:
            entry["run"] = makers.get(entry["sha256"])
            entry["changed"] = entry["run"] is None and Path(entry["path"]).resolve() in files
        parent = named.get((parent_of(run) or {}).get("run"))
        if parent is None and run["kind"] == "export" and Path(run["weights"] or "").suffix == ".pt":
            run |= {"kind": "original", "title": TITLES["original"]}
        elif parent is not None and parent["kind"] == "prune" and run["kind"] == "train":
            run |= {"kind": "tune", "title": TITLES["tune"]}
        if parent is not None and not parent["figures"]["ms"]:  # a pruning has timed the network before it
            parent["figures"]["ms"] = parent["reported"]["ms"] = run["before_ms"]


def parent_of(run: Run) -> dict[str, Any] | None:
    """Return the lineage entry of the network that a run began with."""
    return next((entry for entry in reversed(run["lineage"]) if entry["teacher"] is None), None)


def ancestors(run: Run) -> set[str]:
    """Return the names of the runs that a run was made from."""
    return {entry["run"] for entry in run["lineage"] if entry["run"] and entry["teacher"] is None}


def deployment(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the file to deploy, how it is run, and why it; None if no run has exported one.

    Candidates are the files of all networks but the first, in the format of the last file, without those that were not
    measured where others were, and those whose AP50 is lower as far as the measurement shows. The smallest of the
    fastest candidates is chosen.
    """
    runs = report["runs"]
    files = [run for run in runs if run["kind"] == "export" and run["weights"]]
    others = [run for run in files if (parent_of(run) or {}).get("run") != runs[0]["name"]]
    files = others or files
    if not files:
        return None
    suffix = Path(files[-1]["weights"]).suffix
    files = [run for run in files if Path(run["weights"]).suffix == suffix]
    measured = [run for run in files if run["measured"]]
    only = f"{suffix} file{' of a compressed network' if others else ''}"
    only += " that was measured" if 0 < len(measured) < len(files) else ""
    files = measured or files
    kept = [run for run in files if not _loses(run)] or files
    limit = NEAR * min(map(_time, kept))
    fast = [run for run in kept if _time(run) <= limit]
    best = min(fast, key=lambda run: run["figures"]["bytes"])
    why = [f"It is the only {only}."]
    if len(files) > 1:
        unmeasured = f"It is the smallest of {len(files)} files, which were not measured."
        why = [_choice(len(fast), len(kept), loses=_loses(best)) if measured else unmeasured]
    why += [f"{run['name']} loses AP50." for run in files if _loses(run)]
    facts = {"run": best["name"], "file": best["weights"], "bytes": best["figures"]["bytes"]}
    facts |= usage(best["weights"], exported(best["weights"]))
    return facts | {"why": [*why, *filter(None, (slower(run, runs) for run in files))]}


def _choice(fast: int, kept: int, *, loses: bool) -> str:
    """Return why a measured file was chosen: the smallest of `fast` files, of `kept` that lose no AP50 or all lose."""
    if fast > 1:
        seen = "" if loses else " lose no AP50 that can be seen and"
        return f"Of {fast} files that{seen} are as fast as any here, up to 10 %, it is the smallest."
    if kept > 1:
        return f"It is the fastest of {kept} files{'' if loses else ' that lose no AP50 that can be seen'}."
    return "It is the only file that loses no AP50 that can be seen."


def _loses(run: Run) -> bool:
    """Return whether AP50 is lower than that of the first network as far as the measurement shows."""
    return bool(run["measured"]) and run["measured"]["map50_difference"][2] < 0


def _time(run: Run) -> float:
    """Return the time of a picture in the program of a file; infinite: it was not measured."""
    return next(iter(run["figures"]["ms"].values()), math.inf)


def slower(run: Run, runs: Sequence[Run]) -> str | None:
    """Return that integers are slower than float in one program; None if they are not, or it is not known."""
    for program, ms in run["figures"]["ms"].items():
        others = [other for other in runs if other["name"] in ancestors(run) and program in other["figures"]["ms"]]
        before = others[-1]["figures"]["ms"][program] if others else math.inf
        if run["precision"] == "int8" and round(ms, 2) > round(before, 2):  # as they are shown
            times = f"{ms:.2f} ms, {others[-1]['name']} in float {before:.2f} ms"
            return f"int8 is slower than float here: {times} ({program}). Its 8 bits make the file smaller."
    return None


def _names(places: Sequence[Path]) -> list[str]:
    """Return names that differ, with as many folders above as it takes."""
    depth, names = 1, [place.name for place in places]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(place.parts[-depth:]) for place in places]
    return names


def read_channels(path: Path) -> list[dict[str, int]]:
    """Return the channels of every convolution before and after a pruning, as channels.csv has them."""
    if not path.is_file():
        return []
    text, keys = read_text(path, max_bytes=LARGEST_FILE), ("block", "before", "after")
    with foreign_errors(path, "no channels of a pruning"):
        rows = list(csv.DictReader(io.StringIO(text)))
        return [{key: int(row[key] if key != "after" or row["new_block"] else 0) for key in keys} for row in rows]


def read_mapping(path: Path) -> dict[str, Any]:
    """Return a YAML mapping or a JSON object; empty where there is no such file.

    Raises:
        InputError: the file holds something else.
    """
    if not path.is_file():
        return {}
    content = (read_yaml if path.suffix == ".yaml" else read_json)(path, max_bytes=LARGEST_FILE)
    if not isinstance(content, dict):
        raise InputError(f"{path}: names and their values were expected")
    return content


def read_baselines(path: Path) -> list[dict[str, Any]]:
    """Return the networks in a document of `benchmarks.compare --json --time`.

    Raises:
        InputError: no such document, or without times.
    """
    regular_file(path, InputError)
    document = read_mapping(path)
    with foreign_errors(path, "--baselines wants a document of `python -m benchmarks.compare --json --time`"):
        return [_baseline(row) for row in document["networks"]]


def _baseline(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = map(float, row["map50_interval"])
    measured = {key: float(row[key]) for key in ("map50", "map50_95", "ms")}
    counts = {key: int(row[key]) for key in ("parameters", "macs")}
    more = {key: row.get(key) for key in ("size", "runtime")}
    return {"name": str(row["network"]), **measured, "low": low, "high": high, **counts, **more}


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
    networks = [named_file("--baselines", text) for text in baselines if not text.endswith(".json")]
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
    classes = config.names if config else ()
    page, source = (render(report, pictures, classes, markdown=markdown) for markdown in (False, True))
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


def render(
    report: Mapping[str, Any], pictures: Sequence[ComparedPicture], classes: Sequence[str], *, markdown: bool
) -> str:
    """Return page.html filled with a report. Text is escaped for HTML or Markdown, and control characters are shown."""

    def shown(value: Any) -> Any:
        if isinstance(value, Markup) or not isinstance(value, str):
            return value
        return Markup(_SPECIAL.sub(r"\\\1", one_line(value))) if markdown else one_line(value)

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        extensions=["jinja2.ext.do"],
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    environment.filters |= {"drawn": drawn, "panels": shown_panels, "verbatim": lambda text: Markup(one_line(text))}
    environment.filters |= {"file": lambda path: Path(path).name, "stem": lambda path: Path(path).stem}
    values = {"version": __version__, "markdown": markdown, "pictures": pictures, "classes": classes}
    text = environment.get_template("page.html").render(values | template_values(report), cells=used_columns, busy=BUSY)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


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


def shown_panels(picture: ComparedPicture, classes: Sequence[str], titles: Sequence[str]) -> str:
    """Return the panels of a picture as a page holds them."""
    from utils.compress.measure import jpeg, panels

    return address(jpeg(panels(picture, classes, titles)), "jpeg")


def template_values(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what page.html shows beside the document: the networks that are compared, and plots."""
    runs, baselines = report["runs"], report["baselines"]
    goal = next(run for run in runs if run["name"] == (report["deploy"] or {"run": report["goal"]})["run"])
    program = next(iter(goal["figures"]["ms"]), None)
    baselines = [with_time_of(network, program) for network in baselines]
    points = list(_points(runs, program))
    for number, network in enumerate(baselines, len(runs) + 1):
        family = next(iter(network["name"].split()), "other")  # names that begin with the same word
        points.append({**network, "number": number, "family": family})
    compared = len(points) > 1 and (baselines or any(run["measured"] for run in runs))
    return {
        "report": report,
        "label": lambda run: f"{runs.index(run) + 1} {run['name']}",
        "path": {*ancestors(goal), goal["name"]},
        "first": runs[0]["figures"],
        "last": goal,
        "program": program,
        "baselines": baselines,
        "course": plotted(plot_course, runs) if any(run["median_epochs"] for run in runs) else None,
        "points": points,
        "pareto": plotted(partial(plot_pareto, program=program), points) if compared else None,
    }


def with_time_of(network: Mapping[str, Any], program: str | None) -> dict[str, Any]:
    """Return a baseline without its time if another program than that of the page took it."""
    runtime = network["runtime"] or program
    return {**network, "ms": network["ms"] if runtime == program or str(program).startswith(f"{runtime},") else None}


def _points(runs: Sequence[Run], program: str | None) -> Iterator[dict[str, Any]]:
    """Yield the networks whose accuracy and costs are known, with the keys of `baselines`, and times of one program.

    A float file is the same network as the one that it was made of, and a simulation the same as its file.
    """
    made = {(parent_of(run) or {}).get("run") for run in runs if run["kind"] == "export"}
    for number, run in enumerate(runs, 1):
        figures, ap50 = run["figures"], run["figures"]["map50"]
        copy = run["precision"] == "float32" and bool(ancestors(run))
        copy |= run["kind"] in ("quantize", "qat") and run["name"] in made
        if not copy and ap50 is not None and figures["parameters"] and figures["macs"]:
            low, high = run["measured"]["map50"][1:] if run["measured"] else (ap50, ap50)
            point = {"name": run["name"], "number": number, "family": "journey", "low": low, "high": high}
            yield {**figures, **point, "ms": figures["ms"].get(program)}
