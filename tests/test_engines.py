"""Engines: OpenCV, onnxruntime, ncnn, OpenVINO and LiteRT put out the raw heads of PyTorch for the same picture."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nets import HEAD, NEEDS_IMPORTER, branches, conv, one_head, refused, tiny
from tests.random_nets import networks
from tests.test_export import (
    HAS_LITERT,
    HAS_OPENVINO,
    NEEDS_LITERT,
    NEEDS_OPENVINO,
    assert_same,
    emitted,
    heads_of,
    pictures,
    ran,
    sized,
    tamed,
)
from tests.test_models import lively
from tests.test_oracle_opencv import difference
from utils.checkpoint import write_darknet
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import ACTIVATIONS, Network
from utils.darknet.cfg import format_network
from utils.darknet.network import max_stride, opencv_warning
from utils.errors import InfeasibleError, WeightsError
from utils.export.settings import OPSETS, ExportSettings
from utils.export.workflow import convert
from utils.files import ROOT
from utils.runtime.engines import darknet_heads, litert_engine, ncnn_engine, openvino_engine
from utils.runtime.exported import Metadata

if HAS_LITERT:
    from utils.export.tflite import tflite_file

HAS_NCNN = all(map(importlib.util.find_spec, ("ncnn", "pnnx")))
NEEDS_NCNN = pytest.mark.skipif(not HAS_NCNN, reason="ncnn or pnnx is not installed")
QUICK = ("demo", "mobilenetv2-yolov3", "yolo-fastest", "yolov3-tiny", "yolov4-tiny")
CFGS = [
    pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
    for path in sorted((ROOT / "cfg").glob("*.cfg"))
]


def names_of(network: Network) -> list[str]:
    return [f"head{number}" for number in range(len(network.heads))]


def metadata_of(model, **more) -> Metadata:
    return Metadata(model.network, tuple(map(str, range(model.network.classes))), **more)


def onnxruntime(model, images, folder: Path, precision: str = "float32", **settings) -> list[np.ndarray]:
    made = emitted(model, ExportSettings(**settings), precision=precision)
    (folder / "a.onnx").write_bytes(made.SerializeToString())
    return ran(made, images)


def opencv(model, images, folder: Path) -> list[np.ndarray]:
    net = cv2.dnn.readNetFromONNX(np.frombuffer(emitted(model).SerializeToString(), np.uint8))
    net.setInput(images.numpy())
    return [np.array(head) for head in net.forward(names_of(model.network))]


def darknet_in_opencv(model, images, folder: Path) -> list[np.ndarray]:
    write_darknet(folder / "w", model)
    cfg = np.frombuffer(format_network(model.network).encode(), np.uint8)
    net = cv2.dnn.readNetFromDarknet(cfg, np.fromfile(folder / "w", np.uint8))
    net.setInput(images.numpy())
    return [np.array(head) for head in net.forward(darknet_heads(model.network))]


def ncnn(model, images, folder: Path, precision: str = "float32") -> list[np.ndarray]:
    path = convert(emitted(model).SerializeToString(), folder / "a.param", metadata_of(model, precision=precision))
    return ncnn_engine(path, names_of(model.network))(images.numpy())


def openvino(model, images, folder: Path) -> list[np.ndarray]:
    return openvino_engine(emitted(model).SerializeToString(), names_of(model.network), 1)(images.numpy())


def litert(model, images, folder: Path, precision: str = "float32", *, plain: bool = False) -> list[np.ndarray]:
    nodes = emitted(model, ExportSettings(opset=18, mish="op"))
    (folder / "a.tflite").write_bytes(tflite_file(nodes, metadata_of(model, precision=precision)))
    return litert_engine(folder / "a.tflite", plain=plain)(images.numpy())


ENGINES = {
    **{f"onnxruntime, opset {opset}": partial(onnxruntime, opset=opset) for opset in (OPSETS[0], 17, OPSETS[-1])},
    "OpenCV": opencv,
    "ncnn": ncnn,
    "OpenVINO": openvino,
    "LiteRT": litert,
    "LiteRT, reference kernels": partial(litert, plain=True),
}
"""Those that run every network: from a model and pictures to the heads, by way of files in a folder."""
MARKS = {"ncnn": NEEDS_NCNN, "OpenVINO": NEEDS_OPENVINO, "LiteRT": NEEDS_LITERT}
EVERY = [pytest.param(run, id=name, marks=MARKS.get(name.partition(",")[0], ())) for name, run in ENGINES.items()]
HARD = "[convolutional]\nfilters=4\nsize=1\nactivation=hardsigmoid\n"
LAYOUTS = {
    "activations": branches(*(f"[convolutional]\nfilters=4\nsize=1\nactivation={name}\n" for name in ACTIVATIONS)),
    "windows": branches(
        "[convolutional]\nfilters=6\nsize=3\npad=1\nstride=2\nactivation=leaky\n",
        "[convolutional]\nfilters=6\nsize=3\npad=1\nstride_x=2\nstride_y=1\ndilation=2\nactivation=leaky\n",
        "[convolutional]\nfilters=8\nsize=3\npad=1\ngroups=2\nactivation=leaky\n",
        "[convolutional]\nfilters=8\nsize=3\npad=1\nstride=2\ngroups=4\nbias=0\nactivation=leaky\n",
        "[maxpool]\nsize=2\nstride=1\n",
        "[maxpool]\nsize=2\nstride=2\n",
        "[maxpool]\nsize=3\nstride=2\npadding=4\n",
        "[reorg]\nstride=2\n",
        "[se]\nreduction=2\n",
        *(f"[upsample]\nstride={stride}\n" for stride in (2, 3, 5, 7, 13)),
    ),
    "products with a hard sigmoid": branches(
        f"{HARD}[sam]\nfrom=-2\n",
        f"{HARD}[convolutional]\nfilters=4\nsize=1\nactivation=leaky\n[sam]\nfrom=-2\n",
        f"[avgpool]\n{HARD}[scale_channels]\nfrom=-3\n",
    ),
    "an uneven pool": branches("[maxpool]\nsize=5\nstride_x=1\nstride_y=2\npadding=3\n"),
    "a head that is read on": cfg_file.parse(f"[net]\nwidth=16\nheight=16\n{HEAD}[route]\nlayers=0\n{HEAD}", "t.cfg"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize("name", CFGS)
def test_engines_agree_on_the_networks_of_cfg(name, root, folder):
    """In all engines that read the network.

    The smallest input that is not square and has no map of one cell a side, where OpenCV 4.14 computes depthwise
    convolutions wrong.
    """
    network = cfg_file.load(root / "cfg" / f"{name}.cfg")
    stride = max_stride(network)
    network = sized(network, 2 * stride, 3 * stride)
    images = pictures(network)
    model = tamed(lively(network), images)
    reads_darknet = hasattr(cv2.dnn, "readNetFromDarknet") and opencv_warning(network) is None
    runs = (onnxruntime, opencv) + (darknet_in_opencv,) * reads_darknet
    runs += (ncnn,) * HAS_NCNN + (openvino,) * HAS_OPENVINO + (litert,) * HAS_LITERT
    for run in runs:
        assert_same(heads_of(model, images), run(model, images, folder))


@pytest.mark.parametrize("run", EVERY)
@settings(max_examples=15)
@given(network=networks(), seed=st.integers(0, 99))
def test_engines_agree_on_random_networks(folder, run, network, seed):
    model, images = lively(network, seed), pictures(network)
    assert_same(heads_of(model, images), run(model, images, folder))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", EVERY)
def test_engines_agree_where_activations_saturate_and_on_windows_of_every_kind(folder, run, layout):
    if run is ncnn and layout == "an uneven pool":
        pytest.skip("ncnn pads it otherwise, and export.py refuses the file")
    model = lively(LAYOUTS[layout])
    if layout == "activations":
        with torch.no_grad():
            for head in model.network.heads:
                model.layers[head - 2].conv.weight.mul_(40)
    images = pictures(model.network)
    assert_same(heads_of(model, images), run(model, images, folder), 1e-5)


@pytest.mark.parametrize(
    "run", [onnxruntime, pytest.param(ncnn, marks=NEEDS_NCNN), pytest.param(litert, marks=NEEDS_LITERT)]
)
def test_kernels_in_float16_take_half_the_room_and_stay_near(run, root, tmp_path):
    network = sized(cfg_file.load(root / "cfg" / "demo.cfg"), 64, 64)
    model, images, heads, sizes = lively(network), pictures(network), {}, {}
    for precision in ("float32", "float16"):
        heads[precision] = run(model, images, tmp_path, precision)
        sizes[precision] = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sizes["float16"] < 0.55 * sizes["float32"]
    assert_same(heads_of(model, images), heads["float16"], 2e-2)
    assert difference(heads["float32"][0], heads["float16"][0]) > 1e-6


@NEEDS_IMPORTER
@settings(max_examples=60)
@given(networks(), st.integers(0, 99))
def test_opencv_agrees_on_random_networks_it_is_not_warned_of(folder, network, seed):
    if opencv_warning(network) is None:
        model, images = lively(network, seed), pictures(network)
        assert_same(heads_of(model, images), darknet_in_opencv(model, images, folder))


GATE = "[convolutional]\nfilters=8\nsize=1\nactivation=logistic\n"
READ = {
    "reorg": one_head(conv(8), "[reorg]\nstride=2\n"),
    "pool1": one_head(conv(8), "[maxpool]\nsize=2\nstride=1\n"),
    "pool2": one_head(conv(8), "[maxpool]\nsize=2\nstride=2\n"),
    "group": one_head(conv(8), "[route]\nlayers=-1\ngroups=2\ngroup_id=1\n"),
    "upsample": one_head(conv(8), "[upsample]\nstride=2\n", conv(4, 3, "mish", pad=1)),
    "shortcut": one_head(conv(8), conv(6, 3, "swish", pad=1), "[shortcut]\nfrom=-2\nactivation=leaky\n"),
    "scale_channels": one_head(conv(8), "[avgpool]\n", GATE, "[scale_channels]\nfrom=-3\n"),
    "sam": one_head(conv(8), GATE, "[sam]\nfrom=-2\n"),
    **{
        f"a head behind {curve}": cfg_file.parse(
            f"[net]\nwidth=16\nheight=16\n{conv(4)}{HEAD.replace('=linear', f'={curve}')}", "n.cfg"
        )
        for curve in ("logistic", "leaky", "mish")
    },
}
"""As in yolov4-csp are the last ones: OpenCV's reader makes a layer of its own of an activation."""


@NEEDS_IMPORTER
@pytest.mark.parametrize("name", READ)
def test_opencv_computes_the_same(folder, name):
    model, images = lively(READ[name]), pictures(READ[name])
    assert_same(heads_of(model, images), darknet_in_opencv(model, images, folder), 1e-5)


@NEEDS_IMPORTER
@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ("[convolutional]\nfilters=4\nbias=0\nactivation=leaky\n", "reads a bias where bias=0"),
        ("[shortcut]\nfrom=-2\nweights_type=per_feature\nactivation=linear\n", "passes over the weights of a shortcut"),
        ("[route]\nlayers=-1,-2\ngroups=2\ngroup_id=1\n", "cuts the concatenation of a route into groups"),
    ],
)
def test_what_opencv_is_warned_of_it_computes_otherwise(section, reason, folder):
    network = one_head(conv(8), conv(8), section)
    assert reason in opencv_warning(network)
    model, images = lively(network), pictures(network)
    try:
        found = darknet_in_opencv(model, images, folder)
    except cv2.error:
        return
    with pytest.raises(AssertionError):
        assert_same(heads_of(model, images), found)


@NEEDS_NCNN
def test_what_ncnn_and_its_converter_cannot_read_is_one_line(folder):
    with refused(InfeasibleError, r"--format ncnn: pnnx .* cannot convert the ONNX file"):
        convert(b"nonsense", folder / "a.param", Metadata(tiny(), ("a", "b")))
    (folder / "x.param").write_text("7767517\n1 1\nNonsense x 0 1 x\n")
    (folder / "x.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"x\.param: ncnn .* cannot read it"):
        ncnn_engine(folder / "x.param", ["x"])


@NEEDS_OPENVINO
def test_what_openvino_cannot_read_is_one_line():
    with refused(WeightsError, "the file: OpenVINO cannot read it: "):
        openvino_engine(b"nonsense", ["x"], 1)
