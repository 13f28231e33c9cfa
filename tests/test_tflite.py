"""TensorFlow Lite files: LiteRT computes in them what PyTorch computes, and integers are those of the simulation."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import detect
from tests.nets import branches, printed, tiny
from tests.test_engines import LAYOUTS, metadata_of
from tests.test_examples import assert_same as assert_same_objects
from tests.test_examples import parsed
from tests.test_export import eager, emitted, sized
from tests.test_integers import FORMS, call, described, made_of, of_target, proved, quantized, seeded
from tests.test_models import lively
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import ACTIVATIONS
from utils.data.images import write_image
from utils.export.settings import usage
from utils.runtime.exported import read_tflite

pytest.importorskip("ai_edge_litert")
from ai_edge_litert import schema_py_generated as schema

from utils.export.tflite import ALIGNMENT, KINDS, tflite_file

assert call and seeded  # fixtures
NODES = FORMS["tflite"]
OPERATORS = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
INTEGRAL = {
    "linear": (),
    "leaky": ("LEAKY_RELU",),
    "relu": (),
    "relu6": (),
    "mish": ("CAST", "ADD", "GATHER"),
    "swish": ("LOGISTIC", "MUL"),
    "logistic": ("LOGISTIC",),
    "h_swish": ("HARD_SWISH",),
    "hardsigmoid": ("CAST", "ADD", "GATHER"),
}
"""Operators of an activation behind a convolution of integers."""


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


def integers_of(model, settings) -> bytes:
    """The file of a quantized model."""
    return tflite_file(made_of(model, settings, "tflite")[0], described(model, settings))


@pytest.mark.parametrize("layout", ["windows", "an uneven pool"])
def test_windows_of_every_kind_differ_by_a_step_at_most(layout):
    model = quantized(lively(LAYOUTS[layout]), of_target("arm"))
    assert proved(model, of_target("arm"), "tflite").steps <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_integers(activation):
    """All codes occur in what the activation reads."""
    settings, network = of_target("arm"), branches(f"[convolutional]\nfilters=4\nsize=1\nactivation={activation}\n")
    model = lively(network)
    with torch.no_grad():
        model.layers[2].conv.weight.mul_(6)
    model = quantized(model, settings)
    assert proved(model, settings, "tflite").steps <= 1
    made = operators(integers_of(model, settings))
    assert Counter(code for code, _ in made) == Counter(("CONV_2D",) * 3 + INTEGRAL[activation])
    assert not any(KINDS[np.dtype("float32")] in kinds for _, kinds in made)


@pytest.mark.parametrize("name", ["demo", "yolov3-tiny", "yolov4-tiny", "mobilenetv2-yolov3"])
def test_every_operator_works_on_int8(name, root):
    settings, network = of_target("cpu"), sized(cfg_file.load(root / "cfg" / f"{name}.cfg"), 64, 64)
    model = quantized(lively(network), settings)
    made = operators(integers_of(model, settings))
    assert len(made) > len(model.network.heads) and all(kinds == {KINDS[np.dtype("int8")]} for _, kinds in made)


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


def test_the_client_of_an_int8_file_finds_what_detect_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from examples import litert_client

    settings = of_target("cpu")
    model = quantized(eager(tiny()), settings)
    path = tmp_path / "n.tflite"
    path.write_bytes(integers_of(model, settings))
    pixels = np.random.default_rng(0).integers(0, 255, (60, 91, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", pixels)
    litert_client.main(str(path), str(tmp_path / "a.png"))
    rows = parsed(capsys.readouterr().out.splitlines())
    flags = ("--weights", str(path), "--source", str(tmp_path / "a.png"), "--nosave")
    (document,) = printed(capsys, detect.main, *flags)
    want = [[row["class"], row["confidence"], *row["box"]] for row in document["detections"]]
    assert_same_objects(np.array(want), rows)


def compiled(model, settings, folder: Path, *flags: str) -> int:
    """Operators that the compiler of Ethos-U leaves to the CPU."""
    (folder / "n.tflite").write_bytes(integers_of(model, settings))
    command = [sys.executable, "-m", "ethosu.vela", str(folder / "n.tflite"), "--output-dir", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"CPU operators = (\d+)", done.stdout)[1])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ethosu") is None, reason="ethos-u-vela is not installed")
@pytest.mark.parametrize("name", ["demo", "yolov3-tiny", "yolov4-tiny"])
def test_all_operators_run_on_an_ethos_u(name, root, tmp_path):
    settings, network = of_target("arm"), sized(cfg_file.load(root / "cfg" / f"{name}.cfg"), 96, 96)
    assert compiled(quantized(lively(network), settings), settings, tmp_path) == 0
