"""The doctor finds every fault planted into a good data set, says where it is, and finds none where there is none."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from tests.nets import TINY
from utils.darknet.data_file import load_data
from utils.data import doctor
from utils.data.findings import EFFECTS, KINDS
from utils.data.toy import OUTLINES, ToyRecipe, build
from utils.errors import DataError, InputError

TRAIN, VAL = 12, 8


class Fault(NamedTuple):
    """A fault, and what the doctor has to say of it."""

    kind: str
    split: str
    place: str
    """End of the first place."""
    plant: Callable[[Path], object]
    count: int = 1


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A drawn set; every class has boxes in both splits."""
    folder = tmp_path_factory.mktemp("toy") / "set"
    build(folder, ToyRecipe(TRAIN, VAL, 64))
    rows = [f"{kind} 0.5 0.5 0.{kind + 20} 0.3\n" for kind in range(12)]
    for path in (folder / "labels").iterdir():
        path.write_text("".join(rows if path.stem.endswith("_00000") else rows[3:4]))
    return folder


@pytest.fixture
def patient(good, tmp_path):
    """A copy of the drawn set, to plant faults in."""
    return Path(shutil.copytree(good, tmp_path / "set"))


@pytest.fixture
def examine(capsys, monkeypatch, tmp_path):
    """Call the doctor; returns its JSON document and its error line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(data: Path, *flags: str) -> tuple[dict, str]:
        error = ""
        try:
            doctor.main([str(data), "--json", *flags])
        except DataError as failure:
            error = str(failure)
        return json.loads(capsys.readouterr().out), error

    return call


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    return edit(name, lambda _: text.encode() if isinstance(text, str) else text)


def append(name: str, line: str) -> Callable[[Path], object]:
    return edit(name, lambda data: data + f"{line}\n".encode())


def move(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / "elsewhere")


def copy(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder / name, folder / target)


def together(*plants: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [plant(folder) for plant in plants]


def make_folder(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).mkdir()


def no_class_four(split: str) -> Callable[[Path], object]:
    def plant(folder: Path) -> None:
        for path in (folder / "labels").glob(f"{split}_*.txt"):
            lines = path.read_text().splitlines()
            path.write_text("".join(f"{line}\n" for line in lines if not line.startswith("4 ")))

    return plant


def tiny_boxes(count: int) -> Callable[[Path], object]:
    return together(*(append(f"labels/train_{number:05d}.txt", "3 0.5 0.5 0.01 0.2") for number in range(count)))


def picture_bomb(_: bytes) -> bytes:
    png = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    header = png[12:16] + (50_000).to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def float_picture(_: bytes) -> bytes:
    return cv2.imencode(".tiff", np.zeros((4, 4, 3), np.float32))[1].tobytes()


def long_picture(_: bytes) -> bytes:
    return cv2.imencode(".jpg", np.full((20, 90, 3), 99, np.uint8))[1].tobytes()


def link_one(folder: Path) -> None:
    (folder / "images/link.jpg").symlink_to(folder / ONE)


def row(kind: str, text: str) -> Fault:
    """A fault in a row behind the only one of a label file."""
    return Fault(kind, "train", f"{LABEL}:2", append(LABEL, text))


ONE, TWO, NINE = (f"images/train_0000{number}.jpg" for number in (1, 2, 9))
FOLDER = "images/folder.jpg"
LABEL, VAL_LABEL, VAL_ONE = "labels/train_00005.txt", "labels/val_00005.txt", "images/val_00001.jpg"
TWINS = "1 0.5 0.5 0.4 0.4\n1 0.501 0.5 0.4 0.4\n2 0.501 0.5 0.4 0.4\n"
UTF_16 = "0 0.5 0.5 0.2 0.2\n".encode("utf-16")
MOST = [move(f"labels/train_{number:05d}.txt") for number in range(1, TRAIN - 2)]
CLASS_FOUR = list(OUTLINES)[4]
FAULTS = (
    Fault("missing image", "train", ONE, move(ONE)),
    Fault("not a file", "val", FOLDER, together(make_folder(FOLDER), append("val.txt", FOLDER))),
    Fault("empty image", "val", VAL_ONE, write(VAL_ONE, "")),
    Fault("unknown image format", "val", VAL_ONE, write(VAL_ONE, "text")),
    Fault("unsupported pixel values", "val", VAL_ONE, edit(VAL_ONE, float_picture)),
    Fault("damaged image", "train", NINE, edit(NINE, lambda data: data[:-200])),
    Fault("oversized image", "train", NINE, edit(NINE, picture_bomb)),
    row("wrong column count", "1 0.5 0.5 0.2"),
    row("not a number", "1 0.5 0.5 0.2 nan"),
    row("fractional class", "1.5 0.5 0.5 0.2 0.2"),
    row("negative class", "-1 0.5 0.5 0.2 0.2"),
    row("class beyond names", "12 0.5 0.5 0.2 0.2"),
    row("out of range", "1 50 50 20 20"),
    row("rounded label", "1 0.5 0.5 0.2 1.0001"),
    row("negative size", "1 0.5 0.5 -0.2 0.2"),
    row("zero-size box", "1 0.5 0.5 0 0.2"),
    Fault("duplicate row", "val", f"{VAL_LABEL}:2", edit(VAL_LABEL, lambda data: data * 2)),
    Fault("object labelled twice", "val", "val_00005.jpg", write(VAL_LABEL, TWINS)),
    Fault("box beyond the image", "val", "val_00005.jpg", write(VAL_LABEL, "1 0.9 0.5 0.4 0.4\n")),
    Fault("not a text file", "train", f"{LABEL}:1", write(LABEL, UTF_16)),
    Fault("unreadable label file", "train", LABEL, together(move(LABEL), make_folder(LABEL))),
    Fault("unreadable label file", "train", LABEL, together(move(LABEL), lambda folder: os.mkfifo(folder / LABEL))),
    Fault("no label file", "train", LABEL, move(LABEL)),
    Fault("empty label file", "train", LABEL, write(LABEL, "")),
    Fault("most label files missing", "train", "labels/train_00001.txt", together(*MOST), TRAIN - 3),
    Fault("no boxes", "train", "labels/train_00000.txt", move("labels"), TRAIN),
    Fault("listed twice", "train", ONE, append("train.txt", ONE)),
    Fault("same file in train and val", "", ONE, append("val.txt", ONE)),
    Fault(
        "same file in train and val",
        "",
        "images/link.jpg",
        together(link_one, copy("labels/train_00001.txt", "labels/link.txt"), append("val.txt", "images/link.jpg")),
    ),
    Fault("identical images in train and val", "", VAL_ONE, copy(ONE, VAL_ONE)),
    Fault("identical images in one split", "train", TWO, copy(ONE, TWO)),
    Fault(
        "identical images in one split",
        "train",
        "images/link.jpg",
        together(link_one, copy("labels/train_00001.txt", "labels/link.txt"), append("train.txt", "images/link.jpg")),
    ),
    Fault("wrong path", "val", "val.txt: no such file or directory", move("val.txt")),
    Fault("no images", "val", "", write("val.txt", ""), 0),
    Fault("nothing usable", "train", "", move("images"), 0),
    Fault("no images", "train", "toy.data", write("toy.data", "names=toy.names\nvalid=val.txt\n")),
    Fault("no validation images", "val", "toy.data", write("toy.data", "names=toy.names\ntrain=train.txt\n")),
    Fault("class without a box in train", "train", CLASS_FOUR, no_class_four("train")),
    Fault("class without a box in val", "val", CLASS_FOUR, no_class_four("val")),
    Fault("boxes smaller than a cell", "train", "train_00000.jpg", tiny_boxes(1)),
    Fault("many boxes smaller than a cell", "train", "train_00000.jpg", tiny_boxes(TRAIN), TRAIN),
    Fault("very long image", "train", NINE, edit(NINE, long_picture)),
)
CONSEQUENCES = {"no boxes": {"most label files missing"}, "nothing usable": {"missing image"}}
"""Kinds that a planted fault brings with it."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_planted_fault_is_found_at_its_place_and_nothing_else_is(fault, patient, examine):
    fault.plant(patient)
    document, error = examine(patient / "toy.data")
    assert examine(patient / "toy.data") == (document, error)  # with what is known of the first time
    found = {(problem["kind"], problem["split"]): problem for problem in document["problems"]}
    problem = found[fault.kind, fault.split]
    assert problem["count"] == fault.count
    assert not fault.place or problem["places"][0].endswith(fault.place)
    assert {kind for kind, _ in found} - {fault.kind} == CONSEQUENCES.get(fault.kind, set())
    assert problem["severity"] == KINDS[fault.kind].severity
    fatal = any(one["severity"] == "fatal" for one in document["problems"])
    assert document["ok"] is not fatal
    assert bool(error) is fatal


def test_a_good_set_has_no_problems_and_is_left_as_it_is(good, examine):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in good.rglob("*")}
    document, error = examine(good / "toy.data")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in good.rglob("*")} == before
    assert (document["problems"], document["ok"], error) == ([], True, "")
    assert document["splits"]["train"]["usable"] == TRAIN
    boxes = [sum(len(path.read_text().splitlines()) for path in (good / "labels").glob("train_*.txt"))]
    assert [sum(document["splits"]["train"]["boxes_per_class"])] == [document["splits"]["train"]["boxes"]] == boxes


def test_every_kind_is_planted_and_the_worst_come_first():
    """What needs a cfg is planted below; root cannot plant what it may not read."""
    needs_cfg = {"anchors do not fit", "other class count"}
    assert set(KINDS) - {fault.kind for fault in FAULTS} - needs_cfg == {"unreadable image"}
    order = [list(EFFECTS).index(kind.severity) for kind in KINDS.values()]
    assert order == sorted(order)


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / "tiny.cfg"
    path.write_text(TINY)
    return path


def test_a_cfg_is_compared_by_classes_stride_and_anchors(good, examine, cfg):
    """Boxes of some 30 % of a picture have sides of 20 pixels at 64, which anchors of 4 to 44 reach, and 120 at 384."""
    document, error = examine(good / "toy.data", "--cfg", str(cfg))
    assert (document["img_size"], document["stride"], error) == ([64, 64], 4, "")
    by_kind = {problem["kind"]: problem for problem in document["problems"]}
    assert by_kind["other class count"]["detail"] == "the cfg has 2 classes, the data set 12"
    assert "anchors do not fit" not in by_kind
    assert document["anchors"]["reached"] > 0.98
    document, _ = examine(good / "toy.data", "--cfg", str(cfg), "--img_size", "1024")
    (loose,) = [problem for problem in document["problems"] if problem["kind"] == "anchors do not fit"]
    assert loose["severity"] == "warning" and loose["places"] == [str(cfg)]
    assert document["anchors"]["reached"] < 0.5
    with pytest.raises(InputError, match="not a multiple of 8"):
        doctor.main([str(good / "toy.data"), "--cfg", str(cfg), "--img_size", "60"])


def test_a_size_is_height_and_width_of_the_input(patient, examine):
    """0.1 of a square picture is 9.6 pixels fitted to 96 x 200, above a cell of 8, and 6.4 fitted to 64 x 200."""
    for path in (patient / "labels").iterdir():
        path.write_text("".join(f"{kind} 0.5 0.5 0.1 0.1\n" for kind in range(12)))
    assert examine(patient / "toy.data", "--img_size", "96", "200")[0]["problems"] == []
    document, _ = examine(patient / "toy.data", "--img_size", "64", "200")
    assert {problem["kind"] for problem in document["problems"]} == {"many boxes smaller than a cell"}
    assert document["splits"]["val"]["smaller_than_a_cell"] == 1


def test_boxes_that_are_points_in_float32_are_no_twins(patient, examine):
    (patient / "labels" / "train_00001.txt").write_text("3 0.5 0.5 1e-9 1e-9\n3 0.5 0.5 2e-9 1e-9\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document, _ = examine(patient / "toy.data")
    assert "object labelled twice" not in {problem["kind"] for problem in document["problems"]}


def test_the_report_for_people_has_a_line_a_kind_with_what_to_do(patient, capsys):
    for number in range(5):
        (patient / f"images/train_{number:05d}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="1 kinds of fatal problems, the first: empty image"):
        doctor.main([str(patient / "toy.data")])
    out = capsys.readouterr().out
    assert f"train: {TRAIN - 5} of {TRAIN} images usable" in out
    assert "boxes of each class, train/val: " in out
    (line,) = [line for line in out.splitlines() if "empty image" in line]
    assert line.startswith(f"fatal   empty image in train: 5: {patient}/images/train_00000.jpg, ")
    assert line.endswith("and 2 more -> save or fetch the image again, or take it off the list")
    assert "found: 1 fatal, " in out


def test_a_data_yaml_is_examined_too(patient, examine):
    names = load_data(patient / "toy.data").names
    (patient / "data.yaml").write_text(f"train: images\nval: val.txt\nnames: {list(names)}\n")
    document, error = examine(patient / "data.yaml")
    assert [problem["kind"] for problem in document["problems"]] == ["same file in train and val"]
    assert document["problems"][0]["count"] == VAL and "same file" in error


@pytest.mark.parametrize("name", ["bccd", "coco_mini"])
def test_real_sets_have_nothing_fatal(name, shared, examine):
    document, error = examine(shared / "data" / name / f"{name}.data")
    assert document["ok"] and not error


def test_status_2_and_no_torch(patient, refusals):
    (patient / VAL_ONE).unlink()
    error = f"error: {patient}/toy.data: 1 kinds of fatal problems, the first: missing image"
    assert refusals(("utils/data/doctor.py", str(patient / "toy.data")), prints=True) == [error]
