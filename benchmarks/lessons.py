"""What distillation is worth: one pruned network, fine-tuned with each strategy and without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.rows import BCCD, ROADSIGNS, Row, finish
from benchmarks.trainings import RUNS
from utils.report.tables import Column, markdown_table

__all__ = ["LESSONS", "finish", "section", "spread"]
PLAIN = "plain"
STRATEGIES: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    **{f"kd{name}": ("--KDstr", name) for name in ("1", "2", "3", "4", "5")},
    **{f"at{name}": ("--AT_str", name) for name in ("1", "2", "3")},
    **{name: ("--KDstr", name) for name in ("cwd", "pkd")},
    "at2x10": ("--AT_str", "2", "--kd-weight", "10"),
    "kd4-original": ("--KDstr", "4", "--kd-weighting", "original"),
    "at3-original": ("--AT_str", "3", "--kd-weighting", "original"),
}


@dataclass(frozen=True)
class School:
    """A student, its teacher, and what it is taught."""

    what: str
    data: str
    size: int
    epochs: int
    student: str
    """Folder of the pruned network, below those of the rows."""
    teacher: str
    """Row of the teacher."""
    strategies: tuple[str, ...]
    """Keys of STRATEGIES."""
    more_seeds: tuple[str, ...] = ()
    """Those that are run with two more seeds."""
    flags: tuple[str, ...] = ()


GENTLE = ("--hyp", "data/hyp.finetune.yaml")
SCHOOLS = {
    "bccd": School(
        "bccd-yolov4-tiny-slim's pruned network, taught by bccd-yolov4-tiny", BCCD, 256, 10,
        "bccd-yolov4-tiny-slim/pruned", "bccd-yolov4-tiny", tuple(STRATEGIES),
        more_seeds=(PLAIN, "kd3", "kd4", "at3"), flags=GENTLE,
    ),
    "roadsigns": School(
        "roadsigns-yolov3-tiny-33-gentle's pruned network, taught by roadsigns-yolov3-tiny-33", ROADSIGNS, 224, 8,
        "roadsigns-yolov3-tiny-33-gentle/pruned", "roadsigns-yolov3-tiny-33", (PLAIN, "kd3", "kd4"),
        more_seeds=(PLAIN, "kd4"), flags=(*GENTLE, "--no-flip"),
    ),
}  # fmt: skip


def _row(school: School, strategy: str, seed: int) -> Row:
    student, teacher = RUNS / school.student, RUNS / school.teacher / "weights" / "best.pt"
    flags = STRATEGIES[strategy]
    taught = ("--t_weights", str(teacher), *flags) if flags else ()
    start = ("--weights", str(student / "model.pt"))
    return Row(f"{strategy}, seed {seed}", str(student / "model.cfg"), school.data, school.epochs, seed, school.size,
               flags=(*start, *taught, *school.flags))  # fmt: skip


def _names(key: str, school: School) -> dict[str, Row]:
    names = {f"{key}-{name}": _row(school, name, 0) for name in school.strategies}
    return names | {
        f"{key}-{name}-seed{seed}": _row(school, name, seed) for name in school.more_seeds for seed in (1, 2)
    }


LESSONS = {name: row for key, school in SCHOOLS.items() for name, row in _names(key, school).items()}
"""A row for every training."""


def section(stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of docs/results.md: a table for each school."""
    lines = []
    for key, school in SCHOOLS.items():
        found = {name: [stored[row] for row in _rows(key, name) if row in stored] for name in school.strategies}
        found = {name: documents for name, documents in found.items() if documents}
        if not found:
            continue
        columns = ("", "flags", "seeds", Column("AP50", ".3f"), Column("±", ".3f"), Column("AP50-95", ".3f"),
                   Column("±", ".3f"), Column("train min", ".1f"))  # fmt: skip
        rows = []
        for name, documents in found.items():
            figures = [figure for column in ("map50", "map50_95") for figure in spread(documents, column)]
            minutes = mean(document["train_minutes"] for document in documents)
            rows.append((name, " ".join(STRATEGIES[name]) or "no teacher", len(documents), *figures, minutes))
        one = next(iter(found.values()))[0]
        every = [document["commit"] or "unknown" for documents in found.values() for document in documents]
        commits = ", ".join(dict.fromkeys(commit[:9] for commit in every))
        lines += [f"## Distillation: {key}", "", f"{school.what}; {school.epochs} epochs at {school.size} × "
                  f"{school.size}. ± is the standard deviation over the seeds.", "", markdown_table(columns, rows), "",
                  f"    {one['command']}", "",
                  f"The others with the flags of the table and --t_weights "
                  f"{RUNS / school.teacher / 'weights' / 'best.pt'}. {one['machine']}, {one['threads']} threads, "
                  f"PyTorch {one['torch']}, commits {commits}.", ""]  # fmt: skip
    return [*lines, *_both(stored)]


def _both(stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The mean over the schools, of the strategies that have all seeds in each."""
    rows = []
    for name in STRATEGIES:
        runs = [[stored.get(row) for row in _rows(key, name)] for key in SCHOOLS]
        if all(document is not None for documents in runs for document in documents):
            figures = []
            for column in ("map50", "map50_95"):
                means = [mean(document[column] for document in pupils) for pupils in zip(*runs, strict=True)]
                figures += [mean(means), stdev(means)]
            rows.append((name, *figures))
    if not rows:
        return []
    columns = ("", Column("AP50", ".3f"), Column("±", ".3f"), Column("AP50-95", ".3f"), Column("±", ".3f"))
    what = f"{' and '.join(SCHOOLS)}, seeds 0, 1 and 2; ± is the standard deviation over the seeds of the mean."
    return ["## Distillation: mean of the data sets", "", what, "", markdown_table(columns, rows), ""]


def _rows(key: str, name: str) -> list[str]:
    return [f"{key}-{name}", *(f"{key}-{name}-seed{seed}" for seed in (1, 2))]


def spread(documents: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float | None]:
    """Mean of a figure over seeds, and its standard deviation; None for one seed."""
    values = [document[column] for document in documents]
    return mean(values), stdev(values) if len(values) > 1 else None
