"""Remove the weakest channels. Channels tied by a shortcut are removed if no convolution of the chain keeps them.

All channels are ranked together (Network Slimming, arXiv:1708.06519), and every layer keeps a share of its own
(SlimYOLOv3, arXiv:1907.11093, which keeps 10 %). The constants that removed channels put out are added to all
convolutions that read them. The suites before this one add them to the next block only.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import PruneStrategy, script
from utils.pruning.policy import ChannelPolicy

STRATEGY = PruneStrategy("slim", ChannelPolicy(0.0, layer_keep=0.01))
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
