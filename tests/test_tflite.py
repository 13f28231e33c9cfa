"""TensorFlow Lite files: LiteRT computes in them what PyTorch computes, and integers are those of the simulation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

import detect
from tests.nets import HEAD, refused, tiny
from tests.random_nets import networks
from tests.test_engines import branches
from tests.test_examples import assert_same as assert_same_objects
from tests.test_examples import parsed
from tests.test_export import CFGS, QUICK, assert_same, eager, emitted, heads_of, pictures, sized, tamed
from tests.test_integers import call, described, of_target, quantized, seeded
from tests.test_models import lively
from tests.test_oracle_opencv import difference
from tests.test_random_networks import examples
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import ACTIVATIONS
from utils.data.images import write_image
from utils.detection.decode import decode
from utils.errors import InfeasibleError, InputError, WeightsError
from utils.export.integers import codes_of
from utils.export.onnx_graph import onnx_model
from utils.export.settings import ExportSettings, usage
from utils.export.verify import Subject, prove_tflite
from utils.runtime.exported import Metadata, read_tflite

pytest.importorskip("ai_edge_litert")
from ai_edge_litert import schema_py_generated as schema

from utils.export.tflite import ALIGNMENT, KINDS, tflite_file
from utils.runtime.engines import litert_engine

assert call and seeded  # fixtures
NODES = ExportSettings(opset=18, mish="op")
OPERATORS = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
WINDOWS = (
    "[convolutional]\nfilters=6\nsize=3\npad=1\nstride=2\nactivation=leaky\n",
    "[convolutional]\nfilters=6\nsize=3\npad=1\nstride_x=2\nstride_y=1\ndilation=2\nactivation=leaky\n",
    "[convolutional]\nfilters=8\nsize=3\npad=1\ngroups=2\nactivation=leaky\n",
    "[convolutional]\nfilters=8\nsize=3\npad=1\nstride=2\ngroups=4\nbias=0\nactivation=leaky\n",
    "[maxpool]\nsize=2\nstride=1\n",
    "[maxpool]\nsize=2\nstride=2\n",
    "[maxpool]\nsize=5\nstride_x=1\nstride_y=2\npadding=3\n",
    "[maxpool]\nsize=3\nstride=2\npadding=4\n",
    "[reorg]\nstride=2\n",
    "[se]\nreduction=2\n",
    *(f"[upsample]\nstride={stride}\n" for stride in (2, 3, 5, 7, 13)),
)
INTEGRAL = {
    "linear": (),
    "leaky": ("LEAKY_RELU",),
    "relu": (),
    "relu6": (),
    "mish": ("CAST", "ADD", "GATHER"),
    "swish": ("LOGISTIC", "MUL"),
    "logistic": ("CAST", "ADD", "GATHER"),
    "h_swish": ("HARD_SWISH",),
    "hardsigmoid": ("CAST", "ADD", "GATHER"),
}
"""Operators of an activation behind a convolution of integers."""


def metadata_of(model, **more) -> Metadata:
    return Metadata(model.network, tuple(map(str, range(model.network.classes))), **more)


def litert_heads(model, images, *, plain=False) -> list[np.ndarray]:
    return litert_engine(tflite_file(emitted(model, NODES), metadata_of(model)), plain=plain)(images.numpy())


def operators(data: bytes) -> list[tuple[str, set[int]]]:
    """The operators of a file, each with the types of the tensors that it computes with."""
    model = schema.ModelT.InitFromPackedBuf(data)
    tensors = model.subgraphs[0].tensors
    return [
        (
            OPERATORS[model.operatorCodes[operator.opcodeIndex].builtinCode],
            {tensors[number].type for number in (operator.inputs[0], *operator.outputs)},
        )
        for operator in model.subgraphs[0].operators
    ]


def nodes_of(model, settings):
    """The ONNX nodes of a quantized model."""
    return onnx_model(model, described(model, settings), NODES, codes_of(model))


def proved(model, settings, nodes=None):
    """The largest difference of a layer."""
    subject = Subject(None, model, described(model, settings))
    return prove_tflite(nodes or nodes_of(model, settings), subject, NODES, codes_of(model))[1]


@examples(15)
@given(networks(), st.integers(0, 99), st.booleans())
def test_random_networks_agree_with_pytorch(network, seed, plain):
    model, images = lively(network, seed), pictures(network)
    assert_same(heads_of(model, images), litert_heads(model, images, plain=plain))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CFGS])
def test_the_networks_of_cfg_agree_with_pytorch(name, root):
    network = sized(cfg_file.load(root / "cfg" / f"{name}.cfg"), 64, 96)
    images = pictures(network)
    model = tamed(lively(network), images)
    assert_same(heads_of(model, images), litert_heads(model, images))


@pytest.mark.parametrize("plain", [False, True])
def test_activations_agree_with_pytorch_where_they_saturate_too(plain):
    network = branches(*(f"[convolutional]\nfilters=4\nsize=1\nactivation={name}\n" for name in ACTIVATIONS))
    model, images = lively(network), pictures(network)
    with torch.no_grad():
        for head in network.heads:
            model.layers[head - 2].conv.weight.mul_(40)
    assert_same(heads_of(model, images), litert_heads(model, images, plain=plain), 1e-5)


@pytest.mark.parametrize("plain", [False, True])
def test_windows_of_every_kind_agree_with_pytorch(plain):
    model = lively(branches(*WINDOWS))
    images = pictures(model.network)
    assert_same(heads_of(model, images), litert_heads(model, images, plain=plain), 1e-5)


def test_rows_are_those_of_decode():
    network = sized(tiny(), 64, 96)
    model, images = lively(network), pictures(network)
    with torch.inference_mode():
        want = decode(model(images).heads, network.yolos, (64, 96)).numpy()
    data = tflite_file(emitted(model, NODES, output="rows"), metadata_of(model, output="rows"))
    (rows,) = litert_engine(data)(images.numpy())
    assert_same([want[..., :4], want[..., 4:]], [rows[..., :4], rows[..., 4:]], 1e-5)


@pytest.mark.parametrize("target", ["cpu", "cpu-vnni", "arm"])
@examples(8)
@given(network=networks())
def test_each_layer_of_any_network_differs_by_a_step_at_most(target, network):
    """In the reference kernels and in those of XNNPACK."""
    settings = of_target(target, fold=len(network.blocks) % 2 == 0)
    gap = proved(quantized(lively(network), settings), settings)
    assert gap.steps <= 1 and gap.layers >= 3


def test_windows_of_every_kind_differ_by_a_step_at_most():
    model = quantized(lively(branches(*WINDOWS)), of_target("arm"))
    assert proved(model, of_target("arm")).steps <= 1


def test_every_activation_has_a_form():
    assert set(INTEGRAL) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_integers(activation):
    """All codes occur in what the activation reads."""
    settings, network = of_target("arm"), branches(f"[convolutional]\nfilters=4\nsize=1\nactivation={activation}\n")
    model = lively(network)
    with torch.no_grad():
        model.layers[2].conv.weight.mul_(6)
    model = quantized(model, settings)
    assert proved(model, settings).steps <= 1
    made = operators(tflite_file(nodes_of(model, settings), described(model, settings)))
    assert Counter(code for code, _ in made) == Counter(("CONV_2D",) * 3 + INTEGRAL[activation])
    assert not any(KINDS[np.dtype("float32")] in kinds for _, kinds in made)


@pytest.mark.parametrize("name", ["demo", "yolov3-tiny", "yolov4-tiny", "mobilenetv2-yolov3"])
def test_every_operator_works_on_int8(name, root):
    settings, network = of_target("cpu"), sized(cfg_file.load(root / "cfg" / f"{name}.cfg"), 64, 64)
    model = quantized(lively(network), settings)
    made = operators(tflite_file(nodes_of(model, settings), described(model, settings)))
    assert len(made) > len(model.network.heads) and all(kinds == {KINDS[np.dtype("int8")]} for _, kinds in made)


@pytest.mark.parametrize(
    "more", [{"heads": "float"}, {"first": "float"}, {"kept": (0, 2)}, {"weight_bits": 4}], ids=str
)
def test_convolutions_may_stay_float(more):
    settings = of_target("cpu", **more)
    assert proved(quantized(lively(tiny()), settings), settings).steps <= 1


def test_a_layer_that_differs_is_named():
    """A weight that is changed after the simulation."""
    settings = of_target("arm")
    model = quantized(lively(tiny()), settings)
    nodes = nodes_of(model, settings)
    for tensor in nodes.graph.initializer:
        if tensor.name == "block2/weight/codes":
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    with pytest.raises(InfeasibleError, match=r"block 2 .*differs from the simulation by \d+ steps"):
        proved(model, settings, nodes)


def test_a_head_that_is_read_on_leaves_under_its_name():
    network = cfg_file.parse(f"[net]\nwidth=16\nheight=16\n{HEAD}[route]\nlayers=0\n{HEAD}", "t.cfg")
    model, images = lively(network), pictures(network)
    assert_same(heads_of(model, images), litert_heads(model, images), 1e-5)


def test_constants_are_aligned_and_outputs_have_names():
    data = tflite_file(emitted(lively(tiny()), NODES), metadata_of(lively(tiny())))
    model = schema.Model.GetRootAs(data)
    tables = [model.Buffers(number)._tab for number in range(1, model.BuffersLength())]
    places = [table.Vector(table.Offset(4)) for table in tables]
    assert len(places) > 20 and not any(place % ALIGNMENT for place in places)
    (signature,) = schema.ModelT.InitFromObj(model).signatureDefs
    assert [entry.name for entry in signature.inputs] == [b"images"]
    assert [entry.name for entry in signature.outputs] == [b"head0", b"head1"]


def test_the_document_and_the_file_say_how_it_was_quantized(call, tmp_path):
    document = call(of_target("cpu"), "--format", "tflite", "--int8", "--img_size", "64", "96")
    assert (document["precision"], document["output"], document["steps"]) == ("int8", "heads", 1)
    assert document["runtime"].startswith("LiteRT") and document["batch"] == 1
    file = read_tflite(tmp_path / document["path"])
    assert usage("a.tflite", file)["input"].startswith("images, int8 with scale and zero point, [1, 64, 96, 3], RGB")
    assert "[B, H, W, A · (5 + C)]" in usage("a.tflite", file)["output"]
    metadata = file.metadata
    assert (metadata.precision, metadata.size, metadata.mode) == ("int8", (64, 96), "letterbox")
    assert metadata.quantization == of_target("cpu") and metadata.names == ("cat", "dog")


def test_half_stores_weights_in_float16(root):
    network = sized(cfg_file.load(root / "cfg" / "demo.cfg"), 64, 64)
    model, images = lively(network), pictures(network)
    whole, half = (
        tflite_file(emitted(model, NODES), metadata_of(model, precision=name)) for name in ("float32", "float16")
    )
    assert len(half) < 0.55 * len(whole)
    want, heads = heads_of(model, images), litert_engine(half)(images.numpy())
    assert_same(want, heads, 2e-2)
    assert difference(want[0], heads[0]) > 1e-6


def test_the_picture_of_the_check_can_be_chosen(call, tmp_path):
    with pytest.raises(InputError, match=r"none\.jpg"):
        call(of_target("cpu"), "--format", "tflite", "--int8", "--sample", "none.jpg")


@pytest.mark.parametrize("place", [0, 100, 0.3, 0.5, 0.9, -1])
def test_a_changed_byte_is_refused(call, tmp_path, place):
    path = tmp_path / call(None, "--format", "tflite")["path"]
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
    with refused(WeightsError, r"model\.tflite: "):
        read_tflite(replaced(path, data))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_file_cut_short_is_refused(call, tmp_path, share):
    path = tmp_path / call(None, "--format", "tflite")["path"]
    with refused(WeightsError, r"model\.tflite: "):
        read_tflite(replaced(path, path.read_bytes()[: int(share * path.stat().st_size)]))


@pytest.mark.parametrize("data", [b"\0" * 100, b"PK\x03\x04" + b"\0" * 50, b"hello\n" * 9, bytes(range(256)) * 8])
def test_what_is_no_tflite_file_is_refused(tmp_path, data):
    with refused(WeightsError, r"x\.tflite: "):
        read_tflite(replaced(tmp_path / "x.tflite", data))


def test_a_file_of_another_program_is_refused(tmp_path):
    model = lively(tiny())
    plain = replace(metadata_of(model), names=())
    data = tflite_file(emitted(model, NODES), plain).replace(b"schema", b"chemas")
    with refused(WeightsError, r"x\.tflite: (is not as export\.py wrote it|says neither)"):
        read_tflite(replaced(tmp_path / "x.tflite", data))


def replaced(path, data):
    path.write_bytes(data)
    return path


def test_the_client_of_an_int8_file_finds_what_detect_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from examples import litert_client

    settings = of_target("cpu")
    model = quantized(eager(tiny()), settings)
    path = replaced(tmp_path / "n.tflite", tflite_file(nodes_of(model, settings), described(model, settings)))
    pixels = np.random.default_rng(0).integers(0, 255, (60, 91, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", pixels)
    litert_client.main(str(path), str(tmp_path / "a.png"))
    rows = parsed(capsys.readouterr().out.splitlines())
    detect.main(["--weights", str(path), "--source", str(tmp_path / "a.png"), "--nosave", "--json"])
    (document,) = json.loads(capsys.readouterr().out)
    want = [[row["class"], row["confidence"], *row["box"]] for row in document["detections"]]
    assert_same_objects(np.array(want), rows)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ethosu") is None, reason="ethos-u-vela is not installed")
@pytest.mark.parametrize("name", ["demo", "yolov3-tiny", "yolov4-tiny"])
def test_all_operators_run_on_an_ethos_u(name, root, tmp_path):
    settings, network = of_target("arm"), sized(cfg_file.load(root / "cfg" / f"{name}.cfg"), 96, 96)
    model = quantized(lively(network), settings)
    path = replaced(tmp_path / "n.tflite", tflite_file(nodes_of(model, settings), described(model, settings)))
    command = [sys.executable, "-m", "ethosu.vela", str(path), "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert re.search(r"CPU operators = 0 \(0", done.stdout), done.stdout
