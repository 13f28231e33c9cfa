"""What detect.py leaves behind: pictures and videos with boxes, labels, and crops of what was found.

A file that was there before is never overwritten: the new one gets a number behind its name.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.data.images import SUFFIXES, write_image
from utils.data.labels import label_line
from utils.data.sources import Frame, is_utf8, silence_opencv, without_password
from utils.errors import InputError
from utils.files import atomic_path, atomic_write_text

DEFAULT_FPS = 25.0
"""Speed of a video whose source does not say its own."""
MP4 = frozenset({"mp4v", "avc1", "h264", "hvc1", "hev1", "av01"})
"""Codes of --fourcc that go into an .mp4; all others go into an .avi."""
LONGEST_NAME = 255
"""Bytes of a file name."""
RESERVED = 32
"""Bytes of a name kept for what comes behind a stem: numbers and a suffix."""


@dataclass(frozen=True)
class FileKinds:
    """Which files are wanted."""

    pictures: bool = True
    """Pictures and videos with boxes."""
    labels: bool = False
    """`labels/STEM.txt` a picture, one `class cx cy w h` a line, as shares of the picture."""
    confidence: bool = False
    """A label ends with the confidence."""
    crops: bool = False
    """`crops/CLASS/STEM_K.jpg`: each detection cut out."""

    def __bool__(self) -> bool:
        return self.pictures or self.labels or self.crops


class VideoFile:
    """A video that gets its name when it is complete, by `close`.

    Raises:
        InputError: OpenCV cannot write the format.
    """

    def __init__(self, path: Path, fourcc: str, fps: float, size: tuple[int, int]) -> None:
        silence_opencv()
        if not is_utf8(str(path.resolve())):
            raise InputError(f"{path}: a video is written only where all names are UTF-8; choose another --output")
        self.path = path
        self.size = size
        self._partial = os.path.abspath(path.with_name(f".{secrets.token_hex(8)}{path.suffix}"))
        code = cv2.VideoWriter.fourcc(*fourcc)
        self._writer = cv2.VideoWriter(self._partial, cv2.CAP_FFMPEG, code, fps, size[::-1])
        if not self._writer.isOpened():
            Path(self._partial).unlink(missing_ok=True)
            raise InputError(f"--fourcc {fourcc}: this OpenCV cannot write such a video of {size[1]}x{size[0]} pixels")
        self._next = 0

    def write(self, image: NDArray[np.uint8], index: int) -> None:
        """Add a frame; it stands for those that were dropped before it, too, so that time runs as in the source."""
        pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        for _ in range(index + 1 - self._next if self._next else 1):
            self._writer.write(pixels)
        self._next = index + 1

    def close(self) -> None:
        """Complete the video and give it its name."""
        self._writer.release()
        with atomic_path(self.path) as temporary:
            os.replace(self._partial, temporary)


class DetectionFiles:
    """Writes the files of one run of detect.py.

    Args:
        make_folder: makes the folder and returns it; called before the first file.
        names: names of the classes.
        kinds: which files are wanted.
        fourcc: code of the video format.
    """

    def __init__(self, make_folder: Callable[[], Path], names: Sequence[str], kinds: FileKinds, fourcc: str) -> None:
        self.kinds = kinds
        self._make_folder = make_folder
        self._names = names
        self._fourcc = fourcc
        self._stems: set[str] = set()
        self._videos: dict[str, VideoFile] = {}
        self._stem_of: dict[str, str] = {}

    @cached_property
    def folder(self) -> Path:
        """Where the files are; made if it is not there yet."""
        return self._make_folder()

    def write(self, frame: Frame, detections: NDArray[np.floating], drawn: NDArray[np.uint8] | None) -> None:
        """Write what is wanted of a frame.

        Args:
            frame: as it was read.
            detections: [n, 6], x1, y1, x2, y2 in pixels of the picture, confidence, class.
            drawn: the frame with boxes; None if pictures are not wanted.
        """
        if not self.kinds:
            return
        if frame.kind == "video" and frame.index == 0:
            self.close()
        stem = self._stem(frame)
        name = stem if frame.kind == "picture" else f"{stem}_{frame.index:06d}"
        if self.kinds.pictures and drawn is not None:
            self._write_picture(frame, stem, drawn)
        if self.kinds.labels:
            self._write_labels(frame, name, detections)
        if self.kinds.crops:
            self._write_crops(frame, name, detections)

    def close(self) -> None:
        """Complete the videos that are being written."""
        for video in self._videos.values():
            video.close()
        self._videos.clear()
        self._stem_of.clear()

    def _write_picture(self, frame: Frame, stem: str, drawn: NDArray[np.uint8]) -> None:
        if frame.kind == "picture":
            write_image(self._path(stem + _picture_suffix(frame.source)), drawn)
            return
        video = self._videos.get(frame.source)
        if video is not None and video.size != drawn.shape[:2]:  # a stream that came back with another size
            video.close()
            video = None
        if video is None:
            path = self._path(stem + video_suffix(self._fourcc))
            video = VideoFile(path, self._fourcc, frame.fps or DEFAULT_FPS, drawn.shape[:2])
            self._videos[frame.source] = video
        video.write(drawn, frame.index)

    def _write_labels(self, frame: Frame, name: str, detections: NDArray[np.floating]) -> None:
        height, width = frame.image.shape[:2]
        x1, y1, x2, y2, confidence, number = detections.T
        columns = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
        columns += [confidence] * self.kinds.confidence
        lines = map(label_line, number.astype(int), np.column_stack(columns))
        atomic_write_text(self._path("labels", f"{name}.txt"), "".join(lines))

    def _write_crops(self, frame: Frame, name: str, detections: NDArray[np.floating]) -> None:
        height, width = frame.image.shape[:2]
        for k, (x1, y1, x2, y2, _, number) in enumerate(detections.tolist(), 1):
            left, top = min(int(x1), width - 1), min(int(y1), height - 1)
            crop = frame.image[top : max(top + 1, round(y2)), left : max(left + 1, round(x2))]
            write_image(self._path("crops", _plain_name(self._names[int(number)]), f"{_cut(name)}_{k}.jpg"), crop)

    def _path(self, *parts: str) -> Path:
        """Path of a new file, with a number behind its stem if need be; its folder is there."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        numbered = (path.with_name(f"{_cut(path.stem)}_{number}{path.suffix}") for number in itertools.count(2))
        return path if not path.exists() else next(other for other in numbered if not other.exists())

    def _stem(self, frame: Frame) -> str:
        """Name of a frame's files without suffix: of every picture, and of the whole of a video or stream."""
        if frame.kind == "picture":
            return self._free_stem(_plain_stem(frame), _picture_suffix(frame.source))
        if frame.source not in self._stem_of:
            self._stem_of[frame.source] = self._free_stem(_plain_stem(frame), video_suffix(self._fourcc))
        return self._stem_of[frame.source]

    def _free_stem(self, stem: str, suffix: str) -> str:
        """The stem, or with a number behind it the first that no file and no other source has."""
        number, candidate = 1, stem
        while candidate in self._stems or self._exists(candidate, suffix):
            number += 1
            candidate = f"{_cut(stem)}_{number}"
        self._stems.add(candidate)
        return candidate

    def _exists(self, stem: str, suffix: str) -> bool:
        folder = self.folder
        return (folder / f"{stem}{suffix}").exists() or (folder / "labels" / f"{stem}.txt").exists()


def check_fourcc(code: str) -> None:
    """Raise InputError if OpenCV cannot write videos of a format; tried in another process, since it prints why."""
    program = (
        "import cv2, sys; code = cv2.VideoWriter.fourcc(*sys.argv[1]); "
        "sys.exit(not cv2.VideoWriter(sys.argv[2], cv2.CAP_FFMPEG, code, 25, (64, 64)).isOpened())"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"trial{video_suffix(code)}")
        if subprocess.run([sys.executable, "-c", program, code, path], capture_output=True, check=False).returncode:
            raise InputError(f"--fourcc {code}: this OpenCV cannot write such a video; mp4v and MJPG always work")


def video_suffix(fourcc: str) -> str:
    """Suffix of a video of a format."""
    return ".mp4" if fourcc.lower() in MP4 else ".avi"


def _picture_suffix(source: str) -> str:
    suffix = os.path.splitext(source)[1]
    return suffix if suffix.lower() in SUFFIXES else ".jpg"


def _plain_stem(frame: Frame) -> str:
    if frame.kind == "stream":
        return _plain_name(f"stream_{without_password(frame.source)}")
    stem = os.path.splitext(os.path.basename(frame.source))[0]
    return stem if frame.kind == "picture" else _cut(stem)


def _cut(stem: str) -> str:
    """A stem that leaves room for numbers and a suffix."""
    return os.fsdecode(os.fsencode(stem)[: LONGEST_NAME - RESERVED])


def _plain_name(text: str) -> str:
    """A text from outside as one plain name: no separators, no leading dots."""
    return _cut(re.sub(r"[^\w .-]+", "_", text).strip(" ._") or "_")
