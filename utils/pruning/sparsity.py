"""How sparse training presses on γ: the settings, the rate of every channel at every epoch, how far a γ gets; no torch.

Sparse training adds s · Σ|γ| of the candidates to the loss (Liu et al., arXiv:1708.06519, section 3), so that channels
the detector can do without fade away before pruning removes them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

AUTO = "auto"
"""In place of a number: the s that can bring the wanted share of the channels to zero."""
DEFAULT_S = 0.001
LARGEST_S = 10.0
DECAY = 0.01
"""What is left of s where a schedule lets go (arXiv:2306.01526, as its authors' code has it)."""
RESISTANCE = 2.0
"""The loss pulls γ up while s presses them down, so it takes this much more than against no loss: with 1, half as many
γ as wanted came to zero on roadsigns (yolov3-tiny, 11 of 15 epochs)."""
FEEBLE, FIERCE = 0.1, 4.0
"""A training in which γ can travel less than this share of their median does next to nothing; in which they can travel
more than so many times the largest of them, it may leave nothing."""


@dataclass(frozen=True)
class RateSchedule:
    """Which channels are pressed with s, and which with `DECAY` · s, in the course of a training.

    Where `turn` is a whole number of epochs, the code of arXiv:2306.01526 turns one epoch later: there s is for
    epoch <= 0.4 · epochs, from 0. The paper's abstract does not decide it; here it is for exactly that share.
    """

    turn: float
    """Share of the epochs in which all are pressed with s."""
    weakest: float
    """Share of the channels, the weakest, that are so from then on; ranks are taken anew at every step."""

    def pressed(self, epoch: int, epochs: int, channels: int) -> int:
        """How many of the channels, the weakest, are pressed with s in an epoch (from 0)."""
        return channels if epoch < self.turn * epochs else int(channels * self.weakest)

    def least(self, epoch: int, epochs: int) -> float:
        """The factor for the weakest channels."""
        return 1.0 if epoch < self.turn * epochs or self.weakest > 0 else DECAY


SCHEDULES = {
    "dynamic": RateSchedule(0.4, 0.65),
    "constant": RateSchedule(1.0, 1.0),
    "global": RateSchedule(0.5, 0.0),
}
"""dynamic: that of Chu et al., arXiv:2306.01526; constant: Network Slimming's; global: s falls for all after half."""


@dataclass(frozen=True)
class SparseSettings:
    """What `train.py -sr` was asked for."""

    s: float | Literal["auto"] = DEFAULT_S
    prune: int = 0
    """Which channels; a key of `candidates.SETS`."""
    schedule: RateSchedule = SCHEDULES["dynamic"]
    proximal: bool = False
    """Soft thresholding after the step (ISTA; Ye et al., arXiv:1802.00124), which gives exact zeros, in place of a
    sub-gradient before it."""
    share: float = 0.5
    """Share of the channels that s = auto brings to zero."""
    all_convs: bool = False
    """Candidates beyond the classic ones."""
    coach: float = 1.0
    """Points of AP50 that may be lost in the coach's trials; 0: there is no coach."""
    enough: float | None = None
    """Share of the channels with which the training ends when the coach finds that it could go."""

    def resolved(self, scores: NDArray[np.floating], reach: float) -> SparseSettings:
        """The settings with a number for s.

        Args:
            scores: |γ| of the candidates before the training.
            reach: how far a γ travels in the training with s = 1.
        """
        return self if self.s != AUTO else dataclasses.replace(self, s=needed(scores, self.share, reach))


def needed(scores: NDArray[np.floating], share: float, reach: float) -> float:
    """The s with which a share of the channels gets to zero against the `RESISTANCE` of the loss, to three digits."""
    exact = RESISTANCE * float(np.quantile(scores, share)) / reach
    return min(LARGEST_S, float(f"{exact * 1.005:.3g}")) if exact > 0 else DEFAULT_S


def outlook(settings: SparseSettings, scores: NDArray[np.floating], reach: float) -> tuple[str, str | None]:
    """What can be expected of a sparse training, and a warning if that is next to nothing.

    Args:
        settings: with a number for s.
        scores: |γ| of the candidates before the training.
        reach: how far a γ travels in the training with s = 1.
    """
    travel, median = float(settings.s) * reach, float(np.median(scores))
    enough = needed(scores, settings.share, reach)
    text = (
        f"sparse training: {len(scores)} channels, s {settings.s:g}; a γ can travel {travel:.3g}, their median |γ| is "
        f"{median:.3g}; s {enough:g} is what brings {settings.share:.0%} of them to zero"
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
