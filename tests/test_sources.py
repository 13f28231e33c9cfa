"""What --source may name, and what becomes of files that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.media import write_video
from utils.data.images import write_image
from utils.data.sources import FrameSource, Limits, find, frames
from utils.errors import InputError


def picture(path: Path, value: int = 100) -> Path:
    write_image(path, np.full((6, 8, 3), value, np.uint8))
    return path


def video(path: Path, count: int = 6) -> Path:
    """Frames of 64 × 48 pixels whose brightness is 10 times their number."""
    return write_video(path, (np.full((48, 64, 3), 10 * number, np.uint8) for number in range(count)))


def read(text: object, **limits) -> list[tuple[str, int]]:
    return [(os.path.basename(frame.source), frame.index) for frame in frames(find(str(text)), Limits(**limits))]


def test_a_picture_is_one_frame_in_rgb(tmp_path):
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[..., 0] = 200
    write_image(tmp_path / "red.png", pixels)
    (frame,) = frames(find(str(tmp_path / "red.png")))
    np.testing.assert_array_equal(frame.image, pixels)
    assert (frame.source, frame.index, frame.kind) == (str(tmp_path / "red.png"), 0, "picture")


def test_a_folder_gives_pictures_and_videos_by_name_and_nothing_else(tmp_path):
    picture(tmp_path / "b.PNG")
    video(tmp_path / "a.avi", 2)
    (tmp_path / "notes.txt").write_text("b.PNG\n")
    (tmp_path / "deeper").mkdir()
    picture(tmp_path / "deeper" / "c.png")
    assert read(tmp_path) == [("a.avi", 0), ("a.avi", 1), ("b.PNG", 0)]


def test_a_pattern_reaches_into_folders(tmp_path):
    (tmp_path / "x").mkdir()
    picture(tmp_path / "x" / "b.png")
    picture(tmp_path / "a.png")
    assert read(tmp_path / "**" / "*.png") == [("a.png", 0), ("b.png", 0)]


def test_a_file_that_looks_like_a_pattern_is_a_file(tmp_path):
    assert read(picture(tmp_path / "a[1]?.png")) == [("a[1]?.png", 0)]


def test_paths_in_a_list_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    picture(tmp_path / "a.png")
    picture(tmp_path / "lists" / "b.png")
    (tmp_path / "lists" / "all.txt").write_text("../a.png\n\nb.png\r\n")
    monkeypatch.chdir(tmp_path)
    assert read("lists/all.txt") == [("a.png", 0), ("b.png", 0)]


def test_streams_are_told_by_number_address_or_list(tmp_path):
    (tmp_path / "all.streams").write_text("# cameras\nrtsp://a/1\n\n 0 \nhttp://b\n")
    assert find("0") == FrameSource(streams=("0",))
    assert find("rtsp://user:word@camera/1") == FrameSource(streams=("rtsp://user:word@camera/1",))
    assert find(str(tmp_path / "all.streams")) == FrameSource(streams=("rtsp://a/1", "0", "http://b"))


@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_every_frame_of_a_video_is_read_once_in_order(tmp_path, suffix):
    got = list(frames(find(str(video(tmp_path / f"clip{suffix}")))))
    assert [frame.index for frame in got] == list(range(6))
    np.testing.assert_allclose([frame.image.mean() for frame in got], np.arange(6) * 10, atol=4)
    assert {(frame.kind, frame.fps) for frame in got} == {("video", 10.0)}


def test_the_limit_of_frames_counts_over_all_files(tmp_path):
    video(tmp_path / "a.avi", 3)
    video(tmp_path / "b.avi", 3)
    assert read(tmp_path, max_frames=4) == [("a.avi", 0), ("a.avi", 1), ("a.avi", 2), ("b.avi", 0)]


def test_the_limit_of_seconds_runs_after_the_first_frame(tmp_path):
    assert read(video(tmp_path / "a.avi"), max_seconds=1e-9) == [("a.avi", 0)]


def test_a_video_that_was_cut_off_gives_the_frames_that_are_whole(tmp_path, capsys):
    """Each chunk `00dc` of an AVI holds one JPEG, which is found in the cut file only if it is whole."""
    path = video(tmp_path / "clip.avi", 10)
    data = path.read_bytes()
    data = data[: data.index(b"movi") + (len(data) - data.index(b"movi")) // 2]
    path.write_bytes(data)
    whole = data.count(b"\xff\xd9")
    assert 0 < whole < 10
    assert len(read(path)) in (whole, whole + 1)
    assert "of the 10 frames it promises can be decoded" in capsys.readouterr().err


def test_a_video_with_a_damaged_middle_goes_on_behind_it(tmp_path):
    path = video(tmp_path / "clip.avi", 10)
    data = bytearray(path.read_bytes())
    middle = data.index(b"\xff\xd8", len(data) // 2)
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    assert 8 <= len(read(path)) <= 10


def test_content_decides_where_the_suffix_says_nothing(tmp_path):
    video(tmp_path / "clip.avi", 2).rename(tmp_path / "clip.jpg")
    picture(tmp_path / "a.png").rename(tmp_path / "still.mp4")
    picture(tmp_path / "b.png").rename(tmp_path / "plain")
    assert read(tmp_path / "clip.jpg") == [("clip.jpg", 0), ("clip.jpg", 1)]
    assert read(tmp_path / "still.mp4") == [("still.mp4", 0)]
    assert read(tmp_path / "plain") == [("plain", 0)]


def test_unreadable_files_are_skipped_and_named_in_one_warning(tmp_path, capsys):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.mp4").write_bytes(b"")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    assert read(tmp_path) == [("a.png", 0)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 3 of 4 files cannot be read and were skipped: ")
    assert all(name in line for name in ("b.png", "c.mp4", "d.png"))


def test_when_no_file_can_be_read_that_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of the 2 files of --source can be read: .*a\.png: .*; .*b\.png: "):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jpg", None, r"gone\.jpg: no such file"),
        ("empty.jpg", b"", r"empty\.jpg: an empty file"),
        ("empty.mp4", b"", r"empty\.mp4: neither a picture nor a video"),
        ("empty.txt", b"\n", r"empty\.txt: the list is empty"),
        ("empty.streams", b"# none\n", r"empty\.streams: the list is empty"),
        ("bad.streams", b"rtsp://a\nstreet.jpg\n", r"bad\.streams:2: 'street\.jpg' is neither an address nor"),
        ("bad.streams", b"file:///a\n", r"bad\.streams:1: file:// is not supported"),
        ("*.jpg", None, r"\*\.jpg: matches nothing"),
        (".", None, r"no pictures or videos in this folder"),
    ],
)
def test_a_source_that_gives_nothing_is_an_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("scheme", ["file", "concat", "gopher", "data"])
def test_addresses_of_other_kinds_are_refused(scheme):
    with pytest.raises(InputError, match=rf"--source: {scheme}:// is not supported; addresses begin with http, https"):
        find(f"{scheme}:///etc/passwd")


def test_a_name_with_a_colon_or_a_percent_is_no_protocol_and_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video(tmp_path / "concat:a%03d.avi", 2)
    assert read("concat:a%03d.avi") == [("concat:a%03d.avi", 0), ("concat:a%03d.avi", 1)]
