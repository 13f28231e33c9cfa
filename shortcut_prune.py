"""Remove the weakest channels; what a shortcut ties together takes the mask of the chain's first convolution.

Channels are ranked over the whole network (Network Slimming, arXiv:1708.06519). A layer that would lose all its
channels is refused, with the largest percentage that works.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import PruneStrategy, script
from utils.pruning.policy import ChannelPolicy

STRATEGY = PruneStrategy("shortcut", ChannelPolicy(0.0, merge="first"))
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
