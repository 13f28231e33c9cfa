"""Parameters, multiply-adds and BFLOPs of blocks, counted by hand; those of known networks are in test_networks.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from utils.darknet.blocks import Convolutional, Maxpool, Net, Network, Se, Shortcut, Yolo
from utils.darknet.cfg import load
from utils.report import tables
from utils.report.tables import LEAST_ROUNDS, Cost, Latency, block_costs, interleaved, network_cost, total


def test_the_size_in_the_cfg_is_the_default(shared):
    network = load(shared / "darknet_cfg" / "yolov4-tiny.cfg")
    assert network_cost(network) == network_cost(network, network.net.height, network.net.width)
    assert network_cost(replace(network, net=replace(network.net, height=320, width=608))) == network_cost(
        network, 320, 608
    )


def test_each_kind_of_block_by_hand():
    """Input 2 × 8 × 6.

    0: 3×3, stride 2, 8 filters in 2 groups: 8 · (2/2) · 9 weights on 4 × 3 cells, 8 β, 8 γ.
    1: one 3×3 filter for each of 8 channels and a bias.
    2: 8 → 2 → 8 fully connected, no bias.
    3: maximum of 2 × 2 cells, stride 1, same size.
    4: two sources added to 8 × 12 values, three weights, for which Darknet counts twice as many.
    5: 1×1 to 6 filters with bias.
    """
    network = Network(
        Net(width=6, height=8, channels=2),
        (
            Convolutional(filters=8, size=3, stride_x=2, stride_y=2, padding=1, groups=2, batch_normalize=True),
            Convolutional(filters=8, size=3, padding=1, groups=8),
            Se(filters=2),
            Maxpool(size=2, stride_x=1, stride_y=1, padding=1),
            Shortcut(sources=(2, 0), weights_type="per_feature"),
            Convolutional(filters=6, activation="linear"),
            Yolo(mask=(0,), anchors=((2, 2),), classes=1),
        ),
    )
    costs = block_costs(network)
    assert costs == (
        Cost(72 + 16, 72 * 12, 2 * 72 * 12),
        Cost(72 + 8, 72 * 12, 2 * 72 * 12),
        Cost(32, 32, 64),
        Cost(0, 0, 4 * 96),
        Cost(3, 0, 2 * 2 * 96),
        Cost(54, 48 * 12, 2 * 48 * 12),
        Cost(0, 0, 0),
    )
    assert network_cost(network) == total(costs) == Cost(257, 2336, 5440)
    assert total(()) == Cost(0, 0, 0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.sleep(milliseconds)` moves."""

    class Clock:
        now = 0.0

        def sleep(self, milliseconds: float) -> None:
            self.now += milliseconds / 1000

    clock = Clock()
    monkeypatch.setattr(tables, "perf_counter", lambda: clock.now)
    return clock


def test_runs_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    interleaved(runs, rounds=3, warm=1)
    assert order == ["a", "b"] * 4


def test_before_a_turn_there_may_be_a_rest_and_a_run_that_does_not_count(clock, monkeypatch):
    monkeypatch.setattr(tables, "sleep", lambda seconds: clock.sleep(1000 * seconds))
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
