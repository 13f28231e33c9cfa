"""Laws of measuring a model: boxes go to the original picture and back, and the model stays as it was."""

from __future__ import annotations

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from torch import nn

from models import Darknet, Outputs
from tests.media import labelled
from tests.nets import tiny
from utils.data.datasets import DetectionDataset, make_loader
from utils.data.images import PackedBoxes
from utils.data.index import index
from utils.detection.evaluate import View, detect, detect_views, evaluate, network_input
from utils.errors import NumericsError

NAMES = ("cat", "dog")
SHAPES = ((40, 100), (90, 60), (64, 64))
BOXES = (
    [(0, 0.3, 0.4, 0.2, 0.3), (1, 0.75, 0.6, 0.4, 0.5)],
    [(1, 0.55, 0.2, 0.5, 0.25), (0, 0.4, 0.7, 0.3, 0.4)],
    [(0, 0.5, 0.5, 0.6, 0.6)],
)
"""Labels of three pictures of the SHAPES."""


@pytest.fixture
def pictures(tmp_path):
    """Index of three pictures whose labels are BOXES."""
    for number, (shape, rows) in enumerate(zip(SHAPES, BOXES, strict=True)):
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        labelled(tmp_path, f"{number}.png", np.full((*shape, 3), 40 * number, np.uint8), text)
    return index(tmp_path / "images", NAMES, cache_dir=None)


def loader(pictures, mode="letterbox", size=(64, 96), batch_size=2):
    return make_loader(DetectionDataset(pictures, size=size, mode=mode), batch_size)


class LabelReader(nn.Module):
    """A network whose heads say exactly what the labels of its pictures say; pictures come in order."""

    def __init__(self, batches):
        super().__init__()
        self.network = tiny()
        self.batches = iter(batches)

    def forward(self, images):
        """Each box goes to the coarse head's first anchor, in the cell of its centre."""
        height, width = images.shape[2:]
        yolo, stride = self.network.yolos[0], 8
        fine = images.new_full((len(images), 21, height // 4, width // 4), -20.0)
        coarse = images.new_full((len(images), 3, 7, height // stride, width // stride), -20.0)
        for number, label, *box in next(self.batches).targets.tolist():
            x, y, w, h = np.array(box) * (width, height, width, height)
            column, row = int(x / stride), int(y / stride)
            scale, (anchor_w, anchor_h) = yolo.scale_x_y, yolo.head_anchors[0]
            share = (np.array([x / stride - column, y / stride - row]) + (scale - 1) / 2) / scale
            values = [*np.log(share / (1 - share)), math.log(w / anchor_w), math.log(h / anchor_h), 20.0, -20.0, -20.0]
            values[5 + int(label)] = 20.0
            coarse[int(number), 0, :, row, column] = torch.tensor(values)
        return Outputs((coarse.flatten(1, 2), fine), {})


@pytest.mark.parametrize("mode", ["letterbox", "stretch"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_network_that_reads_the_labels_scores_one(pictures, mode, batch_size):
    batches = loader(pictures, mode, batch_size=batch_size)
    found = evaluate(LabelReader(batches), batches, NAMES, device="cpu", keep_detections=True)
    assert found.metrics.map50_95 == pytest.approx(1, abs=1e-9)
    assert (found.metrics.f1, found.metrics.images, found.metrics.objects) == (pytest.approx(1), 3, 5)
    for image, (height, width), rows in zip(found.detections, SHAPES, BOXES, strict=True):
        _, x, y, w, h = np.array(sorted(rows)).T
        corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1) * (width, height, width, height)
        np.testing.assert_allclose(image.boxes[np.argsort(image.classes, kind="stable")], corners, atol=1e-3)
    assert [image.position for image in found.detections] == [0, 1, 2]


@pytest.mark.parametrize("mode", ["letterbox", "stretch"])
def test_what_is_found_in_ignored_boxes_counts_nowhere(pictures, mode):
    """Of each picture the first object counts; the others are ignored, in boxes 1.2 times as large, and found."""
    batches, grown = loader(pictures, mode), np.array([1, 1, 1, 1.2, 1.2], np.float32)
    first, others = (PackedBoxes([rows[part] for rows in pictures.labels]) for part in (slice(1), slice(1, None)))
    some = dataclasses.replace(pictures, labels=first, ignored=PackedBoxes([rows * grown for rows in others]))
    for one_class in (False, True):
        options = {"device": "cpu", "single_class": one_class}
        metrics = evaluate(LabelReader(batches), loader(some, mode), NAMES, **options).metrics
        assert (metrics.objects, sum(size.objects for size in metrics.by_size)) == (3, 3)
        assert metrics.map50_95 == pytest.approx(1, abs=1e-9) and metrics.precision == pytest.approx(1)
        assert metrics.confusion.sum() == metrics.confusion.trace() == 3


def test_sizes_are_those_in_the_original_picture(pictures):
    """Boxes of 20 × 12 up to 40 × 38 pixels: none reaches COCO's 96² at any input size."""
    batches = loader(pictures, size=(192, 192))
    sizes = evaluate(LabelReader(batches), batches, NAMES, device="cpu").metrics.by_size
    assert [(size.name, size.objects) for size in sizes] == [("small", 4), ("medium", 1), ("large", 0)]


def test_boxes_of_on_batch_are_in_pixels_of_the_input(pictures):
    batches, seen = loader(pictures, "stretch"), []

    def look(number, batch, found):
        assert (len(found), len(batch.images)) == (len(batch.fits),) * 2
        seen.append((number, found[-1]))

    evaluate(LabelReader(batches), batches, NAMES, device="cpu", on_batch=look)
    assert [number for number, _ in seen] == [0, 1]
    torch.testing.assert_close(
        seen[1][1][0], torch.tensor([0.2 * 96, 0.2 * 64, 0.8 * 96, 0.8 * 64, 1, 0]), atol=1e-3, rtol=0
    )


def test_one_class_forgives_wrong_classes(pictures):
    batches = loader(pictures)
    wrong = dataclasses.replace(pictures, labels=PackedBoxes([rows * [0, 1, 1, 1, 1] for rows in pictures.labels]))
    reader = LabelReader(batches)
    metrics = evaluate(reader, loader(wrong), NAMES, device="cpu", single_class=True).metrics
    assert [(row.name, row.objects) for row in metrics.per_class] == [("object", 5)]
    assert metrics.map50 == pytest.approx(1)


def test_measuring_leaves_the_model_as_it_was(pictures):
    model = Darknet(tiny()).train()
    model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        evaluate(model, loader(pictures), NAMES, device="cpu", on_batch=lambda *_: 1 / 0)
    assert [module.training for module in model.modules()] == flags
    evaluate(model, loader(pictures), NAMES, device="cpu")
    assert [module.training for module in model.modules()] == flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("rect", [False, True])
def test_processes_that_share_the_pictures_measure_to_the_last_digit_what_one_measures(pictures, processes, rect):
    """Three pictures twice in three batches: of seven processes some have none."""
    dataset = DetectionDataset(pictures.subset([*range(len(pictures))] * 2), size=(64, 96), rect=rect)
    torch.manual_seed(0)
    model, options = Darknet(tiny()), {"device": "cpu", "conf_thres": 1e-4, "keep_detections": True}
    one = evaluate(model, make_loader(dataset, 2), NAMES, **options)
    loaders = [make_loader(dataset, 2, share=(rank, processes)) for rank in range(processes)]
    assert sum(map(len, loaders)) == len(make_loader(dataset, 2))
    parts = []
    for part in loaders:
        evaluate(model, part, NAMES, gather=lambda own: parts.append(own) or [own], **options)
    assert sum(map(len, parts)) == 6
    for part in loaders:
        shared = evaluate(model, part, NAMES, gather=lambda _: parts, **options)
        assert shared.metrics == one.metrics
        assert np.array_equal(shared.metrics.confusion, one.metrics.confusion)
        for ours, theirs in zip(shared.detections, one.detections, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_nan_is_an_error_and_not_a_bad_score(pictures):
    model = Darknet(tiny())
    with torch.no_grad():
        model.layers[0].conv.weight[0] = math.nan
    with pytest.raises(NumericsError, match="returns NaN"):
        evaluate(model, loader(pictures), NAMES, device="cpu")


def test_the_cut_before_suppression_is_that_of_the_settings(pictures):
    batches = loader(pictures)
    found = evaluate(LabelReader(batches), batches, NAMES, device="cpu", keep_detections=True, max_nms=1)
    assert [len(image.scores) for image in found.detections] == [1, 1, 1]


class FirstUse:
    """A clock that stands still, but that whatever is done the first time with tensors of a shape takes 5 seconds."""

    def __init__(self, monkeypatch, *places):
        self.now, self.done = 0.0, set()
        monkeypatch.setattr("utils.detection.evaluate.time.perf_counter", lambda: self.now)
        for place in places:
            module, name = place.rsplit(".", 1)
            monkeypatch.setattr(place, self.slow(name, getattr(importlib.import_module(module), name)))

    def slow(self, name, function):
        """The function, which takes a millisecond, or 5 seconds more."""

        def call(first, *more, **options):
            tensor = next((one for one in (first, *more) if isinstance(one, torch.Tensor)), None)
            key = name, None if tensor is None or name == "non_max_suppression" else tensor.shape
            self.now += 0.001 + 5 * (key not in self.done)
            self.done.add(key)
            return function(first, *more, **options)

        return call


STAGES = ("network_input", "detect", "non_max_suppression")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_what_is_done_the_first_time_is_in_no_time(pictures, monkeypatch, batch_size):
    """Three pictures; batches of their lengths are passed through before."""
    FirstUse(monkeypatch, *(f"utils.detection.evaluate.{name}" for name in STAGES))
    times = evaluate(Darknet(tiny()), loader(pictures, batch_size=batch_size), NAMES, device="cpu", warm=True).times
    assert times == pytest.approx([1000 * 0.001 * math.ceil(3 / batch_size) / 3] * 3)


class Bright(nn.Module):
    """A network that finds the cells of 8 × 8 pixels that are white, and gives each a box of the first anchor."""

    def __init__(self):
        super().__init__()
        self.network = tiny()

    def forward(self, images):
        """Objectness follows the brightness of a cell; the fine head finds nothing."""
        brightness = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8)
        coarse = torch.zeros(len(images), 21, *brightness.shape[2:])
        coarse[:, 4::7] = -20.0
        coarse[:, 4] = 40 * brightness[:, 0] - 20
        coarse[:, 5:7] = 20.0
        fine = torch.full((len(images), 21, images.shape[2] // 4, images.shape[3] // 4), -20.0)
        return Outputs((coarse, fine), {})


@pytest.mark.parametrize("view", [View(1, False), View(1, True), View(0.5, False), View(0.5, True)])
def test_what_a_view_shows_is_found_where_it_is_in_the_picture(view):
    """A white square of 16 × 16 pixels; at half the size it is one cell, whose box doubles."""
    images = torch.zeros(1, 3, 64, 96)
    images[:, :, 16:32, 64:80] = 1
    rows = detect_views(Bright(), images, (view,))[0]
    found = rows[rows[:, 4] > 0.9]
    if view.scale == 1:
        assert len(found) == 4
        torch.testing.assert_close(found[:, :2].mean(0), torch.tensor([72.0, 24]))
        assert {tuple(box) for box in found[:, 2:4].tolist()} == {(20.0, 16.0)}
    else:
        torch.testing.assert_close(found[:, :4], torch.tensor([[72.0, 24, 40, 32]]))


def test_the_whole_view_alone_is_plain_detection():
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(detect_views(Bright(), images, (View(1, False),)), detect(Bright(), images))


def test_views_of_any_scale_fit_the_network():
    torch.manual_seed(0)
    model = Darknet(tiny()).eval()
    with torch.inference_mode():
        rows = detect_views(model, torch.rand(1, 3, 64, 96), (View(0.83, True), View(0.67, False)))
    # 0.83: 53 × 80 in 56 × 80, 0.67: 43 × 64 in 48 × 64; three anchors in each cell of 8 and of 4 pixels
    assert rows.shape == (1, 3 * (7 * 10 + 14 * 20) + 3 * (6 * 8 + 12 * 16), 7)


def test_the_network_input_is_the_picture_in_0_to_1():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 3, 2, 3)
    torch.testing.assert_close(network_input(images, "cpu")[0, 0, 0], torch.tensor([0, 0.2, 1]))
