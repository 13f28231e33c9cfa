"""Reading what users name, writing what must not be lost."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.nets import refused, tiny
from utils.darknet import weights
from utils.darknet.cfg import load as load_cfg
from utils.darknet.data_file import load_data, load_names
from utils.data.images import check_image
from utils.data.index import list_images
from utils.data.sources import find, frames
from utils.errors import InputError, SuiteError
from utils.files import atomic_path, atomic_write_bytes, atomic_write_text, read_text, regular_file, utf8_path


def test_written_is_read_and_nothing_else_is_left(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "ä\n")
    atomic_write_bytes(tmp_path / "a.txt", b"\xef\xbb\xbfnew\r\n")
    assert read_text(tmp_path / "a.txt") == "new\r\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_data_and_folder_reach_the_disk_in_order(tmp_path, monkeypatch):
    """fsync of the file, rename, fsync of the folder."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    atomic_write_text(tmp_path / "a.txt", "x")
    assert [os.path.basename(call).endswith(".tmp") for call in calls] == [True, False, False]
    assert calls[1:] == ["rename", str(tmp_path)]


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    name = "\U0001f600" * 62 + "x" * 7  # 255 bytes
    atomic_write_text(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_utf8_gets_another_one_and_an_address_stays_as_it_is(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe9.mp4", b"caf\xe9.cut.mp4")]
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    for name in names:
        with utf8_path(tmp_path / name) as path:
            assert path.isascii() and Path(path).read_bytes() == os.fsencode(name)
    for address in ("rtsp://camera:554//live", "http://camera/mjpeg/?next=http://x//y"):
        with utf8_path(address) as path:
            assert path == address


def test_two_writers_with_one_process_number_do_not_meet(tmp_path):
    """Containers count processes each from 1, and may share a folder."""
    with atomic_path(tmp_path / "a") as slow:
        slow.write_text("slow")
        atomic_write_text(tmp_path / "a", "fast")
    assert (tmp_path / "a").read_text() == "slow"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_may_be_meant_for_the_file_in_it_and_no_name_has_a_zero_byte(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy.data").touch()
    for path, reason in ((tmp_path / "toy", "did you mean .*toy/toy.data?"), ("a\0b", "not a file name")):
        with pytest.raises(InputError, match=reason):
            regular_file(path)


READERS = (
    load_cfg,
    load_data,
    load_names,
    list_images,
    check_image,
    lambda path: weights.check(path, tiny()),
    lambda path: weights.read(path, tiny()),
    lambda path: list(frames(find(str(path)))),
    lambda path: read_text(path, max_bytes=1 << 20),
)


@pytest.mark.parametrize("read", READERS)
def test_every_reader_refuses_what_is_no_regular_file_or_too_large(read, tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "large.txt").touch()
    os.truncate(tmp_path / "large.txt", 1 << 33)
    reasons = {"fifo": "not a regular file", "loop": "symbolic links", "none": "no such file", "large": ""}
    for name, reason in reasons.items():
        with refused(SuiteError, f"{tmp_path / name}.txt.*{reason}"):
            read(tmp_path / f"{name}.txt")
    with refused(SuiteError, "/dev/zero.*not a regular file"):
        read(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xfeu\0", r":1: byte 0xff is not UTF-8"),
        (b"a\nb\xe9", r":2: byte 0xe9"),
        (b"\xef\xbb\xbfa\nb\xe9", r":2: byte 0xe9"),
        (b"x" * 99, "99 bytes"),
    ],
)
def test_text_that_is_none_is_refused_with_its_line(tmp_path, data, reason):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InputError, match=reason):
        read_text(tmp_path / "a", max_bytes=50)
