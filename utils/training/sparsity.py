"""Sparse training: the L1 penalty on batch-norm scales γ in every optimizer step, and what a run says and writes of it.

It adds s · Σ|γ| of the candidates to the loss (Liu et al., arXiv:1708.06519, section 3), so that channels the detector
can do without fade away before pruning removes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet
from utils.cli import command_of, log
from utils.errors import InputError
from utils.pruning import policy
from utils.pruning.channel_graph import ChannelGraph, Importance, channel_graph, most_units
from utils.pruning.surgery import arrays_of, gammas_of
from utils.report import plots
from utils.report.run_dir import Results, read_results
from utils.training.optimizer import Schedule
from utils.training.settings import AUTO, LARGEST_S, SCHEDULES, RateSchedule, TrainSettings

if TYPE_CHECKING:
    from utils.training.checkpointing import Progress
    from utils.training.loop import Trainer
    from utils.training.workflow import Scalars

DECAY = 0.01
"""What is left of s where a schedule lets go (arXiv:2306.01526, as its authors' code has it)."""
PLAN_END = 0.8
"""Share of the optimizer steps after which `auto` penalises no further channel; the network recovers in the rest."""
STRIDE = 0.1
"""Share of the wanted channels that `auto` takes to zero at a time. With a penalty on all of them, their γ fall side by
side. On bccd (yolov4-tiny, 285 steps) AP50 had then lost 7 points when the median |γ| was 0.6 of what it was before the
training, and no channel was weak."""
START, CEILING = 1 / 8, 4.0
"""First and largest s of `auto`, in multiples of the s that takes an average γ to zero in that share of the plan,
against no loss. It begins with too little. A channel that resists the largest is one that the detector needs."""
FEEBLE, FIERCE = 0.1, 4.0
"""Limits of how far γ can travel in a training. Below FEEBLE times the median |γ| the training does next to nothing.
Above FIERCE times the largest |γ| it may leave nothing."""
RULE = "!" * 80
NOTHING = "prune: nothing yet; no channel is weak enough: a larger s, or more epochs"
QUANTILES = {"min": 0, "q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9, "max": 1}
BELOW = (0.1, 0.01, 0.001)
"""Thresholds for which gamma.csv has the share of |γ| below."""
CONTROLLED = ("s", "plan", "weak", "rested")
"""Columns of pressure.csv: s of the epoch's last step, the planned and the actual share of weak channels, and the
optimizer steps so far without a penalty because of AP50."""
EVERY = -1
"""`block` of the rows of gamma.csv for all candidates."""
SCRIPTS = {0: "normal_prune.py", 1: "slim_prune.py", 2: "layer_prune.py"}
"""Script that removes the penalised channels, by `--prune`."""


@dataclass
class Control:
    """What `--s auto` knows; a checkpoint holds all of it.

    The plan: the share of weak channels rises with the travel of γ, Σ paces of the steps, to the wanted share. s is for
    the weakest channels only: `STRIDE` of the wanted ones more than are weak, or are to be weak by now. s rises while
    the share is behind its plan, and at most doubles in an epoch. So between two evaluations of AP50 no s is more than
    twice one that AP50 has borne. While the share is not behind, s stays.

    s is 0 while AP50 is too far below its best. Afterwards it goes on from half of what it was, or from the first s. It
    is also 0 once the wanted share is weak, and after the plan.

    Channels that are weak already keep the largest s so far, so that they do not grow back.
    """

    limit: float
    """A channel is weak if its |γ| is below: `FREE_SHARE` of the mean before the training. So all weak channels
    together hold at most that share of Σ|γ| before the training."""
    reach: float
    """How far a γ travels within the plan with s = 1."""
    fair: float
    """The s that takes an average γ to zero in `STRIDE` of the plan, against no loss."""
    hold: float
    """The s of weak channels."""
    allowed: float
    """The largest s of the next step, for the others."""
    s: float = 0.0
    """Of the last step, for the others."""
    best50: float | None = None
    """Highest AP50 so far, that of the network before the training included; None: not measured."""
    fallen: bool = False
    """AP50 is too far below."""
    rests: bool = False
    """There was no penalty in the last step because of AP50."""
    rested: int = 0
    """Steps without a penalty because of that."""

    @classmethod
    def begin(cls, scores: NDArray[np.floating], reach: float) -> Control:
        """Return the state before the first step, from |γ| of the candidates and their reach within the plan."""
        mean = float(scores.mean())
        fair = min(mean / (STRIDE * reach), LARGEST_S / CEILING) if reach else 0.0
        return cls(policy.FREE_SHARE * mean, reach, fair, START * fair, START * fair)

    def planned(self, share: float, left: float) -> float:
        """Return the share of channels that the plan wants weak when a γ can still travel `left` with s = 1."""
        return share * (1 - left / self.reach) if self.reach else share

    def next_s(self, weak: float, left: float, share: float, steps_per_epoch: int) -> tuple[float, float]:
        """Return the s of a step for channels that are not weak, and the share of all channels that feel it.

        Args:
            weak: share of the channels that are weak.
            left: how far a γ travels in the rest of the plan with s = 1.
            share: of the channels that is to be weak.
            steps_per_epoch: in which s may double.
        """
        self.s, planned = 0.0, self.planned(share, left)
        if weak >= share or left <= 0:
            return 0.0, weak
        if self.fallen and not self.rests:
            self.allowed = max(self.allowed / 2, START * self.fair)
        self.rests = self.fallen
        self.rested += self.fallen
        if not self.fallen:
            self.s = self.allowed
            rise = 2 ** (1 / steps_per_epoch) if weak < planned else 1.0
            self.allowed = min(self.s * rise, CEILING * self.fair)
        self.hold = max(self.hold, self.s)
        return self.s, min(share, min(weak, planned) + STRIDE * share)

    def see_ap50(self, map50: float, drop: float) -> None:
        """Compare AP50 with the best so far, of which it may lose `drop` points."""
        self.best50 = max(map50, self.best50 or 0.0)
        self.fallen = 100 * (self.best50 - map50) > drop


class Sparsity:
    """The penalty on the γ of a model's candidates.

    It is applied once per optimizer step, when the gradient is complete: added up over batches, unscaled, averaged over
    the processes and clipped.

    Args:
        model: that is about to be trained.
        settings: of the run.
        schedule: of the learning rate.

    Raises:
        InputError: the model has no candidate, or all are frozen.
    """

    def __init__(self, model: Darknet, settings: TrainSettings, schedule: Schedule) -> None:
        self.model, self.settings, self.schedule, self.proximal = model, settings, schedule, settings.proximal
        self.rates = SCHEDULES[settings.s_schedule]
        self.graph = channel_graph(model.network)
        self.voters: dict[int, tuple[int, ...]] = {}
        """For each candidate the blocks whose γ [C] speak for its channels: itself, and depthwise ones behind it."""
        for layer, blocks in policy.voters(self.graph, policy.candidates(self.graph, settings.prune)).items():
            if all(_gamma(model, block).requires_grad for block in blocks):
                self.voters[layer] = blocks
        if not self.voters:
            raise InputError(
                f"--prune {settings.prune}: {model.network.path or 'the network'} has no such convolutions to train "
                f"({policy.SETS[settings.prune]}); another --prune, or a smaller --freeze"
            )
        widths = [len(_gamma(model, layer)) for layer in self.voters]
        numbers = torch.arange(sum(widths), device=self.gammas()[0].device).split(widths)
        speakers = zip(numbers, self.voters.values(), strict=True)
        self._channels = torch.cat([number for number, blocks in speakers for _ in blocks])
        """Number of the channel for which each element of all γ speaks."""
        self._votes = self._channels.bincount()

    def scores(self) -> Tensor:
        """Return |γ| of all channels [N], in the order of the candidates; means where several speak for one."""
        values = torch.cat(self.gammas()).detach().abs().double()
        return values.new_zeros(len(self._votes)).index_add_(0, self._channels, values) / self._votes

    @torch.no_grad()
    def add_gradient(self, progress: Progress) -> None:
        """Add the sub-gradient s · sign(γ) to the gradients of γ, for the sub-gradient solver."""
        if not self.proximal:
            gammas = self.gammas()
            slopes = torch._foreach_mul(torch._foreach_sign(gammas), self._rates(progress))
            gradients: Any = [gamma.grad for gamma in gammas]  # no candidate is without, but by its type it might be
            torch._foreach_add_(gradients, slopes)

    @torch.no_grad()
    def shrink(self, progress: Progress) -> None:
        """Take s · pace off every |γ|, down to 0, after the step, for the proximal solver."""
        if self.proximal:
            gammas = self.gammas()
            sizes = torch._foreach_abs(gammas)
            torch._foreach_sub_(sizes, self._rates(progress, self.schedule.pace(progress.step)))
            torch._foreach_clamp_min_(sizes, 0)
            torch._foreach_copy_(gammas, torch._foreach_mul(torch._foreach_sign(gammas), sizes))

    @torch.no_grad()
    def keep_zeros(self, average: Darknet) -> None:
        """Set γ of the averaged model to 0 where the proximal solver has set those of the model to 0."""
        if self.proximal:
            kept = torch._foreach_abs(torch._foreach_sign(self.gammas()))
            torch._foreach_mul_(self.gammas(average), kept)

    @property
    def reach(self) -> float:
        """How far a weak γ gets in the whole training with s = 1: the sum of the paces under the penalty."""
        schedule, per_epoch = self.schedule, self.schedule.steps_per_epoch
        reach, count = 0.0, len(self.scores())
        for step in range(schedule.steps):
            full = penalised(self.rates, step // per_epoch, schedule.epochs, count)
            reach += schedule.pace(step) * (1.0 if full else DECAY)
        return reach

    def control(self) -> Control | None:
        """Return the state of s = auto before the first step; None where s is a number."""
        return Control.begin(self.scores().cpu().numpy(), self.planned_reach()) if self.settings.s == AUTO else None

    def planned_reach(self, step: int = 0) -> float:
        """Return how far a γ gets from a step on until the plan of s = auto ends, with s = 1."""
        return float(self._paces[step:].sum())

    def gammas(self, model: Darknet | None = None) -> list[Tensor]:
        """Return the penalised parameters γ, of the model or of another one of its kind."""
        return [_gamma(model or self.model, block) for blocks in self.voters.values() for block in blocks]

    @cached_property
    def _paces(self) -> NDArray[np.float64]:
        """Pace of each step of the plan of s = auto."""
        return np.array([self.schedule.pace(step) for step in range(round(PLAN_END * self.schedule.steps))])

    def _rates(self, progress: Progress, pace: float = 1.0) -> Any:
        """Return a list for γ, s of its channels times `pace`: tensors, or numbers while all are penalised alike."""
        gammas = self.gammas()
        if progress.control is not None:
            rates = self._controlled_rates(progress.control, progress.step)
        else:
            count, s = len(self._votes), float(self.settings.s)  # auto has a control
            full = penalised(self.rates, progress.epoch, self.schedule.epochs, count)
            if full in (0, count):
                return [(s if full else s * DECAY) * pace] * len(gammas)
            rates = torch.full((count,), s * DECAY, device=self._votes.device)
            rates.masked_fill_(_ranks(self.scores()) < full, s)
        return (rates * pace)[self._channels].split(list(map(len, gammas)))

    def _controlled_rates(self, control: Control, step: int) -> Tensor:
        scores, left = self.scores(), self.planned_reach(step)
        weak = float((scores < control.limit).double().mean())
        s, share = control.next_s(weak, left, self.settings.s_share, self.schedule.steps_per_epoch)
        rates = s * (_ranks(scores) < math.ceil(share * len(scores))).float()
        return rates.masked_fill_(scores < control.limit, control.hold)


def _gamma(model: Darknet, block: int) -> Tensor:
    return model.get_parameter(f"layers.{block}.bn.weight")


def penalised(rates: RateSchedule, epoch: int, epochs: int, channels: int) -> int:
    """Return how many of the channels, the weakest, are penalised with s in an epoch (from 0)."""
    return channels if epoch < rates.turn * epochs else int(channels * rates.weakest)


def _ranks(scores: Tensor) -> Tensor:
    """Return the rank of each channel, 0 for the weakest."""
    ranks = torch.empty(len(scores), dtype=torch.long, device=scores.device)
    ranks[torch.argsort(scores, stable=True)] = torch.arange(len(scores), device=scores.device)
    return ranks


class SparseRecord:
    """The γ of one run: logged at its start, written after every epoch, drawn at its end; epoch 0 is before it.

    gamma.csv has a row for every candidate and one for all together, `block` -1: quantiles of |γ| and the shares below
    some thresholds. gamma_histogram.csv counts |γ| of all candidates; its columns are named by the lower edges.
    pressure.csv says what s = auto did.

    Args:
        trainer: of a sparse training.
        events: of TensorBoard, if wanted.
    """

    def __init__(self, trainer: Trainer, events: Scalars | None) -> None:
        assert trainer.sparsity is not None  # it trains sparse
        self.trainer, self.run, self.sparsity, self.events = trainer, trainer.run, trainer.sparsity, events
        shares = [f"below_{limit:g}" for limit in BELOW]
        self._table = Results(self.run.file("gamma.csv"), ("block", "channels", *QUANTILES, *shares))
        self._counts = Results(self.run.file("gamma_histogram.csv"), [f"{edge:.4g}" for edge in plots.EDGES[:-1]])
        self._pressure = Results(self.run.file("pressure.csv"), CONTROLLED)

    def begin(self) -> None:
        """Log what can be expected, so that a training that would do nothing is not overlooked; write γ before it."""
        self.trainer.watchers.append(self.append)
        if self.trainer.progress.step:
            return
        text, warning = outlook(self.sparsity, self.trainer.progress.control)
        log(f"{text}; {len(self.sparsity.voters)} convolutions ({policy.SETS[self.sparsity.settings.prune]})")
        if warning:
            log(f"{RULE}\nwarning: {warning}\n{RULE}")
        self.append(0, {})

    def append(self, epoch: int, row: Mapping[str, float | None]) -> None:
        """Write the γ of the model that is kept; a watcher of the trainer."""
        scores = self._scores(self._gammas())
        try:
            self._write(epoch, scores)
        except (OSError, ValueError) as failure:  # as `Trainer._record`
            log(f"warning: {self._table.path}: the γ of epoch {epoch} are missing: {failure}")
        if self.events is not None:
            for block, values in scores.items():
                self.events.histogram(epoch, f"gamma/{'all' if block == EVERY else block}", values)

    def finish(self) -> None:
        """Draw the pictures, and log what pruning can take of the model that was kept."""
        settings, gammas = self.sparsity.settings, self._gammas()
        every = self._scores(gammas)[EVERY]
        self._draw()
        shares = ", ".join(f"{(every < limit).mean():.0%} below {limit:g}" for limit in BELOW)
        log(f"|γ| of {len(every)} channels: {shares}")
        if (control := self.trainer.progress.control) is not None:
            weak = float((every < control.limit).mean())
            log(_outcome(control, settings.s_share, weak, self.sparsity.schedule.steps))
        data = None if settings.single_cls else self.trainer.source.args["data"]
        place = {"weights": self.run.weights / "best.pt", "data": data}
        place |= {"no-test": data is None or self.trainer.val_loader is None}
        flags = _advised_flags(self.sparsity.graph, gammas, settings.prune)
        log(f"prune: {command_of(SCRIPTS[settings.prune], **place, **flags)}" if flags else NOTHING)

    def _gammas(self) -> Importance:
        return gammas_of(self.sparsity.graph.network, arrays_of(self.trainer.state.kept))

    def _scores(self, gammas: Importance) -> dict[int, NDArray[np.float64]]:
        """Return |γ| of all candidates together, and of each."""
        scores = policy.channel_scores(self.sparsity.graph, gammas, tuple(self.sparsity.voters))
        return {EVERY: np.concatenate(list(scores.values())), **scores}

    def _write(self, epoch: int, scores: Mapping[int, NDArray[np.float64]]) -> None:
        """Write the rows of an epoch; a resumed run rewrites what it repeats."""
        every, control = scores[EVERY], self.trainer.progress.control
        self._table.extend(epoch, [_gamma_row(block, values) for block, values in scores.items()])
        counts = np.histogram(np.minimum(every, plots.EDGES[-1]), plots.EDGES)[0]
        self._counts.append(epoch, dict(zip(self._counts.columns[1:], counts.tolist(), strict=True)))
        if control is not None:
            left = self.sparsity.planned_reach(self.trainer.progress.step)
            plan, weak = control.planned(self.sparsity.settings.s_share, left), float((every < control.limit).mean())
            self._pressure.append(epoch, {"s": control.s, "plan": plan, "weak": weak, "rested": control.rested})

    def _draw(self) -> None:
        """Draw histogram.png, epochs.png and course.png in the folder gamma."""
        turn = None  # the epoch in which a schedule lets go
        if self.sparsity.settings.s != AUTO and self.sparsity.rates.turn < 1:
            turn = self.sparsity.rates.turn * self.sparsity.schedule.epochs
        folder = self.run.file("gamma")
        folder.mkdir(exist_ok=True)
        counts = read_results(self._counts.path)
        epochs = counts.pop("epoch")
        table = np.array(list(counts.values())).T
        plots.plot_gamma_change(table[0], table[-1], folder / "histogram.png")
        plots.plot_gamma_epochs(epochs, table, folder / "epochs.png", turn)
        gammas = read_results(self._table.path)
        every = np.array(gammas["block"]) == EVERY
        shares = {name: np.array(gammas[name])[every] for name in gammas if name == "epoch" or "below" in name}
        auto = self.trainer.progress.control is not None  # else pressure.csv is of an earlier run, with --exist-ok
        paths = (self.run.file("results.csv"), self._pressure.path)
        results, pressure = (read_results(path) if path.exists() else {} for path in paths)
        plots.plot_sparse_course(results, shares, pressure if auto else {}, folder / "course.png", turn)


def _gamma_row(block: int, values: NDArray[np.float64]) -> dict[str, float | int]:
    quantiles = np.quantile(values, list(QUANTILES.values()))
    shares = {f"below_{limit:g}": float((values < limit).mean()) for limit in BELOW}
    return {"block": block, "channels": len(values), **dict(zip(QUANTILES, quantiles.tolist(), strict=True)), **shares}


def outlook(sparsity: Sparsity, control: Control | None = None) -> tuple[str, str | None]:
    """Return what can be expected of a sparse training, and a warning if that is next to nothing.

    Args:
        sparsity: before the training.
        control: of s = auto; None where s is a number.
    """
    scores, share, steps = sparsity.scores().cpu().numpy(), sparsity.settings.s_share, sparsity.schedule.steps
    if control is not None:
        return (
            f"sparse training: {share:.0%} of {len(scores)} channels are to be weak, |γ| < {control.limit:.3g}, after "
            f"{round(PLAN_END * steps)} of {steps} optimizer steps; s {AUTO} starts at {control.allowed:.3g}"
        ), None
    s, reach, median = float(sparsity.settings.s), sparsity.reach, float(np.median(scores))
    travel, enough = s * reach, _enough(scores, share, reach)
    text = (
        f"sparse training: {len(scores)} channels, s {s:g}; a γ can travel {travel:.3g}, their median |γ| is "
        f"{median:.3g}; against no loss s {enough:g} brings {share:.0%} of them to zero"
    )
    if travel > FIERCE * float(scores.max()):
        warning = "s is so large that all γ can come to zero, also those the detector needs"
        return text, f"{warning}; --s {AUTO}, or a smaller s"
    if travel >= FEEBLE * median:
        return text, None
    way_out = f"--s {AUTO}, or --s {enough:g}, or" if enough < LARGEST_S else "a larger lr0, or many"
    return text, (
        f"these steps are too few or s is too small: no γ can move by more than {100 * travel / median:.2g} % of the "
        f"median, and pruning will find nothing to remove; {way_out} more epochs"
    )


def _enough(scores: NDArray[np.floating], share: float, reach: float) -> float:
    """Return the s with which a share of the channels gets to zero against no loss, to three digits."""
    exact = float(np.quantile(scores, share)) / reach
    return min(LARGEST_S, float(f"{exact * 1.005:.3g}")) if exact > 0 else float(TrainSettings().s)


def _outcome(control: Control, share: float, weak: float, steps: int) -> str:
    """Return what s = auto has reached, for the log."""
    text = f"--s {AUTO}: {weak:.0%} of the channels are weak, |γ| < {control.limit:.3g}; {share:.0%} were wanted"
    if weak >= share:
        return text
    rests = f", and in {control.rested} of them accuracy was too low for a penalty" if control.rested else ""
    return (
        f"{text}: {steps} optimizer steps were too few{rests}; more epochs, a smaller batch, or pruning with "
        "--importance taylor, which needs no sparse training"
    )


def _advised_flags(graph: ChannelGraph, gammas: Importance, prune: Literal[0, 1, 2]) -> dict[str, Any]:
    """Return the flags for as much as γ advise, by the rules of the script that removes it; none if that is nothing."""
    if prune == 2:
        mean = float(np.mean([np.abs(gamma).mean() for gamma in gammas.values()]))
        weak = most_units(graph, gammas, policy.FREE_SHARE * mean)
        return {"shortcut": weak} if weak else {}
    choice = policy.choose(
        graph, gammas, policy.ChannelPolicy(0.0, prune=prune, layer_keep=0.0 if prune == 1 else None)
    )
    percent = policy.advised_percent(choice.scores, choice.max_percent)
    return {"percent": f"{percent:g}"} if percent else {}
