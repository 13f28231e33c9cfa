"""Real Darknet models, and pruned networks: the same cfg and weights give here what OpenCV's Darknet importer gives."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from models import Darknet, fuse, load_arrays
from tests.nets import NEEDS_IMPORTER, PUBLIC_MODELS, opencv_epsilon
from tests.pruning import removal_of
from tests.test_pruning import CASES as AMOUNTS
from tests.test_random_networks import random_arrays
from utils.checkpoint import load_model
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.network import file_bytes, opencv_warning
from utils.detection.decode import decode
from utils.flags import choose_model
from utils.pruning.channel_graph import channel_graph, residual_units
from utils.pruning.surgery import fold_constants, prune_network

STORED = ("yolo-fastest-1.1", "MobileNetV2-YOLO-Fastest-voc-v2", "yoloface-50k")
TOLERANCE = 1e-3


def files(shared, name) -> tuple[str, str]:
    """Its cfg and weights; the second cfg of yolov3-tiny has the same weights."""
    folder = shared / "data" / "weights"
    return str(folder / f"{name}.cfg"), str(folder / f"{name.removesuffix('-mask123')}.weights")


def load(shared, name) -> Darknet:
    with opencv_epsilon():
        return load_model(choose_model(*files(shared, name))).model.eval()


def dog(shared, network: Network) -> np.ndarray:
    """The sample picture as OpenCV's blobFromImage stretches it: [1, 3, H, W], 0…1."""
    image = cv2.imread(str(shared / "data" / "samples" / "dog.jpg"))
    size = (network.net.width, network.net.height)
    return cv2.dnn.blobFromImage(image, 1 / 255, size, swapRB=True, crop=False)


def in_opencv(cfg: str, weights: str, network: Network, blob: np.ndarray) -> list[np.ndarray]:
    """Raw heads of OpenCV's reader of Darknet files."""
    net = cv2.dnn.readNetFromDarknet(cfg, weights)
    net.setInput(blob)
    return net.forward([f"conv_{head - 1}" for head in network.heads])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a − b| / max(1, max |a|)."""
    return float(np.abs(a - b).max() / max(1.0, np.abs(a).max()))


def test_the_epsilons_of_darknet_and_opencv_move_heads_by_less_than_a_hundredth(shared):
    """Of public weights those of yoloface-500k differ most, those of yolov3-tiny least."""
    for name, low, high in (("yoloface-500k", 5e-3, 1e-2), ("yolov3-tiny", 1e-5, 1e-4)):
        theirs, ours = load(shared, name), load_model(choose_model(*files(shared, name))).model.eval()
        images = torch.from_numpy(dog(shared, ours.network))
        with torch.inference_mode():
            pairs = zip(theirs(images).heads, ours(images).heads, strict=True)
            assert low < max(difference(one.numpy(), other.numpy()) for one, other in pairs) < high


@NEEDS_IMPORTER
@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_raw_heads_equal_those_of_opencv(shared, name):
    model = load(shared, name)
    network, blob = model.network, dog(shared, model.network)
    want = in_opencv(*files(shared, name), network, blob)
    with torch.inference_mode():
        plain = model(torch.from_numpy(blob)).heads
        fused = fuse(model)(torch.from_numpy(blob)).heads
    for expected, ours, ours_fused in zip(want, plain, fused, strict=True):
        assert difference(expected, ours.numpy()) < TOLERANCE
        assert difference(expected, ours_fused.numpy()) < TOLERANCE


@pytest.mark.parametrize("name", STORED)
def test_decoded_rows_equal_the_stored_ones(shared, name):
    """Stored: cx, cy, w, h as fractions of the input, objectness, objectness · class (0 below a threshold)."""
    model = load(shared, name)
    network = model.network
    size = (network.net.height, network.net.width)
    with torch.inference_mode():
        heads = model(torch.from_numpy(dog(shared, network))).heads
    with np.load(shared / "data" / "weights" / "expected" / f"{name}_dog_raw.npz", allow_pickle=False) as stored:
        expected = [stored[key] for key in stored.files]
    for head, yolo, want in zip(heads, network.yolos, expected, strict=True):
        rows = decode([head], [yolo], size)[0].numpy()
        anchors, cells = len(yolo.mask), head.shape[2] * head.shape[3]
        rows = rows.reshape(anchors, cells, -1).transpose(1, 0, 2).reshape(anchors * cells, -1)
        rows[:, :4] /= (size[1], size[0], size[1], size[0])
        assert difference(want[:, :5], rows[:, :5]) < TOLERANCE
        scores = rows[:, 5:] * rows[:, 4:5]
        assert np.abs(np.where(want[:, 5:] > 0, scores - want[:, 5:], 0)).max() < TOLERANCE


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
    for strategy in sorted(AMOUNTS.keys() - {"group", "all"})
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


@NEEDS_IMPORTER
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_raw_heads_of_a_pruned_network_equal_those_of_opencv(request, shared, tmp_path, name, strategy):
    network, arrays = network_and_arrays(request, name)
    graph = channel_graph(network)
    assert len(residual_units(network)) == (PUBLIC | OURS)[name]
    removal = removal_of(graph, arrays, *AMOUNTS[strategy])
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
    for one, other in zip(in_opencv(str(cfg), str(weights), written, blob), ours, strict=True):
        assert float(np.ptp(one)) > 0.1
        assert difference(one, other.numpy()) < TOLERANCE
