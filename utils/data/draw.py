"""Detections drawn on pictures: boxes, labels that stay inside the picture, and grids of a batch."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.data.images import Image

Colour = tuple[int, int, int]
"""Red, green, blue."""

Mark = tuple[NDArray[np.floating], str, Colour]
"""Boxes [n, 6], the word that they are marked with, and its colour."""
FONT = cv2.FONT_HERSHEY_SIMPLEX
COLOURS = 128
"""Colours told apart; class 128 has the colour of class 0."""
GRID_SIDE = 1920
"""Longest side of a grid of pictures, in pixels."""
GRID_PICTURES = 16
"""Most pictures of a grid."""
GAP = 4
"""Pixels between the pictures of a grid."""
SHORTEST = 320
"""Pixels that the longer side of a picture in a grid has at least, where the grid has room for it."""
LABELLED = 0.15
"""Largest share of a picture in a grid that its labels may cover."""
STRIP = 24
"""Height of a line of headings or of the legend, in pixels."""
LETTER = 10
"""Width of a letter in them."""
LOST, GAINED = (213, 94, 0), (0, 158, 115)
"""Vermilion and green (Okabe and Ito), for `mark_boxes`."""
MARK = 6
"""Width of the line around a marked box, in pixels."""


class Style(NamedTuple):
    """Sizes that grow with the picture, in pixels but for `font_scale`."""

    line: int
    """Width of a box's line."""
    font_scale: float
    """Factor on OpenCV's font, whose capitals are 21 pixels high."""
    stroke: int
    """Width of a letter's line."""
    margin: int
    """Space around a label's text."""


class Label(NamedTuple):
    """A text's ground and where its letters stand."""

    left: int
    top: int
    right: int
    bottom: int
    baseline: int


def draw_detections(
    image: Image, detections: NDArray[np.floating], names: Sequence[str], labelled: float = 1.0
) -> Image:
    """A copy of a picture with a box and a label for every detection, the most confident ones on top.

    Args:
        image: uint8 [H, W, 3], RGB.
        detections: [n, 6], x1, y1, x2, y2 in pixels of the picture, confidence, class. A confidence of NaN (a label
            of a data set has none) is not written.
        names: names of the classes; a class beyond them is shown by its number.
        labelled: largest share of the picture that labels may cover, see `label_texts`.

    Returns:
        uint8 [H, W, 3], RGB.
    """
    picture = np.ascontiguousarray(image).copy()
    style = style_of(*picture.shape[:2])
    order = np.argsort(np.nan_to_num(detections[:, 4], nan=1.0), kind="stable")[::-1]
    texts = label_texts(detections[order], names, picture.shape[:2], labelled)
    labels: list[Label] = []
    for text, corners in zip(texts, detections[order, :4].tolist(), strict=True):
        x1, y1, x2, y2 = map(round, corners)
        labels.append(_place(text, (x1, y1, x2, y2), picture.shape[:2], style, labels))
    for x1, y1, x2, y2, _, number in detections[order[::-1]].tolist():
        corners = (round(x1), round(y1)), (round(x2), round(y2))
        cv2.rectangle(picture, *corners, colour(int(number)), style.line)
    for number, text, label in zip(detections[order[::-1], 5], texts[::-1], labels[::-1], strict=True):
        ground = colour(int(number))
        cv2.rectangle(picture, label[:2], (label.right - 1, label.bottom - 1), ground, cv2.FILLED)
        origin = (label.left + style.margin, label.baseline)
        cv2.putText(picture, text, origin, FONT, style.font_scale, ink_on(ground), style.stroke, cv2.LINE_AA)
    return picture


def label_texts(
    detections: NDArray[np.floating], names: Sequence[str], size: tuple[int, int], labelled: float
) -> list[str]:
    """The texts of labels: class and confidence, or shorter ones where labels would cover too much of a picture.

    Args:
        detections: [n, 6], as for `draw_detections`.
        names: names of the classes.
        size: height and width of the picture.
        labelled: largest share of it that labels may cover; beyond it they have the class only, and then its number.
    """
    style, numbers = style_of(*size), detections[:, 5].astype(int).tolist()
    classes = [label_text(number, names) for number in numbers]
    scores = ["" if math.isnan(score) else f" {score:.2f}" for score in detections[:, 4].tolist()]
    texts = list(map(str.__add__, classes, scores))
    for shorter in (classes, list(map(str, numbers))):
        if sum(math.prod(_label_size(text, style)[:2]) for text in texts) <= labelled * math.prod(size):
            break
        texts = shorter
    return texts


def mark_boxes(picture: Image, boxes: NDArray[np.floating], word: str, tint: Colour) -> None:
    """Give boxes, [n, 4 or more] from x1, y1, x2, y2, a broad frame and a word in a picture."""
    for x1, y1, x2, y2 in boxes[:, :4].round().astype(int).tolist():
        cv2.rectangle(picture, (x1, y1), (x2, y2), tint, MARK)
        cv2.putText(picture, word, (x1 + MARK, y2 - MARK), FONT, 0.5, tint, 2)


def draw_grid(
    images: Image,
    detections: Sequence[NDArray[np.floating]],
    names: Sequence[str],
    titles: Sequence[str] = (),
    marks: Sequence[Sequence[Mark]] = (),
) -> Image:
    """The first pictures of a batch side by side, at most GRID_SIDE pixels wide and high, with their boxes.

    Where a picture has room for the numbers of its classes only, a legend below the grid names them.

    Args:
        images: uint8 [B, C, H, W] with C = 3 (RGB) or 1 (grey).
        detections: one [n, 6] array a picture, as for `draw_detections`.
        names: names of the classes.
        titles: headings of the columns, which are as many; none: as many columns as fit best.
        marks: of each picture what is marked; none: nothing.

    Returns:
        uint8 [H', W', 3], RGB.
    """
    count = min(len(images), GRID_PICTURES)
    height, width = images.shape[2:]
    best = min(range(1, count + 1), key=lambda n: (max(n * width, math.ceil(count / n) * height), n))
    columns = len(titles) or best
    rows = math.ceil(count / columns)
    most = max(2.0, SHORTEST / max(height, width))
    scale = min(most, (GRID_SIDE / columns - GAP) / width, (GRID_SIDE / rows - GAP) / height)
    cell_height, cell_width = max(1, int(height * scale)), max(1, int(width * scale))
    grid = np.full((rows * (cell_height + GAP) - GAP, columns * (cell_width + GAP) - GAP, 3), 255, np.uint8)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    numbered: set[int] = set()
    for position in range(count):
        picture = np.repeat(images[position].transpose(1, 2, 0), 3 // images.shape[1], axis=2)
        picture = cast("Image", cv2.resize(picture, (cell_width, cell_height), interpolation=interpolation))
        factors = np.array([cell_width / width, cell_height / height] * 2 + [1, 1])
        boxes = detections[position] * factors
        top, left = (position // columns) * (cell_height + GAP), (position % columns) * (cell_width + GAP)
        for chosen, word, tint in marks[position] if marks else ():
            mark_boxes(picture, chosen * factors, word, tint)
        grid[top : top + cell_height, left : left + cell_width] = draw_detections(picture, boxes, names, LABELLED)
        texts = label_texts(boxes, names, (cell_height, cell_width), LABELLED)
        if texts == list(map(str, numbers := boxes[:, 5].astype(int).tolist())):
            numbered.update(numbers)
    heading = [_strip([title], cell_width + GAP) for title in titles]
    parts = [np.hstack(heading)[:, : grid.shape[1]]] if heading else []
    legend = "    ".join(f"{number}={label_text(number, names)}" for number in sorted(numbered))
    lines = textwrap.wrap(legend, max(1, grid.shape[1] // LETTER), break_on_hyphens=False)
    return np.vstack([*parts, grid, _strip(lines, grid.shape[1])])


def _strip(lines: Sequence[str], width: int) -> Image:
    """Black words on white, `width` pixels wide."""
    strip = np.full((STRIP * len(lines), width, 3), 255, np.uint8)
    for number, line in enumerate(lines, 1):
        cv2.putText(strip, line, (GAP, STRIP * number - 8), FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def targets_as_detections(
    targets: NDArray[np.floating], count: int, size: tuple[int, int]
) -> list[NDArray[np.floating]]:
    """The labels of a batch as `draw_grid` takes them.

    Args:
        targets: [N, 6]: picture in the batch, class, cx, cy, w, h as shares of the network input.
        count: pictures of the batch.
        size: height and width of the network input, in pixels.

    Returns:
        One [n, 6] array a picture: x1, y1, x2, y2 in pixels of the network input, NaN, class.
    """
    height, width = size
    centre, half = targets[:, 2:4], targets[:, 4:6] / 2
    corners = np.concatenate((centre - half, centre + half), axis=1) * ([width, height] * 2)
    rows = np.column_stack((corners, np.full(len(targets), np.nan), targets[:, 1]))
    return [rows[targets[:, 0] == picture] for picture in range(count)]


def colour(number: int) -> Colour:
    """The colour of a class, the same in every picture and for every list of names."""
    return _palette()[number % COLOURS]


@lru_cache(maxsize=1)
def _palette() -> tuple[Colour, ...]:
    """Colours, each as far from all before it in CIE Lab as can be, neither greyish nor too dark or light."""
    steps = np.linspace(0, 255, 16).astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = cv2.cvtColor((candidates / np.float32(255))[None], cv2.COLOR_RGB2Lab)[0]
    vivid = (np.hypot(lab[:, 1], lab[:, 2]) > 45) & (lab[:, 0] > 35) & (lab[:, 0] < 92)
    candidates, lab = candidates[vivid], lab[vivid]
    chosen = [int(np.abs(candidates.astype(int) - (255, 51, 51)).sum(axis=1).argmin())]  # begin with red
    distance = np.full(len(lab), np.inf)
    while len(chosen) < COLOURS:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return tuple(tuple(candidates[index].tolist()) for index in chosen)


def ink_on(ground: Colour) -> Colour:
    """Black or white, whichever has the larger contrast ratio on a ground (WCAG 2.1, "relative luminance")."""
    channels = np.array(ground) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return (0, 0, 0) if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else (255, 255, 255)


def label_text(number: int, names: Sequence[str]) -> str:
    """Name of a class in the letters that OpenCV's font has: accents are dropped, other scripts give `class 7`."""
    name = names[number] if 0 <= number < len(names) else ""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return plain if plain and plain.isascii() and plain.isprintable() else f"class {number}"


def style_of(height: int, width: int) -> Style:
    """Sizes for a picture: capitals about 1/45 of its mean side, and never below 8 pixels."""
    side = (height + width) / 2
    capitals = max(8.0, side / 45)
    return Style(max(1, round(side / 280)), capitals / 21, max(1, round(capitals / 10)), max(2, round(capitals / 3)))


def _label_size(text: str, style: Style) -> tuple[int, int, int]:
    """Width and height of a label, and the height of its letters, in pixels."""
    (width, height), below = cv2.getTextSize(text, FONT, style.font_scale, style.stroke)
    return width + 2 * style.margin, height + below + 2 * style.margin, height


def _place(
    text: str, box: tuple[int, int, int, int], size: tuple[int, int], style: Style, taken: Sequence[Label]
) -> Label:
    """The first place above, in or under a box that is inside the picture and hides no other label, or hides least."""
    width, height, text_height = _label_size(text, style)
    x1, y1, x2, y2 = box
    outside = style.line // 2
    left, right = x1 - outside, x2 + outside - width + 1
    corners = ((left, y1 - height), (left, y1), (left, y2), (right, y1 - height), (right, y2), (left, y2 - height))
    places: dict[int, Label] = {}  # pixels that a label there would hide or lie off → the first such label
    for x, y in corners:
        x = max(0, min(x, size[1] - width))
        inside = max(0, min(y, size[0] - height))
        label = Label(x, inside, x + width, inside + height, inside + style.margin + text_height)
        hidden = sum(_overlap(label, other) for other in taken) + abs(inside - y) * width
        places.setdefault(hidden, label)
    return places[min(places)]


def _overlap(a: Label, b: Label) -> int:
    """Pixels that two labels share."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    return max(0, width) * max(0, height)
