"""Remove the weakest channels as slim_prune.py does, and then the weakest residual units as layer_prune.py does.

Channels: SlimYOLOv3, arXiv:1907.11093, and Network Slimming, arXiv:1708.06519. With --importance gamma the score of a
unit is the mean |γ| of the channels that stay. A unit is all that a shortcut leads around, of any length; the suites
before this one know units of two convolutions only, and what they save as the pruned network has random weights.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import PruneStrategy, script
from utils.pruning.policy import ChannelPolicy

STRATEGY = PruneStrategy("layer_channel", ChannelPolicy(0.0, layer_keep=0.01), units=True)
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
