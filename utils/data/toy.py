"""Draw the demo's picture set: 12 shapes of any colour on cluttered grounds, with labels, ready for training.

Nothing is downloaded. The same numbers draw the same set, byte for byte with the same library versions. Pictures of
the two splits come from different random streams. A folder that already holds the set is left as it is; a folder
that holds anything else is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.cli import Parser, positive_int, print_json, random_seed, run
from utils.data.toy_scene import OUTLINES, draw_scene
from utils.errors import DataError, InputError
from utils.files import read_text

EXAMPLE = "python -m utils.data.toy --output runs/demo/data --train 1400 --val 150"
MANIFEST = "SHA256SUMS"
"""Written last into a set: the recipe as a comment, then digest and name of every file, for `sha256sum -c`."""
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Recipe:
    """What a set is made of; equal recipes draw equal sets."""

    train: int = 1400
    """Pictures of the training split."""
    val: int = 150
    """Pictures of the validation split."""
    size: int = 256
    """Side of a picture, in pixels."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.train <= 100_000 or not 1 <= self.val <= 100_000:
            raise InputError(f"--train {self.train} --val {self.val}: 1 to 100000 pictures each are allowed")
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


def build(output: Path, recipe: Recipe) -> ToySet:
    """Draw the set into the folder `output`, which is new or empty, or find that it is there already.

    The set is drawn beside `output` and moved there in one step, so the folder holds all of it or nothing.

    Raises:
        DataError: `output` holds something else, or is no folder.
    """
    data = output / "toy.data"
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        _check_is_set(output, recipe)
        return ToySet(data, _count_boxes(output), drawn=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".toy-", dir=output.parent) as scratch:
        folder = Path(scratch) / "set"
        _write_set(folder, recipe)
        boxes = _count_boxes(folder)
        try:
            os.rename(folder, output)  # replaces an empty folder, fails on any other
        except OSError as failure:
            raise DataError(f"{output}: {failure.strerror}; name a new folder with --output") from None
    return ToySet(data, boxes, drawn=True)


def _write_set(folder: Path, recipe: Recipe) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    (folder / "toy.names").write_text("".join(f"{name}\n" for name in OUTLINES))
    lines = [f"classes={len(OUTLINES)}", "train=train.txt", "valid=val.txt", "names=toy.names"]
    (folder / "toy.data").write_text("".join(f"{line}\n" for line in lines))
    for stream, (split, pictures) in enumerate((("train", recipe.train), ("val", recipe.val))):
        stems = [f"{split}_{index:05d}" for index in range(pictures)]
        for index, stem in enumerate(stems):
            _write_picture(folder, stem, np.random.default_rng([recipe.seed, stream, index]), recipe.size)
        (folder / f"{split}.txt").write_text("".join(f"images/{stem}.jpg\n" for stem in stems))
    (folder / MANIFEST).write_text(_manifest(folder, recipe))


def _write_picture(folder: Path, stem: str, rng: np.random.Generator, size: int) -> None:
    image, rows = draw_scene(rng, size)
    _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    (folder / "images" / f"{stem}.jpg").write_bytes(jpeg.tobytes())
    label = "".join(f"{int(kind)} " + " ".join(f"{value:.6f}" for value in box) + "\n" for kind, *box in rows)
    (folder / "labels" / f"{stem}.txt").write_text(label)


def _manifest(folder: Path, recipe: Recipe) -> str:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names if name != MANIFEST]
    return f"# {recipe}\n" + "".join(lines)


def _check_is_set(output: Path, recipe: Recipe) -> None:
    """Raise DataError unless `output` holds what its manifest lists, byte for byte, and was drawn by `recipe`."""
    way_out = "name a new folder with --output"
    if not (output / MANIFEST).is_file():
        raise DataError(f"{output}: holds other files or is no folder; {way_out}")
    text = read_text(output / MANIFEST, DataError)
    if text.partition("\n")[0] != f"# {recipe}":
        raise DataError(f"{output}: holds another picture set ({text.partition(chr(10))[0][2:200]}); {way_out}")
    for line in text.splitlines()[1:]:
        digest, _, name = line.partition("  ")
        if not (output / name).is_file() or _digest(output / name) != digest:
            raise DataError(f"{output / name}: missing or changed since it was drawn; {way_out}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _count_boxes(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / "labels").iterdir())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of `python -m utils.data.toy`."""
    parser = Parser(__doc__, EXAMPLE, "python -m utils.data.toy")
    default = Recipe()
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the set, new or empty")
    for flag, kind, text in (
        ("train", positive_int, "training pictures"),
        ("val", positive_int, "validation pictures"),
        ("size", positive_int, "side of a picture in pixels, 64..1024"),
        ("seed", random_seed, "another seed draws another set"),
    ):
        parser.add_argument(
            f"--{flag}", type=kind, default=getattr(default, flag), metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the set and print where it is."""
    args = parse_args(argv)
    recipe = Recipe(args.train, args.val, args.size, args.seed)
    made = build(args.output, recipe)
    if args.json:
        print_json({"data": str(made.data), "boxes": made.boxes, "drawn": made.drawn, "classes": len(OUTLINES)})
    else:
        state = "drawn" if made.drawn else "already there"
        print(
            f"{made.data}: {recipe.train} training and {recipe.val} validation pictures of {recipe.size} px, "
            f"{len(OUTLINES)} classes, {made.boxes} boxes ({state})"
        )


if __name__ == "__main__":
    run(main)
