"""How large a picture is, and whether its file is whole, told from the bytes before anything is decoded.

A decoder allocates what the header asks for: a PNG of 300 kB can ask for ten gigabytes. The size is therefore read here
first, for the formats below; a format whose size cannot be told is not decoded at all. Wholeness is checked here, too,
because OpenCV decodes half a JPEG without an error and fills the rest with grey.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable

Size = tuple[int, int]
"""Height and width as stored; a decoder that obeys an Exif orientation may swap them."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG segments that hold the size; 0xC4 (Huffman), 0xC8 (reserved) and 0xCC (arithmetic) do not."""
JPEG_START_OF_SCAN, JPEG_END_OF_IMAGE = 0xDA, 0xD9
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
"""A marker amid compressed data, where 0xFF is followed by 0 if it is data, by 0xD0..0xD7 if it is a restart."""


class HeaderError(ValueError):
    """A header that ends early or contradicts itself."""


class UnknownFormatError(HeaderError):
    """The bytes are no picture of a known format."""


def picture_size(data: bytes) -> Size:
    """Height and width that the header of a PNG, JPEG, BMP, WebP, GIF or TIFF file states.

    Raises:
        UnknownFormatError: another format.
        HeaderError: the header ends early, contradicts itself or states a side of 0.
    """
    read_size = next((read_size for signature, read_size in _FORMATS if signature.match(data)), None)
    if read_size is None:
        raise UnknownFormatError("not a PNG, JPEG, BMP, WebP, GIF or TIFF file")
    try:
        height, width = read_size(data)
    except (struct.error, IndexError):
        raise HeaderError("the header ends early") from None
    if height <= 0 or width <= 0:
        raise HeaderError(f"the header says {width}x{height} pixels")
    return height, width


def incomplete(data: bytes) -> str | None:
    """What is missing or damaged in a file whose header was read by `picture_size`; None if nothing was found.

    JPEG: every scan must be followed by markers up to the end-of-image marker. PNG: every chunk's checksum, up to IEND.
    BMP, WebP: the length that the header promises. GIF and TIFF are judged by the decoder alone.
    """
    if data.startswith(b"\xff\xd8"):
        return _incomplete_jpeg(data)
    if data.startswith(PNG_SIGNATURE):
        return _incomplete_png(data)
    if data.startswith(b"BM"):
        return _incomplete_bmp(data)
    if data.startswith(b"RIFF"):
        promised = 8 + struct.unpack_from("<I", data, 4)[0]
        return f"ends after {len(data)} of {promised} bytes" if len(data) < promised else None
    return None


def _png_size(data: bytes) -> Size:
    if data[12:16] != b"IHDR":
        raise HeaderError("a PNG file without IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _jpeg_size(data: bytes) -> Size:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise HeaderError(f"a JPEG file with byte 0x{data[at]:02x} where a marker should be")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        elif marker in (JPEG_START_OF_SCAN, JPEG_END_OF_IMAGE):
            raise HeaderError("a JPEG file without a frame header")
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _bmp_size(data: bytes) -> Size:
    if struct.unpack_from("<I", data, 14)[0] == 12:  # the header of OS/2
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(height), width  # a negative height means: the top row first


def _gif_size(data: bytes) -> Size:
    width, height = struct.unpack_from("<HH", data, 6)
    return height, width


def _webp_size(data: bytes) -> Size:
    kind = data[12:16]
    if kind == b"VP8X":
        sides = data[24:30]
        return int.from_bytes(sides[3:6], "little") + 1, int.from_bytes(sides[:3], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    raise HeaderError("a WebP file without a picture")


def _tiff_size(data: bytes) -> Size:
    order = "<" if data[:2] == b"II" else ">"
    directory = struct.unpack_from(order + "I", data, 4)[0]
    sides = {}
    for entry in range(struct.unpack_from(order + "H", data, directory)[0]):
        tag, kind = struct.unpack_from(order + "HH", data, directory + 2 + 12 * entry)
        if tag in (256, 257):  # ImageWidth, ImageLength: SHORT (3) or LONG (4)
            sides[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, directory + 10 + 12 * entry)[0]
    if len(sides) < 2:
        raise HeaderError("a TIFF file without width and height")
    return sides[257], sides[256]


_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Size]], ...] = (
    (re.compile(re.escape(PNG_SIGNATURE)), _png_size),
    (re.compile(rb"\xff\xd8\xff"), _jpeg_size),
    (re.compile(rb"BM"), _bmp_size),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _webp_size),
    (re.compile(rb"GIF8[79]a"), _gif_size),
    (re.compile(rb"II\*\x00|MM\x00\*"), _tiff_size),
)


def _incomplete_jpeg(data: bytes) -> str | None:
    """Walk from marker to marker; compressed data between them are skipped, bytes after the end are not looked at."""
    at = 2
    while match := JPEG_MARKER.search(data, at):
        marker = match[1][0]
        if marker == JPEG_END_OF_IMAGE:
            return None
        at = match.end()
        if at + 2 > len(data):
            break
        at += struct.unpack_from(">H", data, at)[0]
    return f"no end-of-image marker in {len(data)} bytes"


def _incomplete_png(data: bytes) -> str | None:
    at, view = len(PNG_SIGNATURE), memoryview(data)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return f"wrong checksum in chunk {kind.decode('ascii', 'backslashreplace')} at byte {at}"
        if kind == b"IEND":
            return None
        at = end + 4
    return f"no IEND chunk in {len(data)} bytes"


def _incomplete_bmp(data: bytes) -> str | None:
    """An uncompressed bitmap has its rows, padded to 4 bytes, from the offset on that the header states."""
    start, header = struct.unpack_from("<II", data, 10)
    height, width = _bmp_size(data)
    bits = struct.unpack_from("<H", data, 24 if header == 12 else 28)[0]
    compression = 0 if header == 12 else struct.unpack_from("<I", data, 30)[0]
    promised = start + (width * bits + 31) // 32 * 4 * height
    if compression in (0, 3) and len(data) < promised:  # BI_RGB, BI_BITFIELDS
        return f"ends after {len(data)} of {promised} bytes"
    return None
