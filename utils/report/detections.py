"""Results of detect.py: lines or JSON on stdout, and files of pictures, videos, labels and crops.

A file that was there before is never overwritten: the new one gets a number behind its name.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.cli import one_line
from utils.data.images import SUFFIXES, silence_decoders, write_image
from utils.data.index import label_line
from utils.data.sources import Frame, without_password
from utils.detection.settings import Times
from utils.errors import InputError
from utils.files import atomic_path, atomic_write_text, utf8

DEFAULT_FPS = 25.0
"""Speed of a video whose source does not say its own."""
MP4 = frozenset({"mp4v", "avc1", "h264", "hvc1", "hev1", "av01"})
"""Codes of --fourcc that go into an .mp4; all others go into an .avi."""
LONGEST_STEM = 255 - 32
"""Bytes of a stem; the rest of the 255 of a file name is for numbers and a suffix."""
Layout = Literal["text", "array", "lines"]
"""Form of stdout: lines for people, one JSON array, or a JSON object a line; with JSON the lines go to stderr."""


class DetectionReport(AbstractContextManager["DetectionReport"]):
    """Prints frames as they come. A context, since an array is closed when the run is interrupted, too.

    Args:
        names: names of the classes.
        layout: how results are printed.
    """

    def __init__(self, names: Sequence[str], layout: Layout) -> None:
        self._names = names
        self._layout = layout
        self._times: list[Times] = []

    def __exit__(self, kind: object, *_: object) -> None:
        if self._layout == "array" and (kind is None or self._times):
            print("\n]" if self._times else "[]", flush=True)

    def add(self, frame: Frame, detections: NDArray[np.floating], times: Times) -> None:
        """Print one frame.

        Args:
            frame: as it was read.
            detections: [n, 6], x1, y1, x2, y2 in pixels of the picture, confidence, class.
            times: of its stages.
        """
        if self._layout == "array":
            print(",\n" if self._times else "[\n", self._json(frame, detections), sep="", end="", flush=True)
        elif self._layout == "lines":
            print(self._json(frame, detections), flush=True)
        self._times.append(times)
        self.say(self._line(frame, detections, times))

    def say(self, text: str) -> None:
        """Print a line for people."""
        print(one_line(text), file=sys.stdout if self._layout == "text" else sys.stderr, flush=True)

    def summary(self) -> str:
        """Return the number of frames and mean times."""
        mean = Times(*np.mean(self._times, axis=0))
        stages = ", ".join(f"{stage} {value:.1f}" for stage, value in mean._asdict().items())
        return f"{len(self._times)} frame{'s' * (len(self._times) > 1)}, {sum(mean):.1f} ms each ({stages})"

    def _json(self, frame: Frame, detections: NDArray[np.floating]) -> str:
        entries: list[dict[str, Any]] = [
            {"class": int(label), "name": self._names[int(label)], "confidence": confidence, "box": box}
            for *box, confidence, label in detections.tolist()
        ]
        return json.dumps({"source": frame.source, "frame": frame.index, "detections": entries}, allow_nan=False)

    def _line(self, frame: Frame, detections: NDArray[np.floating], times: Times) -> str:
        height, width = frame.image.shape[:2]
        position = "" if frame.kind == "picture" else f" frame {frame.index}"
        counts = sorted(Counter(detections[:, 5].astype(int).tolist()).items())
        objects = ", ".join(f"{count} {self._names[label]}" for label, count in counts) or "nothing"
        source = without_password(frame.source) if frame.kind == "stream" else frame.source
        return f"{source}{position} {width}x{height}: {objects} ({sum(times):.1f} ms)"


@dataclass(frozen=True)
class FileKinds:
    """Kinds of files that are wanted."""

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
        silence_decoders()
        if utf8(str(path.resolve())) != str(path.resolve()):
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
        """Folder of the files; made if it is not there yet."""
        return self._make_folder()

    def write(self, frame: Frame, detections: NDArray[np.floating], drawn: NDArray[np.uint8] | None) -> None:
        """Write the files of a frame.

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
            write_image(self._path(stem + self._suffix(frame)), drawn)
            return
        video = self._videos.get(frame.source)
        if video is not None and video.size != drawn.shape[:2]:  # a stream that came back with another size
            video.close()
            video = None
        if video is None:
            path = self._path(stem + self._suffix(frame))
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
        """Return the path of a new file, with a number behind its stem if need be; its folder is there."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        free = (other for other in _numbered(path.stem) if not path.with_name(other + path.suffix).exists())
        return path.with_name(next(free) + path.suffix)

    def _stem(self, frame: Frame) -> str:
        """Return the stem of a frame's files, which no other source or file has; the frames of a video share one."""
        if frame.source in self._stem_of:
            return self._stem_of[frame.source]
        for stem in _numbered(_plain_stem(frame)):
            files = (self.folder / f"{stem}{self._suffix(frame)}", self.folder / "labels" / f"{stem}.txt")
            if stem not in self._stems and not any(file.exists() for file in files):
                break
        self._stems.add(stem)
        if frame.kind != "picture":
            self._stem_of[frame.source] = stem
        return stem

    def _suffix(self, frame: Frame) -> str:
        """Return the suffix of the picture or video that is written for a frame."""
        if frame.kind != "picture":
            return video_suffix(self._fourcc)
        suffix = os.path.splitext(frame.source)[1]
        return suffix if suffix.lower() in SUFFIXES else ".jpg"


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
    """Return the suffix of a video of a format."""
    return ".mp4" if fourcc.lower() in MP4 else ".avi"


def _plain_stem(frame: Frame) -> str:
    if frame.kind == "stream":
        return _plain_name(f"stream_{without_password(frame.source)}")
    stem = os.path.splitext(os.path.basename(frame.source))[0]
    return stem if frame.kind == "picture" else _cut(stem)


def _numbered(stem: str) -> itertools.chain[str]:
    """Return the stem, and then with the numbers from 2 on behind it."""
    return itertools.chain([stem], (f"{_cut(stem)}_{number}" for number in itertools.count(2)))


def _cut(stem: str) -> str:
    """Return a stem that leaves room for numbers and a suffix."""
    while len(os.fsencode(stem)) > LONGEST_STEM:
        stem = stem[:-1]
    return stem


def _plain_name(text: str) -> str:
    """Return a text from outside as one plain name: no separators, no leading dots."""
    return _cut(re.sub(r"[^\w .-]+", "_", text).strip(" ._") or "_")
