"""Draw the pictures of data/samples: scenes like the demo's set, of neither of its splits, wider than high.

A square scene is drawn and a band cut out of it that cuts no object; a scene where that does not work, or with fewer
than LEAST_OBJECTS, is passed over.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.cli import Parser, run
from utils.data.toy_scene import draw_scene
from utils.files import atomic_write_bytes

EXAMPLE = "python -m utils.data.samples --output data/samples"
WIDTH, HEIGHT = 640, 480
STREAM = 2
"""Random stream of the samples; 0 and 1 are the splits of the demo's set (utils.data.toy)."""
COUNT = 3
LEAST_OBJECTS = 5
JPEG_QUALITY = 85


def draw_samples() -> Iterator[NDArray[np.uint8]]:
    """COUNT pictures, uint8 [HEIGHT, WIDTH, 3], RGB; the same ones every time."""
    drawn = 0
    for index in itertools.count():
        image, rows = draw_scene(np.random.default_rng([0, STREAM, index]), WIDTH)
        top = _uncut_band((rows[:, 2] - rows[:, 4] / 2) * WIDTH, (rows[:, 2] + rows[:, 4] / 2) * WIDTH)
        if top is not None:
            yield image[top : top + HEIGHT]
            drawn += 1
        if drawn == COUNT:
            return


def _uncut_band(tops: NDArray[np.float64], bottoms: NDArray[np.float64]) -> int | None:
    """First row of the band that holds most of the objects and cuts none; None if it would hold too few."""
    best, most = None, LEAST_OBJECTS - 1
    for top in range(WIDTH - HEIGHT + 1):
        inside = (tops >= top) & (bottoms <= top + HEIGHT)
        outside = (bottoms <= top) | (tops >= top + HEIGHT)
        if (inside | outside).all() and inside.sum() > most:
            best, most = top, inside.sum()
    return best


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of `python -m utils.data.samples`."""
    parser = Parser(__doc__, EXAMPLE, "python -m utils.data.samples")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the pictures into the folder and name them."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(draw_samples(), 1):
        path = args.output / f"shapes{number}.jpg"
        _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        atomic_write_bytes(path, jpeg.tobytes())
        print(f"{path}: {len(jpeg)} bytes")


if __name__ == "__main__":
    run(main)
