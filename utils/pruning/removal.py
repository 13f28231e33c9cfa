"""What goes from a network: channels, and whole residual units; no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.graph import ChannelGraph

Keep = NDArray[np.bool_]
"""[L], whether a label of the channel graph stays."""


@dataclass(frozen=True)
class Unit:
    """The blocks between one block and the shortcut that adds it to what they make of it."""

    source: int
    """The block whose output goes around; what read the shortcut reads this one when the unit is removed."""
    last: int
    """The convolution whose γ scales what the unit adds."""
    shortcut: int

    @property
    def blocks(self) -> range:
        """Block numbers of the unit, the shortcut included."""
        return range(self.source + 1, self.shortcut + 1)


@dataclass(frozen=True, eq=False)
class Removal:
    """What goes from a network."""

    keep: Keep
    """[L], the labels that stay."""
    units: tuple[Unit, ...] = ()
    """Residual units that go whole, in the order of the network."""

    @property
    def blocks(self) -> frozenset[int]:
        """Numbers of the blocks that go."""
        return frozenset(block for unit in self.units for block in unit.blocks)

    @property
    def nothing(self) -> bool:
        """Whether everything stays."""
        return bool(self.keep.all()) and not self.units

    def stays(self, graph: ChannelGraph, block: int) -> Keep:
        """[C], which channels of a block's output are more than a constant when what goes is silent."""
        silent = any(block == unit.last for unit in self.units)
        return self.keep[graph.labels[block]] & (not silent)
