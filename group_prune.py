"""Remove the weakest channels of every group of convolutions, each by a percentage of its own.

A deep stage can lose more than a shallow one (Chu et al., arXiv:2306.01526), so channels are ranked within their group:
the backbone to stride 8, at 16, at 32, the top-down path, the other heads, told from the cfg. --dry-run shows them.
What a shortcut ties is kept by majority, as in the paper's code; every layer keeps a share of its channels.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import PruneStrategy, script
from utils.pruning.policy import ChannelPolicy

STRATEGY = PruneStrategy("group", ChannelPolicy(0.0, merge="majority", layer_keep=0.01, groups=True))
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
