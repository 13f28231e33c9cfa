"""Reader of the Oxford hand data set (Mittal, Zisserman & Torr 2011): a .mat file a picture, four corners a hand.

A corner is (y, x) in MATLAB's coordinates, where the centre of the first pixel is 1. The box is the upright one around
the four corners of the turned one.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from utils.data.annotations import Annotated, Box, Note, Picture
from utils.errors import DataError, InputError
from utils.files import regular_file

NAME = "hand"
SPLITS = {
    "train": Path("training_dataset") / "training_data",
    "validation": Path("validation_dataset") / "validation_data",
    "test": Path("test_dataset") / "test_data",
}
LARGEST_MAT = 1 << 20
"""Largest annotation read, in bytes; those of the data set have some 300."""
CENTRE = 0.5
"""Of MATLAB's pixel 1, where the picture's edge is 0: subtracted from a coordinate."""


def read_oxford(root: Path, val: str | None = "test") -> Annotated:
    """The pictures to train with, and those of `val` ("test", "validation", or None for none).

    Trained on is what was not chosen of the training and the validation pictures: 4 807 with 821 to test on, as in the
    suites before this one.

    Args:
        root: the folder hand_dataset, as unpacked.
        val: key of SPLITS.

    Raises:
        InputError: scipy is missing.
        DataError: a folder is missing, or an annotation is malformed.
    """
    try:
        import scipy.io
    except ImportError:
        raise InputError(".mat files need scipy; pip install -r requirements-convert.txt") from None
    notes: list[Note] = []
    train = [name for name in ("train", "validation") if name != val]
    parts = {name: _pictures(root / SPLITS[name], scipy.io.loadmat, notes) for name in (*train, val) if name}
    pictures = tuple(picture for name in train for picture in parts[name])
    return Annotated(pictures, parts[val] if val else None, (NAME,), tuple(notes), ("train", val or "val"))


def _pictures(folder: Path, loadmat: Any, notes: list[Note]) -> tuple[Picture, ...]:
    if not (folder / "images").is_dir():
        raise DataError(f"{folder / 'images'}: no such folder; hand_dataset as unpacked was expected")
    pictures = []
    for path in sorted((folder / "images").glob("*.jpg")):
        annotation = folder / "annotations" / f"{path.stem}.mat"
        if not annotation.exists():
            notes.append(Note("no annotation, picture left out", str(annotation)))
            continue
        pictures.append(Picture(path, None, tuple(_boxes(annotation, loadmat)), str(annotation)))
    return tuple(pictures)


def _boxes(path: Path, loadmat: Any) -> list[Box]:
    size = regular_file(path, DataError).st_size
    if size > LARGEST_MAT:
        raise DataError(f"{path}: {size} bytes; at most {LARGEST_MAT} were expected")
    try:
        data = loadmat(io.BytesIO(path.read_bytes()), simplify_cells=True, variable_names=["boxes"])
    except Exception as failure:  # scipy raises many kinds on damaged files, NotImplementedError on HDF5 ones
        raise DataError(f"{path}: not a MATLAB 5 file: {str(failure).partition(chr(10))[0][:100]}") from None
    hands = data.get("boxes")
    hands = [hands] if isinstance(hands, dict) else list(hands) if hasattr(hands, "__iter__") else None
    if hands is None or not all(isinstance(hand, dict) for hand in hands):
        raise DataError(f"{path}: has no cell array boxes of structures with the corners a, b, c and d")
    return [_box(path, at, hand) for at, hand in enumerate(hands)]


def _box(path: Path, at: int, hand: dict[str, Any]) -> Box:
    try:
        corners = [[float(value) for value in hand[key]] for key in "abcd"]
        ys, xs = ([value - CENTRE for value in values] for values in zip(*corners, strict=True))
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: boxes{{{at + 1}}}: the corners a, b, c and d must be y, x each") from None
    if not all(map(math.isfinite, (*xs, *ys))):
        raise DataError(f"{path}: boxes{{{at + 1}}}: a corner is not finite")
    return Box(NAME, min(xs), min(ys), max(xs), max(ys))
