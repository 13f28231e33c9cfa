"""Recipes: YAML files that say which scripts compress a network, in which order and with which flags. No torch.

    stages:
      train:  {script: train, epochs: 60}
      prune:  {script: slim_prune, target-macs: 0.5}
      tune:   {script: train, epochs: 20, teacher: train}
      int8:   {script: quantize}
      file:   {script: export, int8: true}

A stage is a name, its script, and flags of the script. It begins with the network of the last stage before it that made
one, or of the stage that `from` names; `teacher` names the stage whose network teaches (`--t_weights`). Where there are
weights to begin with, the network that they hold takes the place of a first stage that trains.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import ROOT, read_text, reading_yaml
from utils.quantization.scheme import TARGETS

MAKERS = ("train", "slim_prune", "shortcut_prune", "normal_prune", "regular_prune", "layer_prune",
          "layer_channel_prune", "group_prune", "quantize")  # fmt: skip
"""Scripts that make a network the next stage can begin with."""
SCRIPTS = (*MAKERS, "export", "test")
OWN = ("script", "from", "teacher")
"""Keys of a stage that are no flags."""
GIVEN = ("data", "cfg", "weights", "t_weights", "project", "name", "exist_ok", "json", "resume", "output", "img_size")
"""Flags that the journey itself sets."""
ELSEWHERE = ("dry_run", "evolve", "sensitivity", "explain", "help", "version", "debug", "nosave", "single_cls")
"""Flags with which a script makes no network, or one of other classes than the data set has."""
ORIGINAL = "original"
"""Stage that reads the network of --weights, with its cfg and names, into one .pt file for all others."""
RESERVED = ("report", ORIGINAL)
"""Names that no stage of a recipe has."""
INTEGRAL = {"tensorrt": ("tensorrt",), "fpga": ("fpga",)}
"""Formats that are made of quantized networks only, and for which --target these must be quantized."""
INTEGERS = tuple(name for name in TARGETS if name not in INTEGRAL)
"""--target of the networks that `--int8` takes."""
UNMEASURED = ("torchscript", "fpga")
"""Formats whose files test.py does not run."""
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

    @property
    def quantizes(self) -> bool:
        """Whether the network that it makes is quantized."""
        return self.script == "quantize" or self.value("--quantized") not in (None, "0", "-1")

    @property
    def target(self) -> str:
        """Whose integers a quantized network has: `--target`."""
        return "fpga" if "--FPGA" in self.flags else self.value("--target") or "cpu"

    def value(self, flag: str) -> str | None:
        """The word behind a flag; None if it has not got the flag."""
        return self.flags[self.flags.index(flag) + 1] if flag in self.flags[:-1] else None


@dataclass(frozen=True)
class Recipe:
    """The stages of a journey, in order."""

    path: Path
    stages: tuple[Stage, ...]

    def started(self) -> Recipe:
        """The recipe for a network that exists: it begins with the stage ORIGINAL.

        This takes the place of a first stage that trains a network, neither sparse nor rounded.
        """
        first, others = self.stages[0], self.stages
        names: dict[str | None, str] = {None: ORIGINAL}
        if first.script == "train" and "-sr" not in first.flags and not first.quantizes:
            names[first.name], others = ORIGINAL, others[1:]
            if not others:
                raise InputError(f"{self.path}: its only stage is left out where --weights is given")
        stages = (
            dataclasses.replace(
                stage,
                source=names.get(stage.source, stage.source),
                teacher=stage.teacher and names.get(stage.teacher, stage.teacher),
            )
            for stage in others
        )
        return Recipe(self.path, (Stage(ORIGINAL, "export", ("--format", "pt"), None), *stages))


def read_recipe(path: Path, changes: Sequence[tuple[str, str, Any]] = ()) -> Recipe:
    """A recipe.

    Args:
        path: YAML file.
        changes: (stage, flag, value) to be put in place of what it says.

    Raises:
        InputError: it cannot be read, or a stage cannot be what it says.
    """
    document = _document(path)
    stages = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(stages, dict) or not stages or set(document) != {"stages"}:
        raise InputError(f"{path}: a recipe is `stages:` and below it a name and flags for each; see data/recipes")
    stages = {name: dict(values) if isinstance(values, dict) else values for name, values in stages.items()}
    for name, flag, value in changes:
        if not isinstance(stages.get(name), dict):
            raise InputError(f"--set {name}.{flag}: there is no stage {name}; there are {', '.join(map(str, stages))}")
        stages[name][flag] = value
    made: list[Stage] = []
    for name, values in stages.items():
        made.append(_stage(path, name, values, made))
    return Recipe(path, tuple(made))


def _document(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        InputError: it is none, or a name stands twice in one place.
    """
    import yaml

    text = read_text(path, max_bytes=LARGEST_FILE)
    with reading_yaml(path):
        for name, line in _repeated(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise InputError(f"{path}:{line}: {name} stands there twice; give the second another name")
        return yaml.safe_load(text)


def _repeated(node: Any) -> Iterator[tuple[str, int]]:
    """Keys that a mapping of a YAML document has twice, with their lines."""
    if node is None or isinstance(node.value, str):
        return
    parts = node.value if node.id == "sequence" else [value for _, value in node.value]
    keys = [] if node.id == "sequence" else [(key.value, key.start_mark.line + 1) for key, _ in node.value]
    yield from (key for number, key in enumerate(keys) if key[0] in [other for other, _ in keys[:number]])
    for part in parts:
        yield from _repeated(part)


def _stage(path: Path, name: Any, values: Any, before: Sequence[Stage]) -> Stage:
    where = f"{path}: stage {name}"
    if not _is_word(name) or name in RESERVED:
        raise InputError(f"{where}: a name has letters, digits, - and _, and is not {' or '.join(RESERVED)}")
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
    for key in given:
        if not _is_word(key):
            raise InputError(f"{where}: {key!r} is no flag")
        if key.replace("-", "_") in GIVEN:
            raise InputError(f"{where}: {key} is set by compress.py; leave it out")
        if key.replace("-", "_") in ELSEWHERE and given[key] is not False:
            raise InputError(f"{where}: with {key} no network is made that the next stages can take; leave it out")
    stage = Stage(name, values["script"], tuple(_tokens(where, given)), source, values.get("teacher"))
    _check_source(where, stage, next((other for other in before if other.name == source), None))
    return stage


def _check_source(where: str, stage: Stage, source: Stage | None) -> None:
    """Refuse integers of a float network, what cannot begin with a quantized one, and files that nothing here runs."""
    quantized = source is not None and source.quantizes
    if stage.script == "export" and source is not None:
        kind = stage.value("--format") or "onnx"
        wants = "--int8" in stage.flags or kind in INTEGRAL
        if wants and not quantized:
            raise InputError(f"{where}: makes integers of {source.name}, which is float; put a stage with `script: "
                             "quantize`, or train with `quantized: 1`, before it")  # fmt: skip
        if quantized and not wants:
            raise InputError(f"{where}: makes a float file of {source.name}, which is quantized; add `int8: true`, or "
                             "begin with a float network by `from`")  # fmt: skip
        targets = INTEGRAL.get(kind, INTEGERS)
        if quantized and source.target not in targets:
            raise InputError(f"{where}: {source.name} is quantized with target {source.target}; this file takes "
                             f"{', '.join(targets)}")  # fmt: skip
    if stage.script == "test" and source is not None and source.script == "export":
        kind = source.value("--format")
        if kind in UNMEASURED or "--nms" in source.flags:
            what = "with NMS" if "--nms" in source.flags else f"of format {kind}"
            raise InputError(
                f"{where}: {source.name} makes a file {what}, which test.py does not run; name another stage by `from`"
            )
    if quantized and (stage.script.endswith("_prune") or stage.script == "quantize"):
        raise InputError(f"{where}: begins with {source.name}, which is quantized; {stage.script} takes float networks")


def _is_word(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-]+", name) is not None


def _placed(path: Any) -> str:
    """A file that the suite brings, from wherever compress.py is started."""
    own = ROOT / str(path)
    return str(own) if own.is_file() and not Path(str(path)).exists() else str(path)


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
        tokens += [] if value is True else [_placed(one) if key == "hyp" else str(one) for one in values]
    return tokens
