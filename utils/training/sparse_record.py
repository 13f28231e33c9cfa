"""What a sparse training says and writes of the γ it presses on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models import Darknet
from utils.cli import log
from utils.errors import ResourceError
from utils.graph import ChannelGraph, channel_graph
from utils.pruning.policy import FREE_SHARE, SETS, ChannelPolicy, advised_percent, channel_scores, choose
from utils.pruning.sparsity import AUTO, PLAN_END, Control, SparseSettings, outlook
from utils.pruning.surgery import arrays_of, gammas_of
from utils.pruning.units import Importance, residual_units, unit_scores
from utils.report.gammas import BELOW, GammaLog
from utils.report.run_dir import RunDirectory
from utils.report.scalars import Scalars
from utils.training.loop import Trainer
from utils.training.sparse import Sparsity

RULE = "!" * 80
NOTHING = "prune: nothing yet; no channel is weak enough: a larger s, or more epochs"
SCRIPTS = {0: "normal_prune.py", 1: "slim_prune.py", 2: "layer_prune.py"}
"""The script that removes what was pressed on, by `--prune`."""


class SparseRecord:
    """The γ of one run: told at its start, written after every epoch, drawn at its end.

    Args:
        trainer: of a sparse training.
        run: its directory.
        events: of TensorBoard, if asked for.
    """

    def __init__(self, trainer: Trainer, run: RunDirectory, events: Scalars | None) -> None:
        self.trainer, self.run, self.events = trainer, run, events
        self.pressure: Sparsity = trainer.sparsity
        self._graph = channel_graph(trainer.model.network)
        self._log = GammaLog(run)

    def begin(self) -> None:
        """Say what can be expected, so that a training that would do nothing is not overlooked; γ before it."""
        self.trainer.watchers.append(self.append)
        if self.trainer.progress.step:
            return
        settings, control = self.pressure.settings, self.trainer.progress.control
        if control is None:
            text, warning = outlook(settings, self.pressure.scores(), self.pressure.reach)
        else:
            text, warning = _plan(control, settings, self.pressure), None
        log(f"{text}; {len(self.pressure.layers)} convolutions ({SETS[settings.prune]})")
        if warning:
            log(f"{RULE}\nwarning: {warning}\n{RULE}")
        self.append(0, {})

    def append(self, epoch: int, row: Mapping[str, float | None]) -> None:
        """Write the γ of the model that is kept; a watcher of the trainer."""
        gammas = gammas_of(self._graph.network, arrays_of(self.trainer.state.kept))
        scores = channel_scores(self._graph, gammas, self.pressure.layers)
        try:
            self._log.append(epoch, scores, self._controlled(np.concatenate(list(scores.values()))))
        except (OSError, ResourceError) as failure:  # a table is not worth a training
            log(f"warning: {failure}; the γ of epoch {epoch} are missing there")
        if self.events is not None:
            self.events.histogram(epoch, "gamma/all", np.concatenate(list(scores.values())))
            for block, values in scores.items():
                self.events.histogram(epoch, f"gamma/{block}", values)

    def _controlled(self, scores: NDArray[np.floating]) -> dict[str, float] | None:
        """What s = auto did until now; None where s is a number."""
        control, share = self.trainer.progress.control, self.pressure.settings.share
        if control is None:
            return None
        return {
            "s": control.s,
            "plan": control.planned(share, self.pressure.planned_reach(self.trainer.progress.step)),
            "weak": float((scores < control.limit).mean()),
            "rested": control.rested,
        }

    def finish(self, model: Darknet) -> None:
        """Draw the pictures, and say what pruning can take of the model that was kept."""
        settings, epochs = self.pressure.settings, self.pressure.schedule.epochs
        turn = 1 if settings.s == AUTO else settings.schedule.turn
        self._log.draw(turn * epochs if turn < 1 else None)
        gammas = gammas_of(self._graph.network, arrays_of(model))
        every = np.concatenate(list(channel_scores(self._graph, gammas, self.pressure.layers).values()))
        shares = ", ".join(f"{(every < limit).mean():.0%} below {limit:g}" for limit in BELOW)
        log(f"|γ| of {len(every)} channels: {shares}")
        if (control := self.trainer.progress.control) is not None:
            log(_outcome(control, settings.share, float((every < control.limit).mean()), self.pressure.schedule.steps))
        amount = _amount(self._graph, gammas, settings)
        words = [SCRIPTS[settings.prune], "--weights", str(self.run.weights / "best.pt"),
                 "--data", str(self.trainer.source.args["data"]), *(["--all-convs"] * settings.all_convs)]  # fmt: skip
        log(f"prune: python {shlex.join([*words, *amount])}" if amount else NOTHING)


def _plan(control: Control, settings: SparseSettings, pressure: Sparsity) -> str:
    """What s = auto is to reach, for the log."""
    steps = pressure.schedule.steps
    return (
        f"sparse training: {settings.share:.0%} of {len(pressure.scores())} channels are to be weak, |γ| < "
        f"{control.limit:.3g}, after {round(PLAN_END * steps)} of {steps} optimizer steps; s {AUTO} starts at "
        f"{control.allowed:.3g}"
    )


def _outcome(control: Control, share: float, weak: float, steps: int) -> str:
    """What s = auto has reached, for the log."""
    text = f"--s {AUTO}: {weak:.0%} of the channels are weak, |γ| < {control.limit:.3g}; {share:.0%} were asked for"
    if weak >= share:
        return text
    rests = f", and in {control.rested} of them accuracy was too far down to press" if control.rested else ""
    return (
        f"{text}: {steps} optimizer steps were too few{rests}; more epochs, a smaller batch, or pruning with "
        "--importance taylor, which needs no sparse training"
    )


def _amount(graph: ChannelGraph, gammas: Importance, settings: SparseSettings) -> list[str]:
    """The flags for as much as γ advise, by the rules of the script that removes it; none if that is nothing."""
    if settings.prune == 2:
        units = residual_units(graph.network)
        scores = unit_scores(graph, gammas, np.ones(graph.count, np.bool_), units)
        weak = int((scores < FREE_SHARE * np.mean([np.abs(gamma).mean() for gamma in gammas.values()])).sum())
        return ["--shortcut", str(weak)] if weak else []
    floor = 0.0 if settings.prune == 1 else None
    policy = ChannelPolicy(0.0, prune=settings.prune, layer_keep=floor, all_convs=settings.all_convs)
    choice = choose(graph, gammas, policy)
    percent = advised_percent(choice.scores, choice.max_percent)
    return ["--percent", f"{percent:g}"] if percent else []
