"""Write a trained detector as a file for other programs, and prove that it computes the same there.

onnx is emitted from the cfg's blocks, with batch normalisations folded in; it carries class names, anchors and cfg, so
test.py and detect.py take it as --weights with nothing beside it. With --int8 a quantized network becomes a file that
runs in integers; tensorrt is that for trtexec. ncnn and openvino are the same network as ncnn's and OpenVINO's own
files. torchscript is for libtorch. darknet and pt convert between Darknet's files and this suite's. A file that differs
from PyTorch is not written.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, input_size, integer, log, run, threshold
from utils.darknet import cfg as cfg_file
from utils.darknet.network import max_stride, trace
from utils.errors import InputError
from utils.export.request import (
    ALIASES,
    COMPANIONS,
    DEFAULT_OPSET,
    GOES_WITH,
    MISH_FORMS,
    MISH_OPSET,
    OPSETS,
    PACKAGES,
    SUFFIXES,
    ExportRequest,
    OnnxOptions,
)
from utils.flags import add_model_flags, add_picture_flags, add_run_flags
from utils.model_files import choose_model
from utils.report.run_dir import check_run
from utils.runtime.names import check_names, named_classes
from utils.runtime.packages import require

EXAMPLE = "python export.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --format onnx"
PROJECT = "runs/export"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    args = make_parser().parse_args(argv)
    args.format = ALIASES.get(args.format, args.format)
    check_flags(args)
    return args


def make_parser() -> Parser:
    """The flags that the script takes."""
    parser = Parser(__doc__, EXAMPLE)
    _add_model_group(parser)
    _add_file_group(parser)
    group = parser.add_argument_group("results")
    place = "the file to write; it must not exist (default: model.SUFFIX in a new run directory)"
    group.add_argument("--output", type=Path, metavar="PATH", help=place)
    add_run_flags(group, PROJECT)
    group.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_model_group(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add_model_flags(group)
    names = "data set, for the names of the classes: .data or data.yaml (default: those in a .pt, else numbers)"
    group.add_argument("--data", metavar="FILE", help=names)
    group.add_argument("--names", metavar="FILE", help="names of the classes, one a line; wins over --data")
    add_picture_flags(group)


def _add_file_group(parser: Parser) -> None:
    group = parser.add_argument_group("file")
    add = group.add_argument
    kinds = "kind of the file; weights is another name of darknet (default: %(default)s)"
    add("--format", choices=(*SUFFIXES, *ALIASES), default="onnx", help=kinds)
    integers = "the integers that a quantized network was trained or calibrated with, for integer kernels"
    add("--int8", action="store_true", help=integers)
    add("--sample", type=Path, metavar="FILE", help="picture whose codes --format fpga writes (default: a random one)")
    add("--decode", action="store_true", help="put out rows (cx, cy, w, h, objectness, classes), not raw heads")
    add("--nms", action="store_true", help="put out detections (picture, x1, y1, x2, y2, confidence, class)")
    least = "least confidence of a detection, with --nms; else noted in the file (default: %(default)s)"
    add("--conf-thres", type=threshold, default=0.3, metavar="C", help=least)
    most = "a box that overlaps a better one of its class by more is dropped (default: %(default)s)"
    add("--iou-thres", type=threshold, default=0.6, metavar="T", help=most)
    add("--multi-label", action="store_true", help="with --nms: all classes of a box above C, not only the best")
    version = f"ONNX's operators, {OPSETS[0]} to {OPSETS[-1]} (default: {DEFAULT_OPSET})"
    add("--opset", type=opset, metavar="N", help=version)
    add("--dynamic-batch", action="store_true", help="any number of pictures at a time (default: one)")
    half = "onnx: weights and feature maps in float16; ncnn, openvino: weights are stored in it; input, output: float32"
    add("--half", action="store_true", help=half)
    add("--fold", action="store_true", help="darknet: batch normalisations become biases (default: left as they are)")
    forms = "exp: fastest in onnxruntime; softplus: what OpenCV recognises; op: ONNX's own, from opset "
    add("--mish", choices=MISH_FORMS, help=f"how mish is written; {forms}{MISH_OPSET} on (default: exp)")


def opset(text: str) -> int:
    """A version of ONNX's operators; argparse type."""
    if (value := integer(text)) not in OPSETS:
        raise argparse.ArgumentTypeError(f"{text}: allowed are {OPSETS[0]} to {OPSETS[-1]}")
    return value


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        InputError: names the flag and what it goes with.
    """
    for flag, formats in GOES_WITH.items():
        if getattr(args, flag[2:].replace("-", "_")) and args.format not in formats:
            *others, last = formats
            raise InputError(f"{flag}: goes with --format {', '.join(others)}{' or ' if others else ''}{last}")
    if args.half and (args.int8 or args.format == "tensorrt"):
        raise InputError("--half: a file has float16 or integers; leave --half or the integers out")
    if args.multi_label and not args.nms:
        raise InputError("--multi-label: goes with --nms")
    if args.decode and args.nms:
        raise InputError("--decode: --nms puts out detections, which rows were made to already; leave one of them out")
    if args.mish == "op" and (args.opset or DEFAULT_OPSET) < MISH_OPSET:
        raise InputError(f"--mish op: needs --opset {MISH_OPSET} or more")
    check_place(args)


def check_place(args: argparse.Namespace) -> None:
    """Refuse a file that exists or cannot be written.

    Raises:
        InputError: names it.
    """
    if args.output is None:
        check_run(Path(args.project), args.name)
        return
    if (args.project, args.name, args.exist_ok) != (PROJECT, "exp", False):
        raise InputError("--output: is the file itself; leave out --project, --name and --exist-ok")
    suffix = SUFFIXES[args.format]
    if not args.output.name.endswith(suffix):
        raise InputError(f"--output {args.output}: a file of --format {args.format} ends in {suffix}")
    for path in (args.output, *map(args.output.with_suffix, COMPANIONS.get(args.format, ()))):
        if os.path.lexists(path):
            raise InputError(f"--output {path}: exists; choose another name")


def main(argv: Sequence[str] | None = None) -> None:
    """Check what can be checked without torch, then make, prove and write the file."""
    args = parse_args(argv)
    require(f"--format {args.format}", *PACKAGES.get(args.format, ()))
    asked = request(args)
    for note in asked.files.notes:
        log(note)
    from utils.export.workflow import export

    export(asked)


def request(args: argparse.Namespace) -> ExportRequest:
    """Check the files.

    Raises:
        InputError: one cannot be used, or does not fit the others.
    """
    network = cfg_file.load(args.cfg) if args.cfg else None
    given = named_classes(args.names, args.data)
    files = choose_model(network, args.weights, classes=given and len(given.names))
    if files.network is not None:
        own = (files.network.net.height, files.network.net.width)
        trace(files.network, *input_size(args.img_size, max_stride(files.network), own))
        if not files.is_checkpoint:  # how many classes a .pt has is known when it is loaded
            check_names(given, files.network, files.weights)
    options = OnnxOptions(
        opset=args.opset or DEFAULT_OPSET,
        dynamic_batch=args.dynamic_batch,
        mish=args.mish or MISH_FORMS[0],
        multi_label=args.multi_label,
        int8=args.int8 or args.format == "tensorrt",
    )
    return ExportRequest(
        files,
        args.format,
        vars(args),
        given=given,
        sides=tuple(args.img_size) if args.img_size else None,
        mode=args.mode,
        output="detections" if args.nms else "rows" if args.decode else "heads",
        precision="float16" if args.half else "int8" if options.int8 else "float32",
        conf_thres=args.conf_thres,
        iou_thres=args.iou_thres,
        options=options,
        sample=args.sample,
        fold=args.fold,
        path=args.output,
        project=Path(args.project),
        name=args.name,
        exist_ok=args.exist_ok,
        as_json=args.json,
    )


if __name__ == "__main__":
    run(main)
