"""A target in place of a percentage: how much has to go, or can go, until a network keeps a bound; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from utils.errors import InfeasibleError

Kind = Literal["params", "macs", "latency", "drop"]
COUNTED = ("params", "macs")
"""Kinds that a cfg tells, without pictures and time."""


@dataclass(frozen=True)
class Target:
    """A bound that the pruned network keeps."""

    kind: Kind
    """What is bounded: parameters, multiply-adds, or the median time of a forward pass, as shares of those of the
    network before; or the loss of AP50 in points."""
    bound: float

    @property
    def flag(self) -> str:
        """The flag that asks for it."""
        return "--max-drop" if self.kind == "drop" else f"--target-{self.kind}"

    @property
    def counted(self) -> bool:
        """Whether the cfg alone says if it is kept."""
        return self.kind in COUNTED

    def fulfil(self, steps: int, figure: Callable[[int], float], first: int = 1) -> int:
        """The number of steps to go, by bisection.

        For a share, a number whose figure is at or under the bound, while that of one step less is over it. For a drop,
        one whose figure is, while that of one step more is over. It is the smallest, or the largest, such number if the
        figure is monotone, which AP, a time, and rounded widths are only roughly.

        Args:
            steps: the most that can be done.
            figure: of a number of steps; it falls with them for a share, and rises for a drop.
            first: the smallest number that removes anything.

        Raises:
            InfeasibleError: not even all steps reach the bound; for a drop, not even the first keeps it.
        """
        if self.kind == "drop":
            return self._largest(steps, figure, first)
        least = figure(steps)
        if least > self.bound:
            raise self.missed(least)
        return _boundary(-1, steps, lambda step: figure(step) > self.bound)[1]

    def missed(self, least: float) -> InfeasibleError:
        """What to raise if this share is the smallest that is reached."""
        works = math.ceil(least * 1e4) / 1e4
        return InfeasibleError(f"{self.flag} {self.bound:g}: is out of reach; the smallest that works is {works:.4f}")

    def _largest(self, steps: int, figure: Callable[[int], float], first: int) -> int:
        low, _ = _boundary(first - 1, max(first, steps + 1), lambda step: figure(step) <= self.bound)
        if low >= first:
            return low
        if steps < first:
            raise InfeasibleError(f"{self.flag} {self.bound:g}: nothing can be removed")
        works = math.ceil(figure(first) * 100) / 100
        raise InfeasibleError(
            f"{self.flag} {self.bound:g}: the first step loses more; sparse training (python train.py -sr) makes more "
            f"channels weak; the smallest that works is {works:.2f}"
        )


def _boundary(low: int, high: int, holds: Callable[[int], bool]) -> tuple[int, int]:
    """Two neighbours between `low`, for which something holds, and `high`, for which not, that differ so themselves."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high
