"""Detect objects in pictures, videos, webcams and network streams; print what was found, and draw it.

A file that was there before is never overwritten: the new one gets a number. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from utils import cli
from utils.darknet.data_file import load_data, load_names
from utils.darknet.shapes import max_stride
from utils.data.draw import draw_detections
from utils.data.fit import FitMode, fit, unfit
from utils.data.sources import Frame, Limits, find, frames
from utils.errors import DataError, InputError, NumericsError
from utils.model_files import ModelFiles, choose_model
from utils.report.detection_files import DetectionFiles, FileKinds, video_suffix
from utils.report.detection_lines import DetectionReport, Times
from utils.report.run_dir import RunDirectory

if TYPE_CHECKING:
    import torch

    from models import Darknet
    from utils.darknet.blocks import Network

EXAMPLE = "python detect.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --source data/samples"
PROJECT, NAME = "runs/detect", "exp"
FOURCC = "mp4v"
QUIT_KEYS = frozenset({27, ord("q")})
"""Escape and q end --view-img."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = cli.Parser(__doc__, EXAMPLE)
    _add_input_flags(parser)
    _add_detection_flags(parser)
    _add_machine_flags(parser)
    _add_result_flags(parser)
    args = parser.parse_args(argv)
    if args.output is not None and (args.project, args.name, args.exist_ok) != (PROJECT, NAME, False):
        raise InputError("--output: is the folder itself; leave out --project, --name and --exist-ok")
    if args.output is not None and os.path.lexists(args.output) and not os.path.isdir(args.output):
        raise InputError(f"--output {args.output}: exists and is no folder")
    if args.save_conf and not args.save_txt:
        raise InputError("--save-conf: goes with --save-txt, which writes the labels")
    return args


def _add_input_flags(parser: cli.Parser) -> None:
    add = parser.add_argument_group("model and source").add_argument
    add("--cfg", metavar="FILE", help="Darknet network description (default: the one inside a .pt)")
    add("--weights", metavar="FILE", help=".pt or .weights (default: the newest best.pt in runs/ that fits --cfg)")
    add("--data", metavar="FILE", help=".data or data.yaml, for the names of the classes (default: those in a .pt)")
    add("--names", metavar="FILE", help="names of the classes, one a line; wins over --data")
    add(
        "--source",
        default="data/samples",
        metavar="S",
        help="picture, video, folder, pattern, .txt list of files, webcam number, rtsp:// or http:// address, "
        "or .streams list of addresses (default: %(default)s)",
    )
    add("--max-frames", type=cli.positive_int, metavar="N", help="stop after N frames")
    add("--max-seconds", type=seconds, metavar="S", help="stop S seconds after the first frame")
    add(
        "--stream-timeout",
        type=seconds,
        default=30.0,
        metavar="S",
        help="stop when no stream gave a frame for S seconds (default: %(default)g)",
    )


def _add_detection_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("detections")
    add = group.add_argument
    add("--img_size", type=cli.image_side, nargs="+", metavar="N", help="network input: N, or H W (default: the cfg's)")
    modes = group.add_mutually_exclusive_group()
    for mode, text in (
        ("letterbox", "keep a picture's aspect ratio and fill with grey (default)"),
        ("stretch", "fill the input"),
    ):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="letterbox", help=text)
    add("--conf-thres", type=cli.threshold, default=0.3, metavar="C", help="least confidence (default: %(default)s)")
    add(
        "--iou-thres",
        type=cli.threshold,
        default=0.6,
        metavar="T",
        help="a box that overlaps a better one of its class by more is dropped (default: %(default)s)",
    )
    add("--classes", type=cli.non_negative_int, nargs="+", metavar="N", help="keep these classes only, by number")
    add("--agnostic-nms", action="store_true", help="boxes drop one another across classes")
    add("--augment", action="store_true", help="merge what is found in three views: as it is, flipped, smaller")


def _add_machine_flags(parser: cli.Parser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="", metavar="D", help="cpu, cuda, or the number of a GPU (default: a GPU if there is one)")
    add("--half", action="store_true", help="float16, on a GPU")


def _add_result_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--output", metavar="DIR", help="folder of the results, made if missing (default: a new run directory)")
    add("--project", default=PROJECT, metavar="DIR", help="folder of the run directory (default: %(default)s)")
    add("--name", default=NAME, metavar="NAME", help="name of the run directory, numbered if taken (default: exp)")
    add("--exist-ok", action="store_true", help="use the run directory even if it exists")
    add("--nosave", action="store_true", help="write no pictures and videos")
    add("--save-txt", action="store_true", help="write labels/NAME.txt: class cx cy w h, as shares of the picture")
    add("--save-conf", action="store_true", help="add the confidence to the labels")
    add("--save-crop", action="store_true", help="write each detection cut out, to crops/CLASS/")
    add("--fourcc", type=fourcc, default=FOURCC, metavar="CODE", help="format of videos (default: %(default)s)")
    add("--view-img", action="store_true", help="show each picture in a window; a key goes on, q ends")
    layouts = group.add_mutually_exclusive_group()
    for flag, layout, text in (
        ("--json", "array", "print one JSON array, an object a frame"),
        ("--json-lines", "lines", "print one JSON object a line, as frames come"),
    ):
        layouts.add_argument(flag, dest="layout", action="store_const", const=layout, default="text", help=text)


def seconds(text: str) -> float:
    """A positive number of seconds; argparse type."""
    if (value := cli.number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def fourcc(text: str) -> str:
    """A video code of four letters; argparse type."""
    if len(text) != 4 or not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not a code of four letters, e.g. mp4v, MJPG")
    return text


@dataclass(frozen=True)
class Detector:
    """A network and how it is asked."""

    model: Darknet
    """With its batch normalisations folded, on `device`."""
    size: tuple[int, int]
    """Height and width of the network input."""
    mode: FitMode
    device: torch.device
    half: bool
    look: Callable[[Darknet, torch.Tensor], torch.Tensor]
    """`detect` or `detect_views` of utils.evaluation."""
    suppress: Callable[[torch.Tensor], list[torch.Tensor]]
    """`non_max_suppression` with its thresholds."""

    def detect(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float64], Times]:
        """Detections in a picture, best first, each of the best class of its row only.

        Args:
            image: uint8 [H, W, 3], RGB.

        Returns:
            [n, 6]: x1, y1, x2, y2 in pixels of the picture, clipped to it, confidence, class; and the time it took.

        Raises:
            NumericsError: the network returns NaN.
        """
        import torch

        from utils.evaluation import network_input

        moments = [time.perf_counter()]
        if self.model.network.net.channels == 1:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        fitted, placed = fit(image, self.size, self.mode)
        images = network_input(torch.from_numpy(np.ascontiguousarray(fitted.transpose(2, 0, 1)))[None], self.device)
        self._lap(moments)
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=self.half):
            rows = self.look(self.model, images)
        if rows.isnan().any():
            raise NumericsError("the network returns NaN; its weights are damaged or its training diverged")
        self._lap(moments)
        found = self.suppress(rows)[0].double().cpu().numpy()
        found[:, :4] = unfit(found[:, :4], placed)
        self._lap(moments)
        return found, Times(*(1000 * np.diff(moments)))

    def _lap(self, moments: list[float]) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        moments.append(time.perf_counter())


def main(argv: Sequence[str] | None = None) -> None:
    """Check what can be checked without torch, then detect in one frame after the other."""
    args = parse_args(argv)
    files = choose_model(args.cfg, args.weights)
    names = named_classes(args.names, args.data)
    if files.network is not None:
        check_network(files.network, args, names)
    source = find(args.source)
    if args.view_img:
        check_display()
    if args.fourcc != FOURCC and not args.nosave:
        check_fourcc(args.fourcc)
    for note in files.notes:
        cli.log(note)
    with closing(frames(source, Limits(args.max_frames, args.max_seconds, args.stream_timeout))) as reading:
        first = [] if source.streams else [next(reading)]  # an unreadable picture ends here, before torch is loaded
        detector, names = build_detector(args, files, names)
        detect_all(chain(first, reading), detector, names, args)


def named_classes(names: str | None, data: str | None) -> tuple[str, ...] | None:
    """Names of the classes from the file of --names, else of --data, else None."""
    if names is not None:
        return load_names(names)
    return None if data is None else load_data(data).names


def check_network(network: Network, args: argparse.Namespace, names: Sequence[str] | None) -> tuple[int, int]:
    """Height and width of the network input, after the flags were found to fit the network.

    Raises:
        InputError: a wrong input size, a class the network does not have, or another number of names than classes.
    """
    if names is not None and len(names) != network.classes:
        where = args.names or args.data
        raise DataError(
            f"{where}: {len(names)} names, but {args.weights or network.path} has {network.classes} classes"
        )
    for label in args.classes or ():
        if label >= network.classes:
            raise InputError(f"--classes {label}: the network's classes are 0..{network.classes - 1}")
    return cli.input_size(args.img_size, max_stride(network), (network.net.height, network.net.width))


def check_display() -> None:
    """Raise InputError if no window can be opened; a missing display would abort this process."""
    if not runs("import cv2; cv2.namedWindow('detect'); cv2.destroyAllWindows()"):
        raise InputError("--view-img: no window can be opened here (no display); leave it out and look at --output")


def check_fourcc(code: str) -> None:
    """Raise InputError if OpenCV cannot write videos of a format; it would print why in its own words."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"trial{video_suffix(code)}")
        opening = "cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*code), 25, (64, 64)).isOpened()"
        if not runs(f"import cv2, sys; _, code, path = sys.argv; sys.exit(not {opening})", code, path):
            raise InputError(f"--fourcc {code}: this OpenCV cannot write such a video; mp4v and MJPG always work")


def runs(program: str, *arguments: str) -> bool:
    """Whether a Python program succeeds in a process of its own, whatever it prints."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def build_detector(
    args: argparse.Namespace, files: ModelFiles, names: tuple[str, ...] | None
) -> tuple[Detector, tuple[str, ...]]:
    """The loaded network and the names of its classes: as given, or those in the .pt, or the numbers."""
    import torch

    from models import fuse
    from utils.checkpoint import load_model
    from utils.detection.nms import non_max_suppression
    from utils.device import select_device
    from utils.evaluation import detect, detect_views

    device = select_device(args.device)
    if args.half and device.type == "cpu":
        raise InputError("--half: float16 needs a GPU, and the network runs on the CPU; leave --half out")
    loaded = load_model(files)
    for note in loaded.notes:
        cli.log(note)
    network = loaded.model.network
    size = check_network(network, args, names)
    model = fuse(loaded.model).to(device, memory_format=torch.channels_last)
    look = detect_views if args.augment else detect
    suppress = partial(
        non_max_suppression,
        conf_thres=args.conf_thres,
        iou_thres=args.iou_thres,
        agnostic=args.agnostic_nms,
        classes=args.classes,
    )
    names = names or loaded.names or tuple(map(str, range(network.classes)))
    return Detector(model, size, args.mode, device, args.half, look, suppress), names


def detect_all(reading: Iterable[Frame], detector: Detector, names: Sequence[str], args: argparse.Namespace) -> None:
    """Detect in every frame; print, write and show what the flags ask for."""
    kinds = FileKinds(pictures=not args.nosave, labels=args.save_txt, confidence=args.save_conf, crops=args.save_crop)
    writing = DetectionFiles(lambda: make_folder(args), names, kinds, args.fourcc)
    with DetectionReport(names, args.layout) as report, closing(writing):
        for frame in reading:
            detections, times = detector.detect(frame.image)
            wanted = kinds.pictures or args.view_img
            drawn = draw_detections(frame.image, detections, names) if wanted else None
            writing.write(frame, detections, drawn)
            report.add(frame, detections, times)
            if args.view_img and not show(frame, drawn):
                break
    if kinds:
        report.say(f"results in {writing.folder}")
    report.say(report.summary())


def make_folder(args: argparse.Namespace) -> Path:
    """The folder of the results, which exists then: --output, or a run directory that says how it was made."""
    if args.output is not None:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    run = RunDirectory.create(args.project, args.name, exist_ok=args.exist_ok)
    run.describe(args=vars(args))
    return run.path


def show(frame: Frame, drawn: NDArray[np.uint8]) -> bool:
    """Show a picture until a key is pressed, a frame of a video for a moment; whether to go on."""
    cv2.imshow(cli.one_line(frame.source), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    return cv2.waitKey(0 if frame.kind == "picture" else 1) & 0xFF not in QUIT_KEYS


if __name__ == "__main__":
    cli.run(main)
