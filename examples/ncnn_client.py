"""Print the objects in a picture: the three files of `export.py --format ncnn` in ncnn.

pip install ncnn 'opencv-python>=4.7'
python ncnn_client.py model.ncnn.param picture.jpg
"""

import json
import sys
from pathlib import Path

import cv2
import ncnn
import numpy as np


def network_input(picture, spec):
    """Return images [1, C, H, W], RGB in 0…1, and where the picture is in them: input = picture * scale + offset."""
    original, size = np.array(picture.shape[1::-1]), np.array((spec["width"], spec["height"]))
    scale = (size / original).min() if spec["fit"] == "letterbox" else size / original
    inner = np.maximum(np.round(original * scale), 1).astype(int)
    left, top = offset = (size - inner) // 2
    if spec["channels"] == 1:
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    canvas = np.full((*size[::-1], *picture.shape[2:]), 114, np.uint8)
    canvas[top : top + inner[1], left : left + inner[0]] = cv2.resize(picture, inner.tolist())
    return cv2.dnn.blobFromImage(canvas, 1 / 255, swapRB=True), inner / original, offset


def decode(head, spec, size):
    """Return rows [A * H * W, 5 + C] of a raw head [A * (5 + C), H, W]: cx, cy, w, h in input pixels, probabilities."""
    (height, width), anchors, s = head.shape[1:], np.array(spec["anchors"]), spec["scale_x_y"]
    raw = head.reshape(len(anchors), -1, height, width)
    values = raw if spec["new_coords"] else 1 / (1 + np.exp(-raw))
    cells = np.stack(np.meshgrid(np.arange(width), np.arange(height)))
    centres = (s * values[:, :2] - (s - 1) / 2 + cells) * np.reshape((size[0] / width, size[1] / height), (2, 1, 1))
    factors = (2 * raw[:, 2:4]) ** 2 if spec["new_coords"] else np.exp(np.minimum(raw[:, 2:4], 10))
    rows = np.concatenate((centres, factors * anchors[:, :, None, None], values[:, 4:]), axis=1)
    return rows.transpose(0, 2, 3, 1).reshape(-1, rows.shape[1])


def suppress(rows, conf, iou):
    """Return detections [n, 6], best first: x1, y1, x2, y2 in pixels of the input, confidence, class."""
    scores = rows[:, 5:] * rows[:, 4:5]
    rows, scores = rows[scores.max(axis=1) > conf], scores[scores.max(axis=1) > conf]
    low, confidence, label = rows[:, :2] - rows[:, 2:4] / 2, scores.max(axis=1), scores.argmax(axis=1)
    sides = np.hstack((low - low.min(initial=0), rows[:, 2:4]))  # OpenCV mixes classes where one is below 0
    kept = cv2.dnn.NMSBoxesBatched(sides.tolist(), confidence.tolist(), label.tolist(), conf, iou)
    return np.column_stack((low, low + rows[:, 2:4], confidence, label))[list(kept)][:300]


def main(param, path):
    """Print confidence, x1, y1, x2, y2 in pixels of the picture, and the class of every object, the best one first."""
    facts = json.loads(Path(param).with_suffix(".json").read_text(encoding="utf-8"))
    net = ncnn.Net()
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)  # float32: ncnn rounds feature maps to 16 bits by default where it can
    if net.load_param(param) or net.load_model(str(Path(param).with_suffix(".bin"))):
        sys.exit(f"{param}: ncnn cannot read it")
    picture = cv2.imread(path)
    if picture is None:
        sys.exit(f"{path}: cannot be read as an image")
    images, scale, offset = network_input(picture, facts["input"])
    extractor = net.create_extractor()
    extractor.input("images", ncnn.Mat(images[0]).clone())
    heads = [np.array(extractor.extract(f"head{number}")[1]) for number in range(len(facts["heads"]))]
    pairs = zip(heads, facts["heads"], strict=True)
    rows = np.concatenate([decode(head, spec, images.shape[:1:-1]) for head, spec in pairs])
    detections = suppress(rows, **facts["thresholds"])
    corners = (detections[:, :4].reshape(-1, 2, 2) - offset) / scale
    corners = np.clip(corners, 0, picture.shape[1::-1]).reshape(-1, 4)
    for box, (confidence, label) in zip(corners, detections[:, 4:], strict=True):
        print(f"{confidence:.4f}", *(f"{side:.2f}" for side in box), facts["names"][int(label)])


if __name__ == "__main__":
    main(*sys.argv[1:])
