"""The pictures of a data set, decoded when asked for or kept in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.data.images import Channels, Image, read_image
from utils.errors import ResourceError

MEMORY_SHARE = 0.9
"""Share of the free memory that pictures may take."""


class PictureStore:
    """Pictures by position.

    Args:
        paths: of the pictures.
        shapes: [N, 2], their heights and widths.
        channels: 3 for RGB, 1 for grey.
    """

    def __init__(self, paths: Sequence[Path], shapes: NDArray[np.int64], channels: Channels) -> None:
        self.paths, self.shapes, self.channels = paths, shapes, channels
        self._kept: list[Image] | None = None

    def keep(self, side: int) -> None:
        """Decode all pictures, shrink those whose longer side is over `side` pixels, and keep them in memory.

        Worker processes forked later share them.

        Raises:
            ResourceError: they do not fit into the free memory.
        """
        scales = np.minimum(side / self.shapes.max(1), 1)
        needed = float((self.shapes.prod(1) * scales**2).sum() * self.channels)
        free = _free_memory()
        if needed > MEMORY_SHARE * free:
            raise ResourceError(
                f"the pictures take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
                "do not keep them (--cache-images), or take a smaller --img_size"
            )
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            self._kept = list(pool.map(lambda position: self._shrunk(position, side), range(len(self.paths))))

    def read(self, position: int, spans: tuple[float, float] | None = None) -> Image:
        """Picture [H, W, C] at its own resolution, or at a lower one.

        Args:
            position: of the picture.
            spans: height and width that are enough. None: as high a resolution as there is.

        Raises:
            PictureError: it cannot be read (any more).
        """
        if self._kept is not None:
            return self._kept[position]
        spare = (self.shapes[position] / spans).min() if spans else 1
        shrink = next((by for by in (8, 4, 2) if spare >= by), 1)
        return read_image(self.paths[position], self.channels, shrink=shrink)

    def _shrunk(self, position: int, side: int) -> Image:
        image = read_image(self.paths[position], self.channels)
        height, width = image.shape[:2]
        scale = side / max(height, width)
        if scale >= 1:
            return image
        small = cv2.resize(image, (max(round(width * scale), 1), max(round(height * scale), 1)))
        return small.reshape(*small.shape[:2], self.channels)


def _free_memory() -> int:
    """Bytes that can be had without swapping, as the kernel estimates."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
