"""Latencies are measured in turn, for a limited time, and in milliseconds."""

from __future__ import annotations

import pytest

from utils.report import cost
from utils.report.cost import LEAST_ROUNDS, Latency, interleaved


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.sleep(milliseconds)` moves."""

    class Clock:
        now = 0.0

        def sleep(self, milliseconds: float) -> None:
            self.now += milliseconds / 1000

    clock = Clock()
    monkeypatch.setattr(cost, "perf_counter", lambda: clock.now)
    return clock


def test_runs_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    interleaved(runs, rounds=3, warm=1)
    assert order == ["a", "b"] * 4


def test_before_a_turn_there_may_be_a_rest_and_a_run_that_does_not_count(clock, monkeypatch):
    monkeypatch.setattr(cost, "sleep", lambda seconds: clock.sleep(1000 * seconds))
    times = iter([9, 9, *[50, 1, 70, 2] * 5])
    found = interleaved({name: lambda: clock.sleep(next(times)) for name in "ab"}, rounds=5, warm=1, pause=0.3)
    assert (found["a"].median, found["b"].median) == pytest.approx((1, 2))
    assert clock.now == pytest.approx(0.018 + 5 * 0.123 + 10 * 0.3)


def test_median_and_p90_are_milliseconds_of_the_rounds_that_count(clock):
    """Warming up takes 1000 ms, the five rounds 1, 2, 3, 4 and 100: median 3, and 4 + 0.6 · 96 at 90 %."""
    times = iter([1000, 4, 1, 100, 2, 3])
    found = interleaved({"a": lambda: clock.sleep(next(times))}, rounds=5, warm=1)
    assert found["a"].median == pytest.approx(3)
    assert found["a"].p90 == pytest.approx(61.6)
    assert found["a"].rounds == 5


@pytest.mark.parametrize(("milliseconds", "rounds"), [(1, 50), (100, 11), (10_000, LEAST_ROUNDS)])
def test_time_is_limited_but_some_rounds_always_run(clock, milliseconds, rounds):
    """With 1050 ms the last of the rounds of 100 ms begins after 1000 ms; rounds of 10 s are five all the same."""
    found = interleaved({name: lambda: clock.sleep(milliseconds / 2) for name in "ab"}, rounds=50, seconds=1.05)
    assert found["a"] == Latency(pytest.approx(milliseconds / 2), pytest.approx(milliseconds / 2), rounds)
    assert found["b"].rounds == rounds
