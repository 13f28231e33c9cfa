"""Descriptions of data sets: .data, .names, data.yaml; paths, mismatches, hostile files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from utils.darknet.data_file import DataConfig, load_data, load_names
from utils.errors import DataError

DATA = """\
# a comment
classes = 2
train=train.txt
valid  =  lists/val.txt
names = a.names

backup = backup/
backup = elsewhere/
eval=coco
"""
YAML = """\
path: set
train: images/train
val: [images/val, more/*.jpg]
test: images/test
nc: 2
names: [cat, dog]
download: https://example.com/a.zip
nested: {a: 1}
"""


@pytest.fixture
def write(tmp_path):
    """Writes files into one folder; returns the path of the last."""

    def files(**texts: str | bytes) -> Path:
        for name, text in texts.items():
            path = tmp_path / name.replace("_", ".")
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return files


def refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        load_data(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_darknets_format_gives_paths_beside_the_file(write, tmp_path):
    data = load_data(write(a_names="猫\n  # 1 \n\n", a_data=DATA))
    assert data == DataConfig(
        path=tmp_path / "a.data",
        classes=2,
        names=("猫", "# 1"),
        train=tmp_path / "train.txt",
        valid=tmp_path / "lists" / "val.txt",
    )


def test_yaml_gives_paths_below_its_own_path(write, tmp_path):
    assert load_data(write(a_yaml=YAML)) == DataConfig(
        path=tmp_path / "a.yaml",
        classes=2,
        names=("cat", "dog"),
        train=tmp_path / "set" / "images" / "train",
        valid=(tmp_path / "set" / "images" / "val", tmp_path / "set" / "more" / "*.jpg"),
    )


def test_absolute_paths_stay(write, tmp_path):
    names = write(a_names="x")
    place = tmp_path / "elsewhere" / "train.txt"
    data = load_data(write(a_data=f"names={names}\ntrain={place}"))
    assert (data.train, data.valid, data.classes) == (place, None, 1)
    assert load_data(write(a_yaml=f"path: {tmp_path}/q\ntrain: {place}\nval: v\nnames: {{0: x}}")).train == place


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_newlines_and_byte_order_marks_of_any_editor_are_read(newline, mark, write):
    names = mark + newline.join(["cat", "dog", ""])
    data = load_data(write(a_names=names, a_data=mark + DATA.replace("\n", newline)))
    assert data.names == ("cat", "dog")
    assert data.train.name == "train.txt"


@pytest.mark.parametrize("names", ["[cat, 2.5]", "{1: 2.5, 0: cat}", "\n- cat\n- 2.5", "\n  0: cat\n  1: 2.5"])
def test_yaml_names_are_a_list_or_a_numbered_mapping(names, write):
    """Numbers are texts here."""
    assert load_data(write(a_yml=f"names: {names}\n")).names == ("cat", "2.5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.data: no names; add a line like names"),
        ("names=a.names\nclasses=3\n", r"a.data:2: classes = 3, but .*a.names has 2 names"),
        ("names=a.names\nclasses=0\n", "a.data:2: classes = 0; a number of at least 1"),
        ("names=a.names\nclasses=two\n", "a.data:2: classes = two; a number"),
        ("names=a.names\nclasses=1_0\n", "a.data:2: classes"),
        ("names=a.names\n\nnames=b.names\n", "a.data:3: names = b.names, but line 1 says names = a.names"),
        ("names=a.names\nnames\n", "a.data:2: 'names' is not of the form key = value"),
        ("names=\n", "a.data:1: 'names=' is not"),
        ('{"images": []}', r"a.json:1: .* is not of the form key = value; python -m utils\.data\.convert coco reads"),
        ("\nnames=b.names\n", r"a.data:2: names = b.names: .*b.names: no such file"),
        ("names=$(touch CANARY)\n", r"a.data:1: names = \$\(touch CANARY\): .*no such file"),
        ("names=.\n", "a.data:1: names = .: .*not a regular file"),
        ("names=a.names\0\n", "a.data:1: "),
        (f"names={'a' * 5000}\n", "a.data:1: .*too long"),
        ("", "a.yaml: keys like train:, val: and names: were expected; got a NoneType"),
        ("a: [1\nb: 2\n", r"a.yaml:\d: not valid YAML"),
        ("nc: 3\nnames: [cat, dog]\n", "a.yaml:1: nc is 3, but names has 2 entries"),
        ("names: [cat, dog]\nnc: two\n", "a.yaml:2: nc is 'two', but names has 2"),
        ("names: []\n", "a.yaml:1: names must be"),
        ("names: cat\n", "a.yaml:1: names must be a list .* got 'cat'"),
        ("names: {1: cat, 2: dog}\n", r"a.yaml:1: the keys of names must be 0\.\.1"),
        ("x: 1\nnames: [cat, no]\n", "a.yaml:2: name 1 reads as False; put it in quotes"),
        ("names: [[cat]]\n", "a.yaml:1: name 0 reads as a list"),
        ('names: ["a\\eb"]\n', "a.yaml:1: name 0: .* control characters"),
        ("names: ['']\n", "a.yaml:1: name 0: an empty class name"),
        ("names: [a]\ntrain: 5\n", "a.yaml:2: train: a path was expected; got 5"),
        ("names: [a]\ntrain: [x, {}]\n", "a.yaml:2: train: a path was expected; got a dict"),
        ("names: [a]\npath: [x]\n", "a.yaml:2: a path was expected"),
        ("names: !!python/object/apply:os.system ['touch CANARY']\n", "a.yaml:1: not valid YAML"),
        ("names: !!int ''\n", "a.yaml: not valid YAML"),
        ("names: [a]\nx: 2001-99-99\n", "a.yaml: not valid YAML"),
        ("names: " + "{a: " * 5000, "a.yaml: not valid YAML"),
        (f"names: [a]\nnc: 0x{'f' * 6000}\n", "a.yaml:2: nc is a int"),
    ],
)
def test_a_bad_description_is_refused_with_its_line(text, message, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = next(name for name in ("a.data", "a.json", "a.yaml") if name in message)
    refused(write(a_names="cat\ndog", **{name: text}), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.names", name])


def test_yaml_aliases_do_not_multiply(write):
    """Ten levels of ten references each stand for 10^10 values."""
    levels = "".join(f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 10)}]\n" for level in range(1, 11))
    assert load_data(write(a_yaml=f"l0: &l0 [x]\n{levels}names: [a]\n")).names == ("a",)
    refused(write(a_yaml=f"l0: &l0 [x]\n{levels}names: *l10\n"), "name 0 reads as a list")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cat\n\ndog\n", "a.names:2: an empty class name"),
        (b"", "a.names:1: an empty"),
        (b"cat\nd\x1b[31mog\n", "a.names:2: .* control characters"),
        (b"cat\nd\xf6g\n", "a.names:2: byte 0xf6 is not UTF-8"),
        ("cat\n".encode("utf-16"), "a.names:1: "),
    ],
)
def test_bad_names_are_refused_with_their_line(text, message, write):
    path = write(a_names=text)
    with pytest.raises(DataError, match=message):
        load_names(path)


def test_damaged_files_give_data_errors_and_nothing_else(write):
    """Random edits of good files; every failure must be the suite's own."""
    random_ = random.Random(0)
    write(a_names="cat\ndog\n")
    for number in range(400):
        suffix, text = random_.choice([("a_data", DATA), ("a_yaml", YAML), ("a_names", "cat\ndog\n")])
        data = bytearray(text.encode())
        for _ in range(random_.randint(1, 6)):
            place = random_.randrange(len(data))
            data[place : place + random_.randint(0, 3)] = random_.choice(
                [b"", b"=", b": ", b"!!", b"&a", b"*a", b"[", b"{", b"\0", b"\xff", b"\n", b"- ", b"'", b"0x", b"%"]
            )
        path = write(**{suffix: bytes(data)})
        try:
            load_names(path) if suffix == "a_names" else load_data(path)
        except DataError as failure:
            assert str(failure), number
