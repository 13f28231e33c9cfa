"""Decoded pictures in one mapped file that all processes share: in memory, or on the disk for the next run.

The file is a header, a table of CRC-32 sums, and the pixels of every picture at a multiple of ALIGNMENT bytes. The
header holds the key of what the pixels were made from; a file with another header, size or sum is not used. What the
file holds is taken as numbers and as nothing else.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from utils.data.images import Image
from utils.errors import OUT_OF_RESOURCES, DataError
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
