"""Damaged and hostile files end in one line, whatever another project's parser raises, and nothing is lost."""

from __future__ import annotations

import ast
import errno
import os
import re
import time
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from models import Darknet
from tests.nets import refused, tiny
from utils.checkpoint import SCHEMA, load_model, model_document, read_checkpoint, write_checkpoint
from utils.data.index import index
from utils.data.store import PictureStore
from utils.errors import CheckpointError, InputError, SuiteError, WeightsError
from utils.files import foreign_errors, read_json, read_yaml
from utils.flags import ModelFiles, choose_model
from utils.runtime.choice import choose_runtime
from utils.runtime.exported import read_openvino
from utils.training.checkpointing import resumable

# Calls of parsers of other projects

GUARDS = {"foreign_errors", "_header"}
"""Contexts in which a parser may raise anything."""
PARSERS = {
    "torch": {"load"},
    "zipfile": {"ZipFile"},
    "yaml": {"safe_load"},
    "json": {"load", "loads"},
    "Image": {"open"},
    "onnx": {"load", "load_model", "load_from_string"},
    "checker": {"check_model"},
    "onnxruntime": {"InferenceSession"},
    "net": {"load_param", "load_model", "forward"},
    "np": {"load", "loadtxt", "genfromtxt", "fromfile"},
    "csv": {"reader", "DictReader"},
    "ElementTree": {"parse", "fromstring", "XML", "iterparse"},
}
"""Owner → attributes."""
ANY_OWNER = {
    *("imread", "imdecode", "imdecodemulti", "VideoCapture", "readNetFromONNX", "readNetFromDarknet"),
    *("Parse", "ParseFile", "ParseFromString", "read_model", "compile_model", "get_single_data"),
    *("InitFromPackedBuf", "Interpreter"),
}
NAMES = {"loadmat"}


def is_parser(node: ast.AST) -> bool:
    """Whether an expression names a function that reads a file of a user."""
    if isinstance(node, ast.Attribute):
        owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
        return node.attr in ANY_OWNER or node.attr in PARSERS.get(owner, ())
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in NAMES


def is_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.With):
        calls = [getattr(item.context_expr, "func", None) for item in node.items]
        return any(getattr(call, "id", "") in GUARDS for call in calls)
    kinds = [handler.type for handler in node.handlers] if isinstance(node, ast.Try) else []
    return any(getattr(kind, "id", "") == "Exception" for kind in kinds)


def unguarded(node: ast.AST, guarded: bool = False) -> list[int]:
    """Lines with parsers that no context guards."""
    guarded = guarded or is_guard(node)
    lines = [node.lineno] if is_parser(node) and not guarded else []
    annotation = {id(part) for name in ("returns", "annotation") if (part := getattr(node, name, None))}
    children = [child for child in ast.iter_child_nodes(node) if id(child) not in annotation]
    return [*lines, *(line for child in children for line in unguarded(child, guarded))]


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("json.loads(text)\nread = cv2.imdecode", 2),
        ("try:\n  yaml.safe_load(text)\nexcept ValueError: pass", 1),
        ("with foreign_errors(path, 'no'):\n  for read in (net.load_param,): read()", 0),
        ("try:\n  cv2.imdecode(data, 1)\nexcept Exception: pass", 0),
        ("def opened() -> Iterator[cv2.VideoCapture]: pass", 0),
    ],
)
def test_parsers_outside_of_a_guard_are_named(code, count):
    assert len(unguarded(ast.parse(code))) == count


def test_every_parser_of_another_project_is_guarded(sources):
    ours = [source for source in sources if not source.path.startswith(("tests/", "benchmarks/"))]
    wrong = [f"{source.path}:{line}" for source in ours for line in unguarded(source.tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (UnicodeDecodeError("utf-8", b"\xe1", 0, 1, "bad"), "f: damaged: 'utf-8' codec can't decode byte 0xe1"),
        (AssertionError(), "f: damaged: AssertionError; take another"),
        (KeyError("x"), "f: damaged: KeyError 'x'; take another"),
        (RuntimeError("\n Exception from src/a.cpp\nno such layer\nat b"), "f: damaged: no such layer; take another"),
        (RuntimeError("x" * 1000), f"f: damaged: {'x' * 200}; take another"),
        (RecursionError("too deep"), "f: damaged: too deep"),
        (SystemError("returned NULL"), "f: damaged: returned NULL"),
        (InputError("our own"), "our own"),
    ],
)
def test_whatever_a_parser_raises_is_one_line(raised, message):
    with pytest.raises(InputError) as caught, foreign_errors("f", "damaged; take another copy"):
        raise raised
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("raised", [MemoryError(), RuntimeError("can't allocate memory: 8 bytes")])
def test_no_memory_is_no_damage(raised):
    with pytest.raises(MemoryError, match="f: "), foreign_errors("f", "damaged"):
        raise raised


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_lines_are_named_and_deep_texts_refused(tmp_path, read):
    (tmp_path / "f").write_text("[1,\n{]")
    with pytest.raises(InputError, match=r"f:2: not valid (JSON|YAML): "):
        read(tmp_path / "f")
    (tmp_path / "f").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"f: not valid (JSON|YAML): "):
        read(tmp_path / "f")


# Checkpoints


def document(**more):
    """Contents of a last.pt that a training can go on from."""
    model = Darknet(tiny())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = {"optimizer": optimizer.state_dict(), "scaler": {}, "ema_updates": 3, "progress": {}, "plan": {}}
    extra = {**training, "ema": model.state_dict(), "adapters": {}, "args": {}, "hyp": {}, **more}
    return model_document(model.state_dict(), model.network, ["a", "b"], [], **extra)


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_in_the_directory_of_an_archive_is_one_line(tmp_path, seed):
    """zipfile raises half a dozen kinds; a training goes on from prev.pt."""
    last, previous = tmp_path / "last.pt", tmp_path / "prev.pt"
    write_checkpoint(previous, document())
    data = bytearray(previous.read_bytes())
    with zipfile.ZipFile(previous) as archive:
        directory = archive.start_dir
    rng = np.random.default_rng(seed)
    for at in rng.integers(directory, len(data), 20):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        last.write_bytes(damaged)
        try:
            read_checkpoint(last)
        except WeightsError as failure:
            assert str(last) in str(failure) and "\n" not in str(failure)
            broken = damaged
    last.write_bytes(broken)
    assert resumable(tmp_path, Darknet(tiny()))["ema_updates"] == 3
    assert (tmp_path / "damaged.pt").read_bytes() == broken


WEIGHT = "layers.0.conv.weight"


def changed(tensor):
    """A state dict whose first weight is another tensor."""
    return lambda state: {**state, WEIGHT: tensor(state[WEIGHT])}


STATES = {
    "complex": (changed(lambda t: t.to(torch.complex64)), "no dense tensor"),
    "sparse": (changed(lambda t: t.to_sparse()), "no dense tensor"),
    "sparse csr": (changed(lambda t: t.reshape(len(t), -1).to_sparse_csr()), "no dense tensor"),
    "meta": (changed(lambda t: t.to("meta")), "no dense tensor"),
    "quantized": (changed(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)), "no dense tensor"),
    "bool": (changed(lambda t: t > 0), "no dense tensor"),
    "bytes": (changed(lambda t: t.to(torch.uint8)), "no dense tensor"),
    "int64": (changed(lambda t: t.long()), r"is of torch\.int64; torch\.float32 was expected"),
    "one number for all": (changed(lambda t: torch.zeros(1).expand(t.numel()).view(t.shape)), "no dense tensor"),
    "float64 beyond float32": (changed(lambda t: t.double() * 1e300), "is not finite"),
    "a number": (changed(lambda t: 1.0), "without a usable"),
    "a list": (changed(lambda t: t.tolist()), "without a usable"),
    "None": (changed(lambda t: None), "without a usable"),
    "other shape": (changed(lambda t: t[:1]), "has shape"),
    "extra key": (lambda state: {**state, "module.x": torch.zeros(1)}, r"module\.x is no tensor of its network"),
    "missing key": (lambda state: {key: value for key, value in state.items() if key != WEIGHT}, "is missing"),
    "another key": (lambda state: {key.replace("0.conv", "00.conv"): value for key, value in state.items()}, "missing"),
    "key that is a number": (lambda state: {**state, 3: torch.zeros(1)}, "is no tensor of its network"),
    "list": (lambda state: list(state.values()), "without a usable"),
    "text": (lambda state: "weights", "without a usable"),
    "empty": (lambda state: {}, "is missing"),
}
"""What a state dict may not be: how it is made, and what is said."""


@pytest.mark.parametrize(
    ("part", "name"), [*(("model", name) for name in STATES), ("ema", "list"), ("ema", "meta"), ("ema", "extra key")]
)
def test_state_dicts_of_other_kinds_are_refused_in_one_line(tmp_path, name, part, recwarn):
    make, match = STATES[name]
    contents = document()
    contents |= {"ema": None} if part == "model" else {}
    write_checkpoint(tmp_path / "last.pt", {**contents, part: make(contents["model"])})
    with refused(WeightsError, f"{re.escape(str(tmp_path))}/last.pt.*{match}"):
        load_model(ModelFiles(None, tmp_path / "last.pt", True))
    assert not [warning for warning in recwarn if "site-packages/torch/_utils" in warning.filename]
    with pytest.raises(CheckpointError):
        resumable(tmp_path, Darknet(tiny()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_become_float32(tmp_path, dtype):
    contents = document(ema=None)
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in contents["model"].items()}
    write_checkpoint(tmp_path / "m.pt", {**contents, "model": state})
    loaded = load_model(ModelFiles(None, tmp_path / "m.pt", True)).model.state_dict()
    assert loaded[WEIGHT].dtype == torch.float32
    assert torch.equal(loaded[WEIGHT], contents["model"][WEIGHT].to(dtype).float())


def nested(depth: int):
    """A list that holds 2 ** depth values in a few bytes."""
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


OTHERS = [3, "text", [1], {"a": {1, 2}}, {"a": 1j}, {"a": np.zeros(1)}]


@pytest.mark.parametrize("name", SCHEMA)
def test_entries_of_other_kinds_are_refused_in_one_line(tmp_path, name):
    path, contents = tmp_path / "last.pt", document()
    for value in OTHERS:
        if isinstance(value, SCHEMA[name].kind) and isinstance(value, int | str):
            continue
        value = [[]] if isinstance(value, list) and SCHEMA[name].kind is list else value
        write_checkpoint(path, {**contents, name: value})
        with refused(WeightsError, re.escape(str(path))):
            load_model(ModelFiles(None, path, True))


def test_lists_that_hold_each_other_are_not_read_for_ever(tmp_path):
    write_checkpoint(tmp_path / "m.pt", document(args={"a": nested(40)}))
    with pytest.raises(WeightsError, match="more than 1048576 values"):
        read_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("name", "value"), [("progress", {"unknown": 2}), ("progress", {"control": 3}), ("scaler", None), ("ema", None)]
)
def test_a_training_goes_on_from_the_checkpoint_before_one_without_its_state(tmp_path, name, value):
    write_checkpoint(tmp_path / "prev.pt", document())
    write_checkpoint(tmp_path / "last.pt", {**document(), name: value})
    assert resumable(tmp_path, Darknet(tiny()))["ema_updates"] == 3
    assert (tmp_path / "damaged.pt").exists()


def test_an_archive_of_many_entries_is_refused_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for number in range(20_001):
            archive.writestr(f"m/data/{number}", b"")
    with pytest.raises(WeightsError, match="20001 archive entries"):
        choose_model(None, str(tmp_path / "m.pt"))


@pytest.mark.parametrize("suffix", ["onnx", "tflite", "xml", "bin", "pt", "weights"])
def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path, suffix):
    (tmp_path / "m.xml").write_text("<net/>")
    with (tmp_path / f"m.{suffix}").open("wb") as file:
        file.truncate(1 << 40)
    start = time.process_time()
    with pytest.raises(InputError, match=rf"m\.{suffix}: 1099511627776 bytes; a file of at most \d+ bytes"):
        if suffix in ("xml", "bin"):
            read_openvino(tmp_path / "m.xml")
        choose_runtime(None, str(tmp_path / f"m.{suffix}"), None)
    assert time.process_time() - start < 5


def test_the_shared_checkpoints_load_or_end_in_one_line(shared):
    for path in sorted((shared / "cases" / "checkpoints").glob("*.pt")):
        try:
            model = load_model(ModelFiles(None, path, True)).model
        except SuiteError as failure:
            assert "\n" not in str(failure)
        else:
            assert next(model.parameters()).dtype == torch.float32


# Caches


NO_ROOM = [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG]
"""Errors of a system whose disk is full, read-only or broken."""


def assert_read_without_cache(folder, cache) -> None:
    """Pictures are indexed and read, whatever becomes of their caches."""
    pictures = index(folder / "train.txt", ["a", "b"], cache_dir=cache)
    store = PictureStore(pictures, 3, (64, 64))
    store.keep("disk", cache)
    assert len(pictures) == 9 and store.read(0).shape == (64, 64, 3)


@pytest.mark.parametrize("number", NO_ROOM, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["mkdir", "replace", "fsync"])
def test_a_cache_that_cannot_be_written_ends_nothing(folder, tmp_path, monkeypatch, number, call):
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(number, os.strerror(number))))
    assert_read_without_cache(folder, tmp_path / "cache" / "deep")


@pytest.mark.parametrize("place", ["file", "file/deep", "x" * 300, "/proc/none"])
def test_a_cache_folder_that_cannot_be_made_ends_nothing(folder, tmp_path, place):
    (tmp_path / "file").touch()
    assert_read_without_cache(folder, tmp_path / place)
