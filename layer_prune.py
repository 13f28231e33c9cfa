"""Remove whole residual units, the least important first.

Depth is what a GPU waits for, so fewer layers save more time than narrower ones. A unit is all that a shortcut leads
around, of any length; the suites before this one know units of two convolutions only, and what they save as the pruned
network has random weights.
"""

from __future__ import annotations

from utils.cli import run
from utils.pruning.command import PruneStrategy, script

STRATEGY = PruneStrategy("layer", units=True)
main = script(STRATEGY, __doc__)

if __name__ == "__main__":
    run(main)
