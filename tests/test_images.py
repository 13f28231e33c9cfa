"""Picture files: sizes from headers, damage, any format and file name."""

from __future__ import annotations

import os
import random
import resource
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from utils.data import images
from utils.data.images import PictureError, check_image, read_image, shown_size, write_image
from utils.errors import DataError

EXACT = [".png", ".bmp", ".webp", ".tif"]
SUFFIXES = [*EXACT, ".jpg", ".gif"]
NAMES = ("two words", "line\nbreak", "-dash", "'quote\"", "ключ ✓ 图", "🙂", "a" * 251, os.fsdecode(b"byte-\xff"))


@pytest.fixture
def picture():
    """[30, 50, 3]: orange in the upper left corner, blue elsewhere."""
    image = np.full((30, 50, 3), (0, 40, 240), np.uint8)
    image[:12, :20] = (250, 120, 0)
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes) -> bytes:
    """A grey PNG of one bit a pixel whose header may lie about the packed rows that follow."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    """An Exif block that says nothing but the orientation."""
    return b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1" + struct.pack(">HH", orientation, 0) + b"\0\0\0\0"


def oriented_jpeg(image: np.ndarray, orientation: int) -> bytes:
    data = cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()
    segment = b"Exif\0\0" + exif(orientation)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def assert_refused(path: Path | str, kind: str, match: str = "", reads=(check_image,)) -> None:
    """Each way to read a file says what kind of flaw it has."""
    for read in reads:
        with pytest.raises(PictureError, match=match) as caught:
            read(path)
        assert caught.value.kind == kind


@pytest.mark.parametrize("name", [*(f"a{suffix}" for suffix in EXACT), *(f"{name}.png" for name in NAMES)])
def test_reading_undoes_writing_whatever_a_file_is_called(name, picture, tmp_path):
    write_image(tmp_path / name, picture)
    np.testing.assert_array_equal(read_image(tmp_path / name), picture)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_header_states_the_size_of_the_decoded_picture(suffix, picture, tmp_path):
    path = tmp_path / f"a{suffix}"
    write_image(path, picture)
    assert shown_size(path) == check_image(path) == (30, 50)
    shrunk = (15, 25) if suffix == ".jpg" else (30, 50)
    assert read_image(path, shrink=2).shape == (*shrunk, 3) and read_image(path, 1, shrink=2).shape == (*shrunk, 1)
    assert read_image(path, 1).shape == (30, 50, 1)


def test_every_kind_of_pixel_becomes_three_bytes(picture, tmp_path):
    """Grey, transparent, 16 bits."""
    for pixels in (picture[..., 0], np.dstack([picture, picture[..., 0]]), picture.astype(np.uint16) * 257):
        path = tmp_path / "a.png"
        path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        image = read_image(path)
        assert image.shape == (30, 50, 3) and image.dtype == np.uint8
        assert check_image(path) == (30, 50)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_applied_and_the_size_is_that_of_the_turned_picture(orientation, picture, tmp_path):
    """The orange corner of the stored picture lands where the Exif standard says."""
    path = tmp_path / "a.jpg"
    path.write_bytes(oriented_jpeg(picture, orientation))
    image = read_image(path)
    assert shown_size(path) == check_image(path) == image.shape[:2] == ((30, 50) if orientation < 5 else (50, 30))
    corners = [image[2, 2], image[2, -3], image[-3, -3], image[-3, 2]]  # clockwise from the upper left
    orange = [corner[0] > 128 for corner in corners]
    assert orange.index(True) == {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert read_image(path, shrink=2).shape[:2] == ((15, 25) if orientation < 5 else (25, 15))


MAKER = PIL.Image.Exif()
MAKER[0x10F] = "maker"
UNTURNED = {
    "unknown.jpg": lambda path, picture: path.write_bytes(oriented_jpeg(picture, 9)),
    "damaged.png": lambda path, picture: PIL.Image.fromarray(picture).save(path, exif=b"Exif\0\0neither II nor MM"),
    "damaged.webp": lambda path, picture: PIL.Image.fromarray(picture).save(path, exif=b"Exif\0\0neither II nor MM"),
    "xmp.jpg": lambda path, picture: PIL.Image.fromarray(picture).save(
        path, exif=MAKER, xmp=b'<rdf:Description tiff:Orientation="6"/>'
    ),
}
"""An orientation that Exif does not know; damaged Exif data, which are no damage to the picture; an orientation in XMP
alone, which Pillow reads beside Exif data without one, and OpenCV does not."""


@pytest.mark.parametrize("name", UNTURNED)
def test_what_is_no_orientation_of_exif_turns_nothing(name, picture, tmp_path):
    path = tmp_path / name
    UNTURNED[name](path, picture)
    assert shown_size(path) == check_image(path) == (30, 50)


def test_other_forms_of_whole_pictures_and_bytes_behind_their_end_do_no_harm(picture, tmp_path):
    lossy, progressive = [cv2.IMWRITE_WEBP_QUALITY, 50], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    for suffix, options in ((".webp", lossy), (".jpg", progressive), (".jpg", []), (".png", [])):
        data = cv2.imencode(suffix, picture, options)[1].tobytes()
        path = tmp_path / f"a{suffix}"
        path.write_bytes(data + b"\0" * 100 * (options is not lossy))
        assert check_image(path) == (30, 50)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0.5, 0.9, 1])
def test_a_cut_off_file_is_found(suffix, kept, picture, tmp_path):
    path = tmp_path / f"a{suffix}"
    write_image(path, picture)
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * kept), len(data) - 1)])
    assert_refused(path, "damaged image")


def test_a_thumbnail_does_not_end_a_jpeg(picture, tmp_path):
    """A whole JPEG inside an application segment has an end-of-image marker of its own."""
    data = cv2.imencode(".jpg", picture)[1].tobytes()
    segment = b"\xff\xe2" + struct.pack(">H", len(data) + 2) + data
    path = tmp_path / "a.jpg"
    path.write_bytes(data[:2] + segment + data[2:])
    assert check_image(path) == (30, 50)
    path.write_bytes((data[:2] + segment + data[2:])[: -len(data) // 2])
    assert_refused(path, "damaged image", r"(?i)truncated")


@pytest.mark.parametrize("options", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 4]])
def test_what_pillow_cannot_read_of_a_jpeg_is_damaged(options, picture, tmp_path):
    """Pillow is asked only where the markers between the pixels are not those of a whole JPEG of one scan."""
    whole, draw, refused = cv2.imencode(".jpg", picture, options)[1].tobytes(), random.Random(0), 0
    path = tmp_path / "a.jpg"
    for _ in range(200):
        data, at = bytearray(whole), draw.randrange(600, len(whole))
        data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(8)).replace(b"\0", b"\xff")
        path.write_bytes(data)
        try:
            with PIL.Image.open(path) as opened:
                opened.load()
        except (OSError, SyntaxError):
            refused += 1
            with pytest.raises(PictureError):
                check_image(path)
        else:
            assert check_image(path) == (30, 50)
    assert refused > 1


def test_a_png_with_a_wrong_checksum_or_too_few_rows_is_damaged(picture, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(64, 64, zlib.compress(b"\0" * 9 * 10)))
    assert_refused(path, "damaged image", "cannot be decoded")
    write_image(path, picture)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert_refused(path, "damaged image", "bad header checksum in b'IDAT'")


def patched(suffix: str, at: bytes, skip: int, *values: int) -> bytes:
    """A picture of 8 x 8 pixels with other numbers, two bytes each, `skip` bytes behind its first bytes `at`."""
    data = cv2.imencode(suffix, np.zeros((8, 8), np.uint8))[1].tobytes()
    start = data.index(at) + skip
    return data[:start] + struct.pack(f">{len(values)}H", *values) + data[start + 2 * len(values) :]


def tiff(width: int, height: int) -> bytes:
    """A grey TIFF whose only strip is not there."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4


BOMBS = {
    "png": png(50_000, 50_000, zlib.compress(b"\0" * 6251 * 50)),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 40_000, -40_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "gif": b"GIF89a" + struct.pack("<HHxxxcHHHHx", 60_000, 60_000, b",", 0, 0, 60_000, 60_000) + b"\x08\0;",
    "tiff": tiff(90_000, 90_000),
    "lossy webp": b"RIFF\x1e\0\0\0WEBPVP8 \x12\0\0\0\x30\x01\0\x9d\x01\x2a" + b"\xff\x3f" * 2 + b"\0" * 8,
    "webp canvas": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\x1f\x4e\0" * 2 + b"\0" * 8,
    "webp": b"RIFF\x1e\0\0\0WEBPVP8L\x12\0\0\0\x2f" + b"\xff\xff\xff\x0f" + b"\0" * 13,
    "jpeg": patched(".jpg", b"\xff\xc0", 5, 60_000, 60_000),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_picture_over_the_pixel_cap_is_refused_by_its_header(data, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "bomb"
    path.write_bytes(data)
    assert_refused(path, "oversized image", "at most 100000000 pixels are decoded", (read_image, check_image))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("data", [b"a text", b"\x00\x00\x00\x18ftypheic", b"P6 2 2 255 " + b"0" * 12, b"\xff\xd8"])
def test_a_format_without_a_known_header_is_not_decoded(data, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    message = "not a PNG, JPEG, BMP, WebP, GIF or TIFF file"
    assert_refused(tmp_path / "a.jpg", "unknown image format", message, [read_image])


@pytest.mark.parametrize(
    ("kind", "grey"),
    [(np.float32, False), (np.float32, True), (np.float64, False), (np.int32, True), (np.int16, False)],
)
def test_a_tiff_of_values_without_a_known_range_is_named(kind, grey, picture, tmp_path):
    """It is valid: to call it damaged would be wrong."""
    values = "signed integers" if issubclass(kind, np.integer) else "floating-point numbers"
    cv2.imwrite(str(tmp_path / "a.tiff"), (picture[..., 0] if grey else picture).astype(kind))
    message = f"a TIFF of {values}; unsigned 8 or 16 bits can be read"
    kind = "unsupported pixel values"  # detect.py tries a file of unknown format as a video
    assert_refused(tmp_path / "a.tiff", kind, message, (read_image, check_image, shown_size))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_header_cut_anywhere_raises_nothing_but_a_picture_error(suffix, picture, tmp_path):
    data = cv2.imencode(suffix, picture)[1].tobytes()
    for length in range(40):
        (tmp_path / "a").write_bytes(data[:length])
        for use in (shown_size, read_image, check_image):
            with suppress(PictureError):
                use(tmp_path / "a")


def test_pillow_prints_nothing_about_damaged_pictures(picture, tmp_path, python):
    """Not that a TIFF ends early, nor that a picture of 90 million pixels could be a decompression bomb."""
    data = cv2.imencode(".tif", picture)[1].tobytes()
    (tmp_path / "cut.tif").write_bytes(data[: len(data) // 2])
    (tmp_path / "large.png").write_bytes(png(10_000, 9_000, zlib.compress(b"\0" * 1251 * 9_000)))
    code = (
        "import sys; from utils.data.images import PictureError, check_image, shown_size\n"
        "assert shown_size(sys.argv[2]) == (9_000, 10_000)\n"
        "try:\n    check_image(sys.argv[1])\n"
        "except PictureError as failure:\n    print(failure)\n"
    )
    paths = [str(tmp_path / name) for name in ("cut.tif", "large.png")]
    done = python("-c", code, *paths)
    assert done.stdout == f"{paths[0]}: the header is cut off or contradicts itself\n" and done.stderr == ""


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("fifo", os.mkfifo, "not a file"),
        ("folder", os.mkdir, "not a file"),
        ("loop", lambda path: path.symlink_to(path), "missing image"),
        ("dangling", lambda path: path.symlink_to(path.with_name("nothing")), "missing image"),
        ("missing", lambda path: None, "missing image"),
        ("empty", Path.touch, "empty image"),
    ],
)
def test_what_is_no_regular_file_is_never_opened(name, make, kind, tmp_path):
    make(tmp_path / name)
    assert_refused(tmp_path / name, kind, reads=[read_image])
    assert_refused("/dev/zero", "not a file", "not a regular file", [read_image])


def test_an_unknown_suffix_is_not_written(picture, tmp_path):
    with pytest.raises(DataError, match=r"images are written as \.bmp"):
        write_image(tmp_path / "a.xyz", picture)
    assert not list(tmp_path.iterdir())


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    """Each scan goes over all pixels, and takes 20 bytes."""
    done, data = cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    assert done and 5 < data.tobytes().count(images.JPEG_SCAN) < 15
    (tmp_path / "a.jpg").write_bytes(data.tobytes())
    assert check_image(tmp_path / "a.jpg") == (64, 64)
    monkeypatch.setattr(images, "MAX_SCANNED", 64 * 64 * 5)
    message = r"\d+ scans of 64x64 pixels; at most 20480 pixels are scanned"
    assert_refused(tmp_path / "a.jpg", "oversized image", message, (read_image, check_image))


def test_the_shared_jpeg_of_2000_scans_is_refused_at_once(shared):
    start = time.process_time()
    with pytest.raises(PictureError, match="2006 scans of 4096x4096 pixels"):
        check_image(shared / "cases" / "jpg_scans_2000.jpg")
    assert time.process_time() - start < 5


def test_a_png_with_data_for_many_more_pixels_is_refused(tmp_path):
    """libpng unpacks all of it: 2 MB that stand for 2 GB took 2.6 s."""
    (tmp_path / "a.png").write_bytes(png(1, 1, bytes(images.SPARE + 9)))
    assert_refused(tmp_path / "a.png", "oversized image", r"\d+ bytes for 1x1 pixels")


def test_data_of_another_size_than_the_header_are_damage(tmp_path, monkeypatch):
    write_image(tmp_path / "a.jpg", np.zeros((20, 30, 3), np.uint8))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((20, 31), np.uint8))
    assert_refused(tmp_path / "a.jpg", "damaged image", "its header says 30x20 pixels, its data are 31x20")
