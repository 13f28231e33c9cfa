"""What is said of networks that OpenCV cannot run."""

from __future__ import annotations

import re

import pytest

from tests.nets import one_head, tiny
from utils.darknet.network import opencv_warning

CONV = "[convolutional]\nfilters=4\nsize=3\npad=1\n"


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (CONV + "activation=relu6\n", "refuses activation=relu6"),
        (CONV + "activation=leaky\ndilation=2\n", "ignores dilation"),
        (CONV + "activation=leaky\nstride_x=2\nstride_y=1\n", "ignores stride_x"),
        ("[se]\nreduction=3\n", "refuses .se."),
    ],
)
def test_the_first_block_that_opencv_does_not_read_is_named(section, reason):
    assert re.search(reason, opencv_warning(one_head(CONV.replace("4", "3") + "activation=leaky\n", section)))


def test_a_network_that_opencv_reads_gives_no_warning():
    assert opencv_warning(tiny()) is None
