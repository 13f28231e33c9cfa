"""Pictures and videos as files, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.data.datasets import DetectionDataset, Request
from utils.data.images import Fit, silence_decoders


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
