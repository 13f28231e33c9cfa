"""Print the objects in a picture: a file of `export.py --decode` or `--format darknet` in OpenCV's dnn module.

pip install 'opencv-python>=4.7'
python opencv_client.py model.onnx picture.jpg classes.names
python opencv_client.py model.weights picture.jpg classes.names    # with model.cfg beside it; OpenCV 4 only
"""

import re
import sys
from pathlib import Path

import cv2
import numpy as np

CONFIDENCE, OVERLAP = 0.3, 0.6


def network_input(picture, size, channels):
    """Return images [1, C, H, W], RGB in 0…1, and where the picture is in them: input = picture * scale + offset."""
    original = np.array(picture.shape[1::-1])
    inner = np.maximum(np.round(original * (size / original).min()), 1).astype(int)
    left, top = offset = (size - inner) // 2
    if channels == 1:
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    canvas = np.full((*size[::-1], *picture.shape[2:]), 114, np.uint8)
    canvas[top : top + inner[1], left : left + inner[0]] = cv2.resize(picture, inner.tolist())
    return cv2.dnn.blobFromImage(canvas, 1 / 255, swapRB=True), inner / original, offset


def input_shape(model):
    """Return the network's input, (width, height) and channels: from its cfg, which an ONNX file has inside."""
    text = Path(model).read_bytes()
    sides = [int(re.search(rb"\n%s *= *(\d+)" % side, text)[1]) for side in (b"width", b"height", b"channels")]
    return np.array(sides[:2]), sides[2]


def detect(model, images, size):
    """Return boxes [N, 4], cx, cy, w, h in pixels of the input, and scores [N, C]: objectness * class probability."""
    if model.suffix == ".cfg":  # OpenCV decodes: shares of the input, scores that are products and 0 up to 0.2
        net = cv2.dnn.readNetFromDarknet(str(model), str(model.with_suffix(".weights")))
        net.setInput(images)
        rows = np.concatenate(net.forward(net.getUnconnectedOutLayersNames()))
        return rows[:, :4] * np.tile(size, 2), rows[:, 5:]
    net = cv2.dnn.readNetFromONNX(str(model))
    if "rows" not in net.getUnconnectedOutLayersNames():
        sys.exit(f"{model}: has no decoded rows, export it with --decode")
    net.setInput(images)
    rows = net.forward("rows")[0]
    return rows[:, :4], rows[:, 5:] * rows[:, 4:5]


def main(model, path, names=None):
    """Print confidence, x1, y1, x2, y2 in pixels of the picture, and the class of every object, the best one first."""
    model = Path(model).with_suffix(".cfg") if model.endswith(".weights") else Path(model)
    names = names and Path(names).read_text(encoding="utf-8").splitlines()
    size, channels = input_shape(model)
    picture = cv2.imread(path)
    if picture is None:
        sys.exit(f"{path}: cannot be read as an image")
    images, scale, offset = network_input(picture, size, channels)
    boxes, scores = detect(model, images, size)
    likely = scores.max(axis=1) > CONFIDENCE
    low, extent, scores = boxes[likely, :2] - boxes[likely, 2:] / 2, boxes[likely, 2:], scores[likely]
    confidence, label = scores.max(axis=1).tolist(), scores.argmax(axis=1).tolist()
    sides = np.hstack((low - low.min(initial=0), extent)).tolist()  # OpenCV mixes classes where one is below 0
    for number in list(cv2.dnn.NMSBoxesBatched(sides, confidence, label, CONFIDENCE, OVERLAP))[:300]:
        corners = (np.stack((low[number], low[number] + extent[number])) - offset) / scale
        box = np.clip(corners, 0, picture.shape[1::-1]).ravel()
        name = names[label[number]] if names else label[number]
        print(f"{confidence[number]:.4f}", *(f"{side:.2f}" for side in box), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
