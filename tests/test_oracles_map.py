"""Average precision of public models on real pictures, against figures made with OpenCV, and against OpenCV itself.

The figures were measured on the rows of OpenCV's [yolo] layer, which sets scores up to its own threshold to 0 before
any threshold of the caller is looked at: 0.2, unless the cfg has a key `thresh`. They are therefore those of 0.2 here.
Below it, at the thresholds that AP is measured with, the reference is OpenCV with `thresh=0` in the cfg.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from models import Outputs, fuse
from tests.nets import opencv_epsilon, printed
from utils.checkpoint import load_model
from utils.darknet.data_file import load_data
from utils.data import convert
from utils.data.datasets import DetectionDataset, make_loader
from utils.data.index import index
from utils.detection.average_precision import Evaluator
from utils.detection.decode import non_max_suppression, to_corners
from utils.detection.evaluate import category_ids, evaluate, image_id
from utils.flags import choose_model

OPENCV_THRESHOLD = 0.2
"""`thresh` of OpenCV's [yolo] layer when the cfg says nothing (modules/dnn/src/darknet/darknet_io.cpp)."""
TOLERANCE = 0.003
DARKNET = {"conf_thres": 0.005, "iou_thres": 0.45, "multi_label": False}
DEFAULT = {"conf_thres": 0.001, "iou_thres": 0.6, "multi_label": True}
"""Of test.py: the first as Darknet's `map`, with --single-label."""
MODELS = {
    "yolo-fastest-1.1": ("yolo-fastest-1.1.weights", (0.243, 0.247)),
    "yolo-fastest-1.1-xl": ("yolo-fastest-1.1-xl.weights", (0.342, 0.360)),
    "MobileNetV2-YOLOv3-Nano-coco": ("MobileNetV2-YOLOv3-Nano-coco.weights", (0.300, 0.312)),
    "yolov3-tiny-mask123": ("yolov3-tiny.weights", (0.270, 0.278)),
}
"""Weights, and AP50 with DARKNET's and DEFAULT's NMS on OpenCV's rows."""


SLOW = ("yolo-fastest-1.1-xl", "yolov3-tiny-mask123")


class Recording(nn.Module):
    """A network that keeps what it returned, and returns it again from the start after `rewind`."""

    def __init__(self, model):
        super().__init__()
        self.network, self.model, self.tape, self.position = model.network, model, [], 0

    def forward(self, images):
        if self.position == len(self.tape):
            self.tape.append(Outputs(self.model(images).heads, {}))
        self.position += 1
        return self.tape[self.position - 1]

    def rewind(self):
        self.position = 0
        return self


@pytest.fixture(scope="module")
def pictures(shared):
    """coco_mini val, and the names."""
    data = load_data(shared / "data/coco_mini/coco_mini.data")
    return index(data.valid, data.names, cache_dir=None), data.names


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS],
)
def measured(request, shared, pictures):
    """Name of a model, and a function from thresholds to its AP50; the network runs once over the pictures."""
    folder, (found, names) = shared / "data/weights", pictures
    files = choose_model(str(folder / f"{request.param}.cfg"), str(folder / MODELS[request.param][0]))
    with opencv_epsilon():
        model = Recording(fuse(load_model(files).model))
    size = model.network.net.height, model.network.net.width
    loader = make_loader(DetectionDataset(found, size=size, mode="stretch"), 16)

    def ap50(thresholds):
        return evaluate(model.rewind(), loader, names, device="cpu", by_size=False, **thresholds).metrics.map50

    return request.param, ap50


@pytest.mark.parametrize("thresholds", [DARKNET, DEFAULT], ids=["darknet", "default"])
def test_ap50_is_that_of_opencvs_rows(measured, thresholds):
    name, ap50 = measured
    _, figures = MODELS[name]
    want = figures[thresholds is DEFAULT]
    assert ap50({**thresholds, "conf_thres": OPENCV_THRESHOLD}) == pytest.approx(want, abs=TOLERANCE)


def test_the_script_gives_the_same(pictures, shared, script, tmp_path, capsys, monkeypatch):
    """Of sixteen pictures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (found, names), weights = pictures, shared / "data/weights/yolo-fastest-1.1"
    (tmp_path / "some.txt").write_text("".join(f"{path}\n" for path in found.subset(range(16)).images))
    (tmp_path / "coco.names").write_text("\n".join(names))
    (tmp_path / "some.data").write_text("valid=some.txt\nnames=coco.names\n")
    files = ["--data", f"{tmp_path}/some.data", "--cfg", f"{weights}.cfg", "--weights", f"{weights}.weights"]
    flags = ["--conf-thres", "0.2", "--iou-thres", "0.45", "--stretch", "--single-label", "--device", "cpu"]
    found_by_script = printed(capsys, script.main, *files, *flags)["map50"]
    model = load_model(choose_model(f"{weights}.cfg", f"{weights}.weights")).model
    loader = make_loader(DetectionDataset(found.subset(range(16)), size=(320, 320), mode="stretch"), 16)
    expected = evaluate(model, loader, names, device="cpu", **{**DARKNET, "conf_thres": OPENCV_THRESHOLD}).metrics
    assert found_by_script == pytest.approx(expected.map50, abs=1e-6)


def test_converted_coco_measures_as_its_own_json_does_in_pycocotools(shared, root, tmp_path):
    """Crowds included; pycocotools takes the area of a box here, since labels do not know that of an outline."""
    folder = shared / "data/coco_mini/annotations"
    flags = ["--train", folder / "instances_train.json", "--val", folder / "instances_val.json"]
    flags += ["--names", root / "data/coco.names", "--output", tmp_path / "mini"]
    convert.main(["coco", *map(str, flags)])
    data = load_data(tmp_path / "mini/mini.data")
    found, weights = index(data.valid, data.names, cache_dir=None), shared / "data/weights/yolo-fastest-1.1"
    model = fuse(load_model(choose_model(f"{weights}.cfg", f"{weights}.weights")).model)
    loader = make_loader(DetectionDataset(found, size=(320, 320)), 16)
    ours = evaluate(model, loader, data.names, device="cpu", keep_detections=True)
    assert found.totals()["ignored"] == 7

    coco = COCO(str(folder / "instances_val.json"))
    for annotation in coco.dataset["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    coco.createIndex()
    ids = category_ids(data.names)
    rows = [
        {"image_id": image_id(found.images[image.position]), "category_id": ids[c], "bbox": box, "score": score}
        for image in ours.detections
        for box, score, c in zip(to_xywh(image.boxes), image.scores.tolist(), image.classes, strict=True)
    ]
    direct = COCOeval(coco, coco.loadRes(rows), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    metrics = ours.metrics
    got = [metrics.map50_95, metrics.map50, *(size.ap50_95 for size in metrics.by_size)]
    np.testing.assert_allclose(got, direct.stats[[0, 1, 3, 4, 5]], rtol=0, atol=1e-9)


def to_xywh(boxes):
    """[n, 4] corners → rows of left, top, width, height."""
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()


def opencv_rows(folder, name, paths, size):
    """Rows [1, N, 5 + C] of each picture: cx, cy, w, h as shares of the picture, 1, objectness · class."""
    text = (folder / f"{name}.cfg").read_text().replace("[yolo]", "[yolo]\nthresh=0")
    weights = np.fromfile(folder / MODELS[name][0], np.uint8)
    net = cv2.dnn.readNetFromDarknet(np.frombuffer(text.encode(), np.uint8), weights)
    for path in paths:
        net.setInput(cv2.dnn.blobFromImage(cv2.imread(str(path)), 1 / 255, size, swapRB=True))
        rows = torch.from_numpy(np.concatenate(net.forward(net.getUnconnectedOutLayersNames())))[None]
        rows[..., 4] = 1
        yield rows


def test_ap50_at_low_thresholds_is_that_of_opencv(measured, pictures, shared):
    name, ap50 = measured
    found, names = pictures
    size = (416, 416) if name.startswith("yolov3-tiny") else (320, 320)
    evaluators = [(thresholds, Evaluator(names, by_size=False)) for thresholds in (DARKNET, DEFAULT)]
    rows = opencv_rows(shared / "data/weights", name, found.images, size)
    for image, labels, (height, width) in zip(rows, found.labels, found.shapes, strict=True):
        scale = np.array([width, height, width, height])
        truth = np.hstack([labels[:, :1], to_corners(torch.from_numpy(labels[:, 1:])).numpy() * scale])
        for thresholds, evaluator in evaluators:
            kept = non_max_suppression(image, **thresholds)[0].numpy()
            evaluator.add(kept[:, :4].clip(0, 1) * scale, kept[:, 4], kept[:, 5], truth)
    for thresholds, evaluator in evaluators:
        assert ap50(thresholds) == pytest.approx(evaluator.result().map50, abs=TOLERANCE)
