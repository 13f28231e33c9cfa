"""The folder that --resume means, the flags that its run had, and whether those beside --resume agree; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import CheckpointError, InputError
from utils.files import read_text
from utils.training.settings import GONE, flag_name

STUDY = "study.db"
"""What makes a folder that of a search."""
START = "start.yaml"
"""Hyper-parameters that a search starts from."""
PARTS = {
    False: ("args.yaml", "hyp.yaml", "model.cfg", "weights/last.pt"),
    True: ("args.yaml", START, "model.cfg", STUDY),
}
"""Files without which a run, or a search (True), cannot go on."""
MAY_CHANGE = ("amp", "device", "workers", "tensorboard", "cache")
"""Flags that a resumed run takes from its command line."""
OF_NO_RUN = ("resume", "json", "debug", "exist_ok")
RENAMED = ("no_flip", "cache_images")
"""Flags of older versions whose values are elsewhere: in hyp.yaml, or may change."""
PATHS = ("data", "cfg", "weights", "t_cfg", "t_weights", "hyp")


def newest_run(project: Path) -> Path:
    """Return the folder in `project` that a run or a search wrote to last.

    Raises:
        CheckpointError: there is none.
    """
    written = [path for name in ("weights/last.pt", STUDY) for path in project.glob(f"*/{name}")]
    if not written:
        raise CheckpointError(f"--resume: no run in {project} has a weights/last.pt or a {STUDY}")
    newest = max(written, key=lambda path: path.stat().st_mtime_ns)
    return project / newest.relative_to(project).parts[0]


def is_search(folder: Path) -> bool:
    """Whether a folder is that of a search over hyper-parameters."""
    return (folder / STUDY).is_file()


def stored_flags(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that the run in `folder` was started with, without those that have their default or are gone.

    Args:
        folder: of the run.
        known: flags of this version.

    Raises:
        CheckpointError: a file of the run is missing, or its args.yaml is none, or has a flag that is not in `known`.
    """
    for name in PARTS[is_search(folder)]:
        if not (folder / name).is_file():
            raise CheckpointError(f"--resume {folder}: {name} is missing; it is no run that can go on")
    try:
        stored = yaml.safe_load(read_text(folder / "args.yaml"))
    except yaml.YAMLError:
        stored = None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{folder}/args.yaml: not a mapping of flags; it is no run that can go on")
    flags = {}
    for name, value in stored.items():
        if name in RENAMED or (name in GONE and (GONE[name].unused is None or value in GONE[name].unused)):
            continue
        if name not in known:
            raise CheckpointError(f"{folder}/args.yaml: unknown flag {name!r}; it is of another version")
        if value is not None:  # what older versions have for a default
            flags[name] = value
    return flags


def changed_flags(folder: Path, run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags on the command line that change something in the run: `MAY_CHANGE`, and a search's trials.

    Args:
        folder: of the run.
        run: all its flags.
        given: flags on the command line, without defaults.

    Raises:
        InputError: another flag has another value than the run's.
    """
    free = (*MAY_CHANGE, *(("evolve",) if is_search(folder) else ()))
    place = {"project": str(folder.parent), "name": folder.name}
    for key, value in given.items():
        known = [flags[key] for flags in (run, place) if key in flags]
        if key in free or key in OF_NO_RUN or any(_same(key, value, other) for other in known):
            continue
        raise InputError(
            f"--resume {folder}: {flag_name(key)} is {value!r} here and {run[key]!r} in the run; leave it out to go on "
            "with the run, or start a new one"
        )
    return {key: given[key] for key in free if key in given}


def _same(key: str, value: Any, other: Any) -> bool:
    if key in (*PATHS, "project") and value is not None and other is not None:
        return Path(value).absolute() == Path(other).absolute()
    return value == other
