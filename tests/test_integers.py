"""int8 files: they hold the integers of the training, and every layer computes in onnxruntime what was simulated."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from onnx import numpy_helper

import export
from models import ConvBlock, Darknet, fuse
from tests.nets import HEAD, TINY, one_head, printed, tiny
from tests.random_nets import networks
from tests.test_export import NEEDS_LITERT, pictures
from tests.test_models import CONV, lively
from tests.test_quantized_networks import calibrated
from utils.checkpoint import write_checkpoint
from utils.darknet import cfg as cfg_file
from utils.darknet.cfg import parse
from utils.errors import InfeasibleError, InputError
from utils.export.integers import LARGEST_BIAS, Codes, Gap, codes_of
from utils.export.onnx_graph import onnx_model
from utils.export.settings import OPSETS, ExportSettings
from utils.export.verify import Subject, prove_onnx, prove_tflite
from utils.quantization.scheme import TARGETS, TFLITE, QuantSettings
from utils.runtime.choice import choose_runtime
from utils.runtime.engines import load
from utils.runtime.exported import Metadata, read_onnx

INTEGRAL = tuple(name for name in TARGETS if name not in ("fpga", *TFLITE))
FORMS = {"onnx": ExportSettings(int8=True), "tflite": ExportSettings(opset=18, mish="op")}
"""Formats of integers, and how the ONNX nodes are written that they are made of."""
BOTH = ["onnx", pytest.param("tflite", marks=NEEDS_LITERT)]
SHIFTS = QuantSettings("google", "fpga", 8, 8, fold=True)


def of_target(target: str, **more) -> QuantSettings:
    return QuantSettings(target=target, **{"weight_bits": TARGETS[target].weight_bits, **more})


def described(model: Darknet, settings: QuantSettings) -> Metadata:
    names = tuple(map(str, range(model.network.classes)))
    return Metadata(model.network, names, precision="int8", quantization=settings)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def quantized(model: Darknet, settings: QuantSettings) -> Darknet:
    """The model with quantizers whose bounds are those of two pictures."""
    return calibrated(model, pictures(model.network, 2), settings).requires_grad_(False)


def made_of(model: Darknet, settings: QuantSettings, form: str = "onnx") -> tuple[onnx.ModelProto, Codes]:
    """The ONNX nodes of a quantized model, and its integers."""
    codes = codes_of(model, explicit=settings.target == "tensorrt")
    return onnx_model(model, described(model, settings), FORMS[form], codes), codes


def proved(model: Darknet, settings: QuantSettings, form: str = "onnx", nodes: onnx.ModelProto | None = None) -> Gap:
    """The largest difference of a layer, of the given nodes or those of the model."""
    made, codes = made_of(model, settings, form)
    prove = prove_tflite if form == "tflite" else prove_onnx
    proof, gap = prove(nodes or made, Subject(model, described(model, settings)), FORMS[form], codes)
    assert np.isfinite(proof.error)
    return gap


def convolutions(model: Darknet) -> int:
    return sum(isinstance(layer, ConvBlock) for layer in model.layers)


@pytest.mark.parametrize(
    ("form", "target"),
    [
        *product(["onnx"], INTEGRAL),
        *(pytest.param("tflite", target, marks=NEEDS_LITERT) for target in INTEGRAL if target != "tensorrt"),
    ],
)
@settings(max_examples=8)
@given(network=networks())
def test_each_layer_of_any_network_differs_by_a_step_at_most(form, target, network):
    """TensorFlow Lite's in the reference kernels and in those of XNNPACK."""
    torch.manual_seed(0)
    settings = of_target(target, fold=len(network.blocks) % 2 == 0)
    model = quantized(lively(network), settings)
    gap = proved(model, settings, form)
    assert gap.steps <= 1
    assert gap.layers >= convolutions(model)


@pytest.mark.parametrize(
    "more",
    [
        {"scheme": "dorefa"},
        {"scheme": "dorefa", "fold": True},
        {"weight_bits": 2},
        {"weight_bits": 4, "fold": True},
        {"heads": "float"},
        {"first": "float", "activation": "relu"},
        {"kept": (0, 1), "activation": "linear"},
        {"first": "float", "heads": "float"},
        {"kept": (0, 2)},
        {"heads": "all", "first": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", BOTH)
def test_every_way_to_quantize_is_carried(form, more):
    activation = more.get("activation")
    settings = of_target("cpu", **{key: value for key, value in more.items() if key != "activation"})
    network = one_head(CONV.format(6, activation) + CONV.format(4, activation)) if activation else tiny()
    for seed in range(4 if activation else 1):
        torch.manual_seed(seed)
        model = quantized(lively(network), settings)
        assert proved(model, settings, form).layers >= convolutions(model) - 2


@pytest.mark.parametrize("kind", ["dead and inverted channels", "a dead layer", "a constant layer"])
@pytest.mark.parametrize("fold", [False, True])
def test_what_is_always_zero_or_turned_round_keeps_its_bias(kind, fold):
    """γ = 0 leaves a constant, γ < 0 turns the signs, a tiny γ would need a bias of more than 32 bits; behind a dead
    relu biases stay fine, though a bias has the scale of the tensor times that of the weights; so do biases beside
    weights of 0."""
    settings = of_target("cpu", fold=fold)
    model = lively(one_head(CONV.format(6, "relu" if kind == "a dead layer" else "leaky") + CONV.format(8, "relu")))
    first, second = (layer.bn for layer in model.layers[:2])
    with torch.no_grad():
        if kind == "a dead layer":
            first.weight.zero_()
            first.bias.fill_(-1.0)
            second.bias.mul_(0.01)
        elif kind == "a constant layer":
            second.weight.zero_()
            second.bias.mul_(1e-4)
        else:
            for bn in (first, second):
                bn.weight[:3] = torch.tensor([0.0, -1.3, 1e-12])
                bn.bias[:3] = torch.tensor([0.7, 0.2, 0.9])
    model = quantized(model, settings)
    most = LARGEST_BIAS * (1 + 1e-6)  # scales are rounded to float32
    assert all(np.abs(kernel.bias).max() <= most for kernel in codes_of(model).kernels.values())
    assert proved(model, settings).layers == 3


@pytest.mark.parametrize("passed", ["", "[upsample]\nstride=2\n", "[maxpool]\nsize=2\nstride=2\n"])
def test_a_rounded_convolution_may_read_a_float_head(passed):
    """Also through what only moves values."""
    settings, conv = of_target("cpu", heads="float"), CONV.format(4, "leaky")
    model = quantized(lively(one_head(conv, HEAD, "[route]\nlayers=-2\n", passed, conv)), settings)
    assert proved(model, settings).layers > 0


def test_integers_are_those_of_the_simulation():
    for scheme, fold in (("google", False), ("google", True), ("dorefa", False), ("dorefa", True)):
        settings = of_target("cpu-vnni", scheme=scheme, fold=fold)
        model = quantized(lively(tiny()), settings)
        fused = fuse(model)
        for index, kernel in codes_of(model).kernels.items():
            conv = fused.layers[index].conv
            shape = (-1, *[1] * (kernel.codes.ndim - 1))
            np.testing.assert_allclose(kernel.codes * kernel.scale.reshape(shape), conv.weight, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(kernel.bias * kernel.bias_scale, conv.bias, atol=float(kernel.bias_scale.max()))


@pytest.mark.parametrize("form", BOTH)
def test_a_layer_that_differs_is_named(form):
    """A weight that is changed after the simulation."""
    settings = of_target("cpu")
    model = quantized(lively(tiny()), settings)
    made, _ = made_of(model, settings, form)
    for tensor in made.graph.initializer:
        if tensor.name == "block2/weight/codes":
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    with pytest.raises(InfeasibleError, match=r"block 2 .*differs from the simulation by \d+ steps"):
        proved(model, settings, form, made)


@pytest.mark.parametrize("target", ["cpu", "arm"])
@pytest.mark.parametrize("name", ["yolov3-tiny", "yolov4-tiny", "mobilenetv2-yolov3"])
def test_onnxruntime_runs_integer_kernels_from_the_picture_to_the_heads(name, target, root, tmp_path):
    """For ARM with the option that is onnxruntime's default there."""
    network = cfg_file.load(root / "cfg" / f"{name}.cfg")
    settings = of_target(target)
    model = lively(network)
    made, _ = made_of(calibrated(model, torch.rand(1, 3, 64, 64), settings).requires_grad_(False), settings)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 4
    options.add_session_config_entry("session.qdqisint8allowed", str(int(target == "arm")))
    onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run = Counter(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node)
    assert run["QLinearConv"] == convolutions(model)
    assert run["QuantizeLinear"] == 1 and run["DequantizeLinear"] == len(network.heads)
    assert not {"Conv", "FusedConv", "LeakyRelu", "Add", "Concat", "MaxPool", "Relu"} & set(run)


def test_files_are_a_quarter_of_the_float_ones(root):
    network = cfg_file.load(root / "cfg" / "yolov4-tiny.cfg")
    model = lively(network)
    whole = onnx_model(model, Metadata(network, tuple(map(str, range(80)))), ExportSettings()).ByteSize()
    for heads, most in (("8", 0.26), ("float", 0.285)):
        settings = of_target("cpu", heads=heads)
        rounded = calibrated(lively(network), torch.rand(1, 3, 32, 32), settings).requires_grad_(False)
        made, _ = made_of(rounded, settings)
        assert made.ByteSize() <= most * whole
        assert not [
            tensor.name for tensor in made.graph.initializer if tensor.name.endswith(("weight/zero", "bias/zero"))
        ]


def test_tensorrt_gets_symmetric_explicit_integers():
    """S8 around 0 everywhere, scales above 0, weights rounded in the file, both inputs of an addition rounded."""
    settings = of_target("tensorrt")
    shortcut = CONV.format(4, "leaky") * 2 + "[shortcut]\nfrom=-2\nactivation=linear\n"
    model = quantized(lively(one_head(CONV.format(4, "leaky") + shortcut)), settings)
    made, _ = made_of(model, settings)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    by_output = {node.output[0]: node for node in made.graph.node}
    rounded = [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
    for node in rounded:
        assert constants[node.input[1]].min() > 0
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()
    for node in made.graph.node:
        if node.op_type in ("Conv", "Add"):
            assert [by_output[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        if node.op_type == "Conv":
            assert by_output[by_output[node.input[1]].input[0]].op_type == "QuantizeLinear"
            assert constants[node.input[2]].dtype == np.float32
    assert proved(model, settings).layers >= 5


def write(path: Path, settings: QuantSettings | None) -> Darknet:
    """Write a checkpoint of the tiny network, quantized or not; returns the model."""
    torch.manual_seed(0)
    text = TINY.replace("mish", "leaky") if settings and settings.target == "fpga" else TINY
    model = lively(parse(text, "n.cfg"))
    if settings is not None:
        model = calibrated(model, pictures(model.network, 2), settings)
    document = {"model": model.state_dict(), "ema": None, "cfg": text, "names": ["cat", "dog"], "lineage": []}
    write_checkpoint(path, document | {"quantization": settings and settings.document()})
    return model


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Write q.pt of some settings and call export.py; returns its document."""
    monkeypatch.chdir(tmp_path)

    def call(settings: QuantSettings | None, *flags: str) -> dict:
        write(tmp_path / "q.pt", settings)
        return printed(capsys, export.main, "--weights", "q.pt", *flags)

    return call


def test_the_document_and_the_file_say_how_it_was_quantized(call, tmp_path):
    document = call(of_target("cpu"), "--int8", "--decode", "--img_size", "64", "96")
    assert (document["precision"], document["output"]) == ("int8", "rows")
    assert document["steps"] in (0, 1) and document["layers"] > 4 and 0 <= document["share"] < 0.1
    found = read_onnx(tmp_path / document["path"]).metadata
    assert found.precision == "int8" and not found.wide
    assert found.quantization == of_target("cpu")
    assert all(replace(found, quantization=of_target(t, weight_bits=4)).wide for t in ("arm", "cpu-vnni"))


def test_openvino_gets_the_integers_and_is_compared_with_the_simulation(call, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    from utils.runtime import exported as metadata

    document = call(of_target("cpu"), "--format", "openvino", "--int8", "--output", "a.xml")
    assert document["layers"] > 4 and document["runtime"].startswith("OpenVINO")
    found = choose_runtime(None, "a.xml", None).exported.metadata
    assert found.precision == "int8" and found.quantization == of_target("cpu")
    monkeypatch.setattr(metadata, "TOLERANCES", {"int8": 0.0})
    monkeypatch.setattr(metadata, "MOST", 0.0)
    with pytest.raises(InfeasibleError, match=r"--format openvino: its integers differ from the simulation by 0.*not"):
        call(of_target("cpu"), "--format", "openvino", "--int8", "--output", "b.xml")
    assert not list(tmp_path.glob("b.*"))


@pytest.mark.parametrize("opset", [OPSETS[0], OPSETS[-1]])
def test_what_is_written_can_be_opened(call, opset):
    """On x86 onnxruntime 1.32 fails to fuse some signed files of opset 21; it fuses nothing where all is put out."""
    try:
        call(of_target("arm"), "--int8", "--decode", "--opset", str(opset), "--output", "a.onnx")
    except InfeasibleError as refusal:
        assert str(refusal).startswith(f"--opset {opset}: the file: onnxruntime cannot read it") and opset > 13
    else:
        load(choose_runtime(None, "a.onnx", None), torch.device("cpu"))


def test_tensorrt_names_the_command(call):
    document = call(of_target("tensorrt"), "--format", "tensorrt")
    words = shlex.split(document["command"])
    assert words[0] == "trtexec" and "--stronglyTyped" in words  # TensorRT 10 and 11
    assert not {"--int8", "--fp16", "--best"} & set(words)  # which 11 refuses
    assert Path(words[1].removeprefix("--onnx=")) == Path(document["path"]) and Path(document["path"]).is_file()


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        (None, ("--int8",), r"q\.pt is float; `python quantize\.py --weights q\.pt --data DATA\.data --target cpu`"),
        (None, ("--format", "tensorrt"), r"--format tensorrt: q\.pt is float; .*--target tensorrt`"),
        (of_target("cpu"), (), r"q\.pt: is quantized, and this file would be float; take --format onnx --int8"),
        pytest.param(of_target("arm"), ("--format", "tflite"), "take --format tflite --int8", marks=NEEDS_LITERT),
        (of_target("cpu"), ("--format", "torchscript"), r"would be float; take --format onnx --int8"),
        (of_target("cpu"), ("--format", "tensorrt"), r"--target cpu; take --format onnx --int8, or .*tensorrt"),
        (of_target("tensorrt"), ("--int8",), r"--target tensorrt; take --format tensorrt, or .*--target cpu"),
        (QuantSettings("dorefa", published=True), ("--int8",), "train it again"),
        (of_target("cpu", activation_bits=6), ("--int8",), "activations of 6 bits and weights of 7; ONNX's kernels"),
        (of_target("cpu", weight_bits=12), ("--int8",), "activations of 8 bits and weights of 12; ONNX's kernels"),
        (of_target("cpu", half_even=False), ("--int8",), "rounds halves away from 0.*--round-half even"),
        (of_target("cpu"), ("--int8", "--half"), "--half: a file has float16 or integers"),
        (of_target("cpu"), ("--int8", "--format", "weights"), "--int8: goes with --format onnx"),
        pytest.param(
            of_target("cpu"), ("--format", "tflite", "--int8", "--sample", "none.jpg"), "none.jpg", marks=NEEDS_LITERT
        ),
        (None, ("--format", "fpga"), r"--format fpga: q\.pt is float; `python quantize\.py .* --target fpga` or"),
        (QuantSettings(), ("--format", "fpga"), "--target cpu; take --format onnx --int8, or `python quantize"),
        (SHIFTS, (), "is quantized, and this file would be float; take --format fpga"),
        (SHIFTS, ("--int8",), "take --format fpga"),
        (SHIFTS, ("--format", "fpga", "--decode"), "--decode: goes with"),
        (SHIFTS, ("--sample", "p.png"), "--sample: goes with --format fpga"),
    ],
)
def test_what_has_no_integers_is_refused(call, tmp_path, settings, flags, message):
    with pytest.raises(InputError, match=message):
        call(settings, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["q.pt"]
