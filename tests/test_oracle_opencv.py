"""Real Darknet models: the same cfg and weights give here what OpenCV's Darknet importer gives."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from models import Darknet, fuse
from tests.nets import PUBLIC_MODELS, opencv_epsilon
from utils.checkpoint import load_model
from utils.darknet.blocks import Network
from utils.detection.decode import decode
from utils.model_files import choose_model

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


@pytest.mark.skipif(not hasattr(cv2.dnn, "readNetFromDarknet"), reason="OpenCV 5 has no Darknet importer")
@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_raw_heads_equal_those_of_opencv(shared, name):
    model = load(shared, name)
    network, blob = model.network, dog(shared, model.network)
    folder = shared / "data" / "weights"
    net = cv2.dnn.readNetFromDarknet(
        str(folder / f"{name}.cfg"), str(folder / f"{name.removesuffix('-mask123')}.weights")
    )
    net.setInput(blob)
    want = net.forward([f"conv_{head - 1}" for head in network.heads])
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
