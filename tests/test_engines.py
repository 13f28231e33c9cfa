"""Engines: PyTorch, OpenCV, onnxruntime, ncnn and OpenVINO put out the same raw heads for the same picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.nets import HEAD, one_head, refused, tiny
from tests.random_nets import networks
from tests.test_export import (
    CFGS,
    HAS_OPENVINO,
    NEEDS_IMPORTER,
    NEEDS_OPENVINO,
    QUICK,
    assert_same,
    emitted,
    heads_of,
    opencv_heads,
    pictures,
    sized,
    tamed,
)
from tests.test_models import lively
from tests.test_random_networks import examples
from utils.checkpoint import write_darknet
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import ACTIVATIONS, Network
from utils.darknet.cfg import format_network
from utils.darknet.network import max_stride, opencv_warning
from utils.errors import InfeasibleError, WeightsError
from utils.export.workflow import convert
from utils.runtime.engines import darknet_heads, ncnn_engine, onnxruntime_engine, openvino_engine
from utils.runtime.exported import Metadata

pytest.importorskip("ncnn")
pytest.importorskip("pnnx")


def names_of(network: Network) -> list[str]:
    return [f"head{number}" for number in range(len(network.heads))]


def written(model, folder: Path, *, half: bool = False) -> Path:
    """The .param file that pnnx makes of a model; the .bin file is beside it."""
    names = tuple(map(str, range(model.network.classes)))
    metadata = Metadata(model.network, names, precision="float16" if half else "float32")
    return convert(emitted(model).SerializeToString(), folder / "a.param", metadata)


def ncnn_heads(model, images: torch.Tensor, folder: Path, *, half: bool = False) -> list[np.ndarray]:
    return ncnn_engine(written(model, folder, half=half), names_of(model.network))(images.numpy())


def branches(*sections: str) -> Network:
    """A network in which each section follows the first convolution and has a head of its own."""
    text = "[net]\nwidth=24\nheight=16\n[convolutional]\nfilters=4\nsize=1\nactivation=linear\n"
    for section in sections:
        text += f"[route]\nlayers=0\n{section}{HEAD}"
    return cfg_file.parse(text, "branches.cfg")


def darknet_in_opencv(model, images: torch.Tensor, folder: Path) -> list[np.ndarray]:
    network = model.network
    write_darknet(folder / "w", model)
    cfg = np.frombuffer(format_network(network).encode(), np.uint8)
    net = cv2.dnn.readNetFromDarknet(cfg, np.fromfile(folder / "w", np.uint8))
    return opencv_heads(net, images, darknet_heads(network))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CFGS])
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
    want, onnx = heads_of(model, images), emitted(model).SerializeToString()
    assert_same(want, ncnn_heads(model, images, folder))
    assert_same(want, onnxruntime_engine(onnx, names_of(network), 1)(images.numpy()))
    net = cv2.dnn.readNetFromONNX(np.frombuffer(onnx, np.uint8))
    assert_same(want, opencv_heads(net, images, names_of(network)))
    if hasattr(cv2.dnn, "readNetFromDarknet") and opencv_warning(network) is None:
        assert_same(want, darknet_in_opencv(model, images, folder))
    if HAS_OPENVINO:
        assert_same(want, openvino_engine(onnx, names_of(network), 1)(images.numpy()))


@examples(15)
@given(networks(), st.integers(0, 99))
def test_ncnn_agrees_on_random_networks(folder, network, seed):
    model, images = lively(network, seed), pictures(network)
    assert_same(heads_of(model, images), ncnn_heads(model, images, folder))


@NEEDS_OPENVINO
@examples(10)
@given(networks(), st.integers(0, 99))
def test_openvino_agrees_on_random_networks(network, seed):
    model, images = lively(network, seed), pictures(network)
    engine = openvino_engine(emitted(model).SerializeToString(), names_of(network), 1)
    assert_same(heads_of(model, images), engine(images.numpy()))


@NEEDS_IMPORTER
@examples(60)
@given(networks(), st.integers(0, 99))
def test_opencv_agrees_on_random_networks_it_is_not_warned_of(folder, network, seed):
    if opencv_warning(network) is None:
        model, images = lively(network, seed), pictures(network)
        assert_same(heads_of(model, images), darknet_in_opencv(model, images, folder))


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
    before = "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\npad=1\nactivation=leaky\n"
    network = one_head(before, before, section)
    assert reason in opencv_warning(network)
    model, images = lively(network), pictures(network)
    try:
        found = darknet_in_opencv(model, images, folder)
    except cv2.error:
        return
    with pytest.raises(AssertionError):
        assert_same(heads_of(model, images), found)


def test_activations_agree_in_ncnn_where_they_saturate_too(folder):
    network = branches(*(f"[convolutional]\nfilters=4\nsize=1\nactivation={name}\n" for name in ACTIVATIONS))
    model = lively(network)
    with torch.no_grad():
        for head in network.heads:
            model.layers[head - 2].conv.weight.mul_(40)
    images = pictures(network)
    assert_same(heads_of(model, images), ncnn_heads(model, images, folder), 1e-5)


def test_uneven_windows_agree_in_ncnn(folder):
    network = branches(
        "[convolutional]\nfilters=6\nsize=3\npad=1\nstride_x=2\nstride_y=1\ndilation=2\nactivation=leaky\n",
        "[maxpool]\nsize=2\nstride=1\n",
        "[maxpool]\nsize=3\nstride=2\npadding=4\n",
        *(f"[upsample]\nstride={stride}\n" for stride in (2, 3, 5, 7, 13)),
    )
    model, images = lively(network), pictures(network)
    assert_same(heads_of(model, images), ncnn_heads(model, images, folder), 1e-5)


def test_kernels_in_float16_take_half_the_room_and_stay_near(folder):
    model = lively(tiny())
    images = pictures(model.network)
    whole, halved = (written(model, folder, half=half).with_suffix(".bin").stat().st_size for half in (False, True))
    assert halved < 0.55 * whole
    heads = ncnn_heads(model, images, folder, half=True)
    assert_same(heads_of(model, images), heads, 2e-2)
    with pytest.raises(AssertionError):
        assert_same(heads_of(model, images), heads, 1e-6)


def test_a_head_that_is_read_on_leaves_under_its_name(folder):
    """The convolution before the first head feeds another branch as well."""
    network = cfg_file.parse(f"[net]\nwidth=16\nheight=16\n{HEAD}[route]\nlayers=0\n{HEAD}", "t.cfg")
    model, images = lively(network), pictures(network)
    assert_same(heads_of(model, images), ncnn_heads(model, images, folder), 1e-5)


def test_what_pnnx_cannot_convert_is_one_line(folder):
    with refused(InfeasibleError, r"--format ncnn: pnnx .* cannot convert the ONNX file"):
        convert(b"nonsense", folder / "a.param", Metadata(tiny(), ("a", "b")))


def test_what_an_engine_cannot_read_is_one_line(folder):
    (folder / "x.param").write_text("7767517\n1 1\nNonsense x 0 1 x\n")
    (folder / "x.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"x\.param: ncnn .* cannot read it"):
        ncnn_engine(folder / "x.param", ["x"])


@NEEDS_OPENVINO
def test_what_openvino_cannot_read_is_one_line():
    with refused(WeightsError, "the file: OpenVINO cannot read it: "):
        openvino_engine(b"nonsense", ["x"], 1)
