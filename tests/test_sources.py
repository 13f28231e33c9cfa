"""What --source may name, what becomes of files that cannot be read, and of streams that are lost."""

from __future__ import annotations

import http.server
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.media import write_video
from utils.data.images import write_image
from utils.data.sources import Frame, FrameSource, Limits, find, frames, opened, read_streams, without_password
from utils.detection.settings import Times
from utils.errors import InputError
from utils.report.detections import DetectionReport


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


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> None:
    """The current folder: pictures, videos of two frames, one of either with a suffix of the other, and a list."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mixed/deeper", "lists"):
        Path(folder).mkdir(parents=True)
    for name in ("mixed/b.PNG", "mixed/deeper/c.png", "lists/b.png", "a[1]?.png", "still.png"):
        picture(Path(name))
    for name in ("mixed/a.avi", "concat:a%03d.avi", "clip.avi"):
        video(tmp_path / name, 2)
    Path("clip.avi").rename("clip.jpg")
    Path("plain").write_bytes(Path("still.png").read_bytes())
    Path("still.png").rename("still.mp4")
    Path("mixed/notes.txt").write_text("b.PNG\n")
    Path("lists/all.txt").write_text("../still.mp4\n\nb.png\r\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mixed", "a.avi 0 a.avi 1 b.PNG 0"),
        ("mixed/**/*.*[gG]", "b.PNG 0 c.png 0"),
        ("a[1]?.png", "a[1]?.png 0"),
        ("lists/all.txt", "still.mp4 0 b.png 0"),
        ("clip.jpg", "clip.jpg 0 clip.jpg 1"),
        ("still.mp4", "still.mp4 0"),
        ("plain", "plain 0"),
        ("concat:a%03d.avi", "concat:a%03d.avi 0 concat:a%03d.avi 1"),
    ],
)
def test_a_source_gives_these_frames(shelf, source, expected):
    """A folder what is in it by name, a pattern also what is below, a list what is beside it; content decides what a
    file is where its suffix says nothing; a name that looks like a pattern or a protocol is a file."""
    assert " ".join(f"{name} {index}" for name, index in read(source)) == expected


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


def test_unreadable_files_are_skipped_and_named_in_one_warning_also_where_a_limit_ends_the_reading(tmp_path, capsys):
    picture(tmp_path / "a.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "c.mp4").write_bytes(b"")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    assert read(tmp_path) == [("a.png", 0)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 3 of 4 files cannot be read and were skipped: ")
    assert all(name in line for name in ("0.png", "c.mp4", "d.png"))
    assert read(tmp_path, max_frames=1) == [("a.png", 0)]
    assert "warning: 1 of 4 files cannot be read and were skipped: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["\nlost.png\n", "a.png\r\n\r\nlost.png\r\n", "lost.png\nlost.mp4\n"])
def test_a_path_of_a_list_that_leads_nowhere_is_named_with_its_line(text, tmp_path, capsys):
    picture(tmp_path / "a.png")
    (tmp_path / "all.txt").write_bytes(text.encode())
    try:
        read(tmp_path / "all.txt")
        message = capsys.readouterr().err
    except InputError as failure:
        message = str(failure)
    number = text.splitlines().index("lost.png") + 1
    assert f"{tmp_path}/all.txt:{number}: {tmp_path}/lost.png: no such file" in message


def test_when_no_file_can_be_read_that_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of the 2 files of --source can be read: .*a\.png: .*; .*b\.png: "):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jpg", None, r"gone\.jpg: no such file"),
        ("empty.jpg", b"", r"empty\.jpg: an empty file"),
        ("empty.mp4", b"", r"empty\.mp4: neither an image nor a video"),
        ("empty.txt", b"\n", r"empty\.txt: the list is empty"),
        ("empty.streams", b"# none\n", r"empty\.streams: the list is empty"),
        ("bad.streams", b"rtsp://a\nstreet.jpg\n", r"bad\.streams:2: 'street\.jpg' is neither an address nor"),
        ("bad.streams", b"file:///a\n", r"bad\.streams:1: file:// is not supported"),
        ("*.jpg", None, r"\*\.jpg: matches nothing"),
        (".", None, r"no images or videos in this folder"),
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


# Streams: a small HTTP server on this machine drops, refuses, stalls and comes back by a script

PAUSE = 0.02
"""Seconds between two frames of the server."""


def numbered(number: int, width: int = 128) -> bytes:
    """A JPEG twice as wide as high that carries its number: a row of sixteen squares, white for 1, on grey."""
    side = width // 16
    picture = np.full((width // 2, width, 3), 120, np.uint8)
    for bit in range(16):
        picture[:side, side * bit : side * bit + side] = 255 * (number >> bit & 1)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def number_in(image: np.ndarray) -> int:
    height, width = image.shape[:2]
    assert image[height // 2 :].mean() > 60, "a black frame"
    side = width // 16
    return sum(int(image[side // 2, side * bit + side // 2, 0] > 127) << bit for bit in range(16))


class Camera(http.server.ThreadingHTTPServer):
    """MJPEG over HTTP. Each connection gets the next entry of the script.

    An entry is the number of frames to send before the connection is closed, or one of "refuse" (closed at once),
    "stall" (headers, then nothing), "garbage" (parts that are no pictures) and "grow" (pictures of another size after
    ten). The last entry is repeated.
    """

    daemon_threads = True

    def __init__(self, script: list[int | str]) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.script = script
        self.paths: list[str] = []
        """What each connection asked for."""
        self.numbers = itertools.count()
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address) -> None:
        """A client that leaves is no error."""


class Connection(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        camera = self.server
        camera.paths.append(self.path)
        entry = camera.script[min(len(camera.paths), len(camera.script)) - 1]
        if entry == "refuse":
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        if entry == "stall":
            camera.closing.wait(30)
            return
        for sent in range(entry if isinstance(entry, int) else 10_000):
            width = 256 if entry == "grow" and sent >= 10 else 128
            data = bytes(range(256)) if entry == "garbage" else numbered(next(camera.numbers), width)
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data))
            self.wfile.write(data + b"\r\n")
            if camera.closing.wait(PAUSE):
                return


@contextmanager
def serving(server: http.server.ThreadingHTTPServer) -> Iterator[http.server.ThreadingHTTPServer]:
    """Let a server run in a thread of its own."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def camera(*script: int | str) -> Iterator[Camera]:
    with serving(Camera(list(script))) as server:
        try:
            yield server
        finally:
            server.closing.set()


def received(server: Camera, **limits: float) -> list[Frame]:
    """Frames of a stream, each of which comes once and after those before it."""
    got = list(frames(FrameSource(streams=(server.address,)), Limits(**limits)))
    numbers = [number_in(frame.image) for frame in got]
    assert numbers == sorted(set(numbers))
    return got


def test_frames_come_in_order_each_once_and_end_with_the_count():
    with camera(1000) as server:
        got = received(server, max_frames=10)
    assert len(got) == 10
    assert all(a.index < b.index for a, b in itertools.pairwise(got))
    assert {(frame.source, frame.kind) for frame in got} == {(server.address, "stream")}


def test_a_slow_consumer_gets_the_newest_frame_and_the_index_tells_what_was_dropped():
    with camera(1000) as server, closing(read_streams([server.address], timeout=5)) as reading:
        first = next(reading)
        time.sleep(20 * PAUSE)
        second = next(reading)
        assert second.index - first.index == number_in(second.image) - number_in(first.image) > 5


def test_a_lost_stream_is_reported_and_comes_back_without_a_stale_or_black_frame(capfd):
    with camera(8, "refuse", 1000) as server:
        got = received(server, max_frames=20, stream_timeout=5)
    numbers = [number_in(frame.image) for frame in got]
    assert numbers[-1] > 8
    assert [frame.index for frame in got] == numbers
    messages = capfd.readouterr().err
    assert "stream 1: lost at frame 7, reconnecting\n" in messages
    assert "stream 1: lost at frame 7, back after 0." in messages


def test_a_stream_that_changes_its_size_goes_on():
    with camera("grow") as server:
        got = received(server, max_seconds=0.6, stream_timeout=5)
    assert number_in(got[-1].image) > 12


def test_a_dead_stream_does_not_stop_the_others(capfd):
    with camera(3, "stall") as dying, camera(1000) as living:
        source = FrameSource(streams=(dying.address, living.address))
        got = list(frames(source, Limits(max_seconds=0.7, stream_timeout=0.7)))
    last = {address: max(frame.index for frame in got if frame.source == address) for address in source.streams}
    assert last[dying.address] == 2
    assert last[living.address] > 10
    assert "stream 1: lost at frame 2" in capfd.readouterr().err


@pytest.mark.parametrize("entry", ["refuse", "stall", "garbage"])
def test_a_stream_that_never_gives_a_frame_is_an_error_in_bounded_time(entry):
    start = time.monotonic()
    with camera(entry) as server, pytest.raises(InputError, match=r"--source .*: no frame within 0.6 s"):
        received(server, stream_timeout=0.6)
    assert time.monotonic() - start < 6


def test_a_stream_that_stays_away_ends_the_reading(capfd):
    with camera(3, "refuse") as server:
        got = received(server, stream_timeout=0.6)
    assert got[-1].index == 2
    assert "no frame for 0.6 s" in capfd.readouterr().err


def test_a_server_gets_the_path_of_the_address_as_given():
    path = "cam//live/?next=http://x//y"
    with camera("refuse") as server, opened(f"{server.address}{path}", timeout=5) as capture:
        assert not capture.isOpened()
    assert set(server.paths) == {f"/{path}"}


def test_a_video_on_a_server_is_read_whole_and_once(tmp_path, capsys):
    """A source with an end waits for a slow consumer, and its end is not a loss, but what a cut has lost is named."""
    pictures = (np.frombuffer(numbered(number), np.uint8) for number in range(12))
    write_video(tmp_path / "clip.avi", (cv2.imdecode(picture, cv2.IMREAD_COLOR) for picture in pictures))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    numbers = []
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        for frame in read_streams([f"http://127.0.0.1:{server.server_port}/clip.avi"], timeout=5):
            numbers.append(number_in(frame.image))
            time.sleep(0.01)
        assert numbers == list(range(12)) and "only" not in capsys.readouterr().err
        data = (tmp_path / "clip.avi").read_bytes()
        (tmp_path / "clip.avi").write_bytes(data[: (data.index(b"movi") + len(data)) // 2])
        left = len(list(read_streams([f"http://127.0.0.1:{server.server_port}/clip.avi"], timeout=5)))
    assert f"warning: stream 1: only {left} of the 12 frames it promises can be decoded" in capsys.readouterr().err


def test_passwords_are_not_shown(capsys):
    assert without_password("rtsp://user:secret@camera.local/1") == "rtsp://camera.local/1"
    assert without_password("rtsp://user:sec@ret@camera.local/1") == "rtsp://camera.local/1"
    assert without_password("http://camera.local/@home") == "http://camera.local/@home"
    assert without_password("http://camera.local?to=a@home") == "http://camera.local?to=a@home"
    frame = Frame("rtsp://user:sec@ret@camera.local/1", 0, np.zeros((4, 6, 3), np.uint8), "stream")
    DetectionReport((), "text").add(frame, np.zeros((0, 6)), Times(1, 1, 1))
    assert capsys.readouterr().out == "rtsp://camera.local/1 frame 0 6x4: nothing (3.0 ms)\n"
