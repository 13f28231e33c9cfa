"""The networks of cfg/: totals that are published, and Darknet's blocks where it has them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from utils.darknet import cfg, weights
from utils.darknet import network as darknet
from utils.darknet.blocks import Convolutional, Network
from utils.report.tables import network_cost

REFERENCE = {
    "cfg/yolov3": (107, 61_949_149, 248_007_048),
    "cfg/yolov3-spp": (114, 62_998_749, 252_209_544),
    "cfg/yolov3-tiny": (24, 8_852_366, 35_434_956),
    "cfg/yolov4": (162, 64_363_101, 257_717_640),
    "cfg/yolov4-tiny": (38, 6_056_606, 24_251_276),
    "cfg/yolov4-csp": (175, 52_921_437, 211_944_840),
    "darknet_cfg/yolov3-tiny-prn": (28, 4_935_182, 19_759_052),
    "darknet_cfg/yolov3-voc": (107, 61_626_049, 246_714_648),
}
"""Blocks, parameters and bytes of the .weights file; the second folder is in ../shared."""
BFLOPS = {
    "cfg/yolov3": {320: (38.973, 38.981), 416: (65.864, 65.879), 608: (140.692, 140.723)},
    "cfg/yolov3-spp": {416: (66.218, 66.257), 608: (141.449, 141.531)},
    "cfg/yolov3-tiny": {416: (5.565, 5.571), 608: (11.887, 11.899)},
    "cfg/yolov4": {320: (35.565, 35.584), 416: (60.105, 60.137), 512: (91.046, 91.095), 608: (128.389, 128.459)},
    "cfg/yolov4-tiny": {416: (6.908, 6.910), 608: (14.756, 14.761)},
    "cfg/yolov4-csp": {512: (76.953, 77.003), 640: (120.240, 120.317)},
    "darknet_cfg/yolov3-tiny-prn": {416: (3.461, 3.467)},
    "darknet_cfg/yolov3-voc": {416: (65.428, 65.443)},
}
"""By size those of pjreddie's Darknet (convolutions only) and of AlexeyAB's."""
DARKNETS = ("yolov3", "yolov3-spp", "yolov3-tiny", "yolov4", "yolov4-tiny")
"""Those of which ../shared has Darknet's own file."""
FOLDER = Path(__file__).parents[1] / "cfg"
NAMES = sorted(path.stem for path in FOLDER.iterdir())


def load(name: str) -> Network:
    return cfg.load(FOLDER / f"{name}.cfg")


def without_training_keys(network: Network) -> Network:
    """Darknet's files differ from one another, and from ours, in what `[net]` says about batches."""
    return dataclasses.replace(network, net=dataclasses.replace(network.net, extra=()))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_without_a_warning_and_written_back(name):
    warnings = []
    network = cfg.load(FOLDER / f"{name}.cfg", warnings.append)
    assert warnings == []
    text = (FOLDER / f"{name}.cfg").read_text(encoding="utf-8")
    assert text[text.index("[net]") :] == cfg.format_network(network)


@pytest.mark.parametrize("name", REFERENCE)
def test_totals_are_the_reference_to_the_digit(name, root, request):
    network = cfg.load((root if name.startswith("cfg") else request.getfixturevalue("shared")) / f"{name}.cfg")
    parameters = darknet.parameter_count(network)
    assert (len(network.blocks), parameters, darknet.file_bytes(network)) == REFERENCE[name]
    for size, bflops in BFLOPS[name].items():
        cost = network_cost(network, size, size)
        assert cost.parameters == parameters
        assert (round(2 * cost.macs / 1e9, 3), round(cost.bflops, 3)) == bflops


@pytest.mark.parametrize("name", DARKNETS)
def test_blocks_and_input_are_darknets(name, shared):
    ours = load(name)
    darknets = cfg.load(shared / "darknet_cfg" / f"{name}.cfg")
    assert without_training_keys(ours) == without_training_keys(darknets)
    training, theirs = dict(ours.net.extra), dict(darknets.net.extra)
    assert training.keys() == theirs.keys()
    batch = {"batch", "subdivisions"}  # 1 and 1 in some of Darknet's files: set for testing
    assert {key for key in training if training[key] != theirs[key]} <= batch


def test_yolo_fastest_computes_what_the_public_network_computes(shared):
    ours = load("yolo-fastest")
    public = shared / "data" / "weights" / "yolo-fastest-1.1"
    assert ours.blocks == cfg.load(public.with_name("yolo-fastest-1.1.cfg")).blocks
    assert weights.check(public.with_name("yolo-fastest-1.1.weights"), ours)


@pytest.mark.parametrize("leaky", ["yolov4-leaky", "yolov4-leaky-spp557"])
def test_leaky_twins_differ_from_yolov4_in_activation_and_pools_alone(leaky):
    original, twin = load("yolov4"), load(leaky)
    for block, other in zip(original.blocks, twin.blocks, strict=True):
        changed = {
            field.name
            for field in dataclasses.fields(block)
            if field.compare and getattr(block, field.name) != getattr(other, field.name)
        }
        assert changed <= {"activation", "size", "padding"}
    assert {block.activation for block in twin.blocks if isinstance(block, Convolutional)} == {"leaky", "linear"}
    assert darknet.tensors(twin) == darknet.tensors(original)
