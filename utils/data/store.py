"""The pictures of a data set at the size that samples are made from, decoded when asked for or kept for all processes.

A picture is the same bytes whether it is kept or not, so a cache changes the speed of a training and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from utils.cli import log
from utils.data.cache import default_folder, stamp
from utils.data.fit import FitMode, inner_size, place
from utils.data.images import Channels, Image, Shrink, read_image
from utils.data.index import Index
from utils.data.pixels import MAGIC, PixelFile, PixelLayout, made_in_memory, made_on_disk, opened
from utils.data.sampling import Size
from utils.errors import ResourceError

CacheKind = Literal["ram", "disk"]
FREE_SHARE = 0.9
"""Share of the free memory or disk that pictures may take."""
LEAST_SPARE = 2
"""A JPEG is decoded at a fraction of its sides only if that is still this many times the size wanted."""
STALE = 3600.0
"""Seconds after which an unfinished file was left by a process that was killed: one at work writes all the time."""


class PictureStore:
    """Pictures by position, each no larger than it is fitted to the input.

    Args:
        index: the pictures.
        channels: 3 for RGB, 1 for grey.
        size: height and width of the input.
        mode: how a picture is fitted to it.
        exact: pictures are as `fit` would make them of the whole picture; otherwise large JPEGs may be decoded at a
            fraction of their size.
    """

    def __init__(
        self, index: Index, channels: Channels, size: Size, mode: FitMode = "letterbox", *, exact: bool = True
    ) -> None:
        self.index, self.channels, self.size, self.mode, self.exact = index, channels, size, mode, exact
        self._kept: PixelFile | None = None

    def keep(self, kind: CacheKind, folder: Path | None = None) -> None:
        """Decode all pictures once. Where they cannot be kept, that is said, and they are decoded when asked for.

        Args:
            kind: "ram": in memory, until the last process ends that uses them; "disk": in a file, for later runs, too.
            folder: of the file; None: the user's cache folder. Made if missing.

        Raises:
            PictureError: a picture cannot be read any more.
        """
        layout = self._layout()
        try:
            self._kept = self._in_memory(layout) if kind == "ram" else self._on_disk(layout, folder)
        except (OSError, ResourceError) as failure:
            reason = f"{failure.filename}: {failure.strerror}" if getattr(failure, "filename", None) else str(failure)
            log(f"--cache {kind}: {reason}; pictures are decoded each time they are needed")

    @property
    def address(self) -> str:
        """Where another process of this machine finds the pictures that this one keeps; empty: it keeps none."""
        return self._kept.address if self._kept is not None else ""

    def join(self, address: str, layout: PixelLayout | None = None) -> None:
        """Use the pictures that another process keeps; if they are not there, decode them when asked for."""
        if address:
            self._kept = opened(address, layout or self._layout(), check=False)

    def read(self, position: int) -> Image:
        """Picture [H, W, C], shrunk to its fitted size if it is larger; not to be written to.

        Raises:
            PictureError: it cannot be read (any more).
        """
        return self._decoded(position) if self._kept is None else self._kept[position]

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is not forked: where the pictures are, not the pictures."""
        kept = None if self._kept is None else (self.address, self._kept.layout)
        return {**vars(self), "_kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _kept=None)
        if state["_kept"] is not None:
            self.join(*state["_kept"])

    def _shape(self, position: int) -> Size:
        height, width = self.index.shapes[position].tolist()
        inner = inner_size(place((height, width), self.size, self.mode))
        return inner if inner[0] <= height and inner[1] <= width else (height, width)

    def _decoded(self, position: int) -> Image:
        height, width = self._shape(position)
        spare = (self.index.shapes[position] / (height, width)).min() / LEAST_SPARE
        shrink: Shrink = 1 if self.exact else next((by for by in (8, 4, 2) if spare >= by), 1)
        image = read_image(self.index.images[position], self.channels, self.index.max_pixels, shrink=shrink)
        if image.shape[:2] == (height, width):
            return image
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, self.channels)

    def _layout(self) -> PixelLayout:
        """Shapes of the pictures, and a key of all that their pixels depend on."""
        shapes = np.array([(*self._shape(at), self.channels) for at in range(len(self.index))], np.int64)
        digest = self._digest()
        digest.update(shapes.tobytes() + cv2.__version__.encode())
        for path in self.index.images:
            digest.update(repr(stamp(str(path))).encode())
        return PixelLayout(shapes.reshape(-1, 3), digest.digest())

    def _digest(self) -> Any:
        """Of the paths and of what is wanted of them; names the file, so that an edited data set replaces its own."""
        paths = b"\0".join(os.path.abspath(os.fsencode(path)) for path in self.index.images)
        wanted = (MAGIC, self.channels, *self.size, self.mode, self.exact)
        return hashlib.sha256(repr(wanted).encode() + paths)

    def _in_memory(self, layout: PixelLayout) -> PixelFile:
        _check_room("memory", layout.bytes, _free_memory())
        return made_in_memory(layout, self._decoded)

    def _on_disk(self, layout: PixelLayout, folder: Path | None) -> PixelFile:
        folder = folder or default_folder()
        if folder is None:
            raise ResourceError("there is no home folder; name one with --cache-dir")
        path = folder / f"pixels-{self._digest().hexdigest()[:32]}.bin"
        kept = opened(path, layout)
        if kept is not None:
            return kept
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path)
        _check_room(str(folder), layout.bytes, _free_disk(folder))
        kept = made_on_disk(path, layout, self._decoded)
        log(f"{path}: {layout.bytes / 1e6:.0f} MB of decoded pictures for this and later runs")
        return kept


def _check_room(where: str, needed: int, free: int) -> None:
    if needed > FREE_SHARE * free:
        raise ResourceError(f"{where}: {free / 1e9:.3f} GB are free, the pictures take {needed / 1e9:.3f} GB")


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _free_memory() -> int:
    """Bytes that can be had without swapping, as the kernel estimates."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _remove_unfinished(path: Path) -> None:
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > STALE:
                temporary.unlink()
