"""Measure a detector on labelled pictures: average precision by COCO's protocol, precision, recall, F1, and the time.

AP50 and AP50-95 equal pycocotools' to the last digit. P, R and F1 are means over the classes at IoU 0.5 and at the
confidence where the mean F1 is highest. Boxes are compared in pixels of the original pictures, so small, medium and
large are COCO's. Only --save-json makes a run directory; without it nothing is left behind but verdicts in the user's
picture cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import Parser, input_size, log, memory_for, non_negative_int, positive_int, print_json, run
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import DataConfig, load_data
from utils.darknet.shapes import max_stride, picture_channels, trace
from utils.errors import DataError, InputError
from utils.flags import (
    MOST_PARALLEL,
    add_cache_flags,
    add_device_flags,
    add_evaluator_flag,
    add_model_flags,
    add_picture_flags,
    add_run_flags,
    add_threshold_flags,
    cache_choice,
)
from utils.model_files import ModelFiles
from utils.report.run_dir import RunDirectory, check_run
from utils.runtime.choice import READABLE, RuntimeFiles, add_runtime_flag, choose_runtime

if TYPE_CHECKING:
    import torch

    from models import Darknet
    from utils.darknet.blocks import Network
    from utils.data.datasets import DetectionDataset
    from utils.data.index import Index
    from utils.detection.evaluate import Evaluation, ImageDetections
    from utils.runtime.load import ForeignModel

EXAMPLE = "python test.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --verbose"
BENCHMARK_SCALES = (0.75, 1.0, 1.25)
"""Input sizes of --task benchmark, as shares of the network's own."""
BENCHMARK_IOUS = (0.5, 0.6, 0.7)
"""NMS thresholds of --task benchmark."""
GPU_WORKERS = 4
DETECTIONS = "detections.json"

Size = tuple[int, int]
"""Height and width of the network input."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    args = make_parser().parse_args(argv)
    if args.task == "benchmark" and args.save_json:
        raise InputError("--save-json: goes with --task test, which detects once; leave one of the two out")
    if args.save_json:
        check_run(Path(args.project), args.name)
    cache_choice(args)
    for flag, value in (("--threads", args.threads), ("--workers", args.workers)):
        if value is not None and value > MOST_PARALLEL:
            raise InputError(f"{flag} {value}: at most {MOST_PARALLEL} are allowed")
    return args


def make_parser() -> Parser:
    """The flags that the script takes."""
    parser = Parser(__doc__, EXAMPLE)
    for add in (_add_input_flags, _add_measurement_flags, _add_machine_flags, _add_result_flags):
        add(parser)
    return parser


def _add_input_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--data", required=True, metavar="FILE", help="data set: .data or data.yaml")
    add_model_flags(group, READABLE)
    add("--split", choices=("valid", "train"), default="valid", help="pictures of the data set (default: %(default)s)")
    add("--single-cls", action="store_true", help="all classes count as one, in labels and detections")
    add("--strict-data", action="store_true", help="stop if anything is wrong with a picture or label")
    add_picture_flags(group, more="; benchmark: each N (default: 3/4, 1 and 5/4 of the cfg's)")
    parser.set_defaults(mode=None)  # that of an .onnx file, else letterbox
    add_cache_flags(group)


def _add_measurement_flags(parser: Parser) -> None:
    group = parser.add_argument_group("measurement")
    add = group.add_argument
    add(
        "--task",
        choices=("test", "benchmark"),
        default="test",
        help="benchmark: input sizes by NMS thresholds 0.5, 0.6, 0.7 (default: %(default)s)",
    )
    add_threshold_flags(group, 0.001, 0.6)
    add_evaluator_flag(group)
    add("--single-label", action="store_true", help="only the best class of a box (default: all above --conf-thres)")


def _add_machine_flags(parser: Parser) -> None:
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add_runtime_flag(group)
    add("--batch-size", type=positive_int, default=16, metavar="N", help="pictures at a time (default: %(default)s)")
    add_device_flags(group)
    add("--threads", type=positive_int, metavar="N", help="CPU threads of the network (default: PyTorch's choice)")
    add(
        "--workers",
        type=non_negative_int,
        metavar="N",
        help=f"processes that read pictures (default: {GPU_WORKERS}; without a GPU 0, as the network needs the cores)",
    )


def _add_result_flags(parser: Parser) -> None:
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--verbose", action="store_true", help="a row for every class, and what the data set holds")
    add("--json", action="store_true", help="print one JSON document instead of tables")
    add("--save-json", action="store_true", help=f"write {DETECTIONS}, COCO's results format, to a run directory")
    add_run_flags(group, "runs/test")


def main(argv: Sequence[str] | None = None) -> None:
    """Check what can be checked without torch, then measure and print."""
    args = parse_args(argv)
    data, files = load_inputs(args)

    from utils.data.index import index

    pictures = index(getattr(data, args.split), data.names, strict=args.strict_data)
    if args.verbose or pictures.report.flaws():
        log(pictures.report.summary())
    bench = build_bench(args, data, files, pictures)
    sizes = input_sizes(args.img_size, args.task, bench.network, files)
    settings = list(product(sizes, BENCHMARK_IOUS if args.task == "benchmark" else (args.iou_thres,)))
    with memory_for(args.batch_size):
        evaluations = [bench.measure(*setting, keep_detections=args.save_json) for setting in settings]

    document = describe(args, files, bench, settings, evaluations)
    if args.save_json:
        document["detections"] = str(save_detections(args, data, bench, evaluations[0].detections))
        log(f"detections: {document['detections']}")
    print_result(document, evaluations, as_json=args.json, verbose=args.verbose)


def load_inputs(args: argparse.Namespace) -> tuple[DataConfig, RuntimeFiles]:
    """Read what describes the data and the network, and check that they go together as far as that can be told."""
    network = cfg_file.load(args.cfg) if args.cfg else None
    data = load_data(args.data)
    asked = {"augment": args.augment, "half": args.half, "device": args.device}
    classes = None if args.single_cls else data.classes
    files = choose_runtime(network, args.weights, args.runtime, classes=classes, **asked)
    if getattr(data, args.split) is None:
        raise DataError(f"{data.path}: no {args.split} = …, the pictures that --split {args.split} asks for")
    if files.network is not None:
        input_sizes(args.img_size, args.task, files.network, files)
        if not files.is_checkpoint:
            check_classes(files.network, files, data, single_class=args.single_cls)
    for note in files.notes:
        log(note)
    return data, files


def input_sizes(
    sides: Sequence[int] | None, task: str, network: Network, files: RuntimeFiles | None = None
) -> tuple[Size, ...]:
    """Input sizes to measure at: one for the task test, one or more for benchmark.

    Raises:
        InputError: a side is no multiple of the network's stride, or the file takes another size.
        CfgError: the network cannot work on such an input.
    """
    stride, own = max_stride(network), (network.net.height, network.net.width)
    if task == "test":
        sizes = (input_size(sides, stride, own),)
    elif files is not None and files.exported is not None and not sides:
        sizes = (own,)
    elif sides:
        sizes = tuple(input_size((side,), stride, own) for side in sides)
    else:
        sizes = tuple(
            (max(stride, round(own[0] * scale / stride) * stride), max(stride, round(own[1] * scale / stride) * stride))
            for scale in BENCHMARK_SCALES
        )
    for size in sizes:
        trace(network, *size)
        if files is not None:
            files.check_size(size)
    return tuple(dict.fromkeys(sizes))


def check_classes(network: Network, files: ModelFiles, data: DataConfig, *, single_class: bool) -> None:
    """Refuse a network that takes no pictures, or of other classes than the data set's, unless all count as one."""
    picture_channels(network)
    if network.classes != data.classes and not single_class:
        raise InputError(
            f"{files.weights}: a network of {network.classes} classes, but {data.path} has {data.classes}; "
            f"give the data set it was trained with, or --single-cls to count all classes as one"
        )


@dataclass(frozen=True)
class Bench:
    """A network and the pictures it is measured on."""

    network: Network
    """As the cfg has it."""
    model: Darknet | ForeignModel
    """The same, as it runs: with its batch normalisations folded."""
    runtime: str
    """What runs it."""
    pictures: Index
    names: tuple[str, ...]
    device: torch.device
    mode: str
    """letterbox or stretch."""
    batch_size: int
    workers: int
    options: dict[str, Any]
    """Keywords of `evaluate` that all measurements share."""
    cache: dict[str, Any]
    """Keywords of a data set: whether and where it keeps decoded pictures."""
    datasets: dict[Size, DetectionDataset] = field(default_factory=dict)
    """Made so far, by input size."""

    def measure(self, size: Size, iou_thres: float, *, keep_detections: bool = False) -> Evaluation:
        """Detect in all pictures at one input size and compare with the labels."""
        from utils.data.datasets import DetectionDataset, make_loader
        from utils.detection.evaluate import evaluate

        if size not in self.datasets:
            self.datasets[size] = DetectionDataset(
                self.pictures, size=size, mode=self.mode, channels=self.network.net.channels, **self.cache
            )
        few = len(self.pictures) < 2 * self.batch_size  # no length of a batch comes twice
        workers = 0 if few else self.workers
        loader = make_loader(self.datasets[size], self.batch_size, workers=workers, device=self.device)
        options = {"device": self.device, "iou_thres": iou_thres, "keep_detections": keep_detections, **self.options}
        return evaluate(self.model, loader, self.names, warm=few, **options)


def build_bench(args: argparse.Namespace, data: DataConfig, files: RuntimeFiles, pictures: Index) -> Bench:
    """Import torch, choose the device and load the model."""
    import torch

    from utils.detection.evaluate import ONE_CLASS
    from utils.device import select_device
    from utils.runtime.load import load

    device = select_device(args.device if files.runtime == "torch" else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load(files, device)
    for note in loaded.notes:
        log(note)
    check_classes(loaded.network, files, data, single_class=args.single_cls)
    if loaded.names not in (None, data.names) and not args.single_cls:
        log(f"{files.weights}: trained with other class names than {data.path} has; the latter are used")
    return Bench(
        network=loaded.network,
        model=loaded.model,
        runtime=loaded.runtime,
        pictures=pictures,
        names=ONE_CLASS if args.single_cls else data.names,
        device=device,
        mode=args.mode or files.mode or "letterbox",
        batch_size=args.batch_size,
        cache=cache_choice(args),
        workers=(GPU_WORKERS if device.type == "cuda" else 0) if args.workers is None else args.workers,
        options={
            "conf_thres": args.conf_thres,
            "multi_label": not args.single_label,
            "single_class": args.single_cls,
            "augment": args.augment,
            "max_nms": args.max_nms,
            "evaluator": args.evaluator,
        },
    )


def save_detections(args: argparse.Namespace, data: DataConfig, bench: Bench, found: Sequence[ImageDetections]) -> Path:
    """Write the detections of all pictures in COCO's results format, in a run directory."""
    from utils.darknet.cfg import format_network
    from utils.detection.coco_json import category_ids, image_id, results

    pictures = {
        "path": str(data.path),
        args.split: str(getattr(data, args.split)),
        "nc": data.classes,
        "names": data.names,
    }
    ids, paths = category_ids(bench.names), bench.pictures.images
    if len({image_id(path) for path in paths}) < len(paths):
        log(f"{DETECTIONS}: pictures of the same file name have the same image_id")
    rows = [row for image in found for row in results(paths[image.position], *image[1:], ids)]
    with RunDirectory.create(args.project, args.name, exist_ok=args.exist_ok).until() as directory:
        directory.describe(args=vars(args), cfg=format_network(bench.network), data=pictures)
        return directory.write_text(DETECTIONS, json.dumps(rows))


def describe(
    args: argparse.Namespace,
    files: ModelFiles,
    bench: Bench,
    settings: Sequence[tuple[Size, float]],
    evaluations: Sequence[Evaluation],
) -> dict[str, Any]:
    """The document of --json: one measurement, or the list of them."""
    from utils.report.accuracy import measurement_document
    from utils.report.cost import network_cost

    measured = [
        measurement_document(found.metrics, found.times._asdict(), network_cost(bench.network, *size), size, iou_thres)
        for (size, iou_thres), found in zip(settings, evaluations, strict=True)
    ]
    shared = {"weights": str(files.weights), "data": args.data, "split": args.split, "batch_size": args.batch_size}
    result = {"benchmark": measured} if args.task == "benchmark" else measured[0]
    return {**shared, "runtime": bench.runtime, **result}


def print_result(document: dict[str, Any], evaluations: Sequence[Evaluation], *, as_json: bool, verbose: bool) -> None:
    """The result to stdout, for machines or for people."""
    from utils.report.accuracy import benchmark_text, measurement_text

    if as_json:
        print_json(document)
    elif "benchmark" in document:
        print(benchmark_text(document))
    else:
        print(measurement_text(document, evaluations[0].metrics, per_class=verbose))


if __name__ == "__main__":
    run(main)
