"""Reader of COCO's instances_*.json (Lin et al. 2014): boxes x, y, width, height in pixels, counted from 0."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.data.annotations import Annotated, Box, Picture
from utils.errors import DataError
from utils.files import read_text

LARGEST_JSON = 1 << 30
"""Largest file read, in bytes; a made-up file of 53 MB in COCO's manner took 6 times its size in memory."""


def read_coco(train: Path, val: Path | None, images: Path | None = None) -> Annotated:
    """Pictures and objects of one or two files; crowd regions are ignored boxes.

    Classes are the categories in the order of their ids. Pictures are looked for below `images`, else where COCO's own
    archives and other exporters put them.

    Args:
        train: file with the training pictures.
        val: file with the validation pictures.
        images: folder of the pictures.

    Raises:
        DataError: a file is malformed, or the two name other categories.
    """
    files = [path for path in (train, val) if path is not None]
    documents = [_document(path) for path in files]
    categories = [_categories(path, document) for path, document in zip(files, documents, strict=True)]
    if categories[-1] != categories[0]:
        raise DataError(f"{files[-1]}: its categories are not those of {files[0]}; both files must have the same")
    parts = [
        tuple(_pictures(path, document, categories[0], images)) for path, document in zip(files, documents, strict=True)
    ]
    folders = (_split(train), _split(val) if val is not None and _split(val) != _split(train) else "val")
    names = tuple(categories[0].values())
    return Annotated(parts[0], parts[1] if val is not None else None, names, folders=folders)


def _split(path: Path) -> str:
    """Name of a split: train2017 of instances_train2017.json; the folder's for _annotations.coco.json."""
    name = path.stem.removeprefix("instances_")
    return path.absolute().parent.name if name.startswith("_") else name


def _document(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The file's three lists of objects."""
    text = read_text(path, DataError, LARGEST_JSON)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as failure:
        raise DataError(f"{path}:{failure.lineno}: not valid JSON: {failure.msg} at column {failure.colno}") from None
    except (RecursionError, ValueError) as failure:
        raise DataError(f"{path}: not valid JSON: {type(failure).__name__}") from None
    lists = {}
    for key in ("images", "annotations", "categories"):
        lists[key] = document.get(key) if isinstance(document, dict) else None
        if not isinstance(lists[key], list) or not all(isinstance(item, dict) for item in lists[key]):
            raise DataError(f"{path}: has no list of objects {key!r}; COCO's instances format was expected")
    return lists


def _value(path: Path, key: str, at: int, item: dict[str, Any], name: str, kind: type) -> Any:
    value = item.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        word = {int: "an integer", str: "a text"}[kind]
        raise DataError(f"{path}: {key}[{at}]: {name} is {repr(value)[:40]}; {word} was expected")
    return value


def _categories(path: Path, document: dict[str, list[dict[str, Any]]]) -> dict[int, str]:
    """Id → name, in the order of the ids."""
    found: dict[int, str] = {}
    for at, item in enumerate(document["categories"]):
        number = _value(path, "categories", at, item, "id", int)
        name = _value(path, "categories", at, item, "name", str).strip()
        if number in found or name in found.values() or not name:
            raise DataError(f"{path}: categories[{at}]: id {number}, name {name!r}; both must be there once only")
        found[number] = name
    if not found:
        raise DataError(f"{path}: categories is empty")
    return dict(sorted(found.items()))


def _pictures(
    path: Path, document: dict[str, list[dict[str, Any]]], categories: dict[int, str], images: Path | None
) -> list[Picture]:
    boxes: dict[int, list[Box]] = {}
    for at, item in enumerate(document["images"]):
        number = _value(path, "images", at, item, "id", int)
        if number in boxes:
            raise DataError(f"{path}: images[{at}]: id {number} is there twice")
        boxes[number] = []
    for at, item in enumerate(document["annotations"]):
        owner = _value(path, "annotations", at, item, "image_id", int)
        category = _value(path, "annotations", at, item, "category_id", int)
        if owner not in boxes or category not in categories:
            what = f"image_id {owner}" if owner not in boxes else f"category_id {category}"
            raise DataError(f"{path}: annotations[{at}]: {what} is not in the file")
        x, y, width, height = _bbox(path, at, item)
        crowd = bool(item.get("iscrowd"))
        boxes[owner].append(Box(categories[category], x, y, x + width, y + height, crowd))
    names = [_value(path, "images", at, item, "file_name", str) for at, item in enumerate(document["images"])]
    folder = images or _folder(path, names)
    return [
        Picture(folder / name, _size(item), tuple(boxes[item["id"]]), f"{path}: image {item['id']}")
        for name, item in zip(names, document["images"], strict=True)
    ]


def _bbox(path: Path, at: int, item: dict[str, Any]) -> Sequence[float]:
    box = item.get("bbox")
    good = isinstance(box, list) and len(box) == 4
    if not good or not all(type(side) in (int, float) and math.isfinite(side) and abs(side) < 1e9 for side in box):
        raise DataError(f"{path}: annotations[{at}]: bbox is {repr(box)[:60]}; x, y, width, height were expected")
    return box


def _size(item: dict[str, Any]) -> tuple[int, int] | None:
    sides = (item.get("height"), item.get("width"))
    return sides if all(type(side) is int and side > 0 for side in sides) else None


def _folder(path: Path, names: Sequence[str]) -> Path:
    """Where the first picture that is anywhere is: ../train2017, ../images/train2017, ../images or beside the file."""
    here, split = path.parent, _split(path)
    above = here / ".."
    places = [above / split, above / "images" / split, above / "images", here / split, here / "images", here]
    for name in names[:100]:
        for place in places:
            if "\0" not in name and (place / name).is_file():
                return place
    return places[0]
