"""The folder of one run, `runs/<stage>/<name>/`, and the table of its epochs.

A run gets a folder nobody else has: `exp`, `exp2`, `exp3` …, made in one step, so that two runs started at once never
share one. Nothing outside the folder is written. Nothing that was there is deleted, but with --exist-ok what a new run
would otherwise go on from. A run that fails before its first result removes its new folder. While a process works in a
folder it is locked: another one, with --exist-ok or --resume, is refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import datetime, timezone
from numbers import Integral
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from utils.errors import InputError
from utils.files import ROOT, atomic_write_text, read_text

PACKAGES = ("torch", "torchvision", "numpy", "opencv-python", "pycocotools", "onnx", "onnxruntime")
DESCRIBED = ("args.yaml", "env.json", "hyp.yaml", "data.yaml", "model.cfg")
"""Files that say what a run was started with."""
LOCK = ".lock"
"""File of a run that is locked by the process at work in it, whose number it holds."""
LOCK_WAIT = 2.0
"""Seconds to wait for a lock: a process that was killed holds it until its memory is freed."""
LAST_SHARE, LEAST_LAST = 0.2, 3
"""Share and least number of a training's epochs that are its last ones."""


@dataclass(frozen=True)
class RunDirectory:
    """An existing folder that belongs to one run."""

    path: Path
    new: bool = field(default=False, compare=False)
    """This process made it for this run."""

    @classmethod
    def create(cls, project: Path | str, name: str = "exp", *, exist_ok: bool = False) -> RunDirectory:
        """Make `project/name`, or with a number behind the name the first one that is free.

        Args:
            project: folder of the stage, e.g. `runs/train`; made if missing.
            name: folder's name, without a slash.
            exist_ok: use `project/name` itself even if it exists; files a run writes anew are replaced one by one,
                all others stay.

        Raises:
            InputError: `name` is no plain folder name, or `project` cannot hold folders.
        """
        project = Path(project)
        check_run(project, name)
        number, path = 1, project / name
        try:
            project.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    path.mkdir()
                    return cls(path, new=True)
                except FileExistsError:
                    if exist_ok and path.is_dir():
                        return cls(path)
                    if exist_ok:
                        raise
                number += 1
                path = project / f"{name}{number}"
        except (FileExistsError, NotADirectoryError) as failure:
            raise InputError(
                f"{failure.filename}: exists and is no folder; choose another --project or --name"
            ) from None

    @property
    def weights(self) -> Path:
        """Folder of the checkpoints, made on first use."""
        folder = self.path / "weights"
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def until(self, *results: str) -> Iterator[RunDirectory]:
        """Inside, no other process works in the folder, and a failure removes it, if it is new and has no result yet.

        Args:
            results: patterns of files; none: every file but those of `describe`.

        Raises:
            InputError: another process works in it.
        """
        with locked(self.path):
            self._sweep()
            try:
                yield self
            except BaseException:
                files = (path for pattern in results or ("**/[!.]*",) for path in self.path.glob(pattern))
                if self.new and not any(path.is_file() and (results or path.name not in DESCRIBED) for path in files):
                    self._remove()
                raise

    def _remove(self) -> None:
        with suppress(OSError):  # the failure itself is what counts
            for path in sorted(self.path.rglob("*"), reverse=True):  # what is in a folder before the folder
                path.rmdir() if path.is_dir() else path.unlink()
            self.path.rmdir()

    def _sweep(self) -> None:
        """Remove the unfinished files that a killed run has left; no other process writes here."""
        for folder in (self.path, self.path / "weights"):
            for path in folder.glob(".*.[0-9]*.tmp"):
                path.unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """Path of a file in the run, whether it exists or not."""
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        """Write one text file of the run atomically, e.g. `model.cfg`."""
        atomic_write_text(self.path / name, text)
        return self.path / name

    def write_yaml(self, name: str, values: Mapping[str, Any] | Any) -> Path:
        """Write a mapping or a dataclass as YAML that `yaml.safe_load` reads, keys in the order given."""
        import yaml

        return self.write_text(name, yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True, width=120))

    def write_json(self, name: str, values: Mapping[str, Any] | Any) -> Path:
        """Write a mapping or a dataclass as JSON; NaN and infinity are refused with ValueError."""
        return self.write_text(name, json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def describe(
        self,
        *,
        args: Mapping[str, Any],
        hyp: Mapping[str, Any] | Any = None,
        cfg: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what the run was started with: args.yaml, env.json, and hyp.yaml, model.cfg, data.yaml where given.

        Args:
            args: every flag and its value.
            hyp: hyper-parameters, a mapping or a dataclass.
            cfg: text of the network, adapted to the data.
            data: what data.yaml holds: `train`, `val`, `nc`, `names`.
        """
        self.write_yaml("args.yaml", args)
        self.write_json("env.json", {"command": called(), **environment()})
        for name, values in (("hyp.yaml", hyp), ("data.yaml", data)):
            if values is not None:
                self.write_yaml(name, values)
        if cfg is not None:
            self.write_text("model.cfg", cfg)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process works in a folder.

    The kernel keeps the lock for this process, without its children, until it ends. So a kill leaves a file, no lock.

    Raises:
        InputError: another process does; names it.
    """
    if sys.platform == "win32":  # it has no such locks
        yield
        return
    path = folder / LOCK
    with _locked_file(path) as file:
        file.truncate(0)
        print(os.getpid(), "on", platform.node(), file=file, flush=True)
        try:
            yield
        finally:
            with suppress(OSError):  # while it is locked: who waits for it sees that the folder has it no more
                path.unlink()


def _locked_file(path: Path) -> TextIO:
    import fcntl

    end = time.monotonic() + LOCK_WAIT
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except (BlockingIOError, PermissionError):
            if time.monotonic() > end:
                file.seek(0)
                raise InputError(
                    f"{path.parent}: process {file.read().strip()} is at work in it; wait until it ends, or choose "
                    "another --name"
                ) from None
            time.sleep(0.1)
        except FileNotFoundError:  # its process has ended in the meantime
            pass
        except OSError:  # a disk without locks
            return file
        file.close()


def check_run(project: Path, name: str) -> None:
    """Refuse a place for a run that cannot be had, before work is done for it.

    Args:
        project: of --project.
        name: of --name.

    Raises:
        InputError: the name is empty, `.` or `..`, or has a slash or a control character; neither `project` nor the
            nearest folder above it that exists can be written.
    """
    if name in ("", ".", "..") or Path(name).name != name or re.search("[\0-\x1f\x7f]", name):
        raise InputError(f"--name {name!r}: not a plain folder name; folders above it go to --project")
    nearest = next(folder for folder in (project.absolute(), *project.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--project {project}: {nearest} is no folder that can be written; choose another one")


def plain(value: Any) -> Any:
    """The value made of what YAML and JSON hold: dict, list, str, int, float, bool, None.

    Dataclasses become mappings, tuples and sets become lists, numpy and torch scalars numbers, anything else its text.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def called() -> list[str] | None:
    """The script and flags that this process was started with; None where it is no script of the suite."""
    script = Path(sys.argv[0]).resolve()
    return [script.name, *sys.argv[1:]] if script.parent == ROOT else None


def environment() -> dict[str, Any]:
    """Return the environment of a run: Python, packages, machine, threads, devices, and the suite's git commit."""
    torch = sys.modules.get("torch")
    packages = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch else [],
        "git_commit": git_commit(ROOT),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def git_commit(root: Path) -> str | None:
    """Return the commit that is checked out in the folder `root`; None without one, or without git."""
    if not (root / ".git").exists():  # of a folder above it the commit says nothing
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Results:
    """A table of epochs, e.g. `results.csv`, rewritten atomically each time, so that a crash leaves whole rows only.

    A row replaces the row of the same epoch and all later ones: a resumed run rewrites what it repeats.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Continue the file at `path`, or start it with the first row; `columns` without the leading `epoch`.

        Raises:
            InputError: the file there has other columns.
        """
        self.path = path
        self.columns = ("epoch", *columns)
        if path.exists() and (found := tuple(read_results(path))) != self.columns:
            raise InputError(f"{path}:1: columns {', '.join(found)}; this run writes {', '.join(self.columns)}")

    def append(self, epoch: int, values: Mapping[str, float | int | None]) -> None:
        """Write the row of one epoch; a column without a value, or with None, stays empty."""
        self.extend(epoch, [values])

    def extend(self, epoch: int, rows: Iterable[Mapping[str, float | int | None]]) -> None:
        """Write the rows of one epoch, in a table that has several."""
        kept = read_text(self.path).splitlines()[1:] if self.path.exists() else []
        kept = [line for line in kept if float(line.partition(",")[0] or "nan") < epoch]
        for values in rows:
            if surplus := set(values) - set(self.columns):
                raise ValueError(f"no column {sorted(surplus)[0]!r}; there are {', '.join(self.columns)}")
            kept.append(",".join([str(epoch), *(_figure(values.get(column)) for column in self.columns[1:])]))
        atomic_write_text(self.path, "".join(f"{line}\n" for line in [",".join(self.columns), *kept]))


def _figure(value: float | int | None) -> str:
    """Six significant digits."""
    return "" if value is None else str(value) if isinstance(value, Integral) else f"{float(value):.6g}"


def read_results(path: Path) -> dict[str, list[float]]:
    """Columns of a results.csv by name; an empty cell is NaN.

    Raises:
        InputError: a row that has not as many cells as the header, or a cell that is no number.
    """
    lines = read_text(path).splitlines()
    columns: dict[str, list[float]] = {name.strip(): [] for name in (lines[0] if lines else "").split(",")}
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(",")
        if len(cells) != len(columns):
            raise InputError(f"{path}:{number}: {len(cells)} cells; the header has {len(columns)}")
        for column, cell in zip(columns.values(), cells, strict=True):
            try:
                column.append(float(cell) if cell.strip() else float("nan"))
            except ValueError:
                raise InputError(f"{path}:{number}: {cell!r} is not a number") from None
    return columns


def last_epochs(results: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median accuracy of the last fifth of the epochs that were evaluated, at least 3 where there are as many.

    best.pt is chosen on the pictures that its accuracy is reported on, which makes this accuracy a little too high. The
    median belongs to no chosen epoch.

    Args:
        results: of `read_results`.

    Returns:
        `median_epochs`, the number of these epochs, `median_map50` and `median_map50_95`; None without evaluation.
    """
    columns = (results.get(key, ()) for key in ("map50", "map50_95"))
    scores = [pair for pair in zip(*columns, strict=True) if all(map(math.isfinite, pair))]
    last = scores[-max(LEAST_LAST, math.ceil(LAST_SHARE * len(scores))) :]
    medians = map(median, zip(*last, strict=True)) if last else (None, None)
    return dict(zip(("median_epochs", "median_map50", "median_map50_95"), (len(last), *medians), strict=True))
