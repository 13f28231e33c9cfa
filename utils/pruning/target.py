"""A target in place of a percentage: how much has to go, or can go, until a network keeps a bound; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from utils.errors import InfeasibleError

Kind = Literal["params", "macs", "latency", "drop"]


@dataclass(frozen=True)
class Target:
    """A bound that the pruned network keeps."""

    kind: Kind
    """What is bounded: parameters, multiply-adds, or milliseconds, as shares of the network before; or the loss of AP50
    in points."""
    bound: float

    @property
    def flag(self) -> str:
        """The flag that asks for it."""
        return "--max-drop" if self.kind == "drop" else f"--target-{self.kind}"

    def fulfil(self, steps: int, figure: Callable[[int], float]) -> int:
        """The number of steps to go, by bisection.

        For a share, the smallest number whose figure is at or under the bound: the one before it is over. For a drop,
        the largest whose figure is, so that the one behind it is over.

        Args:
            steps: the most that can be done.
            figure: of a number of steps; it falls with them for a share, and rises for a drop.

        Raises:
            InfeasibleError: not even all steps reach the bound; for a drop, not even the first keeps it.
        """
        if self.kind == "drop":
            return self._largest(steps, figure)
        least = figure(steps)
        if least > self.bound:
            raise InfeasibleError(f"{self.flag} {self.bound:g}: is out of reach; the smallest that works is "
                                  f"{math.ceil(least * 1e4) / 1e4:.4f}")  # fmt: skip
        low, high = -1, steps  # figure(low) is over, figure(high) is not
        while high - low > 1:
            middle = (low + high) // 2
            if figure(middle) <= self.bound:
                high = middle
            else:
                low = middle
        return high

    def _largest(self, steps: int, figure: Callable[[int], float]) -> int:
        low, high = 0, steps + 1  # figure(low) is within the bound, figure(high) is not
        while high - low > 1:
            middle = (low + high) // 2
            if figure(middle) <= self.bound:
                low = middle
            else:
                high = middle
        if low == 0:
            raise InfeasibleError(f"{self.flag} {self.bound:g}: the first step loses {figure(1):.2f} points already; "
                                  "sparse training first: python train.py -sr")  # fmt: skip
        return low
