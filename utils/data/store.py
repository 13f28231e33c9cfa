"""The pictures of a data set, decoded when asked for or kept in memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from utils.data.images import Channels, Image, Shrink, read_image
from utils.data.index import Index
from utils.errors import ResourceError

MEMORY_SHARE = 0.9
"""Share of the free memory that pictures may take."""


class PictureStore:
    """Pictures by position.

    Args:
        index: the pictures.
        channels: 3 for RGB, 1 for grey.
    """

    def __init__(self, index: Index, channels: Channels) -> None:
        self.index, self.channels = index, channels
        self._kept: list[Image] | None = None

    def keep(self, side: int) -> None:
        """Decode all pictures, shrink those whose longer side is over `side` pixels, and keep them in memory.

        Worker processes forked later share them.

        Raises:
            ResourceError: they do not fit into the free memory.
        """
        shapes = self.index.shapes
        scales = np.minimum(side / shapes.max(1), 1)
        needed = float((shapes.prod(1) * scales**2).sum() * self.channels)
        free = _free_memory()
        if needed > MEMORY_SHARE * free:
            raise ResourceError(
                f"the pictures take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
                "do not keep them (--cache-images), or take a smaller --img_size"
            )
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            self._kept = list(pool.map(lambda position: self._shrunk(position, side), range(len(self.index))))

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
        spare = (self.index.shapes[position] / spans).min() if spans else 1
        shrink = next((by for by in (8, 4, 2) if spare >= by), 1)
        return self._decoded(position, shrink)

    def _decoded(self, position: int, shrink: Shrink = 1) -> Image:
        return read_image(self.index.images[position], self.channels, self.index.max_pixels, shrink=shrink)

    def _shrunk(self, position: int, side: int) -> Image:
        image = self._decoded(position)
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
