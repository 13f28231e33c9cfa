"""Round a trained network to few bits without training it again (post-training quantization).

Bounds of the activations come from some training pictures, the scales of the weights from the weights. What is written
is a network as `train.py --quantized 1 --BN_Fold` makes it: test.py and detect.py compute it rounded, export.py writes
its integers.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, log, memory_for, points, positive_int, random_seed, run
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import load_data
from utils.flags import add_device_flags, add_model_flags, add_picture_flags, add_run_flags
from utils.model_files import choose_model
from utils.quantization.flags import add_scheme_flags, settings_of
from utils.quantization.request import AUTO, OBSERVED, PICTURES, QuantRequest
from utils.quantization.scheme import check
from utils.report.run_dir import check_run

EXAMPLE = "python quantize.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --calib 32"
PROJECT = "runs/quantize"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    """The flags that the script takes."""
    parser = Parser(__doc__, EXAMPLE)
    add_scheme_flags(parser.add_argument_group("how it is rounded"), folds=False)
    _add_range_flags(parser.add_argument_group("bounds and weights"))
    _add_float_flags(parser.add_argument_group("what stays float"))
    group = parser.add_argument_group("model and data")
    add_model_flags(group)
    add_picture_flags(group)
    text = "data set: .data or data.yaml; bounds come from its train pictures, accuracy from its valid ones"
    group.add_argument("--data", metavar="FILE", required=True, help=text)
    size = "pictures at a time (default: %(default)s)"
    group.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help=size)
    group.add_argument("--no-test", dest="test", action="store_false", help="do not measure accuracy")
    group = parser.add_argument_group("run")
    add_run_flags(group, PROJECT)
    add_device_flags(group, half=False)
    group.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_range_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    many = f"train pictures that the bounds come from (default: {PICTURES}, or all if there are fewer)"
    add("--calib", type=positive_int, metavar="N", help=many)
    add("--seed", type=random_seed, default=0, metavar="N", help="of their choice (default: %(default)s)")
    kinds = "; ".join(f"{name}: {what}" for name, what in OBSERVED.items())
    kinds += f"; {AUTO}: the one that leaves least noise in the heads"
    ends = f"what ends a range; {kinds} (default: %(default)s)"
    add("--observer", choices=(*OBSERVED, AUTO), default=AUTO, help=ends)
    even = "make the weights of a channel as large where it is made as where it is read (arXiv:1906.04721); measure, "
    even += "as it often harms where each channel has a scale of its own"
    add("--equalize", action="store_true", help=even)
    means = "let every convolution have the mean that it had in float (arXiv:1906.04721)"
    add("--bias-correction", action="store_true", help=means)


def _add_float_flags(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    worst = "convolutions that stay float, those that alone do most harm to the heads (default: none)"
    which.add_argument("--keep-float", type=positive_int, default=0, metavar="K", help=worst)
    lost = "let one after the other be float, until no more than P points of AP50 are lost, 0 < P <= 100"
    which.add_argument("--max-drop", type=points, metavar="P", help=lost)
    alone = "say what each convolution alone does to the heads; --keep-float and --max-drop do, too"
    group.add_argument("--sensitivity", action="store_true", help=alone)


def main(argv: Sequence[str] | None = None) -> None:
    """Check what can be checked without torch, then calibrate, measure and write."""
    args = parse_args(argv)
    asked = request(args, list(sys.argv[1:] if argv is None else argv))
    for note in asked.files.notes:
        log(note)
    from utils.quantization.workflow import carry_out

    with memory_for(args.batch_size):
        carry_out(asked)


def request(args: argparse.Namespace, typed: Sequence[str]) -> QuantRequest:
    """Check flags and files.

    Raises:
        InputError: flags that exclude each other, files that cannot be used or do not fit.
    """
    check_run(Path(args.project), args.name)
    settings, data = settings_of(args, folds=True), load_data(args.data)
    network = cfg_file.load(args.cfg) if args.cfg else None
    files = choose_model(network, args.weights, classes=data.classes)
    asked = QuantRequest(
        files,
        data,
        settings,
        vars(args),
        shlex.join(["python", "quantize.py", *typed]),
        observer=args.observer,
        pictures=args.calib,
        seed=args.seed,
        equalize=args.equalize,
        correct=args.bias_correction,
        keep_float=args.keep_float,
        max_drop=args.max_drop,
        sensitivity=args.sensitivity,
        sides=tuple(args.img_size) if args.img_size else None,
        mode=args.mode,
        batch_size=args.batch_size,
        device=args.device,
        test=args.test,
        as_json=args.json,
        project=Path(args.project),
        name=args.name,
        exist_ok=args.exist_ok,
    )
    if files.network is not None:
        check(files.network, settings)
        if not files.is_checkpoint:
            asked.check_classes(files.network)
    return asked


if __name__ == "__main__":
    run(main)
