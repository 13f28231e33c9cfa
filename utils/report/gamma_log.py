"""γ in the course of a sparse training: gamma.csv and gamma_histogram.csv of a run, and its pictures; no torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from utils.report.gamma_plots import plot_gamma_change, plot_gamma_ridges, plot_sparse_course
from utils.report.run_dir import Results, RunDirectory, read_results

QUANTILES = {"min": 0, "q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9, "max": 1}
BELOW = (0.1, 0.01, 0.001)
"""Thresholds of which gamma.csv says how large a share of |γ| is below."""
EDGES = np.concatenate([[0.0], np.logspace(-5, 1, 61)])
"""Edges of the bins of gamma_histogram.csv; larger |γ| count in the last one."""
CONTROLLED = ("s", "plan", "weak", "rested")
"""Columns of pressure.csv: s of the epoch's last step, the share of the channels that was to be weak, the share that
is, and the optimizer steps so far without pressure because of AP50 or the loss."""
EVERY = -1
"""`block` of the rows for all candidates."""


class GammaLog:
    """The tables, a part for each epoch; epoch 0 is before the training.

    gamma.csv has a row for every candidate and one for all together, `block` -1: quantiles of |γ| and the shares below
    some thresholds. gamma_histogram.csv counts |γ| of all candidates; its columns are named by the lower edges.
    pressure.csv says what s = auto did.
    """

    def __init__(self, run: RunDirectory) -> None:
        shares = [f"below_{limit:g}" for limit in BELOW]
        self.run = run
        self._table = Results(run.file("gamma.csv"), ("block", "channels", *QUANTILES, *shares))
        self._pressure = Results(run.file("pressure.csv"), CONTROLLED)
        self._counts = Results(run.file("gamma_histogram.csv"), tuple(f"{edge:.4g}" for edge in EDGES[:-1]))

    def append(
        self,
        epoch: int,
        gammas: Mapping[int, NDArray[np.floating]],
        controlled: Mapping[str, float] | None = None,
    ) -> None:
        """Write what γ are after an epoch, by block number; a resumed run rewrites what it repeats.

        Args:
            epoch: its number.
            gammas: γ of each candidate.
            controlled: the values of pressure.csv; None: there are none.
        """
        sizes = {block: np.abs(np.asarray(values, np.float64)).ravel() for block, values in gammas.items()}
        together = np.concatenate(list(sizes.values()))
        self._table.extend(epoch, [_row(block, values) for block, values in {EVERY: together, **sizes}.items()])
        counts = np.histogram(np.minimum(together, EDGES[-1]), EDGES)[0]
        self._counts.append(epoch, dict(zip(self._counts.columns[1:], counts.tolist(), strict=True)))
        if controlled is not None:
            self._pressure.append(epoch, controlled)

    def draw(self, turn: float | None) -> None:
        """gamma/histogram.png, gamma/epochs.png and gamma/course.png; `turn` is the epoch in which the rate turns."""
        folder = self.run.file("gamma")
        folder.mkdir(exist_ok=True)
        counts = read_results(self._counts.path)
        epochs = [int(epoch) for epoch in counts.pop("epoch")]
        table = np.array(list(counts.values())).T
        plot_gamma_change(EDGES, table[0], table[-1], folder / "histogram.png")
        plot_gamma_ridges(epochs, EDGES, table, folder / "epochs.png", turn)
        if not self.run.file("results.csv").exists():
            return
        rows = read_results(self._table.path)
        results = read_results(self.run.file("results.csv"))
        whole = {rows["epoch"][i]: i for i in np.flatnonzero(np.array(rows["block"]) == EVERY)}
        places = [i for i, epoch in enumerate(results["epoch"]) if epoch in whole]
        results = {name: [values[i] for i in places] for name, values in results.items()}
        at = [whole[epoch] for epoch in results["epoch"]]
        shares = {f"{limit:g}": [rows[f"below_{limit:g}"][place] for place in at] for limit in BELOW}
        if places:
            pressure = read_results(self._pressure.path) if self._pressure.path.exists() else None
            plot_sparse_course(results, folder / "course.png", turn, shares, pressure)


def _row(block: int, values: NDArray[np.float64]) -> dict[str, float | int]:
    quantiles = np.quantile(values, list(QUANTILES.values()))
    shares = {f"below_{limit:g}": float((values < limit).mean()) for limit in BELOW}
    return {"block": block, "channels": len(values), **dict(zip(QUANTILES, quantiles.tolist(), strict=True)), **shares}
