"""detect.py: against OpenCV's detections, and what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import detect
from utils.data.images import read_image

PICTURES = ("dog.jpg", "horses.jpg", "person.jpg")
MODELS = (
    "MobileNetV2-YOLO-Fastest-voc",
    "MobileNetV2-YOLO-Fastest-voc-v2",
    "MobileNetV2-YOLOv3-Nano-coco",
    "MobileNetV2-YOLOv3-Nano-voc",
    "yolo-fastest-1.1",
    "yolo-fastest-1.1-xl",
    "yolo-fastest-1.1_body",
    "yoloface-500k",
    "yoloface-500k-v2",
    "yoloface-50k",
    "yolov3-tiny",
    "yolov3-tiny-mask123",
)


def overlap(a, b) -> float:
    """IoU of two boxes x1, y1, x2, y2."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def clipped(xywh, image: np.ndarray) -> list[float]:
    """OpenCV's box as corners inside the picture."""
    height, width = image.shape[:2]
    x, y, w, h = xywh
    return [*np.clip([x, y, x + w, y + h], 0, [width, height] * 2)]


@pytest.mark.parametrize("model", MODELS)
def test_detections_equal_those_of_opencv(model, shared, capsys):
    """Stretched, 0.25, 0.45: the same objects as OpenCV 4.14's, IoU > 0.9 and scores to 0.01; nothing more or less."""
    weights, samples = shared / "data/weights", shared / "data/samples"
    flags = ["--stretch", "--conf-thres", "0.25", "--iou-thres", "0.45", "--json", "--nosave", "--device", "cpu"]
    flags += ["--cfg", f"{weights}/{model}.cfg", "--weights", f"{weights}/{model.removesuffix('-mask123')}.weights"]
    detect.main([*flags, "--source", f"{samples}/*.jpg"])
    documents = json.loads(capsys.readouterr().out)
    assert [Path(document["source"]).name for document in documents] == list(PICTURES)
    expected = json.loads((weights / "expected/cv2_4.14_detections.json").read_text())[model]
    for document in documents:
        image = read_image(document["source"])
        wanted = list(expected[Path(document["source"]).name])
        assert len(document["detections"]) == len(wanted)
        for found in document["detections"]:
            match = max(
                (w for w in wanted if w["cls"] == found["class"]),
                key=lambda w: overlap(found["box"], clipped(w["xywh"], image)),
            )
            assert overlap(found["box"], clipped(match["xywh"], image)) > 0.9
            assert found["confidence"] == pytest.approx(match["conf"], abs=0.01)
            wanted.remove(match)
