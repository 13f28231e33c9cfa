"""Print the objects in a picture: a TensorFlow Lite file of export.py in LiteRT, float or int8, with raw heads or rows.

pip install ai-edge-litert 'opencv-python>=4.7'
python litert_client.py model.tflite picture.jpg
"""

import json
import sys

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.schema_py_generated import ModelT


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


def metadata(path):
    """Return the texts that export.py put into a file, by name."""
    with open(path, "rb") as file:
        model = ModelT.InitFromPackedBuf(file.read())
    return {entry.name.decode(): bytes(model.buffers[entry.buffer].data).decode() for entry in model.metadata}


def main(model, path):
    """Print confidence, x1, y1, x2, y2 in pixels of the picture, and the class of every object, the best one first."""
    interpreter, texts = Interpreter(model), metadata(model)
    interpreter.allocate_tensors()
    facts = {key: json.loads(texts[key]) for key in ("input", "output", "heads", "thresholds", "names")}
    picture = cv2.imread(path)
    if picture is None:
        sys.exit(f"{path}: cannot be read as an image")
    images, scale, offset = network_input(picture, facts["input"])
    values, (tensor,) = images.transpose(0, 2, 3, 1), interpreter.get_input_details()
    if tensor["dtype"] == np.int8:
        step, zero = tensor["quantization"]
        values = np.clip(np.round(values / np.float32(step)) + zero, -128, 127).astype(np.int8)
    interpreter.set_tensor(tensor["index"], values)
    interpreter.invoke()
    outputs = []
    for tensor in interpreter.get_output_details():
        (step, zero), values = tensor["quantization"], interpreter.get_tensor(tensor["index"])[0]
        outputs.append((values.astype(np.float32) - zero) * step if tensor["dtype"] == np.int8 else values)
    if facts["output"]["kind"] == "heads":  # [H, W, A * (5 + C)]
        pairs = zip(outputs, facts["heads"], strict=True)
        outputs = [decode(head.transpose(2, 0, 1), spec, images.shape[:1:-1]) for head, spec in pairs]
    detections = suppress(np.concatenate(outputs), **facts["thresholds"])
    corners = (detections[:, :4].reshape(-1, 2, 2) - offset) / scale
    corners = np.clip(corners, 0, picture.shape[1::-1]).reshape(-1, 4)
    for box, (confidence, label) in zip(corners, detections[:, 4:], strict=True):
        print(f"{confidence:.4f}", *(f"{side:.2f}" for side in box), facts["names"][int(label)])


if __name__ == "__main__":
    main(*sys.argv[1:])
