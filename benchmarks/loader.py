"""How many training samples a second one process makes, in units of `cv2.imread` + `cv2.resize` of the same pictures.

All are timed in turn, A B A B, on one thread: a read picture resized to the input; a mosaic of four with colour jitter,
its pictures decoded each time; the same from the cache in memory; the same without colour jitter. Samples are made in
batches, as a training gets them. Without --data the pictures are noise of all scales, as 640 x 480 JPEG files.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.cli import Parser, image_side, positive_int, print_json, random_seed, run
from utils.darknet.data_file import load_data
from utils.data.augment import Augmentation
from utils.data.datasets import DetectionDataset, Request
from utils.data.images import write_image
from utils.data.index import Index, index

EXAMPLE = "python -m benchmarks.loader --rounds 5"
COUNT = 64
"""Pictures that are drawn without --data."""
SHAPE = (480, 640)
OCTAVES = ((4, 40.0), (8, 30.0), (16, 22.0), (32, 16.0), (64, 12.0), (160, 6.0), (480, 2.0))
"""Rows and standard deviation of each layer of noise: amplitudes fall with the frequency as in photographs."""
BATCH = 16


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.loader")
    add = parser.add_argument
    add("--data", metavar="FILE", help="data set whose training pictures are used (default: drawn ones)")
    add("--img_size", type=image_side, default=416, metavar="N", help="side of the input (default: %(default)s)")
    add("--rounds", type=positive_int, default=9, metavar="N", help="times each is timed (default: %(default)s)")
    add("--seed", type=random_seed, default=1, metavar="N", help="of pictures and samples (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Time all of them and print medians, and ratios to reading and resizing in the same round."""
    args = parse_args(argv)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            data = load_data(args.data)
            pictures = index(data.train, data.names, cache_dir=None)
        else:
            pictures = index(draw_pictures(Path(folder), args.seed), "a", cache_dir=None)
        seconds = timed(works(pictures, args.img_size, args.seed), args.rounds)
        size = statistics.mean(path.stat().st_size for path in pictures.images)
    base, *_ = seconds.values()
    print_json({
        "pictures": len(pictures), "mean_bytes": round(size), "img_size": args.img_size, "rounds": args.rounds,
        "opencv": cv2.__version__,
        "images_per_second": {name: round(len(pictures) / statistics.median(row), 1) for name, row in seconds.items()},
        "ratio": {name: round(statistics.median(np.divide(base, row)), 3) for name, row in seconds.items()},
        "ratio_min_max": {
            name: [round(float(pick(np.divide(base, row))), 3) for pick in (np.min, np.max)]
            for name, row in seconds.items()
        },
    })  # fmt: skip


def works(pictures: Index, side: int, seed: int) -> dict[str, Callable[[int], None]]:
    """What is timed, by name: a pass over all pictures, given the number of the round."""
    plain = Augmentation(hsv_h=0, hsv_s=0, hsv_v=0)
    return {
        "imread_resize": lambda _: read_and_resize(pictures, side),
        "uncached": samples(pictures, side, seed, Augmentation()),
        "cached": samples(pictures, side, seed, Augmentation(), cache="ram"),
        "cached_without_colours": samples(pictures, side, seed, plain, cache="ram"),
    }


def read_and_resize(pictures: Index, side: int) -> None:
    """The yardstick: every picture decoded and resized to the input."""
    for path in pictures.images:
        cv2.resize(cv2.imread(str(path)), (side, side))


def samples(pictures: Index, side: int, seed: int, augment: Augmentation, **options: str) -> Callable[[int], None]:
    """A pass that makes a mosaic for every picture."""
    dataset = DetectionDataset(
        pictures, size=(side, side), augment=dataclasses.replace(augment, mosaic=1.0), seed=seed, **options
    )
    positions = range(len(pictures))

    def epoch(number: int) -> None:
        for start in positions[::BATCH]:
            dataset.__getitems__([Request(number, at, (side, side)) for at in positions[start : start + BATCH]])

    return epoch


def timed(work: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each, one after the other in every round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, step in work.items():
            start = time.perf_counter()
            step(number)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def draw_pictures(folder: Path, seed: int) -> Path:
    """COUNT JPEG files with a box each, in a folder `images`, which is returned."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number, image in enumerate(noise(seed)):
        write_image(folder / "images" / f"{number}.jpg", image)
        (folder / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.3 0.4\n0 0.2 0.3 0.1 0.1\n")
    return folder / "images"


def noise(seed: int) -> Iterator[NDArray[np.uint8]]:
    """COUNT pictures [480, 640, 3]: layers of smooth noise, finer ones fainter."""
    rng = np.random.default_rng(seed)
    height, width = SHAPE
    for _ in range(COUNT):
        image = np.full((height, width, 3), 128.0)
        for rows, deviation in OCTAVES:
            layer = rng.normal(0, deviation, (rows, rows * width // height, 3))
            image += cv2.resize(layer, (width, height), interpolation=cv2.INTER_CUBIC)
        yield np.clip(image, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    run(main)
