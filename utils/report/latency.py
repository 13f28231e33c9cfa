"""Time of several things side by side: they are run in turn, so that what else the machine does meets all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, sleep

import numpy as np

LEAST_ROUNDS = 5
"""Measured whatever time they take."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run."""

    median: float
    p90: float
    """90 % of the runs were no slower."""
    rounds: int
    """Number of runs."""


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 50,
    warm: int = 2,
    seconds: float = 10.0,
    pause: float = 0.0,
) -> dict[str, Latency]:
    """Run everything in turn, A B A B …, and say how long each took.

    Args:
        runs: what to measure, by name; a function returns when its work is done (on a GPU it synchronises).
        rounds: most rounds, at least 1.
        warm: rounds before, which do not count.
        seconds: no round begins after this time, but the first `LEAST_ROUNDS` do.
        pause: seconds of rest before every turn, and then a run that does not count: for libraries with threads of
            their own, which go on waiting for work when a run is over and would take the cores from the next one.
    """
    for _ in range(warm):
        for run in runs.values():
            run()
    laps: dict[str, list[float]] = {name: [] for name in runs}
    begin = perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            if pause:
                sleep(pause)
                run()
            start = perf_counter()
            run()
            laps[name].append(1000 * (perf_counter() - start))
    return {name: Latency(float(np.percentile(t, 50)), float(np.percentile(t, 90)), len(t)) for name, t in laps.items()}
