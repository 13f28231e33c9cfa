"""Sources of detect.py: pictures, folders, patterns, list files, videos, webcams and network streams, read as frames.

`find` checks what `--source` names, `frames` reads it. A detector is slower than most cameras, so one thread a live
stream keeps its newest frame and reconnects after a loss. Frames that were not taken in time are dropped. A stream that
is lost hands on nothing until it is back, and the others go on.
"""

from __future__ import annotations

import glob
import math
import os
import re
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import cv2
import numpy as np

from utils.cli import log
from utils.data.images import MAX_PIXELS, SUFFIXES, PictureError, lower_suffix, read_image, silence_decoders
from utils.data.index import read_list
from utils.errors import DataError, InputError
from utils.files import foreign_errors, matches, read_text, regular_file, utf8_path

VIDEO_SUFFIXES = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
"""Suffixes that a folder is searched for, beside those of pictures; a file that is named itself may have any suffix."""
READABLE = SUFFIXES | VIDEO_SUFFIXES
READABLE_TEXT = " ".join(sorted(READABLE))
SCHEMES = ("http", "https", "rtmp", "rtsp", "rtsps", "tcp", "udp")
NAMED = 5
"""Unreadable files that a warning names; the others are counted."""
SHORTEST_WAIT, LONGEST_WAIT = 0.25, 4.0
"""Seconds between attempts to reconnect: doubled from the first to the second, so a stream is back within 5 s."""
LONGEST_READ = 5.0
"""Seconds after which opening a stream, or waiting for its next frame, is given up."""
LONGEST_JOIN = 2 * LONGEST_READ
"""Seconds that the end waits for a thread that opens or reads: a process that ends meanwhile would abort."""
POLL = 0.1
"""Seconds between checks whether the other thread has ended: a thread that ends notifies nobody."""


@dataclass(frozen=True)
class FrameSource:
    """Files or streams that `--source` names: files in the order they are read, or live streams."""

    files: tuple[str, ...] = ()
    """Pictures and videos."""
    lines: tuple[str, ...] = ()
    """`LIST:LINE: ` of each file that a list names; empty where no list does."""
    streams: tuple[str, ...] = ()
    """Addresses and webcam numbers."""


@dataclass(frozen=True)
class Limits:
    """When to stop before the source ends."""

    max_frames: int | None = None
    """Frames in all."""
    max_seconds: float | None = None
    """Seconds after the first frame is done."""
    stream_timeout: float = 30.0
    """Seconds without a frame of any stream after which the streams count as dead."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture of a source."""

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


def find(text: str) -> FrameSource:
    """Files or streams that a `--source` names; files are looked for, but not opened.

    Args:
        text: a picture or video; a folder (without its subfolders); a pattern (`*`, `?`, `[…]`, `**`); a `.txt` list of
            files, one path a line, relative to the list; a webcam number; an address (see SCHEMES); or a `.streams`
            list of addresses and webcam numbers, one a line, `#` for comments.

    Raises:
        InputError: nothing of the kind is there.
    """
    if not text:
        raise InputError("--source: is empty; give an image, video, folder, list, webcam number or address")
    if _is_stream(text, "--source"):
        return FrameSource(streams=(text,))
    if os.path.isdir(text):
        files = _readable(os.path.join(text, name) for name in os.listdir(text))
        missing = f"{text}: no images or videos in this folder (looked for {READABLE_TEXT})"
    elif not os.path.lexists(text) and glob.has_magic(text):
        paths = matches(text)
        files = _readable(paths)
        words = f"matches {len(paths)} files, none of them" if paths else "matches nothing; expected"
        missing = f"--source {text}: {words} an image or video ({READABLE_TEXT})"
    elif lower_suffix(text) == ".streams":
        return FrameSource(streams=_listed_streams(text))
    elif text.lower().endswith(".txt"):
        listed = list(read_list(text))
        if not listed:
            raise InputError(f"{text}: the list is empty; expected the path of an image or video a line")
        return FrameSource(tuple(path for _, path in listed), tuple(f"{text}:{number}: " for number, _ in listed))
    else:
        regular_file(text)
        return FrameSource((text,))
    if not files:
        raise InputError(missing)
    return FrameSource(files)


def _readable(paths: Iterable[str]) -> tuple[str, ...]:
    """The pictures and videos among some paths, sorted."""
    return tuple(sorted(path for path in paths if lower_suffix(path) in READABLE))


def _is_stream(text: str, where: str) -> bool:
    """Tell whether a text is a webcam number or an address; an address of another kind than SCHEMES is refused."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme and scheme[1].lower() not in SCHEMES:
        raise InputError(f"{where}: {scheme[1]}:// is not supported; addresses begin with {', '.join(SCHEMES)}")
    return bool(scheme) or (text.isascii() and text.isdecimal() and len(text) < 4)


def _listed_streams(path: str) -> tuple[str, ...]:
    streams = []
    for number, line in enumerate(read_text(path, InputError).splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if not _is_stream(entry, f"{path}:{number}"):
            raise InputError(f"{path}:{number}: {entry!r} is neither an address nor a webcam number")
        streams.append(entry)
    if not streams:
        raise InputError(f"{path}: the list is empty; expected an address or a webcam number a line")
    return tuple(streams)


def frames(source: FrameSource, limits: Limits | None = None) -> Generator[Frame]:
    """The frames of a source, read one by one; of live streams the newest, each at most once.

    A file that cannot be read is skipped, and named in one warning at the end.

    Raises:
        InputError: no file can be read, or no stream ever gave a frame.
    """
    limits = limits or Limits()
    seconds = math.inf if limits.max_seconds is None else limits.max_seconds
    reading = read_streams(source.streams, limits.stream_timeout, seconds) if source.streams else _read_files(source)
    end = math.inf
    with closing(reading):
        for count, frame in enumerate(reading, 1):
            yield frame
            end = min(end, time.monotonic() + seconds)  # the time runs from the end of the first frame
            if count == limits.max_frames or time.monotonic() >= end:
                return


def _read_files(source: FrameSource) -> Generator[Frame]:
    unreadable: list[str] = []
    try:
        for path, line in zip_longest(source.files, source.lines, fillvalue=""):
            try:
                yield from _read_file(path)
            except DataError as failure:
                unreadable.append(f"{line}{failure}")
    finally:  # a limit ends the reading before the last file
        if unreadable:
            _report_unreadable(unreadable, len(source.files))


def _report_unreadable(unreadable: Sequence[str], count: int) -> None:
    shown = "; ".join(unreadable[:NAMED]) + (f"; and {len(unreadable) - NAMED} more" if unreadable[NAMED:] else "")
    if count == 1:
        raise InputError(shown)
    if len(unreadable) == count:
        raise InputError(f"none of the {count} files of --source can be read: {shown}")
    log(f"warning: {len(unreadable)} of {count} files cannot be read and were skipped: {shown}")


def _read_file(path: str) -> Generator[Frame]:
    """The frames of a video or picture, told apart by the suffix, or by the content where the suffix is of no picture.

    Raises:
        DataError: neither, or nothing in it can be decoded.
    """
    if lower_suffix(path) not in VIDEO_SUFFIXES:
        try:
            yield Frame(path, 0, read_image(path), "picture")
            return
        except PictureError as failure:
            if failure.kind != "unknown image format":
                raise
    regular_file(path, DataError)
    with opened(os.path.abspath(path)) as capture:  # FFmpeg would take `a:b.mp4` for the address of a protocol a
        width, height = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        if width * height > MAX_PIXELS:
            raise DataError(f"{path}: frames of {width:g}x{height:g} pixels; at most {MAX_PIXELS} pixels are decoded")
        fps, count = _promised_fps(capture), 0
        for count, image in enumerate(_pictures(capture, path), 1):
            yield Frame(path, count - 1, image, "video", fps)
    if count == 0:
        raise DataError(f"{path}: neither an image nor a video that can be decoded")


@contextmanager
def opened(source: str | int, timeout: float | None = None) -> Iterator[cv2.VideoCapture]:
    """An OpenCV capture of a video file, an address or a webcam number; one that cannot be opened has no frames.

    Files and addresses are read by FFmpeg alone, since other backends read a name like `%03d.png` as a pattern.

    Args:
        source: a path, an address or a webcam number.
        timeout: seconds after which opening and each read of an address are given up.
    """
    silence_decoders()
    limits = []
    if timeout is not None:
        limit = max(1, round(1000 * timeout))
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    with foreign_errors(str(source), "cannot be decoded", DataError):
        if isinstance(source, int):
            capture = cv2.VideoCapture(source)
        else:
            with utf8_path(source) as name:
                capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG, limits)
        try:
            yield capture
        finally:
            capture.release()


def _pictures(capture: cv2.VideoCapture, name: str) -> Iterator[np.ndarray]:
    """The pictures of an open capture, uint8 [H, W, 3] RGB, until none comes; a line says where some are missing."""
    promised, count = _promised_frames(capture), 0
    while True:
        came, image = capture.read()
        if not came or image is None:
            break
        count += 1
        yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    if 0 < count < promised:
        log(f"warning: {name}: only {count} of the {promised} frames it promises can be decoded")


def _promised_fps(capture: cv2.VideoCapture) -> float:
    """Frames a second that an open capture promises; 0 for none or nonsense."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps <= 1000 else 0.0


def _promised_frames(capture: cv2.VideoCapture) -> int:
    """Number of frames that an open capture promises; 0 when it has no end or does not say."""
    frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(frames) if 0 < frames < 1e12 else 0


def without_password(source: str) -> str:
    """An address as it may be shown: without user and password."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", source)  # up to the last @, as FFmpeg reads it


class StreamReader(threading.Thread):
    """Reads one stream until it is stopped.

    A live stream is read as fast as it comes, and only its newest frame is kept. A stream with an end (a video file on
    a server) waits until each frame is taken, so that none is dropped. It is not opened again after its end.

    Args:
        source: an address or a webcam number, as given.
        number: the stream's number in messages.
        changed: notified whenever a frame arrives or is taken; guards the attributes below.
        stopping: set when the thread has to end.
        timeout: seconds after which opening or a read is given up.
    """

    def __init__(
        self, source: str, number: int, changed: threading.Condition, stopping: threading.Event, timeout: float
    ) -> None:
        super().__init__(name=f"stream {number}", daemon=True)
        self.source, self.number = source, number
        self.received = 0
        """Frames that have arrived so far."""
        self.heard = time.monotonic()
        """When the last frame arrived, or the stream was started."""
        self.served = 0.0
        """When a frame was taken last."""
        self.newest: Frame | None = None
        """The frame that waits to be taken."""
        self._changed, self._stopping, self._timeout = changed, stopping, timeout

    def take(self) -> Frame | None:
        """The newest frame, once; call it with `changed` held."""
        frame, self.newest = self.newest, None
        self.served = time.monotonic()
        self._changed.notify_all()
        return frame

    def run(self) -> None:
        """Open, read, and open again after a loss, waiting longer each time nothing comes; ends with the source."""
        wait = SHORTEST_WAIT
        while not self._stopping.is_set():
            before = self.received
            try:
                has_end = self._read_connection()
            except DataError as failure:
                log(f"stream {self.number}: {without_password(str(failure))}")
                return
            if self.received > before:
                if has_end:
                    return
                wait = SHORTEST_WAIT
            self._stopping.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _read_connection(self) -> bool:
        """Read until the connection is lost; return whether the source is one with an end."""
        before = self.received
        with opened(int(self.source) if self.source.isdecimal() else self.source, self._timeout) as capture:
            has_end = _promised_frames(capture) > 0
            fps = _promised_fps(capture)
            for image in _pictures(capture, self.name):
                if self._stopping.is_set():
                    return has_end
                if self.received == before > 0:
                    away = time.monotonic() - self.heard
                    log(f"stream {self.number}: lost at frame {before - 1}, back after {away:.1f} s")
                self._keep(Frame(self.source, self.received, image, "stream", fps), wait_until_taken=has_end)
        if self.received > before and not has_end:
            log(f"stream {self.number}: lost at frame {self.received - 1}, reconnecting")
        return has_end

    def _keep(self, frame: Frame, *, wait_until_taken: bool) -> None:
        """Put a frame in the place of the one before."""
        with self._changed:
            while wait_until_taken and self.newest and not self._stopping.is_set():
                self._changed.wait(POLL)
            self.newest = frame
            self.received += 1
            self.heard = time.monotonic()
            self._changed.notify_all()


def read_streams(sources: Sequence[str], timeout: float, max_seconds: float = math.inf) -> Generator[Frame]:
    """Newest frames of several streams, in turn, each frame once; ends when all streams have ended or are dead.

    Args:
        sources: addresses and webcam numbers, as given.
        timeout: seconds without a frame of any stream after which all count as dead.
        max_seconds: seconds after the first frame is done at which reading ends.

    Raises:
        InputError: no stream ever gave a frame.
    """
    changed, stopping = threading.Condition(), threading.Event()
    limit = min(timeout, LONGEST_READ)
    readers = [StreamReader(source, number, changed, stopping, limit) for number, source in enumerate(sources, 1)]
    for reader in readers:
        reader.start()
    end = math.inf
    try:
        while (frame := _next_frame(readers, changed, timeout, end)) is not None:
            yield frame
            end = min(end, time.monotonic() + max_seconds)
    finally:
        stopping.set()
        for reader in readers:
            reader.join(LONGEST_JOIN)
    if not any(reader.received for reader in readers):
        shown = ", ".join(without_password(source) for source in sources)
        raise InputError(f"--source {shown}: no frame within {timeout:g} s (--stream-timeout)")


def _next_frame(
    readers: Sequence[StreamReader], changed: threading.Condition, timeout: float, end: float
) -> Frame | None:
    """The newest frame of the ready stream that waited longest; None when time is up or nothing can come any more."""
    with changed:
        while (now := time.monotonic()) < end:
            if ready := [reader for reader in readers if reader.newest]:
                return min(ready, key=lambda reader: reader.served).take()
            silence = now - max(reader.heard for reader in readers)
            if silence >= timeout or not any(reader.is_alive() for reader in readers):
                if silence >= timeout and any(reader.received for reader in readers):
                    log(f"no frame for {timeout:g} s (--stream-timeout): the end")
                return None
            changed.wait(min(POLL, timeout - silence, end - now))
    return None
