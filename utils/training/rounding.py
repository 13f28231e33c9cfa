"""Quantization-aware training: which phase the quantizers of a run are in."""

from __future__ import annotations

from collections.abc import Sequence

from models import Darknet
from utils.quantization.attach import Phase, set_phase
from utils.training.settings import QuantPlan


class Rounding:
    """The phases of a run: bounds are found first, then all is rounded, then bounds and statistics stay.

    Args:
        models: with quantizers in their slots: the one that is trained, and its average.
        plan: when the phases begin.
        steps: optimizer steps of the run.
    """

    def __init__(self, models: Sequence[Darknet], plan: QuantPlan, steps: int) -> None:
        self._models = models
        self._starts = (round(plan.delay * steps), round(plan.freeze * steps))
        self._now: Phase | None = None

    @property
    def complete(self) -> bool:
        """Whether all is rounded, so that a score is that of the network that is kept."""
        return self._now in (Phase.ROUNDING, Phase.FROZEN)

    def begin(self, step: int) -> None:
        """Enter the phase of a step."""
        begins, freezes = self._starts
        phase = Phase.OBSERVING if step < begins else Phase.ROUNDING if step < freezes else Phase.FROZEN
        if phase is not self._now:
            self._now = phase
            for model in self._models:
                set_phase(model, phase)
