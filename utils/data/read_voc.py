"""Reader of Pascal VOC: Annotations/*.xml, ImageSets/Main/*.txt and JPEGImages (Everingham et al. 2010).

VOC counts pixels from 1 and names the first and the last one that a box covers. As Darknet's own voc_label.py does, 1
is subtracted from both, so a box ends half a pixel of its centre and one of its size short of the covered pixels; the
weights published for VOC were trained with such labels. Tools that count from 0 need `first_pixel` 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from utils.data.annotations import Annotated, Box, Note, Picture
from utils.data.images import SUFFIXES
from utils.errors import DataError
from utils.files import read_text

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
            parts[name] = tuple(_pictures(stems, images, rules or VocRules(), notes))
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


def _pictures(
    stems: Sequence[tuple[Path, str]], images: Path | None, rules: VocRules, notes: list[Note]
) -> list[Picture]:
    pictures = []
    for root, stem in stems:
        path = _annotations(root) / f"{stem}.xml"
        if not path.exists():
            notes.append(Note("no annotation, picture left out", str(path)))
            continue
        folder = images or (root / "JPEGImages" if (root / "JPEGImages").is_dir() else root)
        pictures.append(_picture(path, folder, rules))
    return pictures


def _picture(path: Path, folder: Path, rules: VocRules) -> Picture:
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
    return Picture(_image(path, folder, root), tuple(sides) if min(sides) > 0 else None, tuple(boxes), str(path))


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


def _image(path: Path, folder: Path, root: Element) -> Path:
    """The picture of the annotation's own name, whatever its suffix, else the one that <filename> names."""
    for suffix in (".jpg", *sorted(SUFFIXES), ".JPG", ".JPEG", ".PNG"):
        if (found := folder / (path.stem + suffix)).exists():
            return found
    named = _text(root, "filename").replace("\\", "/").rpartition("/")[2]
    if named not in ("", ".", "..") and "\0" not in named and (folder / named).is_file():
        return folder / named
    return folder / f"{path.stem}.jpg"
