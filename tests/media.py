"""Pictures and videos as files, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from utils.data.images import silence_decoders


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
