"""Pictures and videos as files, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.data.datasets import DetectionDataset, Request
from utils.data.images import Fit, silence_decoders, write_image


class Sample(NamedTuple):
    image: np.ndarray
    targets: np.ndarray
    ignored: np.ndarray
    position: int
    fit: Fit | None


def sample(dataset: DetectionDataset, wanted: Request | int) -> Sample:
    """A batch of one: image [C, h, w], boxes [n, 5]."""
    request = wanted if isinstance(wanted, Request) else Request(dataset.epoch, wanted, dataset.size)
    images, targets, ignored, positions, fits = dataset.__getitems__([request])
    return Sample(images[0].numpy(), targets[:, 1:].numpy(), ignored[:, 1:].numpy(), int(positions[0]), fits[0])


def labelled(root: Path, name: str, image: np.ndarray, label: str) -> None:
    """A picture of a data set, and its rows of boxes in a file of their own."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(exist_ok=True)
    write_image(root / "images" / name, image)
    (root / "labels" / name).with_suffix(".txt").write_text(label)


def small_set(labels: Sequence[str]) -> None:
    """A data set of two classes in the current folder: noise of 90 × 60 pixels with these label files; set.data."""
    rng = np.random.default_rng(0)
    for number, rows in enumerate(labels):
        labelled(Path(), f"{number}.png", rng.integers(0, 255, (60, 90, 3), dtype=np.uint8), rows)
    Path("val.txt").write_text("".join(f"images/{number}.png\n" for number in range(len(labels))))
    Path("set.names").write_text("cat\ndog\n")
    Path("set.data").write_text("classes = 2\nvalid = val.txt\nnames = set.names\n")


def write_video(path: Path | str, frames: Iterable[np.ndarray]) -> Path:
    """Write frames [H, W, 3] of 10 a second, as MPEG-4 into .mp4 and as pictures (MJPG) into other files."""
    silence_decoders()
    frames = list(frames)
    code = cv2.VideoWriter.fourcc(*("mp4v" if str(path).endswith(".mp4") else "MJPG"))
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, 10, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return Path(path)
