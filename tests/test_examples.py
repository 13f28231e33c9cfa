"""The clients of examples/: they find what detect.py finds, with nothing of this repository."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import detect
import export
from tests.nets import NEEDS_IMPORTER, TINY, printed, with_heads
from tests.test_export import NEEDS_LITERT, NEEDS_OPENVINO, eager
from utils.checkpoint import write_checkpoint
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network, parse
from utils.data.images import fit, read_image, write_image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PACKAGES = {"ai_edge_litert", "cv2", "ncnn", "numpy", "onnxruntime", "openvino"}
NAMES = ("traffic light", "dög")
SIZE = 64, 96
PICTURES = {"landscape": (61, 131), "portrait": (97, 65)}
"""Heights and widths. Letterboxes of both are padded by an odd number of pixels."""


def network(new_coords: bool = False, channels: int = 3) -> Network:
    """Two heads of two classes. OpenCV reads all of its blocks."""
    size = f"width={SIZE[1]}\nheight={SIZE[0]}\nchannels={channels}"
    text = TINY.replace("width=64\nheight=64\nchannels=3", size).replace("mish", "leaky")
    if new_coords:
        text = text.replace("filters=21\nsize=1\nactivation=linear", "filters=21\nsize=1\nactivation=logistic")
    return with_heads(parse(text, "n.cfg"), scale_x_y=1.5, new_coords=new_coords)


NETWORKS = {
    "plain": (network(), -2),
    "new_coords": (network(new_coords=True), -2),
    "grey": (network(channels=1), -4),
}
"""With a bias of the objectness that leaves between 30 and 150 objects of the 300 that a picture may have."""
RUNTIMES = {
    "onnxruntime, heads": ("onnxruntime_client", "a.onnx", ()),
    "onnxruntime, --decode": ("onnxruntime_client", "rows.onnx", ("--decode",)),
    "onnxruntime, --nms": ("onnxruntime_client", "nms.onnx", ("--nms",)),
    "onnxruntime, --dynamic-batch": ("onnxruntime_client", "any.onnx", ("--nms", "--dynamic-batch")),
    "OpenVINO, heads": ("openvino_client", "a.xml", ("--format", "openvino")),
    "OpenVINO, --decode": ("openvino_client", "rows.xml", ("--format", "openvino", "--decode")),
    "LiteRT": ("litert_client", "a.tflite", ("--format", "tflite")),
    "LiteRT, --decode": ("litert_client", "rows.tflite", ("--format", "tflite", "--decode")),
    "ncnn": ("ncnn_client", "a.ncnn.param", ("--format", "ncnn")),
    "OpenCV": ("opencv_client", "rows.onnx", ("--decode",)),
    "OpenCV, Darknet": ("opencv_client", "a.weights", ("--format", "darknet", "--fold")),
}
"""Client, its file, and the flags of export.py for that."""
FILE_FLAGS = ("--stretch", "--conf-thres", "0.4", "--iou-thres", "0.45")
"""What a file tells its client, and detect.py, too."""


def loaded(client: str):
    """The module of a client; its packages may be missing."""
    try:
        spec = importlib.util.spec_from_file_location(client, EXAMPLES / f"{client}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as failure:
        pytest.skip(str(failure))
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for name, shape in PICTURES.items():
        write_image(folder / "images" / f"{name}.png", rng.integers(0, 255, (*shape, 3), dtype=np.uint8))
    (folder / "classes.names").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    for name, (made, bias) in NETWORKS.items():
        model = eager(made)
        with torch.no_grad():
            for head in made.heads:
                model.layers[head - 1].conv.bias[4 :: 5 + made.classes] = bias
        document = {"model": model.state_dict(), "ema": None, "cfg": format_network(made), "names": list(NAMES)}
        (folder / name).mkdir()
        write_checkpoint(folder / name / "a.pt", document)
    return folder


def exported(folder: Path, network: str, name: str, flags: tuple[str, ...]) -> Path:
    """The file of a network, made if it is not there."""
    path = folder / network / name
    if not path.exists():
        export.main(["--weights", str(folder / network / "a.pt"), "--output", str(path), *flags])
    return path


@pytest.fixture
def detections(folder, tmp_path, capsys):
    """Call detect.py: rows of class, confidence and box for every picture."""

    def call(network: str, *flags: str) -> dict[str, np.ndarray]:
        files = ["--weights", str(folder / network / "a.pt"), "--source", str(folder / "images"), "--nosave"]
        documents = printed(capsys, detect.main, *files, "--output", str(tmp_path / "runs"), *flags)
        keys = ("class", "confidence", "box")
        rows = ([np.hstack([row[key] for key in keys]) for row in document["detections"]] for document in documents)
        return {Path(document["source"]).stem: np.array(found) for document, found in zip(documents, rows, strict=True)}

    return call


def parsed(lines: list[str]) -> np.ndarray:
    """Rows of class, confidence and box of what a client prints."""
    words = [line.split(maxsplit=5) for line in lines]
    labels = [int(label) if label.isdigit() else NAMES.index(label) for *_, label in words]
    return np.column_stack([labels, np.array([numbers for *numbers, _ in words], float)])


def assert_same(want: np.ndarray, have: np.ndarray):
    """The same objects, best first: boxes within half a pixel of the picture, scores within 1e-3."""
    assert len(want) == len(have) > 30
    assert (np.diff(have[:, 1]) <= 0).all()
    gaps = np.abs(want[:, None] - have[None]) / (0.5, 1e-3, 0.5, 0.5, 0.5, 0.5)
    assert (gaps.max(axis=2).min(axis=1) < 1).all() and (gaps.max(axis=2).min(axis=0) < 1).all()


def marks(client: str):
    needs = {"OpenVINO": NEEDS_OPENVINO, "LiteRT": NEEDS_LITERT, "OpenCV, Darknet": NEEDS_IMPORTER}
    return needs.get(client.removesuffix(", --decode"), ())


CASES = [
    pytest.param(network, *case, id=f"{client}, {network}", marks=marks(client))
    for client, case in RUNTIMES.items()
    for network in NETWORKS
]
CASES.append(pytest.param("plain", "onnxruntime_client", "told.onnx", FILE_FLAGS, id="onnxruntime, --stretch"))


@pytest.mark.parametrize(("network", "client", "name", "flags"), CASES)
def test_a_client_finds_what_detect_finds(network, client, name, flags, folder, detections, capsys):
    if client not in ("opencv_client", "litert_client"):
        pytest.importorskip(client.removesuffix("_client"))
    path = exported(folder, network, name, flags)
    want = detections(network, *(flags if flags == FILE_FLAGS else ()))
    module = loaded(client)
    more = (str(folder / "classes.names"),) if client == "opencv_client" else ()
    for picture, rows in want.items():
        capsys.readouterr()
        module.main(str(path), str(folder / "images" / f"{picture}.png"), *more)
        assert_same(rows, parsed(capsys.readouterr().out.splitlines()))


def test_classes_are_suppressed_one_by_one(detections):
    """In these pictures a client that suppresses across classes finds less."""
    agnostic = detections("plain", "--agnostic-nms")
    assert all(len(rows) > len(agnostic[picture]) for picture, rows in detections("plain").items())


@pytest.fixture(scope="module")
def cpp_client(tmp_path_factory) -> Path:
    """The client in C++, compiled. ONNXRUNTIME_ROOT is a release of onnxruntime: include/ and lib/."""
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", "/usr"))
    includes = [folder for folder in (root / "include", root / "include" / "onnxruntime") if (folder / HEADER).exists()]
    if not includes or not shutil.which("g++"):
        pytest.skip(f"no g++ or no {HEADER}: set ONNXRUNTIME_ROOT to a release of onnxruntime")
    probe = subprocess.run(["pkg-config", "--cflags", "opencv4"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip("no headers of OpenCV: apt install libopencv-dev")
    client = tmp_path_factory.mktemp("cpp") / "client"
    command = ["g++", "-std=c++17", "-Wall", "-Werror", str(EXAMPLES / "onnxruntime_client.cpp"), "-o", str(client)]
    command += [f"-isystem{includes[0]}", *(word.replace("-I", "-isystem") for word in probe.stdout.split())]
    command += [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lonnxruntime"]
    subprocess.run([*command, *(f"-lopencv_{part}" for part in ("core", "imgproc", "imgcodecs"))], check=True)
    return client


HEADER = "onnxruntime_cxx_api.h"


@pytest.mark.parametrize("flags", [("--nms",), ("--nms", "--dynamic-batch")], ids=" ".join)
def test_the_client_in_cpp_finds_what_detect_finds(flags, cpp_client, folder, detections):
    assert "WeightBiasQuantization" in (EXAMPLES / "onnxruntime_client.cpp").read_text(encoding="utf-8")
    path = exported(folder, "plain", f"{'any' if len(flags) > 1 else 'nms'}.onnx", flags)
    for picture, rows in detections("plain").items():
        command = [str(cpp_client), str(path), str(folder / "images" / f"{picture}.png")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert_same(rows, parsed(done.stdout.splitlines()))


def resized(picture: np.ndarray, side: int, axis: int) -> np.ndarray:
    """Step 2 of the contract in docs/export.md: one side of a picture [H, W, C] by bilinear interpolation."""
    length = picture.shape[axis]
    u = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
    low = np.floor(u).astype(int)
    share = np.expand_dims(u - low, (1 - axis, 2))
    return (1 - share) * picture.take(low, axis) + share * picture.take(np.minimum(low + 1, length - 1), axis)


def by_the_formulas(path: Path, picture: np.ndarray) -> np.ndarray:
    """Rows of class, confidence and box of an RGB picture, as the contract in docs/export.md has them, cell by cell."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    facts = {key: json.loads(session.get_modelmeta().custom_metadata_map[key]) for key in ("input", "heads")}
    (h, w, _), H, W = picture.shape, facts["input"]["height"], facts["input"]["width"]  # noqa: N806 - as in the page
    s = min(W / w, H / h)
    inner_w, inner_h = max(1, round(w * s)), max(1, round(h * s))
    left, top = (W - inner_w) // 2, (H - inner_h) // 2
    values = np.full((H, W, 3), 114.0)
    shrunk = resized(resized(picture.astype(float), inner_w, 1), inner_h, 0)
    values[top : top + inner_h, left : left + inner_w] = np.round(shrunk)
    used, _ = fit(picture, (H, W))
    assert np.abs(values - used).max() <= 1  # OpenCV computes with 11 bits; a step changes scores by more than 1e-3
    candidates = []
    for head, spec in zip(
        session.run(None, {"images": np.float32(used.transpose(2, 0, 1) / 255)[None]}), facts["heads"], strict=True
    ):
        t = head.reshape(len(spec["anchors"]), 7, *head.shape[2:])
        scale, stride_x, stride_y = spec["scale_x_y"], W / head.shape[3], H / head.shape[2]
        for a, j, i in np.ndindex(t.shape[0], *t.shape[2:]):
            raw = t[a, :, j, i].astype(float)
            sigma = raw if spec["new_coords"] else 1 / (1 + np.exp(-raw))
            x = (scale * sigma[0] - (scale - 1) / 2 + i) * stride_x
            y = (scale * sigma[1] - (scale - 1) / 2 + j) * stride_y
            width, height = spec["anchors"][a] * (
                (2 * raw[2:4]) ** 2 if spec["new_coords"] else np.exp(np.minimum(raw[2:4], 10))
            )
            label = int(sigma[5:].argmax())
            candidates.append(
                (sigma[4] * sigma[5 + label], label, x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            )
    kept = []
    for score, label, *box in sorted((row for row in candidates if row[0] > 0.3), reverse=True)[:3000]:
        if all(label != other[0] or overlap(box, other[2:]) <= 0.6 for other in kept):
            kept.append((label, score, *box))
    rows = np.array(kept[:300])
    rows[:, 2:] = (rows[:, 2:] - (left, top, left, top)) * np.tile((w / inner_w, h / inner_h), 2)
    rows[:, 2:] = np.clip(rows[:, 2:], 0, (w, h, w, h))
    return rows


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes of corners."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = a, b
    shared = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
    return shared / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared)


@pytest.mark.parametrize("network", ["plain", "new_coords"])
def test_the_formulas_of_the_page_give_what_detect_finds(network, folder, detections):
    path = exported(folder, network, "a.onnx", ())
    for picture, rows in detections(network).items():
        assert_same(rows, by_the_formulas(path, read_image(folder / "images" / f"{picture}.png")))


def test_clients_use_nothing_of_this_repository():
    for path in EXAMPLES.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert names <= PACKAGES | {"json", "re", "sys"}, path.name


def test_the_readme_names_every_client():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((\w+\.\w+)\)", text)) == {path.name for path in EXAMPLES.glob("*_client.*")}


@pytest.mark.parametrize("client", ["onnxruntime_client", "openvino_client", "litert_client", "ncnn_client"])
def test_boxes_outside_of_the_picture_suppress_no_other_class(client):
    """In opposite corners, the second one as far outside as OpenCV's offset of its class moves it."""
    module = loaded(client)
    rows = np.array([[400, 400, 40, 40, 0.9, 1, 0], [-16, -16, 50, 50, 0.8, 0, 1]], np.float32)
    assert len(module.suppress(rows, 0.3, 0.6)) == 2
    assert len(module.suppress(rows[:0], 0.3, 0.6)) == 0
