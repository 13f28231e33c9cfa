"""A report from run directories to its three files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from utils.darknet.data_file import load_data
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.report.journey.baselines import Baseline, read_baselines, split
from utils.report.journey.gather import gather

PAGE, MARKDOWN, DOCUMENT = "report.html", "report.md", "report.json"
"""Files of a report."""


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    data: Path | str | None = None,
    *,
    baselines: Sequence[str] = (),
    title: str | None = None,
    device: str = "",
    batch_size: int = 16,
    draws: int = 1000,
    seed: int = 0,
    pictures: int = 6,
    exist_ok: bool = True,
) -> Path:
    """Write report.html, report.md and report.json.

    Args:
        runs: run directories of train.py, *_prune.py, quantize.py and export.py; they are ordered by lineage.
        out: folder, made if missing; other files in it stay.
        data: data set on whose `valid` pictures all networks are measured anew; None: figures are those of the runs.
        baselines: .json files of `benchmarks.compare --json --time`, or, with `data`, `[NAME=]FILE[@SIDE]`.
        title: of the page (default: the folder of the runs).
        device: of PyTorch, for measuring.
        batch_size: pictures at a time.
        draws: data sets drawn for intervals.
        seed: of the draws.
        pictures: most pictures shown with their detections.
        exist_ok: replace the three files if they are there.

    Returns:
        the page.

    Raises:
        InputError: no run directory, a damaged one, a file that is there already, networks and data that do not fit.
    """
    out = Path(out)
    _check_place(out, exist_ok)
    files, named = split(baselines)
    known: list[Baseline] = [baseline for path in files for baseline in read_baselines(path)]
    if named and data is None:
        raise InputError(f"--baselines {named[0].file}: is measured with --data only; give a .json file of figures")
    config = None if data is None else load_data(data)
    journey = gather(runs, title, tuple(known))
    if config is not None:
        from utils.report.journey.measure import measure

        options = {"device": device, "batch_size": batch_size, "draws": draws, "seed": seed, "pictures": pictures}
        journey = measure(journey, config, named, **options)
    from utils.report.journey.document import document
    from utils.report.journey.page import page
    from utils.report.journey.sections import lead, sections
    from utils.report.journey.text import markdown

    shown = journey.title, lead(journey), sections(journey)
    text = json.dumps(document(journey), indent=2, ensure_ascii=False, allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / DOCUMENT, text + "\n")
    atomic_write_text(out / MARKDOWN, markdown(*shown))
    atomic_write_text(out / PAGE, page(*shown))
    return out / PAGE


def _check_place(out: Path, exist_ok: bool) -> None:
    """Refuse a folder that cannot take the files."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is no folder; choose another one")
    taken = [name for name in (PAGE, MARKDOWN, DOCUMENT) if (out / name).exists()]
    if taken and not exist_ok:
        raise InputError(f"--out {out}: {taken[0]} is there; choose another folder, or add --exist-ok")
