"""detect.py: against OpenCV's detections, and what it writes, prints and refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import cv2
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

import detect
from tests.media import write_video
from tests.nets import PUBLIC_MODELS, lined, opencv_epsilon, printed
from tests.test_evaluation import STAGES, FirstUse
from utils.checkpoint import model_document, write_checkpoint
from utils.darknet import cfg, weights
from utils.data.images import read_image, write_image
from utils.errors import SuiteError

PICTURES = ("dog.jpg", "horses.jpg", "person.jpg")


CFG = lined(
    """
    [net] width=32 height=32 channels={channels}
    [convolutional] filters=7 size=16 stride=16 activation=linear
    [yolo] mask=0 anchors=16,16 classes=2 num=1
    """
)
"""A net whose four cells are the quarters of the picture."""
SURE = 5.0
"""Logit of the objectness and of the first class in every cell; the second class has the opposite."""
CONFIDENCE = 1 / (1 + np.exp(-SURE)) ** 2


def overlap(a, b) -> float:
    """IoU of two boxes x1, y1, x2, y2."""
    return box_iou(torch.tensor([a]), torch.tensor([b])).item()


def clipped(xywh, image: np.ndarray) -> list[float]:
    """OpenCV's box as corners inside the picture."""
    height, width = image.shape[:2]
    x, y, w, h = xywh
    return [*np.clip([x, y, x + w, y + h], 0, [width, height] * 2)]


@pytest.mark.parametrize("model", PUBLIC_MODELS)
def test_detections_equal_those_of_opencv(model, shared, capsys):
    """Stretched, 0.25, 0.45: the same objects as OpenCV 4.14's, IoU > 0.9 and scores to 0.01; nothing more or less."""
    models, samples = shared / "data/weights", shared / "data/samples"
    flags = ["--stretch", "--conf-thres", "0.25", "--iou-thres", "0.45", "--nosave", "--device", "cpu"]
    flags += ["--cfg", f"{models}/{model}.cfg", "--weights", f"{models}/{model.removesuffix('-mask123')}.weights"]
    with opencv_epsilon():
        documents = printed(capsys, detect.main, *flags, "--source", f"{samples}/*.jpg")
    assert [Path(document["source"]).name for document in documents] == list(PICTURES)
    expected = json.loads((models / "expected/cv2_4.14_detections.json").read_text())[model]
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


@pytest.fixture
def net(tmp_path, monkeypatch):
    """Flags of a net that finds one object of class 0 in every quarter of a picture, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return quarters(tmp_path)


@pytest.fixture
def detected(net, capsys):
    """Call detect.py, which writes nothing; returns what it finds in one image."""

    def call(*flags: str) -> dict:
        (document,) = printed(capsys, detect.main, *net, "--nosave", *flags)
        return document

    return call


def quarters(folder: Path, channels: int = 3) -> list[str]:
    (folder / "net.cfg").write_text(CFG.format(channels=channels))
    network = cfg.load(folder / "net.cfg")
    arrays = {spec.key: np.zeros(spec.shape, np.float32) for spec in weights.tensors(network)}
    arrays["layers.0.conv.bias"][4:] = SURE, SURE, -SURE
    weights.write(folder / "net.weights", network, arrays)
    return ["--cfg", "net.cfg", "--weights", "net.weights", "--device", "cpu"]


def picture(path: str, height: int = 64, width: int = 64) -> str:
    write_image(path, np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    return path


def video(path: str, count: int = 5, size: tuple[int, int] = (64, 48)) -> str:
    return str(write_video(path, (np.full((*size[::-1], 3), 20 * number, np.uint8) for number in range(count))))


def tree(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def length(path: str) -> int:
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    return sum(1 for _ in iter(lambda: capture.read()[0], False))


def test_first_uses_are_in_no_time(net, capsys, monkeypatch):
    FirstUse(monkeypatch, *(f"utils.detection.evaluate.{name}" for name in STAGES))
    detect.main([*net, "--source", picture("a.png"), "--nosave"])
    frame, summary = capsys.readouterr().out.splitlines()
    assert frame.endswith("(3.0 ms)")
    assert summary == "1 frame, 3.0 ms each (preprocess 1.0, inference 1.0, nms 1.0)"


def test_boxes_are_in_pixels_of_the_picture(detected):
    """64 × 64 in an input of 32 × 32: each cell of 16 is a quarter, 32 pixels wide."""
    document = detected("--source", picture("a.png"))
    assert (document["source"], document["frame"]) == ("a.png", 0)
    boxes = sorted(found["box"] for found in document["detections"])
    np.testing.assert_allclose(boxes, [[0, 0, 32, 32], [0, 32, 32, 64], [32, 0, 64, 32], [32, 32, 64, 64]], atol=1e-3)
    for found in document["detections"]:
        assert (found["class"], found["name"]) == (0, "0")
        assert found["confidence"] == pytest.approx(CONFIDENCE, abs=1e-5)
    assert tree(".") == ["a.png", "net.cfg", "net.weights"]


@pytest.mark.parametrize("mode", ["--letterbox", "--stretch"])
def test_boxes_are_clipped_to_a_wide_picture(detected, mode):
    """64 × 32 letterboxed lies in rows 8…24 of the input; the cells' other halves are outside the picture."""
    expected = [[0, 0, 32, 16], [0, 16, 32, 32], [32, 0, 64, 16], [32, 16, 64, 32]]
    document = detected(mode, "--source", picture("a.png", 32, 64))
    np.testing.assert_allclose(sorted(found["box"] for found in document["detections"]), expected, atol=1e-3)


def test_a_larger_input_has_more_cells_and_a_grey_net_reads_colour(detected):
    quarters(Path(), channels=1)
    assert len(detected("--source", picture("a.png"), "--img-size", "64", "32")["detections"]) == 8


def test_everything_that_can_be_written_is_written(net, capsys):
    picture("a.png")
    Path("our.names").write_text("cat\n../dog\n")
    detect.main([*net, "--names", "our.names", "--source", "a.png", "--save-txt", "--save-conf", "--save-crop"])
    out = "runs/detect/exp"
    crops = [f"crops/cat/a_{k}.jpg" for k in (1, 2, 3, 4)]
    assert tree(out) == ["a.png", "args.yaml", *crops, "env.json", "labels/a.txt"]
    assert sorted(Path(out, "labels/a.txt").read_text().splitlines()) == sorted(
        f"0 {x} {y} 0.500000 0.500000 {CONFIDENCE:.6f}"
        for x in ("0.250000", "0.750000")
        for y in ("0.250000", "0.750000")
    )
    assert read_image(f"{out}/crops/cat/a_1.jpg").shape == (32, 32, 3)
    assert (read_image(f"{out}/a.png") != read_image("a.png")).any()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a.png 64x64: 4 cat (")
    assert lines[1] == "results in runs/detect/exp"
    assert lines[2].startswith("1 frame, ")


def test_nothing_found_is_an_empty_label_file(net, capsys):
    detect.main([*net, "--source", picture("a.png"), "--classes", "1", "--save-txt", "--nosave", "--output", "out"])
    assert tree("out") == ["labels/a.txt"]
    assert Path("out/labels/a.txt").read_text() == ""
    assert capsys.readouterr().out.startswith("a.png 64x64: nothing (")


def test_no_file_is_overwritten(net, capsys):
    """A second run into the same folder, and two pictures with one stem, get numbers; what was there stays."""
    picture("a.png")
    picture("a.jpg")
    flags = [*net, "--source", "a.*g", "--output", "out", "--save-txt", "--save-crop", "--json"]
    detect.main(flags)
    first = {name: Path("out", name).read_bytes() for name in tree("out")}
    assert {"a.jpg", "a_2.png", "labels/a.txt", "labels/a_2.txt"} < set(first)
    detect.main(flags)
    assert {name: Path("out", name).read_bytes() for name in first} == first
    assert {"a_3.jpg", "a_4.png", "labels/a_3.txt", "labels/a_4.txt"} < set(tree("out"))
    assert len(tree("out")) == 2 * len(first)


def test_the_source_may_lie_in_the_output_folder(net, capsys):
    before = Path(picture("a.png")).read_bytes()
    detect.main([*net, "--source", "a.png", "--output", "."])
    assert Path("a.png").read_bytes() == before
    assert Path("a_2.png").is_file()


@pytest.mark.parametrize(("code", "suffix"), [("mp4v", ".mp4"), ("MJPG", ".avi")])
def test_a_video_gives_a_video_and_a_line_a_frame(net, capsys, code, suffix):
    detect.main([*net, "--source", video("a.avi"), "--json-lines", "--save-txt", "--output", "out", "--fourcc", code])
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(document["source"], document["frame"]) for document in documents] == [("a.avi", n) for n in range(5)]
    assert tree("out") == [f"a{suffix}", *[f"labels/a_00000{n}.txt" for n in range(5)]]
    assert length(f"out/a{suffix}") == 5


def test_every_video_of_a_folder_gets_its_own_file(net, capsys):
    os.mkdir("in")
    video("in/a.avi", 2)
    video("in/b.avi", 3, (80, 50))
    picture("in/c.png")
    detect.main([*net, "--source", "in", "--output", "out"])
    assert tree("out") == ["a.mp4", "b.mp4", "c.png"]
    assert (length("out/a.mp4"), length("out/b.mp4")) == (2, 3)


def test_an_interrupted_run_leaves_a_whole_array_and_a_whole_video(net, capsys, monkeypatch):
    draw = Mock(wraps=detect.draw_detections, side_effect=[*[DEFAULT] * 3, KeyboardInterrupt])
    monkeypatch.setattr(detect, "draw_detections", draw)
    with pytest.raises(KeyboardInterrupt):
        detect.main([*net, "--source", video("a.avi"), "--output", "out", "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 3
    assert tree("out") == ["a.mp4"]
    assert length("out/a.mp4") == 3


def test_names_come_from_names_then_data_then_the_numbers(net, capsys):
    Path("our.names").write_text("cat\ndog\n")
    Path("set.data").write_text("names = their.names\n")
    Path("their.names").write_text("bird\nfish\n")
    flags = [*net, "--source", picture("a.png"), "--nosave"]
    for given, name in (
        (["--names", "our.names", "--data", "set.data"], "cat"),
        (["--data", "set.data"], "bird"),
        ([], "0"),
    ):
        detect.main([*flags, *given])
        assert f": 4 {name} (" in capsys.readouterr().out


def test_a_checkpoint_brings_its_cfg_and_names(net, capsys):
    network = cfg.load("net.cfg")
    state = {key: torch.from_numpy(array.copy()) for key, array in weights.read("net.weights", network).items()}
    write_checkpoint(Path("best.pt"), model_document(state, network, ("cat", "dog"), ()))
    for flags in ([], ["--cfg", "net.cfg"]):
        detect.main(["--weights", "best.pt", *flags, "--source", picture("a.png"), "--nosave", "--device", "cpu"])
        assert ": 4 cat (" in capsys.readouterr().out


NAMES = ("with space", "line\nbreak", "'quote\"", "-dash", "\u202eright", "%03d", "concat:a")
NAMES += ("x" * 251, "🐕" * 55, "\udc80")


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_works(net, capsys, name):
    os.mkdir(name)
    picture(f"{name}/a.png")
    os.rename(f"{name}/a.png", f"{name}/{name}.png")
    detect.main([*net, f"--source={name}", f"--output={name}/out", "--save-txt", "--save-crop"])
    assert len(tree(f"{name}/out")) == 6
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_long_name_is_cut_between_its_letters(net):
    """Of 240 bytes 223 may stay: 74 letters of 3 bytes."""
    os.rename(video("a.avi", 1), f"{'雪' * 80}.avi")
    detect.main([*net, "--source", f"{'雪' * 80}.avi", "--output", "out", "--save-txt", "--save-crop"])
    assert f"{'雪' * 74}.mp4" in tree("out") and all(map(str.isprintable, tree("out")))


def fails(flags: list[str]) -> str:
    """Message of a run that must end with status 2 and one line, having written nothing."""
    before = tree(".")
    with pytest.raises(SuiteError) as caught:
        detect.main(flags)
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert tree(".") == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "text.jpg"], "text.jpg: neither an image nor a video that can be decoded"),
        (["--weights", "gone.weights"], "gone.weights: no such file"),
        (["--weights", "text.jpg"], "text.jpg: "),
        (["--names", "one.names"], "one.names: 1 names, but net.weights has 2 classes"),
        (["--classes", "2"], "--classes 2: the network's classes are 0..1"),
        (["--img_size", "33"], "--img_size 33: not a multiple of 16"),
        (["--fourcc", "mp4"], "--fourcc: 'mp4' is not a code of four letters"),
        (["--source", "a.avi", "--fourcc", "zzzz"], "--fourcc zzzz: this OpenCV cannot write such a video"),
        (["--save-conf"], "--save-conf: goes with --save-txt"),
        (["--output", "text.jpg"], "--output text.jpg: exists and is no folder"),
        (["--output", "out", "--name", "mine"], "--output: is the folder itself"),
        (["--half"], "--half: float16 needs a GPU"),
        (
            ["--stream-timeout", "0.3", "--source", "http://127.0.0.1:9/"],
            "--source http://127.0.0.1:9/: no frame within",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(net, flags, message):
    picture("a.png")
    video("a.avi")
    Path("text.jpg").write_text("hello")
    Path("one.names").write_text("cat\n")
    assert message in fails([*net, "--source", "a.png", *flags])


def test_what_is_wrong_before_the_network_is_found_without_torch(net, refusals):
    picture("a.png")
    cases = {
        "gone.jpg: no such": ["--source", "gone.jpg"],
        "--classes": ["--classes", "9"],
        "net.weights": ["--source", "net.weights"],
    }
    lines = refusals(*(("detect.py", *net, "--source", "a.png", *flags) for flags in cases.values()))
    assert all(message in line for message, line in zip(cases, lines, strict=True)), lines


@pytest.mark.skipif(sys.platform != "linux", reason="tells a missing display by variables of X11 and Wayland")
def test_view_img_without_a_display_is_an_error(net, monkeypatch):
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(variable, raising=False)
    assert "--view-img: no window can be opened" in fails([*net, "--source", picture("a.png"), "--view-img"])
