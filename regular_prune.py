"""Remove the weakest channels of the convolutions that no shortcut ties, down to multiples of 8.

Channels are ranked over the whole network (Network Slimming, arXiv:1708.06519). Widths are rounded up, and every
layer keeps one multiple at least.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import PruneStrategy, script
from utils.pruning.policy import ChannelPolicy

STRATEGY = PruneStrategy("regular", ChannelPolicy(0.0, prune=0, multiple_of=8))
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
