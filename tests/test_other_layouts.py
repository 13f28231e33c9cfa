"""Data sets as Darknet, Windows and Roboflow lay them out are read, and labels that are off by rounding."""

from __future__ import annotations

import shutil

import pytest

import train
from tests.nets import refused
from utils.darknet.data_file import load_data
from utils.data.index import index, label_path, parse_labels
from utils.errors import DataError


@pytest.fixture
def root(folder, tmp_path):
    """The data set of `folder`, to be laid out in another way."""
    shutil.copytree(folder, tmp_path / "set")
    return tmp_path / "set"


def boxes(path) -> int:
    """Number of boxes in the training pictures of a data set."""
    data = load_data(path)
    return sum(map(len, index(data.train, data.names, cache_dir=None).labels))


def test_paths_may_be_relative_to_the_working_directory_or_to_a_folder_above(root, monkeypatch, capsys):
    (root / "data").mkdir()
    for name in ("train.txt", "val.txt", "d.names"):
        (root / name).rename(root / "data" / name)
    text = "classes=2\ntrain=data/train.txt\nvalid=data/val.txt\nnames=data/d.names\n"
    (root / "data/d.data").write_text(text)
    expected = boxes(root / "data/d.data")
    assert expected == 13
    error = capsys.readouterr().err
    assert f"train = data/train.txt: taken as {root}/data/train.txt; there is no {root}/data/data/train.txt" in error
    assert f"data/train.txt: its paths are relative to {root}, not to the list" in error
    monkeypatch.chdir(root)
    assert boxes("data/d.data") == expected
    (root / "d.data").write_text("classes=2\ntrain=no/list.txt\nnames=data/d.names\n")
    monkeypatch.chdir(root.parent)
    assert load_data("set/d.data").train is not None
    assert f"there is neither set/no/list.txt nor {root.parent}/no/list.txt" in capsys.readouterr().err


def test_backslashes_and_byte_order_marks_are_read(root):
    for name in ("train.txt", "val.txt"):
        text = (root / name).read_text().replace("/", "\\").replace("\n", "\r\n")
        (root / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (root / "lists").mkdir()
    (root / "train.txt").rename(root / "lists/train.txt")
    (root / "d.data").write_bytes(b"\xef\xbb\xbfclasses=2\r\ntrain=lists\\train.txt\r\nnames=d.names\r\n")
    assert boxes(root / "d.data") == 13


def test_a_yaml_of_roboflow_names_folders_beside_itself(root):
    (root / "train").mkdir()
    for name in ("images", "labels"):
        (root / name).rename(root / "train" / name)
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: [a, b]\n")
    assert boxes(root / "data.yaml") == 13


def test_labels_beside_the_pictures_are_found(root, capsys):
    for path in (root / "labels").glob("*.txt"):
        path.rename(root / "images" / path.name)
    (root / "labels").rmdir()
    assert boxes(root / "d.data") == 13
    assert "labels are taken from beside the images" in capsys.readouterr().err


def test_a_training_without_a_box_is_refused(root):
    (root / "labels").rename(root / "elsewhere")
    with refused(DataError, rf"no box in 9 training images; the label of .* looked for as {root}/labels/0\.txt"):
        train.main(["--cfg", str(root / "n.cfg"), "--data", str(root / "d.data"), "--project", str(root / "runs")])
    assert label_path("images/a.png") == "labels/a.txt"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("1 1.000001 0.5 1.0005 -0", "zero-size box"),
        ("1 1.000001 0.5 1.0005 0.5", "rounded label"),
        ("1 -0.0005 0.5 0.5 0.5", "rounded label"),
        ("1 1.0011 0.5 0.5 0.5", "out of range"),
        ("1 0.5 0.5 0.5 -0.0001", "negative size"),
        ("1 0.5 0.5 1e-46 0.5", "zero-size box"),
        ("1 0.5 0.5 0.5 0.5 0.9", "wrong column count"),
        ("0 .1 .1 .2 .2 .1 .2", "wrong column count"),
    ],
)
def test_values_off_by_rounding_are_clipped_and_the_likely_cause_of_other_columns_is_told(row, kind):
    labels, (finding,) = parse_labels(row.encode(), "a.txt", 2)
    assert finding.kind == kind
    assert {6: "confidence", 7: "polygon"}.get(len(row.split()), "") in finding.detail
    assert len(labels) == (kind == "rounded label")
    assert ((labels[:, 1:] >= 0) & (labels[:, 1:] <= 1)).all()
