"""Remove the weakest channels of the convolutions that no shortcut ties.

A layer that would lose all its channels is refused, with the largest percentage that works.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import Strategy, script
from utils.pruning.policy import ChannelPolicy

STRATEGY = Strategy("normal", ChannelPolicy(0.0, prune=0))
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
