"""The choice of the memory format."""

from __future__ import annotations

import itertools

import pytest
import torch

from models import Darknet
from tests.nets import tiny
from utils.training import probe


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([(9, 9), (10, 5), (10, 6)], "contiguous"),
        ([(9, 9), (10, 5), (5, 4)], "channels_last"),  # one fast step of the first is enough
        ([(9, 1), (10, 9.5), (10, 9.5)], "channels_last"),  # not clearly faster
    ],
)
def test_the_other_format_is_taken_only_if_it_is_clearly_faster_in_every_step(monkeypatch, seconds, expected):
    """Seconds of each format in turn: channels-last, contiguous; the first pair is not counted."""
    clock = itertools.accumulate(value for pair in seconds for step in pair for value in (0, step))
    monkeypatch.setattr(probe.time, "process_time", lambda: next(clock))
    assert probe.faster_format(Darknet(tiny()), (64, 64), 4, torch.device("cpu")) == expected


def test_the_model_is_left_as_it_was():
    model = Darknet(tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe.faster_format(model, (64, 64), 2, torch.device("cpu"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
