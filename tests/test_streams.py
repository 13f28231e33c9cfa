"""Streams against a small HTTP server on this machine that drops, refuses, stalls and comes back by a script."""

from __future__ import annotations

import http.server
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import cv2
import numpy as np
import pytest

from tests.media import write_video
from utils.data.sources import FrameSource, Limits, frames, read_streams, without_password
from utils.errors import InputError

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
        self.connections = itertools.count()
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
        entry = camera.script[min(next(camera.connections), len(camera.script) - 1)]
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


def test_frames_come_in_order_each_once_and_end_with_the_count():
    with camera(1000) as server:
        got = list(frames(FrameSource(streams=(server.address,)), Limits(max_frames=10)))
    numbers = [number_in(frame.image) for frame in got]
    assert len(numbers) == 10
    assert numbers == sorted(set(numbers))
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
        got = list(frames(FrameSource(streams=(server.address,)), Limits(max_frames=20, stream_timeout=5)))
    numbers = [number_in(frame.image) for frame in got]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 8
    assert [frame.index for frame in got] == numbers
    messages = capfd.readouterr().err
    assert "stream 1: lost at frame 7, reconnecting\n" in messages
    assert "stream 1: lost at frame 7, back after 0." in messages


def test_a_stream_that_changes_its_size_goes_on():
    with camera("grow") as server:
        got = list(frames(FrameSource(streams=(server.address,)), Limits(max_seconds=0.6, stream_timeout=5)))
    numbers = [number_in(frame.image) for frame in got]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 12


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
        list(frames(FrameSource(streams=(server.address,)), Limits(stream_timeout=0.6)))
    assert time.monotonic() - start < 6


def test_a_stream_that_stays_away_ends_the_reading(capfd):
    with camera(3, "refuse") as server:
        got = list(frames(FrameSource(streams=(server.address,)), Limits(stream_timeout=0.6)))
    assert got[-1].index == 2
    assert "no frame for 0.6 s" in capfd.readouterr().err


def test_a_video_on_a_server_is_read_whole_and_once(tmp_path):
    """A source with an end waits for a slow consumer, and its end is not a loss."""
    pictures = (np.frombuffer(numbered(number), np.uint8) for number in range(12))
    write_video(tmp_path / "clip.avi", (cv2.imdecode(picture, cv2.IMREAD_COLOR) for picture in pictures))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    received = []
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        for frame in read_streams([f"http://127.0.0.1:{server.server_port}/clip.avi"], timeout=5):
            received.append(number_in(frame.image))
            time.sleep(0.01)
    assert received == list(range(12))


def test_passwords_are_not_shown():
    assert without_password("rtsp://user:secret@camera.local/1") == "rtsp://camera.local/1"
    assert without_password("http://camera.local/@home") == "http://camera.local/@home"
