"""What a sparse training says and writes of the γ it presses on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models import Darknet
from utils.cli import log
from utils.graph import channel_graph
from utils.pruning.advice import advised_percent
from utils.pruning.candidates import SETS
from utils.pruning.policy import channel_scores
from utils.pruning.sparsity import outlook
from utils.report.gamma_log import BELOW, GammaLog
from utils.report.run_dir import RunDirectory
from utils.report.scalars import Scalars
from utils.training.loop import Trainer
from utils.training.sparse import Sparsity

RULE = "!" * 80
SCRIPTS = {0: "normal_prune.py", 1: "slim_prune.py", 2: "layer_prune.py"}
"""The script that removes what was pressed on, by `--prune`."""


class SparseRecord:
    """The γ of one run: told at its start, written after every epoch, drawn at its end.

    Args:
        trainer: of a sparse training.
        run: its directory.
        events: of TensorBoard, if asked for.
    """

    def __init__(self, trainer: Trainer, run: RunDirectory, events: Scalars | None) -> None:
        self.trainer, self.run, self.events = trainer, run, events
        self.pressure: Sparsity = trainer.sparsity
        self._graph = channel_graph(trainer.model.network)
        self._log = GammaLog(run)

    def begin(self) -> None:
        """Say what can be expected, so that a training that would do nothing is not overlooked; γ before it."""
        settings = self.pressure.settings
        text, warning = outlook(settings, self.pressure.scores(), self.pressure.reach)
        log(f"{text}; {len(self.pressure.layers)} convolutions ({SETS[settings.prune]})")
        if warning:
            log(f"{RULE}\nwarning: {warning}\n{RULE}")
        if self.trainer.progress.step == 0:
            self.append(0, {})
        self.trainer.watchers.append(self.append)

    def append(self, epoch: int, row: Mapping[str, float | None]) -> None:
        """Write the γ of the model that is kept; a watcher of the trainer."""
        scores = self.scores(self.trainer.state.kept)
        self._log.append(epoch, scores)
        if self.events is not None:
            self.events.histogram(epoch, "gamma/all", np.concatenate(list(scores.values())))
            for block, values in scores.items():
                self.events.histogram(epoch, f"gamma/{block}", values)

    def scores(self, model: Darknet) -> dict[int, NDArray[np.float64]]:
        """|γ| of the candidates' channels, by block number, as pruning ranks them."""
        blocks = model.network.blocks
        found = {
            i: model.layers[i].bn.weight.detach().cpu().numpy()
            for i, block in enumerate(blocks)
            if getattr(block, "batch_normalize", False)
        }
        return channel_scores(self._graph, found, self.pressure.layers)

    def finish(self, model: Darknet) -> None:
        """Draw the pictures, and say what pruning can take of the model that was kept."""
        settings, epochs = self.pressure.settings, self.pressure.schedule.epochs
        turn = settings.schedule.turn
        self._log.draw(turn * epochs if turn < 1 else None)
        scores = self.scores(model)
        every = np.concatenate(list(scores.values()))
        shares = ", ".join(f"{(every < limit).mean():.0%} below {limit:g}" for limit in BELOW)
        log(f"|γ| of {len(every)} channels: {shares}")
        best = self.run.weights / "best.pt"
        what = "--shortcut N" if settings.prune == 2 else f"--percent {advised_percent(scores):g}"
        log(f"prune: python {SCRIPTS[settings.prune]} --weights {best} {what}")
