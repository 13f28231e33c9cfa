"""Bytes and texts changed at random, and files made to harm, for `benchmarks.faults` and tests."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np

from utils.files import read_yaml

PAGE = 4096
NUMBERS = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
"""For the fields of binary files."""
JPEG, FRAME, SCAN = b"\xff\xd8", b"\xff[\xc0\xc2]", b"\xff\xda"
"""First bytes of the file, of the header with its sides, and of its pixels."""


@cache
def rules() -> Mapping[str, Any]:
    """Content of faults.yaml, which says what its parts are."""
    content = read_yaml(Path(__file__).with_name("faults.yaml"))
    return content | {"words": content["words"].split(), "signs": [*map(repeated, content["signs"])]}


def repeated(value: Any) -> str:
    """The text of a value in faults.yaml: TEXT, [TEXT, N] or [START, N, END]."""
    start, count, *end = value if isinstance(value, list) else (str(value), 1)
    return start * count + "".join(f"1{part * count}" for part in end)


def damaged(data: bytes, rng: Random) -> bytes:
    """The bytes of a file with flipped bits, cut off, or with zeros, noise or another number in them."""
    content, at = bytearray(data), rng.randrange(len(data) + 1)
    number = rng.choice(NUMBERS).to_bytes(8, rng.choice(("little", "big")))
    patch = rng.choice((number[:4], number[4:], rng.randbytes(9), bytes(PAGE)))
    match rng.randrange(5):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 1, 8, 100)) if data else 0):
                content[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            del content[at:]
        case 3:
            at -= at % len(patch)
            content[at : at + len(patch)] = patch[: len(data) - at]
        case 4:
            content[at : at + rng.randrange(PAGE)] = rng.randbytes(rng.choice((0, 4, 16, 999)))
    return bytes(content)


def mutated(text: str, rng: Random) -> str:
    """A text with a few edits: characters, words, values behind a sign, lines, sections."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = text.split("\n")
        at, other, position = rng.randrange(len(lines)), rng.randrange(len(lines)), rng.randrange(len(text) + 1)
        word = rng.choice(rules()["signs" if rng.random() < 0.1 else "words"])
        match rng.randrange(7):
            case 0:
                lines = [text[:position] + word + text[position:]]
            case 1:
                lines = [text[:position] + text[position + rng.randint(1, 9) :]]
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = lines[at][: max(map(lines[at].find, "=:> "), default=0) + 1] + word
            case 4:
                del lines[at : at + rng.randint(1, 8)]
            case 5:
                lines[at:at] = lines[other : other + rng.randint(1, 8)]
            case 6:
                lines[at] = rng.choice((word, lines[at] + word, lines[at] + " " + word))
        text = "\n".join(lines)
    return text


@cache
def pictures() -> list[bytes]:
    """A small picture in every format; two JPEG files, of which one is progressive."""
    image = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    kinds = [(f".{kind}", []) for kind in ("bmp", "gif", "jpg", "png", "tiff", "webp")]
    kinds.append((".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]))
    return [cv2.imencode(kind, image, options)[1].tobytes() for kind, options in kinds]


def random_bytes(data: bytes, rng: Random) -> bytes:
    """A text with a few edits, any other file damaged, and a picture of any format for a JPEG."""
    data = rng.choice(pictures()) if data.startswith(JPEG) else data
    if b"\0" in data or rng.random() < 0.1:
        return damaged(data, rng)
    return mutated(data.decode(), rng).encode("utf-8", "surrogateescape")


def hostile_bytes(data: bytes, kind: str, rng: Random) -> bytes:
    """A file made to harm, of a sound one: a text by the rules of its kind in faults.yaml, or pt, picture or onnx."""
    if kind not in rules()["hostile"]:
        return {"pt": hostile_pt, "picture": hostile_picture, "onnx": hostile_onnx}[kind](data, rng)
    text, change = data.decode(), rng.choice(rules()["hostile"][kind])
    place = rng.choice([*re.finditer(change["at"], text)])
    return (text[: place.start()] + repeated(rng.choice(change["put"])) + text[place.end() :]).encode("utf-8", "ignore")


def hostile_picture(_: bytes, rng: Random) -> bytes:
    """A picture whose header lies, or that has to be gone over very often."""
    data = bytearray(rng.choice(pictures()))
    frame, scan = re.search(FRAME, data), data.find(SCAN)
    at = rng.randrange(4, 60)
    if data.startswith(JPEG) and frame:
        data[scan:-2] *= rng.choice((1, 1, 2000))
        at = frame.start() + 5
    data[at : at + 4] = rng.choice(NUMBERS).to_bytes(8, rng.choice(("little", "big")))[rng.choice((0, 4)) :][:4]
    return bytes(data)


def hostile_pt(data: bytes, rng: Random) -> bytes:
    """A checkpoint with code, a bomb, wrong sizes, or names that lead out of the folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    code = repeated(rng.choice(rules()["pickles"])).encode("latin-1")
    name, folder = rng.choice(list(entries)), rng.choice(("archive", "..", "/", "x" * 65000))
    contents = (
        {f"{folder}/data.pkl": code, f"{folder}/version": b"3"},
        entries | {other: code for other in entries if other.endswith("data.pkl")},
        entries | {name: rng.choice((damaged(entries[name], rng), entries[name] * 2, code))},
        entries | {f"{folder}/data/99": bytes(rng.choice((1 << 20, 1 << 28)))},
        dict.fromkeys(map("archive/data/{}".format, range(30_000)), b""),
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for entry, content in rng.choice(contents).items():
            archive.writestr(entry, content)
    return rng.choice((b"", b"", b"", b"7z\xbc\xaf\x27\x1c", code)) + buffer.getvalue()


def hostile_onnx(data: bytes, rng: Random) -> bytes:
    """An ONNX file with data elsewhere, loops, or huge shapes."""
    import onnx

    model = onnx.load_from_string(data)
    tensor, node = rng.choice(model.graph.initializer), rng.choice(model.graph.node)
    if (kind := rng.randrange(3)) == 0:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(("../../canary", "/dev/zero", "net.cfg", "/")))
    elif kind == 1:
        node.op_type = rng.choice(("Loop", "If", "Scan", "SequenceMap", "X" * 99999, ""))
    else:
        tensor.dims[:1] = [rng.choice((0, -1, 1 << 31, 1 << 62))]  # a scalar has none
    return model.SerializeToString()
