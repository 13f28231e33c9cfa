"""Picture files in and out, and pictures fitted to the input of the network.

A picture is decoded as OpenCV does by default, Exif orientation applied: that is the picture people see and label.
Before that, Pillow reads its header: a decoder allocates what the header asks for, and a PNG of 300 kB can ask for ten
gigabytes.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from utils.errors import DataError, ResourceError, SuiteError, is_out_of_memory
from utils.files import atomic_write_bytes, regular_file

Image = NDArray[np.uint8]
"""[H, W, 3] in RGB order, or [H, W, 1] grey."""
Channels = Literal[1, 3]
Shrink = Literal[1, 2, 4, 8]
Size = tuple[int, int]
"""Height and width."""

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes that a folder is searched for; a file that is named itself may have any suffix."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SIGNATURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|BM|RIFF....WEBP|GIF8[79]a|II\*\0|MM\0\*", re.DOTALL)
"""First bytes of a file in one of FORMATS."""
PNG_END = b"IEND\xaeB`\x82"
"""Last chunk of a PNG file, with its checksum. Without it libpng itself prints an error."""
MAX_PIXELS = 100_000_000
"""Largest picture decoded: 300 MB as RGB."""
SPARE = 1 << 24
"""Bytes of a file beside its pixels."""
JPEG_SCAN, MAX_SCANNED = b"\xff\xda", 15 * MAX_PIXELS
"""Marker of a scan, and how many pixels all scans of a JPEG may have together. A progressive JPEG has about 10 scans.

A file of 132 kB can have 2000 scans of 4096 × 4096 pixels."""
SAMPLE_FORMAT, SAMPLES = 0x0153, {2: "signed integers", 3: "floating-point numbers"}
"""Tag of TIFF, and its values that no decoder here makes a picture of."""
ORIENTATION, TURNED = 0x0112, range(5, 9)
"""Exif tag, and its values for a picture whose sides are swapped when it is shown. OpenCV ignores unknown values."""


class PictureError(DataError):
    """A picture that cannot be used; `kind` is a key of `findings.KINDS`."""

    def __init__(self, path: Path | str, kind: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.kind = kind

    def __reduce__(self) -> tuple[type[DataError], tuple[str]]:
        """From a worker process it arrives as a plain DataError with the same message."""
        return DataError, (str(self),)


def read_image(path: Path | str, channels: Channels = 3, *, shrink: Shrink = 1) -> Image:
    """Decode a picture file.

    Args:
        path: a regular file; its name may hold any byte.
        channels: 3 for RGB, 1 for grey. 16-bit, palette, CMYK and transparent pictures are converted.
        shrink: decode a JPEG at a half, a quarter or an eighth of its sides, which takes less time; other formats come
            at their own size.

    Returns:
        uint8 [H, W, channels], rotated as its Exif orientation asks.

    Raises:
        PictureError: missing, no regular file, unreadable, of an unknown format, too large, or not decodable.
        ResourceError: memory does not suffice.
    """
    with _header(path) as (file, picture):
        return _decode(_content(file, path, picture), path, channels, None if shrink > 1 else picture.size, shrink)


def check_image(path: Path | str) -> Size:
    """Height and width of the decoded picture; stricter than `read_image`, since half a JPEG decodes without an error.

    Raises:
        PictureError: as `read_image`; or the file is cut off or fails its checksums.
    """
    with _header(path) as (file, picture):
        pixels = file.tell()
        data, size = _content(file, path, picture), picture.size
        if picture.format == "PNG":
            picture.verify()  # the checksum of every chunk but the last
        elif picture.format == "MPO" or (picture.format == "JPEG" and not _is_whole_jpeg(data[pixels:])):
            picture.draft("L", (1, 1))  # at an eighth of its sides; the whole file is read all the same
            picture.load()
        if picture.format == "PNG" and PNG_END not in data:
            raise PictureError(path, "damaged image", f"no IEND chunk in {len(data)} bytes")
        height, width = _decode(data, path, 1, size).shape[:2]
    return height, width


def _is_whole_jpeg(pixels: bytes) -> bool:
    """Whether compressed pixels are of one scan and end with the marker of the end, without others but restarts.

    Then OpenCV reads as much as Pillow, which is stricter with all others. No pixels can hold a marker.
    """
    data = np.frombuffer(pixels, np.uint8)
    after = data[1:][data[:-1] == 0xFF]
    return after[(after != 0) & ((after < 0xD0) | (after > 0xD7))].tolist() == [0xD9]


def shown_size(path: Path | str) -> Size:
    """Height and width of a picture as it is shown, by its header and its Exif orientation.

    Raises:
        PictureError: as `read_image`, but for what only decoding would show.
    """
    with _header(path) as (_, picture):
        width, height = picture.size
        turned, exif = False, PIL.Image.Exif()  # getexif() would look into XMP, too, where OpenCV does not
        with suppress(Exception):  # damaged Exif data, of which Pillow raises many kinds and OpenCV none
            exif.load(picture.info.get("exif", b""))
            turned = exif.get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


def lower_suffix(path: Path | str) -> str:
    """Suffix of a file name in lower case, with its dot."""
    return os.path.splitext(path)[1].lower()


def write_image(path: Path | str, image: Image) -> None:
    """Write a picture atomically in the format of the suffix.

    Args:
        path: ends in one of `SUFFIXES`.
        image: uint8 [H, W, 3] RGB or [H, W, 1] grey.

    Raises:
        DataError: the suffix is of no format that can be written.
    """
    suffix = lower_suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: images are written as {', '.join(sorted(SUFFIXES))}")
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.shape[2] == 3 else image
    done, data = cv2.imencode(suffix, pixels)
    if not done:
        raise DataError(f"{path}: a {image.shape[1]}x{image.shape[0]} image cannot be written as {suffix}")
    atomic_write_bytes(path, data.tobytes())


@contextmanager
def _header(path: Path | str) -> Iterator[tuple[BinaryIO, PIL.Image.Image]]:
    """An open picture file, and Pillow's view of its header; what Pillow raises in the block means damage.

    Raises:
        PictureError: as `read_image`.
    """
    with _opened(path) as file:
        if not SIGNATURE.match(head := file.read(30)):
            raise PictureError(path, "unknown image format", "not a PNG, JPEG, BMP, WebP, GIF or TIFF file")
        if head.startswith(b"RIFF"):  # before Pillow, which takes memory for all pixels when it opens one
            _check_size(path, *_webp_size(head))
        file.seek(0)
        silence_decoders()
        try:
            _check_samples(file, path)
            with PIL.Image.open(file, formats=FORMATS) as picture:
                _check_size(path, *picture.size)
                yield file, picture
        except (SuiteError, MemoryError):
            raise
        except PIL.UnidentifiedImageError:
            raise PictureError(path, "damaged image", "the header is cut off or contradicts itself") from None
        except Exception as failure:  # Pillow raises many kinds on damaged files
            raise PictureError(path, "damaged image", str(failure)) from None


def _check_size(path: Path | str, width: int, height: int) -> None:
    if height * width > MAX_PIXELS:
        detail = f"{width}x{height} pixels; at most {MAX_PIXELS} pixels are decoded"
        raise PictureError(path, "oversized image", detail)


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height in the first 30 bytes of a WebP file (RFC 9649, sections 2.5 to 2.7)."""
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    start, extra = (21, 1) if head[12:16] == b"VP8L" else (26, 0)
    bits = int.from_bytes(head[start : start + 4], "little")
    return (bits & 0x3FFF) + extra, (bits >> (14 + 2 * (1 - extra)) & 0x3FFF) + extra


def _check_samples(file: BinaryIO, path: Path | str) -> None:
    """Refuse a TIFF of other values than unsigned integers: their range, and so their brightness, is not known.

    Raises:
        PictureError: says which values it has.
    """
    if (start := file.read(8))[:2] in (b"II", b"MM"):
        tags = ImageFileDirectory_v2(start)
        file.seek(tags.next)
        tags.load(file)
        if kind := SAMPLES.get(tags.get(SAMPLE_FORMAT, (1,))[0]):
            raise PictureError(path, "unsupported pixel values", f"a TIFF of {kind}; unsigned 8 or 16 bits can be read")
    file.seek(0)


@cache
def silence_decoders() -> None:
    """Keep Pillow, OpenCV and FFmpeg from printing: damage is reported once, by who reads or writes the file.

    It is cached, since a new filter of warnings repeats every other warning.
    """
    warnings.filterwarnings("ignore", module="PIL")
    PIL.Image.MAX_IMAGE_PIXELS = None  # the limit is MAX_PIXELS
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET; looked at when FFmpeg is used first
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _opened(path: Path | str) -> BinaryIO:
    """A regular file that may hold a picture of at most MAX_PIXELS pixels."""
    try:
        size = regular_file(path, DataError).st_size
    except DataError as failure:
        kind = "not a file" if os.path.exists(path) else "missing image"
        raise PictureError(path, kind, str(failure).removeprefix(f"{path}: ")) from None
    if size == 0:
        raise PictureError(path, "empty image", "an empty file")
    if size > 8 * MAX_PIXELS + SPARE:  # 16-bit RGBA, uncompressed
        raise PictureError(path, "oversized image", f"{size} bytes for an image of at most {MAX_PIXELS} pixels")
    try:
        return open(path, "rb")
    except OSError as failure:
        raise PictureError(path, "unreadable image", (failure.strerror or "cannot be read").lower()) from None


def _content(file: BinaryIO, path: Path | str, picture: PIL.Image.Image) -> bytes:
    """Bytes of a picture file whose decoding takes seconds, not hours.

    Raises:
        PictureError: a JPEG goes over its pixels too often, or a PNG has data for many more.
    """
    file.seek(0)
    data, (width, height) = file.read(), picture.size
    scans = data.count(JPEG_SCAN) if data.startswith(b"\xff\xd8") else 1
    if scans * width * height > MAX_SCANNED:
        detail = f"{scans} scans of {width}x{height} pixels; at most {MAX_SCANNED} pixels are scanned"
        raise PictureError(path, "oversized image", detail)
    if picture.format == "PNG" and len(data) > 8 * width * height + SPARE:
        raise PictureError(path, "oversized image", f"{len(data)} bytes for {width}x{height} pixels")
    return data


def _decode(data: bytes, path: Path | str, channels: Channels, size: Size | None, shrink: Shrink = 1) -> Image:
    """The decoded picture, compared with the sides in its header where these are given."""
    reduced = shrink > 1 and data.startswith(b"\xff\xd8")
    flag = getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{shrink}") if reduced else cv2.IMREAD_GRAYSCALE
    if channels == 3:
        flag |= cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except Exception as failure:  # a cv2.error, or a SystemError of its binding
        if is_out_of_memory(failure):
            raise ResourceError(f"{path}: not enough memory to decode it") from None
        image = None
    if image is None:
        raise PictureError(path, "damaged image", "cannot be decoded")
    if size is not None and sorted(image.shape[:2]) != sorted(size):  # Exif may have turned it
        detail = f"its header says {size[0]}x{size[1]} pixels, its data are {image.shape[1]}x{image.shape[0]}"
        raise PictureError(path, "damaged image", detail)
    return cast("Image", image if channels == 3 else image[..., None])


FitMode = Literal["letterbox", "stretch"]
GREY = 114
"""Value of the border of a letterbox, the field's convention for nets of this family."""


class Fit(NamedTuple):
    """Position of a picture in the input of the network."""

    original: tuple[int, int]
    """Height and width of the picture."""
    size: tuple[int, int]
    """Height and width of the input."""
    inner: tuple[int, int]
    """Height and width of the picture in the input."""
    left: int
    top: int


def place(original: tuple[int, int], size: tuple[int, int], mode: FitMode = "letterbox") -> Fit:
    """Position that `fit` gives a picture of `original` height and width in an input of `size` height and width.

    "letterbox" keeps the aspect ratio and centres the picture, "stretch" fills the input.
    """
    height, width = fitted_sizes(np.array([original]), size, mode)[0].tolist()
    return Fit(original, size, (height, width), (size[1] - width) // 2, (size[0] - height) // 2)


def fitted_sizes(shapes: NDArray[np.int64], size: Size, mode: FitMode = "letterbox") -> NDArray[np.int64]:
    """Heights and widths of pictures inside the input.

    Args:
        shapes: [N, 2], height and width of the pictures.
        size: height and width of the input.
        mode: "letterbox" or "stretch".

    Returns:
        [N, 2], whole pixels, at least 1.
    """
    if mode == "stretch":
        return np.tile(size, (len(shapes), 1))
    if mode != "letterbox":
        raise ValueError(f"an image is fitted by letterbox or stretch, not {mode!r}")
    scales = (size / shapes).min(1, keepdims=True)
    return np.maximum(np.round(shapes * scales), 1).astype(np.int64)


def fit(image: NDArray[np.uint8], size: tuple[int, int], mode: FitMode = "letterbox") -> tuple[NDArray[np.uint8], Fit]:
    """Fit a picture to the input of the network by bilinear interpolation.

    Args:
        image: uint8 [H, W, C].
        size: height and width of the input.
        mode: "letterbox" (border 114) or "stretch".

    Returns:
        uint8 [h, w, C], and where the picture lies in it.
    """
    placed = place(image.shape[:2], size, mode)
    return paste(image, placed), placed


def paste(image: NDArray[np.uint8], placed: Fit) -> NDArray[np.uint8]:
    """The input of the network with a picture where `placed` says.

    Args:
        image: uint8 [H, W, C], at any resolution.
        placed: of `place`.

    Returns:
        uint8 [h, w, C]; the picture itself if it needs no change.
    """
    channels, inner = image.shape[2], placed.inner
    if inner != image.shape[:2]:
        resized = cv2.resize(image, inner[::-1], interpolation=cv2.INTER_LINEAR)
        image = cast("Image", resized.reshape(*inner, channels))  # OpenCV drops a single channel
    if inner == placed.size:
        return image
    canvas = np.full((*placed.size, channels), GREY, np.uint8)
    canvas[placed.top : placed.top + inner[0], placed.left : placed.left + inner[1]] = image
    return canvas


def unfit(boxes: NDArray[np.floating], fit: Fit) -> NDArray[np.floating]:
    """Boxes in pixels of the input → boxes in pixels of the original picture, clipped to it.

    Args:
        boxes: [n, 4], x1, y1, x2, y2.
        fit: what `fit` or `place` returned.

    Returns:
        [n, 4], same format and type.
    """
    (height, width), inner = fit.original, fit.inner
    scales = inner[1] / width, inner[0] / height  # of whole pixels, so boxes follow exactly
    moved = (boxes - (fit.left, fit.top) * 2) / (scales * 2)
    return np.clip(moved, 0, (width, height) * 2).astype(boxes.dtype)


class Packed(Sequence[Any]):
    """Arrays of many pictures, one after the other in one array.

    A million Python objects would take more memory than their content, and workers would copy them: who reads an
    object changes its reference count, and so the page of memory that it lies in.
    """

    empty: NDArray[Any]
    """Array without rows, of the shape and type of all others."""

    def __init__(self, parts: Iterable[NDArray[Any]]) -> None:
        parts = list(parts)
        self.rows = np.concatenate([self.empty, *parts])
        """All of them."""
        self.bounds = np.cumsum([0, *map(len, parts)])
        """[N + 1]: start of each array in the rows, and the end of the last one."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, position: int) -> Any:  # type: ignore[override]  # no slices
        start, stop = self.bounds[range(len(self))[position] :][:2].tolist()
        return self.rows[start:stop]


class PackedBoxes(Packed):
    """Boxes [n, 5] of each picture."""

    empty = np.zeros((0, 5), np.float32)

    @property
    def counts(self) -> NDArray[np.int64]:
        """[N]: number of boxes of each picture."""
        return np.diff(self.bounds)

    def gather(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Copy of the boxes [n, 5] of some pictures, and for each box the number [n] of its picture among them."""
        starts = self.bounds[positions]
        counts = self.bounds[positions + 1] - starts
        owners = np.repeat(np.arange(len(positions)), counts)
        return self.rows[np.arange(len(owners)) + (starts + counts - np.cumsum(counts))[owners]], owners


class PackedPaths(Packed):
    """Path of each picture, as bytes."""

    empty = np.zeros(0, np.uint8)

    def __init__(self, paths: Iterable[Path | str]) -> None:
        super().__init__(np.frombuffer(os.fsencode(path), np.uint8) for path in paths)

    def __getitem__(self, position: int) -> Path:  # type: ignore[override]
        return Path(os.fsdecode(super().__getitem__(position).tobytes()))
