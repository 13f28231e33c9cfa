"""Round a trained network to few bits without training it again (post-training quantization).

Bounds of the activations come from some training images, the scales of the weights from the weights. What is written
is a network as `train.py --quantized 1 --BN_Fold` makes it: test.py and detect.py compute it rounded, export.py writes
its integers.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, log, memory_for, print_json, run, settings_from
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import load_data
from utils.darknet.targets import check
from utils.flags import add_device_flags, add_model_flags, add_picture_flags, add_run_flags, choose_model
from utils.quantization.scheme import QuantRequest, SchemeFlags, export_command
from utils.report.run_dir import RunDirectory, check_run

EXAMPLE = "python quantize.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --calib 32"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    """The flags that the script takes."""
    parser = Parser(__doc__, EXAMPLE)
    parser.add_settings("how it is rounded", SchemeFlags)
    parser.add_settings("bounds, and what stays float", QuantRequest)
    group = parser.add_argument_group("model and data")
    add_model_flags(group)
    add_picture_flags(group)
    text = "data set: .data or data.yaml; bounds come from its train images, accuracy from its valid ones"
    group.add_argument("--data", metavar="FILE", required=True, help=text)
    group = parser.add_argument_group("run")
    add_run_flags(group, "runs/quantize")
    add_device_flags(group, half=False)
    group.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check what can be checked without torch, then calibrate, measure and write."""
    args = parse_args(argv)
    request = make_request(args)
    log(*request.files.notes)
    from utils.quantization.workflow import lines, quantize_network, write

    command = shlex.join(["python", "quantize.py", *(sys.argv[1:] if argv is None else argv)])
    with memory_for(args.batch_size):
        checkpoint, document = quantize_network(request, command)
    with RunDirectory.create(args.project, args.name, exist_ok=args.exist_ok).until("model.cfg") as folder:
        folder.describe(args=vars(args))
        flags = {"img_size": args.img_size, "stretch": args.mode == "stretch"}
        document["next"] = export_command(request.scheme, request.data, str(folder.file("model.pt")), **flags)
        document = write(folder, checkpoint, document)
    print_json(document) if args.json else print("\n".join(lines(document)))


def make_request(args: argparse.Namespace) -> QuantRequest:
    """Check flags and files.

    Raises:
        InputError: flags that exclude each other, files that cannot be used or do not fit.
    """
    check_run(Path(args.project), args.name)
    scheme, data = settings_from(args, SchemeFlags).settings(fold=True), load_data(args.data)
    network = cfg_file.load(args.cfg) if args.cfg else None
    files = choose_model(network, args.weights, classes=data.classes)
    sides = tuple(args.img_size) if args.img_size else None
    others = {"sides": sides, "mode": args.mode, "device": args.device}
    request = settings_from(args, QuantRequest, files=files, data=data, scheme=scheme, **others)
    if files.network is not None:
        check(files.network, scheme.target)
        if not files.is_checkpoint:
            files.check_classes(files.network, data)
    return request


if __name__ == "__main__":
    run(main)
