"""`train.py --evolve`: a search over hyper-parameters by trainings, whose values optuna chooses; no torch.

The study, `study.db` in the run directory, is optuna's and holds every trial. A trial that something interrupted is
there in the state RUNNING when the search goes on. It is marked as failed, and a new one with the same values and the
same folder takes its place. The random part of a trial's values follows from the seed and the number of trials before
it. So a resumed search chooses the same values as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.cli import log, processes
from utils.darknet import cfg as cfg_file
from utils.errors import CheckpointError, InputError, Interrupted, NumericsError, ResourceError
from utils.files import foreign_errors
from utils.flags import ModelFiles
from utils.report.run_dir import RunDirectory
from utils.report.tables import csv_table
from utils.training.hyperparameters import Hyperparameters, fitness, hyperparameters
from utils.training.settings import START, STUDY, TrainPlan

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

STATES = {"COMPLETE": "complete", "PRUNED": "given_up", "FAIL": "failed"}
"""Our words for optuna's states of a trial that came to an end; older versions gave trials up."""
Train = Callable[[Hyperparameters, Path], Mapping[str, Any]]
"""Train with some hyper-parameters in a folder, going on with what is there; returns map50, map50_95 and best_epoch."""


class SearchRange(NamedTuple):
    """Values that a hyper-parameter may take in a search."""

    low: float
    high: float
    log: bool = False
    """Whether its logarithm is what is drawn evenly."""


SPACE = {
    "lr0": SearchRange(1e-3, 0.3, log=True),
    "lrf": SearchRange(1e-3, 0.5, log=True),
    "momentum": SearchRange(0.8, 0.98),
    "weight_decay": SearchRange(1e-5, 5e-3, log=True),
    "warmup": SearchRange(0.0, 0.2),
    "box_gain": SearchRange(1.0, 20.0, log=True),
    "objectness_gain": SearchRange(0.2, 5.0, log=True),
    "class_gain": SearchRange(0.2, 5.0, log=True),
    "mosaic": SearchRange(0.0, 1.0),
    "mixup": SearchRange(0.0, 0.5),
    "hsv_h": SearchRange(0.0, 0.1),
    "hsv_s": SearchRange(0.0, 0.9),
    "hsv_v": SearchRange(0.0, 0.9),
    "translate": SearchRange(0.0, 0.3),
    "scale": SearchRange(0.0, 0.9),
}
"""What is searched, by the keys of a hyp file."""


def searched(start: Hyperparameters) -> dict[str, SearchRange]:
    """Return the ranges of a search that begins at `start`, widened to hold it.

    A value of 0 has no logarithm: a key that is searched by it and starts at 0 is left at 0.
    """
    ranges = {}
    for key, (low, high, log_scale) in SPACE.items():
        value = start.flat[key]
        if value > 0 or not log_scale:
            ranges[key] = SearchRange(min(low, value), max(high, value), log_scale)
    return ranges


def run_search(plan: TrainPlan) -> dict[str, Any]:
    """Search from the hyper-parameters of a plan on; the best ones are in the run directory's hyp.yaml.

    Args:
        plan: of one training; `resume` is the folder of a search.

    Returns:
        The values of `train.py --evolve --json`.

    Raises:
        InputError: there are several processes.
    """
    settings = plan.settings
    if processes() > 1:
        raise InputError("--evolve: trains in one process; start it without torchrun")

    if plan.resume is None:
        directory = RunDirectory.create(settings.project, settings.name, exist_ok=settings.exist_ok)
    else:
        directory = RunDirectory(plan.resume)
    with directory.until("trial-*/results.csv", "trial-*/weights/last.pt") as run:
        if plan.resume is None:
            values = plan.hyp.flat
            run.describe(args=plan.args, hyp=values, cfg=cfg_file.format_network(plan.network))
            run.write_yaml(START, values)
        else:
            run.write_yaml("args.yaml", plan.args)
        return Search(run.path, plan.hyp, plan.args["evolve"], settings.seed).run(partial(_train, plan))


def _train(plan: TrainPlan, hyp: Hyperparameters, folder: Path) -> dict[str, Any]:
    """Train in the folder of a trial, going on where it was interrupted."""
    from utils.training.workflow import run_training

    settings = dataclasses.replace(plan.settings, project=str(folder.parent), name=folder.name, exist_ok=True)
    trial = dataclasses.replace(plan, settings=settings, hyp=hyp, resume=None)
    if (folder / "weights" / "last.pt").is_file():
        files = ModelFiles(cfg_file.load(folder / "model.cfg"), None)
        trial = dataclasses.replace(trial, resume=folder, files=files)
    return run_training(trial)


def search_summary(document: Mapping[str, Any]) -> str:
    """Return the result in words."""
    start = document["start_fitness"]
    states = ", ".join(f"{document[word]} {word.replace('_', ' ')}" for word in STATES.values())
    first = "the first trial failed" if start is None else f"that of the first trial is {start:.4f}"
    return (
        f"best of {document['trials']} trials ({states}) is {document['best_trial']}: fitness "
        f"{document['fitness']:.4f}; {first}\n{document['run_dir']}/hyp.yaml\n{document['best']}"
    )


@dataclass(frozen=True)
class Search:
    """A search in a run directory that exists.

    Its last trial's end leaves trials.csv, hyp.yaml (the best values so far) and evolve.png there, and the folders
    trial-001, trial-002, …, of which only the best one keeps its weights.
    """

    folder: Path
    start: Hyperparameters
    """Values of the first trial, and of what is not searched."""
    trials: int
    seed: int = 0

    def run(self, train: Train) -> dict[str, Any]:
        """Train what is left of the trials, and return the values of `train.py --evolve --json`.

        Raises:
            CheckpointError: the study cannot be read or written.
            ResourceError: the disk is full.
            NumericsError: no trial came to its end.
            Interrupted: a signal came; the search can go on.
        """
        with _study_errors(self.folder / STUDY):
            study = self._study()
            ranges = searched(self.start)
            if not study.get_trials(deepcopy=False):
                study.enqueue_trial({key: self.start.flat[key] for key in ranges})
            _replace_interrupted(study, len(ranges))
            self._publish(study)
            done = len(ended(study))
        while done < self.trials:
            done += 1
            self._trial(study, done, train)
        with _study_errors(self.folder / STUDY):
            return self._document(ended(study))

    def _study(self) -> Study:
        """Return the study of the folder, new or as it was left."""
        import optuna
        from sqlalchemy.engine import URL

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        url = URL.create("sqlite", database=str((self.folder / STUDY).absolute())).render_as_string()
        try:
            return optuna.create_study(storage=url, study_name="search", direction="maximize", load_if_exists=True)
        except RuntimeError as failure:
            raise CheckpointError(f"{self.folder / STUDY}: {failure}") from None

    def _trial(self, study: Study, number: int, train: Train) -> None:
        """Train once, tell the study how it ended, and write what is known."""
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        seed = np.random.SeedSequence([self.seed, number]).generate_state(1)
        study.sampler = TPESampler(seed=int(seed[0]))
        path, folder = self.folder / STUDY, trial_folder(self.folder, number)
        with _study_errors(path):
            trial = study.ask()
            values = {}
            for key, (low, high, log_scale) in searched(self.start).items():
                values[key] = trial.suggest_float(key, low, high, log=log_scale)
            hyp = hyperparameters(values, folder.name, self.start)
        log(f"trial {number} of {self.trials}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
        try:
            document, reason = train(hyp, folder), ""
        except NumericsError as failure:
            document, reason = {}, str(failure)
        except Interrupted as stop:
            message = f"interrupted in trial {number} of {self.trials}; --resume {self.folder} goes on"
            raise Interrupted(stop.exit_status - 128, message) from None
        with _study_errors(path):
            if reason:
                # Before `tell`: by the reason `ended` tells a trial that failed from one that was interrupted.
                trial.set_user_attr("reason", reason)
                study.tell(trial, state=TrialState.FAIL)
                log(f"trial {number}: failed: {reason}")
            else:
                value = fitness(document["map50"], document["map50_95"])
                trial.set_user_attr("best_epoch", document["best_epoch"])
                study.tell(trial, value)
                log(f"trial {number}: fitness {value:.4f}; the best is {study.best_value:.4f}")
            self._publish(study)

    def _publish(self, study: Study) -> None:
        """Write what is known so far, and remove the weights of all trials but the best."""
        from utils.report.plots import plot_search

        run, done = RunDirectory(self.folder), ended(study)
        ranges, best = searched(self.start), best_of(done)
        run.write_text("trials.csv", _table(done, tuple(ranges)))
        if best is not None:
            run.write_yaml("hyp.yaml", hyperparameters(done[best - 1].params, "best", self.start).flat)
            complete = [(number, trial) for number, trial in enumerate(done, 1) if trial.state.name == "COMPLETE"]
            plot_search(
                [number for number, _ in complete],
                [trial.value for _, trial in complete if trial.value is not None],
                {key: [trial.params[key] for _, trial in complete] for key in ranges},
                run.file("evolve.png"),
                {key for key, bounds in ranges.items() if bounds.log},
            )
        for number in range(1, len(done) + 1):
            if number != best:
                for path in trial_folder(self.folder, number).glob("weights/*"):
                    path.unlink()

    def _document(self, done: Sequence[FrozenTrial]) -> dict[str, Any]:
        best = best_of(done)
        if best is None:
            raise NumericsError(
                f"{self.folder}: none of {len(done)} trials came to its end; try a smaller lr0 in --hyp"
            )
        return {
            "trials": len(done),
            **{word: sum(trial.state.name == state for trial in done) for state, word in STATES.items()},
            "best_trial": best,
            "fitness": done[best - 1].value,
            "start_fitness": done[0].value if done[0].state.name == "COMPLETE" else None,
            "hyp": done[best - 1].params,
            "run_dir": str(self.folder),
            "best": str(trial_folder(self.folder, best) / "weights" / "best.pt"),
        }


def trial_folder(folder: Path, number: int) -> Path:
    """Return the run directory of a trial; numbers begin with 1."""
    return folder / f"trial-{number:03d}"


def ended(study: Study) -> list[FrozenTrial]:
    """Return the trials that are over, in their order; those that were interrupted left out."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED") or "reason" in trial.user_attrs]


def best_of(done: Sequence[FrozenTrial]) -> int | None:
    """Return the number of the trial with the highest fitness, the first of equal ones; None if none is complete."""
    complete = [number for number, trial in enumerate(done, 1) if trial.state.name == "COMPLETE"]
    return max(complete, key=lambda number: done[number - 1].value or 0.0, default=None)


def _replace_interrupted(study: Study, count: int) -> None:
    """Mark a trial that was interrupted as failed, once a new one with its `count` values waits.

    One that was interrupted while they were chosen has trained nothing; they are chosen again, but for fixed ones.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    waits = any(trial.state == TrialState.WAITING for trial in trials)
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            if not waits and "reason" not in trial.user_attrs:  # else it failed, and counts
                chosen = len(trial.params) == count
                study.enqueue_trial(trial.params if chosen else trial.system_attrs.get("fixed_params", {}))
            study.tell(trial.number, state=TrialState.FAIL)


def _table(done: Sequence[FrozenTrial], keys: Sequence[str]) -> str:
    """Return the text of trials.csv."""
    lines = []
    for number, trial in enumerate(done, 1):
        figures = [trial.value, trial.user_attrs.get("best_epoch"), *(trial.params[key] for key in keys)]
        cells = (None if figure is None else f"{figure:.6g}" for figure in figures)
        lines.append([number, STATES[trial.state.name], *cells])
    return csv_table(["trial", "state", "fitness", "best_epoch", *keys], lines)


@contextmanager
def _study_errors(path: Path) -> Iterator[None]:
    """Turn whatever a damaged study provokes in optuna, SQLite and here into one line.

    Raises:
        CheckpointError, ResourceError: the study cannot be used; the disk is full.
    """
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    with foreign_errors(path, "no sound study; choose another --name", CheckpointError):
        try:
            yield
        except (OptunaError, SQLAlchemyError) as failure:
            reason = str(failure.__cause__ or failure).partition("\n")[0]
            kind = ResourceError if "full" in reason or "disk I/O" in reason else CheckpointError
            raise kind(f"{path}: {reason}") from None
