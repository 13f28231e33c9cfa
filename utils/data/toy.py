"""Draw the demo's image set: 12 shapes of any colour on cluttered grounds, with labels, ready for training.

Nothing is downloaded. The same numbers draw the same set, byte for byte with the same library versions. Images of
the two splits come from different random streams. A folder that already holds the set is left as it is; a folder
that holds anything else is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from utils.cli import Parser, flag, positive_int, print_json, random_seed, run, settings_from
from utils.darknet.data_file import write_data_file
from utils.data.index import label_line
from utils.errors import DataError, InputError
from utils.files import is_vacant, new_folder, read_text, sha256

Contour: TypeAlias = NDArray[np.float32]
"""[n, 2], x and y of a closed polygon. Outlines are centred and fit the unit circle."""
Outline: TypeAlias = tuple[Contour, ...]
"""The outer contour, then its holes."""
Colour: TypeAlias = NDArray[np.float32]
"""[3], red, green and blue in 0..255."""

MIN_VISIBLE = 0.6
"""Share of an object's area that must be seen: not behind another one, not beyond the border."""
MIN_CONTRAST = 80.0
"""Distance between an object's colour and the mean colour of the ground under it, RGB in 0..255."""
SCALES = (0.16, 0.45)
"""Shortest and longest diameter of an object's circumscribed circle, as a share of the picture's side."""
TILT = 0.5
"""Largest rotation of an object, either way, in radians."""


CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
"""Corners of a cross."""


def _polar(radii: Sequence[float] | NDArray[np.float64], turn: float = 0.0) -> Contour:
    """Polygon with its corners at equal angles and the given distances from the centre; `turn` in radians."""
    angles = turn + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return (np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(radii)[:, None]).astype(np.float32)


def _centred(points: Sequence[Sequence[float]] | NDArray[np.floating]) -> Contour:
    """The same polygon, moved and scaled so that its box is centred and its farthest corner has distance 1."""
    contour = np.asarray(points, np.float32)
    contour = contour - (contour.min(0) + contour.max(0)) / 2
    return contour / np.linalg.norm(contour, axis=1).max()


def _arc(start: float, stop: float, points: int, radius: float = 1.0, x: float = 0.0) -> NDArray[np.float64]:
    angles = np.linspace(start, stop, points)
    return np.stack([x + radius * np.cos(angles), radius * np.sin(angles)], 1)


def _crescent() -> Outline:
    """The unit circle less a circle of radius 0.85 centred at x = 0.45; they cross at x = 0.533."""
    crossing = (1 - 0.85**2 + 0.45**2) / (2 * 0.45)
    height = np.sqrt(1 - crossing**2)
    outer, inner = np.arctan2(height, crossing), np.arctan2(height, crossing - 0.45)
    arcs = _arc(outer, 2 * np.pi - outer, 32), _arc(2 * np.pi - inner, inner, 24, 0.85, 0.45)
    return (_centred(np.concatenate(arcs)),)


def _heart() -> Outline:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return (_centred(np.stack([16 * np.sin(t) ** 3, -y], 1)),)


def _spiral() -> Outline:
    """A band of constant width along r = 0.16 + 0.68 s, one and three quarter turns."""
    s = np.linspace(0, 1, 64)
    angles, radius = 3.5 * np.pi * s, 0.16 + 0.68 * s
    direction = np.stack([np.cos(angles), np.sin(angles)], 1)
    outside, inside = direction * (radius + 0.13)[:, None], direction * (radius - 0.13)[:, None]
    return (_centred(np.concatenate([outside, inside[::-1]])),)


OUTLINES: dict[str, Callable[[], Outline]] = {
    "disc": lambda: (_polar([1.0] * 48),),
    "ring": lambda: (_polar([1.0] * 48), _polar([0.58] * 48)),
    "crescent": _crescent,
    "triangle": lambda: (_polar([1.0] * 3),),
    "square": lambda: (_polar([1.0] * 4),),
    "hexagon": lambda: (_polar([1.0] * 6),),
    "star": lambda: (_polar([1.0, 0.42] * 5),),
    "cross": lambda: (_centred(CROSS),),
    "heart": _heart,
    "arrow": lambda: (_centred([(0, 3.2), (2.2, 0.6), (0.8, 0.6), (0.8, -3), (-0.8, -3), (-0.8, 0.6), (-2.2, 0.6)]),),
    "spiral": _spiral,
    "gear": lambda: (_polar([1.0, 1.0, 0.72, 0.72] * 8), _polar([0.3] * 24)),
}
"""Class name to outline. None changes its class when it is tilted, mirrored or slightly squashed."""


def draw_scene(rng: Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw one picture of up to ten objects; one in twenty has none.

    Args:
        rng: source of everything that varies; the same state draws the same picture.
        size: side of the square picture, in pixels.

    Returns:
        uint8 [size, size, 3] RGB, and [n, 5]: index of the class in OUTLINES, then centre x, centre y, width and
        height of the tight box of the object's visible pixels, as shares of the picture's side.
    """
    canvas = _ground(rng, size)
    _clutter(canvas, rng)
    outlines = list(OUTLINES.values())
    owner = np.zeros((size, size), np.uint8)  # 0: ground or clutter; n: the n-th object
    classes: list[int] = []
    areas: list[int] = []
    for _ in range(int(rng.integers(1, 11)) if rng.random() < 0.95 else 0):
        kind = int(rng.integers(len(outlines)))
        outline = _placed(rng, outlines[kind](), size)
        cover = _cover(outline, size)
        covered = np.where(cover >= 128, np.uint8(len(areas) + 1), owner)
        if _all_visible(covered, [*areas, _area(outline)]):
            classes.append(kind)
            areas.append(_area(outline))
            owner = covered
            _paint(canvas, cover, rng)
    for _ in range(int(rng.integers(0, 4))):
        cover = _cover((_scrap(rng, size),), size)
        covered = np.where(cover >= 128, np.uint8(0), owner)
        if _all_visible(covered, areas):
            owner = covered
            _paint(canvas, cover, rng)
    boxes = [(kind, *_tight_box(owner == n + 1)) for n, kind in enumerate(classes)]
    return _camera(rng, canvas), np.array(boxes, np.float64).reshape(-1, 5) / [1, size, size, size, size]


def _placed(rng: Generator, outline: Outline, size: int) -> Outline:
    """The outline squashed, tilted, mirrored, scaled and moved into a picture; coordinates in pixels."""
    low, high = SCALES
    radius = size / 2 * low * (high / low) ** rng.random()
    centre = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
    squash = _rotation(rng.uniform(0, np.pi))
    linear = squash @ np.diag([1, rng.uniform(0.75, 1)]) @ squash.T @ _rotation(rng.uniform(-TILT, TILT))
    linear = linear @ np.diag([rng.choice([-1.0, 1.0]), 1.0]) * radius
    return tuple((contour @ linear.T + centre).astype(np.float32) for contour in outline)


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _cover(outline: Outline, size: int) -> NDArray[np.uint8]:
    """Share of each pixel that the outline covers, 0..255, [size, size]; holes by the even-odd rule."""
    cover = np.zeros((size, size), np.uint8)
    cv2.fillPoly(cover, [np.round(contour * 16).astype(np.int32) for contour in outline], 255, cv2.LINE_AA, shift=4)
    return cover


def _area(outline: Outline) -> int:
    """Pixels the whole outline covers at least half, inside the picture or not."""
    corner = np.floor(outline[0].min(0)) - 2
    side = int(np.ptp(outline[0], axis=0).max()) + 6
    return int(np.count_nonzero(_cover(tuple(contour - corner for contour in outline), side) >= 128))


def _all_visible(owner: NDArray[np.uint8], areas: Sequence[int]) -> bool:
    visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:]
    return all(visible >= MIN_VISIBLE * np.array(areas))


def _tight_box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Centre x, centre y, width and height in pixels of the box around the pixels that are True."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return left + width / 2, top + height / 2, width, height


def _ground(rng: Generator, size: int) -> NDArray[np.float32]:
    """A gradient between two colours under smooth noise of two scales; float32 [size, size, 3], 0..255."""
    ground = _gradient(rng, (size, size), *rng.uniform(0, 255, (2, 3)).astype(np.float32))
    for cells, strength in ((6, 35), (32, 18)):
        noise = rng.normal(0, strength * rng.random(), (cells, cells, 3)).astype(np.float32)
        ground += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(ground, 0, 255)


def _clutter(canvas: NDArray[np.float32], rng: Generator) -> None:
    """Draw lines, arcs, elongated blobs and scraps, which are of no class, onto the canvas."""
    size = len(canvas)
    for _ in range(int(rng.integers(2, 9))):
        colour, thick = rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, 4))
        start, stop = rng.integers(0, size, (2, 2)).tolist()
        if rng.random() < 0.5:
            cv2.line(canvas, start, stop, colour, thick, cv2.LINE_AA)
        else:
            axes = rng.integers(size // 12, size // 2, 2).tolist()
            turn, begin, sweep = rng.uniform(0, 360), rng.uniform(0, 360), rng.uniform(30, 150)
            cv2.ellipse(canvas, start, axes, turn, begin, begin + sweep, colour, thick, cv2.LINE_AA)
    for _ in range(int(rng.integers(1, 6))):
        _paint(canvas, _cover((_blob(rng, size) if rng.random() < 0.5 else _scrap(rng, size),), size), rng)


def _blob(rng: Generator, size: int) -> Contour:
    """A smooth closed curve, about two to four times as long as wide."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    wave = sum((rng.uniform(0, 0.22) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5)), np.zeros(40))
    points = _polar(1 + wave) * [1, rng.uniform(0.25, 0.5)] * rng.uniform(0.06, 0.25) * size
    return (points @ _rotation(rng.uniform(0, np.pi)) + rng.uniform(0, size, 2)).astype(np.float32)


def _scrap(rng: Generator, size: int) -> Contour:
    """A jagged polygon with a notch as deep as its middle, or a thin bar."""
    if rng.random() < 0.5:
        radii = rng.uniform(0.4, 1, int(rng.integers(5, 9)))
        radii[0] = 0.1
        points = _polar(radii) * rng.uniform(0.04, 0.13) * size
    else:
        half = rng.uniform((0.08, 0.006), (0.5, 0.02)) * size
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
    return (points @ _rotation(rng.uniform(0, 2 * np.pi)) + rng.uniform(0, size, 2)).astype(np.float32)


def _gradient(rng: Generator, shape: tuple[int, int], first: Colour, second: Colour) -> NDArray[np.float32]:
    """A linear run from one colour to the other in a random direction; float32 [height, width, 3]."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.linspace(-0.5, 0.5, side, dtype=np.float32) for side in shape)
    share = np.clip(0.5 + np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None], 0, 1).astype(np.float32)
    return first + (second - first) * share[..., None]


def _texture(rng: Generator, under: Colour, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A filling that stands out from the colour `under` it; float32 [height, width, 3] or what broadcasts to it."""
    colours = rng.uniform(0, 255, (16, 3)).astype(np.float32)
    first = colours[int(np.argmax(np.linalg.norm(colours - under, axis=1) >= MIN_CONTRAST))]
    second = first + rng.uniform(-35, 35, 3).astype(np.float32)
    kind = int(rng.integers(4))
    if kind == 0:
        return first[None, None]
    if kind == 1:
        return _gradient(rng, shape, first, second)
    if kind == 2:
        share = rng.random((*shape, 1), np.float32)  # speckles
    else:
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 14)  # stripes
        y, x = (np.arange(side, dtype=np.float32) for side in shape)
        phase = np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]
        share = (np.sin(phase * (2 * np.pi / period)) > 0).astype(np.float32)[..., None]
    return first + (second - first) * share


def _paint(canvas: NDArray[np.float32], cover: NDArray[np.uint8], rng: Generator) -> None:
    """Blend a random texture over the part of the canvas that is covered, in place."""
    x, y, width, height = cv2.boundingRect(cover)
    if not width:
        return
    patch, alpha = canvas[y : y + height, x : x + width], cover[y : y + height, x : x + width]
    under = np.array(cv2.mean(patch, mask=alpha)[:3], np.float32)
    patch += alpha[..., None] / np.float32(255) * (_texture(rng, under, (height, width)) - patch)


def _camera(rng: Generator, canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blur, contrast, brightness and sensor noise; uint8 of the same shape."""
    if rng.random() < 0.6:
        canvas = cast("NDArray[np.float32]", cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.2)))
    contrast, brightness, grain = rng.uniform(0.7, 1.1), rng.uniform(-30, 30), rng.uniform(0, 10)
    noise = rng.standard_normal(canvas.shape, np.float32) * np.float32(grain)
    shown = (canvas - 128) * np.float32(contrast) + np.float32(128.5 + brightness) + noise
    return np.clip(shown, 0, 255).astype(np.uint8)


EXAMPLE = "python -m utils.data.toy --output runs/demo/data --train 1400 --val 150"
MANIFEST = "SHA256SUMS"
"""Written last into a set: the recipe as a comment, then digest and name of every file, for `sha256sum -c`."""
JPEG_QUALITY = 92


@dataclass(frozen=True)
class ToyRecipe:
    """Size and seed of a set; equal recipes draw equal sets."""

    train: int = flag(1400, "training images", type=positive_int, metavar="N")
    val: int = flag(150, "validation images", type=positive_int, metavar="N")
    size: int = flag(192, "side of an image in pixels, 64..1024", type=positive_int, metavar="N")
    seed: int = flag(0, "another seed draws another set", type=random_seed, metavar="N")

    def __post_init__(self) -> None:
        if not 1 <= self.train <= 100_000 or not 1 <= self.val <= 100_000:
            raise InputError(f"--train {self.train} --val {self.val}: 1 to 100000 images each are allowed")
        if not 64 <= self.size <= 1024:
            raise InputError(f"--size {self.size}: outside 64..1024 pixels")


@dataclass(frozen=True)
class ToySet:
    """A set on the disk."""

    data: Path
    """The .data file to train with."""
    boxes: int
    """Labelled objects in both splits."""
    drawn: bool
    """False if the set was there already."""


def build(output: Path, recipe: ToyRecipe) -> ToySet:
    """Draw the set into the folder `output`, which is new or empty, or find that it is there already.

    The set is drawn beside `output` and moved there in one step, so the folder holds all of it or nothing.

    Raises:
        DataError: `output` holds something else, or is no folder.
    """
    drawn = is_vacant(output)
    if drawn:
        with new_folder(output) as folder:
            _write_set(folder, recipe)
    else:
        _check_is_set(output, recipe)
    boxes = sum(path.read_bytes().count(b"\n") for path in (output / "labels").glob("*.txt"))
    return ToySet(output / "toy.data", boxes, drawn)


def _write_set(folder: Path, recipe: ToyRecipe) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    write_data_file(folder, "toy", list(OUTLINES), valid=True)
    for stream, (split, pictures) in enumerate((("train", recipe.train), ("val", recipe.val))):
        stems = [f"{split}_{index:05d}" for index in range(pictures)]
        for index, stem in enumerate(stems):
            _write_picture(folder, stem, np.random.default_rng([recipe.seed, stream, index]), recipe.size)
        (folder / f"{split}.txt").write_text("".join(f"images/{stem}.jpg\n" for stem in stems))
    (folder / MANIFEST).write_text(_manifest(folder, recipe))


def _write_picture(folder: Path, stem: str, rng: np.random.Generator, size: int) -> None:
    image, boxes = draw_scene(rng, size)
    _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    (folder / "images" / f"{stem}.jpg").write_bytes(jpeg.tobytes())
    lines = "".join(label_line(int(number), shares) for number, *shares in boxes)
    (folder / "labels" / f"{stem}.txt").write_text(lines)


def _title(recipe: ToyRecipe) -> str:
    """First line of a manifest. It names no class of today, so that sets that were drawn before are known."""
    return f"# Recipe(train={recipe.train}, val={recipe.val}, size={recipe.size}, seed={recipe.seed})"


def _manifest(folder: Path, recipe: ToyRecipe) -> str:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names if name != MANIFEST]
    return f"{_title(recipe)}\n" + "".join(lines)


def _check_is_set(output: Path, recipe: ToyRecipe) -> None:
    """Raise DataError unless `output` holds what its manifest lists, byte for byte, and was drawn by `recipe`."""
    way_out = "name a new folder with --output"
    if not (output / MANIFEST).is_file():
        raise DataError(f"{output}: holds other files or is no folder; {way_out}")
    text = read_text(output / MANIFEST, DataError)
    if text.partition("\n")[0] != _title(recipe):
        raise DataError(f"{output}: holds another image set ({text.partition(chr(10))[0][2:200]}); {way_out}")
    for line in text.splitlines()[1:]:
        digest, _, name = line.partition("  ")
        if not (output / name).is_file() or sha256(output / name) != digest:
            raise DataError(f"{output / name}: missing or changed since it was drawn; {way_out}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of `python -m utils.data.toy`."""
    parser = Parser(__doc__, EXAMPLE, "python -m utils.data.toy")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the set, new or empty")
    parser.add_settings("image set", ToyRecipe)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the set and print where it is."""
    args = parse_args(argv)
    recipe = settings_from(args, ToyRecipe)
    made = build(args.output, recipe)
    if args.json:
        print_json({"data": str(made.data), "boxes": made.boxes, "drawn": made.drawn, "classes": len(OUTLINES)})
    else:
        state = "drawn" if made.drawn else "already there"
        print(
            f"{made.data}: {recipe.train} training and {recipe.val} validation images of {recipe.size} px, "
            f"{len(OUTLINES)} classes, {made.boxes} boxes ({state})"
        )


if __name__ == "__main__":
    run(main)
