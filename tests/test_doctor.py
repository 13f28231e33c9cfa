"""The doctor finds every fault planted into a good data set, says where it is, and finds none where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from tests.nets import TINY
from utils.darknet.data_file import load_data
from utils.data import doctor
from utils.data.images import write_image
from utils.data.labels import EFFECTS, KINDS
from utils.data.toy import Recipe, build
from utils.errors import DataError, InputError

TRAIN, VAL = 12, 8


class Planted(NamedTuple):
    """What the doctor has to say of a fault."""

    kind: str
    split: str
    place: str
    """End of the first place."""
    count: int = 1


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A drawn set; every class has boxes in both splits."""
    folder = tmp_path_factory.mktemp("toy") / "set"
    build(folder, Recipe(TRAIN, VAL, 64))
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


def picture(folder: Path, split: str, number: int) -> Path:
    return folder / "images" / f"{split}_{number:05d}.jpg"


def label(folder: Path, split: str, number: int) -> Path:
    return folder / "labels" / f"{split}_{number:05d}.txt"


def add(folder: Path, split: str, *names: str) -> None:
    with open(folder / f"{split}.txt", "a", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)


def missing_picture(folder: Path) -> Planted:
    picture(folder, "train", 3).unlink()
    return Planted("missing image", "train", "images/train_00003.jpg")


def picture_is_a_folder(folder: Path) -> Planted:
    (folder / "images" / "folder.jpg").mkdir()
    add(folder, "val", "images/folder.jpg")
    return Planted("not a file", "val", "images/folder.jpg")


def empty_picture(folder: Path) -> Planted:
    picture(folder, "val", 2).write_bytes(b"")
    return Planted("empty image", "val", "val_00002.jpg")


def text_as_picture(folder: Path) -> Planted:
    picture(folder, "val", 2).write_text("no picture")
    return Planted("unknown image format", "val", "val_00002.jpg")


def cut_off_picture(folder: Path) -> Planted:
    path = picture(folder, "train", 9)
    path.write_bytes(path.read_bytes()[:-200])
    return Planted("damaged image", "train", "train_00009.jpg")


def picture_bomb(folder: Path) -> Planted:
    png = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    header = png[12:16] + (50_000).to_bytes(4, "big") * 2 + png[24:29]
    picture(folder, "train", 9).write_bytes(png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:])
    return Planted("oversized image", "train", "train_00009.jpg")


def row(kind: str, text: str):
    """A fault in one row of a label file."""

    def plant(folder: Path) -> Planted:
        path = label(folder, "train", 5)
        count = len(path.read_text().splitlines())
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
        return Planted(kind, "train", f"labels/train_00005.txt:{count + 1}")

    return plant


def row_said_twice(folder: Path) -> Planted:
    path = label(folder, "val", 5)
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, *others, first]) + "\n")
    return Planted("duplicate row", "val", f"val_00005.txt:{len(others) + 2}")


def object_labelled_twice(folder: Path) -> Planted:
    label(folder, "val", 5).write_text("1 0.5 0.5 0.4 0.4\n1 0.501 0.5 0.4 0.4\n2 0.501 0.5 0.4 0.4\n")
    return Planted("object labelled twice", "val", "val_00005.jpg")


def box_beyond_the_picture(folder: Path) -> Planted:
    label(folder, "val", 5).write_text("1 0.9 0.5 0.4 0.4\n")
    return Planted("box beyond the picture", "val", "val_00005.jpg")


def label_in_two_bytes_a_letter(folder: Path) -> Planted:
    label(folder, "train", 5).write_text("0 0.5 0.5 0.2 0.2\n", encoding="utf-16")
    return Planted("not a text file", "train", "train_00005.txt:1")


def label_is_a_folder(folder: Path) -> Planted:
    label(folder, "train", 5).unlink()
    label(folder, "train", 5).mkdir()
    return Planted("unreadable label file", "train", "labels/train_00005.txt")


def no_label_file(folder: Path) -> Planted:
    label(folder, "train", 5).unlink()
    return Planted("no label file", "train", "labels/train_00005.txt")


def empty_label_file(folder: Path) -> Planted:
    label(folder, "train", 5).write_text("")
    return Planted("empty label file", "train", "labels/train_00005.txt")


def most_labels_elsewhere(folder: Path) -> Planted:
    for number in range(1, TRAIN - 2):
        label(folder, "train", number).unlink()
    return Planted("most label files missing", "train", "labels/train_00001.txt", TRAIN - 3)


def no_boxes(folder: Path) -> Planted:
    (folder / "labels").rename(folder / "annotations")
    return Planted("no boxes", "train", "labels/train_00000.txt", TRAIN)


def listed_twice(folder: Path) -> Planted:
    add(folder, "train", "images/train_00001.jpg")
    return Planted("listed twice", "train", "images/train_00001.jpg")


def same_file_in_both(folder: Path) -> Planted:
    add(folder, "val", "images/train_00001.jpg")
    return Planted("same file in train and val", "", "images/train_00001.jpg")


def linked_into_val(folder: Path) -> Planted:
    (folder / "images" / "link.jpg").symlink_to(picture(folder, "train", 1))
    shutil.copy(label(folder, "train", 1), folder / "labels" / "link.txt")
    add(folder, "val", "images/link.jpg")
    return Planted("same file in train and val", "", "images/link.jpg")


def copied_into_val(folder: Path) -> Planted:
    shutil.copy(picture(folder, "train", 1), picture(folder, "val", 1))
    return Planted("identical pictures in train and val", "", "train_00001.jpg = " + str(picture(folder, "val", 1)))


def copied_within_train(folder: Path) -> Planted:
    shutil.copy(picture(folder, "train", 1), picture(folder, "train", 2))
    return Planted("identical pictures in one split", "train", "train_00002.jpg")


def wrong_list(folder: Path) -> Planted:
    (folder / "val.txt").rename(folder / "valid.txt")
    return Planted("wrong path", "val", "val.txt: no such file or directory")


def empty_list(folder: Path) -> Planted:
    (folder / "val.txt").write_text("")
    return Planted("no pictures", "val", "", 0)


def lists_of_another_folder(folder: Path) -> Planted:
    (folder / "images").rename(folder / "pictures")
    return Planted("nothing usable", "train", "", 0)


def no_train(folder: Path) -> Planted:
    (folder / "toy.data").write_text("names=toy.names\nvalid=val.txt\n")
    return Planted("no pictures", "train", "toy.data")


def no_val(folder: Path) -> Planted:
    (folder / "toy.data").write_text("names=toy.names\ntrain=train.txt\n")
    return Planted("no validation pictures", "val", "toy.data")


def class_without_boxes(split: str):
    def plant(folder: Path) -> Planted:
        for path in (folder / "labels").glob(f"{split}_*.txt"):
            lines = path.read_text().splitlines()
            path.write_text("".join(f"{line}\n" for line in lines if not line.startswith("4 ")))
        return Planted(f"class without a box in {split}", split, (folder / "toy.names").read_text().splitlines()[4])

    return plant


def tiny_boxes(share: float):
    def plant(folder: Path) -> Planted:
        chosen = range(1 if share < 0.1 else TRAIN)
        for number in chosen:
            with open(label(folder, "train", number), "a", encoding="utf-8") as file:
                file.write("3 0.5 0.5 0.01 0.2\n")
        kind = "many boxes smaller than a cell" if share > 0.1 else "boxes smaller than a cell"
        return Planted(kind, "train", "train_00000.jpg", len(chosen))

    return plant


def long_picture(folder: Path) -> Planted:
    write_image(picture(folder, "train", 7), np.full((20, 90, 3), 99, np.uint8))
    return Planted("very long picture", "train", "train_00007.jpg")


FAULTS = (
    missing_picture,
    picture_is_a_folder,
    empty_picture,
    text_as_picture,
    cut_off_picture,
    picture_bomb,
    row("wrong column count", "1 0.5 0.5 0.2"),
    row("not a number", "1 0.5 0.5 0.2 nan"),
    row("fractional class", "1.5 0.5 0.5 0.2 0.2"),
    row("negative class", "-1 0.5 0.5 0.2 0.2"),
    row("class beyond names", "12 0.5 0.5 0.2 0.2"),
    row("out of range", "1 50 50 20 20"),
    row("negative size", "1 0.5 0.5 -0.2 0.2"),
    row("zero-size box", "1 0.5 0.5 0 0.2"),
    row_said_twice,
    object_labelled_twice,
    box_beyond_the_picture,
    label_in_two_bytes_a_letter,
    label_is_a_folder,
    no_label_file,
    empty_label_file,
    most_labels_elsewhere,
    no_boxes,
    listed_twice,
    same_file_in_both,
    linked_into_val,
    copied_into_val,
    copied_within_train,
    wrong_list,
    empty_list,
    lists_of_another_folder,
    no_train,
    no_val,
    class_without_boxes("train"),
    class_without_boxes("val"),
    tiny_boxes(0.01),
    tiny_boxes(0.5),
    long_picture,
)
CONSEQUENCES = {
    "no boxes": {"most label files missing"},
    "nothing usable": {"missing image"},
}
"""Kinds that a planted fault brings with it."""


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_at_its_place_and_nothing_else_is(plant, patient, examine):
    planted = plant(patient)
    document, error = examine(patient / "toy.data")
    found = {(problem["kind"], problem["split"]): problem for problem in document["problems"]}
    problem = found[planted.kind, planted.split]
    assert problem["count"] == planted.count
    assert not planted.place or problem["places"][0].endswith(planted.place)
    assert {kind for kind, _ in found} - {planted.kind} == CONSEQUENCES.get(planted.kind, set())
    assert problem["severity"] == KINDS[planted.kind].severity
    fatal = any(one["severity"] == "fatal" for one in document["problems"])
    assert document["ok"] is not fatal
    assert bool(error) is fatal


def test_a_good_set_has_no_problems(good, examine):
    document, error = examine(good / "toy.data")
    assert (document["problems"], document["ok"], error) == ([], True, "")
    assert document["splits"]["train"]["usable"] == TRAIN
    boxes = [sum(len(path.read_text().splitlines()) for path in (good / "labels").glob("train_*.txt"))]
    assert [sum(document["splits"]["train"]["boxes_per_class"])] == [document["splits"]["train"]["boxes"]] == boxes


def test_every_fault_has_a_severity_and_every_kind_is_planted(patient):
    """What needs a cfg is planted below; root cannot plant what it may not read."""
    needs_cfg = {"anchors do not fit", "other class count"}
    planted = set()
    for number, plant in enumerate(FAULTS):
        copy = Path(shutil.copytree(patient, patient.parent / str(number)))
        planted.add(plant(copy).kind)
    assert set(KINDS) - planted - needs_cfg == {"unreadable image"}
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


def test_a_size_is_height_and_width_of_the_input(patient, examine):
    """0.1 of a square picture is 9.6 pixels fitted to 96 x 200, above a cell of 8, and 6.4 fitted to 64 x 200."""
    for path in (patient / "labels").iterdir():
        path.write_text("".join(f"{kind} 0.5 0.5 0.1 0.1\n" for kind in range(12)))
    assert examine(patient / "toy.data", "--img_size", "96", "200")[0]["problems"] == []
    document, _ = examine(patient / "toy.data", "--img_size", "64", "200")
    assert {problem["kind"] for problem in document["problems"]} == {"many boxes smaller than a cell"}
    assert document["splits"]["val"]["smaller_than_a_cell"] == 1


def test_the_report_for_people_has_a_line_a_kind_with_what_to_do(patient, capsys):
    for number in range(5):
        picture(patient, "train", number).write_bytes(b"")
    with pytest.raises(DataError, match="1 kinds of fatal problems, the first: empty image"):
        doctor.main([str(patient / "toy.data")])
    out = capsys.readouterr().out
    assert f"train: {TRAIN - 5} of {TRAIN} images usable" in out
    assert "boxes of each class, train/val: " in out
    (line,) = [line for line in out.splitlines() if "empty image" in line]
    assert line.startswith(f"fatal   empty image in train: 5: {picture(patient, 'train', 0)}, ")
    assert line.endswith("and 2 more -> save or fetch the picture again, or take it off the list")
    assert "found: 1 fatal, " in out


def test_nothing_of_the_set_is_changed(patient, examine):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in patient.rglob("*")}
    examine(patient / "toy.data")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in patient.rglob("*")} == before


def test_a_data_yaml_is_examined_too(patient, examine):
    names = load_data(patient / "toy.data").names
    (patient / "data.yaml").write_text(f"train: images\nval: val.txt\nnames: {list(names)}\n")
    document, error = examine(patient / "data.yaml")
    assert [problem["kind"] for problem in document["problems"]] == ["same file in train and val"]
    assert document["problems"][0]["count"] == VAL and "same file" in error


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--cfg", "no.cfg"], r"no\.cfg: no such file"),
        (["--img_size", "1", "2", "3"], "takes N or H W"),
        (["--imgsize", "1"], "did you mean --img"),
    ],
)
def test_bad_flags_are_one_line(flags, match, good):
    with pytest.raises(InputError, match=match):
        doctor.main([str(good / "toy.data"), *flags])


def test_a_side_must_be_a_multiple_of_the_cfgs_stride(good, cfg):
    with pytest.raises(InputError, match="not a multiple of 8"):
        doctor.main([str(good / "toy.data"), "--cfg", str(cfg), "--img_size", "60"])


@pytest.mark.parametrize("name", ["bccd", "coco_mini"])
def test_real_sets_have_nothing_fatal(name, shared, examine):
    document, error = examine(shared / "data" / name / f"{name}.data")
    assert document["ok"] and not error


def test_status_2_and_no_torch(patient, root):
    picture(patient, "val", 0).unlink()
    code = (
        "import sys; from utils.cli import run; from utils.data import doctor\n"
        "try:\n    doctor.main([sys.argv[1]])\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(patient / "toy.data")], cwd=root, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert "AssertionError" not in done.stderr and "DataError" in done.stderr
    done = subprocess.run([sys.executable, "-m", "utils.data.doctor", str(patient / "toy.data")], cwd=root,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: {patient}/toy.data: 1 kinds of fatal problems, the first: missing image\n"
