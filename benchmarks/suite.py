"""What rows of docs/results.md have in common: running the suite's scripts, what is stored, sections of the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import log
from utils.errors import InputError
from utils.report.run_dir import environment, read_results
from utils.report.tables import Column, markdown_table

Document = Mapping[str, Any]
"""The stored figures of a row."""
ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results"
RUNS = Path("runs/results")
TRAIN = ("--batch-size", "16", "--workers", "1", "--cache-images")
"""Flags of all trainings."""
BF16 = ("--amp", "bf16")
"""Half the time on a CPU with AMX."""
SEEDS = (0, 1, 2)


class DataSet(NamedTuple):
    """A real data set."""

    key: str
    what: str

    @property
    def file(self) -> str:
        """Its .data file; `python` puts the folder of the real data for `{shared}`."""
        return f"{{shared}}/data/{self.key}/{self.key}.data"

    def flags(self, size: int) -> list[str]:
        """Flags of scripts that read it, with the side of the network input."""
        return ["--data", self.file, "--img_size", str(size)]


BCCD = DataSet("bccd", "bccd (3 classes)")
ROADSIGNS = DataSet("roadsigns", "roadsigns (21 classes)")
CHESS = DataSet("chess", "chess (13 classes)")


class Finished(NamedTuple):
    """The result of a row."""

    document: dict[str, Any]
    picture: Path | None = None
    """It becomes docs/images/ROW_NAME."""


class PageSection(NamedTuple):
    """A section of docs/results.md; its title begins with its row, or it has commands."""

    title: str
    text: str
    columns: Sequence[Column | str]
    lines: Sequence[Sequence[Any]]
    commands: Sequence[str] = ()
    note: str = ""
    picture: tuple[str, str] | None = None
    """What it shows, and its name in docs/images."""

    def markdown(self) -> str:
        """The section as it stands on the page."""
        commands = self.commands or [f"python -m benchmarks.results --rows {self.title.partition(',')[0]}"]
        parts = [f"## {self.title}", self.text, markdown_table(self.columns, self.lines)]
        parts.append("\n".join(f"    {command}" for command in commands))
        if self.note:
            parts.append(self.note)
        if self.picture:
            parts.append("![{}](images/{})".format(*self.picture))
        return "\n\n".join(parts) + "\n"


def shared(text: str) -> str:
    """The text with the folder of the real data for `{shared}`."""
    return text.replace("{shared}", os.environ.get("DARKNET_SHARED", "../shared"))


def shown(command: Sequence[object]) -> str:
    """A command as the page shows it."""
    return " ".join(map(str, ["python", *command])).replace("{shared}", "../shared")


def python(*command: object) -> str:
    """Run one of the suite's scripts and return its output; its progress goes to stderr.

    Raises:
        InputError: it failed.
    """
    arguments = [shared(str(word)) for word in command]
    log(f"python {' '.join(arguments)}")
    process = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise InputError(f"python {' '.join(arguments)}: ended with status {process.returncode}")
    return process.stdout


def once(product: Path, *command: object) -> str:
    """Run a script unless its product is there, and return its `shown` command.

    A folder that a killed one has left is taken.
    """
    if not product.exists():
        python(*command, *["--exist-ok"] * ("--name" in command))
    return shown(command)


def train(folder: Path, *command: Any) -> str:
    """Run a training with --epochs, or what is left of it, and return its `shown` command.

    Args:
        folder: its run directory.
        command: arguments of python.
    """
    table = folder / "results.csv"
    done = len(read_results(table)["epoch"]) if table.exists() else 0
    if done < int(command[command.index("--epochs") + 1]):
        begun = (folder / "weights" / "last.pt").exists()
        python("train.py", "--resume", folder) if begun else python(*command, "--exist-ok")
    return shown(command)


def compare(common: Sequence[str], files: Mapping[str, object], *flags: str) -> dict[str, Any]:
    """The document of benchmarks.compare.

    Args:
        common: --data, its file, and --img_size.
        files: networks by name.
        flags: more of its flags.
    """
    networks = [f"{name}={file}" for name, file in files.items()]
    document = json.loads(python("-m", "benchmarks.compare", *common, *networks, *flags, "--json"))
    return document | {"data": common[1].replace("{shared}", "../shared")}


def weights_of(row: str) -> Path:
    """The best weights of a training row, or of ROW/STAGE of a compression.

    Raises:
        InputError: they are missing.
    """
    path = RUNS / row / "weights" / "best.pt"
    if not path.is_file():
        raise InputError(f"{path}: is missing; run the row {row.partition('/')[0]} first")
    return path


def tuned(goal: str, recipe: str = "balanced") -> Path:
    """The best weights of the distillation in a recipe of a goal row.

    Raises:
        InputError: they are missing.
    """
    folder = RUNS / goal / recipe
    paths = sorted(folder.glob("tune*/weights/best.pt"))
    if not paths:
        raise InputError(f"{folder}: has no float network; run the row {goal} first")
    return paths[-1]


def machine(where: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what `place` reads, of an env.json or of this process, whose version of torch names that of CUDA, too."""
    import torch

    version = where["packages"]["torch"] if where else torch.__version__
    where = where or environment()
    packages = {"torch": version, "commit": where["git_commit"]}
    return {"machine": where["cpu"], "gpus": where["gpus"], "threads": where["threads"], **packages}


def place(*documents: Document) -> str:
    """Machines, threads, versions and commits in words."""
    machines = [", ".join([*document.get("gpus", [])[:1], document["machine"]]) for document in documents]
    commits = [(document["commit"] or "unknown")[:9] for document in documents]
    threads, versions = ([document[key] for document in documents] for key in ("threads", "torch"))
    parts = (("", machines), ("threads: ", threads), ("PyTorch ", versions), ("commit ", commits))
    return ", ".join(name + " or ".join(dict.fromkeys(map(str, values))) for name, values in parts) + "."
