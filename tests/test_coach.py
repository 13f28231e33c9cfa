"""The coach of a sparse training: what it says, what it costs, and that it changes nothing."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from models import Darknet
from tests.nets import tiny
from utils.checkpoint import read_checkpoint
from utils.errors import InputError, Interrupted
from utils.pruning.sparsity import SparseSettings
from utils.training import coach, optim

pytestmark = pytest.mark.usefixtures("no_plots")
FLAGS = ("-sr", "--prune", "1", "--s", "auto", "--seed", "3")


@pytest.fixture(autouse=True)
def accumulating(monkeypatch):
    monkeypatch.setattr(optim, "LEAST_STEPS", 1)


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What it says, with all the time there is, of networks that find half of it all."""
    said: list[str] = []
    monkeypatch.setattr(coach, "log", said.append)
    monkeypatch.setattr(coach, "TIME", 1e9)
    measure = coach.Coach._map50
    monkeypatch.setattr(coach.Coach, "_map50", lambda self, model: 0.5 + 0 * measure(self, model))
    return said


def test_every_look_tells_how_much_could_go(run, lines):
    """Where every network finds the same, all that may go can."""
    run(*FLAGS, "--epochs", "2")
    looks = [line for line in lines if "could go now for 1 points of AP50 at most" in line]
    assert len(looks) == 2
    assert "(3 pictures, AP50 0.500; " in looks[0]


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
    [
        (2, 0.8, 0.95, "γ hardly move"),
        (2, 0.1, 0.5, None),
        (7, 0.1, 0.1, "does not come back"),
        (7, 0.5, 0.1, None),
        (7, None, 0.1, None),
    ],
)
def test_it_says_when_s_is_too_small_or_too_large(run, lines, monkeypatch, epoch, map50, quartile, word):
    """Of eight epochs; the rate turns after 3.2, and half of the rest later accuracy should be coming back."""
    found = []
    real = coach.make_coach
    monkeypatch.setattr("utils.training.sparse_record.make_coach", lambda *args: found.append(real(*args)) or found[-1])
    monkeypatch.setattr(coach.Coach, "look", lambda *_: None)
    run(*FLAGS, "--epochs", "1")
    found[0].best50, found[0].start_quartile = 0.8, 1.0
    object.__setattr__(found[0].trainer.settings, "epochs", 8)
    words = found[0]._words(epoch, map50, quartile)
    assert [word in text for text in words.values()] == [True] * (word is not None)


def test_units_are_tried_whole(run, lines):
    run("-sr", "--prune", "2", "--s", "auto", "--epochs", "1")
    assert any("residual units could go now" in line for line in lines)


def test_enough_needs_a_coach():
    with pytest.raises(InputError, match="--s-enough: is what the coach finds"):
        train.parse_args(["-sr", "--s-enough", "0.4", "--s-coach", "0"])


class Hand:
    """A clock whose hand is moved by the test."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


SECONDS = st.floats(0.01, 10)


@given(share=st.floats(0.01, 0.5), rounds=st.lists(st.tuples(st.floats(0, 500), st.lists(SECONDS, max_size=12))))
def test_an_allowance_is_overdrawn_by_no_more_than_a_piece_is_longer_than_all_before(share, rounds):
    clock, longest = Hand(), 0.0
    allowance = coach.Allowance(share, clock)
    for idle, pieces in rounds:
        clock.now += idle
        if allowance.left < longest:
            continue
        with allowance.work():
            for piece in pieces:
                clock.now += piece
                assert allowance.used <= share * allowance.elapsed + max(0.0, piece - longest) + 1e-6
                longest = max(longest, piece)
                if not allowance.another():
                    break


@pytest.fixture
def made_up(monkeypatch):
    """Make a coach of an untrained network that looks at 60 pictures of 60; an evaluation takes so many seconds."""
    clock, model = Hand(), Darknet(tiny())

    def evaluate(network, loader, names, **_):
        for _ in loader:
            clock.now += one.seconds / 4
        return SimpleNamespace(metrics=SimpleNamespace(map50=0.5))

    monkeypatch.setattr(coach, "evaluate", evaluate)
    monkeypatch.setattr(coach, "collate", list)
    monkeypatch.setattr(coach.Coach, "_share", lambda self, *_: (sum(self._map50(model) for _ in range(7)), "of all"))
    one = SimpleNamespace(
        clock=clock,
        seconds=1.0,
        model=model,
        state=SimpleNamespace(kept=model),
        progress=SimpleNamespace(step=0, enough=False),
        sparsity=SimpleNamespace(layers=(0, 1)),
        settings=SimpleNamespace(epochs=1000),
        source=SimpleNamespace(names=("a", "b")),
        team=SimpleNamespace(device=torch.device("cpu"), size=1),
        val_loader=SimpleNamespace(dataset=range(60)),
        train_loader=SimpleNamespace(dataset=range(600)),
        stop=False,
    )
    return coach.Coach(one, SparseSettings(prune=1), coach.Allowance(coach.TIME, clock))


@pytest.mark.parametrize("told", [1.0, 0.1, 10.0, None])
@pytest.mark.parametrize("seconds", [1.0, 4.0, 20.0])
def test_looks_take_their_share_of_the_time_and_no_more(made_up, monkeypatch, seconds, told):
    """Epochs of 100 s; what the first ones tell of an evaluation is right, wrong by ten, or nothing."""
    said, trainer, allowance = [], made_up.trainer, made_up.allowance
    monkeypatch.setattr(coach, "log", said.append)
    trainer.seconds, epochs = seconds, 400
    for epoch in range(1, epochs + 1):
        trainer.clock.now += 100.0
        row = {"seconds": 90.0} if told is None else {"seconds": 90.0, "test_seconds": seconds * told}
        longest = seconds / 4 if said else 0.0  # of the pieces so far
        made_up.look(epoch, row)
        assert allowance.used <= coach.TIME * allowance.elapsed + seconds / 4 - longest
    looks = sum("could go now" in line for line in said)
    affordable = coach.TIME * allowance.elapsed / (coach.EVALUATIONS * seconds)
    assert looks >= min(epochs - 20, affordable / 2 - 1) and looks >= 1
    assert made_up.best50 == 0.5


def test_evaluations_that_grow_slower_are_left_and_paid_back(made_up):
    """Another program takes the machine: a piece is ten times as long as all before."""
    trainer, allowance = made_up.trainer, made_up.allowance
    for epoch in range(1, 200):
        trainer.clock.now += 100.0
        trainer.seconds = 40.0 if epoch >= 100 else 4.0
        over = 10.0 if epoch >= 100 else 1.0
        made_up.look(epoch, {"seconds": 90.0, "test_seconds": 4.0})
        assert allowance.used <= coach.TIME * allowance.elapsed + over
    assert allowance.left >= 0 and made_up.cost > 40


def test_what_goes_wrong_is_said_once_and_without_a_look(made_up, monkeypatch):
    """AP50 of the epochs is known, and γ are: no time is needed for that."""
    said = []
    monkeypatch.setattr(coach, "log", said.append)
    made_up.trainer.settings.epochs = 10
    for epoch, map50 in enumerate((0.6, 0.5, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2), 1):  # late from the seventh on
        made_up.look(epoch, {"seconds": 1.0, "test_seconds": 1.0, "map50": map50})
    assert [line.partition(";")[0] for line in said] == [
        "coach: γ hardly move", "coach: AP50 was 0.600 and does not come back"]  # fmt: skip
    assert made_up.allowance.used == 0


@pytest.mark.parametrize(("best", "now", "tells"), [(0.8, 0.3, False), (0.0, 0.01, False), (0.8, 0.5, True)])
def test_where_little_is_left_to_lose_nothing_is_said_to_go(made_up, monkeypatch, best, now, tells):
    """A network that finds next to nothing loses nothing, and is no reason to end a training."""
    said = []
    monkeypatch.setattr(coach, "log", said.append)
    monkeypatch.setattr(coach.Coach, "_map50", lambda *_: now)
    monkeypatch.setattr(coach.Coach, "_share", lambda *_: (0.9, coach.CHANNELS))
    made_up.settings = SparseSettings(prune=1, enough=0.5)
    made_up.best50, made_up.trainer.clock.now = best, 1e6
    made_up.look(1, {"seconds": 1.0, "test_seconds": 1.0})
    assert ("could go now" in said[0], "too low to tell" in said[0]) == (tells, not tells)
    assert made_up.trainer.progress.enough is tells


def test_a_look_is_not_begun_when_the_run_is_to_stop(made_up):
    made_up.trainer.clock.now += 1e6
    made_up.trainer.stop = True
    made_up.look(1, {"seconds": 90.0, "test_seconds": 1.0})
    assert made_up.allowance.used == 0 and made_up.best50 == 0


def test_a_signal_ends_a_look_and_the_resumed_run_has_the_same_weights(run, lines, monkeypatch, tmp_path):
    """The other run has no coach; after the signal the time for looks is another one, too."""
    straight = read_checkpoint(Path(run(*FLAGS, "--epochs", "3", "--s-coach", "0")["last"]))
    real, calls = coach.evaluate, []

    def evaluate(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **more)

    monkeypatch.setattr(coach, "evaluate", evaluate)
    with pytest.raises(Interrupted, match="after epoch 1, batch 2"):
        run(*FLAGS, "--epochs", "3", "--name", "cut")
    assert len(calls) == 3 and not lines
    monkeypatch.setattr(coach, "TIME", 0.0)
    resumed = read_checkpoint(Path(run("--resume", str(tmp_path / "runs" / "cut"))["last"]))
    for part in ("model", "ema"):
        assert all(torch.equal(resumed[part][name], straight[part][name]) for name in straight[part])
