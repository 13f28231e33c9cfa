"""A journey: the stages of a recipe as calls of the scripts, each kept when it is done, so that it can be gone on with.

What is done is in journey.json of the folder: the command of each stage, its JSON document and the sha256 of what it
made. A stage that is there with the same command and the same file is not run again. A training that was interrupted is
resumed by train.py, bit for bit; the other stages are short and start anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import log
from utils.compress.recipe import START, Recipe, Stage
from utils.errors import InputError, SuiteError
from utils.export.request import ALIASES, SUFFIXES
from utils.files import atomic_write_text, read_text, sha256

STATE = "journey.json"
ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 60.0
"""Seconds that a stage has to save what it did when the journey is stopped."""

Call = Callable[[Sequence[str]], str]
"""Runs a script with its arguments; what it printed."""


class StageError(SuiteError):
    """A stage that failed; it has said why."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_status = status


@dataclass(frozen=True)
class Journey:
    """A recipe for one network and data set, in one folder."""

    recipe: Recipe
    folder: Path
    data: str
    cfg: str | None
    weights: str | None
    """The network to begin with; None: it is trained."""
    sides: tuple[int, ...] = ()
    """Of --img_size; none: those of the cfg."""

    def command(self, stage: Stage, made: Mapping[str, Path]) -> list[str]:
        """The script and flags of a stage.

        Args:
            stage: of the recipe.
            made: the file that each stage before it made.
        """
        source = self.weights if stage.source is None else str(made[stage.source])
        words = [f"{stage.script}.py", "--data", self.data]
        words += ["--cfg", self.cfg] if stage.source is None and self.cfg else []
        words += ["--weights", source] if source else []
        words += ["--img_size", *map(str, self.sides)] if self.sides else []
        if stage.teacher is not None:
            words += ["--t_weights", self.weights if stage.teacher == START else str(made[stage.teacher])]
        words += stage.flags
        if stage.script != "test":
            words += ["--project", str(self.folder), "--name", stage.name, "--exist-ok"]
        return [*words, "--json"]

    def planned(self) -> list[list[str]]:
        """The commands of all stages."""
        made = {stage.name: made_by(stage, self.folder / stage.name) for stage in self.recipe.stages}
        return [self.command(stage, made) for stage in self.recipe.stages]

    def finish(self, call: Call) -> list[dict[str, Any]]:
        """Run what is left.

        Args:
            call: `python`, or what stands in for it.

        Returns:
            For each stage its `name`, `command`, `seconds`, `made`, `sha256` and `document`.

        Raises:
            InputError: the folder holds another journey, or one of its files was changed.
            StageError: a stage failed.
        """
        kept = self._kept()
        done: list[dict[str, Any]] = []
        made: dict[str, Path] = {}
        for number, stage in enumerate(self.recipe.stages):
            command = self.command(stage, made)
            entry = kept[number] if number < len(kept) else None
            if entry is None:
                log(f"stage {number + 1} of {len(self.recipe.stages)}, {stage.name}: python {' '.join(command)}")
                entry = self._run(stage, command, call)
                done.append(entry)
                self._keep(done)
            else:
                self._check(stage, command, entry)
                done.append(entry)
                log(f"stage {number + 1} of {len(self.recipe.stages)}, {stage.name}: is done")
            if entry["made"]:
                made[stage.name] = Path(entry["made"])
        return done

    def _kept(self) -> list[dict[str, Any]]:
        """What earlier calls have done."""
        path = self.folder / STATE
        if not path.exists():
            return []
        try:
            stages = json.loads(read_text(path))["stages"]
            return [{**entry, "command": list(entry["command"])} for entry in stages]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: is damaged; choose another --name") from None

    def _keep(self, done: Sequence[Mapping[str, Any]]) -> None:
        text = json.dumps({"stages": done}, indent=2, ensure_ascii=False)
        atomic_write_text(self.folder / STATE, text + "\n")

    def _check(self, stage: Stage, command: Sequence[str], entry: Mapping[str, Any]) -> None:
        if entry["name"] != stage.name or entry["command"] != list(command):
            raise InputError(f"{self.folder}: holds another journey, whose stage {entry['name']} is `python "
                             f"{' '.join(entry['command'])}`; choose another --name")  # fmt: skip
        if entry["made"] and (not Path(entry["made"]).is_file() or sha256(Path(entry["made"])) != entry["sha256"]):
            raise InputError(f"{entry['made']}: is missing or was changed since stage {stage.name}; "
                             "choose another --name")  # fmt: skip

    def _run(self, stage: Stage, command: list[str], call: Call) -> dict[str, Any]:
        run, started = self.folder / stage.name, time.monotonic()
        begun = stage.script == "train" and (run / "weights" / "last.pt").is_file()
        document = json.loads(call(["train.py", "--resume", str(run), "--json"] if begun else command))
        made = made_by(stage, run)
        return {
            "name": stage.name,
            "command": command,
            "seconds": round(time.monotonic() - started, 1),
            "made": str(made) if made else None,
            "sha256": sha256(made) if made else None,
            "document": document,
        }


def made_by(stage: Stage, run: Path) -> Path | None:
    """The file that a stage makes in its run directory; None for one that only measures."""
    if stage.script == "test":
        return None
    if stage.script == "export":
        kind = stage.flags[stage.flags.index("--format") + 1] if "--format" in stage.flags else "onnx"
        path = run / f"model{SUFFIXES.get(ALIASES.get(kind, kind), '')}"
        return path / "layout.json" if kind == "fpga" else path
    return run / ("weights/best.pt" if stage.script == "train" else "model.pt")


def python(arguments: Sequence[str]) -> str:
    """Run one of the suite's scripts from where the user stands; its progress goes to stderr.

    A stop of the journey is handed on, and the script has time to save.

    Raises:
        StageError: it failed, with its exit status.
    """
    script, *flags = arguments
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags], stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if process.returncode:
        raise StageError(f"{script} ended with status {process.returncode}; when that is mended, the same command of "
                         "compress.py goes on from there", process.returncode)  # fmt: skip
    return output
