"""What can be wrong with the pictures and labels of a data set: every kind, how bad it is, and the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from utils.cli import one_line

Severity = Literal["fatal", "warning", "note"]
EFFECTS: Mapping[Severity, str] = {"fatal": "image left out", "warning": "left out", "note": "used"}
"""Severities from the worst, and the effect on what was found."""
EXAMPLES = 3
"""Places named for each kind of finding."""
TWIN_IOU = 0.95
"""Two boxes of a class that overlap by more are one object labelled twice."""
LONG = 4.0
"""Ratio of the sides of a picture from which a letterbox leaves less than a quarter of the input to it."""


class Advice(NamedTuple):
    """Severity of a kind of finding, and the way out as a text."""

    severity: Severity
    text: str


_WRONG_LABEL = "correct the line: a wrong label leaves its whole image out"
_BAD_PICTURE = "save or fetch the image again, or take it off the list"
KINDS: Mapping[str, Advice] = {
    "wrong path": Advice("fatal", "paths are relative to the file that names them, or to the working directory"),
    "no images": Advice("fatal", "name images in the list, folder or pattern"),
    "nothing usable": Advice("fatal", "correct what is found below"),
    "no boxes": Advice("fatal", "labels lie in `labels` beside `images`, one .txt an image"),
    "same file in train and val": Advice("fatal", "take it off one list: results on it say nothing"),
    "identical images in train and val": Advice("fatal", "take one off its list: results on it say nothing"),
    "missing image": Advice("fatal", "paths in a list are relative to the list, or to the working directory"),
    "not a file": Advice("fatal", "take it off the list"),
    "unreadable image": Advice("fatal", "look at the file's permissions"),
    "empty image": Advice("fatal", _BAD_PICTURE),
    "unknown image format": Advice("fatal", "save it as PNG, JPEG, BMP, WebP, GIF or TIFF"),
    "unsupported pixel values": Advice("fatal", "save it with 8 or 16 bits a channel"),
    "oversized image": Advice("fatal", "scale it down"),
    "damaged image": Advice("fatal", _BAD_PICTURE),
    "unreadable label file": Advice("fatal", "look at the file's permissions and size"),
    "not a text file": Advice("fatal", "save it as UTF-8"),
    "wrong column count": Advice(
        "fatal", "a row is class cx cy w h; a sixth column is a confidence, and more are a polygon: write its box"
    ),
    "not a number": Advice("fatal", _WRONG_LABEL),
    "fractional class": Advice("fatal", _WRONG_LABEL),
    "negative class": Advice("fatal", "classes count from 0"),
    "class beyond names": Advice("fatal", "add the name, or correct the class; classes count from 0"),
    "out of range": Advice("fatal", "boxes are shares of the image, 0..1, not pixels"),
    "negative size": Advice("fatal", _WRONG_LABEL),
    "listed twice": Advice("warning", "it is used once"),
    "zero-size box": Advice("warning", "the row is left out"),
    "duplicate row": Advice("warning", "the second is left out"),
    "no validation images": Advice("warning", "nothing is evaluated, and best.pt is the last epoch"),
    "identical images in one split": Advice("warning", "they count twice; take one off the list"),
    "most label files missing": Advice("warning", "these images teach that nothing is there; look where labels lie"),
    "class without a box in train": Advice("warning", "it cannot be learnt"),
    "class without a box in val": Advice("warning", "it is not measured; mAP is the mean over the others"),
    "object labelled twice": Advice("warning", f"boxes of a class that overlap by more than {TWIN_IOU:g}; delete one"),
    "box beyond the image": Advice("warning", "it is cut to the image; look whether boxes are of another size"),
    "many boxes smaller than a cell": Advice("warning", "train at a larger --img_size, or with a head of finer stride"),
    "anchors do not fit": Advice("warning", "train.py --auto-anchors clusters them again"),
    "very long image": Advice("warning", f"sides over {LONG:g} : 1; cut it, or most of the input is border"),
    "rounded label": Advice("note", "values less than 0.001 outside 0..1 are clipped"),
    "boxes smaller than a cell": Advice("note", "expect to miss them"),
    "other class count": Advice("note", "train.py adapts the heads"),
    "no label file": Advice("note", "an image without objects"),
    "empty label file": Advice("note", "an image without objects"),
}
"""Every kind of finding of `index` and of the doctor, the worst first.

A label that says something else than it means is fatal to its image: the picture without that box would teach that
there is nothing. A row that says nothing (zero size, a duplicate) only leaves itself out.
"""


@dataclass(frozen=True)
class Finding:
    """Something found in a data set."""

    kind: str
    """A key of `KINDS`."""
    place: str
    """File, or FILE:LINE."""
    detail: str = ""

    @property
    def severity(self) -> Severity:
        """Severity of its kind."""
        return KINDS[self.kind].severity


def first_places(places: Sequence[str]) -> str:
    """The first places, and how many more there are."""
    more = f" and {len(places) - EXAMPLES} more" if len(places) > EXAMPLES else ""
    return ", ".join(map(one_line, places[:EXAMPLES])) + more
