"""The values that a tensor may take, as a few numbers; no torch."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_BITS, MOST_BITS = 2, 16


@dataclass(frozen=True)
class Grid:
    """Integer codes q of a tensor x = scale · (q − zero point)."""

    bits: int = 8
    signed: bool = True
    """Codes around 0; otherwise from 0 on."""
    symmetric: bool = True
    """The zero point is 0 (signed) and the range reaches as far down as up."""
    per_channel: bool = False
    """A scale for each channel of dimension 0."""
    power_of_two: bool = False
    """Scales are powers of two, so that rescaling is a shift."""
    narrow: bool = True
    """A symmetric grid leaves the most negative code out, so that −x is there for every x."""
    half_even: bool = True
    """Ties go to the even neighbour, as in ONNX; otherwise away from 0, as much hardware does."""

    def __post_init__(self) -> None:
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(f"{self.bits} bits: allowed is {LEAST_BITS} <= bits <= {MOST_BITS}")
        if self.symmetric and not self.signed:
            raise ValueError("symmetric: needs signed codes")

    @property
    def low(self) -> int:
        """Smallest code."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + (self.symmetric and self.narrow)

    @property
    def high(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
