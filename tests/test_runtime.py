"""Runtimes: test.py and detect.py find the same with PyTorch, onnxruntime and OpenCV, from one file each."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch

import detect
import export
from benchmarks import latency
from benchmarks.compare import network_files
from tests.media import small_set
from tests.nets import NEEDS_IMPORTER, TINY, one_head, printed, refused, tiny
from tests.test_examples import EXAMPLES
from tests.test_export import HAS_LITERT, HAS_OPENVINO, NEEDS_LITERT, NEEDS_OPENVINO, eager
from tests.test_models import lively
from utils.checkpoint import load_model, write_checkpoint, write_darknet
from utils.darknet import cfg as cfg_file
from utils.darknet.cfg import format_network
from utils.darknet.network import adapt_classes
from utils.errors import InfeasibleError, InputError, SuiteError, WeightsError
from utils.export.settings import CLIENTS, SUFFIXES
from utils.flags import EXPORTED
from utils.runtime import engines
from utils.runtime.choice import KINDS as KINDS_OF
from utils.runtime.choice import RUNTIMES, Named, choose_runtime
from utils.runtime.engines import ENGINES, Engine, ForeignModel, load, onnxruntime_engine, opencv_onnx_engine
from utils.runtime.exported import read_onnx, reference

NAMES = ("cat", "dog")
CPU = torch.device("cpu")
DARKNET = ("--cfg", "a.cfg", "--weights", "a.weights")
FILES = {
    "a.onnx": (),
    "dynamic.onnx": ("--dynamic-batch",),
    "rows.onnx": ("--decode",),
    "nms.onnx": ("--nms", "--conf-thres", "0.5", "--iou-thres", "0.5"),
    "all_nms.onnx": ("--nms", "--conf-thres", "0.5", "--iou-thres", "0.5", "--dynamic-batch", "--multi-label"),
    "no.onnx": ("--nms", "--conf-thres", "0.9999"),
    "stretch.onnx": ("--stretch",),
    "wide.onnx": ("--img_size", "32", "64"),
    "a.ncnn.param": ("--format", "ncnn"),
    "a.xml": ("--format", "openvino"),
    "rows.xml": ("--format", "openvino", "--decode", "--dynamic-batch"),
    "a.tflite": ("--format", "tflite"),
    "rows.tflite": ("--format", "tflite", "--decode"),
}
INSTALLED = {".xml": HAS_OPENVINO, ".tflite": HAS_LITERT}
FILES = {name: flags for name, flags in FILES.items() if INSTALLED.get(Path(name).suffix, True)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with five pictures, a network as .pt, .weights and in several .onnx files, and labels that are what the
    network finds, so that its AP is neither 0 nor 1."""
    folder = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        model = eager(tiny())
        write_checkpoint(Path("a.pt"), {"model": model.state_dict(), "ema": None, "cfg": TINY, "names": list(NAMES)})
        write_darknet(Path("a.weights"), model)
        Path("a.cfg").write_text(TINY)
        for name, flags in FILES.items():
            export.main(["--weights", "a.pt", "--output", name, *flags])
        small_set([""] * 5)
        label_with_detections()
        Path("three.data").write_text("classes = 3\nvalid = val.txt\nnames = three.names\n")
        Path("three.names").write_text("a\nb\nc\n")
    return folder


def label_with_detections():
    """Every third detection of each picture, moved a little, becomes an object."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        detect.main(["--weights", "a.pt", "--source", "images", "--nosave", "--json", "--output", "found"])
    for document in json.loads(out.getvalue()):
        rows = []
        for found in document["detections"][:30:3]:
            x1, y1, x2, y2 = np.array(found["box"]) / (90, 60, 90, 60)
            x2, y2 = max(x2 * 0.9, x1 + 0.02), max(y2 * 0.9, y1 + 0.02)
            rows.append(f"{found['class']} {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}\n")
        Path(f"labels/{Path(document['source']).stem}.txt").write_text("".join(rows))


@pytest.fixture
def folder(made, monkeypatch):
    """That folder, as the current one."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    return made


@pytest.fixture
def measured(folder, script, capsys):
    """Call test.py; returns its document."""

    return partial(printed, capsys, script.main, "--data", "set.data", "--batch-size", "3")


@pytest.fixture
def found(folder, capsys, tmp_path):
    """Call detect.py; returns its list."""

    return partial(printed, capsys, detect.main, "--source", "images", "--nosave", "--output", str(tmp_path / "d"))


def assert_same_detections(want: list, have: list):
    """The same objects in every picture; those of equal confidence in any order."""
    assert sum(len(document["detections"]) for document in want) > 20
    for a, b in zip(want, have, strict=True):
        assert len(a["detections"]) == len(b["detections"])
        theirs = np.array([[row["class"], 100 * row["confidence"], *row["box"]] for row in b["detections"]])
        for row in a["detections"]:
            own = np.array([row["class"], 100 * row["confidence"], *row["box"]])
            assert np.abs(theirs - own).max(axis=1).min() < 0.02


KINDS = {
    "onnxruntime": ("--weights", "a.onnx"),
    "onnxruntime, any batch": ("--weights", "dynamic.onnx"),
    "onnxruntime, decoded": ("--weights", "rows.onnx"),
    "onnxruntime, with its cfg": ("--weights", "a.onnx", "--cfg", "a.cfg", "--runtime", "onnxruntime"),
    "OpenCV, onnx": ("--weights", "a.onnx", "--runtime", "opencv"),
    "OpenCV, decoded": ("--weights", "rows.onnx", "--runtime", "opencv"),
    "OpenCV, Darknet": (*DARKNET, "--runtime", "opencv"),
    "ncnn": ("--weights", "a.ncnn.param"),
    "ncnn, with its cfg": ("--weights", "a.ncnn.param", "--cfg", "a.cfg", "--runtime", "ncnn"),
    "ncnn, in float16 where the processor can": ("--weights", "a.ncnn.param", "--half"),
    "OpenVINO": ("--weights", "a.xml"),
    "OpenVINO, any batch, decoded": ("--weights", "rows.xml", "--runtime", "openvino"),
    "OpenVINO, onnx": ("--weights", "a.onnx", "--runtime", "openvino"),
    "LiteRT": ("--weights", "a.tflite"),
    "LiteRT, decoded": ("--weights", "rows.tflite", "--cfg", "a.cfg", "--runtime", "litert"),
}
NEEDS = {"OpenCV, Darknet": NEEDS_IMPORTER, "OpenVINO": NEEDS_OPENVINO, "LiteRT": NEEDS_LITERT}
CASES = [
    pytest.param(flags, name.split(",")[0], id=name, marks=[mark for kind, mark in NEEDS.items() if kind in name])
    for name, flags in KINDS.items()
]


def test_every_kind_of_file_is_in_every_table():
    assert set(KINDS_OF) < set(EXPORTED)
    assert all(SUFFIXES[kind.format].endswith(suffix) for suffix, kind in KINDS_OF.items())
    assert {f"{name}_client.py" for name in CLIENTS.values()} == {path.name for path in Path(EXAMPLES).glob("*.py")}
    assert set(RUNTIMES) == {"torch", *ENGINES} == {"torch", *latency.FORMATS}


@pytest.mark.parametrize(("flags", "runtime"), CASES)
def test_every_runtime_detects_and_measures_the_same(found, measured, flags, runtime):
    """Batches of 3 and 2, also through files that take one picture at a time."""
    detections = found(*flags)
    assert_same_detections(found("--weights", "a.pt"), detections)
    if flags[0] != "--cfg":
        assert all(row["name"] == NAMES[row["class"]] for document in detections for row in document["detections"])
    want, have = measured("--weights", "a.pt"), measured(*flags)
    assert 0.01 < want["map50_95"] < 0.99
    for key in ("map50", "map50_95", "precision", "recall", "f1"):
        assert have[key] == pytest.approx(want[key], abs=1e-3)
    assert (have["parameters"], have["macs"]) == (want["parameters"], want["macs"])
    assert want["runtime"].startswith("PyTorch ")
    assert have["runtime"].startswith(runtime)
    assert f"threads: {torch.get_num_threads()}" in have["runtime"]


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=NEEDS_OPENVINO)])
def test_a_file_that_ends_in_nms_keeps_what_is_kept_at_its_thresholds(found, measured, runtime):
    """Of several pictures at a time, too. A file that finds nothing is no error."""
    plain, inside = ("--weights", "a.pt", "--conf-thres", "0.5", "--iou-thres", "0.5"), ("--runtime", runtime)
    assert_same_detections(found(*plain), found("--weights", "nms.onnx", *inside))
    assert_same_detections(
        found(*plain, "--classes", "1"),
        found("--weights", "nms.onnx", "--conf-thres", "0.5", "--classes", "1", *inside),
    )
    for name, flags in (("nms.onnx", ("--single-label",)), ("all_nms.onnx", ())):
        want, have = measured(*plain, *flags), measured("--weights", name, *inside)
        assert have["map50_95"] == pytest.approx(want["map50_95"], abs=1e-3) and 0.01 < want["map50_95"] < 0.99
        assert have["iou_thres"] == want["iou_thres"] == 0.5
    assert not any(document["detections"] for document in found("--weights", "no.onnx", *inside))
    assert measured("--weights", "no.onnx", *inside)["map50"] == 0


def test_a_file_decides_how_pictures_are_fitted_unless_a_flag_does(found):
    stretched = found("--weights", "a.pt", "--stretch")
    assert found("--weights", "a.onnx", "--stretch")[0]["detections"] != found("--weights", "a.onnx")[0]["detections"]
    for flags in (("--weights", "stretch.onnx"), ("--weights", "a.onnx", "--stretch")):
        assert_same_detections(stretched, found(*flags))


def test_the_size_is_that_of_the_file(measured):
    document = measured("--weights", "wide.onnx")
    assert document["macs"] == measured("--weights", "a.pt", "--img_size", "32", "64")["macs"]
    benchmark = measured("--weights", "wide.onnx", "--task", "benchmark")["benchmark"]
    assert len(benchmark) == 3
    assert {row["macs"] for row in benchmark} == {document["macs"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--weights", "a.onnx", "--img_size", "96"), "--img_size 96 96: a.onnx takes 64 × 64 only"),
        (("--weights", "a.onnx", "--augment"), "--augment: looks at images of several sizes, and a.onnx takes one"),
        (("--weights", "a.onnx", "--half"), "--half: onnxruntime computes as the file says"),
        (("--weights", "a.onnx", "--device", "0"), "--device 0: onnxruntime runs on the CPU"),
        (("--weights", "a.onnx", "--runtime", "torch"), "a.onnx is run by onnxruntime, opencv or openvino; give"),
        (("--weights", "nms.onnx", "--conf-thres", "0.2"), "--conf-thres: nms.onnx: ends in NMS with confidence 0.5"),
        (("--weights", "nms.onnx", "--runtime", "opencv"), "--runtime opencv: nms.onnx: ends in NMS with confidence"),
        (("--weights", "a.ncnn.param", "--img_size", "96"), "--img_size 96 96: a.ncnn.param takes 64 × 64 only"),
        (("--weights", "a.ncnn.param", "--device", "0"), "--device 0: ncnn runs on the CPU"),
        (("--weights", "a.ncnn.param", "--runtime", "opencv"), "a.ncnn.param is run by ncnn; it runs .onnx files"),
        (("--weights", "a.onnx", "--runtime", "ncnn"), "run by onnxruntime, opencv or openvino; it runs .param files"),
        (("--weights", "a.pt", "--runtime", "ncnn"), "--runtime ncnn: a.pt is no file for it; it runs .param files"),
        (("--weights", "none.ncnn.param"), "none.ncnn.param: no such file"),
        (("--weights", "alone.param"), "alone.json: no such file, and it says what alone.param is"),
        (("--weights", "a.pt", "--runtime", "onnxruntime"), "a.pt is no file for it; it runs .onnx files"),
        (("--weights", "a.pt", "--runtime", "opencv"), "--runtime opencv: a.pt is a .pt file"),
        (("--weights", "a.onnx", "--cfg", "other.cfg"), "a.onnx: made for another network ("),
        (("--weights", "none.onnx"), "none.onnx: no such file"),
        ((*DARKNET, "--runtime", "opencv", "--half"), "--half: opencv computes"),
        pytest.param(
            ("--cfg", "relu6.cfg", *DARKNET[2:], "--runtime", "opencv"),
            "--runtime opencv: OpenCV's reader of Darknet files refuses activation=relu6",
            marks=NEEDS_IMPORTER,
        ),
    ],
)
@pytest.mark.parametrize("call", ["measured", "found"])
def test_what_a_runtime_cannot_do_is_refused_in_one_line(request, folder, call, flags, message):
    (folder / "other.cfg").write_text(TINY.replace("filters=12", "filters=10"))
    (folder / "relu6.cfg").write_text(TINY.replace("activation=relu\n", "activation=relu6\n"))
    (folder / "alone.param").write_bytes((folder / "a.ncnn.param").read_bytes())
    with refused(InputError, re.escape(message)):
        request.getfixturevalue(call)(*flags)


@pytest.mark.parametrize("flag", ["--agnostic-nms", "--single-cls", "--single-label", "--task=benchmark"])
def test_flags_that_nms_in_a_file_cannot_follow_are_refused(found, measured, flag):
    with refused(InputError, flag.partition("=")[0]):
        (found if flag == "--agnostic-nms" else measured)("--weights", "nms.onnx", flag)


def test_benchmarks_do_not_compare_a_file_that_ends_in_nms(folder):
    with refused(InputError, r"nms\.onnx: ends in NMS at its own thresholds, which lowers AP"):
        network_files(Named("nms", "nms.onnx", None))


@pytest.mark.parametrize("file", ["a.pt", "a.onnx", "a.ncnn.param"])
def test_a_cfg_of_another_class_count_is_adapted_and_said(folder, found, file):
    """As one cfg serves every data set."""
    (folder / "eighty.cfg").write_text(format_network(adapt_classes(tiny(), 80)))
    files = choose_runtime(cfg_file.load(folder / "eighty.cfg"), file, None)
    notes = (*files.notes, *(load_model(files).notes if file == "a.pt" else ()))
    assert f"eighty.cfg: adapted from 80 to 2 classes, the classes in {file}" in " ".join(notes)
    assert_same_detections(found("--weights", file), found("--weights", file, "--cfg", str(folder / "eighty.cfg")))


def test_data_of_another_class_count_is_refused(folder, script, capsys):
    with pytest.raises(InputError, match=r"a\.onnx: a network of 2 classes, but three\.data has 3"):
        script.main(["--data", "three.data", "--weights", "a.onnx"])
    with pytest.raises(InputError, match=r"three\.names: 3 names, but a\.onnx has 2 classes"):
        detect.main(["--names", "three.names", "--weights", "a.onnx", "--source", "images"])


@NEEDS_IMPORTER
def test_opencv_reads_darknet_files_at_any_size(found):
    for size in (("--img_size", "96", "64"), ("--augment",)):
        assert_same_detections(found(*DARKNET, *size), found(*DARKNET, *size, "--runtime", "opencv"))


@NEEDS_IMPORTER
def test_opencv_may_add_its_own_epsilon_to_tiny_variances(tmp_path):
    network = one_head("[convolutional]\nbatch_normalize=1\nfilters=4\nactivation=leaky\n")
    model = lively(network)
    model.layers[0].bn.running_var.fill_(1e-6)
    write_darknet(tmp_path / "w", model)
    found = load(choose_runtime(network, str(tmp_path / "w"), "opencv"), CPU)  # it refuses what computes other heads
    images = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        assert (found.model(images).heads[0] - model(images).heads[0]).abs().amax() > 0.01


def changed(source: Path, path: Path, change) -> Path:
    model = onnx.load(source)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def outside(model):
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "/etc/hostname")
    tensor.ClearField("raw_data")


LOOP = onnx.helper.make_node("Loop", ["many"], ["x"], body=onnx.GraphProto(name="body"))
OTHERS = "its inputs and outputs are not those its metadata describe"
HEIGHT = onnx.TensorShapeProto.Dimension(dim_value=32)
CHANGES = {
    "loop": (lambda model: model.graph.node.append(LOOP), "has the operator Loop; files of export.py have no loops"),
    "hidden loop": (lambda model: model.functions.add(name="f", domain="d").node.append(LOOP), "has the operator Loop"),
    "no metadata": (
        lambda model: model.ClearField("metadata_props"),
        "says neither its network nor its classes: another program",
    ),
    "other name": (lambda model: model.graph.output[0].MergeFrom(onnx.ValueInfoProto(name="other")), OTHERS),
    "other size": (lambda model: model.graph.input[0].type.tensor_type.shape.dim[2].MergeFrom(HEIGHT), OTHERS),
    "one output less": (lambda model: model.graph.output.pop(), OTHERS),
    "tensors outside": (outside, "keeps tensors in other files"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_onnx_file_that_was_changed_is_refused(folder, tmp_path, kind):
    change, message = CHANGES[kind]
    with pytest.raises(WeightsError, match=rf"x\.onnx: {message}"):
        read_onnx(changed(folder / "a.onnx", tmp_path / "x.onnx", change))


def test_a_changed_weight_is_noticed(folder, tmp_path):
    def flip(model):
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]

    assert read_onnx(folder / "a.onnx").notes == ()
    (note,) = read_onnx(changed(folder / "a.onnx", tmp_path / "x.onnx", flip)).notes
    assert "is not as export.py wrote it" in note


PAIRS = [
    (name, runtime)
    for name in ("a.onnx", "rows.onnx", "nms.onnx", "a.ncnn.param", "a.xml", "rows.xml", "a.tflite", "rows.tflite")
    for runtime in KINDS_OF[Path(name).suffix].runtimes
    if name in FILES and (runtime != "openvino" or HAS_OPENVINO) and (name != "nms.onnx" or runtime == "onnxruntime")
]


def wrong(make):
    """A function that makes engines, one of whose values in a thousand is off by a hundredth of the largest."""

    def made(*given) -> Engine:
        right = make(*given)

        def run(images):
            outputs = [np.array(output) for output in right.run(images)]
            for output in outputs:
                output.reshape(-1)[::7] += 0.01 * np.abs(output).max()
            return outputs

        return replace(right, run=run)

    return made


@pytest.mark.parametrize(("name", "runtime"), PAIRS)
def test_a_runtime_that_computes_something_else_is_refused(folder, monkeypatch, name, runtime):
    files = choose_runtime(None, name, runtime)
    engine = load(files, CPU).runtime
    monkeypatch.setattr(engines, "ENGINES", {runtime: wrong(ENGINES[runtime])})
    with refused(InfeasibleError, f"^{re.escape(f'{name}: {engine} computes another network than')} the file was", 6):
        load(files, CPU)


@NEEDS_IMPORTER
def test_darknet_files_are_compared_with_pytorch(folder, monkeypatch):
    files = choose_runtime(cfg_file.load("a.cfg"), "a.weights", "opencv")
    load(files, CPU, (64, 96))
    monkeypatch.setattr(engines, "opencv_darknet_engine", wrong(engines.opencv_darknet_engine))
    with pytest.raises(InfeasibleError, match=r"a\.weights: OpenCV .* computes another network"):
        load(files, CPU)


def test_a_file_of_a_version_before_is_not_compared(folder, monkeypatch):
    files = choose_runtime(None, "a.onnx", None)
    before = replace(files.exported, metadata=replace(files.exported.metadata, reference=None))
    monkeypatch.setattr(engines, "ENGINES", {"onnxruntime": wrong(ENGINES["onnxruntime"])})
    assert load(replace(files, exported=before), CPU).network == files.network


def test_integers_may_differ_by_a_multiple_of_what_the_proof_differed_by():
    """√(Σ(a − b)² / Σa²) of 0.05 at the proof lets 0.15 pass; one of 0.01 lets the least limit pass."""
    want = [np.ones((1, 100))]
    for gap, limit in ((0.05, 0.15), (0.01, 0.1)):
        found = reference(want, [want[0] * (1 + gap)], "int8")
        assert found.gap == pytest.approx(gap)
        assert found.limit("int8") == pytest.approx(limit)


@pytest.mark.parametrize(("integers", "classic"), [(True, True), (False, False)])
def test_opencv_5_gets_int8_files_in_its_classic_engine(folder, monkeypatch, integers, classic):
    read, given = cv2.dnn.readNetFromONNX, []
    monkeypatch.setattr(cv2.dnn, "ENGINE_CLASSIC", 1, raising=False)
    monkeypatch.setattr(cv2.dnn, "readNetFromONNX", lambda path, **options: given.append(options) or read(path))
    opencv_onnx_engine(Path("a.onnx"), ["head0"], integers=integers)
    assert given == [{"engine": 1} if classic else {}]


@pytest.mark.parametrize(
    ("cpu", "wide", "slower"),
    [
        ("flags : fpu avx512f avx512_vnni\n", True, False),
        ("flags : fpu avx_vnni sse\n", True, False),
        ("flags : fpu avx512f\n", True, True),
        (None, True, True),
        ("flags : fpu avx2\n", False, False),
    ],
)
def test_weights_of_8_bits_cost_time_only_where_products_saturate(folder, tmp_path, monkeypatch, cpu, wide, slower):
    """None: a system that does not list the instructions of its processor."""
    import onnxruntime

    entries = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            entries.append((key, value))

    if cpu is not None:
        (tmp_path / "cpuinfo").write_text(cpu)
    monkeypatch.setattr(engines, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    onnxruntime_engine(Path("a.onnx"), ["head0"], 1, wide=wide)
    assert entries == [("session.x64quantprecision", "1")] * slower


def test_what_onnxruntime_cannot_read_is_one_line(folder, tmp_path):
    changed(folder / "a.onnx", tmp_path / "x.onnx", lambda model: setattr(model.graph.node[0], "op_type", "Nonsense"))
    for runtime, name in (("onnxruntime", "onnxruntime"), ("opencv", "OpenCV")):
        with refused(WeightsError, rf"x\.onnx: {name}.* cannot read it: "):
            load(choose_runtime(None, str(tmp_path / "x.onnx"), runtime), CPU)


@pytest.fixture
def copied(folder, tmp_path):
    """Copy the files of a network beside one another under the name x; returns the one that is named."""

    def copy(name: str) -> Path:
        for path in folder.iterdir():
            if path.stem == Path(name).stem:
                (tmp_path / f"x{path.suffix}").write_bytes(path.read_bytes())
        return tmp_path / f"x{Path(name).suffix}"

    return copy


def metadata_of(path: str):
    found = KINDS_OF[Path(path).suffix].read(Path(path)).metadata
    return replace(found, lineage=(), reference=replace(found.reference, gap=0.0))  # how far the runtime was off


@pytest.mark.parametrize("name", ["a.ncnn.param", pytest.param("a.xml", marks=NEEDS_OPENVINO)])
def test_files_for_other_runtimes_say_the_same_of_themselves(folder, name):
    assert metadata_of(name) == metadata_of("a.onnx")
    assert KINDS_OF[Path(name).suffix].read(Path(name)).metadata.lineage


def cut(share: float):
    return lambda data: data[: int(share * len(data))]


def flipped(position: float):
    """Another bit at a share of the file, or at a byte from its beginning or end."""

    def flip(data: bytes) -> bytes:
        place = int(position * len(data)) if isinstance(position, float) else position % len(data)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flip


CUT = tuple(cut(share) for share in (0.0, 0.001, 0.3, 0.9, 0.999))
OTHER = tuple(
    lambda _, data=data: data
    for data in (b"\0" * 100, b"PK\x03\x04" + b"\0" * 50, b"hello\n" * 9, bytes(range(256)) * 8)
)
DESCRIPTIONS = tuple(
    lambda _, text=text: text.encode()
    for text in ("{", "[]", "3", '{"sha256": {}}', '{"sha256": {".param": 1, ".bin": 2}}', "[" * 5000)
)
DAMAGE = {
    ("a.onnx", ".onnx"): (*CUT, *OTHER),
    ("a.ncnn.param", ".param"): (*CUT, *OTHER, flipped(-1)),
    ("a.ncnn.param", ".bin"): (*CUT, *OTHER, flipped(-1)),
    ("a.ncnn.param", ".json"): (*CUT, *DESCRIPTIONS),
    ("a.xml", ".xml"): (*CUT[:-1], *OTHER),
    ("a.tflite", ".tflite"): (*CUT, *OTHER, *(flipped(place) for place in (0, 100, 0.3, 0.5, 0.9, -1))),
}
"""What is done to one of the files of a network."""


@pytest.mark.parametrize(("name", "suffix"), DAMAGE, ids=str)
def test_files_that_are_damaged_or_something_else_are_refused_before_a_runtime_gets_them(copied, name, suffix):
    if name not in FILES:
        pytest.skip("its runtime is not installed")
    path = copied(name)
    whole = path.with_suffix(suffix).read_bytes()
    for change in DAMAGE[name, suffix]:
        path.with_suffix(suffix).write_bytes(change(whole))
        with refused(WeightsError, r"x\."):
            choose_runtime(None, str(path), None)


@NEEDS_OPENVINO
def test_weights_of_an_openvino_file_that_changed_are_noticed_and_missing_ones_refused(copied):
    path = copied("a.xml")
    weights = path.with_suffix(".bin")
    assert choose_runtime(None, str(path), None).notes == ()
    data = weights.read_bytes()
    middle = len(data) // 4  # a kernel
    weights.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    (note,) = choose_runtime(None, str(path), None).notes
    assert "x.bin: is not as export.py wrote it" in note
    weights.unlink()
    with pytest.raises(WeightsError, match=r"x\.bin: no such file"):
        choose_runtime(None, str(path), None)


@NEEDS_OPENVINO
def test_an_openvino_file_of_another_program_is_refused(copied):
    import openvino

    path = copied("a.xml")
    model = openvino.Core().read_model("a.onnx")
    openvino.save_model(model, path, compress_to_fp16=False)
    with pytest.raises(WeightsError, match=r"x\.xml: says neither its network nor its classes: another program"):
        choose_runtime(None, str(path), None)


@pytest.mark.parametrize(
    ("package", "name", "requirements"),
    [
        ("onnxruntime", "a.onnx", "export"),
        ("ncnn", "a.ncnn.param", "export"),
        pytest.param("openvino", "a.xml", "openvino", marks=NEEDS_OPENVINO),
    ],
)
def test_a_missing_runtime_names_its_requirements(folder, monkeypatch, package, name, requirements):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else find(asked))
    line = rf"needs the package {package}; pip install -r requirements-{requirements}"
    with pytest.raises(InputError, match=rf"{name}: {line}"):
        choose_runtime(None, name, None)
    assert choose_runtime(None, "a.onnx", "opencv").runtime == "opencv"


def test_an_engine_that_puts_out_too_few_heads_is_refused():
    model = ForeignModel(tiny(), Engine(lambda images: [images], None, "short"))
    with pytest.raises(SuiteError, match="short: 1 heads came out of 2"):
        model(torch.zeros(2, 3, 32, 32))
