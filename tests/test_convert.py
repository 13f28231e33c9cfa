"""Annotated data sets become label files and lists that say the same; nothing of the data set is changed."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.nets import printed
from utils.cli import one_line
from utils.darknet.data_file import load_data
from utils.data import convert
from utils.data.images import write_image
from utils.data.index import index
from utils.errors import DataError, InputError

SIZE = (40, 80)
"""Height and width of every made-up picture."""


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), np.uint8))


def xml(*objects: str, size: str = "<width>80</width><height>40</height>", filename: str = "x.jpg") -> str:
    lines = ["<annotation>", f"<filename>{filename}</filename>", f"<size>{size}</size>", *objects, "</annotation>"]
    return "\n".join(lines)


def thing(name: str, *corners: float, difficult: int | str = 0) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in sides)
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{tags}</bndbox></object>"


def voc_root(root: Path, annotations: dict[str, str | bytes], **lists: str) -> Path:
    """A VOC year; each annotation's picture is made, and each list is of names divided by blanks."""
    for seed, (stem, text) in enumerate(annotations.items()):
        picture(root / "JPEGImages" / f"{stem}.jpg", seed)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, stems in lists.items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems.split()))
    return root


def coco_document(*boxes: tuple[float, float, float, float], **changes) -> dict:
    """One picture a.jpg; a box each; two categories with ids that are not in order and leave gaps."""
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 80, "height": 40}],
        "annotations": [{"image_id": 7, "category_id": 9, "bbox": list(box)} for box in boxes],
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
    } | changes


def coco_file(folder: Path, document: dict | str, name: str = "instances_train.json") -> Path:
    path = folder / "annotations" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    picture(folder / "images" / "a.jpg")
    return path


@pytest.fixture
def converted(tmp_path, capsys):
    """Call the converter; returns the folder of the result and its JSON document."""

    def call(*flags: str | Path) -> tuple[Path, dict]:
        output = tmp_path / "out"
        return output, printed(capsys, convert.main, *map(str, flags), "--output", str(output))

    return call


@pytest.fixture
def voc(converted, tmp_path):
    """Convert a VOC year, of one annotation `a` if a text is given; all are for training unless lists say otherwise."""

    def call(annotations: dict[str, str] | str | bytes, *flags: str | Path, **lists: str) -> tuple[Path, dict]:
        annotations = annotations if isinstance(annotations, dict) else {"a": annotations}
        lists = {"trainval": " ".join(annotations), "test": "", **lists}
        return converted("voc", voc_root(tmp_path / "voc", annotations, **lists), *flags)

    return call


def label_rows(path: Path) -> list[list[float]]:
    return [[float(field) for field in row.split()] for row in path.read_text().splitlines()]


def rows(output: Path, split: str) -> dict[str, list[list[float]]]:
    """Path in a list → the rows of its label file."""
    lines = (output / f"{split}.txt").read_text().splitlines()
    labels = [output / line.replace("images", "labels", 1).rpartition(".")[0] for line in lines]
    return {line: label_rows(Path(f"{label}.txt")) for line, label in zip(lines, labels, strict=True)}


def ignored(output: Path) -> dict[str, list[list[float]]]:
    """File of ignored boxes → its rows."""
    return {path.relative_to(output).as_posix(): label_rows(path) for path in output.glob("ignored/**/*.txt")}


CAT = thing("cat", 1, 1, 9, 9)


def flaws(output: Path) -> dict[str, int]:
    """What the index finds in a result, but pictures without a box."""
    (path,) = output.glob("*.data")
    data = load_data(path)
    sources = [source for source in (data.train, data.valid) if source]
    counts = index(sources, data.names, cache_dir=None).counts()
    return {kind: count for kind, count in counts.items() if kind != "empty label file"}


# VOC


@pytest.mark.parametrize(("corners", "first"), [((9, 1, 41, 21), 1), ((8, 0, 40, 20), 0)])
def test_voc_pixels_count_from_one_as_in_darknets_own_script_or_from_zero(corners, first, voc):
    """xmin 9, xmax 41 of 80: centre (9 + 41) / 2 - 1 = 24, width 32; ymin 1, ymax 21 of 40: centre 10, height 20."""
    output, _ = voc(xml(thing("cat", *corners)), *([] if first else ["--first-pixel", "0"]))
    assert rows(output, "train") == {"images/train/a.jpg": [[0, 24 / 80, 10 / 40, 32 / 80, 20 / 40]]}
    assert flaws(output) == {}


def test_several_years_are_one_set_and_the_last_may_have_no_test(converted, tmp_path):
    first = voc_root(tmp_path / "VOC2007", {"a": xml(thing("dog", 1, 1, 9, 9)), "b": xml()}, trainval="a", test="b")
    second = voc_root(tmp_path / "VOC2012", {"a": xml(CAT), "c": xml()}, trainval="a c")
    output, document = converted("voc", first, second)
    assert document["names"] == ["cat", "dog"]  # sorted, as VOC's own twenty are
    assert {name: [row[0] for row in found] for name, found in rows(output, "train").items()} == {
        "images/train/a.jpg": [1],
        "images/train/a-2.jpg": [0],
        "images/train/c.jpg": [],
    }
    assert rows(output, "val") == {"images/test/b.jpg": []}
    assert document["splits"] == {
        "train": {"pictures": 3, "boxes": 2, "backgrounds": 1, "ignored": 0},
        "val": {"pictures": 1, "boxes": 0, "backgrounds": 1, "ignored": 0},
    }
    assert flaws(output) == {}


@pytest.mark.parametrize(("flags", "boxes"), [((), 1), (("--difficult", "ignore"), 1), (("--difficult", "keep"), 2)])
def test_difficult_objects_are_ignored_boxes_or_objects(flags, boxes, voc):
    output, document = voc({"a": xml(CAT, thing("cat", 21, 1, 41, 9, difficult=1)), "b": xml(CAT)}, *flags)
    assert document["splits"]["train"] == {"pictures": 2, "boxes": boxes + 1, "ignored": 2 - boxes, "backgrounds": 0}
    row = [0, 30 / 80, 4 / 40, 20 / 80, 8 / 40]
    if boxes == 1:
        assert ignored(output) == {"ignored/train/a.txt": [row]}
    else:
        assert not (output / "ignored").exists() and row in rows(output, "train")["images/train/a.jpg"]
    assert document["notes"] == {} and flaws(output) == {}


@pytest.mark.parametrize(("value", "count"), [("0", 0), ("", 0), ("False", 0), ("1", 1), ("true", 1)])
def test_difficult_is_a_number_or_a_truth_value(value, count, voc):
    output, _ = voc({"a": xml(thing("cat", 21, 1, 41, 9, difficult=value)), "b": xml(CAT)})
    assert len(ignored(output)) == count


def test_what_cannot_be_used_is_left_out_and_counted(converted, tmp_path):
    annotations = {
        "good": xml(thing("cat", 2, 2, 9, 9), thing("cat", 2, 2, 9, 9), thing("cat", 5, 5, 5, 9)),
        "beyond": xml(thing("cat", 70, 2, 99, 9), thing("cat", 90, 2, 99, 9)),
        "other_size": xml(size="<width>40</width><height>80</height>"),
        "no_picture": xml(),
        "no_image": xml(),
        "no_sides": xml(thing("cat", 2, 2, 9, 9), size=""),
        "no_size": xml(thing("cat", 2, 2, 9, 9), size="").replace("<size></size>", ""),
    }
    root = voc_root(tmp_path / "voc", annotations, trainval=" ".join(annotations) + " good absent", test="good")
    (root / "JPEGImages" / "no_picture.jpg").unlink()
    (root / "JPEGImages" / "no_image.jpg").write_text("nothing")
    output, document = converted("voc", root)
    assert document["notes"] == {
        "no annotation, image left out": 1,
        "same box twice, used once": 2,  # `good` is in the other split, too
        "box without an area, left out": 3,
        "box beyond the image, cut": 1,
        "image of another size than annotated, left out": 1,
        "image not found, left out": 1,
        "image cannot be read, left out": 1,
        "image listed twice, used once": 1,
    }
    assert [len(found) for found in rows(output, "train").values()] == [1, 1, 1, 1]
    (_, cx, _, w, _) = rows(output, "train")["images/train/beyond.jpg"][0]
    assert (cx + w / 2, cx - w / 2) == pytest.approx((1, 69 / 80))


def test_the_summary_counts_and_names(tmp_path, capsys):
    text = xml(*(thing("cat", n, 5, n, 9) for n in range(1, 6)), CAT)
    root = voc_root(tmp_path / "voc", {"a": text}, trainval="a", test="")
    convert.main(["voc", str(root), "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert f"{tmp_path}/out/out.data: train 1 images (0 without a box), 1 boxes; val 0 images" in out
    assert f"box without an area, left out: 5: {root}/Annotations/a.xml: cat" in out and "and 2 more" in out
    assert "  no validation images: training evaluates nothing" in out
    assert load_data(tmp_path / "out/out.data").valid is None  # train.py refuses an empty list


def test_a_set_without_lists_is_split_by_share_and_seed(converted, tmp_path):
    for number in range(10):
        picture(tmp_path / "mine" / f"p {number}.png", number)
        (tmp_path / "mine" / f"p {number}.xml").write_text(xml(thing("cat", 1 + number, 1, 20, 20)))
    with pytest.raises(DataError, match=r"test\.txt: no such list; there is none; --val-share makes a split"):
        converted("voc", tmp_path / "mine")
    output, document = converted("voc", tmp_path / "mine", "--val-share", "0.3", "--seed", "4")
    assert [document["splits"][name]["pictures"] for name in ("train", "val")] == [7, 3]
    assert not {Path(name).name for name in rows(output, "train")} & {Path(name).name for name in rows(output, "val")}
    first = rows(output, "val")
    output.rename(tmp_path / "first")
    assert rows(converted("voc", tmp_path / "mine", "--val-share", "0.3", "--seed", "4")[0], "val") == first
    output.rename(tmp_path / "second")
    assert rows(converted("voc", tmp_path / "mine", "--val-share", "0.3", "--seed", "5")[0], "val") != first
    assert flaws(output) == {}


def test_an_image_listed_twice_is_in_one_part_of_a_split_by_share(voc):
    stems = list("abcdefgh")
    output, document = voc(
        dict.fromkeys(stems, xml(CAT)), "--val-share", "0.25", "--seed", "1", trainval=" ".join(stems * 2)
    )
    assert sorted(Path(name).stem for split in ("train", "val") for name in rows(output, split)) == stems
    assert document["notes"] == {"image listed twice, used once": 8} and len(rows(output, "val")) == 2


def test_names_choose_and_order_the_classes(voc, tmp_path):
    (tmp_path / "my.names").write_text("dog\ncat\n")
    text = xml(CAT, thing("dog", 1, 1, 8, 9), thing("cow", 1, 1, 7, 9))
    output, document = voc(text, "--names", tmp_path / "my.names", "--name", "pets")
    assert [row[0] for row in rows(output, "train")["images/train/a.jpg"]] == [1, 0]
    assert document["notes"] == {"class not in --names, box left out": 1}
    assert (output / "pets.data").read_text() == "classes=2\ntrain=train.txt\nnames=pets.names\n"
    assert (output / "pets.names").read_text() == "dog\ncat\n"


@pytest.mark.parametrize(
    ("names", "fits"),
    [
        ("cat dog sheep", True),
        ("feline dog sheep", True),
        ("dog cat sheep", False),
        ("bird cat dog sheep", False),
        ("cat dog", False),
    ],
)
def test_a_data_file_that_numbers_the_classes_of_a_converted_set_otherwise_is_refused(names, fits, voc, tmp_path):
    """As data/voc.data would be, over a set of other objects in data/voc. A class may have another name."""
    output, _ = voc(xml(CAT, thing("sheep", 1, 1, 7, 9), thing("dog", 1, 1, 8, 9)))
    (tmp_path / "my.names").write_text(names.replace(" ", "\n"))
    (tmp_path / "my.data").write_text(f"names=my.names\ntrain={output.name}/images/train\n")
    if fits:
        assert load_data(tmp_path / "my.data").names == tuple(names.split())
        return
    lists = f"{', '.join(names.split())}, but {output}/out.names, beside the labels, has cat, dog, sheep; "
    with pytest.raises(DataError, match=f"my.data: its classes are {lists}give --data {output}/out.data, or"):
        load_data(tmp_path / "my.data")
    assert load_data(output / "out.data").classes == 3


def test_an_annotation_that_is_too_large_is_refused(voc, monkeypatch):
    monkeypatch.setattr("utils.data.annotations.LARGEST_XML", 10)
    with pytest.raises(DataError, match=r"a\.xml: .* at most 10 bytes"):
        voc(xml())


def test_a_list_may_be_that_of_a_class_and_one_that_is_missing_is_named_with_those_there_are(converted, tmp_path):
    """The list of a single class has flags behind the names."""
    root = voc_root(tmp_path / "voc", {"a": xml(CAT)}, train="a", val="a", cat_train="a")
    for match, *flags in (
        (r"trainval\.txt: no such list; there are: train, val$", root),
        ("nowhere: no such folder", tmp_path / "nowhere"),
        (r"no \.xml files", root / "JPEGImages", "--val-share", "0.5"),
    ):
        with pytest.raises(DataError, match=match):
            converted("voc", *flags)
    (root / "ImageSets" / "Main" / "cat_train.txt").write_text("a  1\n")
    (root / "ImageSets" / "Main" / "test.txt").touch()
    assert len(rows(converted("voc", root, "--train", "cat_train")[0], "train")) == 1


# COCO


def test_coco_categories_become_classes_in_the_order_of_their_ids(converted, tmp_path):
    path = coco_file(tmp_path / "coco", coco_document((8, 0, 32, 20)))
    output, document = converted("coco", "--train", path)
    assert document["names"] == ["dog", "cat"]
    assert rows(output, "train") == {"images/train/a.jpg": [[1, 24 / 80, 10 / 40, 32 / 80, 20 / 40]]}
    assert "valid" not in (output / "out.data").read_text()
    assert flaws(output) == {}


@pytest.mark.parametrize(
    ("group", "has_box", "names"), [("dog", False, ["dog", "cat"]), ("pets", True, ["pets", "dog", "cat"])]
)
def test_the_group_of_all_categories_is_no_class_unless_it_has_a_box(group, has_box, names, converted, tmp_path):
    """Roboflow lists it first; its name may be that of a class."""
    document = coco_document((8, 0, 32, 20))
    document["categories"] = [item | {"supercategory": group} for item in document["categories"]]
    document["categories"].insert(0, {"id": 0, "name": group, "supercategory": "none"})
    document["annotations"] += [box | {"category_id": 0} for box in document["annotations"] if has_box]
    _, result = converted("coco", "--train", coco_file(tmp_path, document))
    assert result["names"] == names


def test_a_path_of_windows_names_a_picture(converted, tmp_path):
    images = [{"id": 7, "file_name": "images\\a.jpg"}]
    path = coco_file(tmp_path / "coco", coco_document((8, 0, 32, 20), images=images))
    beside = path.rename(tmp_path / "coco" / "result.json")
    assert converted("coco", "--train", beside)[1]["splits"]["train"]["boxes"] == 1


def test_crowds_are_ignored_boxes(converted, tmp_path):
    document = coco_document((8, 0, 32, 20), (8, 0, 32, 20))
    document["annotations"][1]["iscrowd"] = 1
    output, result = converted("coco", "--train", coco_file(tmp_path, document))
    assert result["splits"]["train"] == {"pictures": 1, "boxes": 1, "ignored": 1, "backgrounds": 0}
    assert ignored(output) == {"ignored/train/a.txt": rows(output, "train")["images/train/a.jpg"]}
    assert result["notes"] == {} and flaws(output) == {}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("cat", ("cat", 0)),
        ("cat dog", ("cat", 0)),
        ("hound cat", ("cat", 1)),
        ("hound kitten", ("kitten", 1)),
        ("cat hound", "'hound' is no class of the data set, which has: dog, cat"),
        ("cat cat", "'cat' is there twice"),
    ],
)
def test_names_choose_categories_or_call_them_otherwise_or_are_refused(names, expected, converted, tmp_path):
    (tmp_path / "my.names").write_text(names.replace(" ", "\n"))
    flags = "--train", coco_file(tmp_path, coco_document((8, 0, 32, 20))), "--names", tmp_path / "my.names"
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            converted("coco", *flags)
        return
    output, document = converted("coco", *flags)
    ((label, *_),) = rows(output, "train")["images/train/a.jpg"]
    assert (document["names"][int(label)], label) == expected


def test_a_name_that_is_no_class_is_answered_with_all_classes(converted, tmp_path):
    (tmp_path / "my.names").write_text("dogg\n")
    categories = [{"id": number, "name": f"class number {number}"} for number in range(80)]
    path = coco_file(tmp_path, coco_document(categories=categories))
    with pytest.raises(DataError, match=r"which has: class number 0, .*, class number 79$"):
        converted("coco", "--train", path, "--names", tmp_path / "my.names")


@pytest.mark.parametrize("folder", ["val2017", "images/val2017", "images", "annotations"])
def test_pictures_are_found_where_archives_and_exporters_put_them(folder, converted, tmp_path):
    path = coco_file(tmp_path / "coco", coco_document((8, 0, 32, 20)), "instances_val2017.json")
    picture(tmp_path / "mine" / "a.jpg")
    (tmp_path / "coco" / "images" / "a.jpg").unlink()
    os.makedirs(tmp_path / "coco" / folder, exist_ok=True)
    (tmp_path / "mine" / "a.jpg").rename(tmp_path / "coco" / folder / "a.jpg")
    assert list(rows(converted("coco", "--train", path)[0], "train")) == ["images/val2017/a.jpg"]


def test_a_split_of_the_name_of_an_image_folder_keeps_its_labels(converted, tmp_path):
    coco_file(tmp_path / "coco", coco_document((8, 0, 32, 20)))
    path = tmp_path / "coco" / "images" / "_annotations.coco.json"
    path.write_text(json.dumps(coco_document((8, 0, 32, 20))))
    output, _ = converted("coco", "--train", path)
    assert list(rows(output, "train")) == ["images/train/a.jpg"]
    assert len(index(output / "train.txt", ("dog", "cat"), cache_dir=None).labels.rows) == 1


@pytest.mark.parametrize("linked", ["the folder is reached by a link", "the set has a link to the folder"])
def test_annotations_may_lie_behind_a_link(linked, converted, tmp_path):
    """In the first case the images lie beside the real folder, in the second beside the link."""
    path = coco_file(tmp_path / "real", coco_document((8, 0, 32, 20)))
    place = tmp_path / ("elsewhere" if "reached" in linked else "coco")
    place.mkdir()
    (place / "annotations").symlink_to(path.parent)
    if "the set has" in linked:
        (tmp_path / "real" / "images").rename(place / "images")
    output, document = converted("coco", "--train", place / "annotations" / path.name)
    assert document["notes"] == {} and flaws(output) == {}
    assert index(output / "train.txt", ("dog", "cat"), cache_dir=None).totals()["usable"] == 1


OUTSIDE = "outside of"
BAD_NAMES = {
    "x" * 300 + ".jpg": "not found",
    "../..": OUTSIDE,
    "../../b.jpg": OUTSIDE,
    "/etc/hosts": OUTSIDE,
    "": "left out",
    ".": "left out",
    "a\0.jpg": "not found",
    "\ud800.jpg": "not found",
    "~/b.jpg": "not found",
}
"""File names in an annotation, and what the note on the picture says."""


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("named", [True, False], ids=["--images", ""])
def test_a_bad_file_name_is_counted_and_skipped(name, named, converted, tmp_path):
    picture(tmp_path / "b.jpg")
    images = [{"id": 8, "file_name": name}, *coco_document()["images"]]
    path = coco_file(tmp_path / "coco", coco_document((8, 0, 32, 20), images=images))
    flags = ("--images", tmp_path / "coco" / "images") if named else ()
    output, document = converted("coco", "--train", path, *flags)
    assert list(rows(output, "train")) == ["images/train/a.jpg"]
    assert [kind for kind in document["notes"] if BAD_NAMES[name] in kind]


@pytest.mark.parametrize("line", ["x" * 300, "../..", "a\0", "~"])
def test_a_bad_line_of_a_list_is_counted_and_skipped(line, converted, tmp_path):
    root = voc_root(tmp_path / "voc", {"a": xml(thing("cat", 2, 2, 9, 9), filename="y" * 300)}, trainval="a", test="a")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text(f"{line}\na\n")
    output, document = converted("voc", root)
    assert list(rows(output, "train")) == ["images/train/a.jpg"]
    assert document["notes"] == {"no annotation, image left out": 1}


@pytest.mark.parametrize("side", [80, 81])
def test_an_image_with_two_entries_has_the_boxes_of_both_if_both_have_its_size(side, converted, tmp_path):
    images = [{"id": number, "file_name": name, "width": w} for number, name, w in ((7, "a.jpg", 80), (8, "b.jpg", 80))]
    images += [{"id": 9, "file_name": "./a.jpg", "width": side, "height": 40}]
    boxes = [{"image_id": n, "category_id": 9, "bbox": [8 * n, 0, 8, 20]} for n in (7, 8, 9)]
    picture(tmp_path / "coco" / "images" / "b.jpg")
    path = coco_file(tmp_path / "coco", coco_document(images=images, annotations=boxes))
    output, document = converted("coco", "--train", path)
    counts = {name: len(found) for name, found in rows(output, "train").items()}
    assert counts == {"images/train/b.jpg": 1} | ({"images/train/a.jpg": 2} if side == 80 else {})
    assert document["notes"].pop("image listed twice, used once") == 1
    assert list(document["notes"].values()) == [1] * (side != 80)


def test_names_lose_line_ends_and_what_is_too_long(converted, tmp_path):
    names = ["b\n.jpg", "é" * 125 + ".jpg"]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, 7)]
    for name in names:
        picture(tmp_path / "coco" / "images" / name)
    output, _ = converted("coco", "--train", coco_file(tmp_path / "coco", coco_document((8, 0, 32, 20), images=images)))
    assert list(rows(output, "train")) == ["images/train/b_.jpg", f"images/train/{'é' * 100}.jpg"]
    assert flaws(output) == {}


def test_labels_are_found_whatever_an_image_is_called(converted, tmp_path):
    """The suffix of `a.` is a dot, and `..jpg` has none, so labels lie in a.txt and ..jpg.txt."""
    names = ["a.", "a", "..jpg", " ..jpg", ".jpg"]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    annotations = [{"image_id": number, "category_id": 9, "bbox": [8, 0, 32, 20]} for number in range(len(names))]
    path = coco_file(tmp_path / "coco", coco_document(images=images, annotations=annotations))
    for name in names:
        (tmp_path / "coco" / "images" / name).write_bytes((tmp_path / "coco" / "images" / "a.jpg").read_bytes())
    output, _ = converted("coco", "--train", path)
    assert index(output / "train.txt", ("dog", "cat"), cache_dir=None).labels.counts.tolist() == [1] * len(names)


def changed(key: str, **values) -> dict:
    document = coco_document((8, 0, 32, 20))
    document[key][0] |= values
    return document


@pytest.mark.parametrize(
    ("annotation", "match"),
    [
        ("<annotation>\n<size>\n", r"a\.xml:3: not valid XML: no element found"),
        ("<!DOCTYPE a [\n<!ENTITY e 'x'>]>\n<a>&e;</a>", r"a\.xml:1: a document type"),
        ("<?xml version='1.0'?>\n<!DOCTYPE a SYSTEM '/dev/null'>\n<a/>", r"a\.xml:2: a document type"),
        ("<a>&e;</a>", r"a\.xml:1: not valid XML: undefined entity"),
        (xml("<object>\n<name>cat</name></object>"), r"a\.xml:4: an object needs a name and a bndbox"),
        (xml(thing("cat", 1, 1, 9, float("nan"))), r"a\.xml:4: ymax is 'nan'; a number was expected"),
        (xml(size="\n\n<width>wide</width><height>4</height>"), r"a\.xml:5: width is 'wide'"),
        (xml().encode("utf-16"), r"a\.xml:1: byte 0xff is not UTF-8"),
        ([], "has no list of objects 'images'"),
        (coco_document(categories=[]), "categories is empty"),
        (coco_document(annotations=[1]), "has no list of objects 'annotations'"),
        (changed("annotations", image_id=8), r"annotations\[0\]: image_id 8 is not in the file"),
        (changed("annotations", category_id=1), r"annotations\[0\]: category_id 1 is not in the file"),
        (changed("annotations", bbox=[1, 2, 3]), r"annotations\[0\]: bbox is \[1, 2, 3\]"),
        (changed("annotations", bbox=[1, 2, 3, float("nan")]), "bbox is"),
        (changed("images", id="7"), r"images\[0\]: id is '7'; an integer was expected"),
        (changed("images", file_name=None), r"images\[0\]: file_name is None; a text was expected"),
        (changed("categories", id=4), r"categories\[1\]: id 4, name 'dog'; both must be there once only"),
        (changed("categories", name="a\nb"), r"class name 'a\\nb'"),
        ('{\n"images": [\n}', r"train\.json:3: not valid JSON: .* column 1"),
        ("[" * 100_000, r"train\.json: not valid JSON"),
    ],
)
def test_a_malformed_annotation_stops_with_its_place(annotation, match, voc, converted, tmp_path):
    with pytest.raises(DataError, match=match) as caught:
        if r"\.xml" in match:
            voc(annotation)
        else:
            converted("coco", "--train", coco_file(tmp_path, annotation))
    assert "\n" not in one_line(str(caught.value))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".new-*"))


def test_two_files_must_have_the_same_categories(converted, tmp_path):
    first = coco_file(tmp_path, coco_document())
    second = coco_file(tmp_path, coco_document(categories=[{"id": 1, "name": "cat"}]), "instances_val.json")
    with pytest.raises(DataError, match="its categories are not those of"):
        converted("coco", "--train", first, "--val", second)


# Oxford hands


@pytest.fixture
def hands(tmp_path):
    """hand_dataset with one picture a split: two hands, one hand, none."""
    io = pytest.importorskip("scipy.io")
    root = tmp_path / "hand_dataset"
    splits = ("test_dataset/test_data", "validation_dataset/validation_data", "training_dataset/training_data")
    for count, split in enumerate(splits):
        picture(root / split / "images" / "a.jpg")
        (root / split / "annotations").mkdir()
        cell = np.empty((1, count), object)
        for number in range(count):
            corners = {"a": [1.5, 9.5], "b": [11.5, 1.5 + number], "c": [21.5, 9.5], "d": [11.5, 17.5]}
            cell[0, number] = {key: np.array([value]) for key, value in corners.items()} | {"e": "L"}
        io.savemat(root / split / "annotations" / "a.mat", {"boxes": cell})
    return root


def test_a_hand_is_the_upright_box_around_its_corners(hands, converted):
    """Corners (y, x) of 1.5..21.5 and 1.5..17.5, where the picture's edge is at 0.5: y 1..21, x 1..17."""
    output, document = converted("oxford-hand", hands)
    assert list(rows(output, "train")) == ["images/train/a.jpg", "images/train/a-2.jpg"]  # training and validation
    assert rows(output, "train")["images/train/a.jpg"] == [
        pytest.approx([0, 9 / 80, 11 / 40, 16 / 80, 20 / 40]),
        pytest.approx([0, 9.5 / 80, 11 / 40, 15 / 80, 20 / 40]),
    ]
    assert rows(output, "val") == {"images/test/a.jpg": []}
    assert document["names"] == ["hand"]
    assert flaws(output) == {}
    output.rename(output.parent / "first")
    output, _ = converted("oxford-hand", hands, "--val", "validation")
    assert [len(boxes) for boxes in rows(output, "val").values()] == [1]
    assert list(rows(output, "train")) == ["images/train/a.jpg"]


def test_a_malformed_mat_file_is_named(hands, converted):
    from scipy.io import savemat

    path = hands / "training_dataset/training_data/annotations/a.mat"
    for boxes, match in ((np.zeros(3), "has no cell array boxes"), ({"a": [1, 2]}, "corners a, b, c and d must be")):
        savemat(path, {"boxes": boxes})
        with pytest.raises(DataError, match=match):
            converted("oxford-hand", hands)
    path.write_bytes(b"MATLAB 5.0 but not really")
    with pytest.raises(DataError, match=r"a\.mat: not a MATLAB 5 file"):
        converted("oxford-hand", hands)
    path.unlink()
    with pytest.raises(DataError, match=r"none of 0 training images.*a\.mat: no annotation"):
        converted("oxford-hand", hands, "--val", "validation")


def test_without_scipy_the_requirements_file_is_named(converted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-convert\.txt"):
        converted("oxford-hand", tmp_path)


# Where the result goes


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("copy", [False, True])
def test_pictures_are_links_or_copies_and_the_source_is_left_alone(copy, converted, tmp_path, monkeypatch):
    """Links lead to the pictures from any folder."""
    root = voc_root(tmp_path / "voc", {"a": xml(CAT)}, trainval="a", test="")
    before = tree(root)
    monkeypatch.chdir(tmp_path)
    output, _ = converted("voc", "voc", *(["--copy"] if copy else []))
    monkeypatch.chdir("/")
    assert flaws(output) == {}
    image = output / "images" / "train" / "a.jpg"
    assert image.is_symlink() is not copy
    assert image.read_bytes() == (root / "JPEGImages" / "a.jpg").read_bytes()
    assert tree(root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "voc"]


def test_a_folder_that_holds_something_is_refused_and_kept(voc, tmp_path):
    """Test_toy.py tries files and links."""
    (tmp_path / "out" / "mine").mkdir(parents=True)
    with pytest.raises(DataError, match="holds other files or is no folder; name a new folder"):
        voc(xml(CAT))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--val-share", "0"], "a share above 0"),
        (["--name", "a/b"], r"--name 'a/b': letters"),
        (["--names", "no.names"], r"no\.names: no such file"),
    ],
)
def test_bad_flags_are_one_line(flags, match, voc):
    with pytest.raises(InputError, match=match):
        voc(xml(CAT), *flags)


# Real sets


def test_voc_annotations_of_bccd_give_bccds_labels(converted, shared):
    """Equal to the last digit but for sums that lie between two digits; bccd's labels count pixels from 0."""
    data = shared / "data"
    output, document = converted("voc", data / "voc_bccd", "--images", data / "bccd" / "images", "--first-pixel", "0")
    assert document["notes"] == {"box without an area, left out": 2}
    assert document["names"] == (data / "bccd" / "bccd.names").read_text().split()
    assert flaws(output) == {}
    assert differences(output, data / "bccd") <= 1.01e-6


def test_coco_annotations_of_coco_mini_give_its_labels(converted, shared, root):
    """The JSON rounds to 0.01 pixel of 416, so corners are off by 0.005 at most and sizes by 0.01: 5e-5 of a side."""
    folder = shared / "data" / "coco_mini"
    files = ["--train", folder / "annotations/instances_train.json", "--val", folder / "annotations/instances_val.json"]
    output, document = converted("coco", *files, "--names", root / "data" / "coco.names")
    assert sum(split["ignored"] for split in document["splits"].values()) == 21 and document["notes"] == {}
    assert document["names"] == (folder / "coco_mini.names").read_text().splitlines()
    assert flaws(output) == {}
    assert differences(output, folder) <= 5.01e-5


def differences(output: Path, reference: Path) -> float:
    """Largest difference between the labels of a result and of a set with the same pictures, row by row."""
    worst = 0.0
    for split in ("train", "val"):
        converted = {Path(line).name: np.array(boxes).reshape(-1, 5) for line, boxes in rows(output, split).items()}
        assert list(converted) == [Path(line).name for line in (reference / f"{split}.txt").read_text().split()]
        for name, boxes in converted.items():
            expected = np.array(label_rows(reference / "labels" / f"{Path(name).stem}.txt")).reshape(-1, 5)
            np.testing.assert_array_equal(boxes[:, 0], expected[:, 0])
            worst = max(worst, float(np.abs(boxes - expected).max(initial=0)))
    return worst


def test_the_example_of_the_help_is_a_command_of_the_parser():
    for name, (_, example) in convert.FORMATS.items():
        assert convert.parse_args(shlex.split(example)).format == name
