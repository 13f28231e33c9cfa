"""Which hyper-parameters a search varies, and how far; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from utils.training.settings import Hyperparameters


@dataclass(frozen=True)
class Range:
    """Values that a hyper-parameter may take in a search."""

    low: float
    high: float
    log: bool = False
    """Whether its logarithm is what is drawn evenly."""

    def widened(self, value: float) -> Range:
        """The range with a value in it."""
        return Range(min(self.low, value), max(self.high, value), self.log)


SPACE = {
    "lr0": Range(1e-3, 0.3, log=True),
    "lrf": Range(1e-3, 0.5, log=True),
    "momentum": Range(0.8, 0.98),
    "weight_decay": Range(1e-5, 5e-3, log=True),
    "warmup": Range(0.0, 0.2),
    "box_gain": Range(1.0, 20.0, log=True),
    "objectness_gain": Range(0.2, 5.0, log=True),
    "class_gain": Range(0.2, 5.0, log=True),
    "mosaic": Range(0.0, 1.0),
    "mixup": Range(0.0, 0.5),
    "hsv_h": Range(0.0, 0.1),
    "hsv_s": Range(0.0, 0.9),
    "hsv_v": Range(0.0, 0.9),
    "translate": Range(0.0, 0.3),
    "scale": Range(0.0, 0.9),
}
"""What is searched, by the keys of a hyp file."""


def searched(start: Hyperparameters) -> dict[str, Range]:
    """The ranges of a search that begins at `start`, widened to hold it.

    A value of 0 has no logarithm: a key that is searched by it and starts at 0 is left at 0.
    """
    values = start.flat
    return {key: found.widened(values[key]) for key, found in SPACE.items() if values[key] > 0 or not found.log}
