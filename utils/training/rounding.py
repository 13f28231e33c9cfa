"""Quantization-aware training: which phase the quantizers of a run are in, and how many bits they have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from models import Darknet
from utils.quantization.attach import Phase, set_phase
from utils.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from utils.quantization.scheme import MOST_BITS
from utils.training.settings import QuantPlan


class Rounding:
    """The phases of a run: bounds are found first, then all is rounded, then bounds and statistics stay.

    All follows from the number of a step, so that a run that is resumed goes on as it would have.

    Args:
        models: with quantizers in their slots: the one that is trained, and its average.
        plan: when the phases begin.
        steps: optimizer steps of the run.
    """

    def __init__(self, models: Sequence[Darknet], plan: QuantPlan, steps: int) -> None:
        self._models, self._plan, self._steps = models, plan, steps
        self._starts = (round(plan.delay * steps), round(plan.freeze * steps))
        self._grids = [
            (module, module.grid)
            for model in models
            for module in model.modules()
            if isinstance(module, ActivationQuantizer | WeightQuantizer)
        ]
        self._now: tuple[Phase, int] | None = None

    @property
    def complete(self) -> bool:
        """Whether all is rounded to the bits asked for, so that a score is that of the network that is kept."""
        return self._now in ((Phase.ROUNDING, 0), (Phase.FROZEN, 0))

    def begin(self, step: int) -> None:
        """Enter the phase of a step, 0 for the first one."""
        begins, freezes = self._starts
        phase = Phase.OBSERVING if step < begins else Phase.ROUNDING if step < freezes else Phase.FROZEN
        surplus = self._plan.surplus(step, self._steps)
        if (phase, surplus) == self._now:
            return
        self._now = (phase, surplus)
        for model in self._models:
            set_phase(model, phase)
        for module, grid in self._grids:
            module.grid = dataclasses.replace(grid, bits=min(MOST_BITS, grid.bits + surplus))
