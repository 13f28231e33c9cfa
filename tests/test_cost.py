"""Parameters, bytes, multiply-adds and BFLOPs against the published numbers of known networks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from utils.darknet.blocks import Convolutional, Maxpool, Net, Network, Se, Shortcut, Yolo
from utils.darknet.cfg import load
from utils.darknet.network import file_bytes, parameter_count
from utils.report.cost import Cost, block_costs, network_cost, total

KNOWN = {
    "yolov3": (107, 61_949_149, 248_007_048, {320: (38.973, 38.981), 416: (65.864, 65.879), 608: (140.692, 140.723)}),
    "yolov3-spp": (114, 62_998_749, 252_209_544, {416: (66.218, 66.257), 608: (141.449, 141.531)}),
    "yolov3-tiny": (24, 8_852_366, 35_434_956, {416: (5.565, 5.571), 608: (11.887, 11.899)}),
    "yolov4": (
        162,
        64_363_101,
        257_717_640,
        {320: (35.565, 35.584), 416: (60.105, 60.137), 512: (91.046, 91.095), 608: (128.389, 128.459)},
    ),
    "yolov4-tiny": (38, 6_056_606, 24_251_276, {416: (6.908, 6.910), 608: (14.756, 14.761)}),
    "yolov3-tiny-prn": (28, 4_935_182, 19_759_052, {416: (3.461, 3.467)}),
    "yolov3-voc": (107, 61_626_049, 246_714_648, {416: (65.428, 65.443)}),
}
"""Blocks, parameters, bytes of the .weights file, and by size the BFLOPs of pjreddie's (convolutions only) and of
AlexeyAB's Darknet."""


@pytest.mark.parametrize("name", KNOWN)
def test_counts_are_darknets_to_the_digit(name, shared):
    blocks, parameters, size, bflops = KNOWN[name]
    network = load(shared / "darknet_cfg" / f"{name}.cfg")
    assert (len(network.blocks), parameter_count(network), file_bytes(network)) == (blocks, parameters, size)
    for side, (convolutions, everything) in bflops.items():
        cost = network_cost(network, side, side)
        assert cost.parameters == parameters
        assert f"{2 * cost.macs / 1e9:.3f} {cost.bflops:.3f}" == f"{convolutions:.3f} {everything:.3f}"


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
    4: two sources added to 8 × 12 values, three weights.
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
        Cost(3, 0, 2 * 96),
        Cost(54, 48 * 12, 2 * 48 * 12),
        Cost(0, 0, 0),
    )
    assert network_cost(network) == total(costs) == Cost(257, 2336, 5248)
    assert total(()) == Cost(0, 0, 0)
