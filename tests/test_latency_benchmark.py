"""benchmarks.latency: every network in every runtime that reads it, and how much faster than OpenCV it is."""

from __future__ import annotations

import json

import cv2
import pytest
import torch

import export
from benchmarks import latency
from models import Darknet
from tests.nets import TINY
from utils.checkpoint import write_darknet
from utils.darknet import cfg as cfg_file
from utils.errors import InputError

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
def test_a_cfg_is_timed_in_every_runtime(call, tmp_path):
    """A quarter of the pixels is a quarter of the multiply-adds."""
    runtimes = ("opencv", "torch", "onnxruntime", "ncnn")
    rows = call("n.cfg", "small=n.cfg@32", "--runtimes", *runtimes)["rows"]
    assert [(row["height"], row["runtime"]) for row in rows] == [(side, name) for side in (64, 32) for name in runtimes]
    assert all(0 < row["ms"] <= row["p90"] for row in rows)
    assert rows[0]["faster"] == 1
    assert rows[3]["faster"] == pytest.approx(rows[0]["ms"] / rows[3]["ms"])
    assert rows[0]["macs"] == pytest.approx(4 * rows[4]["macs"])
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"n.cfg"}


def test_a_file_of_export_py_is_run_as_it_is_and_only_where_it_can_be(call, tmp_path):
    torch.manual_seed(0)
    write_darknet(tmp_path / "n.weights", Darknet(cfg_file.load(tmp_path / "n.cfg")))
    export.main(["--cfg", "n.cfg", "--weights", "n.weights", "--format", "ncnn", "--output", "a.ncnn.param"])
    rows = call("small=a.ncnn.param", "n.cfg", "--runtimes", "torch", "ncnn")["rows"]
    assert [(row["network"], row["runtime"]) for row in rows] == [
        ("small", "ncnn"),
        ("n.cfg", "torch"),
        ("n.cfg", "ncnn"),
    ]
    assert rows[1]["faster"] is None
    files = [tmp_path / f"a.ncnn.{suffix}" for suffix in ("param", "bin", "json")]
    assert rows[0]["bytes"] == sum(file.stat().st_size for file in files)


def test_the_table_says_where_it_was_measured(call, capsys):
    latency.main(["a network=n.cfg", "--runtimes", "torch", *QUICK])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| network ") and lines[2].startswith("| a network | torch ")
    assert "PyTorch" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("n.cfg", "n.cfg"), "two networks have one name"),
        (("none.cfg",), r"none\.cfg: no such file"),
        (("none.onnx",), r"none\.onnx"),
        (("n.cfg", "--plot", "p.png"), "unknown flag --plot"),
        (("n.cfg", "--img_size", "50"), "none of these networks runs"),
    ],
)
def test_what_cannot_be_timed_is_refused(call, flags, message):
    with pytest.raises(InputError, match=message):
        call(*flags, "--runtimes", "opencv")
