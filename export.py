"""Write a trained detector as a file for other programs, and check that it computes the same there.

An onnx file has batch normalisation folded in. It holds class names, anchors and cfg, so test.py and detect.py need
nothing but the file, as --weights. --int8 writes a quantized network as a file that runs in integers. tensorrt is such
a file for trtexec. ncnn, openvino and tflite are files of ncnn, OpenVINO and TensorFlow Lite. torchscript is for
libtorch. darknet and pt convert between Darknet's files and this suite's. A file that differs from PyTorch is not
written.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from utils.cli import Parser, input_size, log, print_json, require, run, settings_from
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import Names, check_names, named_classes
from utils.darknet.network import max_stride, trace
from utils.darknet.targets import check
from utils.errors import InputError
from utils.export.settings import ALIASES, COMPANIONS, GOES_WITH, MISH_OPSET, PACKAGES, SUFFIXES, ExportSettings
from utils.flags import ModelFiles, add_model_flags, add_picture_flags, add_run_flags, choose_model
from utils.report.run_dir import check_run

EXAMPLE = "python export.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --format onnx"
PROJECT = "runs/export"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.format = ALIASES.get(args.format, args.format)
    check_flags(args, parser.given(argv))
    return args


def make_parser() -> Parser:
    """The flags that the script takes."""
    parser = Parser(__doc__, EXAMPLE)
    group = parser.add_argument_group("model")
    add_model_flags(group)
    names = "data set, for the names of the classes: .data or data.yaml (default: those in a .pt, else numbers)"
    group.add_argument("--data", metavar="FILE", help=names)
    group.add_argument("--names", metavar="FILE", help="names of the classes, one a line; wins over --data")
    add_picture_flags(group)
    parser.add_settings("file", ExportSettings)
    group = parser.add_argument_group("results")
    path = "the file to write; it must not exist (default: model.SUFFIX in a new run directory)"
    group.add_argument("--output", type=Path, metavar="PATH", help=path)
    add_run_flags(group, PROJECT)
    group.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def check_flags(args: argparse.Namespace, flags: Collection[str]) -> None:
    """Refuse flags that do not go together; `flags` are those of the command line.

    Raises:
        InputError: names the flag and what it goes with.
    """
    for flag, formats in GOES_WITH.items():
        if flag in flags and args.format not in formats:
            *others, last = formats
            listed = f"{', '.join(others)}{' or ' if others else ''}{last}"
            raise InputError(f"--{flag.replace('_', '-')}: goes with --format {listed}")
    if args.half and (args.int8 or args.format == "tensorrt"):
        raise InputError("--half: a file has float16 or integers; leave --half or the integers out")
    if args.sample and args.format == "tflite" and not args.int8:
        raise InputError("--sample: goes with --format tflite --int8; a float file is checked on a random image")
    if args.multi_label and not args.nms:
        raise InputError("--multi-label: goes with --nms")
    if args.decode and args.nms:
        raise InputError("--decode: --nms puts out detections, which are decoded already; leave one of them out")
    if args.mish == "op" and args.opset < MISH_OPSET:
        raise InputError(f"--mish op: needs --opset {MISH_OPSET} or more")
    check_output(args)


def check_output(args: argparse.Namespace) -> None:
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
    if args.output.name.removesuffix(suffix) in ("", args.output.name):
        raise InputError(f"--output {args.output}: a file of --format {args.format} is named NAME{suffix}")
    for path in (args.output, *map(args.output.with_suffix, COMPANIONS.get(args.format, ()))):
        if os.path.lexists(path):
            raise InputError(f"--output {path}: exists; choose another name")


def main(argv: Sequence[str] | None = None) -> None:
    """Check what can be checked without torch, then make, prove and write the file."""
    args = parse_args(argv)
    require(f"--format {args.format}", *PACKAGES.get(args.format, ()))
    files, names = check_files(args)
    log(*files.notes)
    settings = settings_from(
        args,
        ExportSettings,
        sides=args.img_size and tuple(args.img_size),
        mode=args.mode,
        path=args.output,
        project=Path(args.project),
        name=args.name,
        exist_ok=args.exist_ok,
    )
    from utils.export.workflow import export, text

    document = export(files, settings, names, vars(args))
    print_json(document) if args.json else print(text(document))


def check_files(args: argparse.Namespace) -> tuple[ModelFiles, Names | None]:
    """The network, and the names of its classes.

    Raises:
        InputError: a file cannot be used, or does not fit the others.
    """
    network = cfg_file.load(args.cfg) if args.cfg else None
    names = named_classes(args.names, args.data)
    files = choose_model(network, args.weights, classes=names and len(names.names))
    if files.network is not None:
        default = (files.network.net.height, files.network.net.width)
        trace(files.network, *input_size(args.img_size, max_stride(files.network), default))
        if args.target:
            check(files.network, args.target)
        if not files.is_checkpoint:  # how many classes a .pt has is known when it is loaded
            check_names(names, files.network, files.weights)
    return files, names


if __name__ == "__main__":
    run(main)
