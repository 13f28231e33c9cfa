"""Pruned networks in OpenCV: the cfg and weights that a strategy leaves give there the raw heads they give here."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from models import load_arrays
from tests.nets import opencv_epsilon
from tests.pruning import policy, removal_of
from tests.test_oracle_opencv import TOLERANCE, difference, dog
from tests.test_random_networks import random_arrays
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.cfg import format_network
from utils.darknet.network import file_bytes, opencv_warning
from utils.pruning.channel_graph import channel_graph, residual_units
from utils.pruning.surgery import fold_constants, prune_network

PERCENTS = {"normal": 0.3, "regular": 0.4, "shortcut": 0.3, "slim": 0.5, "layer": None, "layer_channel": 0.5}
"""Share of the channels that each script removes here; those whose name begins with layer take units, too."""
UNITS = 3
PUBLIC = {"yolov3-tiny": 0, "yolo-fastest-1.1": 18, "MobileNetV2-YOLOv3-Nano-coco": 10}
"""Networks with real weights, and how many residual units they have."""
OURS = {"yolov4-tiny": 0, "yolov4": 23, "yolov3": 23}
"""Networks of cfg/, with random weights."""
QUICK = ("yolov4-tiny", "yolov4-layer_channel")
SIDE = 128
"""Input of the networks with random weights, in pixels."""
CASES = tuple(
    pytest.param(
        name,
        strategy,
        id=f"{name}-{strategy}",
        marks=() if name in PUBLIC or f"{name}-{strategy}".startswith(QUICK) else pytest.mark.slow,
    )
    for name, units in (PUBLIC | OURS).items()
    for strategy in PERCENTS
    if units or not strategy.startswith("layer")
)


def network_and_arrays(request, name):
    """A public network with its weights, or one of ours with random ones and a small input."""
    if name in PUBLIC:
        folder = request.getfixturevalue("shared") / "data" / "weights"
        network = cfg_file.load(folder / f"{name}.cfg", warn=lambda text: None)
        return network, weights_file.read(folder / f"{name}.weights", network)
    network = cfg_file.load(request.getfixturevalue("root") / "cfg" / f"{name}.cfg")
    network = replace(network, net=replace(network.net, width=SIDE, height=SIDE))
    return network, random_arrays(network, 3, np.float32)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_networks_have_so_many_units(request, name):
    assert len(residual_units(network_and_arrays(request, name)[0])) == PUBLIC[name]


@pytest.mark.skipif(not hasattr(cv2.dnn, "readNetFromDarknet"), reason="OpenCV 5 has no Darknet importer")
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_raw_heads_of_a_pruned_network_equal_those_of_opencv(request, shared, tmp_path, name, strategy):
    network, arrays = network_and_arrays(request, name)
    graph = channel_graph(network)
    units = UNITS if strategy.startswith("layer") else 0
    removal = removal_of(graph, arrays, policy(strategy, PERCENTS[strategy]), units)
    narrow, sliced = prune_network(graph, fold_constants(graph, arrays, removal), removal)
    cfg, weights = tmp_path / "model.cfg", tmp_path / "model.weights"
    cfg.write_text(format_network(narrow))
    weights_file.write(weights, narrow, sliced)
    assert weights.stat().st_size == file_bytes(narrow) < file_bytes(network)

    written = cfg_file.load(cfg, warn=lambda text: None)
    assert written == narrow
    assert opencv_warning(written) is None
    blob = dog(shared, written)
    tensors = {key: torch.from_numpy(array) for key, array in weights_file.read(weights, written).items()}
    with torch.inference_mode(), opencv_epsilon():
        ours = load_arrays(written, tensors).eval()(torch.from_numpy(blob)).heads
    net = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    net.setInput(blob)
    theirs = net.forward([f"conv_{head - 1}" for head in written.heads])
    for one, other in zip(theirs, ours, strict=True):
        assert float(np.ptp(one)) > 0.1
        assert difference(one, other.numpy()) < TOLERANCE
