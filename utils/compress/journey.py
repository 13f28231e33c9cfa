"""A journey: the stages of a recipe as calls of the scripts, each kept when it is done, so that it can be gone on with.

What is done is in journey.json of the folder: the command of each stage, the sha256 of the files that it names, its
JSON document, and what it made. A stage that is there with the same command and the same files is not run again. A
training that was interrupted is resumed by train.py, bit for bit; the other stages are short and start anew.

A stage that loses more AP50 than its gate allows ends the journey. With a higher `allow` the same command goes on; with
other flags of this stage it is run anew.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import EPOCHS_AFTER, ProgressBar, flag_words, log, typed
from utils.compress.recipe import Recipe, Stage
from utils.errors import InfeasibleError, InputError, SuiteError
from utils.export.settings import SUFFIXES
from utils.files import ROOT, atomic_write_text, foreign_errors, read_text, sha256
from utils.flags import cfg_of
from utils.report.run_dir import RunDirectory

STATE = "journey.json"
PATIENCE = 60.0
"""Seconds that a stage has to save what it did when the journey is stopped."""
PARENT_DEATH_SIGNAL = 1
"""Linux's number of the request PR_SET_PDEATHSIG, of prctl(2)."""

ADVICE = {
    "sparse": "Try more epochs or a smaller s-share, or `importance: taylor` in the pruning without a sparse stage",
    "train": "Try more epochs, or prune less",
    "prune": "Prune less",
    "quantize": "Keep layers float by max-drop",
    "test": "Look at the stages that made the file",
}
"""Ways out where a stage loses too much AP50."""

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
    side: int | None = None
    """Of --img_size; None: the input of the cfg."""
    pretrained: str | None = None
    """Weights of other classes that the first training starts from."""

    def command(self, stage: Stage, made: Mapping[str, Path]) -> list[str]:
        """The script and flags of a stage.

        Args:
            stage: of the recipe.
            made: the file that each stage before it made.
        """
        source = self.weights if stage.source is None else str(made[stage.source])
        cfg = self.cfg if stage.source is None else cfg_of(made[stage.source])
        flags = {"data": self.data, "cfg": cfg, "weights": source, "img_size": self.side}
        if stage.source is None and self.pretrained:
            flags |= {"weights": self.pretrained, "pt": True}
        if stage.teacher is not None:
            flags |= {"t_cfg": cfg_of(made[stage.teacher]), "t_weights": made[stage.teacher]}
        place = {"project": self.folder, "name": stage.name, "exist-ok": True} if stage.script != "test" else {}
        return [f"{stage.script}.py", *flag_words(flags), *stage.flags, *flag_words(place), "--json"]

    def planned(self) -> list[list[str]]:
        """The commands of all stages."""
        made = {stage.name: path for stage in self.recipe.stages if (path := made_by(stage, self.folder / stage.name))}
        return [self.command(stage, made) for stage in self.recipe.stages]

    def finish(self, call: Call) -> list[dict[str, Any]]:
        """Run what is left.

        Args:
            call: `python`, or what stands in for it.

        Returns:
            For each stage what ENTRY says.

        Raises:
            InputError: the folder holds another journey or a run of another one, another process works in it, or one of
                its files was changed.
            StageError: a stage failed.
            InfeasibleError: a stage lost more AP50 than it may.
        """
        new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        with RunDirectory(self.folder, new).until("*/**/*"):
            return self._finish(call)

    def _finish(self, call: Call) -> list[dict[str, Any]]:
        kept = self._kept()
        for folder in (self.folder / stage.name for stage in self.recipe.stages[len(kept) :]):
            if folder.exists():
                way_out = "move it away, or choose another --name"
                raise InputError(f"{folder}: is there, but this stage has not begun; {way_out}")
        done: list[dict[str, Any]] = []
        made: dict[str, Path] = {}
        for number, stage in enumerate(self.recipe.stages):
            command = self.command(stage, made)
            entry = kept[number] if number < len(kept) else None
            if entry is not None and entry["refused"] and entry["command"] != command:
                self._set_aside(kept[number:])
                kept, entry = kept[:number], None
            if entry is None or not (entry["document"] or self._goes_on(stage)):
                entry = {"name": stage.name, **_begun(command)}
            self._check(stage, command, entry)
            where = f"stage {number + 1} of {len(self.recipe.stages)}, {stage.name}"
            if entry["document"] is None:
                log(f"{where}: {typed(*command)}")
                self._keep([*done, entry])
                entry = {**entry, **self._run(stage, command, call)}
                self._keep([*done, entry])
            else:
                log(f"{where}: is done")
            if refusal := self._refusal(stage, entry, done):
                self._keep([*done, {**entry, "refused": True}, *kept[number + 1 :]])
                raise InfeasibleError(refusal)
            done.append({**entry, "refused": False})
            if entry["refused"]:  # `allow` is higher now; other flags would else put the stage aside
                self._keep([*done, *kept[number + 1 :]])
            if entry["made"]:
                made[stage.name] = Path(entry["made"])
        return done

    def _kept(self) -> list[dict[str, Any]]:
        """Return the stages that earlier calls have done, and perhaps begun."""
        path = self.folder / STATE
        if not path.exists():
            return []
        with foreign_errors(path, "is damaged; choose another --name"):
            stages = [{"refused": False, **entry} for entry in json.loads(read_text(path))["stages"]]
            return [{key: entry[key] for key in ENTRY} for entry in stages]

    def _keep(self, done: Sequence[Mapping[str, Any]]) -> None:
        text = json.dumps({"stages": done}, indent=2, ensure_ascii=False)
        atomic_write_text(self.folder / STATE, text + "\n")

    def _check(self, stage: Stage, command: Sequence[str], entry: Mapping[str, Any]) -> None:
        if entry["name"] != stage.name or entry["command"] != list(command):
            raise InputError(
                f"{self.folder}: holds another journey, whose stage {entry['name']} is "
                f"`{shlex.join(['python', *entry['command']])}`; choose another --name"
            )
        files = {**entry["files"], **({entry["made"]: entry["sha256"]} if entry["made"] else {})}
        for path, digest in files.items():
            if not os.path.isfile(path) or sha256(Path(path)) != digest:
                raise InputError(f"{path}: is missing or was changed since stage {stage.name}; choose another --name")

    def _refusal(self, stage: Stage, entry: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str | None:
        """Return why a stage does not pass its gate, and what to change; None: it passes."""
        best, after = accuracy(entry, done)
        if stage.gate is None:
            return None
        if best is None or after is None:
            log(f"stage {stage.name}: AP50 before or after it is not known, so `allow` is not checked")
            return None
        lost = 100 * (best - after)
        if lost <= stage.gate + 1e-9:  # 0.8 - 0.7 is more than 0.1 in binary
            return None
        kind = "sparse" if stage.sparse else "prune" if stage.script.endswith("_prune") else stage.script
        start = {other["name"]: accuracy(other, ())[1] or 0 for other in done}.get(stage.source or "", 0)
        harm = f"The network that it began with had {start:.3f}. " if after < start < best else ""
        return (
            f"stage {stage.name}: AP50 fell from {best:.3f} to {after:.3f}, by {lost:.1f} points; {stage.gate:g} are "
            f"allowed. {harm}{ADVICE[kind]}. --set {stage.name}.allow={min(100, math.ceil(lost))} accepts the loss. "
            "The same command runs this stage again if its flags change; changes of earlier stages need another --name"
        )

    def _set_aside(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keep the folders of a refused stage and of those behind it under other names, so that they begin anew."""
        for name in (entry["name"] for entry in entries if (self.folder / entry["name"]).is_dir()):
            targets = (self.folder / f"{name}.refused{number}" for number in itertools.count(1))
            target = next(path for path in targets if not path.exists())
            (self.folder / name).rename(target)
            log(f"stage {name}: begins anew; what it made before is in {target}")

    def _goes_on(self, stage: Stage) -> bool:
        """Return whether a stage goes on where it was; only a training does, all others start again."""
        return stage.script == "train" and (self.folder / stage.name / "weights" / "last.pt").is_file()

    def _run(self, stage: Stage, command: list[str], call: Call) -> dict[str, Any]:
        run, started = self.folder / stage.name, time.monotonic()
        again = ["train.py", "--resume", str(run), "--json"]
        later = self.recipe.stages[self.recipe.stages.index(stage) + 1 :]
        os.environ[EPOCHS_AFTER] = str(sum(other.epochs for other in later))
        with ProgressBar(""):  # the script speaks for itself
            output = call(again if self._goes_on(stage) else command)
        with foreign_errors(stage.script, "its output is no JSON document", InfeasibleError):
            document = json.loads(output)
        made = made_by(stage, run)
        return {
            "seconds": round(time.monotonic() - started, 1),
            "made": str(made) if made else None,
            "sha256": sha256(made) if made else None,
            "document": document,
        }


ENTRY = ("name", "command", "files", "seconds", "made", "sha256", "document", "refused")
"""Keys of a stage in journey.json. `document` is None until it is done; `refused`: it lost too much AP50."""


def _begun(command: Sequence[str]) -> dict[str, Any]:
    """Return the entry of a stage that is not run yet: its command, and the digests of the files that this names."""
    files = {word: sha256(Path(word)) for word in command[1:] if os.path.isfile(word)}
    return {"command": list(command), "files": files, **dict.fromkeys(ENTRY[3:])}


def accuracy(entry: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """AP50 of the best network that was known before a stage, and of the one that it made; None: not known.

    Args:
        entry: of the stage.
        done: of the stages before it.
    """
    known = [score for other in done for score in _scores(other["document"], None, "before", "after")]
    best = max([*known, *_scores(entry["document"], "before")], default=None)
    return best, next(_scores(entry["document"], None, "after"), None)


def _scores(document: Mapping[str, Any], *parts: str | None) -> Iterator[float]:
    """Yield AP50 in parts of a document of --json, None being the document; quantize.py has a table there."""
    for part in parts:
        values = document if part is None else document.get(part)
        score = values.get("map50") if isinstance(values, Mapping) else None
        if isinstance(score, int | float):
            yield float(score)


def made_by(stage: Stage, run: Path) -> Path | None:
    """The file that a stage makes in its run directory; None for one that only measures."""
    if stage.script == "test":
        return None
    if stage.script == "export":
        path = run / f"model{SUFFIXES.get(stage.format, '')}"
        return path / "layout.json" if stage.format == "fpga" else path
    return run / ("weights/best.pt" if stage.script == "train" else "model.pt")


def python(arguments: Sequence[str]) -> str:
    """Run one of the suite's scripts from where the user stands; its progress goes to stderr.

    A stop of the journey is handed on once, and the script gets PATIENCE seconds to save. It runs in a session of its
    own, so Ctrl-C in the terminal does not reach it a second time. If the journey is killed, so is the script, on
    Linux.

    Raises:
        StageError: it failed, with its exit status.
    """
    script, *flags = arguments
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_tied(os.getpid()) if sys.platform == "linux" else None,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if status := process.returncode:
        ended, status = (f"with status {status}", status) if status > 0 else _by_signal(-status)
        raise StageError(
            f"{script} ended {ended}; when that is mended, the same command of compress.py goes on from there", status
        )
    return output


def _tied(parent: int) -> Callable[[], None]:
    """Return what a new process calls to be killed when its parent ends; nothing is loaded or imported in the call."""
    prctl, kill = ctypes.CDLL(None).prctl, int(signal.SIGKILL)

    def tie() -> None:
        prctl(PARENT_DEATH_SIGNAL, kill)
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), kill)

    return tie


def _by_signal(number: int) -> tuple[str, int]:
    """Return how a signal ended a script, and the exit status of a shell for it, or 5 if memory was short."""
    if number == signal.SIGKILL:
        return "by SIGKILL, as when memory is short", 5
    return f"by signal {number}", 128 + number
