"""Remove the weakest channels; of what a shortcut ties together, those that no convolution of the chain keeps.

Every layer keeps a share of its channels (SlimYOLOv3, arXiv:1907.11093, which keeps 10 %; Network Slimming,
arXiv:1708.06519, for one ranking of all). What removed channels added is given to all convolutions that read them; the
suites before this one give it to the next block only.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import PruneStrategy, script
from utils.pruning.policy import ChannelPolicy

STRATEGY = PruneStrategy("slim", ChannelPolicy(0.0, layer_keep=0.01))
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
