"""Live sources: one thread a stream keeps its newest frame and reconnects after a loss.

A detector is slower than most cameras, so frames that nobody asked for in time are dropped: what is handed on is the
newest picture a stream has, once. A stream that is lost hands on nothing until it is back; the others go on.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np

from utils.cli import log
from utils.errors import InputError

SHORTEST_WAIT, LONGEST_WAIT = 0.25, 4.0
"""Seconds between attempts to reconnect: doubled from the first to the second, so a stream is back within 5 s."""
LONGEST_READ = 5.0
"""Seconds after which opening a stream, or waiting for its next frame, is given up."""
LONGEST_JOIN = 2 * LONGEST_READ
"""Seconds that the end waits for a thread that is opening or reading; a process that ends under it would abort."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a source."""

    source: str
    """The picture, video or address, as given."""
    index: int
    """Number of the frame in its source, from 0; grows by more than 1 where frames of a stream were dropped."""
    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    kind: str
    """picture, video or stream."""
    fps: float = 0.0
    """Frames a second that the source promises; 0 where it says nothing."""


class Clock:
    """A deadline that begins to run when the first frame is done; never reached without `seconds`."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = math.inf if seconds is None else seconds
        self._end = math.inf

    def start(self) -> None:
        """Let the time run; later calls change nothing."""
        if math.isinf(self._end):
            self._end = time.monotonic() + self._seconds

    def remaining(self) -> float:
        """Seconds left; infinite before `start`, never negative."""
        return max(0.0, self._end - time.monotonic())


def silence_opencv() -> None:
    """Keep FFmpeg and OpenCV from printing: what went wrong with a video is said once, by who reads or writes it."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET; looked at when FFmpeg is used first
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@contextmanager
def opened(source: str | int, timeout: float | None = None) -> Iterator[cv2.VideoCapture]:
    """An OpenCV capture of a video file, an address or a webcam number; `isOpened()` says whether it worked.

    Files and addresses are read by FFmpeg alone, since other backends read a name like `%03d.png` as a pattern.

    Args:
        source: a path, an address or a webcam number.
        timeout: seconds after which opening and each read of an address are given up.
    """
    silence_opencv()
    limits = []
    if timeout is not None:
        limit = max(1, round(1000 * timeout))
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    if isinstance(source, int):
        capture = cv2.VideoCapture(source)
    elif is_utf8(source):
        capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)
    else:
        capture = cv2.VideoCapture()
    try:
        yield capture
    finally:
        capture.release()


def is_utf8(name: str) -> bool:
    """Whether a file name can be handed to OpenCV, which crashes on one whose bytes are not UTF-8 (4.14)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def pictures(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """The pictures of an open capture, uint8 [H, W, 3] RGB, until none comes."""
    while True:
        came, image = capture.read()
        if not came or image is None:
            return
        yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def promised_fps(capture: cv2.VideoCapture) -> float:
    """Frames a second that an open capture promises; 0 for none or nonsense."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps <= 1000 else 0.0


def promised_frames(capture: cv2.VideoCapture) -> int:
    """Number of frames that an open capture promises; 0 when it has no end or does not say."""
    frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(frames) if 0 < frames < 1e12 else 0


def without_password(source: str) -> str:
    """An address as it may be shown: without user and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)


class StreamReader(threading.Thread):
    """Reads one stream until it is stopped.

    A live stream is read as fast as it comes and only its newest frame is kept. An address with an end (a video file on
    a server) waits for its frames to be taken, so that none is dropped, and is not opened again after its end.

    Args:
        source: an address or a webcam number, as given.
        number: the stream's number in messages.
        changed: notified whenever a frame arrives or the stream ends; guards the attributes below.
        timeout: seconds after which opening or a read is given up.
    """

    def __init__(self, source: str, number: int, changed: threading.Condition, timeout: float) -> None:
        super().__init__(name=f"stream {number}", daemon=True)
        self.source = source
        self.number = number
        self.received = 0
        """Frames that have arrived so far."""
        self.heard = time.monotonic()
        """When the last frame arrived, or the stream was started."""
        self.served = 0.0
        """When a frame was taken last."""
        self.finished = False
        self._changed = changed
        self._timeout = timeout
        self._stopping = threading.Event()
        self._newest: np.ndarray | None = None
        self._fps = 0.0

    @property
    def ready(self) -> bool:
        """Whether a frame waits that was not taken yet."""
        return self._newest is not None

    def stop(self) -> None:
        """Ask the thread to end."""
        self._stopping.set()

    def take(self) -> Frame:
        """The newest frame, once; call it with `changed` held, when `ready`."""
        image, self._newest = self._newest, None
        self.served = time.monotonic()
        self._changed.notify_all()
        return Frame(self.source, self.received - 1, image, "stream", self._fps)

    def run(self) -> None:
        """Read until stopped, or until a source that has an end is over."""
        try:
            self._read_and_reconnect()
        finally:
            with self._changed:
                self.finished = True
                self._changed.notify_all()

    def _read_and_reconnect(self) -> None:
        """Open, read, and open again after a loss, waiting longer each time nothing comes."""
        wait = SHORTEST_WAIT
        while not self._stopping.is_set():
            before = self.received
            has_end = self._read_connection()
            if has_end and self.received > before:
                return
            if self.received > before:
                wait = SHORTEST_WAIT
            self._stopping.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _read_connection(self) -> bool:
        """Read until the connection is lost; whether the source is one with an end."""
        with opened(int(self.source) if self.source.isdecimal() else self.source, self._timeout) as capture:
            if not capture.isOpened():
                return False
            has_end = promised_frames(capture) > 0
            self._fps = promised_fps(capture)
            before = self.received
            for image in pictures(capture):
                if self._stopping.is_set():
                    return has_end
                self._keep(image, wait_until_taken=has_end, back=self.received == before > 0)
        if self.received > before and not has_end:
            log(f"stream {self.number}: lost at frame {self.received - 1}, reconnecting")
        return has_end

    def _keep(self, image: np.ndarray, *, wait_until_taken: bool, back: bool) -> None:
        """Put a frame in the place of the one before."""
        with self._changed:
            while wait_until_taken and self.ready and not self._stopping.is_set():
                self._changed.wait(0.1)
            now = time.monotonic()
            if back:
                log(f"stream {self.number}: lost at frame {self.received - 1}, back after {now - self.heard:.1f} s")
            self._newest = image
            self.received += 1
            self.heard = now
            self._changed.notify_all()


def read_streams(sources: Sequence[str], timeout: float, clock: Clock | None = None) -> Iterator[Frame]:
    """Newest frames of several streams, in turn, each frame once; ends when all streams have ended or are dead.

    Args:
        sources: addresses and webcam numbers, as given.
        timeout: seconds without a frame of any stream after which all count as dead.
        clock: ends the reading, too.

    Raises:
        InputError: no stream ever gave a frame.
    """
    clock = clock or Clock()
    changed = threading.Condition()
    readers = [
        StreamReader(source, number, changed, min(timeout, LONGEST_READ)) for number, source in enumerate(sources, 1)
    ]
    for reader in readers:
        reader.start()
    try:
        while (frame := _next_frame(readers, changed, timeout, clock)) is not None:
            yield frame
    finally:
        for reader in readers:
            reader.stop()
        for reader in readers:
            reader.join(LONGEST_JOIN)
    if not any(reader.received for reader in readers):
        shown = ", ".join(without_password(source) for source in sources)
        raise InputError(f"--source {shown}: no frame within {timeout:g} s (--stream-timeout)")


def _next_frame(
    readers: Sequence[StreamReader], changed: threading.Condition, timeout: float, clock: Clock
) -> Frame | None:
    """The newest frame of the ready stream that waited longest; None when time is up or nothing can come any more."""
    with changed:
        while clock.remaining() > 0:
            ready = [reader for reader in readers if reader.ready]
            if ready:
                return min(ready, key=lambda reader: reader.served).take()
            silence = time.monotonic() - max(reader.heard for reader in readers)
            if silence >= timeout or all(reader.finished for reader in readers):
                if silence >= timeout and any(reader.received for reader in readers):
                    log(f"no frame for {timeout:g} s (--stream-timeout): the end")
                return None
            changed.wait(min(timeout - silence, clock.remaining()))
    return None
