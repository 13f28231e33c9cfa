"""What removed channels would have added: a channel with γ = 0 puts out the constant f(β), whatever the picture.

A residual unit that is removed is such a case, too: with γ = 0 in its last convolution it adds f(β) to what goes round.

The constants are carried through every block to all the convolutions that read them, and added to their bias or taken
from the running mean of their batch normalisation (Ye et al., arXiv:1802.00124; algorithms of the suites before reach
only the next block). Exact for 1 × 1 kernels and away from the zero-padded border; where a constant meets a gate that
depends on the picture (squeeze-excite, scale_channels, sam) it is not a constant any more and counts as 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks.block import Vector
from utils.darknet.blocks.trail import IMAGE
from utils.darknet.layout import by_block
from utils.graph import ChannelGraph
from utils.pruning.removal import Removal
from utils.pruning.surgery import Arrays


def absorb(graph: ChannelGraph, arrays: Arrays, removal: Removal) -> dict[str, NDArray[np.floating]]:
    """The tensors with the constants of what is removed taken up by what reads them; shapes as before.

    Args:
        graph: of the network.
        arrays: its tensors.
        removal: what goes.
    """
    changed = dict(arrays)
    outputs: list[Vector] = []
    silent = {unit.last for unit in removal.units}
    tensors = by_block(arrays)
    for index, block in enumerate(graph.network.blocks):
        sources = [np.zeros(len(graph.image)) if i == IMAGE else outputs[i] for i in block.reads(index)]
        stays, tensor = removal.stays(graph, index), tensors.get(index, {})
        changed |= {f"layers.{index}.{name}": array for name, array in block.take_up(tensor, sources[0]).items()}
        constant = block.shifted(tensor) if index in silent else block.constant(tensor, sources, len(stays))
        outputs.append(np.where(stays, constant if block.hands_on() else 0.0, constant))
    return changed
