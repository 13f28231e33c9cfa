"""The one loader and writer of .pt files, and which files a model comes from."""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile

import numpy as np
import pytest
import torch

from compress import script_module
from models import Darknet
from tests.nets import TINY, refused, tiny, with_heads
from utils.checkpoint import load_model, model_document, read_checkpoint, write_checkpoint, write_darknet
from utils.darknet.cfg import format_network
from utils.darknet.network import adapt_classes
from utils.errors import DataError, InputError, WeightsError
from utils.flags import ModelFiles, choose_model, is_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    model = Darknet(tiny())
    path = tmp_path / "model.pt"
    write_checkpoint(path, contents(model))
    return path


def contents(model, lineage=(), **more):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return model_document(state, model.network, ["a", "b"], lineage, **more)


def test_written_and_read_gives_the_same_tensors(checkpoint):
    loaded = load_model(choose_model(None, str(checkpoint)))
    assert loaded.names == ("a", "b")
    assert loaded.model.blocks == tiny().blocks
    stored = read_checkpoint(checkpoint)["model"]
    assert all(torch.equal(value, stored[key]) for key, value in loaded.model.state_dict().items())
    (entry,) = loaded.lineage()
    assert entry == {"path": str(checkpoint), "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}


FLAGGED = {"path": "a.pt", "sha256": "0", "no_flip": True}


@pytest.mark.parametrize(
    ("more", "no_flip"),
    [
        ({}, False),
        ({"hyp": {"flip_lr": 0.0, "flip_ud": 0.0}}, True),
        ({"hyp": {"flip_lr": 0.5, "flip_ud": 0.0}, "lineage": [FLAGGED]}, False),
        ({"hyp": {"flip_lr": 0.0, "flip_ud": 0.1}}, False),
        ({"lineage": [FLAGGED]}, True),
        ({"lineage": [FLAGGED, {"path": "b.pt", "sha256": "1"}]}, False),
        ({"lineage": [FLAGGED, {"path": "t.pt", "sha256": "1", "teacher": "--KDstr 4"}]}, True),
        ({"lineage": [FLAGGED | {"teacher": "--KDstr 4"}]}, False),
    ],
)
def test_the_last_training_says_whether_pictures_were_mirrored(tmp_path, more, no_flip):
    write_checkpoint(tmp_path / "m.pt", contents(Darknet(tiny()), **more))
    loaded = load_model(choose_model(None, str(tmp_path / "m.pt")))
    assert loaded.no_flip == no_flip
    assert loaded.lineage()[-1].get("no_flip", False) == no_flip


def test_averaged_weights_are_preferred(tmp_path):
    model, average = Darknet(tiny()), Darknet(tiny())
    write_checkpoint(tmp_path / "m.pt", contents(model, ema=average.state_dict()))
    loaded = load_model(choose_model(None, str(tmp_path / "m.pt"))).model
    assert torch.equal(loaded.layers[0].conv.weight, average.layers[0].conv.weight)


def test_a_previous_checkpoint_survives_the_next(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "prev.pt"
    for epoch in (1, 2):
        write_checkpoint(last, contents(Darknet(tiny()), epoch=epoch), keep_previous=previous)
    assert read_checkpoint(last)["epoch"] == 2
    assert read_checkpoint(previous)["epoch"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "prev.pt"]


def test_a_flipped_bit_is_found(checkpoint):
    """Every byte of the archive's contents is under a checksum; the rest is structure."""
    with zipfile.ZipFile(checkpoint) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    whole, rng = checkpoint.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(entry.file_size - 200, size=20):
        data = bytearray(whole)
        data[entry.header_offset + 100 + int(at)] ^= 1 << int(rng.integers(8))
        checkpoint.write_bytes(data)
        with pytest.raises(WeightsError, match="damaged"):
            read_checkpoint(checkpoint)


@pytest.mark.parametrize("count", [0, 3, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused(checkpoint, count):
    """To so many bytes, or to a share."""
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: count if isinstance(count, int) else int(len(data) * count)])
    with pytest.raises(WeightsError, match={0: "is empty", 3: "ends inside the header: 3 bytes"}.get(count)):
        choose_model(None, str(checkpoint))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (Darknet(tiny()), r"whole-module checkpoint \(it needs models\.Darknet\).*state_dict"),
        ({"weight": 3}, "not a checkpoint of this suite"),
        ([1, 2], "not a checkpoint of this suite"),
        (torch.zeros(2), "not a checkpoint of this suite"),
    ],
    ids=["module", "state", "list", "tensor"],
)
def test_what_another_program_saved_is_refused(tmp_path, value, match):
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=match):
        read_checkpoint(tmp_path / "other.pt")


def zipped(entry: str) -> bytes:
    """An archive of one entry."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(entry, "x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"7z\xbc\xaf", "7z"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html><title>404", "is a web page, not the file; download it again"),
        (b"no weights at all " * 40, r"not a Darknet \.weights file.*no archive of torch\.save either"),
        *((zipped(entry), "is not one of torch") for entry in ("../../x", "/etc/x", "m/evil.py")),
    ],
)
def test_other_containers_are_refused_by_name(tmp_path, content, match):
    path, cfg = tmp_path / "x.pt", tmp_path / "n.cfg"
    path.write_bytes(content if content.startswith(b"PK") else content.ljust(600, b"\0"))
    cfg.write_text(TINY)
    for network in (None, str(cfg)):
        with pytest.raises(WeightsError, match=match):
            choose_model(network, str(path))


def test_a_cfg_of_another_class_count_is_adapted_and_that_is_said(checkpoint, tmp_path):
    (tmp_path / "n.cfg").write_text(format_network(adapt_classes(tiny(), 80)))
    loaded = load_model(choose_model(str(tmp_path / "n.cfg"), str(checkpoint)))
    assert loaded.model.network.classes == 2
    assert "adapted from 80 to 2 classes" in loaded.notes[0]
    model, file = Darknet(tiny()), tmp_path / "model.weights"
    write_darknet(file, model)
    files = choose_model(str(tmp_path / "n.cfg"), str(file))
    assert "adapted from 80 to 2 classes" in files.notes[0]
    assert torch.equal(load_model(files).model.layers[0].conv.weight, model.layers[0].conv.weight)


def test_left_out_weights_are_the_newest_that_fit(tmp_path, checkpoint):
    runs, cfg = tmp_path / "runs", tmp_path / "n.cfg"
    cfg.write_text(TINY)
    with pytest.raises(InputError, match=r"--weights left out.*train first or give --weights"):
        choose_model(str(cfg), None, runs)
    other = TINY.replace("filters=12", "filters=16")
    for number, text in enumerate((TINY, TINY, other)):
        folder = runs / "train" / f"exp{number}"
        (folder / "weights").mkdir(parents=True)
        (folder / "model.cfg").write_text(text)
        shutil.copy(checkpoint, folder / "weights" / "best.pt")
    files = choose_model(str(cfg), None, runs)
    assert files.weights == runs / "train" / "exp1" / "weights" / "best.pt"
    assert str(files.weights) in files.notes[0]
    assert choose_model(None, None, runs).weights.parent.parent.name == "exp2"
    with pytest.raises(InputError, match=r"fits .*n\.cfg with 5 classes"):
        choose_model(str(cfg), None, runs, classes=5)


def test_a_darknet_file_needs_a_cfg(tmp_path):
    write_darknet(tmp_path / "model.weights", Darknet(tiny()))
    with pytest.raises(InputError, match="give --cfg"):
        choose_model(None, str(tmp_path / "model.weights"))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("test", ()),
        ("slim_prune", ("--percent", "0.1")),
        ("quantize", ()),
        ("train", ("--t_weights", "best.pt", "--epochs", "1", "--workers", "0")),
    ],
)
def test_the_same_class_names_in_another_order_are_refused(toy, name, flags, tmp_path, monkeypatch):
    """The network would be compared with the labels of other classes; train.py's teacher would teach them."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "best.pt", contents(Darknet(tiny())) | {"names": ["b", "a"]})
    weights = () if name == "train" else ("--weights", "best.pt")
    with refused(DataError, "d.data: class 0 is a, but b in best.pt, which has the same names in another order"):
        script_module(name).main([*toy, *weights, *flags, "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_training_keys_do_not_make_another_network(checkpoint, tmp_path):
    (tmp_path / "n.cfg").write_text(format_network(with_heads(tiny(), ignore_thresh=0.7)))
    assert load_model(choose_model(str(tmp_path / "n.cfg"), str(checkpoint))).notes == ()


def test_new_weights_are_drawn_without_a_file():
    assert load_model(ModelFiles(tiny(), None)).names is None


@pytest.mark.parametrize(
    ("suffix", "readers"),
    [
        *((suffix, "test.py and detect.py run") for suffix in (".onnx", ".param", ".xml")),
        (".torchscript", "libtorch runs"),
    ],
)
def test_an_exported_file_is_no_weights(tmp_path, suffix, readers):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=f"is an exported file, which {readers}; give the .pt"):
        is_checkpoint(path)


@pytest.mark.parametrize(
    ("part", "whole"), [("a.ncnn.bin", "a.ncnn.param"), ("a.ncnn.json", "a.ncnn.param"), ("a.bin", "a.xml")]
)
def test_a_part_of_an_exported_file_names_the_file(tmp_path, part, whole):
    for name in (part, whole):
        (tmp_path / name).write_bytes(b"12345678" * 3)
    with pytest.raises(WeightsError, match=f"{part}: is part of .*{whole}, which test.py and detect.py run"):
        is_checkpoint(tmp_path / part)
