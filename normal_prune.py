"""Remove the weakest channels of the convolutions that no shortcut ties (Network Slimming, arXiv:1708.06519).

Channels are ranked over the whole network. A layer that would lose all its channels is refused, with the largest
percentage that works. The suites before this one leave out convolutions before a depthwise one, too; here they count.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import PruneStrategy, script
from utils.pruning.policy import ChannelPolicy

STRATEGY = PruneStrategy("normal", ChannelPolicy(0.0, prune=0))
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
