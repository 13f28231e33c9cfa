"""The coach of a sparse training: what it says, what it costs, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
from utils.checkpoint import read_checkpoint
from utils.errors import InputError
from utils.training import coach, optim

pytestmark = pytest.mark.usefixtures("no_plots")
FLAGS = ("-sr", "--prune", "1", "--s", "auto", "--seed", "3")


@pytest.fixture(autouse=True)
def accumulating(monkeypatch):
    monkeypatch.setattr(optim, "LEAST_STEPS", 1)


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What it says, with all the time there is."""
    said: list[str] = []
    monkeypatch.setattr(coach, "log", said.append)
    monkeypatch.setattr(coach, "TIME", 1e9)
    return said


def test_every_look_tells_how_much_could_go(run, lines):
    """A network that finds nothing loses nothing, whatever goes."""
    run(*FLAGS, "--epochs", "2")
    looks = [line for line in lines if "could go now for 1 points of AP50 at most" in line]
    assert len(looks) == 2
    assert "(3 pictures, AP50 0." in looks[0]


def test_it_changes_nothing_of_the_training(run, lines):
    with_coach = read_checkpoint(Path(run(*FLAGS, "--epochs", "2")["last"]))
    without = read_checkpoint(Path(run(*FLAGS, "--epochs", "2", "--s-coach", "0")["last"]))
    assert lines
    for part in ("model", "ema"):
        assert all(torch.equal(with_coach[part][name], without[part][name]) for name in without[part])


def test_no_look_is_taken_that_would_take_too_long(run, lines, monkeypatch):
    monkeypatch.setattr(coach, "TIME", 0.0)
    run(*FLAGS, "--epochs", "2")
    assert not lines


def test_a_training_ends_when_enough_could_go_and_is_finished_then(run, lines, monkeypatch):
    monkeypatch.setattr(coach.Coach, "_share", lambda *_: (0.4, coach.CHANNELS))
    document = run(*FLAGS, "--epochs", "4", "--s-enough", "0.4")
    assert (document["epochs"], document["best_epoch"]) == (1, 1)
    assert run("--resume", document["run_dir"])["epochs"] == 1
    assert run(*FLAGS, "--epochs", "2", "--s-enough", "0.41")["epochs"] == 2


@pytest.mark.parametrize(
    ("epoch", "map50", "quartile", "word"),
    [(2, 0.8, 0.95, "γ hardly move"), (2, 0.1, 0.5, None), (7, 0.1, 0.1, "does not come back"), (7, 0.5, 0.1, None)],
)
def test_it_says_when_s_is_too_small_or_too_large(run, lines, monkeypatch, epoch, map50, quartile, word):
    """Of eight epochs; the rate turns after 3.2, and a quarter of the rest later accuracy should be coming back."""
    found = []
    real = coach.make_coach
    monkeypatch.setattr("utils.training.sparse_record.make_coach", lambda *args: found.append(real(*args)) or found[-1])
    monkeypatch.setattr(coach.Coach, "look", lambda *_: None)
    run(*FLAGS, "--epochs", "1")
    found[0].start = coach.Start(0.8, 1.0)
    object.__setattr__(found[0].trainer.settings, "epochs", 8)
    words = found[0]._words(epoch, map50, quartile)
    assert (word in words[0]) if word else not words


def test_units_are_tried_whole(run, lines):
    run("-sr", "--prune", "2", "--s", "auto", "--epochs", "1")
    assert any("residual units could go now" in line for line in lines)


def test_enough_needs_a_coach():
    with pytest.raises(InputError, match="--s-enough: is what the coach finds"):
        train.parse_args(["-sr", "--s-enough", "0.4", "--s-coach", "0"])
