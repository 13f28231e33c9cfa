"""Recipes: YAML files that say which scripts compress a network, in which order and with which flags. No torch.

    all: {batch-size: 16, no-flip: true}
    stages:
      train:  {script: train, epochs: 60}
      prune:  {script: slim_prune, target-macs: 0.5}
      tune:   {script: train, epochs: 20, teacher: train, allow: 5}
      int8:   {script: quantize}
      file:   {script: export, int8: true}

A stage is a name, its script, and flags of the script. It begins with the network of the last stage before it that made
one, or of the stage that `from` names; `teacher` names the stage whose network teaches (`--t_weights`). `allow` is the
number of points of AP50 that the stage may lose. The flags of `all` go to every stage whose script has them. Where
there are weights to begin with, the network that they hold takes the place of a first stage that trains.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.cli import dashed, flag_words, spelling
from utils.errors import InputError
from utils.export.settings import ALIASES, PAIRS, UNMEASURED, ExportSettings
from utils.files import ROOT, foreign_errors, read_text
from utils.quantization.scheme import TARGETS
from utils.training.settings import ScheduleFlags

PRUNERS = ("slim", "shortcut", "normal", "regular", "layer", "layer_channel", "group")
MAKERS = ("train", *(f"{name}_prune" for name in PRUNERS), "quantize")
"""Scripts that make a network the next stage can begin with."""
SCRIPTS = (*MAKERS, "export", "test")
ALL = "all"
"""Section of the flags that go to every stage whose script has them."""
OWN = ("script", "from", "teacher", "allow")
"""Keys of a stage that are no flags."""
GIVEN = ("data", "cfg", "weights", "t-weights", "project", "name", "exist-ok", "json", "resume", "output", "img-size")
"""Flags that the journey itself sets."""
ELSEWHERE = ("dry-run", "evolve", "explain", "help", "version", "debug", "nosave", "single-cls")
"""Flags with which a script makes no network, or one of other classes than the data set has."""
ORIGINAL = "original"
"""Stage that reads the network of --weights, with its cfg and names, into one .pt file for all others."""
ACCURACY = "original-accuracy"
"""Stage that measures that network where a gate has to know its AP50 and no other stage says it."""
RESERVED = ("report", ORIGINAL, ACCURACY, ALL)
"""Names that no stage of a recipe has."""
INTEGRAL = {"tensorrt": ("tensorrt",), "fpga": ("fpga",)}
"""Formats that are made of quantized networks only, and for which --target these must be quantized."""
INTEGERS = tuple(name for name in TARGETS if name not in INTEGRAL)
"""--target of the networks that `--int8` takes."""
ALLOWED = 10.0
"""Points of AP50 that a training of a trained network may lose."""
LARGEST_FILE = 1 << 16

FirstSpelling = Callable[[str, str], str]
"""First spelling of a flag, with its dashes, of a script, by its name; empty if the script has no such flag."""


@dataclass(frozen=True)
class Stage:
    """A call of a script."""

    name: str
    script: str
    """A name in SCRIPTS."""
    flags: tuple[str, ...]
    """As the script gets them, but those of GIVEN."""
    source: str | None
    """Stage whose network it begins with; None: the start of the journey."""
    teacher: str | None = None
    """Stage whose network teaches."""
    allow: float | None = None
    """Points of AP50 that it may lose to the best network before it; None: as `gate` says."""

    @property
    def words(self) -> tuple[str, ...]:
        """Its flags as names are compared."""
        return tuple(map(spelling, self.flags))

    @property
    def sparse(self) -> bool:
        """Return whether it is a sparse training."""
        return "-sr" in self.words or "--sparsity-regularization" in self.words

    @property
    def gate(self) -> float | None:
        """Points of AP50 that it may lose: ALLOWED of a training of a trained network; None: as many as it likes."""
        trains = self.script == "train" and self.source is not None
        return ALLOWED if self.allow is None and trains else self.allow

    @property
    def compares(self) -> bool:
        """Return whether its document has the AP50 of the network that it begins with."""
        return "--no-test" not in self.words and (self.script.endswith("_prune") or self.script == "quantize")

    @property
    def quantizes(self) -> bool:
        """Return whether the network that it makes is quantized."""
        return self.script == "quantize" or self.value("--quantized") not in (None, "0", "-1")

    @property
    def foreign(self) -> bool:
        """Return whether it makes a file that PyTorch does not run."""
        return self.script == "export" and self.format not in PAIRS

    @property
    def format(self) -> str:
        """Format of the file that an export makes."""
        kind = self.value("--format") or ExportSettings.format
        return ALIASES.get(kind, kind)

    @property
    def target(self) -> str:
        """Whose integers a quantized network has: `--target`."""
        return "fpga" if "--fpga" in self.words else self.value("--target") or "cpu"

    @property
    def epochs(self) -> int:
        """Epochs that the stage trains; 0 if it is no training."""
        return int(self.value("--epochs") or ScheduleFlags.epochs) if self.script == "train" else 0

    def value(self, flag: str) -> str | None:
        """The word behind a flag; None if it has not got the flag."""
        return self.flags[self.words.index(flag) + 1] if flag in self.words[:-1] else None


@dataclass(frozen=True)
class Recipe:
    """The stages of a journey, in order."""

    path: Path
    stages: tuple[Stage, ...]
    test_flags: tuple[str, ...] = ()
    """Flags of ALL that test.py has."""

    def started(self) -> Recipe:
        """The recipe for a network that exists: it begins with the stage ORIGINAL, and ACCURACY if that is needed.

        This takes the place of a first stage that trains a network, neither sparse nor rounded.
        """
        first, others = self.stages[0], self.stages
        names: dict[str | None, str] = {None: ORIGINAL}
        if first.script == "train" and not first.sparse and not first.quantizes:
            names[first.name], others = ORIGINAL, others[1:]
            if not others:
                raise InputError(f"{self.path}: its only stage is left out where --weights is given")
        stages = tuple(
            dataclasses.replace(
                stage,
                source=names.get(stage.source, stage.source),
                teacher=stage.teacher and names.get(stage.teacher, stage.teacher),
            )
            for stage in others
        )
        start = [Stage(ORIGINAL, "export", ("--format", "pt"), None)]
        for stage in stages:
            if stage.compares and stage.source == ORIGINAL:
                break
            if stage.gate is not None:
                start.append(Stage(ACCURACY, "test", self.test_flags, ORIGINAL))
                break
        return Recipe(self.path, (*start, *stages))


def read_recipe(
    path: Path, first_spelling: FirstSpelling, changes: Sequence[tuple[str, str, Any]] = (), **everywhere: Any
) -> Recipe:
    """A recipe.

    Args:
        path: YAML file.
        first_spelling: of the flags that scripts have.
        changes: (stage or ALL, flag, value) to be put in place of what it says.
        everywhere: flags that replace those of ALL and of all stages.

    Raises:
        InputError: it cannot be read, or a stage cannot be what it says.
    """
    text = read_text(path, max_bytes=LARGEST_FILE)
    with foreign_errors(path, "not valid YAML"):
        document = RecipeLoader(text).get_single_data()
    stages, shared = (document.get("stages"), document.get(ALL, {})) if isinstance(document, dict) else (None, None)
    if not (isinstance(stages, dict) and stages and isinstance(shared, dict)) or set(document) - {"stages", ALL}:
        raise InputError(
            f"{path}: a recipe is `stages:` and below it a name and flags for each, and perhaps `{ALL}:` "
            "with flags for all of them; see data/recipes"
        )
    stages = {name: dict(values) if isinstance(values, dict) else values for name, values in stages.items()}
    parts = {**stages, ALL: dict(shared)}
    _change(parts, changes, everywhere, first_spelling)
    for key, value in parts[ALL].items():
        if key in OWN:
            raise InputError(f"{path}: {ALL}: {key} belongs to a stage")
        _check_flag(f"{path}: {ALL}", key, value)

    def flags_for(script: str, without: Collection[str] = ()) -> dict[str, Any]:
        known = {key: first_spelling(script, dashed(key)) for key in parts[ALL]}
        there = {first_spelling(script, dashed(key)) for key in without}
        return {key: value for key, value in parts[ALL].items() if known[key] and known[key] not in there}

    made: list[Stage] = []
    for name, values in stages.items():
        made.append(_stage(path, name, values, made, flags_for))
    for key in parts[ALL]:
        if not any(first_spelling(stage.script, dashed(key)) for stage in made):
            raise InputError(f"{path}: {ALL}: no script of its stages has a flag {dashed(key)}")
    return Recipe(path, tuple(made), tuple(_tokens(f"{path}: {ALL}", flags_for("test"))))


def _change(
    parts: Mapping[Any, Any],
    changes: Sequence[tuple[str, str, Any]],
    everywhere: Mapping[str, Any],
    first_spelling: FirstSpelling,
) -> None:
    """Put the values of the command line into the stages and ALL; arguments as of `read_recipe`."""
    scripts = {part["script"] for part in parts.values() if isinstance(part, dict) and part.get("script") in SCRIPTS}

    def spellings(key: str) -> set[str]:
        return {first_spelling(script, dashed(key)) for script in scripts} - {""} or {spelling(key)}

    for name, flag, value in changes:
        if not isinstance(parts.get(name), dict):
            raise InputError(f"--set {name}.{flag}: there is no stage {name}; there are {', '.join(map(str, parts))}")
        for key in list(parts[name]):
            if key != flag and spellings(str(key)) & spellings(flag):
                del parts[name][key]  # `no_test: true` would stay beside `no-test: false`, which writes no word
        parts[name][flag] = value
    for flag, value in everywhere.items():
        for values in filter(lambda part: isinstance(part, dict), parts.values()):
            for key in [key for key in values if spelling(str(key)) == flag]:
                del values[key]
        parts[ALL][flag] = value


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's loader, but no name stands there twice, and the `off` of `amp: off` is a text, as in YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - of this class, as PyYAML has it
        start: [(tag, form) for tag, form in forms if start in "tTfF" or not tag.endswith(":bool")]
        for start, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping whose names differ."""
        names: list[Any] = []
        for key, _ in node.value:
            if key.value in names:
                problem = f"{key.value} stands there twice; give the second another name"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            names.append(key.value)
        return super().construct_mapping(node, deep)


def _stage(path: Path, name: Any, values: Any, before: Sequence[Stage], shared: Callable[..., dict[str, Any]]) -> Stage:
    """A stage; `shared` are the flags of ALL that a script has and a stage has not."""
    where = f"{path}: stage {name}"
    if not _is_word(name) or name in RESERVED:
        raise InputError(f"{where}: a name has letters, digits, - and _, and is not {' or '.join(RESERVED)}")
    if not isinstance(values, dict) or values.get("script") not in SCRIPTS:
        raise InputError(f"{where}: needs `script:` and one of {', '.join(SCRIPTS)}")
    makers = [stage.name for stage in before if stage.script in MAKERS]
    source = values.get("from", makers[-1] if makers else None)
    trains_first = (before[0].script if before else values["script"]) == "train"
    given = [] if trains_first else [ORIGINAL]  # the recipe needs --weights
    for key, other in (("from", source), ("teacher", values.get("teacher"))):
        files = [stage.name for stage in before if stage.script != "test"]
        allowed = given + (files if key == "from" and values["script"] == "test" else makers)
        if other is not None and other not in allowed:
            raise InputError(
                f"{where}: {key}: {other} is no stage before it that makes a network; "
                f"there are {', '.join(allowed) or 'none'}"
            )
    flags = {str(key): value for key, value in values.items() if key not in OWN}
    for key, value in flags.items():
        _check_flag(where, key, value)
    others = shared(values["script"], flags)
    begins = next((other for other in before if other.name == source), None)
    if values["script"] == "test" and begins and begins.foreign and others.get("device") != "cpu":
        others.pop("device", None)  # runtimes of exported files take the CPU only, and test.py refuses a GPU
    allow = _allow(where, values["script"], values.get("allow"))
    stage = Stage(name, values["script"], tuple(_tokens(where, others | flags)), source, values.get("teacher"), allow)
    _check_source(where, stage, begins)
    return stage


def _check_flag(where: str, key: Any, value: Any) -> None:
    """Refuse what is no flag, and flags that a recipe cannot have."""
    if not _is_word(key):
        raise InputError(f"{where}: {key!r} is no flag")
    if spelling(key) in GIVEN:
        raise InputError(f"{where}: {key} is set by compress.py; leave it out")
    if spelling(key) in ELSEWHERE and value is not False:
        raise InputError(f"{where}: with {key} no network is made that the next stages can take; leave it out")
    if str(value).lower() in ("yes", "no"):  # texts in YAML 1.2
        raise InputError(f"{where}: {key}: {value}; write true or false")


def _allow(where: str, script: str, value: Any) -> float | None:
    """Points of AP50 that a stage may lose, as its recipe says."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InputError(f"{where}: allow: {value} is outside 0 <= value <= 100, in points of AP50")
    if script == "export":
        raise InputError(f"{where}: allow: export.py measures no accuracy; give it to the `script: test` of the file")
    return float(value)


def _check_source(where: str, stage: Stage, source: Stage | None) -> None:
    """Refuse integers of a float network, what cannot begin with a quantized one, and files that nothing here runs."""
    if source is None:
        return
    if stage.script == "export":
        wants = "--int8" in stage.words or stage.format in INTEGRAL
        if wants and not source.quantizes:
            raise InputError(
                f"{where}: makes integers of {source.name}, which is float; put a stage with `script: "
                "quantize`, or train with `quantized: 1`, before it"
            )
        if source.quantizes and not wants:
            raise InputError(
                f"{where}: makes a float file of {source.name}, which is quantized; add `int8: true`, or "
                "begin with a float network by `from`"
            )
        targets = INTEGRAL.get(stage.format, INTEGERS)
        if source.quantizes and source.target not in targets:
            raise InputError(
                f"{where}: {source.name} is quantized with target {source.target}; this file takes {', '.join(targets)}"
            )
    suppresses = "--nms" in source.words
    if stage.script == "test" and source.script == "export" and (suppresses or source.format in UNMEASURED):
        what = f"of format {source.format}, which test.py does not run"
        if suppresses:
            what = "with NMS, whose confidence threshold lowers AP"
        raise InputError(f"{where}: {source.name} makes a file {what}; name another stage by `from`")
    if source.quantizes and (stage.script.endswith("_prune") or stage.script == "quantize"):
        raise InputError(f"{where}: begins with {source.name}, which is quantized; {stage.script} takes float networks")


def _is_word(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-]+", name) is not None


def _tokens(where: str, flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    for key, value in flags.items():
        if any(not isinstance(one, str | int | float) for one in (value if isinstance(value, list) else [value])):
            raise InputError(f"{where}: {key}: {value}: a flag is true, a number, a text, or a list of these")
    hyp = str(flags.get("hyp"))
    # One that the suite brings is found wherever compress.py is started.
    if not os.path.exists(hyp) and os.path.isfile(ROOT / hyp):
        flags = {**flags, "hyp": ROOT / hyp}
    return flag_words(flags)
