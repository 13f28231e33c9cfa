"""benchmarks.integers: peers quantize the float file of export.py, and rows compare all ways on it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import export
from benchmarks import integers, results
from models import Darknet
from tests.nets import tiny
from tests.test_checkpoint import contents
from utils.checkpoint import write_checkpoint
from utils.data.images import read_image
from utils.errors import InputError
from utils.runtime.engines import onnxruntime_engine
from utils.runtime.onnx_file import read_onnx


@pytest.fixture
def source(files, tmp_path):
    """The float file of a small network."""
    export.main([*files, "--output", str(tmp_path / "float.onnx")])
    return tmp_path / "float.onnx"


@pytest.mark.parametrize(("vnni", "bits"), [(True, 8), (False, 7)], ids=["vnni", "no-vnni"])
@pytest.mark.parametrize("peer", integers.PEERS)
def test_a_peers_file_opens_as_one_of_export_and_is_near_the_float_one(peer, vnni, bits, source, tmp_path, monkeypatch):
    if "nncf" in peer:
        pytest.importorskip("nncf")
    monkeypatch.setattr(integers, "has_vnni", lambda: vnni)
    images = np.random.default_rng(0).random((4, 1, 3, 64, 64), dtype=np.float32)
    path = tmp_path / "peer.onnx"
    path.write_bytes(integers.with_metadata(integers.PEERS[peer](source, images), source))
    file, float_file = read_onnx(path), read_onnx(source)
    assert not file.notes and file.metadata.precision == "int8" and file.metadata.reference is None
    assert file.metadata.network == float_file.metadata.network
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4]
    assert {weight.dtype for weight in weights} == {np.dtype(np.int8)}
    largest = max(np.abs(weight.astype(int)).max() for weight in weights)
    assert 2 ** (bits - 2) < largest <= 2 ** (bits - 1)
    heads, wanted = (
        onnxruntime_engine(one.path, one.metadata.tensors, one.batch, 1)(images[0]) for one in (file, float_file)
    )
    for head, other in zip(heads, wanted, strict=True):
        assert 0 < np.linalg.norm(head - other) < 0.1 * np.linalg.norm(other)


def test_peers_get_the_pictures_of_quantize(folder, tmp_path):
    """quantize.py calibrates with train pictures: all nine, once each, as there are fewer than 128."""
    write_checkpoint(tmp_path / "n.pt", contents(Darknet(tiny())))
    found = integers.calibration_images(str(folder / "d.data"), tmp_path / "n.pt", 64)
    assert found.shape == (9, 1, 3, 64, 64) and len({image.tobytes() for image in found}) == 9
    images = [read_image(folder / "images" / f"{number}.png") for number in range(9)]
    assert found.mean() == pytest.approx(np.mean(images) / 255)


def test_a_row_waits_for_its_float_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name in integers.ROWS:
        with pytest.raises(InputError, match=f"no float network; run the row goal-{name.removesuffix('-int8')} first"):
            results.finish(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else name)
    with pytest.raises(InputError, match="chess-int8: needs the package nncf; pip install -r requirements-dev"):
        results.finish("chess-int8")


def test_all_ways_begin_with_the_float_file_and_are_not_taken_twice(tmp_path, monkeypatch):
    """The scripts and peers are stand-ins that leave the file they are asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    runs, commands = tmp_path / "runs/results", []
    for row in ("goal-chess/balanced/tune", "chess-yolov3-tiny"):
        (runs / row / "weights").mkdir(parents=True)
        (runs / row / "weights/best.pt").touch()

    def python(*command):
        commands.append(command)
        if command[0] == "export.py":
            (tmp_path / command[-1]).touch()
        elif command[0] == "quantize.py":
            run = runs / "chess-int8" / command[command.index("--name") + 1]
            run.mkdir(parents=True)
            (run / "model.pt").touch()
        return json.dumps({"networks": [word for word in command if ".onnx" in word]})

    peers = {label: lambda source, images: (source.name, images) for label in integers.PEERS}
    monkeypatch.setattr(integers, "PEERS", peers)
    monkeypatch.setattr(integers, "calibration_images", lambda *_: "pictures")
    monkeypatch.setattr(integers, "with_metadata", lambda made, source: f"{made}".encode())
    monkeypatch.setattr(integers, "version", lambda package: "1")
    monkeypatch.setattr(integers, "python", python)
    monkeypatch.setattr(integers, "train", lambda folder, command: commands.append(tuple(command)))
    document = results.finish("chess-int8").document
    assert [network.partition("=")[0] for network in document["networks"]] == [
        "float", *integers.CALIBRATED, integers.TRAINED, *integers.PEERS
    ]  # fmt: skip
    starts = [command for command in commands if command[0] in ("quantize.py", "train.py")]
    weights = "runs/results/goal-chess/balanced/tune/weights/best.pt"
    assert len(starts) == 4 and all(command[command.index("--weights") + 1] == weights for command in starts)
    assert starts[-1][starts[-1].index("--t_weights") + 1] == "runs/results/chess-yolov3-tiny/weights/best.pt"
    assert [("--int8" in command) for command in commands if command[0] == "export.py"] == [False] + [True] * 4
    assert (runs / "chess-int8/nncf.quantize.onnx").read_text() == "('float.onnx', 'pictures')"
    commands.clear()
    results.finish("chess-int8")
    assert [command[0] for command in commands] == ["train.py", "-m"]


def test_the_mean_is_over_rows_with_the_same_networks():
    """A row that was stored before has other networks; (-0.01 - 0.03) / 2 = -0.02."""

    def document(value, *names):
        change = {key: [value, value - 0.03, value + 0.04] for key in integers.DIFFERENCES}
        return {"networks": [{"network": name, **change} for name in names]}

    stored = {"roadsigns-int8": document(-0.01, "a", "b"), "bccd-int8": document(-0.5, "a")}
    assert integers.mean_section(stored) == []
    lines = "\n".join(integers.mean_section({**stored, "chess-int8": document(-0.03, "a", "b")}))
    assert "mean of roadsigns-int8, chess-int8" in lines and "| b   | -0.020 [-0.041, +0.008] |" in lines
