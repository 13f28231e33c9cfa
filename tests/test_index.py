"""Every picture and label of a data set checked once; every flaw counted and named; nothing of the data set changed."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import time
from unittest.mock import Mock

import cv2
import numpy as np
import PIL
import pytest

from utils.darknet.data_file import load_data
from utils.data.findings import EXAMPLES
from utils.data.images import check_image
from utils.data.index import CACHE_KEY, SAMPLE, index, label_path, list_images, parse_labels
from utils.data.sources import find
from utils.errors import DataError

NAMES = ("cat", "dog", "cow")
GOOD = "1 0.5 0.5 0.2 0.4\n"


def encoded(shape: tuple[int, ...] = (24, 32, 3)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


HARMLESS = {
    "is_a_png.jpg": (24, 32, 3),
    "one_pixel.png": (1, 1, 3),
    "long.png": (500, 9, 3),
    "grey.png": (24, 32),
    "transparent.png": (24, 32, 4),
}
"""File name → the shape of a PNG."""


@pytest.fixture
def data_set(tmp_path):
    """A function that adds pictures with labels to a data set; it returns the list file."""
    root = tmp_path / "data"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    (root / "list.txt").touch()

    def add(name: str, picture: bytes | None = None, label: bytes | str | None = GOOD):
        if picture is not None:
            (root / "images" / name).write_bytes(picture)
        if label is not None:
            path = root / "labels" / f"{name.rpartition('.')[0]}.txt"
            path.write_bytes(label if isinstance(label, bytes) else label.encode())
        with open(root / "list.txt", "a", encoding="utf-8") as file:
            file.write(f"images/{name}\n")
        return root / "list.txt"

    add.root = root
    return add


def tree_hash(root) -> str:
    """Digest of every name, kind, time and byte under a folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path} {path.lstat().st_mode} {path.lstat().st_mtime_ns}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def test_flawed_pictures_and_rows_are_left_out_and_the_rest_is_used(data_set, tmp_path):
    """Test_doctor.py plants every kind of flaw."""
    for name, shape in HARMLESS.items():
        data_set(name, encoded(shape))
    data_set("empty.png", b"")
    flawed = {"class": "3 0.5 0.5 0.2 0.2\n", "size": "1 0.5 0.5 0 0.2\n", "row": GOOD * 2, "no": None}
    for name, label in flawed.items():
        data_set(f"{name}.png", encoded(), label)
    source, before = data_set("grey.png"), tree_hash(data_set.root)
    images, labels = data_set.root / "images", data_set.root / "labels"
    for _ in range(2):  # the second time with what is known of the first
        found = index(source, NAMES, cache_dir=tmp_path / "cache")
        assert {kind: found.places(kind) for kind in found.counts()} == {
            "empty image": (str(images / "empty.png"),),
            "class beyond names": (str(labels / "class.txt:1"),),
            "zero-size box": (str(labels / "size.txt:1"),),
            "duplicate row": (str(labels / "row.txt:2"),),
            "no label file": (str(labels / "no.txt"),),
            "listed twice": (str(images / "grey.png"),),
        }
        assert [path.name for path in found.images] == [*HARMLESS, "size.png", "row.png", "no.png"]
        assert found.totals() == {"listed": 11, "usable": 8, "boxes": 6, "backgrounds": 2, "ignored": 0}
    assert tree_hash(data_set.root) == before


@pytest.mark.parametrize("folder", ["", "elsewhere"])
def test_a_picture_listed_by_its_absolute_path_too_is_used_once_wherever_the_script_runs(data_set, monkeypatch, folder):
    source = data_set("a.png", encoded())
    source.write_text(f"images/a.png\n{data_set.root}/images/a.png\n")
    (data_set.root / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(data_set.root / folder)
    assert index(os.path.relpath(source), NAMES, cache_dir=None).totals()["usable"] == 1


def test_strict_accepts_backgrounds_refuses_flaws_and_names_the_first(data_set, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    assert index(tmp_path / "a.png", NAMES, strict=True, cache_dir=None).counts() == {"no label file": 1}
    data_set("a.png", encoded(), GOOD * 2)
    source = data_set("b.png", b"")
    with pytest.raises(
        DataError, match=r"list\.txt: 2 flaws and --strict-data; the first is .*a\.txt:2: duplicate row"
    ):
        index(source, NAMES, strict=True, cache_dir=None)


def test_nothing_usable_is_an_error_unless_allowed(data_set):
    source = data_set("a.png", b"nothing")
    with pytest.raises(DataError, match=r"none of 1 images can be used; found: 1 unknown image format"):
        index(source, NAMES, cache_dir=None)
    assert len(index(source, NAMES, cache_dir=None, require=False)) == 0


def ignored(data_set, text: str) -> None:
    (data_set.root / "ignored").mkdir(exist_ok=True)
    (data_set.root / "ignored" / "a.txt").write_text(text)


def test_ignored_boxes_are_read_beside_the_labels_and_a_wrong_line_leaves_the_picture_out(data_set):
    source = data_set("a.png", encoded())
    before = index(source, NAMES, cache_dir=None)
    assert [len(rows) for rows in before.ignored] == [0] and "ignored" not in before.summary()
    ignored(data_set, "")
    assert index(source, NAMES, cache_dir=None).fingerprint() == before.fingerprint()
    ignored(data_set, "2 0.5 0.5 1 1\n")
    found = index(source, NAMES, cache_dir=None)
    single = found.single_class()
    assert found.ignored[0].tolist() == [[2, 0.5, 0.5, 1, 1]] and single.ignored[0][0, 0] == 0
    assert single.labels[0].tolist() == [[0, *found.labels[0][0, 1:].tolist()]] and found.labels[0][0, 0] == 1
    assert np.array_equal(found.labels[0], before.labels[0]) and found.fingerprint() != before.fingerprint()
    assert (found.totals()["boxes"], found.totals()["ignored"], found.findings) == (1, 1, ())
    assert "1 boxes, 1 ignored ones, 0 images without a box" in found.summary()
    assert [part.tolist() for part in found.subset([0, 0]).ignored] == [[[2, 0.5, 0.5, 1, 1]]] * 2
    ignored(data_set, "9 0.5 0.5 1 1\n")
    wrong = index(source, NAMES, cache_dir=None, require=False)
    assert len(wrong) == 0 and wrong.places("class beyond names") == (str(data_set.root / "ignored/a.txt:1"),)


def test_a_data_set_without_ignored_boxes_keeps_its_fingerprint(data_set):
    """Runs that were begun by an earlier version resume; the sum was written down with that version."""
    found = index(data_set("a.png", encoded()), NAMES, cache_dir=None)
    assert found.fingerprint() == "5c4daac23e3864693c2346d79b24e631d5df2d3fc61fb8208165699b79c99155"


def test_labels_beside_their_pictures_are_not_ignored_boxes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "a.txt").write_text(GOOD)
    assert index(tmp_path / "a.png", NAMES, cache_dir=None).totals()["ignored"] == 0
    for name in ("images", "ignored"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(GOOD)
    (tmp_path / "images" / "a.png").write_bytes(encoded())
    totals = index(tmp_path / "images", NAMES, cache_dir=None).totals()
    assert (totals["boxes"], totals["ignored"]) == (1, 0)


def test_an_index_is_a_few_buffers(data_set):
    """A million pictures with 7 boxes each: under 400 MB, and no objects that workers would copy by reading them."""
    found = index(data_set("a.png", encoded(), GOOD), NAMES, cache_dir=None).subset([0] * 1000)
    objects, buffers, seen = [found], 0, 0
    while objects:
        one = objects.pop()
        seen += 1
        buffers += getattr(one, "nbytes", len(one) if isinstance(one, bytes) else 0)
        objects += vars(one).values() if hasattr(one, "__dict__") else one if isinstance(one, tuple) else ()
    assert seen < 20
    assert buffers + 1000 * 6 * found.labels.rows[:1].nbytes < 1000 * 400
    assert [*found.images] == [found.images[-1]] * 1000 and len(found.labels) == len(found.ignored) == 1000
    with pytest.raises(IndexError):
        found.images[1000]


def test_the_summary_counts_names_and_escapes(data_set):
    for number in range(EXAMPLES + 2):
        data_set(f"empty{number}.png", b"")
    (data_set.root / "images" / "line\nbreak.png").write_bytes(b"")
    (data_set.root / "images" / "good.png").write_bytes(encoded())
    summary = index(data_set.root / "images", NAMES, cache_dir=None).summary()
    assert f"empty image: {EXAMPLES + 3} (image left out)" in summary and "and 3 more" in summary
    assert summary.count("\n") == 2


# What a source is


def test_a_folder_a_glob_a_list_and_a_picture_name_the_same_pictures(data_set):
    data_set("a.png", encoded())
    source = data_set("b.png", encoded())
    (data_set.root / "images" / "notes.txt").write_text("no image")
    expected = [str(data_set.root / "images" / name) for name in ("a.png", "b.png")]
    assert list_images(source) == expected
    assert list_images(data_set.root) == expected
    assert list_images(str(data_set.root / "im*" / "*")) == expected
    assert list_images(expected[0]) == expected[:1]
    assert [str(path) for path in index([source, *expected], NAMES, cache_dir=None).images] == expected


def test_a_folder_that_exists_is_no_pattern(data_set, tmp_path, capsys):
    data_set("a.png", encoded())
    folder = data_set.root.rename(tmp_path / "set[1]")
    found = [str(folder / "images" / "a.png")]
    assert list_images(folder / "images" / "*.png") == found
    assert find(f"{folder}/im*/*").files == tuple(found)
    (folder / "d.names").write_text("cat\n")
    (folder / "d.data").write_text("classes=1\ntrain=images/*.png\nnames=d.names\n")
    assert str(load_data(folder / "d.data").train) == str(folder / "images" / "*.png")
    assert capsys.readouterr().err == ""


def test_subfolders_that_are_links_are_searched_once(data_set, tmp_path):
    """As a glob searches them. A second `ln -s` of the same folder makes a link inside of it, to itself."""
    data_set("a.png", encoded())
    images = data_set.root / "images"
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.png").write_bytes(encoded())
    (images / "more").symlink_to(tmp_path / "more")
    (images / "images").symlink_to(images)
    assert list_images(images) == [str(images / name) for name in ("a.png", "more/b.png")]


@pytest.mark.parametrize(("folder", "source"), [("", "images"), ("images", "."), ("images", "a.png")])
def test_labels_are_found_from_inside_of_the_images(data_set, monkeypatch, folder, source):
    data_set("a.png", encoded())
    monkeypatch.chdir(data_set.root / folder)
    assert index(source, NAMES, cache_dir=None).totals()["boxes"] == 1


def test_a_list_is_relative_to_its_folder_and_expands_nothing(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    lines = b"\xef\xbb\xbf../x/1.png\r\n/abs/2.png\n~/3.png\n$(touch 4).png\n `5`.png\n"
    (tmp_path / "lists" / "a.txt").write_bytes(lines)
    monkeypatch.chdir(tmp_path)
    below = [f"lists/{name}.png" for name in ("~/3", "$(touch 4)", "`5`")]
    assert list_images("lists/a.txt") == ["x/1.png", "/abs/2.png", *below]
    (tmp_path / "b.txt").write_text("a.png\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"b\.txt: holds zero bytes"):
        list_images("b.txt")


def test_absolute_paths_do_not_say_where_relative_ones_start(data_set, tmp_path, monkeypatch):
    """Two lists joined into one, that of VOC with absolute paths before Darknet's, from the working directory."""
    data_set("a.png", encoded())
    (tmp_path / "lists").mkdir()
    joined = tmp_path / "lists" / "joined.txt"
    joined.write_text(f"{data_set.root}/images/a.png\n" * SAMPLE + "images/a.png\n")
    monkeypatch.chdir(data_set.root)
    assert list_images(joined)[-1] == "images/a.png"


def test_a_list_may_lie_in_a_folder_that_is_a_link(data_set, tmp_path):
    data_set("a.png", encoded())
    (data_set.root / "lists").mkdir()
    (data_set.root / "lists" / "a.txt").write_text("../images/a.png\n")
    (tmp_path / "link").symlink_to(data_set.root / "lists")
    assert index(tmp_path / "link" / "a.txt", NAMES, cache_dir=None).totals()["boxes"] == 1


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/images/train/a.b.png", "images/labels/train/a.b.txt"),
        ("/my_images/a.jpg", "/my_images/a.txt"),
        ("VOC2007/JPEGImages/a.jpg", "VOC2007/labels/a.txt"),
        ("a.jpg", "a.txt"),
        ("images.jpg/images.jpg", "images.jpg/images.txt"),
    ],
)
def test_the_last_folder_images_becomes_labels(image, label):
    assert label_path(image) == label


# One label file


def test_good_rows_are_kept_as_they_are():
    rows, flaws = parse_labels(b"\xef\xbb\xbf0 0.5 0.5 1 1\r\n2.0 1e-1 .25 0.5 0.125\n", "a.txt", 3)
    assert rows.tolist() == [[0, 0.5, 0.5, 1, 1], [2, np.float32(0.1), 0.25, 0.5, 0.125]] and not flaws


@pytest.mark.parametrize("text", [b"a b c d e", b"0 0.5 0.5 0.1 inf", b"0 0_1 0.5 0.1 0.1", "٠ 0.5 0.5 1 1".encode()])
def test_what_is_no_plain_finite_number_is_named(text):
    assert [flaw.kind for flaw in parse_labels(text, "a.txt", 3)[1]] == ["not a number"]


def test_flaws_carry_their_line():
    _, flaws = parse_labels(b"\n0 .5 .5 1 1\n\n0 2 .5 1 1\n9 .5 .5 1 1", "a.txt", 3)
    assert [(flaw.place, flaw.kind) for flaw in flaws] == [
        ("a.txt:4", "out of range"),
        ("a.txt:5", "class beyond names"),
    ]


# What is remembered


def same_times(path, data: bytes) -> None:
    """Change a file but not its size and modification time."""
    status = path.stat()
    assert len(data) == status.st_size
    time.sleep(0.02)  # the kernel's clock for files ticks every few milliseconds
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_edited_label_or_picture_of_the_same_size_and_time_is_seen(data_set, tmp_path):
    source, cache = data_set("a.png", encoded()), tmp_path / "cache"
    index(source, NAMES, cache_dir=cache)
    same_times(data_set.root / "labels" / "a.txt", GOOD.replace("1", "2", 1).encode())
    assert index(source, NAMES, cache_dir=cache).labels[0][0, 0] == 2
    assert len(index(source, NAMES[:2], cache_dir=cache, require=False)) == 0
    same_times(data_set.root / "images" / "a.png", bytes(len(encoded())))
    assert index(source, NAMES, cache_dir=cache, require=False).counts() == {"unknown image format": 1}


def test_a_picture_of_the_far_future_is_kept(data_set, tmp_path):
    source = data_set("a.png", encoded())
    os.utime(data_set.root / "images" / "a.png", ns=(0, (1 << 63) + 5))
    found = [index(source, NAMES, cache_dir=tmp_path / "cache").totals() for _ in range(2)]
    assert found[0] == found[1] and found[0]["usable"] == 1


def test_added_removed_and_renamed_pictures_are_seen(data_set, tmp_path):
    images, labels = data_set.root / "images", data_set.root / "labels"

    def agree():
        known = index(images, NAMES, cache_dir=tmp_path / "cache", require=False)
        anew = index(images, NAMES, cache_dir=None, require=False)
        assert (known.findings, known.totals()) == (anew.findings, anew.totals()) and [*known.images] == [*anew.images]
        np.testing.assert_array_equal(known.shapes, anew.shapes)

    data_set("a.png", encoded())
    agree()
    data_set("b.png", encoded((8, 8, 3)))
    agree()
    (images / "a.png").rename(images / "c.png")
    agree()
    (images / "b.png").unlink()
    agree()
    (labels / "c.txt").write_text(GOOD)
    agree()


def test_a_missing_label_file_is_named_where_it_is_looked_for_now(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.png").write_bytes(encoded())
    for folder in ("images", "labels"):
        (tmp_path / folder / "a.txt").write_text(GOOD)
        found = index(tmp_path / "images", NAMES, cache_dir=tmp_path / "cache")
        assert found.places("no label file") == (str(tmp_path / folder / "b.txt"),)


def test_of_known_files_no_picture_is_decoded_and_no_label_read(data_set, tmp_path, monkeypatch):
    source = data_set("a.png", encoded())
    data_set("b.png", b"nothing")
    first = index(source, NAMES, cache_dir=tmp_path / "cache")
    for name in ("check_image", "read_labels"):
        monkeypatch.setattr(f"utils.data.index.{name}", None)
    again = index(source, NAMES, cache_dir=tmp_path / "cache")
    assert (again.findings, again.fingerprint()) == (first.findings, first.fingerprint())


@pytest.mark.parametrize("function", ["images.open", "index.read_bytes"])
def test_a_file_that_could_not_be_read_is_tried_again(function, data_set, tmp_path, monkeypatch):
    source = data_set("a.png", encoded(), GOOD).parent / "images"
    with monkeypatch.context() as patch:
        error = DataError("not now") if "bytes" in function else OSError(errno.EMFILE, "too many open files")
        patch.setattr(f"utils.data.{function}", Mock(side_effect=error), raising=False)
        (kind,) = index(source, NAMES, cache_dir=tmp_path, require=False).counts()
    assert kind.startswith("unreadable") and not index(source, NAMES, cache_dir=tmp_path).findings


KILLED = """
import os, signal, sys, time
from pathlib import Path
from utils.data import index

number, index.STORED_EVERY, count = int(getattr(signal, sys.argv[3])), float(sys.argv[4]), []

def clock():
    count.append(1)
    if len(count) == 10:
        os.kill(os.getpid(), number)
    return time.monotonic()

index.monotonic = clock
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
index.index(sys.argv[1], ["cat", "dog", "cow"], cache_dir=Path(sys.argv[2]))
"""
"""Ends itself when it looks at the clock for the tenth time: at the begin, after each picture, and after each store."""


@pytest.mark.parametrize(("end", "stored_every", "left"), [("SIGKILL", "-1", 8), ("SIGTERM", "inf", 3)])
def test_what_was_checked_before_a_kill_is_not_checked_again(
    end, stored_every, left, data_set, tmp_path, monkeypatch, python
):
    for number in range(12):
        source = data_set(f"{number:02}.png", encoded())
    done = python("-c", KILLED, source, tmp_path / "cache", end, stored_every)
    assert done.returncode in (143, -signal.SIGKILL)
    checked = []
    monkeypatch.setattr("utils.data.index.check_image", lambda path: (checked.append(path), check_image(path))[1])
    assert len(index(source, NAMES, cache_dir=tmp_path / "cache")) == 12
    assert len(checked) == left


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: {},
        lambda arrays: {**arrays, "text": np.zeros(9, np.uint8)},
        lambda arrays: {**arrays, "text": np.frombuffer(b"[" * 100_000, np.uint8)},
        lambda arrays: {**arrays, "text": np.frombuffer(b"[[0], 3, [], []]", np.uint8)},
        lambda arrays: {**arrays, "stamps": arrays["stamps"][:, :3]},
        lambda arrays: {**arrays, "sizes": arrays["sizes"].astype(float)[:0]},
        lambda arrays: {**arrays, "boxes bounds": arrays["boxes bounds"][:-1]},
        lambda arrays: {**arrays, "stamps": np.array([{}], object)},
    ],
)
def test_a_damaged_or_foreign_cache_counts_as_empty(damage, data_set, tmp_path):
    source = data_set("a.png", encoded())
    first = index(source, NAMES, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    np.savez(path, **damage(dict(np.load(path))))
    assert index(source, NAMES, cache_dir=tmp_path / "cache").findings == first.findings


def test_a_cache_with_a_flipped_bit_counts_as_empty(data_set, tmp_path):
    source = data_set("a.png", encoded())
    first = index(source, NAMES, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    data = path.read_bytes()
    for at in random.Random(0).sample(range(len(data)), 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        again = index(source, NAMES, cache_dir=tmp_path / "cache")
        assert (again.findings, again.fingerprint()) == (first.findings, first.fingerprint())


def test_a_cache_is_of_the_versions_of_both_decoders():
    assert {cv2.__version__, PIL.__version__} <= set(CACHE_KEY)


def test_what_was_kept_for_other_names_is_read_again_and_no_picture_decoded(data_set, tmp_path, monkeypatch):
    source = data_set("a.png", encoded())
    data_set("b.png", encoded(), GOOD.replace("1", "9", 1))
    many = ["x"] * 10
    anew = [index(source, names, cache_dir=None).findings for names in (many, NAMES)]
    index(source, NAMES, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("utils.data.index.check_image", None)
    assert [index(source, names, cache_dir=tmp_path / "cache").findings for names in (many, NAMES)] == anew
