"""The clients of examples/: they find what detect.py finds, with nothing of this repository."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import detect
import export
from tests.nets import tiny, with_heads
from tests.test_export import NEEDS_IMPORTER, NEEDS_OPENVINO, eager
from utils.checkpoint import write_checkpoint
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.data.images import write_image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PACKAGES = {"cv2", "ncnn", "numpy", "onnxruntime", "openvino"}
NAMES = ("traffic light", "dög")
SIZE = 64, 96
PICTURES = {"landscape": (61, 131), "portrait": (97, 65)}
"""Heights and widths. Letterboxes of both are padded by an odd number of pixels."""


def network(new_coords: bool = False, channels: int = 3) -> Network:
    """Two heads of two classes. OpenCV reads all of its blocks."""
    made = with_heads(tiny(), scale_x_y=1.5, new_coords=new_coords)
    blocks = [
        replace(block, activation="leaky") if getattr(block, "activation", "") == "mish" else block
        for block in made.blocks
    ]
    if new_coords:
        for head in made.heads:
            blocks[head - 1] = replace(blocks[head - 1], activation="logistic")
    net = replace(made.net, height=SIZE[0], width=SIZE[1], channels=channels)
    return replace(made, net=net, blocks=tuple(blocks))


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
    "OpenVINO": ("openvino_client", "a.xml", ("--format", "openvino", "--decode")),
    "ncnn": ("ncnn_client", "a.ncnn.param", ("--format", "ncnn")),
    "OpenCV": ("opencv_client", "rows.onnx", ("--decode",)),
    "OpenCV, Darknet": ("opencv_client", "a.cfg", ("--format", "darknet", "--fold")),
}
"""Client, its file, and the flags of export.py for that."""
FILE_FLAGS = ("--stretch", "--conf-thres", "0.4", "--iou-thres", "0.45")
"""What a file tells its client, and detect.py, too."""


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
        output = path.with_suffix(".weights") if path.suffix == ".cfg" else path
        export.main(["--weights", str(folder / network / "a.pt"), "--output", str(output), *flags])
    return path


@pytest.fixture
def detections(folder, tmp_path, capsys):
    """Call detect.py: rows of class, confidence and box for every picture."""

    def call(network: str, *flags: str) -> dict[str, np.ndarray]:
        files = ["--weights", str(folder / network / "a.pt"), "--source", str(folder / "images")]
        capsys.readouterr()
        detect.main([*files, "--nosave", "--json", "--output", str(tmp_path / "runs"), *flags])
        documents = json.loads(capsys.readouterr().out)
        keys = ("class", "confidence", "box")
        return {
            Path(document["source"]).stem: np.array(
                [np.hstack([row[key] for key in keys]) for row in document["detections"]]
            )
            for document in documents
        }

    return call


def assert_same(want: np.ndarray, lines: list[str]):
    """The same objects, best first: boxes within half a pixel of the picture, scores within 1e-3."""
    words = [line.split(maxsplit=5) for line in lines]
    labels = [int(label) if label.isdigit() else NAMES.index(label) for *_, label in words]
    have = np.column_stack([labels, np.array([numbers for *numbers, _ in words], float)])
    assert len(want) == len(have) > 30
    assert (np.diff(have[:, 1]) <= 0).all()
    gaps = np.abs(want[:, None] - have[None]) / (0.5, 1e-3, 0.5, 0.5, 0.5, 0.5)
    assert (gaps.max(axis=2).min(axis=1) < 1).all() and (gaps.max(axis=2).min(axis=0) < 1).all()


def marks(client: str):
    return NEEDS_OPENVINO if "OpenVINO" in client else NEEDS_IMPORTER if "Darknet" in client else ()


CASES = [
    pytest.param(network, *case, id=f"{client}, {network}", marks=marks(client))
    for client, case in RUNTIMES.items()
    for network in NETWORKS
    if network != "grey" or case[0] != "opencv_client"
]
CASES.append(pytest.param("plain", "onnxruntime_client", "told.onnx", FILE_FLAGS, id="onnxruntime, --stretch"))


@pytest.mark.parametrize(("network", "client", "name", "flags"), CASES)
def test_a_client_finds_what_detect_finds(network, client, name, flags, folder, detections, capsys):
    if client != "opencv_client":
        pytest.importorskip(client.removesuffix("_client"))
    path = exported(folder, network, name, flags)
    want = detections(network, *(flags if flags == FILE_FLAGS else ()))
    spec = importlib.util.spec_from_file_location(client, EXAMPLES / f"{client}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    more = (str(SIZE[1]), str(SIZE[0]), str(folder / "classes.names")) if client == "opencv_client" else ()
    for picture, rows in want.items():
        capsys.readouterr()
        module.main(str(path), str(folder / "images" / f"{picture}.png"), *more)
        assert_same(rows, capsys.readouterr().out.splitlines())


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
    path = exported(folder, "plain", f"{'any' if len(flags) > 1 else 'nms'}.onnx", flags)
    for picture, rows in detections("plain").items():
        command = [str(cpp_client), str(path), str(folder / "images" / f"{picture}.png")]
        assert_same(rows, subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def test_clients_use_nothing_of_this_repository():
    for path in EXAMPLES.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert names <= PACKAGES | {"json", "sys"}, path.name


def test_the_readme_names_every_client():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((\w+\.\w+)\)", text)) == {path.name for path in EXAMPLES.glob("*_client.*")}
