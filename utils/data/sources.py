"""What detect.py looks at: pictures, folders, patterns, list files, videos, webcams and network streams as frames.

`find` checks what `--source` names, `frames` reads it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import cv2

from utils.cli import log
from utils.data.images import MAX_PIXELS, SUFFIXES, PictureError, read_image
from utils.data.index import list_images
from utils.data.streams import Clock, Frame, opened, pictures, promised_fps, promised_frames, read_streams
from utils.errors import DataError, InputError
from utils.files import read_text, regular_file

VIDEO_SUFFIXES = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
"""What a folder is searched for, beside pictures; a file that is named itself may have any suffix."""
SCHEMES = ("http", "https", "rtmp", "rtsp", "rtsps", "tcp", "udp")
NAMED = 5
"""Unreadable files that a warning names; the others are counted."""


@dataclass(frozen=True)
class Source:
    """What `--source` names: files in the order they are read, or live streams."""

    files: tuple[str, ...] = ()
    """Pictures and videos."""
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


def find(text: str) -> Source:
    """What a `--source` names; files are looked for, but not opened.

    Args:
        text: a picture or video; a folder (without its subfolders); a pattern (`*`, `?`, `[…]`, `**`); a `.txt` list of
            files, one path a line, relative to the list; a webcam number; an address (see SCHEMES); or a `.streams`
            list of addresses and webcam numbers, one a line, `#` for comments.

    Raises:
        InputError: nothing of the kind is there.
    """
    if not text:
        raise InputError("--source: is empty; give a picture, video, folder, list, webcam number or address")
    if _is_stream(text, "--source"):
        return Source(streams=(text,))
    if os.path.isdir(text):
        return Source(files=_in_folder(text))
    if not os.path.lexists(text) and glob.has_magic(text):
        return Source(files=_matching(text))
    if _suffix(text) == ".streams":
        return Source(streams=_listed_streams(text))
    files = tuple(list_images(text))
    if not files:
        raise InputError(f"{text}: the list is empty; expected the path of a picture or video a line")
    return Source(files=files)


def frames(source: Source, limits: Limits | None = None) -> Iterator[Frame]:
    """The frames of a source, read one by one; of live streams the newest, each at most once.

    A file that cannot be read is skipped, and named in one warning at the end.

    Raises:
        InputError: no file can be read, or no stream ever gave a frame.
    """
    limits = limits or Limits()
    clock = Clock(limits.max_seconds)
    if source.streams:
        reading = read_streams(source.streams, limits.stream_timeout, clock)
    else:
        reading = _read_files(source.files)
    with closing(reading):
        for count, frame in enumerate(reading, 1):
            yield frame
            clock.start()
            if count == limits.max_frames or clock.remaining() == 0:
                return


def _read_files(files: tuple[str, ...]) -> Iterator[Frame]:
    unreadable = []
    for path in files:
        try:
            yield from _read_file(path)
        except DataError as failure:
            unreadable.append(str(failure))
    if not unreadable:
        return
    shown = "; ".join(unreadable[:NAMED]) + (f"; and {len(unreadable) - NAMED} more" if unreadable[NAMED:] else "")
    if len(files) == 1:
        raise InputError(shown)
    if len(unreadable) == len(files):
        raise InputError(f"none of the {len(files)} files of --source can be read: {shown}")
    log(f"warning: {len(unreadable)} of {len(files)} files cannot be read and were skipped: {shown}")


def _read_file(path: str) -> Iterator[Frame]:
    """The frames of a video or picture, told apart by the suffix, or by the content where the suffix is of no picture.

    Raises:
        DataError: neither, or nothing in it can be decoded.
    """
    if _suffix(path) not in VIDEO_SUFFIXES:
        try:
            yield Frame(path, 0, read_image(path), "picture")
            return
        except PictureError as failure:
            if failure.kind != "unknown image format":
                raise
    regular_file(path, DataError)
    yield from _read_video(path)


def _read_video(path: str) -> Iterator[Frame]:
    """Every frame that can be decoded.

    Raises:
        DataError: there is none.
    """
    with opened(os.path.abspath(path)) as capture:  # FFmpeg would take `a:b.mp4` for the address of a protocol a
        width, height = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        if width * height > MAX_PIXELS:
            raise DataError(f"{path}: frames of {width:g}x{height:g} pixels; at most {MAX_PIXELS} pixels are decoded")
        promised, fps, count = promised_frames(capture), promised_fps(capture), 0
        for count, image in enumerate(pictures(capture), 1):
            yield Frame(path, count - 1, image, "video", fps)
    if count == 0:
        raise DataError(f"{path}: neither a picture nor a video that can be decoded")
    if count < promised:
        log(f"warning: {path}: only {count} of the {promised} frames it promises can be decoded")


def _is_stream(text: str, where: str) -> bool:
    """Whether a text is a webcam number or an address; an address of another kind than SCHEMES is refused."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme and scheme[1].lower() not in SCHEMES:
        raise InputError(f"{where}: {scheme[1]}:// is not supported; addresses begin with {', '.join(SCHEMES)}")
    return bool(scheme) or (text.isascii() and text.isdecimal() and len(text) < 4)


def _in_folder(folder: str) -> tuple[str, ...]:
    """Pictures and videos of a folder, sorted by name; its subfolders are left alone."""
    names = sorted(name for name in os.listdir(folder) if _suffix(name) in SUFFIXES | VIDEO_SUFFIXES)
    if not names:
        raise InputError(f"{folder}: no pictures or videos in this folder (looked for {_suffixes()})")
    return tuple(os.path.join(folder, name) for name in names)


def _matching(pattern: str) -> tuple[str, ...]:
    """Pictures and videos that a pattern matches, sorted; `**` stands for any number of folders."""
    matches = sorted(glob.glob(pattern, recursive=True))
    files = tuple(path for path in matches if _suffix(path) in SUFFIXES | VIDEO_SUFFIXES)
    if not files:
        found = f"matches {len(matches)} files, none of them" if matches else "matches nothing; expected"
        raise InputError(f"--source {pattern}: {found} a picture or video ({_suffixes()})")
    return files


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


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES | VIDEO_SUFFIXES))
