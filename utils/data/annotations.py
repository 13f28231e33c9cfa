"""What an annotated data set says, whatever its format: pictures with boxes in pixels, and what was left out.

A reader makes an `Annotated` of a format; `picture_set.write_set` makes label files and lists of any `Annotated`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

import numpy as np

from utils.data.images import SUFFIXES
from utils.data.labels import first_places
from utils.errors import DataError, InputError
from utils.files import read_text, regular_file


class Box(NamedTuple):
    """One object. x runs from 0 at the outer edge of the first pixel to the picture's width at that of the last."""

    name: str
    """Its class."""
    x1: float
    y1: float
    x2: float
    y2: float
    ignored: bool = False
    """A crowd or a difficult object: what is detected in it is neither right nor wrong."""


class Note(NamedTuple):
    """One thing that was left out or changed on the way."""

    kind: str
    place: str
    """File, or FILE:LINE."""


@dataclass(frozen=True)
class Picture:
    """A picture and its objects."""

    path: Path
    size: tuple[int, int] | None
    """Height and width as annotated; None if the annotation does not say."""
    boxes: tuple[Box, ...]
    place: str
    """Where the annotation is."""


@dataclass(frozen=True)
class Annotated:
    """A whole data set."""

    train: tuple[Picture, ...]
    val: tuple[Picture, ...] | None
    """None if the set has no such split."""
    names: tuple[str, ...] | None = None
    """Classes in the order of the format; None if it has none, and they are sorted."""
    notes: tuple[Note, ...] = ()
    folders: tuple[str, str] = ("train", "val")
    """Folders of the two splits below images/ and labels/."""

    def used_names(self) -> tuple[str, ...]:
        """Classes in the order of the format, or those of all boxes, sorted."""
        found = {box.name for picture in (*self.train, *(self.val or ())) for box in picture.boxes}
        return tuple(sorted(found)) if self.names is None else self.names


def with_split(annotated: Annotated, share: float, seed: int) -> Annotated:
    """A share of the training pictures, drawn at random, as the validation pictures.

    Args:
        annotated: without validation pictures.
        share: 0 < share < 1; at least one picture stays on either side.
        seed: another one draws another split.

    Raises:
        InputError: there are fewer than two pictures.
    """
    count = len(annotated.train)
    if count < 2:
        raise InputError(f"--val-share {share}: {count} pictures cannot be split; at least 2 are needed")
    order = np.random.default_rng(seed).permutation(count).tolist()
    drawn = set(order[: min(count - 1, max(1, round(count * share)))])
    parts = [tuple(p for at, p in enumerate(annotated.train) if (at in drawn) is wanted) for wanted in (False, True)]
    return replace(annotated, train=parts[0], val=parts[1], folders=(annotated.folders[0], "val"))


def selected_names(own: Sequence[str], wanted: Sequence[str], path: str, *, ordered: bool) -> dict[str, str]:
    """Own name of a class → its name in the result, for the classes that a `--names` file wants.

    Names that are all among the set's own select classes, in the order of the file. A file of as many names as an
    ordered set has classes may call them otherwise, as Darknet's coco.names does (`motorbike` for `motorcycle`).

    Args:
        own: classes of the data set.
        wanted: names of the file, in the order of the class numbers.
        path: the file, for messages.
        ordered: the order of `own` is that of the format.

    Raises:
        DataError: a name is said twice, or is none of the set's.
    """
    if len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if list(wanted).count(name) > 1)
        raise DataError(f"{path}: the name {twice!r} is there twice; every class needs a name of its own")
    strange = [name for name in wanted if name not in own]
    if not strange or not ordered:
        return {name: name for name in wanted}
    pairs = list(zip(own, wanted, strict=False))
    if len(own) == len(wanted) and all(name == mine or name not in own for mine, name in pairs):
        return dict(pairs)
    raise DataError(f"{path}: {strange[0]!r} is no class of the data set, which has: {', '.join(own)[:300]}")


def note_lines(notes: Iterable[Note]) -> list[str]:
    """A line for each kind of note, in order of appearance, with its count and the first places."""
    places: dict[str, list[str]] = {}
    for note in notes:
        places.setdefault(note.kind, []).append(note.place)
    return [f"  {kind}: {len(found)}: {first_places(found)}" for kind, found in places.items()]


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
    documents = [_coco_document(path) for path in files]
    categories = [_coco_categories(path, document) for path, document in zip(files, documents, strict=True)]
    if categories[-1] != categories[0]:
        raise DataError(f"{files[-1]}: its categories are not those of {files[0]}; both files must have the same")
    parts = [
        tuple(_coco_pictures(path, document, categories[0], images))
        for path, document in zip(files, documents, strict=True)
    ]
    folders = (
        _coco_split(train),
        _coco_split(val) if val is not None and _coco_split(val) != _coco_split(train) else "val",
    )
    names = tuple(categories[0].values())
    return Annotated(parts[0], parts[1] if val is not None else None, names, folders=folders)


def _coco_split(path: Path) -> str:
    """Name of a split: train2017 of instances_train2017.json; the folder's for _annotations.coco.json."""
    name = path.stem.removeprefix("instances_")
    return path.absolute().parent.name if name.startswith("_") else name


def _coco_document(path: Path) -> dict[str, list[dict[str, Any]]]:
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


def _coco_value(path: Path, key: str, at: int, item: dict[str, Any], name: str, kind: type) -> Any:
    value = item.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        word = {int: "an integer", str: "a text"}[kind]
        raise DataError(f"{path}: {key}[{at}]: {name} is {repr(value)[:40]}; {word} was expected")
    return value


def _coco_categories(path: Path, document: dict[str, list[dict[str, Any]]]) -> dict[int, str]:
    """Id → name, in the order of the ids."""
    found: dict[int, str] = {}
    for at, item in enumerate(document["categories"]):
        number = _coco_value(path, "categories", at, item, "id", int)
        name = _coco_value(path, "categories", at, item, "name", str).strip()
        if number in found or name in found.values() or not name:
            raise DataError(f"{path}: categories[{at}]: id {number}, name {name!r}; both must be there once only")
        found[number] = name
    if not found:
        raise DataError(f"{path}: categories is empty")
    return dict(sorted(found.items()))


def _coco_pictures(
    path: Path, document: dict[str, list[dict[str, Any]]], categories: dict[int, str], images: Path | None
) -> list[Picture]:
    boxes: dict[int, list[Box]] = {}
    for at, item in enumerate(document["images"]):
        number = _coco_value(path, "images", at, item, "id", int)
        if number in boxes:
            raise DataError(f"{path}: images[{at}]: id {number} is there twice")
        boxes[number] = []
    for at, item in enumerate(document["annotations"]):
        owner = _coco_value(path, "annotations", at, item, "image_id", int)
        category = _coco_value(path, "annotations", at, item, "category_id", int)
        if owner not in boxes or category not in categories:
            what = f"image_id {owner}" if owner not in boxes else f"category_id {category}"
            raise DataError(f"{path}: annotations[{at}]: {what} is not in the file")
        x, y, width, height = _coco_bbox(path, at, item)
        crowd = bool(item.get("iscrowd"))
        boxes[owner].append(Box(categories[category], x, y, x + width, y + height, crowd))
    names = [_coco_value(path, "images", at, item, "file_name", str) for at, item in enumerate(document["images"])]
    folder = images or _coco_folder(path, names)
    return [
        Picture(folder / name, _coco_size(item), tuple(boxes[item["id"]]), f"{path}: image {item['id']}")
        for name, item in zip(names, document["images"], strict=True)
    ]


def _coco_bbox(path: Path, at: int, item: dict[str, Any]) -> Sequence[float]:
    box = item.get("bbox")
    good = isinstance(box, list) and len(box) == 4
    if not good or not all(type(side) in (int, float) and math.isfinite(side) and abs(side) < 1e9 for side in box):
        raise DataError(f"{path}: annotations[{at}]: bbox is {repr(box)[:60]}; x, y, width, height were expected")
    return box


def _coco_size(item: dict[str, Any]) -> tuple[int, int] | None:
    sides = (item.get("height"), item.get("width"))
    return sides if all(type(side) is int and side > 0 for side in sides) else None


def _coco_folder(path: Path, names: Sequence[str]) -> Path:
    """Where the first picture that is anywhere is: ../train2017, ../images/train2017, ../images or beside the file."""
    here, split = path.parent, _coco_split(path)
    above = here / ".."
    places = [above / split, above / "images" / split, above / "images", here / split, here / "images", here]
    for name in names[:100]:
        for place in places:
            if "\0" not in name and (place / name).is_file():
                return place
    return places[0]


HAND = "hand"
HAND_SPLITS = {
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
        val: key of HAND_SPLITS.

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
    parts = {name: _hand_pictures(root / HAND_SPLITS[name], scipy.io.loadmat, notes) for name in (*train, val) if name}
    pictures = tuple(picture for name in train for picture in parts[name])
    return Annotated(pictures, parts[val] if val else None, (HAND,), tuple(notes), ("train", val or "val"))


def _hand_pictures(folder: Path, loadmat: Any, notes: list[Note]) -> tuple[Picture, ...]:
    if not (folder / "images").is_dir():
        raise DataError(f"{folder / 'images'}: no such folder; hand_dataset as unpacked was expected")
    pictures = []
    for path in sorted((folder / "images").glob("*.jpg")):
        annotation = folder / "annotations" / f"{path.stem}.mat"
        if not annotation.exists():
            notes.append(Note("no annotation, picture left out", str(annotation)))
            continue
        pictures.append(Picture(path, None, tuple(_hand_boxes(annotation, loadmat)), str(annotation)))
    return tuple(pictures)


def _hand_boxes(path: Path, loadmat: Any) -> list[Box]:
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
    return [_hand_box(path, at, hand) for at, hand in enumerate(hands)]


def _hand_box(path: Path, at: int, hand: dict[str, Any]) -> Box:
    try:
        corners = [[float(value) for value in hand[key]] for key in "abcd"]
        ys, xs = ([value - CENTRE for value in values] for values in zip(*corners, strict=True))
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: boxes{{{at + 1}}}: the corners a, b, c and d must be y, x each") from None
    if not all(map(math.isfinite, (*xs, *ys))):
        raise DataError(f"{path}: boxes{{{at + 1}}}: a corner is not finite")
    return Box(HAND, min(xs), min(ys), max(xs), max(ys))


LARGEST_XML = 1 << 24
"""Largest annotation read, in bytes."""
LISTS = Path("ImageSets") / "Main"


@dataclass(frozen=True)
class VocRules:
    """What is taken from a VOC annotation."""

    difficult: bool = False
    """Objects marked difficult are objects like others; else, as VOC's own evaluation has them, they are ignored."""
    first_pixel: int = 1
    """Number of the leftmost pixel of a row: 1 in VOC itself, 0 as other tools write."""


@dataclass
class Element:
    """One element of an XML file."""

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """Children of that tag."""
        return [child for child in self.children if child.tag == tag]

    def first(self, tag: str) -> Element | None:
        """First child of that tag."""
        return next(iter(self.all(tag)), None)


def read_voc(
    roots: Sequence[Path], train: str, val: str | None, images: Path | None = None, rules: VocRules | None = None
) -> Annotated:
    """Pictures and objects of one or several years.

    Args:
        roots: folders like VOCdevkit/VOC2007. One without ImageSets/Main gives all its annotations for training.
        train: list of the training pictures, as `trainval`.
        val: list of the validation pictures, as `test`; a year may be without it. None reads none.
        images: folder of the pictures, in place of each root's JPEGImages.
        rules: what is taken.

    Raises:
        DataError: no root has the list, or an annotation is malformed.
    """
    notes: list[Note] = []
    parts = {}
    for name in (train, val):
        if name is not None:
            stems = [(root, stem) for root in roots for stem in _listed(root, name, every=name == train)]
            if not any(_has_list(root, name) or (name == train and not _lists(root)) for root in roots):
                raise _no_list(roots, name)
            parts[name] = tuple(_voc_pictures(stems, images, rules or VocRules(), notes))
    folder = "val" if val is None or not re.fullmatch(r"\w+", val) or val == "train" else val
    return Annotated(parts[train], parts.get(val), None, tuple(notes), ("train", folder))


def read_xml(path: Path) -> Element:
    """The root element of an XML file, each element with its line.

    Raises:
        DataError: not XML in UTF-8, too large, or with a document type, which could define entities.
    """
    text = read_text(path, DataError, LARGEST_XML)
    root = Element("", 0)
    open_elements = [root]
    parser = expat.ParserCreate(encoding="utf-8")
    parser.buffer_text = True

    def start(tag: str, _attributes: dict[str, str]) -> None:
        element = Element(tag, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def data(text: str) -> None:
        open_elements[-1].text += text

    def doctype(*_: object) -> None:
        raise DataError(f"{path}:{parser.CurrentLineNumber}: a document type; annotations are plain elements")

    parser.StartElementHandler, parser.CharacterDataHandler = start, data
    parser.EndElementHandler = lambda _tag: open_elements.pop()
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as failure:
        raise DataError(f"{path}:{failure.lineno}: not valid XML: {expat.ErrorString(failure.code)}") from None
    return root.children[0]


def _lists(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / LISTS).glob("*.txt"))


def _has_list(root: Path, name: str) -> bool:
    return (root / LISTS / f"{name}.txt").is_file()


def _no_list(roots: Sequence[Path], name: str) -> DataError:
    names = sorted({found for root in roots for found in _lists(root) if "_" not in found})
    known = f"there are: {', '.join(names)[:200]}" if names else "there is none; --val-share makes a split"
    return DataError(f"{roots[0] / LISTS / name}.txt: no such list; {known}")


def _listed(root: Path, name: str, *, every: bool) -> list[str]:
    """Names of the pictures in a list, without suffix; all annotations of a set without lists if `every`."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    if _has_list(root, name):
        lines = read_text(root / LISTS / f"{name}.txt", DataError).splitlines()
        return [_stem(root, line.strip()) for line in lines if line.strip()]
    if not every or _lists(root):
        return []
    found = sorted(path.stem for path in _annotations(root).glob("*.xml"))
    if not found:
        raise DataError(f"{_annotations(root)}: no .xml files; a folder like VOCdevkit/VOC2007 was expected")
    return found


def _stem(root: Path, line: str) -> str:
    """Name of a picture in a line of a list; the lists of single classes have -1, 0 or 1 behind it."""
    name, _, flag = line.rpartition(" ")
    flagged = flag in ("-1", "0", "1") and not (_annotations(root) / f"{line}.xml").exists()
    return name.strip() if flagged and name.strip() else line


def _annotations(root: Path) -> Path:
    return root / "Annotations" if (root / "Annotations").is_dir() else root


def _voc_pictures(
    stems: Sequence[tuple[Path, str]], images: Path | None, rules: VocRules, notes: list[Note]
) -> list[Picture]:
    pictures = []
    for root, stem in stems:
        path = _annotations(root) / f"{stem}.xml"
        if not path.exists():
            notes.append(Note("no annotation, picture left out", str(path)))
            continue
        folder = images or (root / "JPEGImages" if (root / "JPEGImages").is_dir() else root)
        pictures.append(_voc_picture(path, folder, rules))
    return pictures


def _voc_picture(path: Path, folder: Path, rules: VocRules) -> Picture:
    root = read_xml(path)
    size = root.first("size")
    sides = [int(_number(path, size, key)) if size and size.first(key) else 0 for key in ("height", "width")]
    boxes = []
    for element in root.all("object"):
        ignored = not rules.difficult and (_text(element, "difficult") or "0") != "0"
        name, box = _text(element, "name"), element.first("bndbox")
        if not name or box is None:
            raise DataError(f"{path}:{element.line}: an object needs a name and a bndbox")
        boxes.append(Box(name, *(_number(path, box, key) - rules.first_pixel for key in _CORNERS), ignored))
    return Picture(_voc_image(path, folder, root), tuple(sides) if min(sides) > 0 else None, tuple(boxes), str(path))


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _text(element: Element, tag: str) -> str:
    child = element.first(tag)
    return child.text.strip() if child else ""


def _number(path: Path, element: Element, tag: str) -> float:
    child = element.first(tag)
    text = child.text.strip() if child else ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        line = (child or element).line
        raise DataError(f"{path}:{line}: {tag} is {text[:40]!r}; a number was expected")
    return value


def _voc_image(path: Path, folder: Path, root: Element) -> Path:
    """The picture of the annotation's own name, whatever its suffix, else the one that <filename> names."""
    for suffix in (".jpg", *sorted(SUFFIXES), ".JPG", ".JPEG", ".PNG"):
        if (found := folder / (path.stem + suffix)).exists():
            return found
    named = _text(root, "filename").replace("\\", "/").rpartition("/")[2]
    if named not in ("", ".", "..") and "\0" not in named and (folder / named).is_file():
        return folder / named
    return folder / f"{path.stem}.jpg"
