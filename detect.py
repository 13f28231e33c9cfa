"""Detect objects in images, videos, webcams and network streams; print what was found, and draw it.

A result that was there is never overwritten: the new one gets a number. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import cli
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import Names, check_names, named_classes
from utils.darknet.network import max_stride, picture_channels
from utils.data.draw import draw_detections
from utils.data.images import Image
from utils.data.sources import Frame, Limits, find, frames
from utils.detection.settings import DetectorSettings
from utils.errors import InputError
from utils.flags import add_device_flags, add_model_flags, add_picture_flags, add_run_flags
from utils.report.detections import DetectionFiles, DetectionReport, FileKinds, check_fourcc
from utils.report.run_dir import RunDirectory, check_run
from utils.runtime.choice import READABLE, RuntimeFiles, add_runtime_flag, choose_runtime

if TYPE_CHECKING:
    from utils.darknet.blocks import Network
    from utils.detection.evaluate import Detector

EXAMPLE = "python detect.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --source data/samples"
PROJECT = "runs/detect"
FOURCC = "mp4v"
QUIT_KEYS = frozenset({27, ord("q")})
"""Escape and q end --view-img."""
seconds = cli.bounded(cli.number, lambda value: value > 0, " is not above 0")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = cli.Parser(__doc__, EXAMPLE)
    _add_input_flags(parser)
    parser.add_settings("detections", DetectorSettings)
    group = parser.add_argument_group("machine")
    add_runtime_flag(group)
    add_device_flags(group)
    _add_result_flags(parser)
    args = parser.parse_args(argv)
    if args.output is not None and (args.project, args.name, args.exist_ok) != (PROJECT, "exp", False):
        raise InputError("--output: is the folder itself; leave out --project, --name and --exist-ok")
    if args.output is not None and os.path.lexists(args.output) and not os.path.isdir(args.output):
        raise InputError(f"--output {args.output}: exists and is no folder")
    if args.save_conf and not args.save_txt:
        raise InputError("--save-conf: goes with --save-txt, which writes the labels")
    return args


def _add_input_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("model and source")
    add = group.add_argument
    add_model_flags(group, READABLE)
    add("--data", metavar="FILE", help=".data or data.yaml, for the names of the classes (default: the weights' own)")
    add("--names", metavar="FILE", help="names of the classes, one a line; wins over --data")
    add(
        "--source",
        default="data/samples",
        metavar="S",
        help="image, video, folder, pattern, .txt list of files, webcam number, rtsp:// or http:// address, "
        "or .streams list of addresses (default: %(default)s)",
    )
    add_picture_flags(group)
    parser.set_defaults(mode=None)  # that of an exported file, else letterbox
    add("--max-frames", type=cli.positive_int, metavar="N", help="stop after N frames (default: at the end)")
    add("--max-seconds", type=seconds, metavar="S", help="stop S seconds after the first frame (default: at the end)")
    add(
        "--stream-timeout",
        type=seconds,
        default=30.0,
        metavar="S",
        help="stop when no stream gave a frame for S seconds (default: %(default)g)",
    )


def _add_result_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--output", metavar="DIR", help="folder of the results, made if missing (default: a new run directory)")
    add_run_flags(group, PROJECT)
    add("--nosave", action="store_true", help="write no images and videos")
    add("--save-txt", action="store_true", help="write labels/NAME.txt: class cx cy w h, as shares of the image")
    add("--save-conf", action="store_true", help="add the confidence to the labels")
    add("--save-crop", action="store_true", help="write each detection cut out, to crops/CLASS/")
    add("--fourcc", type=fourcc, default=FOURCC, metavar="CODE", help="format of videos (default: %(default)s)")
    add("--view-img", action="store_true", help="show each image in a window; a key goes on, q ends")
    layouts = group.add_mutually_exclusive_group()
    layout: dict[str, Any] = {"dest": "layout", "action": "store_const", "default": "text"}
    layouts.add_argument("--json", const="array", help="print one JSON array, an object a frame", **layout)
    layouts.add_argument("--json-lines", const="lines", help="print one JSON object a line, as frames come", **layout)


def fourcc(text: str) -> str:
    """A video code of four letters; argparse type."""
    if len(text) != 4 or not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not a code of four letters, e.g. mp4v, MJPG")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Check what can be checked without torch, then detect in one frame after the other."""
    args = parse_args(argv)
    kinds = FileKinds(pictures=not args.nosave, labels=args.save_txt, confidence=args.save_conf, crops=args.save_crop)
    limits = Limits(args.max_frames, args.max_seconds, args.stream_timeout)
    network = cfg_file.load(args.cfg) if args.cfg else None
    names_file = named_classes(args.names, args.data)
    options = {"augment": args.augment, "half": args.half, "device": args.device}
    files = choose_runtime(network, args.weights, args.runtime, classes=names_file and len(names_file.names), **options)
    if files.network is not None:
        files.check_size(input_size(args.img_size, files.network))
        if not files.is_checkpoint:  # how many classes a .pt has is known when it is loaded
            check_classes(args.classes, names_file, files.network, files)
    settings = files.thresholds(cli.settings_from(args, DetectorSettings))
    source = find(args.source)
    if kinds and args.output is None:
        check_run(Path(args.project), args.name)
    if args.view_img:
        check_display()
    if kinds.pictures and args.fourcc != FOURCC:
        check_fourcc(args.fourcc)
    cli.log(*files.notes)
    with ExitStack() as ending, closing(frames(source, limits)) as reading:
        first = [] if source.streams else [next(reading)]  # an unreadable picture ends here, before torch is loaded
        detector, names = build_detector(args, settings, files, names_file)
        make = partial(make_folder, args, ending)
        writing = DetectionFiles(make, names, kinds, args.fourcc)
        with DetectionReport(names, args.layout) as report, closing(writing):
            detect_all(chain(first, reading), detector, names, report, writing, view=args.view_img)
        if kinds:
            report.say(f"results in {writing.folder}")
        report.say(report.summary())


def input_size(sides: Sequence[int] | None, network: Network) -> tuple[int, int]:
    """Height and width of the network input: --img_size, or the cfg's own.

    Raises:
        InputError: the network cannot have such an input.
    """
    return cli.input_size(sides, max_stride(network), (network.net.height, network.net.width))


def check_classes(
    labels: Sequence[int] | None, names_file: Names | None, network: Network, files: RuntimeFiles
) -> None:
    """Compare the classes of the network with --classes and with the names, and its channels with those of pictures.

    Raises:
        CfgError: it takes no pictures.
        InputError: a class is wanted that the network does not have.
        DataError: there are more or fewer names than classes.
    """
    picture_channels(network)
    check_names(names_file, network, files.weights or network.path)
    for label in labels or ():
        if label >= network.classes:
            raise InputError(f"--classes {label}: the network's classes are 0..{network.classes - 1}")


def check_display() -> None:
    """Raise InputError if no window can be opened; tried in another process, which a missing display aborts."""
    program = "import cv2; cv2.namedWindow('detect'); cv2.destroyAllWindows()"
    if subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode:
        raise InputError("--view-img: no window can be opened here (no display); leave it out and look at --output")


def build_detector(
    args: argparse.Namespace, settings: DetectorSettings, files: RuntimeFiles, names_file: Names | None
) -> tuple[Detector, tuple[str, ...]]:
    """The loaded network and the names of its classes: of the file, else those in the .pt, else the numbers."""
    from utils.detection.evaluate import Detector
    from utils.device import select_device
    from utils.runtime.engines import load

    device = select_device(args.device if files.runtime == "torch" else "cpu")
    loaded = load(files, device)
    cli.log(*loaded.notes)
    network = loaded.network
    check_classes(args.classes, names_file, network, files)
    mode = args.mode or files.mode or "letterbox"
    detector = Detector(loaded.model, input_size(args.img_size, network), mode, settings)
    detector.warm_up()
    return detector, (names_file and names_file.names) or loaded.names or tuple(map(str, range(network.classes)))


def detect_all(
    reading: Iterable[Frame],
    detector: Detector,
    names: Sequence[str],
    report: DetectionReport,
    writing: DetectionFiles,
    *,
    view: bool,
) -> None:
    """Detect in every frame; print, write and show what was found."""
    for frame in reading:
        detections, times = detector.detect(frame.image)
        drawn = draw_detections(frame.image, detections, names) if writing.kinds.pictures or view else None
        writing.write(frame, detections, drawn)
        report.add(frame, detections, times)
        if view and drawn is not None and not show(frame, drawn):
            return


def make_folder(args: argparse.Namespace, ending: ExitStack) -> Path:
    """The folder of the results, which exists then: --output, or a run directory that says how it was made."""
    if args.output is not None:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    run = RunDirectory.create(args.project, args.name, exist_ok=args.exist_ok)
    ending.enter_context(run.until())
    run.describe(args=vars(args))
    return run.path


def show(frame: Frame, drawn: Image) -> bool:
    """Show a picture until a key is pressed, a frame of a video for a moment; whether to go on."""
    import cv2

    cv2.imshow(cli.one_line(frame.source), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    return cv2.waitKey(0 if frame.kind == "picture" else 1) & 0xFF not in QUIT_KEYS


if __name__ == "__main__":
    cli.run(main)
