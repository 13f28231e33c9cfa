"""Sparse training: rates, the pressure in a step, how far γ get, and what a run leaves."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import slim_prune
from models import Darknet
from tests.nets import csv_rows, printed, tiny
from tests.pruning import conv, graph_of
from utils.checkpoint import load_model, read_checkpoint
from utils.errors import InputError
from utils.flags import choose_model
from utils.pruning.channel_graph import channel_graph, residual_units
from utils.pruning.policy import SETS, advised_percent, candidates
from utils.report.run_dir import read_results
from utils.training import loop
from utils.training.checkpointing import Progress
from utils.training.hyperparameters import OptimizerSettings
from utils.training.optimizer import Schedule, set_step
from utils.training.settings import SCHEDULES, TrainSettings
from utils.training.sparsity import CEILING, START, Control, Sparsity, _advised_flags, outlook, penalised

SCHEDULE = Schedule(OptimizerSettings(), epochs=10, batches=20, accumulate=1)


def sparsity(model: Darknet | None = None, schedule: Schedule = SCHEDULE, **flags) -> Sparsity:
    return Sparsity(model or Darknet(tiny()), TrainSettings(sr=True, **flags), schedule)


def one_layer(values: np.ndarray | torch.Tensor) -> tuple[Darknet, torch.nn.Parameter]:
    """A network whose only γ have these values, and they."""
    model = Darknet(graph_of(conv(len(values))).network)
    gamma = model.layers[0].bn.weight
    gamma.data.copy_(torch.as_tensor(values))
    return model, gamma


@pytest.mark.parametrize(
    ("schedule", "epoch", "pressed"),
    [
        ("dynamic", 3, 100),
        ("dynamic", 4, 65),
        ("dynamic", 9, 65),
        ("constant", 9, 100),
        ("global", 4, 100),
        ("global", 5, 0),
    ],
)
def test_a_schedule_presses_on_all_until_its_turn_and_then_on_the_weakest(schedule, epoch, pressed):
    """Of s = 1 a hundredth is left for the others; of equal γ the first ones are pressed."""
    for scores in (np.random.default_rng(0).random(100), np.ones(100)):
        model, gamma = one_layer(scores)
        gamma.grad = torch.zeros_like(gamma)
        sparsity(model, s=1.0, s_schedule=schedule).add_gradient(Progress(epoch))
        factors = gamma.grad.numpy()[np.argsort(scores, kind="stable")]
        assert factors == pytest.approx([1.0] * pressed + [0.01] * (100 - pressed))
    assert penalised(SCHEDULES["dynamic"], 9, 10, 12) == 7  # rounded down


class TestPressure:
    """One step."""

    @pytest.mark.parametrize("prune", [0, 1, 2])
    def test_the_gradient_of_the_candidates_differs_by_s_times_the_sign_and_of_no_other(self, prune):
        model = Darknet(tiny())
        model.layers[0].bn.weight.data[:3] = torch.tensor([-0.5, 0.0, 0.5])
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.25)
        sparsity(model, s=0.125, prune=prune).add_gradient(Progress())
        chosen = {f"layers.{i}.bn.weight" for i in candidates(channel_graph(model.network), prune)}
        assert chosen
        for name, parameter in model.named_parameters():
            expected = 0.25 + 0.125 * parameter.detach().sign() if name in chosen else torch.full_like(parameter, 0.25)
            assert torch.equal(parameter.grad, expected), name

    def test_the_proximal_solver_shrinks_to_zero_and_not_beyond(self):
        model = Darknet(tiny())
        gamma = model.layers[0].bn.weight
        start = torch.linspace(-0.2, 0.2, len(gamma))
        gamma.data.copy_(start)
        press = sparsity(model, s=1.0, prune=1, adam=True)
        press.add_gradient(Progress())
        assert gamma.grad is None
        press.shrink(Progress(step=100))
        step = SCHEDULE.pace(100)
        assert 0.05 < step < 0.3
        assert torch.allclose(gamma.detach(), start.sign() * (start.abs() - step).clamp(min=0))
        assert (gamma == 0).any()

    @pytest.mark.parametrize("proximal", [False, True])
    def test_gamma_travels_as_far_as_foretold(self, proximal):
        """Against no loss, in a whole training of 1000 steps, to 3 %: momentum takes some steps to build up."""
        model = Darknet(tiny())
        schedule = Schedule(OptimizerSettings(), epochs=10, batches=100, accumulate=1)
        press = sparsity(model, schedule, s=0.002, prune=1, adam=proximal)
        gamma = model.layers[0].bn.weight
        optimizer = torch.optim.SGD([gamma], 0.03, momentum=0.9, nesterov=True)
        for step in range(schedule.steps):
            for scale in press.gammas():
                scale.grad = torch.zeros_like(scale)
            set_step(optimizer, schedule, step)
            press.add_gradient(Progress())
            optimizer.step()
            press.shrink(Progress(step=step))
        assert 0.3 < 0.002 * press.reach < 0.9
        assert 1 - float(gamma[0].detach()) == pytest.approx(0.002 * press.reach, rel=0.03)

    def test_a_depthwise_convolution_is_pressed_with_its_producer_and_scored_by_the_mean(self):
        network = graph_of(conv(4), conv(4, 3, groups=4), conv(4)).network
        model = Darknet(network)
        model.layers[1].bn.weight.data.fill_(3)
        press = sparsity(model, s=0.5)
        assert tuple(press.voters) == (0, 2)
        assert press.scores().tolist() == [2.0] * 4 + [1.0] * 4
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        press.add_gradient(Progress())
        assert model.layers[1].bn.weight.grad.tolist() == [0.5] * 4

    def test_frozen_convolutions_are_left_out_and_none_at_all_is_refused(self):
        model = Darknet(tiny())
        model.layers[0].requires_grad_(False)
        assert 0 not in sparsity(model, s=0.5, prune=1).voters
        match = r"--prune 2: .* no such convolutions to train \(the last convolution of every residual unit\)"
        with pytest.raises(InputError, match=match):
            sparsity(Darknet(graph_of(conv(4)).network), s=0.5, prune=2)


class TestOutlook:
    """What is said before the first step."""

    def test_a_training_that_would_do_nothing_is_warned_of(self):
        """30 epochs of roadsigns with s = 0.001: γ travel 0.05, their median is 1.7."""

        def expected(s: float, reach: float) -> tuple[str, str | None]:
            scores = torch.full((9,), 1.7, dtype=torch.float64)
            settings = TrainSettings(s=s)
            return outlook(SimpleNamespace(settings=settings, schedule=SCHEDULE, reach=reach, scores=lambda: scores))

        text, warning = expected(0.001, 50)
        assert "can travel 0.05, their median |γ| is 1.7; against no loss s 0.0342" in text
        assert "more than 2.9 % of the median" in warning
        assert expected(0.02, 50)[1] is None
        assert "a larger lr0, or many more epochs" in expected(10.0, 0.01)[1]
        assert "all γ can come to zero" in expected(1.0, 50)[1]

    def test_reach_counts_only_steps_under_pressure(self):
        reach = {name: sparsity(s=0.1, prune=1, s_schedule=name).reach for name in SCHEDULES}
        assert reach["dynamic"] == reach["constant"] > reach["global"] > reach["constant"] / 3

    def test_the_advice_goes_on_until_a_layer_has_lost_a_twentieth(self):
        """Forty of 0 and ten of 0.1, which hold 1 of 51, and one of 1; of the ninety of 0.05 four.

        A layer that is wholly squeezed does not hold the others back.
        """
        small = np.concatenate([np.zeros(40), np.full(10, 0.1), np.ones(50)])
        half = np.concatenate([np.zeros(50), np.ones(50)])
        assert advised_percent({0: small}, max_percent=0.2) == 0.2
        cases = [
            ({0: small}, 0.51),
            ({0: small, 3: np.full(90, 0.05)}, 0.23),
            ({0: np.ones(16)}, 0),
            ({0: np.zeros(16)}, 0.99),
            ({}, 0),
            *(({0: half, 1: np.full(100, dead)}, 0.76) for dead in (0.0, 1e-6)),
            *(({0: half, 1: np.full(1, dead)}, 0.52) for dead in (0.0, 1e-6)),
        ]
        for scores, advice in cases:
            assert advised_percent(scores) == advice


class TestControl:
    """The s of --s auto."""

    def trained(self, resist: float = 0.0, share: float = 0.5) -> tuple[np.ndarray, Control, list, list]:
        """|γ| of a layer after 200 steps whose loss pulls every γ up by `resist` times the fair s; the course of s and
        of the weak share."""
        model, gamma = one_layer(torch.linspace(0.5, 2, 100))
        schedule = Schedule(OptimizerSettings(), epochs=20, batches=10, accumulate=1)
        press = sparsity(model, schedule, s="auto", prune=1, s_share=share)
        progress, course, weak = Progress(control=press.control()), [], []
        for progress.step in range(schedule.steps):
            gamma.data += resist * progress.control.fair * schedule.pace(progress.step) * (gamma > 0)
            press.shrink(progress)
            course.append(progress.control.s)
            weak.append(float((press.scores().numpy() < progress.control.limit).mean()))
        return press.scores().numpy(), progress.control, course, weak

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_the_share_is_weak_when_the_plan_ends_and_the_other_channels_are_as_they_were(self, share):
        scores, _, course, weak = self.trained(share=share)
        assert weak[-1] == pytest.approx(share, abs=0.01) and weak == sorted(weak)
        others = slice(round(share * 100), None)
        assert np.sort(scores)[others] == pytest.approx(np.linspace(0.5, 2, 100)[others])
        assert not any(course[160:])

    def test_s_begins_low_and_at_most_doubles_in_an_epoch(self):
        _, control, course, _ = self.trained()
        pressed = [s for s in course if s]
        assert pressed[0] == START * control.fair
        assert max(b / a for a, b in zip(pressed, pressed[10:], strict=False)) == pytest.approx(2)

    def test_s_rises_while_gamma_resist_and_stays_below_its_ceiling(self):
        free, resisting = (max(self.trained(resist)[2]) for resist in (0.0, 0.5))
        assert resisting > free
        _, control, course, weak = self.trained(resist=2 * CEILING)
        assert max(course) == CEILING * control.fair and weak[-1] == 0

    def test_what_is_weak_stays_so_and_the_others_are_let_go_once_the_share_is_reached(self):
        model, gamma = one_layer(torch.ones(4))
        press = sparsity(model, s="auto", prune=1)
        progress = Progress(step=150, control=press.control())
        for values, pressed in (([0.01, 0.5, 1, 1], [1, 1, 0, 0]), ([0.01, -0.01, 1, 1], [1, 1, 0, 0])):
            gamma.data.copy_(torch.tensor(values))
            rates = torch.cat(press._rates(progress))
            assert rates.sign().tolist() == pressed
            assert float(rates[0]) == pytest.approx(progress.control.hold) and progress.control.hold > 0

    def control(self) -> Control:
        """A plan of 100 travels; the next s is 0.1, the first was an eighth of 0.1."""
        return Control(limit=0.05, reach=100.0, fair=0.1, hold=0.0, allowed=0.1)

    def next_s(self, control: Control, weak: float = 0.0, left: float = 5.0) -> float:
        """With half of the channels wanted, s doubling in each step, and 3 points to lose."""
        return control.next_s(weak, left, 0.5, 1)[0]

    def test_it_lets_go_at_once_when_ap50_falls_and_goes_on_from_half_when_it_is_back(self):
        control, course = self.control(), []
        for map50 in (0.5, 0.9, 0.871, 0.869, 0.4, 0.88):
            control.see_ap50(map50, 3.0)
            course.append(self.next_s(control))
        assert course == pytest.approx([0.1, 0.2, 0.4, 0, 0, 0.2])
        assert (control.best50, control.rested, control.hold) == (0.9, 2, 0.4)

    def test_s_does_not_halve_below_the_first_one(self):
        control, course = self.control(), []
        for map50 in (0.9, 0.5) * 6:
            control.see_ap50(map50, 3.0)
            course.append(self.next_s(control, weak=0.49))
        assert course[::2] == [0.1, 0.05, 0.025, 0.0125, 0.0125, 0.0125]

    def test_s_rises_only_while_fewer_channels_are_weak_than_planned(self):
        """With 20 of 100 left the plan wants 0.8 of a half. A tenth of the half more than is weak feels s."""
        control = self.control()
        course = [control.next_s(weak, 20.0, 0.5, 1) for weak in (0.2, 0.39, 0.41, 0.47, 0.5)]
        assert [s for s, _ in course] == [0.1, 0.2, 0.4, 0.4, 0]
        assert [share for _, share in course] == pytest.approx([0.25, 0.44, 0.45, 0.45, 0.5])

    def test_networks_with_nothing_to_press_on_or_no_step_are_no_trouble(self):
        for scores, reach in ((np.zeros(4), 10.0), (np.ones(4), 0.0)):
            control = Control.begin(scores, reach)
            assert control.next_s(0.0, reach, 0.5, 1)[0] == 0
            assert control.planned(0.5, 0.0) == 0.5


def gammas(path: str | Path) -> torch.Tensor:
    model = load_model(choose_model(None, str(path))).model
    return torch.cat([model.layers[i].bn.weight.detach().abs() for i in candidates(channel_graph(model.network), 1)])


@pytest.mark.usefixtures("accumulating")
class TestRun:
    """train.py -sr."""

    FLAGS = ("-sr", "--prune", "1", "--epochs", "3")

    def test_the_pressure_acts_once_a_step_on_the_finished_gradient_and_no_worker_outlives_it(
        self, run, monkeypatch, no_plots
    ):
        """Four batches of 2, accumulated to 6: two steps an epoch.

        What watches the trainer is held by it; workers that wait for the garbage collector would die by a signal.
        """
        calls, seen, processes = [], [], set(active_children())
        real = Sparsity.add_gradient

        def add_gradient(self: Sparsity, progress: Progress) -> None:
            expected = [gamma.grad + gamma.detach().sign() * 0.02 for gamma in self.gammas()]
            real(self, progress)
            calls.append(progress.epoch)
            seen.extend(map(torch.equal, (gamma.grad for gamma in self.gammas()), expected))

        monkeypatch.setattr(Sparsity, "add_gradient", add_gradient)
        run(*self.FLAGS, "--s", "0.02", "--s-schedule", "constant", "--batch-size", "2", "--workers", "1")
        assert set(active_children()) == processes
        assert calls == [0, 0, 1, 1, 2, 2]
        assert seen and all(seen)

    def test_what_is_kept_is_sparse_and_the_last_epoch_and_the_last_line_prunes_it(self, run, lines, tmp_path, capsys):
        flags = ("--s", "2", "--adam", "--tensorboard", "--project", str(tmp_path / "my runs"))
        document = run(*self.FLAGS, *flags)
        assert document["best_epoch"] == 3
        plain = gammas(run("--epochs", "3", "--adam")["best"])
        sparse = gammas(document["best"])
        assert float(sparse.mean()) < 0.6 * float(plain.mean())
        last, best = (read_checkpoint(Path(document[name]))["model"] for name in ("last", "best"))
        zeros = {name for name in last if name.endswith("bn.weight") and (last[name] == 0).any()}
        assert zeros
        assert all(torch.equal(best[name] == 0, last[name] == 0) for name in zeros)
        directory = Path(document["run_dir"])
        rows = csv_rows(directory / "gamma.csv")
        layers = candidates(channel_graph(tiny()), 1)
        expected = [(str(epoch), str(block)) for epoch in range(4) for block in (-1, *layers)]
        assert [(row["epoch"], row["block"]) for row in rows] == expected
        medians = [float(row["median"]) for row in rows if row["block"] == "-1"]
        assert medians == sorted(medians, reverse=True)
        assert {path.name for path in (directory / "gamma").iterdir()} == {"histogram.png", "epochs.png", "course.png"}
        assert not (directory / "pressure.csv").exists()
        counts = [list(row.values())[1:] for row in csv_rows(directory / "gamma_histogram.csv")]
        assert {sum(map(int, row)) for row in counts} == {int(rows[0]["channels"])}
        command = shlex.split(next(line for line in lines if line.startswith("prune: ")))
        assert command[:3] == ["prune:", "python", "slim_prune.py"]
        pruned = printed(capsys, slim_prune.main, *command[3:], "--no-test", "--project", str(tmp_path / "pruned"))
        assert pruned["percent"] == pruned["advised_percent"] > 0

    def test_of_weak_units_within_one_another_one_is_to_be_removed(self):
        """Another one has γ of 1."""
        text = "[shortcut]\nfrom={}\nactivation=linear\n".format
        last = conv(4, activation="linear")
        graph = graph_of(conv(4), conv(4), last, text(-3), last, text(-5), last, text(-2))
        gammas = {0: np.ones(4), 1: np.ones(4), 2: np.zeros(4), 4: np.zeros(4), 6: np.ones(4)}
        assert [unit.last for unit in residual_units(graph.network)] == [2, 4, 6]
        assert _advised_flags(graph, gammas, 2) == {"shortcut": 1}

    @pytest.mark.parametrize("number", SETS)
    def test_the_next_command_prunes_it(self, number, run, no_plots, tmp_path):
        """All residual units of most networks hold less than half of the multiply-adds."""
        _, script, *flags = shlex.split(run("--epochs", "1", "-sr", "--prune", str(number))["next"])
        flags += ["--no-test", "--project", str(tmp_path / "pruned")]
        importlib.import_module(script.removesuffix(".py")).main(flags)
        assert (tmp_path / "pruned/exp/model.pt").exists()

    def test_accuracy_that_falls_ends_the_pressure_and_is_in_the_table(self, run, lines, monkeypatch, no_plots):
        """Before the training, and after each epoch."""
        scores, real = iter((0.9, 0.8, 0.8, 0.8)), loop.evaluate

        def evaluate(*args, **more):
            evaluation = real(*args, **more)
            return dataclasses.replace(evaluation, metrics=dataclasses.replace(evaluation.metrics, map50=next(scores)))

        monkeypatch.setattr(loop, "evaluate", evaluate)
        document = run(*self.FLAGS, "--s", "auto")
        table = read_results(Path(document["run_dir"]) / "pressure.csv")
        assert table["epoch"] == [0, 1, 2, 3]
        assert [s > 0 for s in table["s"]] == [False, True, False, False]
        assert table["plan"][0] == 0 and table["plan"] == sorted(table["plan"]) and table["plan"][-1] == 0.5
        assert table["rested"][1] == 0 < table["rested"][2]
        (line,) = [line for line in lines if "were wanted" in line]
        assert "50% were wanted: 3 optimizer steps were too few, and in 1 of them" in line
        assert "--importance taylor, which needs no sparse training" in line

    def test_a_table_that_cannot_be_written_does_not_end_the_training(self, run, monkeypatch, no_plots):
        monkeypatch.setattr("utils.training.sparsity.SparseRecord._write", Mock(side_effect=OSError(28, "full")))
        monkeypatch.setattr("utils.training.sparsity.SparseRecord._draw", lambda *_: None)
        assert run(*self.FLAGS, "--s", "auto")["epochs"] == 3

    def test_a_resumed_run_goes_on_with_the_same_control_and_the_tables_that_are_left(self, run, no_plots):
        directory = Path(run(*self.FLAGS, "--s", "auto")["run_dir"])
        tables = [directory / name for name in ("gamma.csv", "pressure.csv")]
        last, texts = read_checkpoint(directory / "weights" / "last.pt"), [path.read_text() for path in tables]
        (directory / "weights" / "prev.pt").replace(directory / "weights" / "last.pt")
        again = read_checkpoint(Path(run("--resume", str(directory))["last"]))
        assert again["progress"]["control"] == last["progress"]["control"]
        assert all(torch.equal(again["model"][key], value) for key, value in last["model"].items())
        assert [path.read_text() for path in tables] == texts
        tables[0].unlink()
        (directory / "weights" / "prev.pt").replace(directory / "weights" / "last.pt")
        assert run("--resume", str(directory))["epochs"] == 3
