"""Readers of annotated data sets: Pascal VOC, COCO and the Oxford hand data set, each made an `Annotated`."""

from __future__ import annotations

import io
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from utils.data.images import SUFFIXES
from utils.errors import DataError, InputError
from utils.files import foreign_errors, read_bytes, read_json, read_text

VOC_LISTS = Path("ImageSets") / "Main"
HAND_SPLITS = {
    "train": Path("training_dataset") / "training_data",
    "validation": Path("validation_dataset") / "validation_data",
    "test": Path("test_dataset") / "test_data",
}
LARGEST_XML, LARGEST_JSON, LARGEST_MAT = 1 << 22, 1 << 30, 1 << 20
"""Largest annotation file read, in bytes. A COCO file of 53 MB took 6 times its size in memory; .mat files have 300."""
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
    boxes: Sequence[Box]
    location: str
    """File or FILE:LINE of the annotation."""
    within: Path | None = None
    """Folder that it must lie in, where the annotation may name any path."""


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


@dataclass(frozen=True)
class VocReader:
    """Reader of Pascal VOC (Everingham et al. 2010): Annotations/*.xml, ImageSets/Main/*.txt and JPEGImages.

    VOC counts pixels from 1 and names the first and the last one that a box covers. As Darknet's own voc_label.py does,
    1 is subtracted from both. So a box is one pixel smaller than the covered pixels, and its centre lies half a pixel
    too far to the left and top. The weights published for VOC were trained with such labels. Tools that count from 0
    need `first_pixel` 0.
    """

    images: Path | None
    """Folder of the pictures, in place of each root's JPEGImages."""
    keep_difficult: bool
    """Objects marked difficult are objects like others; else, as VOC's own evaluation has them, they are ignored."""
    first_pixel: int
    """Number of the leftmost pixel of a row: 1 in VOC itself, 0 as other tools write."""

    def read(self, roots: Sequence[Path], train: str, val: str | None) -> Annotated:
        """Pictures and objects of one or several years.

        Args:
            roots: folders like VOCdevkit/VOC2007. One without ImageSets/Main gives all its annotations for training.
            train: list of the training pictures, as `trainval`.
            val: list of the validation pictures, as `test`; a year may be without it. None reads none.

        Raises:
            DataError: no root has the list, or an annotation is malformed.
        """
        notes: Notes = defaultdict(list)
        pictures = self._split(roots, train, notes, every=True)
        if val is None:
            return Annotated(pictures, None, notes=notes)
        folder = "val" if not re.fullmatch(r"\w+", val) or val == "train" else val
        validation = self._split(roots, val, notes, every=val == train)
        return Annotated(pictures, validation, notes=notes, folders=("train", folder))

    def _split(self, roots: Sequence[Path], name: str, notes: Notes, *, every: bool) -> list[Picture]:
        """Pictures of a list; of a root without lists, all its pictures if `every`."""
        pictures, listed = [], False
        for root in roots:
            paths = _voc_annotations(root, name, every=every)
            listed = listed or paths is not None
            for path in paths or ():
                if os.path.exists(path):  # False where no file can have such a name
                    pictures.append(self._picture(path, root))
                else:
                    notes["no annotation, image left out"].append(str(path))
        if not listed:
            known = sorted({other for root in roots for other in _voc_lists(root) if "_" not in other})
            there = f"there are: {', '.join(known)[:200]}" if known else "there is none; --val-share makes a split"
            raise DataError(f"{roots[0] / VOC_LISTS / name}.txt: no such list; {there}")
        return pictures

    def _picture(self, path: Path, root: Path) -> Picture:
        document = read_xml(path)
        size, sides = document.find("size"), [0, 0]
        if size is not None:
            sides = [int(_number(path, size, tag)) if size.find(tag) is not None else 0 for tag in ("height", "width")]
        boxes = []
        for element in document.findall("object"):
            ignored = not self.keep_difficult and _text(element, "difficult").lower() not in ("", "0", "false")
            name, box = _text(element, "name"), element.find("bndbox")
            if not name or box is None:
                raise DataError(f"{path}:{element.get('line')}: an object needs a name and a bndbox")
            x1, y1, x2, y2 = (_number(path, box, tag) - self.first_pixel for tag in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append(Box(name, x1, y1, x2, y2, ignored))
        folder = self.images or (root / "JPEGImages" if (root / "JPEGImages").is_dir() else root)
        shape = (sides[0], sides[1]) if min(sides) > 0 else None
        return Picture(_voc_image(path, folder, document), shape, boxes, str(path))


def _voc_lists(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / VOC_LISTS).glob("*.txt"))


def _voc_annotations(root: Path, name: str, *, every: bool) -> list[Path] | None:
    """Annotations of the pictures in a list; all those of a root without lists if `every`; None: no such list."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    listed = root / VOC_LISTS / f"{name}.txt"
    if listed.is_file():
        lines = read_text(listed, DataError).splitlines()
        return [_voc_annotation(folder, line.strip()) for line in lines if line.strip()]
    if not every or _voc_lists(root):
        return None
    if paths := sorted(folder.glob("*.xml")):
        return paths
    raise DataError(f"{folder}: no .xml files; a folder like VOCdevkit/VOC2007 was expected")


def _voc_annotation(folder: Path, line: str) -> Path:
    """Annotation of a picture in a line of a list; the lists of single classes have -1, 0 or 1 behind its name."""
    path = folder / f"{line}.xml"
    name, _, flag = line.rpartition(" ")
    return folder / f"{name.strip()}.xml" if flag in ("-1", "0", "1") and name and not os.path.exists(path) else path


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
    with foreign_errors(path, "not valid XML", DataError):
        parser.Parse(text.encode(), True)
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


def _voc_image(path: Path, folder: Path, document: ElementTree.Element) -> Path:
    """The picture of the annotation's own name, whatever its suffix, else the one that <filename> names."""
    for suffix in (".jpg", *sorted(SUFFIXES), ".JPG", ".JPEG", ".PNG"):
        if os.path.exists(image := folder / (path.stem + suffix)):
            return image
    named = _text(document, "filename").replace("\\", "/").rpartition("/")[2]
    if os.path.isfile(folder / named):
        return folder / named
    return folder / f"{path.stem}.jpg"


def read_coco(train: Path, val: Path | None, images: Path | None = None) -> Annotated:
    """Read one or two files of COCO (Lin et al. 2014); crowd regions are ignored boxes.

    Boxes are x, y, width, height in pixels, counted from 0. Classes are the categories in the order of their ids.
    Pictures are looked for below `images`, else where COCO's own archives and other exporters put them.

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
    names, folder = tuple(categories[0].values()), files[0].split()
    if val is None:
        return Annotated(splits[0], None, names, folders=(folder, "val"))
    other = files[1].split()
    return Annotated(splits[0], splits[1], names, folders=(folder, other if other != folder else "val"))


class CocoFile:
    """A file in COCO's instances format.

    Raises:
        DataError: not JSON, or without the three lists of objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document = read_json(path, DataError, LARGEST_JSON)
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
        """Id → name, in the order of the ids, without the group of all classes that Roboflow lists first."""
        names: dict[int, str] = {}
        groups = [item.get("supercategory") for item in self.lists["categories"]]
        used = [item.get("category_id") for item in self.lists["annotations"]]
        for where, item in self._items("categories"):
            number, name = _value(where, item, "id", int), _value(where, item, "name", str).strip()
            if item.get("supercategory") == "none" and name in groups and number not in used:
                continue
            if number in names or name in names.values() or not name:
                raise DataError(f"{where}: id {number}, name {name!r}; both must be there once only")
            names[number] = name
        if not names:
            raise DataError(f"{self.path}: categories is empty")
        return dict(sorted(names.items()))

    def pictures(self, categories: dict[int, str], images: Path | None) -> list[Picture]:
        """The pictures, which lie below `images` or where they are usual."""
        boxes: dict[int, list[Box]] = {}
        names = []
        for where, item in self._items("images"):
            number = _value(where, item, "id", int)
            if number in boxes:
                raise DataError(f"{where}: id {number} is there twice")
            boxes[number] = []
            names.append(_value(where, item, "file_name", str).replace("\\", "/"))  # as tools on Windows write it
        for where, item in self._items("annotations"):
            owner, category = _value(where, item, "image_id", int), _value(where, item, "category_id", int)
            for kind, number, known in (("image_id", owner, boxes), ("category_id", category, categories)):
                if number not in known:
                    raise DataError(f"{where}: {kind} {number} is not in the file")
            x, y, width, height = _bbox(where, item)
            boxes[owner].append(Box(categories[category], x, y, x + width, y + height, bool(item.get("iscrowd"))))
        folder, within = (images, images) if images else self._folders(names)
        pictures = []
        for name, item in zip(names, self.lists["images"], strict=True):
            sides = item.get("height", 0), item.get("width", 0)
            size = sides if all(type(side) is int and side > 0 for side in sides) else None
            pictures.append(Picture(folder / name, size, boxes[item["id"]], f"{self.path}: image {item['id']}", within))
        return pictures

    def _items(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of a list, each with its place for messages."""
        for at, item in enumerate(self.lists[key]):
            yield f"{self.path}: {key}[{at}]", item

    def _folders(self, names: Sequence[str]) -> tuple[Path, Path]:
        """Folder of the first picture that is there, and the one that all must lie in, which is above the file's.

        Looked at are ../train2017, ../images/train2017, ../images and beside the file. The file's folder may be a link:
        `..` is what the path says, and then what the link leads to.
        """
        split = Path(self.split())
        places = [
            (base / part, here.parent)
            for here in dict.fromkeys((Path(os.path.abspath(self.path)).parent, self.path.resolve().parent))
            for base in (here.parent, here)
            for part in (split, "images" / split, Path("images"), *([Path()] if base == here else []))
        ]
        for name in names[:100]:
            for folder, above in places:
                if os.path.isfile(folder / name) and not os.path.isabs(name):
                    return folder, above
        return places[0]


def _value(where: str, item: dict[str, Any], name: str, kind: type) -> Any:
    value = item.get(name)
    if type(value) is not kind:  # True is an int
        word = "an integer" if kind is int else "a text"
        raise DataError(f"{where}: {name} is {repr(value)[:40]}; {word} was expected")
    return value


def _bbox(where: str, item: dict[str, Any]) -> Sequence[float]:
    box = item.get("bbox")
    numbers = [n for n in box if type(n) in (int, float) and abs(n) < 1e9] if isinstance(box, list) else []
    if len(numbers) != 4 or numbers != box:
        raise DataError(f"{where}: bbox is {repr(box)[:60]}; x, y, width, height were expected")
    return numbers


def read_oxford(root: Path, val: str | None = "test") -> Annotated:
    """Read the Oxford hand data set (Mittal, Zisserman & Torr 2011): a .mat file a picture, four corners a hand.

    A corner is (y, x) in MATLAB's coordinates, where the centre of the first pixel is 1. The box is the upright one
    around the four corners. Trained on is what was not chosen of the training and the validation pictures: 4 807 with
    821 to test on, as in the suites before this one.

    Args:
        root: the folder hand_dataset, as unpacked.
        val: key of HAND_SPLITS ("test", "validation") of the pictures to test on, or None for none.

    Raises:
        InputError: scipy is missing.
        DataError: a folder is missing, or an annotation is malformed.
    """
    notes: Notes = defaultdict(list)
    train: list[Picture] = []
    for name in ("train", "validation"):
        if name != val:
            train += _hand_pictures(root / HAND_SPLITS[name], notes)
    pictures = list(_hand_pictures(root / HAND_SPLITS[val], notes)) if val else None
    return Annotated(train, pictures, ("hand",), notes, ("train", val or "val"))


def _hand_pictures(folder: Path, notes: Notes) -> Iterator[Picture]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(".mat files need scipy; pip install -r requirements-convert.txt") from None
    if not (folder / "images").is_dir():
        raise DataError(f"{folder / 'images'}: no such folder; hand_dataset as unpacked was expected")
    for path in sorted((folder / "images").glob("*.jpg")):
        annotation = folder / "annotations" / f"{path.stem}.mat"
        if annotation.exists():
            yield Picture(path, None, _hand_boxes(annotation, loadmat), str(annotation))
        else:
            notes["no annotation, image left out"].append(str(annotation))


def _hand_boxes(path: Path, loadmat: Any) -> list[Box]:
    file = io.BytesIO(read_bytes(path, DataError, LARGEST_MAT))
    with foreign_errors(path, "not a MATLAB 5 file", DataError):
        hands = loadmat(file, simplify_cells=True, variable_names=["boxes"]).get("boxes")
    hands = [hands] if isinstance(hands, dict) else hands  # a cell array of one cell comes as the cell
    if not hasattr(hands, "__iter__") or not all(isinstance(hand, dict) for hand in hands):
        raise DataError(f"{path}: has no cell array boxes of structures with the corners a, b, c and d")
    boxes = []
    for number, hand in enumerate(hands, 1):
        try:
            ys, xs = np.array([np.asarray(hand[key], float) for key in "abcd"]).T - CENTRE
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: boxes{{{number}}}: the corners a, b, c and d must be y, x each") from None
        if not np.isfinite([xs, ys]).all():
            raise DataError(f"{path}: boxes{{{number}}}: a corner is not finite")
        boxes.append(Box("hand", float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())))
    return boxes
