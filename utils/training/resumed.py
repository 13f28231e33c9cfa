"""Which folder `--resume` means, the flags that its run had, and whether those given beside it agree; no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import CheckpointError, InputError
from utils.files import read_text

STUDY = "study.db"
"""What makes a folder that of a search."""
START = "start.yaml"
"""Hyper-parameters that a search starts from."""
PARTS = {
    False: ("args.yaml", "hyp.yaml", "model.cfg", "weights/last.pt"),
    True: ("args.yaml", START, "model.cfg", STUDY),
}
"""Files without which a run, or a search (True), cannot go on."""
MAY_CHANGE = ("amp", "device", "workers", "tensorboard", "cache", "cache_dir", "cache_images")
"""Flags that a resumed run takes from its command line."""
OF_NO_RUN = ("resume", "json", "debug", "exist_ok")
ALL_ALIKE = ("evaluator", "memory_format")
"""Flags of older versions whose values all mean what is done now."""
SPELLED = {"img_size": "--img_size", "sr": "-sr", "t_cfg": "--t_cfg", "t_weights": "--t_weights", "AT_str": "--AT_str"}
"""Flags that are not written as their names are."""
PATHS = ("data", "cfg", "weights", "t_cfg", "t_weights", "hyp", "cache_dir")


def newest_run(project: Path) -> Path:
    """The folder in `project` that a run or a search wrote to last.

    Raises:
        CheckpointError: there is none.
    """
    found = [path for name in ("weights/last.pt", STUDY) for path in project.glob(f"*/{name}")]
    if not found:
        raise CheckpointError(f"--resume: no run in {project} has a weights/last.pt or a {STUDY}")
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return project / newest.relative_to(project).parts[0]


def is_search(folder: Path) -> bool:
    """Whether a folder is that of a search over hyper-parameters."""
    return (folder / STUDY).is_file()


def stored_flags(folder: Path, known: Mapping[str, Any], gone: Collection[str] = ()) -> dict[str, Any]:
    """Return the flags that the run in `folder` was started with.

    Args:
        folder: of the run.
        known: flags of this version.
        gone: flags of older versions, which are dropped where the run did not use them.

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
    dropped = {flag for flag in gone if flag in ALL_ALIKE or stored.get(flag) in (None, False)}
    stored = {flag: value for flag, value in stored.items() if flag not in dropped}
    unknown = set(stored) - set(known)
    if unknown:
        raise CheckpointError(f"{folder}/args.yaml: unknown flag {sorted(unknown)[0]!r}; it is of another version")
    return stored


def changed_flags(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the flags on the command line that change something in the run: `MAY_CHANGE`, and a search's trials.

    Args:
        folder: of the run.
        stored: the flags it was started with.
        given: flags on the command line, without defaults.

    Raises:
        InputError: another flag has another value than the run's.
    """
    free = (*MAY_CHANGE, *(("evolve",) if is_search(folder) else ()))
    own = {"project": str(folder.parent), "name": folder.name}
    for key, value in given.items():
        if key in (*free, *OF_NO_RUN) or key not in stored or any(
            _same(key, value, known[key]) for known in (stored, own) if key in known
        ):  # fmt: skip
            continue
        flag = SPELLED.get(key, f"--{key.replace('_', '-')}")
        raise InputError(
            f"--resume {folder}: {flag} is {value!r} here and {stored[key]!r} in the run; leave it out to go on "
            "with the run, or start a new one"
        )
    return {key: given[key] for key in free if key in given}


def _same(key: str, value: Any, other: Any) -> bool:
    if key in (*PATHS, "project") and value is not None and other is not None:
        return Path(value).absolute() == Path(other).absolute()
    return value == other
