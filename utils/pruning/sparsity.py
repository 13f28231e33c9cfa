"""Settings of sparse training, the L1 penalty of every channel at every epoch, and how far a γ gets; no torch.

Sparse training adds s · Σ|γ| of the candidates to the loss (Liu et al., arXiv:1708.06519, section 3), so that channels
the detector can do without fade away before pruning removes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from utils.pruning.policy import FREE_SHARE

AUTO = "auto"
"""In place of a number: s is controlled in every step, see `Control`."""
DEFAULT_S = 0.001
LARGEST_S = 10.0
DECAY = 0.01
"""What is left of s where a schedule lets go (arXiv:2306.01526, as its authors' code has it)."""
PLAN_END = 0.8
"""Share of the optimizer steps after which `auto` penalises no further channel; the network recovers in the rest."""
STRIDE = 0.1
"""Share of the wanted channels that `auto` takes to zero at a time. On all of them, γ fall side by side: on bccd
(yolov4-tiny, 285 steps) AP50 fell by 7 points when the median |γ| was 0.6 of what it was, and no channel was weak."""
START, CEILING = 1 / 8, 4.0
"""First and largest s of `auto`, in multiples of the s that takes an average γ to zero in that share of the plan,
against no loss. It begins with too little. A channel that resists the largest is one that the detector needs."""
LOSS_RISE = 0.03
"""Rise of the training loss that counts as much as a lost point of AP50, as a share of the lowest loss."""
LOSS_MEMORY = 0.25
"""Share of an epoch over which the training loss is averaged for that."""
FEEBLE, FIERCE = 0.1, 4.0
"""A training in which γ can travel less than this share of their median does next to nothing; in which they can travel
more than so many times the largest of them, it may leave nothing."""


@dataclass(frozen=True)
class RateSchedule:
    """Channels that are penalised with s, and those with `DECAY` · s, in the course of a training.

    Where `turn` is a whole number of epochs, the code of arXiv:2306.01526 turns one epoch later: there s is for
    epoch <= 0.4 · epochs, from 0. The paper's abstract does not decide it; here it is for exactly that share.
    """

    turn: float
    """Share of the epochs in which all are penalised with s."""
    weakest: float
    """Share of the channels, the weakest, that are so from then on; they are ranked again at every step."""

    def penalised(self, epoch: int, epochs: int, channels: int) -> int:
        """Number of channels, the weakest, that are penalised with s in an epoch (from 0)."""
        return channels if epoch < self.turn * epochs else int(channels * self.weakest)

    def least(self, epoch: int, epochs: int) -> float:
        """The factor for the weakest channels."""
        return 1.0 if epoch < self.turn * epochs or self.weakest > 0 else DECAY


SCHEDULES = {"dynamic": RateSchedule(0.4, 0.65), "constant": RateSchedule(1.0, 1.0), "global": RateSchedule(0.5, 0.0)}
"""dynamic: that of Chu et al., arXiv:2306.01526; constant: Network Slimming's; global: s falls for all after half."""


@dataclass(frozen=True)
class SparseSettings:
    """Settings of `train.py -sr`."""

    s: float | Literal["auto"] = DEFAULT_S
    prune: int = 0
    """Candidates; a key of `policy.SETS`."""
    schedule: RateSchedule = SCHEDULES["dynamic"]
    proximal: bool = False
    """Soft thresholding after the step (ISTA; Ye et al., arXiv:1802.00124), which gives exact zeros, in place of a
    sub-gradient before it."""
    share: float = 0.5
    """Share of the channels that s = auto makes weak."""
    drop: float = 3.0
    """Points of AP50 below the best known at which s = auto lets go."""
    all_convs: bool = False
    """Candidates beyond the classic ones."""


@dataclass
class Control:
    """State of `--s auto`; a checkpoint holds all of it.

    The plan: the share of weak channels rises with the travel of γ, Σ paces of the steps, to the wanted share. s is for
    the weakest channels only: `STRIDE` of the wanted ones more than are weak, or are to be weak by now. It rises while
    the share is behind its plan, by at most a factor of two in an epoch: between two looks at AP50 no s is more than
    twice one that was borne. While the share is not behind, s stays.

    s is 0 while AP50 is too far below its best or, where no AP50 is measured, the training loss too far above its
    lowest. Afterwards it goes on from half of what it was, or from the first s. It is also 0 once the wanted share is
    weak, and after the plan.

    Channels that are weak already keep the largest s so far, so that they do not grow back.
    """

    limit: float
    """A channel is weak if its |γ| is below: `FREE_SHARE` of the mean before the training. So all weak channels
    together hold at most that share of Σ|γ|, which is what pruning may take of a layer."""
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
    """AP50 is more than `drop` points below."""
    loss: float = 0.0
    """Mean training loss of the last steps."""
    lowest_loss: float | None = None
    rests: bool = False
    """There was no penalty in the last step because of AP50 or the loss."""
    rested: int = 0
    """Steps without penalty because of that."""

    @classmethod
    def begin(cls, scores: NDArray[np.floating], reach: float) -> Control:
        """The state before the first step.

        Args:
            scores: |γ| of the candidates.
            reach: how far a γ travels within the plan with s = 1.
        """
        mean = float(scores.mean())
        fair = min(mean / (STRIDE * reach), LARGEST_S / CEILING) if reach else 0.0
        return cls(FREE_SHARE * mean, reach, fair, START * fair, START * fair)

    def planned(self, share: float, left: float) -> float:
        """Share of the channels that the plan wants to be weak when a γ can still travel `left` with s = 1."""
        return share * (1 - left / self.reach) if self.reach else share

    def next_s(self, weak: float, left: float, settings: SparseSettings, steps_per_epoch: int) -> tuple[float, float]:
        """The s of a step for channels that are not weak, and the share of all channels, the weakest, that feel it.

        Args:
            weak: share of the channels that are.
            left: how far a γ travels in the rest of the plan with s = 1.
            settings: the wanted share, and what accuracy may fall by.
            steps_per_epoch: in which s may double.
        """
        self.s, planned = 0.0, self.planned(settings.share, left)
        if weak >= settings.share or left <= 0:
            return 0.0, weak
        tired = self._loss_is_up(settings.drop) if self.best50 is None else self.fallen
        if tired and not self.rests:
            self.allowed = max(self.allowed / 2, START * self.fair)
        self.rests = tired
        self.rested += tired
        if not tired:
            self.s = self.allowed
            rise = 2 ** (1 / steps_per_epoch) if weak < planned else 1.0
            self.allowed = min(self.s * rise, CEILING * self.fair)
        self.hold = max(self.hold, self.s)
        return self.s, min(settings.share, min(weak, planned) + STRIDE * settings.share)

    def see_ap50(self, map50: float, drop: float) -> None:
        """Compare AP50 with the best so far, in points."""
        self.best50 = max(map50, self.best50 or 0.0)
        self.fallen = 100 * (self.best50 - map50) > drop

    def see_loss(self, loss: float, step: int, steps_per_epoch: int) -> None:
        """Average the training loss of a step; the lowest mean counts from the first whole one on."""
        steps = max(1.0, LOSS_MEMORY * steps_per_epoch)
        self.loss += (loss - self.loss) / min(steps, step + 1)  # the plain mean at first: no batch weighs too much
        if step + 1 >= steps:
            self.lowest_loss = min(self.loss, self.lowest_loss or self.loss)

    def _loss_is_up(self, drop: float) -> bool:
        return self.lowest_loss is not None and self.loss > (1 + LOSS_RISE * drop) * self.lowest_loss


def needed(scores: NDArray[np.floating], share: float, reach: float) -> float:
    """The s with which a share of the channels gets to zero against no loss, to three digits."""
    exact = float(np.quantile(scores, share)) / reach
    return min(LARGEST_S, float(f"{exact * 1.005:.3g}")) if exact > 0 else DEFAULT_S


def outlook(settings: SparseSettings, scores: NDArray[np.floating], reach: float) -> tuple[str, str | None]:
    """Outlook of a sparse training, and a warning if next to nothing can be expected.

    Args:
        settings: with a number for s.
        scores: |γ| of the candidates before the training.
        reach: how far a γ travels in the training with s = 1.
    """
    travel, median = float(settings.s) * reach, float(np.median(scores))
    enough = needed(scores, settings.share, reach)
    text = (
        f"sparse training: {len(scores)} channels, s {settings.s:g}; a γ can travel {travel:.3g}, their median |γ| is "
        f"{median:.3g}; against no loss s {enough:g} brings {settings.share:.0%} of them to zero"
    )
    if travel > FIERCE * float(scores.max()):
        return (
            text,
            f"s is so large that all γ can come to zero, also those the detector needs; --s {AUTO}, or a smaller s",
        )
    if travel >= FEEBLE * median:
        return text, None
    way_out = f"--s {AUTO}, or --s {enough:g}, or" if enough < LARGEST_S else "a larger lr0, or many"
    return text, (
        f"these steps are too few or s is too small: no γ can move by more than {100 * travel / median:.2g} % of the "
        f"median, and pruning will find nothing to remove; {way_out} more epochs"
    )
