"""Converters of other projects: the lines of docs/export.md, run where their packages are installed."""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import export
from tests.test_models import lively
from utils.checkpoint import write_darknet
from utils.darknet.cfg import load
from utils.files import ROOT
from utils.runtime.engines import onnxruntime_engine

CONVERTERS = {"MNN": ("MNN", 1e-5), "TVM": ("tvm", 1e-5), "RKNN": ("rknn", 5e-3), "Core ML": ("coremltools", None)}
"""A converter: its package, and how far its heads may differ; None: it converts, but runs elsewhere."""
NETWORKS = {"demo": (), "demo with mish": ("leaky", "mish"), "yolov4-tiny": ()}


def lines(name: str) -> str:
    """Return the Python lines of a converter in docs/export.md."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    return re.search(rf"^\*\*{name}\*\*.*?```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize("name", CONVERTERS)
def test_lines_of_the_page_are_python(name):
    assert ast.parse(lines(name)).body


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CONVERTERS)
def test_converter_gives_the_heads_of_onnxruntime(tmp_path, monkeypatch, name, network):
    package, limit = CONVERTERS[name]
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    text = (ROOT / "cfg" / f"{network.split()[0]}.cfg").read_text()
    Path("n.cfg").write_text(text.replace(*NETWORKS[network]) if NETWORKS[network] else text)
    write_darknet(Path("n.weights"), lively(load("n.cfg")))
    for form, flags in (("onnx", ("--mish", "softplus")), ("torchscript", ())):
        output = ("--img_size", "64", "--format", form, "--output", f"model.{form}")
        export.main(["--cfg", "n.cfg", "--weights", "n.weights", *output, *flags])
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64)).astype(np.float32) / 255
    Path("lines.py").write_text(lines(name))
    values = runpy.run_path("lines.py", {"images": images})
    if limit is None:
        return
    references = onnxruntime_engine(Path("model.onnx"), ("head0", "head1"), 1)(images)
    for head, reference in zip(values["heads"], references, strict=True):
        error = np.abs(np.reshape(head, reference.shape) - reference).max() / np.abs(reference).max()
        print(f"{name}, {network}: {error:.1e}")
        assert error <= limit
