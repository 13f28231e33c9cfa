"""What the real runs have in common: how a training is started or goes on, how a network is measured, what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2

from utils.cli import log
from utils.errors import InputError
from utils.files import atomic_write_bytes, read_text
from utils.report.run_dir import read_results

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "images"
RUNS = Path("runs/results")
TRAIN = ("--batch-size", "16", "--workers", "1", "--cache-images")
"""Flags of all trainings."""
PUBLISHED_SIDE = 1024
"""Longer side of a picture in docs/images, in pixels."""


class Finished(NamedTuple):
    """What a row found."""

    document: dict[str, Any]
    """Its figures, as they are stored."""
    pictures: Mapping[str, Path] = {}
    """Pictures for docs/images, by their names there."""


def shared() -> str:
    """The folder of the real data."""
    return os.environ.get("DARKNET_SHARED", "../shared")


def weights_of(row: str) -> Path:
    """The best weights of a training row.

    Raises:
        InputError: they are missing.
    """
    path = RUNS / row / "weights" / "best.pt"
    if not path.is_file():
        raise InputError(f"{path}: is missing; run the row {row} first")
    return path


def train(folder: Path, command: list[str]) -> None:
    """Run a training, or what is left of it.

    Args:
        folder: its run directory.
        command: the arguments of python that start it, with --epochs.
    """
    epochs = int(command[command.index("--epochs") + 1])
    if epochs_done(folder) < epochs:
        begun = (folder / "weights" / "last.pt").exists()
        python("train.py", "--resume", str(folder)) if begun else python(*command)


def measure(data: str, size: int, weights: Path) -> dict[str, Any]:
    """What test.py finds."""
    flags = ("--data", data, "--img_size", str(size), "--json", "--weights", str(weights))
    return json.loads(python("test.py", *flags))


def describe_environment(run: Path) -> dict[str, Any]:
    """Machine, threads, version and commit of a run."""
    environment = json.loads(read_text(run / "env.json"))
    return {
        "machine": environment["cpu"],
        "threads": environment["threads"],
        "torch": environment["packages"]["torch"],
        "commit": environment["git_commit"],
    }


def publish(picture: Path, target: Path) -> None:
    """Copy a picture of a run into the documentation, small enough for a repository."""
    image = cv2.imread(str(picture))
    scale = min(1, PUBLISHED_SIDE / max(image.shape[:2]))
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(target.suffix, image, [cv2.IMWRITE_JPEG_QUALITY, 85] if target.suffix == ".jpg" else [])
    atomic_write_bytes(target, data.tobytes())


def epochs_done(folder: Path) -> int:
    """Epochs in a run's results.csv."""
    table = folder / "results.csv"
    return len(read_results(table)["epoch"]) if table.exists() else 0


def python(*arguments: str) -> str:
    """Run one of the suite's scripts; its output, while its progress goes to stderr."""
    log(f"python {' '.join(arguments)}")
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"python {' '.join(arguments)}: ended with status {done.returncode}")
    return done.stdout
