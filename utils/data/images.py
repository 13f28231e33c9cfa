"""Picture files in and out: RGB arrays of bytes, whatever the format, bit depth and file name.

A picture is decoded as OpenCV does by default, Exif orientation applied: that is the picture people see and label.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.data.headers import HeaderError, UnknownFormatError, incomplete, picture_size
from utils.errors import DataError, ResourceError
from utils.files import atomic_write_bytes, regular_file

Image = NDArray[np.uint8]
"""[H, W, 3] in RGB order, or [H, W, 1] grey."""
Channels = Literal[1, 3]
Shrink = Literal[1, 2, 4, 8]
Size = tuple[int, int]
"""Height and width."""

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""What a folder is searched for; a file that is named itself may have any suffix."""
GREY_FLAGS: Mapping[Shrink, int] = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
"""How OpenCV is asked for a grey picture at a fraction of its sides; with IMREAD_COLOR_RGB (OpenCV 4.11) for RGB."""
MAX_PIXELS = 100_000_000
"""Largest picture decoded by default: 300 MB as RGB."""


class PictureError(DataError):
    """A picture that cannot be used; `kind` is a key of `labels.KINDS`."""

    def __init__(self, path: Path | str, kind: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.kind = kind

    def __reduce__(self) -> tuple[type[DataError], tuple[str]]:
        """From a worker process it arrives as a plain DataError with the same message."""
        return DataError, (str(self),)


def read_image(path: Path | str, channels: Channels = 3, max_pixels: int = MAX_PIXELS, *, shrink: Shrink = 1) -> Image:
    """Decode a picture file.

    Args:
        path: a regular file; its name may hold any byte.
        channels: 3 for RGB, 1 for grey. 16-bit, palette, CMYK and transparent pictures are converted.
        max_pixels: a header that states more is refused before decoding.
        shrink: decode a JPEG at a half, a quarter or an eighth of its sides, which takes less time; other formats come
            at their own size.

    Returns:
        uint8 [H, W, channels], rotated as its Exif orientation asks.

    Raises:
        PictureError: missing, no regular file, unreadable, of an unknown format, too large, or not decodable.
    """
    return decode(_read(path, max_pixels), path, channels, max_pixels, shrink=shrink)


def check_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> Size:
    """Height and width of the decoded picture; stricter than `read_image`, since half a JPEG decodes without an error.

    Raises:
        PictureError: as `read_image`; or the file is cut off or fails its checksums.
    """
    data = _read(path, max_pixels)
    stated = _stated_size(data, path, max_pixels)
    try:
        flaw = incomplete(data)
    except (ValueError, IndexError) as failure:
        flaw = str(failure)
    if flaw:
        raise PictureError(path, "damaged image", flaw)
    height, width = decode(data, path, 1, max_pixels).shape[:2]
    if stated not in ((height, width), (width, height)):
        raise PictureError(
            path, "damaged image", f"the header says {stated[1]}x{stated[0]} pixels, the picture has {width}x{height}"
        )
    return height, width


def decode(
    data: bytes,
    path: Path | str,
    channels: Channels = 3,
    max_pixels: int = MAX_PIXELS,
    *,
    shrink: Shrink = 1,
) -> Image:
    """Picture in the bytes of a file; `path` is for messages. Arguments, result and errors as `read_image`."""
    _stated_size(data, path, max_pixels)
    flag = GREY_FLAGS[shrink if data.startswith(b"\xff\xd8") else 1]
    if channels == 3:
        flag |= cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error as failure:
        if failure.code == cv2.Error.StsNoMem:
            raise ResourceError(f"{path}: not enough memory to decode it") from None
        image = None
    if image is None:
        raise PictureError(path, "damaged image", "cannot be decoded")
    return image if channels == 3 else image[..., None]


def write_image(path: Path | str, image: Image) -> None:
    """Write a picture atomically in the format of the suffix.

    Args:
        path: ends in one of `SUFFIXES`.
        image: uint8 [H, W, 3] RGB or [H, W, 1] grey.

    Raises:
        DataError: the suffix is of no format that can be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: pictures are written as {', '.join(sorted(SUFFIXES))}")
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.shape[2] == 3 else image
    done, data = cv2.imencode(suffix, pixels)
    if not done:
        raise DataError(f"{path}: a {image.shape[1]}x{image.shape[0]} picture cannot be written as {suffix}")
    atomic_write_bytes(path, data.tobytes())


def _read(path: Path | str, max_pixels: int) -> bytes:
    """Bytes of a regular file that may hold a picture of at most `max_pixels` pixels."""
    try:
        size = regular_file(path, DataError).st_size
    except DataError as failure:
        kind = "not a file" if os.path.exists(path) else "missing image"
        raise PictureError(path, kind, str(failure).removeprefix(f"{path}: ")) from None
    if size == 0:
        raise PictureError(path, "empty image", "an empty file")
    if size > 8 * max_pixels + (1 << 24):  # 16-bit RGBA, uncompressed, and 16 MB of anything else
        raise PictureError(path, "oversized image", f"{size} bytes for a picture of at most {max_pixels} pixels")
    try:
        return Path(path).read_bytes()
    except OSError as failure:
        raise PictureError(path, "unreadable image", (failure.strerror or "cannot be read").lower()) from None


def _stated_size(data: bytes, path: Path | str, max_pixels: int) -> Size:
    try:
        height, width = picture_size(data)
    except HeaderError as failure:
        kind = "unknown image format" if isinstance(failure, UnknownFormatError) else "damaged image"
        raise PictureError(path, kind, str(failure)) from None
    if height * width > max_pixels:
        raise PictureError(path, "oversized image", f"{width}x{height} pixels; at most {max_pixels} pixels are decoded")
    return height, width


FitMode = Literal["letterbox", "stretch"]
GREY = 114
"""Value of the border of a letterbox, the field's convention for nets of this family."""


class Fit(NamedTuple):
    """Where a picture lies in the input of the network: x_input = x * scale_x + left, y_input = y * scale_y + top."""

    original: tuple[int, int]
    """Height and width of the picture."""
    size: tuple[int, int]
    """Height and width of the input."""
    scale_x: float
    scale_y: float
    left: int
    top: int


def place(original: tuple[int, int], size: tuple[int, int], mode: FitMode = "letterbox") -> Fit:
    """Where `fit` puts a picture of `original` height and width in an input of `size` height and width.

    "letterbox" keeps the aspect ratio and centres the picture, "stretch" fills the input. The scales are those of the
    whole pixels that the picture covers, so boxes follow exactly.
    """
    (height, width), (input_height, input_width) = original, size
    if mode == "stretch":
        return Fit(original, size, input_width / width, input_height / height, 0, 0)
    if mode != "letterbox":
        raise ValueError(f"a picture is fitted by letterbox or stretch, not {mode!r}")
    scale = min(input_height / height, input_width / width)
    inner_height, inner_width = max(round(height * scale), 1), max(round(width * scale), 1)
    left, top = (input_width - inner_width) // 2, (input_height - inner_height) // 2
    return Fit(original, size, inner_width / width, inner_height / height, left, top)


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
    channels, inner = image.shape[2], inner_size(placed)
    if inner != image.shape[:2]:
        resized = cv2.resize(image, inner[::-1], interpolation=cv2.INTER_LINEAR)
        image = resized.reshape(*inner, channels)  # OpenCV drops a single channel
    if inner == placed.size:
        return image
    canvas = np.full((*placed.size, channels), GREY, np.uint8)
    canvas[placed.top : placed.top + inner[0], placed.left : placed.left + inner[1]] = image
    return canvas


def inner_size(placed: Fit) -> tuple[int, int]:
    """Height and width of the picture inside the input."""
    return round(placed.original[0] * placed.scale_y), round(placed.original[1] * placed.scale_x)


def unfit(boxes: NDArray[np.floating], fit: Fit) -> NDArray[np.floating]:
    """Boxes in pixels of the input → boxes in pixels of the original picture, clipped to it.

    Args:
        boxes: [n, 4], x1, y1, x2, y2.
        fit: what `fit` or `place` returned.

    Returns:
        [n, 4], same format and type.
    """
    height, width = fit.original
    moved = (boxes - (fit.left, fit.top) * 2) / ((fit.scale_x, fit.scale_y) * 2)
    return np.clip(moved, 0, (width, height) * 2).astype(boxes.dtype)
