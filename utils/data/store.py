"""The pictures of a data set at the size that samples are made from, decoded when asked for or kept for all processes.

A picture is the same bytes whether it is kept or not, so a cache changes the speed of a training and nothing else.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from utils.cli import log
from utils.data.images import Channels, FitMode, Image, Shrink, Size, inner_size, place, read_image
from utils.data.index import Index, default_folder, stamp
from utils.errors import OUT_OF_RESOURCES, DataError, ResourceError
from utils.files import atomic_path, regular_file

MAGIC = b"DKPIXEL1"
"""First bytes of a file; the last of them is the version of this format."""
HEADER = struct.Struct("<8s32sQQI")
"""Magic, key, number of pictures, size of the file, CRC-32 of the table."""
ALIGNMENT = 64
"""Of every picture, in bytes: a cache line."""
CHUNK = 256
"""Pictures decoded before they are written, so that a slow disk does not fill the memory."""


class PixelLayout:
    """Where the pixels of each picture lie in a file.

    Args:
        shapes: [N, 3], height, width and channels of the pictures.
        key: 32 bytes that tell these pictures from all others.
    """

    def __init__(self, shapes: NDArray[np.int64], key: bytes) -> None:
        self.shapes, self.key = shapes, key
        sizes = shapes.prod(1)
        ends = _table_end(len(shapes)) + np.cumsum(-(-sizes // ALIGNMENT) * ALIGNMENT)
        self.starts: list[int] = np.concatenate([[_table_end(len(shapes))], ends]).tolist()
        self.bytes: int = self.starts.pop()

    def header(self, table: bytes) -> bytes:
        """The header of a file with this table of sums."""
        return HEADER.pack(MAGIC, self.key, len(self.shapes), self.bytes, zlib.crc32(table))


class PixelFile:
    """The pictures of an open file as read-only arrays; a forked process has the same memory.

    Args:
        file: open for reading, and closed with this object.
        layout: of the file, which is as large as that says.
    """

    def __init__(self, file: BinaryIO, layout: PixelLayout) -> None:
        self._file, self.layout = file, layout
        self._bytes = np.frombuffer(mmap.mmap(file.fileno(), layout.bytes, access=mmap.ACCESS_READ), np.uint8)
        self._shapes: list[list[int]] = layout.shapes.tolist()

    def __getitem__(self, position: int) -> Image:
        height, width, channels = self._shapes[position]
        start = self.layout.starts[position]
        return self._bytes[start : start + height * width * channels].reshape(height, width, channels)

    @property
    def address(self) -> str:
        """Path under which another process of this machine and user can open the file while this one has it open."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def table(self) -> bytes:
        """The sums that the file holds."""
        return self._bytes[HEADER.size : HEADER.size + 4 * len(self._shapes)].tobytes()

    def fits(self) -> bool:
        """Whether the header is that of the layout."""
        return self._bytes[: HEADER.size].tobytes() == self.layout.header(self.table())

    def is_intact(self) -> bool:
        """Whether the pixels have the sums of the table."""
        sums = np.frombuffer(self.table(), "<u4")
        with ThreadPoolExecutor(_threads()) as pool:
            found = pool.map(lambda position: zlib.crc32(self[position]), range(len(self._shapes)))
            progress = tqdm(found, "checking the picture cache", len(sums), delay=2, disable=None)
            return all(one == known for one, known in zip(progress, sums.tolist(), strict=True))


def opened(path: Path | str, layout: PixelLayout, *, check: bool = True) -> PixelFile | None:
    """The file at a path; None if there is none, or it is not whole or of other pictures.

    Args:
        path: of a regular file.
        layout: that it is expected to have.
        check: read all of its pixels; False where another process has just done so.
    """
    try:
        if regular_file(path, DataError).st_size != layout.bytes:
            return None
        file = open(path, "rb")  # noqa: SIM115
        pixels = PixelFile(file, layout)
    except (DataError, OSError, ValueError):
        return None
    return pixels if pixels.fits() and (not check or pixels.is_intact()) else None


def made_in_memory(layout: PixelLayout, decode: Callable[[int], Image]) -> PixelFile:
    """A file without a name, gone with the last process that uses it.

    It lies in memory on Linux; elsewhere in the system's folder of temporary files.

    Args:
        layout: of the file.
        decode: gives the picture at a position; called by several threads.

    Raises:
        OSError: there is no room.
    """
    in_memory = hasattr(os, "memfd_create")
    file = os.fdopen(os.memfd_create("pictures"), "w+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
    _fill(file, layout, decode)
    return PixelFile(file, layout)


def made_on_disk(path: Path, layout: PixelLayout, decode: Callable[[int], Image]) -> PixelFile:
    """A file at `path`, written whole or not at all; arguments as `made_in_memory`.

    Raises:
        OSError, ResourceError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        file = open(temporary, "w+b")  # noqa: SIM115
        _fill(file, layout, decode)
    return PixelFile(file, layout)


def _fill(file: BinaryIO, layout: PixelLayout, decode: Callable[[int], Image]) -> None:
    _reserve(file, layout.bytes)
    sums = np.zeros(len(layout.shapes), "<u4")
    progress = tqdm(desc="filling the picture cache", total=len(sums), delay=2, disable=None)
    with progress, ThreadPoolExecutor(_threads()) as pool:
        for chunk in _chunks(range(len(sums))):
            for position, image in zip(chunk, pool.map(decode, chunk), strict=True):
                file.seek(layout.starts[position])
                file.write(np.ascontiguousarray(image))
                sums[position] = zlib.crc32(image)
                progress.update()
    file.seek(0)
    file.write(layout.header(sums.tobytes()) + sums.tobytes())
    file.flush()


def _reserve(file: BinaryIO, size: int) -> None:
    """Give a file its size and, where that can be done, its blocks: a full disk is an error now and not half way."""
    file.truncate(size)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as failure:
        if failure.errno in OUT_OF_RESOURCES:
            raise


def _chunks(positions: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(positions), CHUNK):
        yield positions[start : start + CHUNK]


def _table_end(count: int) -> int:
    return -(-(HEADER.size + 4 * count) // ALIGNMENT) * ALIGNMENT


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


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
