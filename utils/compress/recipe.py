"""Recipes: YAML files that say which scripts compress a network, in which order and with which flags. No torch.

    stages:
      train:  {script: train, epochs: 60}
      prune:  {script: slim_prune, target-macs: 0.5}
      tune:   {script: train, epochs: 20, teacher: train}
      int8:   {script: quantize}
      file:   {script: export, int8: true}

A stage is a name, its script, and flags of the script. It begins with the network of the last stage before it that made
one, or of the stage that `from` names; `teacher` names the stage whose network teaches (`--t_weights`). The first stage
that trains from nothing is left out when there are weights to begin with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import read_text

MAKERS = ("train", "slim_prune", "shortcut_prune", "normal_prune", "regular_prune", "layer_prune",
          "layer_channel_prune", "group_prune", "quantize")  # fmt: skip
"""Scripts that make a network the next stage can begin with."""
SCRIPTS = (*MAKERS, "export", "test")
OWN = ("script", "from", "teacher")
"""Keys of a stage that are no flags."""
GIVEN = ("data", "cfg", "weights", "t_weights", "project", "name", "exist_ok", "json", "resume", "output", "img_size")
"""Flags that the journey itself sets."""
LARGEST_FILE = 1 << 16


@dataclass(frozen=True)
class Stage:
    """One call of a script."""

    name: str
    script: str
    """One of SCRIPTS."""
    flags: tuple[str, ...]
    """As the script gets them, but those of GIVEN."""
    source: str | None
    """Stage whose network it begins with; None: the start of the journey."""
    teacher: str | None = None
    """Stage whose network teaches."""

    @property
    def makes_network(self) -> bool:
        """Whether another stage can begin with what it makes."""
        return self.script in MAKERS


@dataclass(frozen=True)
class Recipe:
    """The stages of a journey, in order."""

    path: Path
    stages: tuple[Stage, ...]

    def started(self) -> Recipe:
        """The recipe for a network that exists: without its first stage, whose network is the one that is given."""
        first, *others = self.stages
        if not (first.script == "train" and first.source is None):
            return self
        if not others:
            raise InputError(f"{self.path}: its only stage is left out where --weights is given")
        stages = tuple(
            dataclasses.replace(
                stage,
                source=None if stage.source == first.name else stage.source,
                teacher=START if stage.teacher == first.name else stage.teacher,
            )
            for stage in others
        )
        return Recipe(self.path, stages)


START = ""
"""Stands for the network of --weights as a teacher."""


def read_recipe(path: Path, changes: Sequence[tuple[str, str, Any]] = ()) -> Recipe:
    """A recipe.

    Args:
        path: YAML file.
        changes: (stage, flag, value) to be put in place of what it says.

    Raises:
        InputError: it cannot be read, or a stage cannot be what it says.
    """
    import yaml

    try:
        document = yaml.safe_load(read_text(path, max_bytes=LARGEST_FILE))
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        reason = " ".join(str(failure).split())[:160]
        raise InputError(f"{path}: is no YAML ({reason})") from None
    stages = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(stages, dict) or not stages or set(document) != {"stages"}:
        raise InputError(f"{path}: a recipe is `stages:` and below it a name and flags for each; see data/recipes")
    for name, flag, value in changes:
        if not isinstance(stages.get(name), dict):
            raise InputError(f"--set {name}.{flag}: there is no stage {name}; there are {', '.join(map(str, stages))}")
        stages[name][flag] = value
    made: list[Stage] = []
    for name, values in stages.items():
        made.append(_stage(path, name, values, made))
    return Recipe(path, tuple(made))


def _stage(path: Path, name: Any, values: Any, before: Sequence[Stage]) -> Stage:
    where = f"{path}: stage {name}"
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"{where}: a name has letters, digits, - and _")
    if not isinstance(values, dict) or values.get("script") not in SCRIPTS:
        raise InputError(f"{where}: needs `script:` and one of {', '.join(SCRIPTS)}")
    makers = [stage.name for stage in before if stage.makes_network]
    source = values.get("from", makers[-1] if makers else None)
    for key, other in (("from", source), ("teacher", values.get("teacher"))):
        files = [stage.name for stage in before if stage.script != "test"]
        allowed = files if key == "from" and values["script"] == "test" else makers
        if other is not None and other not in allowed:
            raise InputError(f"{where}: {key}: {other} is no stage before it that makes a network; "
                             f"there are {', '.join(allowed) or 'none'}")  # fmt: skip
    if before and source is None:
        raise InputError(f"{where}: there is no network to begin with")
    given = {str(key): value for key, value in values.items() if key not in OWN}
    taken = next((key for key in given if key.replace("-", "_") in GIVEN), None)
    if taken is not None:
        raise InputError(f"{where}: {taken} is set by compress.py; leave it out")
    return Stage(name, values["script"], tuple(_tokens(where, given)), source, values.get("teacher"))


def _tokens(where: str, flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    tokens = []
    for key, value in flags.items():
        values = value if isinstance(value, list) else [value]
        if any(not isinstance(one, str | int | float) for one in values):
            raise InputError(f"{where}: {key}: {value}: a flag is true, a number, a text, or a list of these")
        if value is False:
            continue
        tokens.append(f"-{key}" if key in ("sr", "pt") else f"--{key}")
        tokens += [] if value is True else [f"{one:g}" if isinstance(one, float) else str(one) for one in values]
    return tokens
