"""A search over hyper-parameters: what it chooses follows from its seed, and an interruption loses nothing.

Trials are trained by a stub, but for the last tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
import sqlite3
from pathlib import Path
from unittest.mock import Mock

import pytest

import train
from tests.nets import csv_rows, refused
from tests.test_resume import at_call
from utils.errors import CheckpointError, InputError, Interrupted, NumericsError
from utils.report import plots
from utils.report.run_dir import Results, read_results
from utils.training import evolve, loop, optimizer
from utils.training.evolve import SPACE, Search, SearchRange, searched
from utils.training.hyperparameters import Hyperparameters, hyperparameters, load_hyperparameters
from utils.training.settings import STUDY

optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="no optuna")
START = Hyperparameters()


class Trainer:
    """Trains nothing: the fitness falls with the distance of lr0 from 0.05, and rises with the epochs."""

    def __init__(self, **faults):
        self.taken: list[dict[str, float]] = []
        """Hyper-parameters of the trials in their order."""
        self.faults = {int(place.removeprefix("at")): fault for place, fault in faults.items()}
        """What is raised in its first epoch, by the number of the training."""

    def __call__(self, hyp, folder):
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        for name in ("last.pt", "best.pt"):
            (folder / "weights" / name).write_bytes(b"")
        self.taken.append({key: hyp.flat[key] for key in FEW})
        score = 1 / (1 + abs(math.log(hyp.optimizer.lr0 / 0.05)))
        results = Results(folder / "results.csv", ("map50", "map50_95"))
        for epoch in (1, 2, 3, 4):
            row = {"map50": score * epoch / 4, "map50_95": score * epoch / 4}
            results.append(epoch, row)
            if len(self.taken) in self.faults:
                raise self.faults.pop(len(self.taken))
        return {**row, "best_epoch": 4}


FEW = {key: SPACE[key] for key in ("lr0", "momentum", "mosaic")}
"""Searched in these tests: every value costs a transaction."""


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """Run a search of a stub in a folder of that name; returns its document."""
    base = tmp_path_factory.mktemp("searches")

    def call(name: str, trainer: Trainer, trials: int = 14, **changed):
        folder = base / name
        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "plot_search", lambda *_: None)
            patch.setattr(evolve, "SPACE", FEW)
            patch.setattr(os, "fsync", lambda _: None)
            return Search(folder, **{"start": START, "trials": trials, **changed}).run(trainer)

    return call


@pytest.fixture(scope="module")
def straight(search):
    """A search of 14 trials that nothing interrupted, and its trainer."""
    trainer = Trainer()
    return search("straight", trainer), trainer


def test_ranges_are_allowed_and_hold_the_start_and_a_key_without_logarithm_stays():
    for key, interval in SPACE.items():
        assert interval.low <= START.flat[key] <= interval.high
        for value in (interval.low, interval.high):
            assert hyperparameters({key: value}).flat[key] == value
    ranges = searched(hyperparameters({"lr0": 2.0, "weight_decay": 0.0, "mosaic": 0.0}))
    assert ranges["lr0"] == SearchRange(1e-3, 2.0, log=True)
    assert "weight_decay" not in ranges
    assert ranges["mosaic"] == SPACE["mosaic"]


@optuna
class TestStudy:
    def test_it_starts_where_it_is_told_finds_better_and_keeps_the_weights_of_the_best_only(self, straight):
        document, trainer = straight
        folder, best = Path(document["run_dir"]), document["best_trial"]
        assert trainer.taken[0] == {key: START.flat[key] for key in FEW}
        assert document["fitness"] > document["start_fitness"]
        scores = [float(row["fitness"]) for row in csv_rows(folder / "trials.csv")]
        assert document["fitness"] == pytest.approx(max(scores), rel=1e-5)
        assert document["start_fitness"] == pytest.approx(scores[0], rel=1e-5)
        assert document["trials"] == 14 == document["complete"]
        hyp = load_hyperparameters(folder / "hyp.yaml").flat
        assert {key: hyp[key] for key in FEW} == trainer.taken[best - 1] == document["hyp"]
        assert {path.parent.parent.name for path in folder.glob("*/weights/*")} == {f"trial-{best:03d}"}
        assert Path(document["best"]).is_file()

    def test_another_seed_chooses_other_values_behind_the_first(self, search, straight):
        other = Trainer()
        search("other", other, 4, seed=1)
        taken = straight[1].taken
        assert other.taken[0] == taken[0]
        assert all(one != another for one, another in zip(other.taken[1:], taken[1:4], strict=True))
        assert len({values["lr0"] for values in taken}) == 14

    @pytest.mark.parametrize("fault", [KeyboardInterrupt(), Interrupted(signal.SIGTERM, "saved")])
    def test_an_interrupted_search_chooses_what_it_would_have_chosen(self, search, straight, fault):
        """In the first trial, and twice in the twelfth, which is chosen from what the others gave."""
        expected, trainer = straight
        name, cut = f"cut by {type(fault).__name__}", Trainer(at1=fault, at13=fault, at14=fault)
        for trial in (1, 12, 12):
            with pytest.raises(type(fault)) as caught:
                search(name, cut)
            if isinstance(fault, Interrupted):
                assert re.search(rf"in trial {trial} of 14; --resume .*{name} goes on", str(caught.value))
                assert caught.value.exit_status == 143
        document = search(name, cut)
        assert cut.taken[0] == cut.taken[1]
        assert cut.taken[12] == cut.taken[13] == cut.taken[14]
        assert [values for place, values in enumerate(cut.taken, 1) if place not in (1, 13, 14)] == trainer.taken
        folders = {key: document[key] for key in ("run_dir", "best")}
        assert document == expected | folders
        tables = [(Path(one["run_dir"]) / "trials.csv").read_text() for one in (document, expected)]
        assert tables[0] == tables[1]

    def test_killed_while_values_are_chosen_the_trial_gets_the_same(self, search, straight, monkeypatch):
        """Within the values of the first trial, which are given, and within those of the second, which are drawn."""
        from optuna.trial import Trial

        real, calls, cut = Trial.suggest_float, [], Trainer()

        def suggest(*args, **more):
            calls.append(1)
            if len(calls) in (2, 7):
                raise KeyboardInterrupt
            return real(*args, **more)

        monkeypatch.setattr(Trial, "suggest_float", suggest)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                search("chosen", cut, 3)
        search("chosen", cut, 3)
        assert cut.taken == straight[1].taken[:3]

    def test_a_trial_without_numbers_fails_and_the_search_goes_on(self, search):
        document = search("nan", Trainer(at1=NumericsError("loss"), at3=NumericsError("loss")), 4)
        assert (document["trials"], document["failed"], document["start_fitness"]) == (4, 2, None)
        states = [row["state"] for row in csv_rows(f"{document['run_dir']}/trials.csv")]
        assert states == ["failed", "complete", "failed", "complete"]
        with pytest.raises(NumericsError, match="none of 1 trials came to its end"):
            search("none", Trainer(at1=NumericsError("loss")), 1)
        with pytest.raises(IndexError):
            search("bug", Trainer(at1=IndexError()), 1)

    def test_killed_before_the_study_knows_of_a_failed_trial_it_is_not_made_again(self, search, straight, monkeypatch):
        from optuna.study import Study

        cut = Trainer(at1=NumericsError("loss"))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Study, "tell", Mock(side_effect=KeyboardInterrupt))
            search("failed", cut, 2)
        assert search("failed", cut, 2)["failed"] == 1
        assert cut.taken == straight[1].taken[:2]

    def test_a_study_that_is_none_or_damaged_is_one_line(self, search, tmp_path):
        """The second one SQLite reads, and optuna cannot."""
        (tmp_path / STUDY).write_bytes(b"x" * 5000)
        with refused(CheckpointError, r"study\.db: .*not a database"):
            Search(tmp_path, START, 1).run(Trainer())
        folder = Path(search("a", Trainer(), 1)["run_dir"])
        study = sqlite3.connect(folder / STUDY)
        study.execute("UPDATE trial_params SET distribution_json = '{'")
        study.commit()
        study.close()
        with refused(CheckpointError, r"study\.db.*: no sound study: .*; choose another --name"):
            Search(folder, START, 2).run(Trainer())

    @pytest.mark.parametrize("call", ["Trial.suggest_float", "Study.tell", "Study.get_trials", "Study.ask"])
    def test_whatever_optuna_raises_is_one_line(self, search, monkeypatch, call):
        """As where a page of the study is zero."""
        fault = Mock(side_effect=IndexError("list index out of range"))
        monkeypatch.setattr(f"optuna.{call.split('.')[0].lower()}.{call}", fault)
        with refused(CheckpointError, r"study\.db: no sound study: IndexError list index out of range; choose"):
            search(call, Trainer(), 1)

    def test_a_picture_is_drawn(self, tmp_path, monkeypatch):
        monkeypatch.setattr(evolve, "SPACE", FEW)
        Search(tmp_path, START, 1).run(Trainer())
        assert (tmp_path / "evolve.png").read_bytes().startswith(b"\x89PNG")


@optuna
@pytest.mark.usefixtures("no_plots")
class TestScript:
    """train.py --evolve."""

    FLAGS = ("--epochs", "2", "--img_size", "32", "--batch-size", "8", "--name", "s")

    def test_two_trials_and_a_third_later(self, run, capsys, tmp_path):
        document = run(*self.FLAGS, "--evolve", "2")
        folder = tmp_path / "runs" / "s"
        assert document["trials"] == document["complete"] == 2
        promised = {"args.yaml", "hyp.yaml", "start.yaml", "model.cfg", "env.json", "trials.csv", STUDY}
        assert promised <= {path.name for path in folder.iterdir()}
        assert Path(document["best"]).is_file()
        table = read_results(folder / f"trial-{document['best_trial']:03d}" / "results.csv")
        scores = zip(table["map50"], table["map50_95"], strict=True)
        assert document["fitness"] == pytest.approx(max(0.1 * one + 0.9 * all_ for one, all_ in scores), abs=1e-5)
        before = (folder / "trials.csv").read_text()
        assert run("--resume", str(folder), "--evolve", "3")["trials"] == 3
        assert (folder / "trials.csv").read_text().startswith(before)
        assert run(*self.FLAGS, "--evolve", "3", "--exist-ok")["trials"] == 3
        train.main(["--resume", "--project", str(tmp_path / "runs")])
        assert capsys.readouterr().out.startswith("best of 3 trials (3 complete, 0 given up, 0 failed) is ")

    def test_an_interrupted_trial_goes_on_inside_its_epochs(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(optimizer, "LEAST_STEPS", 1)
        monkeypatch.setattr(optimizer, "NOMINAL_BATCH", 2)
        flags = (*self.FLAGS[:-1], "cut", "--batch-size", "2", "--evolve", "2")
        expected = run(*flags, "--name", "straight")
        loss = Mock(wraps=loop.detection_loss)
        monkeypatch.setattr(loop, "detection_loss", loss)
        at_call(monkeypatch, 14, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match="in trial 2 of 2"):
            run(*flags)
        trained = loss.call_count
        document = run("--resume", str(tmp_path / "runs" / "cut"))
        assert loss.call_count == 16 > trained
        same = ("trials", "best_trial", "fitness", "start_fitness", "hyp")
        assert {key: document[key] for key in same} == {key: expected[key] for key in same}

    def test_a_flag_that_differs_from_the_searchs_is_refused(self, run):
        run(*self.FLAGS, "--evolve", "1")
        with pytest.raises(InputError, match="--epochs is 3 here and 2 in the run"):
            run(*self.FLAGS, "--evolve", "1", "--exist-ok", "--epochs", "3")

    def test_a_training_in_the_folder_of_a_search_is_refused(self, run):
        """--resume would go on with the search."""
        folder = run(*self.FLAGS, "--evolve", "1")["run_dir"]
        with pytest.raises(InputError, match=rf"--exist-ok: {folder} has a search; choose another --name"):
            run(*self.FLAGS, "--exist-ok")
