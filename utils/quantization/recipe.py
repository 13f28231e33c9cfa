"""A float network and all that is known of it, from which it is quantized in one step, whatever is kept float."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from models import Darknet
from utils.quantization.attach import Phase, quantize, set_phase
from utils.quantization.calibrate import Statistics, observe
from utils.quantization.correct import correct_biases
from utils.quantization.observers import Observer
from utils.quantization.scheme import QuantSettings


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a float network becomes a quantized one."""

    model: Darknet
    """In evaluation mode; left as it is."""
    settings: QuantSettings
    statistics: Statistics
    observer: Observer
    corrected_with: Tensor | None = None
    """Pictures [B, C, H, W], 0…1, for the correction of biases; None: they are not corrected."""

    def keeping(self, kept: tuple[int, ...]) -> QuantSettings:
        """The settings with other blocks that stay float."""
        return replace(self.settings, kept=tuple(sorted(kept)))

    def made(self, kept: tuple[int, ...] = ()) -> Darknet:
        """The quantized network, in evaluation mode and rounding; the convolutions of `kept` stay float."""
        model = attached(self.model, self.keeping(kept))
        self.statistics.calibrate(model, self.observer)
        if self.corrected_with is not None:
            correct_biases(model, self.corrected_with)
        set_phase(model, Phase.FROZEN)
        return model


def attached(model: Darknet, settings: QuantSettings) -> Darknet:
    """A copy with quantizers, in evaluation mode, where the model is."""
    device = next(model.parameters()).device
    return quantize(copy.deepcopy(model), settings).to(device).eval().requires_grad_(False)


def prepare(
    model: Darknet,
    settings: QuantSettings,
    batches: Iterable[Tensor],
    observer: Observer,
    corrected_with: Tensor | None = None,
) -> Recipe:
    """Look at a float model's activations.

    Args:
        model: left as it is.
        settings: how it will be quantized.
        batches: calibration pictures as of `calibrate.observe`.
        observer: a value of OBSERVERS.
        corrected_with: of `Recipe`.

    Raises:
        InputError: the target cannot compute the network.
        NumericsError: an activation is not finite.
    """
    model = copy.deepcopy(model).eval()
    return Recipe(model, settings, observe(attached(model, settings), batches), observer, corrected_with)
