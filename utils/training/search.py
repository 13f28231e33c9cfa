"""A search over hyper-parameters: trainings one after the other, whose values optuna chooses; no torch.

The study, `study.db` in the run directory, is optuna's and holds every trial. A trial that something interrupted is
found there in the state RUNNING when the search goes on; it is marked as failed, and a new one with the same values and
the same folder takes its place. What is random in the choice of a trial's values follows from the seed and the number
of trials before it, so an interrupted search chooses what it would have chosen without.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.cli import log
from utils.errors import CheckpointError, InputError, Interrupted, NumericsError, ResourceError
from utils.report.run_dir import RunDirectory, read_results
from utils.report.tables import csv_table
from utils.training.resumed import STUDY
from utils.training.settings import Hyperparameters, fitness, hyperparameters
from utils.training.space import searched

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

STATES = {"complete": "COMPLETE", "given_up": "PRUNED", "failed": "FAIL"}
"""Our words for optuna's states of a trial that came to an end."""
UNJUDGED = 0.25
"""First share of the epochs in which no trial is given up: warm-up, and the order of the trials changes most."""


Watch = Callable[[int, Mapping[str, float]], None]
Train = Callable[[Hyperparameters, Path, Watch], Mapping[str, Any]]
"""Train with some hyper-parameters in a folder, going on with what is there; calls the watch with every epoch's row.
Returns `map50`, `map50_95` and `best_epoch`."""


class _GivenUp(Exception):  # noqa: N818
    """A trial is not worth its other epochs."""


def require_optuna() -> None:
    """Say how to get optuna where it is missing.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InputError("--evolve: needs optuna; pip install -r requirements-search.txt")


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
    epochs: int
    """Of a trial."""
    seed: int = 0
    prune: bool = True
    """Give up a trial whose best fitness until an epoch is below the median of the others' at that epoch."""

    def run(self, train: Train) -> dict[str, Any]:
        """Train what is left of the trials.

        Returns:
            The values of `train.py --evolve --json`.

        Raises:
            CheckpointError: the study cannot be read or written.
            NumericsError: no trial came to its end.
            Interrupted: a signal came; the search can go on.
        """
        with _told(self.folder / STUDY):
            study = self._study()
            if not study.get_trials(deepcopy=False):
                values = self.start.flat
                study.enqueue_trial({key: values[key] for key in searched(self.start)})
            _replace_interrupted(study, len(searched(self.start)))
            self._publish(study)
            while (done := len(ended(study))) < self.trials:
                self._trial(study, done + 1, train)
                self._publish(study)
            return self._document(study)

    def _study(self) -> Study:
        """The study of the folder, new or as it was left."""
        import optuna
        from sqlalchemy.engine import URL

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        unjudged = max(1, round(UNJUDGED * self.epochs))
        url = URL.create("sqlite", database=str((self.folder / STUDY).absolute()))
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=unjudged) if self.prune else optuna.pruners.NopPruner()
        try:
            return optuna.create_study(
                storage=url.render_as_string(),
                study_name="search",
                direction="maximize",
                pruner=pruner,
                load_if_exists=True,
            )
        except RuntimeError as failure:
            raise CheckpointError(f"{self.folder / STUDY}: {failure}") from None

    def _trial(self, study: Study, number: int, train: Train) -> None:
        """One training; its end is told to the study."""
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        seed = np.random.SeedSequence([self.seed, number]).generate_state(1)
        study.sampler = TPESampler(seed=int(seed[0]))
        trial = study.ask()
        values = {
            key: trial.suggest_float(key, found.low, found.high, log=found.log)
            for key, found in searched(self.start).items()
        }
        folder = trial_folder(self.folder, number)
        log(f"trial {number} of {self.trials}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
        try:
            document = train(hyperparameters(values, folder.name, self.start), folder, _watch(trial, folder))
        except _GivenUp:
            study.tell(trial, state=TrialState.PRUNED)
            log(f"trial {number}: given up; its best epoch is below the median of the trials before it")
        except NumericsError as failure:
            trial.set_user_attr("reason", str(failure))
            study.tell(trial, state=TrialState.FAIL)
            log(f"trial {number}: failed: {failure}")
        except Interrupted as stop:
            message = f"interrupted in trial {number} of {self.trials}; --resume {self.folder} goes on"
            raise Interrupted(stop.exit_status - 128, message) from None
        else:
            value = fitness(document["map50"], document["map50_95"])
            trial.set_user_attr("best_epoch", document["best_epoch"])
            study.tell(trial, value)
            log(f"trial {number}: fitness {value:.4f}; the best is {study.best_value:.4f}")

    def _publish(self, study: Study) -> None:
        """Write what is known so far, and remove the weights of all trials but the best."""
        from utils.report.plots import plot_search

        run, done = RunDirectory(self.folder), ended(study)
        ranges = searched(self.start)
        run.write_text("trials.csv", _table(done, tuple(ranges)))
        best = best_of(done)
        if best is not None:
            run.write_yaml("hyp.yaml", hyperparameters(done[best - 1].params, "best", self.start).flat)
            complete = [(number, trial) for number, trial in enumerate(done, 1) if trial.state.name == "COMPLETE"]
            plot_search(
                [number for number, _ in complete],
                [trial.value for _, trial in complete],
                {key: [trial.params[key] for _, trial in complete] for key in ranges},
                run.file("evolve.png"),
                {key for key, found in ranges.items() if found.log},
            )
        for number in range(1, len(done) + 1):
            if number != best:
                for path in trial_folder(self.folder, number).glob("weights/*"):
                    path.unlink()

    def _document(self, study: Study) -> dict[str, Any]:
        done = ended(study)
        best = best_of(done)
        if best is None:
            raise NumericsError(
                f"{self.folder}: none of {len(done)} trials came to its end; try a smaller lr0 in --hyp"
            )
        return {
            "trials": len(done),
            **{name: sum(trial.state.name == state for trial in done) for name, state in STATES.items()},
            "best_trial": best,
            "fitness": done[best - 1].value,
            "start_fitness": done[0].value if done[0].state.name == "COMPLETE" else None,
            "hyp": done[best - 1].params,
            "run_dir": str(self.folder),
            "best": str(trial_folder(self.folder, best) / "weights" / "best.pt"),
        }


def trial_folder(folder: Path, number: int) -> Path:
    """Run directory of a trial; numbers begin with 1."""
    return folder / f"trial-{number:03d}"


def ended(study: Study) -> list[FrozenTrial]:
    """The trials that are over, in their order; those that were interrupted left out."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name in ("COMPLETE", "PRUNED") or (trial.state.name == "FAIL" and "reason" in trial.user_attrs)
    ]


def best_of(done: Sequence[FrozenTrial]) -> int | None:
    """Number of the trial with the highest fitness, the first of equal ones; None if none is complete."""
    complete = [(-trial.value, number) for number, trial in enumerate(done, 1) if trial.state.name == "COMPLETE"]
    return min(complete)[1] if complete else None


def _replace_interrupted(study: Study, count: int) -> None:
    """Mark a trial that was interrupted as failed, once a new one with its `count` values waits.

    One that was interrupted while they were chosen has trained nothing; they are chosen again, but for those given.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    waits = any(trial.state == TrialState.WAITING for trial in trials)
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            if not waits:
                chosen = len(trial.params) == count
                study.enqueue_trial(trial.params if chosen else trial.system_attrs.get("fixed_params", {}))
            study.tell(trial.number, state=TrialState.FAIL)


def _watch(trial: Trial, folder: Path) -> Watch:
    """What tells the study the fitness of each epoch, those before an interruption too, and gives a trial up."""
    reported: set[int] = set()

    def report(epoch: int, row: Mapping[str, float]) -> None:
        value = fitness(row.get("map50", np.nan), row.get("map50_95", np.nan))
        if np.isfinite(value) and epoch not in reported:
            reported.add(epoch)
            trial.report(value, epoch)

    def watch(epoch: int, row: Mapping[str, float]) -> None:
        report(epoch, row)
        if trial.should_prune():
            raise _GivenUp

    if (folder / "weights" / "last.pt").is_file() and (folder / "results.csv").is_file():
        columns = read_results(folder / "results.csv")
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            report(int(row["epoch"]), row)
    return watch


def _table(done: Sequence[FrozenTrial], keys: Sequence[str]) -> str:
    """Text of trials.csv; the fitness of a trial that was given up is that of its best epoch."""
    words = {state: word for word, state in STATES.items()}
    rows = []
    for number, trial in enumerate(done, 1):
        value = trial.value if trial.state.name == "COMPLETE" else max(trial.intermediate_values.values(), default=None)
        figures = [value, trial.user_attrs.get("best_epoch"), *(trial.params[key] for key in keys)]
        cells = (None if figure is None else f"{figure:.6g}" for figure in figures)
        rows.append([number, words[trial.state.name], *cells])
    return csv_table(["trial", "state", "fitness", "best_epoch", *keys], rows)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of optuna's storage as one line.

    Raises:
        CheckpointError, ResourceError: the study cannot be used; the disk is full.
    """
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError) as failure:
        reason = str(failure.__cause__ or failure).partition("\n")[0]
        kind = ResourceError if "full" in reason or "disk I/O" in reason else CheckpointError
        raise kind(f"{path}: {reason}") from None
