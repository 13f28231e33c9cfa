"""export.py: what it writes computes what PyTorch computes, says what it is, and is not written otherwise."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export
from models import fuse
from tests.nets import TINY, one_head, printed, refused, tiny
from tests.test_models import lively
from tests.test_oracle_opencv import TOLERANCE, difference
from utils.checkpoint import load_model, model_document, origin, read_checkpoint, write_checkpoint, write_darknet
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Convolutional, Maxpool, Network, Shortcut, Upsample
from utils.darknet.cfg import format_network
from utils.darknet.network import opencv_warning
from utils.errors import InfeasibleError, InputError, NumericsError
from utils.export.onnx_graph import Graph, add_detections, onnx_model
from utils.export.settings import MISH_FORMS, ExportSettings
from utils.export.verify import Agreement, _check_detections
from utils.flags import choose_model
from utils.runtime.engines import onnxruntime_engine
from utils.runtime.exported import Metadata, compare, read_metadata, read_onnx

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
HAS_LITERT = importlib.util.find_spec("ai_edge_litert") is not None
NEEDS_LITERT = pytest.mark.skipif(not HAS_LITERT, reason="ai-edge-litert is not installed")
NEEDS_OPENVINO = pytest.mark.skipif(not HAS_OPENVINO, reason="openvino is not installed")


def sized(network: Network, height: int, width: int) -> Network:
    return replace(network, net=replace(network.net, height=height, width=width))


def pictures(network: Network, count: int = 1) -> torch.Tensor:
    shape = (count, network.net.channels, network.net.height, network.net.width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def heads_of(model, images) -> list[np.ndarray]:
    with torch.inference_mode():
        return [head.numpy() for head in model(images).heads]


def eager(network: Network):
    """A model that sees objects everywhere."""
    model = lively(network)
    with torch.no_grad():
        for head in network.heads:
            model.layers[head - 1].conv.weight.normal_(std=0.5)
            model.layers[head - 1].conv.bias.zero_()
    return model


def tamed(model, images):
    """The model with heads of at most 5 before their activation: with random weights a logistic is 0 or 1 otherwise."""
    for head in model.network.heads:
        conv, reached = model.layers[head - 1].conv, []
        hook = conv.register_forward_hook(lambda module, given, made, reached=reached: reached.append(made.abs().max()))
        heads_of(model, images)
        hook.remove()
        with torch.no_grad():
            conv.weight.mul_(5 / reached[0])
    return model


def emitted(model, settings=ExportSettings(), **metadata) -> onnx.ModelProto:  # noqa: B008 - frozen
    """The file of a model, which the checker of ONNX accepts."""
    names = tuple(map(str, range(model.network.classes)))
    made = onnx_model(model, Metadata(model.network, names, **metadata), settings)
    onnx.checker.check_model(made, full_check=True)
    return made


def ran(made: onnx.ModelProto, images: torch.Tensor) -> list[np.ndarray]:
    """All outputs in onnxruntime."""
    names = [value.name for value in made.graph.output]
    return onnxruntime_engine(made.SerializeToString(), names, None).run(images.numpy())


def assert_same(want, found, tolerance=TOLERANCE):
    assert len(want) == len(found)
    for a, b in zip(want, found, strict=True):
        assert a.shape == b.shape
        assert difference(a, b) < tolerance


@pytest.mark.parametrize("form", MISH_FORMS)
def test_every_form_of_mish_is_mish(form):
    """From -90 to 90: exp(90) alone is 1e39, beyond float32."""
    network = one_head("[convolutional]\nfilters=1\nsize=1\nbatch_normalize=0\nactivation=mish\n", channels=1)
    model = lively(network)
    with torch.no_grad():
        model.layers[0].conv.weight.fill_(180)
        model.layers[0].conv.bias.fill_(-90)
        model.layers[1].conv.weight.fill_(1)
    images = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
    made = emitted(model, ExportSettings(opset=18, mish=form))
    assert_same(heads_of(model, images), ran(made, images), 1e-6)
    assert ("Mish" in {node.op_type for node in made.graph.node}) == (form == "op")


def test_one_picture_gives_at_most_300_detections():
    model = eager(sized(tiny(), 128, 128))
    (found,) = ran(emitted(model, output="detections", conf_thres=0.0, iou_thres=1.0), pictures(model.network))
    assert found.shape == (300, 7)


def test_half_refuses_a_weight_that_float16_cannot_hold():
    model = lively(tiny())
    with torch.no_grad():
        model.layers[2].conv.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(InfeasibleError, match=r"block 2 \(tiny.cfg:\d+\): layers\.2.* and float16 ends at 65504"):
        emitted(model, precision="float16")


def test_blocks_have_one_tensor_named_for_them():
    outputs = {node.output[0]: node.op_type for node in emitted(lively(tiny())).graph.node}
    assert {"block0/linear": "Conv", "block4": "Add", "block13": "Concat"}.items() <= outputs.items()
    kinds = (Convolutional, Maxpool, Shortcut, Upsample)
    assert {f"block{n}" for n, block in enumerate(tiny().blocks) if isinstance(block, kinds)} <= outputs.keys()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *product(["names"], ['["a"]', "{", "null", "[" * 5000]),
        *product(["output"], ["[]", '{"kind": "other"}', '{"kind": []}']),
        ("thresholds", "{}"),
        ("input", "3"),
        ("precision", '"float8"'),
        ("lineage", "[1]"),
        ("schema", "7"),
        ("cfg", "[net]\nwidth=x\n"),
    ],
)
def test_damaged_metadata_are_one_line(key, text):
    properties = Metadata(tiny(), ("a", "b")).properties() | {key: text}
    with refused(InputError, r"^x\.onnx[!:]"):
        read_metadata(properties, "x.onnx")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call the script in a folder with a.cfg, a.weights and a.pt; returns its document."""
    monkeypatch.chdir(tmp_path)
    model = lively(tiny())
    (tmp_path / "a.cfg").write_text(TINY)
    write_darknet(Path("a.weights"), model)
    lineage = [{"path": "before.pt", "sha256": "1"}]
    write_checkpoint(tmp_path / "a.pt", model_document(model.state_dict(), model.network, ("cat", "dog"), lineage))
    return partial(printed, capsys, export.main)


DARKNET = ("--cfg", "a.cfg", "--weights", "a.weights")


def left(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_document_says_what_was_written(call, tmp_path):
    document = call(*DARKNET)
    assert document["path"] == "runs/export/exp/model.onnx"
    assert document["bytes"] == (tmp_path / document["path"]).stat().st_size
    assert (document["schema"], document["format"], document["opset"]) == (1, "onnx", 17)
    assert document["runtime"].startswith(f"onnxruntime {onnxruntime.__version__}, CPU")
    assert 0 < document["max_abs_error"] < 1e-4
    assert left(tmp_path / "runs/export/exp").keys() == {"args.yaml", "env.json", "model.onnx"}


def test_a_checkpoint_brings_cfg_names_and_lineage(call, tmp_path):
    found = read_onnx(tmp_path / call("--weights", "a.pt", "--img_size", "32", "64", "--stretch")["path"])
    assert found.metadata.names == ("cat", "dog")
    assert found.metadata.size == (32, 64)
    assert found.metadata.mode == "stretch"
    assert found.metadata.lineage == (
        {"path": "before.pt", "sha256": "1"},
        origin(tmp_path / "a.pt") | {"path": "a.pt"},
    )
    assert replace(found.metadata.network, net=tiny().net) == tiny()
    assert found.batch == 1
    assert not found.notes
    model = onnx.load(tmp_path / "runs/export/exp/model.onnx")
    assert model.producer_name == "darknet-compression"
    heads = json.loads({entry.key: entry.value for entry in model.metadata_props}["heads"])
    assert [head["stride"] for head in heads] == [8, 4]
    assert heads[1]["anchors"][0] == [4, 4]


@pytest.mark.parametrize(
    "flags",
    [
        ("--nms", "--dynamic-batch", "--conf-thres", "0", "--iou-thres", "1"),
        ("--half",),
        ("--half", "--decode"),
        ("--opset", "13"),
        ("--opset", "21", "--mish", "op"),
        ("--mish", "softplus"),
        ("--format", "torchscript"),
        ("--format", "torchscript", "--decode"),
        ("--format", "ncnn"),
        ("--format", "ncnn", "--half"),
        ("--format", "darknet", "--fold"),
        *(pytest.param(("--format", "openvino", *more), marks=NEEDS_OPENVINO) for more in ((), ("--half",))),
        *(pytest.param(("--format", "tflite", *more), marks=NEEDS_LITERT) for more in ((), ("--half", "--decode"))),
    ],
    ids=" ".join,
)
def test_every_kind_of_file_is_proved_and_written(call, tmp_path, flags):
    document = call(*DARKNET, *flags)
    assert document["error"] <= document["tolerance"]
    files = [document["path"], *document.get("files", ())]
    assert sum((tmp_path / file).stat().st_size for file in files) == document["bytes"]


def test_of_equal_confidences_the_limit_may_keep_any():
    """400 boxes apart, the first 10 more sure than the others, of which each program keeps 290."""
    rows = torch.tensor([[[20.0 * i, 8, 10, 10, 0.9 if i < 10 else 0.5, 1, 0] for i in range(400)]])
    boxes = [[0, 20 * i - 5, 3, 20 * i + 5, 13, 0.9 if i < 10 else 0.5, 0] for i in range(400)]
    metadata, settings = Metadata(tiny(), ("a", "b")), ExportSettings(nms=True)
    for kept in (boxes[:300], [*boxes[:10], *boxes[110:]]):
        _check_detections(rows, np.array(kept), metadata, settings)
    with pytest.raises(InfeasibleError, match="10 of 10 detections are missing"):
        _check_detections(rows, np.array(boxes[100:]), metadata, settings)


def test_boxes_that_overlap_by_the_threshold_itself_are_no_difference():
    """8 x 8 boxes a pixel apart, as with integers: two columns apart they overlap by 48 / 80, which float32 rounds."""
    cells = torch.cartesian_prod(torch.arange(16), torch.arange(16)) + 0.49098158
    rows = torch.cat((cells, torch.tensor([8.0, 8, 0.9, 1]).expand(256, -1)), dim=1)[None]
    metadata, settings = Metadata(one_head(), ("a",)), ExportSettings(nms=True)
    graph = Graph(settings.opset, np.float32, settings.mish)
    graph.give(add_detections(graph, "rows", 1, metadata, settings), ("detections", 7))
    session = onnxruntime.InferenceSession(graph.model("rows", rows.shape, {}).SerializeToString())
    (detections,) = session.run(None, {"rows": rows.numpy()})
    _check_detections(rows, detections, metadata, settings)


def test_torchscript_computes_the_same_and_carries_metadata(call, tmp_path):
    document = call("--weights", "a.pt", "--format", "torchscript", "--output", "x/a.torchscript")
    assert document["path"] == "x/a.torchscript"
    extra = {"metadata.json": ""}
    module = getattr(torch.jit, "load")(tmp_path / "x/a.torchscript", _extra_files=extra)  # noqa: B009 - see test_safety
    images = pictures(tiny())
    with torch.inference_mode():
        assert_same(heads_of(lively(tiny()), images), [head.numpy() for head in module(images)], 1e-5)
    assert json.loads(json.loads(extra["metadata.json"])["names"]) == ["cat", "dog"]


DEPTHWISE = one_head(
    "[depthwise]\nsize=3\npad=1\nbatch_normalize=1\nactivation=leaky\n",
    "[convolutional]\nfilters=4\nbias=0\nactivation=leaky\n",
)


@pytest.mark.parametrize("network", [tiny(), DEPTHWISE], ids=["tiny", "depthwise"])
def test_a_folded_network_computes_the_same_and_opencv_reads_it(call, tmp_path, capsys, network):
    """Without batch normalisation; a [depthwise] becomes a grouped convolution, and every convolution has a bias."""
    (tmp_path / "d.cfg").write_text(format_network(network))
    model = lively(network)
    write_darknet(Path("d.weights"), model)
    files = ("--cfg", "d.cfg", "--weights", "d.weights", "--format", "darknet")
    assert call(*files, "--fold", "--output", "f.weights")["format"] == "darknet"
    folded = cfg_file.load(tmp_path / "f.cfg")
    assert "OpenCV" not in capsys.readouterr().err and opencv_warning(folded) is None
    assert not any(getattr(block, "batch_normalize", False) for block in folded.blocks)
    images = pictures(network)
    heads = heads_of(load_model(choose_model(folded, "f.weights")).model.eval(), images)
    assert_same(heads_of(model, images), heads, 1e-5)


def test_weights_to_pt_to_weights_is_the_same_file(call, tmp_path):
    (tmp_path / "n.names").write_text("x\ny\n")
    there = call(*DARKNET, "--format", "pt", "--output", "b.pt", "--names", "n.names")
    back = call("--weights", "b.pt", "--format", "weights", "--output", "c.weights")
    assert there["max_abs_error"] == back["max_abs_error"] == 0
    assert (tmp_path / "c.weights").read_bytes() == (tmp_path / "a.weights").read_bytes()
    assert cfg_file.load(tmp_path / "c.cfg") == cfg_file.load(tmp_path / "b.cfg") == tiny()
    checkpoint = read_checkpoint(tmp_path / "b.pt")
    assert checkpoint["names"] == ["x", "y"]
    assert checkpoint["lineage"] == [origin(tmp_path / "a.weights") | {"path": "a.weights"}]


def test_weights_that_opencv_misreads_come_with_a_warning(call, tmp_path, capsys):
    (tmp_path / "a.cfg").write_text(TINY.replace("activation=relu\n", "activation=relu6\n"))
    export.main([*DARKNET, "--format", "weights"])
    out, err = capsys.readouterr()
    assert "OpenCV's reader of Darknet files refuses activation=relu6" in err
    assert out.startswith("runs/export/exp/model.weights: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--opset", "22"), "--opset: 22: allowed are 13 to 21"),
        (("--format", "torchscript", "--nms"), "--nms: goes with --format onnx"),
        (("--format", "pt", "--half"), "--half: goes with --format onnx"),
        (("--format", "ncnn", "--int8"), "--int8: goes with --format onnx, openvino, tensorrt or tflite"),
        (("--fold",), "--fold: goes with --format darknet"),
        (("--target", "fpga"), "block 1 (a.cfg:15): mish needs more than shifts; `python -m utils.darknet.rewrite"),
        (("--format", "ncnn", "--output", "a.param"), "a file of --format ncnn is named NAME.ncnn.param"),
        (("--format", "ncnn", "--output", "c.ncnn.param"), "--output c.ncnn.bin: exists"),
        (("--format", "weights", "--decode"), "--decode: goes with --format onnx, openvino, tensorrt, tflite or torch"),
        (("--format", "tflite", "--sample", "none.png"), "--sample: goes with --format tflite --int8"),
        (("--format", "pt", "--opset", "17"), "--opset: goes with --format onnx"),
        (("--multi-label",), "--multi-label: goes with --nms"),
        (("--nms", "--decode"), "--decode: --nms puts out detections"),
        (("--mish", "op"), "--mish op: needs --opset 18 or more"),
        (("--img_size", "65"), "--img_size 65: not a multiple of 8"),
        (("--output", "a.pt"), "--output a.pt: a file of --format onnx is named NAME.onnx"),
        (("--output", "x/.onnx"), "--output x/.onnx: a file of --format onnx is named NAME.onnx"),
        (("--format", "pt", "--output", "a.pt"), "--output a.pt: exists"),
        (("--format", "weights", "--output", "new/../a.weights"), "--output new/../a.weights: exists"),
        (("--format", "weights", "--output", "mine.weights"), "--output mine.cfg: exists"),
        (("--format", "pt", "--output", "a.pt", "--name", "b"), "--output: is the file itself"),
        (("--names", "three.names"), "three.names: 3 names, but a.weights has 2 classes"),
        (("--project", "a.cfg/x"), "--project a.cfg/x"),
        (("--name", "a/b"), "--name 'a/b'"),
        (("--weights", "nothing.weights"), "nothing.weights: no such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, tmp_path, flags, message):
    (tmp_path / "new").mkdir()
    for name in ("c.ncnn.bin", "mine.cfg"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "three.names").write_text("a\nb\nc\n")
    before = left(tmp_path)
    with refused(InputError, re.escape(message)):
        call(*DARKNET, *flags)
    assert left(tmp_path) == before


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--decode",),
        ("--format", "torchscript"),
        ("--format", "ncnn"),
        pytest.param(("--format", "tflite"), marks=NEEDS_LITERT),
        ("--format", "darknet", "--fold"),
    ],
    ids=" ".join,
)
def test_a_file_that_differs_from_pytorch_is_not_written(call, tmp_path, monkeypatch, flags):
    """The folded network gets another weight than the one it is compared with."""
    from utils.export import onnx_graph, workflow

    def wrong(model):
        fused = fuse(model)
        fused.layers[6].conv.weight[0, 0] += 1
        return fused

    for module in (onnx_graph, workflow):
        monkeypatch.setattr(module, "fuse", wrong)
    before = left(tmp_path)
    with pytest.raises(
        InfeasibleError, match=r"differ from PyTorch's by .* more than the 0\.001 .*; nothing is written"
    ):
        call(*DARKNET, *flags)
    assert left(tmp_path) == before


def test_a_file_that_onnxruntime_cannot_read_is_not_written(call, tmp_path, monkeypatch):
    """As 1.32 cannot with opset 21, signed integers and a sum over a part of the channels."""
    from utils.export import verify

    monkeypatch.setattr(verify, "with_outputs", lambda *_: b"nonsense")
    before = left(tmp_path)
    with refused(InfeasibleError, r"--opset 21: the file: onnxruntime cannot read it.*; take another one; nothing is"):
        call(*DARKNET, "--opset", "21")
    assert left(tmp_path) == before


@pytest.mark.parametrize(
    "flags", [(), ("--format", "ncnn"), ("--format", "torchscript"), ("--format", "darknet", "--fold")]
)
def test_a_network_that_overflows_is_not_written(call, tmp_path, flags):
    state = {key: value.numpy() for key, value in lively(tiny()).state_dict().items()}
    state["layers.0.conv.weight"] = np.full_like(state["layers.0.conv.weight"], 3e38)
    weights_file.write("a.weights", tiny(), state)
    with pytest.raises(NumericsError, match="the network puts out NaN or infinity"):
        call(*DARKNET, *flags)
    assert not (tmp_path / "runs").exists()


def test_weights_that_come_back_otherwise_are_not_written(call, tmp_path, monkeypatch):
    read = weights_file.read
    monkeypatch.setattr(weights_file, "read", lambda *args: {k: v + 1 for k, v in read(*args).items()})
    with pytest.raises(InfeasibleError, match="comes back with other values; nothing is written"):
        call("--weights", "a.pt", "--format", "weights", "--output", "b.weights")
    assert left(tmp_path).keys() == {"a.cfg", "a.pt", "a.weights"}


def test_nan_is_no_agreement():
    gaps = compare([np.ones(3)], [np.array([1, np.nan, 1])])
    with pytest.raises(InfeasibleError, match="differ from PyTorch's by nan"):
        Agreement(*gaps, 1e-3, "here").check("x")
    assert compare([np.ones(3)], [np.ones(4)])[1] == float("inf")


def started(root, folder, before: str, *commands: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Export.py in a process of its own, behind some code, once for each command."""
    code = f"import importlib.util, sys\nfrom utils import cli\n{before}\nimport export\ntry:\n"
    code += f"    cli.run(lambda: [export.main(command) for command in {commands!r}])\n"
    code += "finally:\n    print(*sys.modules, sep='\\n')\n"
    options = {"cwd": folder, "env": {"PYTHONPATH": str(root)}, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run([sys.executable, "-c", code], **options)


@pytest.mark.parametrize(
    ("format_", "package", "file"),
    [("onnx", "onnx", "export"), ("onnx", "onnxruntime", "export"), ("tflite", "ai_edge_litert", "tflite")],
)
def test_a_missing_package_is_one_line_before_torch_and_before_any_file(format_, package, file, root, tmp_path):
    before = "find = importlib.util.find_spec\n"
    before += f"importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)"
    done = started(root, tmp_path, before, ("--weights", "nowhere.pt", "--format", format_))
    assert done.returncode == 2 and not {"torch", "onnx"} & set(done.stdout.splitlines())
    line = f"error: --format {format_}: needs the package {package}; pip install -r requirements-{file}.txt\n"
    assert done.stderr == line
    assert not left(tmp_path)


def test_formats_that_need_no_onnx_work_without_it(call, root, tmp_path):
    before = "sys.modules |= dict.fromkeys(('onnx', 'onnxruntime', 'ncnn', 'openvino'))"
    commands = [("--weights", "a.pt", "--format", form) for form in ("darknet", "pt", "torchscript")]
    done = started(root, tmp_path, before, *commands)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs/export").iterdir())) == 3


def test_weights_that_are_left_out_are_looked_for_in_runs(call):
    with pytest.raises(InputError, match=r"--weights left out, and no run in runs fits a\.cfg"):
        call("--cfg", "a.cfg")
