"""What a training step, its memory, its distillation and its data cost, in units of something that is known.

Everything is timed in turn, A B A B, in one process; a first round does not count. The ratio is the median over the
rounds, so that what else the machine does meets both alike and figures mean the same on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from utils.cli import Parser, flag, image_side, log, positive_int, run, settings_from
from utils.data.augment import Augmentation
from utils.data.datasets import DetectionDataset, make_loader
from utils.data.images import write_image
from utils.data.index import Index, index
from utils.report.run_dir import environment
from utils.report.tables import Column, markdown_table

EXAMPLE = "python -m benchmarks.ratios step --img_size 224"
CFGS = ("cfg/yolov4-tiny.cfg", "cfg/yolov3-tiny.cfg")
Work = Callable[[], object]
Laps = Mapping[str, Sequence[float]]
"""Milliseconds of every round; the first entry is the unit."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    cfg: Sequence[str] = flag(CFGS, "networks", nargs="+", metavar="FILE")
    img_size: int = flag(416, "side of the input", "--img_size", type=image_side, metavar="N")
    batch_size: int = flag(16, "images in a batch", type=positive_int, metavar="N")
    rounds: int = flag(9, "rounds of each", type=positive_int, metavar="N")


def paired(works: Mapping[str, Work], rounds: int, clock: Callable[[], float] = time.perf_counter) -> Laps:
    """Time everything in turn."""
    laps: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = clock()
            work()
            if number:
                laps[name].append(1000 * (clock() - started))
    return laps


def loader(settings: Settings) -> Iterator[tuple[str, Laps]]:
    """Training samples of one process, beside reading and resizing the same pictures."""
    cv2.setNumThreads(1)
    side, colourless = settings.img_size, Augmentation(hsv_h=0, hsv_s=0, hsv_v=0)
    with tempfile.TemporaryDirectory() as folder:
        pictures = index(draw_pictures(Path(folder)), "a", cache_dir=None)

        def read_and_resize() -> None:
            for path in pictures.images:
                cv2.resize(cv2.imread(str(path)), (side, side))

        works = {
            "imread + resize": read_and_resize,
            "mosaic, decoded each time": samples(pictures, settings, Augmentation()),
            "mosaic, cached": samples(pictures, settings, Augmentation(), cache="ram"),
            "mosaic, cached, no colours": samples(pictures, settings, colourless, cache="ram"),
        }
        laps = paired(works, settings.rounds, time.process_time)
        yield f"{len(pictures)} images of 640 × 480 to {side}, CPU time of one thread", laps


def samples(pictures: Index, settings: Settings, augment: Augmentation, **options: str) -> Work:
    """A pass that makes a mosaic for every picture, in batches as a training gets them."""
    size = (settings.img_size, settings.img_size)
    dataset = DetectionDataset(pictures, size=size, augment=augment, seed=1, **options)
    batches, epochs = make_loader(dataset, settings.batch_size, shuffle=True), itertools.count()

    def epoch() -> None:
        batches.begin(next(epochs))
        dataset.store.drop()
        for _ in batches:
            pass

    return epoch


def draw_pictures(folder: Path, count: int = 64) -> Path:
    """JPEG files with two boxes each, in a folder `images`: smooth noise, finer layers fainter, as in photographs."""
    (folder / "labels").mkdir()
    (folder / "images").mkdir()
    rng = np.random.default_rng(1)
    for number in range(count):
        image = np.full((480, 640, 3), 128.0)
        for rows, deviation in ((4, 40.0), (8, 30.0), (16, 22.0), (32, 16.0), (64, 12.0), (160, 6.0), (480, 2.0)):
            layer = rng.normal(0, deviation, (rows, rows * 640 // 480, 3))
            image += cv2.resize(layer, (640, 480), interpolation=cv2.INTER_CUBIC)
        write_image(folder / "images" / f"{number}.jpg", np.clip(image, 0, 255).astype(np.uint8))
        (folder / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.3 0.4\n0 0.2 0.3 0.1 0.1\n")
    return folder / "images"


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line for each thing that is measured."""
    from benchmarks.step import STEPS

    benchmarks = {**STEPS, "loader": loader}
    args = parse_args(benchmarks, argv)
    lines = []
    for name in args.names or benchmarks:
        for what, laps in benchmarks[name](settings_from(args, Settings)):
            log(f"{name}: {what}")
            lines += [(name, what, *cells) for cells in compared(laps)]
    names = ("", "measured on", "what", "in units of", "ms", "unit, ms", "× as long", "× as fast")
    print(markdown_table([Column(name) for name in names], lines))
    where = f"{environment()['cpu']}, threads: {torch.get_num_threads()}, PyTorch {torch.__version__}"
    print(f"medians of {args.rounds} rounds; {where}")


def parse_args(benchmarks: Mapping[str, object], argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.ratios")
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*benchmarks, []], help=", ".join(benchmarks))
    parser.add_settings("what is measured", Settings)
    return parser.parse_args(argv)


def compared(laps: Laps) -> Iterator[tuple[str, str, float, float, float, float]]:
    """Everything and its unit: names, median milliseconds, and the median ratio of a round both ways."""
    (unit, base), *others = laps.items()
    for name, times in others:
        ratio = statistics.median(np.divide(times, base))
        yield name, unit, statistics.median(times), statistics.median(base), ratio, 1 / ratio


if __name__ == "__main__":
    run(main)
