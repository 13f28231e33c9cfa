"""The pictures of a data set at the size that samples are made from, decoded when needed or kept for all processes.

A picture is the same bytes whether it is kept or not, so a cache changes the speed of a training and nothing else. Kept
pictures lie in one mapped file: in memory, or on the disk for the next run. The file is a header and the pixels of one
picture after the other. Its header has a key of all that the pixels were made from, and their CRC-32; a file with
another header or size is not used. What the file holds is taken as numbers and as nothing else.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.cli import ProgressBar, log
from utils.data.images import Channels, FitMode, Image, Shrink, Size, fitted_sizes, read_image
from utils.data.index import Index, default_folder, stamp
from utils.errors import DataError, ResourceError
from utils.files import atomic_path, regular_file

CacheKind = Literal["ram", "disk"]
MAGIC = b"DKPIXEL3"
"""First bytes of a file; the last of them is the version of this format."""
HEADER_SIZE = 44
"""Bytes of MAGIC, 32 bytes of key, and CRC-32 of the pixels."""
CHUNK = 256
"""Pictures decoded before they are written, so that a slow disk does not fill the memory."""
BLOCK = 1 << 24
"""Bytes of pixels checked between two steps of the progress bar."""
FREE_SHARE = 0.9
"""Share of the free memory or disk that pictures may take."""
STALE = 3600.0
"""Age in seconds at which an unfinished file counts as left by a killed process; one at work writes all the time."""


class PixelLayout(NamedTuple):
    """Contents of a file of pictures."""

    shapes: NDArray[np.int64]
    """[N, 3], height, width and channels of the pictures."""
    key: bytes
    """32 bytes that tell these pictures from all others."""

    bounds: NDArray[np.int64]
    """[N + 1]: start of each picture in the pixels, and the end of the last one."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_SIZE + int(self.bounds[-1])

    def header(self, checksum: int) -> bytes:
        """First bytes of the file when its pixels have this CRC-32."""
        return MAGIC + self.key + checksum.to_bytes(4, "little")


class KeptPictures(NamedTuple):
    """The pictures of an open file; a forked process has the same memory."""

    file: BinaryIO
    layout: PixelLayout
    pixels: NDArray[np.uint8]
    """Of all pictures, one after the other; read-only."""

    def image(self, position: int) -> Image:
        """Read-only picture [H, W, C]."""
        part = self.pixels[slice(*self.layout.bounds[position : position + 2].tolist())]
        return part.reshape(self.layout.shapes[position])

    @property
    def address(self) -> str:
        """Path under which another process of this machine and user can open the file while this one has it open."""
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}"


class PictureStore:
    """Pictures by position, each no larger than it is fitted to the input.

    Args:
        index: the pictures.
        channels: 3 for RGB, 1 for grey.
        size: height and width of the input.
        mode: how a picture is fitted to it.
        exact: pictures are as `fit` would make them of the whole picture. Otherwise, a JPEG is decoded at a half, a
            quarter or an eighth of its sides where these are not below the fitted size.
    """

    def __init__(
        self, index: Index, channels: Channels, size: Size, mode: FitMode = "letterbox", *, exact: bool = True
    ) -> None:
        self.index, self.channels, self.size, self.mode, self.exact = index, channels, size, mode, exact
        fitted = fitted_sizes(index.shapes, size, mode)
        self.shapes = np.where((fitted <= index.shapes).all(1, keepdims=True), fitted, index.shapes)
        """[N, 2], height and width of the pictures that `read` returns."""
        self._kept: KeptPictures | None = None
        self._held: dict[int, Image] = {}

    def keep(self, kind: CacheKind, folder: Path | None = None) -> None:
        """Decode all pictures once. Where they cannot be kept, one line says so, and they are decoded when needed.

        Args:
            kind: "ram": in memory, until the last process ends that uses them; "disk": in a file, for later runs, too.
            folder: of the file; None: the user's cache folder. Made if missing.

        Raises:
            PictureError: a picture cannot be read any more.
        """
        layout = self._layout()
        try:
            self._kept = self._in_memory(layout) if kind == "ram" else self._on_disk(layout, folder)
        except OSError as error:
            why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            log(f"--cache {kind}: {why}; images are decoded each time they are needed")

    @property
    def address(self) -> str:
        """Path by which another process of this machine opens what this one keeps; empty: it keeps nothing."""
        return self._kept.address if self._kept is not None else ""

    def join(self, address: str) -> None:
        """Use the pictures that another process keeps; if they are not there, decode them when needed."""
        if address:
            self._kept = _read_file(address, self._layout(), check=False)

    def read(self, position: int) -> Image:
        """Picture [H, W, C], shrunk to its fitted size if it is larger; not to be written to.

        Raises:
            PictureError: it cannot be read (any more).
        """
        if self._kept is not None:
            return self._kept.image(position)
        if position not in self._held:
            self._held[position] = self._decoded(position)
        return self._held[position]

    def drop(self, keep: Collection[int] = ()) -> None:
        """Drop what was decoded since the last call, except for pictures that are needed again."""
        self._held = {position: image for position, image in self._held.items() if position in keep}

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is not forked, and decodes for itself."""
        return {**vars(self), "_kept": None, "_held": {}}

    def _decoded(self, position: int) -> Image:
        height, width = self.shapes[position].tolist()
        spare = (self.index.shapes[position] / (height, width)).min()
        shrink: Shrink = 1 if self.exact else next((by for by in (8, 4, 2) if spare >= by), 1)
        image = read_image(self.index.images[position], self.channels, shrink=shrink)
        if image.shape[:2] == (height, width):
            return image
        image = cast("Image", cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))
        return image.reshape(height, width, self.channels)

    def _layout(self) -> PixelLayout:
        """Shapes of the pictures, and a key of all that their pixels depend on."""
        shapes = np.insert(self.shapes, 2, self.channels, axis=1)
        stamps = [stamp(str(path)) for path in self.index.images]
        versions = self._name(), MAGIC, cv2.__version__
        key = hashlib.sha256(repr((versions, stamps)).encode() + shapes.tobytes()).digest()
        return PixelLayout(shapes, key, np.concatenate([[0], shapes.prod(1).cumsum()]))

    def _name(self) -> str:
        """Name of the file: of the paths and the input, so that an edited data set replaces its own file."""
        paths = b"\0".join(os.path.abspath(os.fsencode(path)) for path in self.index.images)
        wanted = MAGIC, self.channels, *self.size, self.mode, self.exact
        return f"pixels-{hashlib.sha256(repr(wanted).encode() + paths).hexdigest()[:32]}.bin"

    def _in_memory(self, layout: PixelLayout) -> KeptPictures:
        """A file without a name, gone with the last process that uses it; on Linux in memory."""
        _check_room("memory", layout.size, _free_memory())
        in_memory = hasattr(os, "memfd_create")
        file = os.fdopen(os.memfd_create("pictures"), "w+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
        self._fill(file, layout)
        return _mapped(file, layout)

    def _on_disk(self, layout: PixelLayout, folder: Path | None) -> KeptPictures:
        folder = folder or default_folder()
        if folder is None:
            raise ResourceError("there is no home folder; name one with --cache-dir")
        path = folder / self._name()
        if (kept := _read_file(path, layout, check=True)) is not None:
            return kept
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path)
        _check_room(str(folder), layout.size, _free_disk(folder))
        with atomic_path(path) as temporary:
            file = open(temporary, "w+b")  # noqa: SIM115
            self._fill(file, layout)
        log(f"{path}: {layout.size / 1e6:.0f} MB of decoded images for this and later runs")
        return _mapped(file, layout)

    def _fill(self, file: BinaryIO, layout: PixelLayout) -> None:
        file.write(bytes(HEADER_SIZE))  # a killed process leaves no header that fits
        count, checksum = len(self.index), 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            chunks = (pool.map(self._decoded, range(i, min(i + CHUNK, count))) for i in range(0, count, CHUNK))
            images = chain.from_iterable(chunks)
            for image in ProgressBar("filling the image cache", images, count, "images"):
                image = np.ascontiguousarray(image)
                file.write(image.data)
                checksum = zlib.crc32(image.data, checksum)
        file.seek(0)
        file.write(layout.header(checksum))
        file.flush()


def _mapped(file: BinaryIO, layout: PixelLayout) -> KeptPictures:
    """The pictures of an open file, which is as large as its layout says."""
    memory = mmap.mmap(file.fileno(), layout.size, access=mmap.ACCESS_READ)
    pixels = np.frombuffer(memory, np.uint8, offset=HEADER_SIZE)
    return KeptPictures(file, layout, pixels)


def _read_file(path: Path | str, layout: PixelLayout, *, check: bool) -> KeptPictures | None:
    """The pictures at a path; None if there are none, or the file is not whole or of other pictures.

    Args:
        path: of the file.
        layout: that it is expected to have.
        check: read all of its pixels; False where another process has just done so.
    """
    try:
        if regular_file(path, DataError).st_size != layout.size:
            return None
        file = open(path, "rb")  # noqa: SIM115
        header = file.read(HEADER_SIZE)
        kept = _mapped(file, layout)
    except (DataError, OSError, ValueError):
        return None
    if not header.startswith(MAGIC + layout.key):
        return None
    checksum = 0
    blocks = range(0, len(kept.pixels), BLOCK) if check else ()
    for start in ProgressBar("checking the image cache", blocks):
        checksum = zlib.crc32(kept.pixels[start : start + BLOCK].data, checksum)
    return kept if not check or header == layout.header(checksum) else None


def _check_room(where: str, needed: int, free: int) -> None:
    if needed > FREE_SHARE * free:
        raise ResourceError(f"{where}: {free / 1e9:.3f} GB are free, the images take {needed / 1e9:.3f} GB")


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _free_memory() -> int:
    """Bytes that can be had without swapping, as the kernel estimates."""
    with suppress(OSError):
        if match := re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(match[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _remove_unfinished(path: Path) -> None:
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > STALE:
                temporary.unlink()
