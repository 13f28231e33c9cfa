"""Readers of annotated data sets: Pascal VOC, COCO and the Oxford hand data set, each made an `Annotated`.

**VOC** (Everingham et al. 2010): Annotations/*.xml, ImageSets/Main/*.txt and JPEGImages. VOC counts pixels from 1 and
names the first and the last one that a box covers. As Darknet's own voc_label.py does, 1 is subtracted from both, so a
box ends half a pixel of its centre and one of its size short of the covered pixels; the weights published for VOC were
trained with such labels. Tools that count from 0 need `first_pixel` 0.

**COCO** (Lin et al. 2014): instances_*.json; boxes x, y, width, height in pixels, counted from 0.

**Oxford hands** (Mittal, Zisserman & Torr 2011): a .mat file a picture, four corners a hand. A corner is (y, x) in
MATLAB's coordinates, where the centre of the first pixel is 1. The box is the upright one around the four corners.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from utils.data.images import SUFFIXES
from utils.errors import DataError, InputError
from utils.files import read_text, regular_file

VOC_LISTS = Path("ImageSets") / "Main"
LARGEST_XML = 1 << 24
"""Largest VOC annotation read, in bytes."""
LARGEST_JSON = 1 << 30
"""Largest COCO file read, in bytes; a made-up file of 53 MB in COCO's manner took 6 times its size in memory."""
LARGEST_MAT = 1 << 20
"""Largest annotation of hands read, in bytes; those of the data set have some 300."""
HAND_SPLITS = {
    "train": Path("training_dataset") / "training_data",
    "validation": Path("validation_dataset") / "validation_data",
    "test": Path("test_dataset") / "test_data",
}
CENTRE = 0.5
"""Centre of MATLAB's pixel 1 less the picture's edge: subtracted from a coordinate, it counts from 0."""

Notes = defaultdict[str, list[str]]
"""Kind of what was left out or changed on the way → places: file, or FILE:LINE."""


class Box(NamedTuple):
    """An object. x runs from 0 at the outer edge of the first pixel to the picture's width at that of the last."""

    name: str
    """Its class."""
    x1: float
    y1: float
    x2: float
    y2: float
    ignored: bool = False
    """A crowd or a difficult object: what is detected in it is neither right nor wrong."""


@dataclass(frozen=True)
class Picture:
    """A picture and its objects."""

    path: Path
    size: tuple[int, int] | None
    """Height and width as annotated; None if the annotation does not say."""
    boxes: tuple[Box, ...]
    location: str
    """File or FILE:LINE of the annotation."""


@dataclass(frozen=True)
class Annotated:
    """A whole data set."""

    train: Sequence[Picture]
    val: Sequence[Picture] | None
    """None if the set has no such split."""
    names: tuple[str, ...] | None = None
    """Classes in the order of the format; None if it has none, and they are sorted."""
    notes: Notes = field(default_factory=lambda: defaultdict(list))
    folders: tuple[str, str] = ("train", "val")
    """Folders of the two splits below images/ and labels/."""


class VocRules(NamedTuple):
    """Choices that VOC leaves to the reader of an annotation."""

    difficult: bool = False
    """Objects marked difficult are objects like others; else, as VOC's own evaluation has them, they are ignored."""
    first_pixel: int = 1
    """Number of the leftmost pixel of a row: 1 in VOC itself, 0 as other tools write."""


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
    notes: Notes = defaultdict(list)
    splits = {}
    for name in (train, val) if val is not None else (train,):
        paths = [(root, path) for root in roots for path in _voc_listed(root, name, every=name == train)]
        if not any(_voc_list(root, name).is_file() or (name == train and not _voc_lists(root)) for root in roots):
            known = sorted({other for root in roots for other in _voc_lists(root) if "_" not in other})
            there = f"there are: {', '.join(known)[:200]}" if known else "there is none; --val-share makes a split"
            raise DataError(f"{_voc_list(roots[0], name)}: no such list; {there}")
        splits[name] = list(_voc_pictures(paths, images, rules or VocRules(), notes))
    folder = "val" if val is None or not re.fullmatch(r"\w+", val) or val == "train" else val
    return Annotated(splits[train], None if val is None else splits[val], None, notes, ("train", folder))


def _voc_list(root: Path, name: str) -> Path:
    return root / VOC_LISTS / f"{name}.txt"


def _voc_lists(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / VOC_LISTS).glob("*.txt"))


def _voc_listed(root: Path, name: str, *, every: bool) -> list[Path]:
    """Annotations of the pictures in a list; all those of a set without lists if `every`."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    if _voc_list(root, name).is_file():
        lines = read_text(_voc_list(root, name), DataError).splitlines()
        return [_voc_annotation(folder, line.strip()) for line in lines if line.strip()]
    if not every or _voc_lists(root):
        return []
    paths = sorted(folder.glob("*.xml"))
    if not paths:
        raise DataError(f"{folder}: no .xml files; a folder like VOCdevkit/VOC2007 was expected")
    return paths


def _voc_annotation(folder: Path, line: str) -> Path:
    """Annotation of a picture in a line of a list; the lists of single classes have -1, 0 or 1 behind its name."""
    path = folder / f"{line}.xml"
    name, _, flag = line.rpartition(" ")
    return folder / f"{name.strip()}.xml" if flag in ("-1", "0", "1") and name and not path.exists() else path


def _voc_pictures(
    paths: Sequence[tuple[Path, Path]], images: Path | None, rules: VocRules, notes: Notes
) -> Iterator[Picture]:
    for root, path in paths:
        if not path.exists():
            notes["no annotation, picture left out"].append(str(path))
            continue
        yield _voc_picture(path, images or (root / "JPEGImages" if (root / "JPEGImages").is_dir() else root), rules)


def _voc_picture(path: Path, folder: Path, rules: VocRules) -> Picture:
    root = read_xml(path)
    size = root.find("size")
    sides = [0, 0]
    if size is not None:
        sides = [int(_number(path, size, key)) if size.find(key) is not None else 0 for key in ("height", "width")]
    boxes = []
    for element in root.findall("object"):
        ignored = not rules.difficult and (_text(element, "difficult") or "0") != "0"
        name, box = _text(element, "name"), element.find("bndbox")
        if not name or box is None:
            raise DataError(f"{path}:{element.get('line')}: an object needs a name and a bndbox")
        x1, y1, x2, y2 = (_number(path, box, key) - rules.first_pixel for key in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append(Box(name, x1, y1, x2, y2, ignored))
    shape = (sides[0], sides[1]) if min(sides) > 0 else None
    return Picture(_voc_image(path, folder, root), shape, tuple(boxes), str(path))


def read_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file. Each element has its line as the attribute `line`, and no other.

    Raises:
        DataError: not XML in UTF-8, too large, or with a document type, which could define entities.
    """
    text = read_text(path, DataError, LARGEST_XML)
    parser, builder = expat.ParserCreate(encoding="utf-8"), ElementTree.TreeBuilder()

    def start(tag: str, _attributes: dict[str, str]) -> None:
        builder.start(tag, {"line": str(parser.CurrentLineNumber)})

    def doctype(*_: object) -> None:
        raise DataError(f"{path}:{parser.CurrentLineNumber}: a document type; annotations are plain elements")

    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, doctype
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as failure:
        raise DataError(f"{path}:{failure.lineno}: not valid XML: {expat.ErrorString(failure.code)}") from None
    return builder.close()


def _text(element: ElementTree.Element, tag: str) -> str:
    return element.findtext(tag, "").strip()


def _number(path: Path, element: ElementTree.Element, tag: str) -> float:
    text = _text(element, tag)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        child = element.find(tag)
        line = (element if child is None else child).get("line")
        raise DataError(f"{path}:{line}: {tag} is {text[:40]!r}; a number was expected")
    return value


def _voc_image(path: Path, folder: Path, root: ElementTree.Element) -> Path:
    """The picture of the annotation's own name, whatever its suffix, else the one that <filename> names."""
    for suffix in (".jpg", *sorted(SUFFIXES), ".JPG", ".JPEG", ".PNG"):
        if (image := folder / (path.stem + suffix)).exists():
            return image
    named = _text(root, "filename").replace("\\", "/").rpartition("/")[2]
    if named not in ("", ".", "..") and "\0" not in named and (folder / named).is_file():
        return folder / named
    return folder / f"{path.stem}.jpg"


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
    files = [CocoFile(path) for path in (train, val) if path is not None]
    categories = [file.categories() for file in files]
    if categories[-1] != categories[0]:
        raise DataError(f"{val}: its categories are not those of {train}; both files must have the same")
    splits = [file.pictures(categories[0], images) for file in files]
    folders = [file.split() for file in files]
    folder = folders[1] if val is not None and folders[1] != folders[0] else "val"
    names = tuple(categories[0].values())
    return Annotated(splits[0], splits[1] if val is not None else None, names, folders=(folders[0], folder))


class CocoFile:
    """A file in COCO's instances format.

    Raises:
        DataError: not JSON, or without the three lists of objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = read_text(path, DataError, LARGEST_JSON)
        try:
            document = json.loads(text)
        except json.JSONDecodeError as failure:
            where = f"{path}:{failure.lineno}"
            raise DataError(f"{where}: not valid JSON: {failure.msg} at column {failure.colno}") from None
        except (RecursionError, ValueError) as failure:
            raise DataError(f"{path}: not valid JSON: {type(failure).__name__}") from None
        self.lists: dict[str, list[dict[str, Any]]] = {}
        for key in ("images", "annotations", "categories"):
            items = document.get(key) if isinstance(document, dict) else None
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise DataError(f"{path}: has no list of objects {key!r}; COCO's instances format was expected")
            self.lists[key] = items

    def split(self) -> str:
        """Name of the split: train2017 of instances_train2017.json; the folder's for _annotations.coco.json."""
        name = self.path.stem.removeprefix("instances_")
        return self.path.absolute().parent.name if name.startswith("_") else name

    def categories(self) -> dict[int, str]:
        """Id → name, in the order of the ids."""
        names: dict[int, str] = {}
        for at in range(len(self.lists["categories"])):
            number, name = self._value("categories", at, "id", int), self._value("categories", at, "name", str).strip()
            if number in names or name in names.values() or not name:
                where = f"{self.path}: categories[{at}]"
                raise DataError(f"{where}: id {number}, name {name!r}; both must be there once only")
            names[number] = name
        if not names:
            raise DataError(f"{self.path}: categories is empty")
        return dict(sorted(names.items()))

    def pictures(self, categories: dict[int, str], images: Path | None) -> list[Picture]:
        """The pictures, which lie below `images` or where they are usual."""
        boxes: dict[int, list[Box]] = {}
        for at in range(len(self.lists["images"])):
            number = self._value("images", at, "id", int)
            if number in boxes:
                raise DataError(f"{self.path}: images[{at}]: id {number} is there twice")
            boxes[number] = []
        for at, item in enumerate(self.lists["annotations"]):
            owner, category = (self._value("annotations", at, name, int) for name in ("image_id", "category_id"))
            if owner not in boxes or category not in categories:
                strange = f"image_id {owner}" if owner not in boxes else f"category_id {category}"
                raise DataError(f"{self.path}: annotations[{at}]: {strange} is not in the file")
            x, y, width, height = self._bbox(at)
            boxes[owner].append(Box(categories[category], x, y, x + width, y + height, bool(item.get("iscrowd"))))
        names = [self._value("images", at, "file_name", str) for at in range(len(boxes))]
        folder = images or self._folder(names)
        pictures = []
        for name, item in zip(names, self.lists["images"], strict=True):
            sides = item.get("height", 0), item.get("width", 0)
            size = sides if all(type(side) is int and side > 0 for side in sides) else None
            location = f"{self.path}: image {item['id']}"
            pictures.append(Picture(folder / name, size, tuple(boxes[item["id"]]), location))
        return pictures

    def _value(self, key: str, at: int, name: str, kind: type) -> Any:
        value = self.lists[key][at].get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            word = {int: "an integer", str: "a text"}[kind]
            raise DataError(f"{self.path}: {key}[{at}]: {name} is {repr(value)[:40]}; {word} was expected")
        return value

    def _bbox(self, at: int) -> Sequence[float]:
        box = self.lists["annotations"][at].get("bbox")
        numbers = [n for n in box if type(n) in (int, float) and abs(n) < 1e9] if isinstance(box, list) else []
        if len(numbers) != 4 or numbers != box:
            where = f"{self.path}: annotations[{at}]"
            raise DataError(f"{where}: bbox is {repr(box)[:60]}; x, y, width, height were expected")
        return numbers

    def _folder(self, names: Sequence[str]) -> Path:
        """Folder of the first picture that is there: ../train2017, ../images/train2017, ../images, beside the file."""
        here, split = self.path.parent, self.split()
        above = here / ".."
        folders = [above / split, above / "images" / split, above / "images", here / split, here / "images", here]
        for name in names[:100]:
            for folder in folders:
                if "\0" not in name and (folder / name).is_file():
                    return folder
        return folders[0]


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
        from scipy.io import loadmat
    except ImportError:
        raise InputError(".mat files need scipy; pip install -r requirements-convert.txt") from None
    notes: Notes = defaultdict(list)
    train: list[Picture] = []
    for name in ("train", "validation"):
        if name != val:
            train += _hand_pictures(root / HAND_SPLITS[name], loadmat, notes)
    pictures = list(_hand_pictures(root / HAND_SPLITS[val], loadmat, notes)) if val else None
    return Annotated(train, pictures, ("hand",), notes, ("train", val or "val"))


def _hand_pictures(folder: Path, loadmat: Any, notes: Notes) -> Iterator[Picture]:
    if not (folder / "images").is_dir():
        raise DataError(f"{folder / 'images'}: no such folder; hand_dataset as unpacked was expected")
    for path in sorted((folder / "images").glob("*.jpg")):
        annotation = folder / "annotations" / f"{path.stem}.mat"
        if annotation.exists():
            yield Picture(path, None, tuple(_hand_boxes(annotation, loadmat)), str(annotation))
        else:
            notes["no annotation, picture left out"].append(str(annotation))


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
    return Box("hand", min(xs), min(ys), max(xs), max(ys))
