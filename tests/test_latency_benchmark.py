"""benchmarks.latency: every network in every runtime that reads it, and how much faster than OpenCV it is."""

from __future__ import annotations

import json

import cv2
import pytest

import export
from benchmarks import latency
from benchmarks.latency import Row, with_gains
from benchmarks.runtimes import named
from tests.nets import TINY
from utils.errors import InputError
from utils.report.latency_plots import LatencyBar, plot_latency

pytest.importorskip("ncnn")
NEEDS_IMPORTER = pytest.mark.skipif(
    not hasattr(cv2.dnn, "readNetFromDarknet"), reason="OpenCV 5 reads no Darknet files"
)
QUICK = ("--threads", "1", "--rounds", "1")


@pytest.fixture
def call(folder, tmp_path, monkeypatch, capsys):
    """Call the benchmark beside n.cfg and d.data of conftest.py, without rests; returns its document."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "PAUSE", 0.0)
    (tmp_path / "n.cfg").write_text(TINY)

    def call(*flags: str) -> dict:
        capsys.readouterr()
        latency.main([*flags, *QUICK, "--json"])
        return json.loads(capsys.readouterr().out)

    return call


@NEEDS_IMPORTER
def test_a_cfg_is_measured_in_every_runtime(call, tmp_path):
    runtimes = ("opencv", "torch", "onnxruntime", "ncnn")
    document = call("n.cfg", "--runtimes", *runtimes, "--img_size", "32", "64", "--plot", "p.png")
    rows = document["rows"]
    assert [(row["height"], row["runtime"]) for row in rows] == [(side, name) for side in (32, 64) for name in runtimes]
    assert all(0 < row["ms"] <= row["p90"] for row in rows)
    assert rows[0]["faster"] == 1
    assert rows[3]["faster"] == pytest.approx(rows[0]["ms"] / rows[3]["ms"])
    assert rows[4]["macs"] == pytest.approx(4 * rows[0]["macs"])
    assert cv2.imread(str(tmp_path / "p.png")) is not None
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"n.cfg", "p.png"}


def test_ap50_is_the_same_in_every_runtime(call, folder):
    rows = call("n.cfg", "--runtimes", "torch", "ncnn", "onnxruntime", "--data", str(folder / "d.data"))["rows"]
    assert rows[0]["map50"] is not None
    assert [row["map50"] for row in rows[1:]] == pytest.approx([rows[0]["map50"]] * 2, abs=1e-3)


def test_a_file_of_export_py_is_run_as_it_is_and_only_where_it_can_be(call, tmp_path):
    latency.main(["n.cfg", "--runtimes", "torch", *QUICK])
    export.main(["--cfg", "n.cfg", "--weights", weights(tmp_path), "--format", "ncnn", "--output", "a.ncnn.param"])
    rows = call("small=a.ncnn.param", "n.cfg", "--runtimes", "torch", "ncnn", "--img_size", "64", "32")["rows"]
    found = [(row["network"], row["runtime"], row["height"]) for row in rows]
    assert found == [("small", "ncnn", 64), *(("n", name, side) for side in (64, 32) for name in ("torch", "ncnn"))]
    files = [tmp_path / f"a.ncnn.{suffix}" for suffix in ("param", "bin", "json")]
    assert rows[0]["bytes"] == sum(file.stat().st_size for file in files)


def weights(folder) -> str:
    import torch

    from models import Darknet
    from utils.darknet.cfg import load
    from utils.training.state import write_darknet

    torch.manual_seed(0)
    write_darknet(folder / "n.weights", Darknet(load(folder / "n.cfg")))
    return "n.weights"


def test_the_table_says_where_it_was_measured(call, capsys):
    latency.main(["a network=n.cfg", "--runtimes", "torch", *QUICK, "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| network ")
    assert lines[2].startswith("| a network | torch ")
    assert "PyTorch" in lines[-1]


def test_gains_are_over_opencv_with_the_same_network_input_and_threads():
    def row(network, runtime, ms, threads=2):
        return Row(network, runtime, "", 64, 64, threads, 1, 1, ms, ms, 5, None)

    rows = [row("a", "opencv", 30), row("a", "ncnn", 20), row("b", "ncnn", 5), row("a", "ncnn", 10, 1)]
    assert [found.faster for found in with_gains(rows)] == [1, 1.5, None, None]


@pytest.mark.parametrize(("text", "name"), [
    ("cfg/yolov4-tiny.cfg", "yolov4-tiny"), ("half=a.pt", "half"), ("x/a.cfg:y/b.weights", "b"),
    ("a.ncnn.param", "a"), ("ours, float=a.cfg:b.weights", "ours, float"),
])  # fmt: skip
def test_a_network_is_named_for_its_file_unless_it_has_a_name(text, name):
    assert named(text).name == name


@pytest.mark.parametrize(("flags", "message"), [
    (("n.cfg", "n.cfg"), "two networks have one name"),
    (("n.cfg", "--plot", "p.svg"), r"--plot p\.svg: \.png and \.jpg"),
    (("none.cfg",), r"none\.cfg: no such file"),
    (("none.onnx",), "none of these networks runs"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(call, flags, message):
    with pytest.raises(InputError, match=message):
        call(*flags, "--runtimes", "opencv")


def test_a_picture_of_nothing_and_of_two_panels(tmp_path):
    plot_latency([], tmp_path / "none.png")
    bars = [LatencyBar(panel, "n", name, 3, 4) for panel in ("a", "b") for name in ("opencv", "ncnn")]
    plot_latency(bars, tmp_path / "two.png")
    none, two = (cv2.imread(str(tmp_path / name)) for name in ("none.png", "two.png"))
    assert two.shape[1] == pytest.approx(2 * none.shape[1], rel=0.01)
