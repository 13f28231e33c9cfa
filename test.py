"""Measure a detector on labelled images: average precision by COCO's protocol, precision, recall, F1, and the time.

AP50 and AP50-95 equal pycocotools' to the last digit. P, R and F1 are means over the classes at IoU 0.5 and at the
confidence where the mean F1 is highest. Boxes are compared in pixels of the original images. Small, medium and large
have COCO's limits, but the area is that of the box. Only --save-json makes a run directory. Without it nothing is
written but what was found out about the images, in the user's cache folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import cli, flags
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import DataConfig, load_data
from utils.darknet.network import max_stride, picture_channels, trace
from utils.detection.settings import EvaluationSettings
from utils.errors import DataError, InputError
from utils.report.run_dir import RunDirectory, check_run
from utils.runtime.choice import READABLE, RuntimeFiles, add_runtime_flag, choose_runtime

if TYPE_CHECKING:
    import torch

    from utils.darknet.blocks import Network
    from utils.data.index import Index
    from utils.detection.evaluate import Evaluation
    from utils.runtime.engines import Loaded

EXAMPLE = "python test.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --verbose"
BENCHMARK_SCALES = (0.75, 1.0, 1.25)
"""Input sizes of --task benchmark, as shares of the network's own."""
BENCHMARK_IOUS = (0.5, 0.6, 0.7)
"""NMS thresholds of --task benchmark."""
DETECTIONS = "detections.json"

Size = tuple[int, int]
"""Height and width of the network input."""
Setting = tuple[Size, float]
"""Input size and NMS threshold of a measurement."""
Names = Sequence[str]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    args = make_parser().parse_args(argv)
    if args.task == "benchmark" and args.save_json:
        raise InputError("--save-json: goes with --task test, which detects once; leave one of the two out")
    if args.save_json:
        check_run(Path(args.project), args.name)
    flags.cache_choice(args)
    return args


def make_parser() -> cli.Parser:
    """The flags that the script takes."""
    parser = cli.Parser(__doc__, EXAMPLE)
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--data", required=True, metavar="FILE", help="data set: .data or data.yaml")
    flags.add_model_flags(group, READABLE)
    add("--split", choices=("valid", "train"), default="valid", help="images of the data set (default: %(default)s)")
    tasks = "benchmark: input sizes by NMS thresholds 0.5, 0.6, 0.7 (default: %(default)s)"
    add("--task", choices=("test", "benchmark"), default="test", help=tasks)
    add("--strict-data", action="store_true", help="stop if anything is wrong with an image or label")
    flags.add_picture_flags(group, more="; benchmark: each N (default: 3/4, 1 and 5/4 of the cfg's)")
    parser.set_defaults(mode=None)  # that of an .onnx file, else letterbox
    flags.add_cache_flags(group)
    parser.add_settings("measurement", EvaluationSettings)
    _add_machine_flags(parser)
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--verbose", action="store_true", help="a row for every class, and what the data set holds")
    add("--json", action="store_true", help="print one JSON document instead of tables")
    add("--save-json", action="store_true", help=f"write {DETECTIONS}, COCO's results format, to a run directory")
    flags.add_run_flags(group, "runs/test")
    return parser


def _add_machine_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add_runtime_flag(group)
    add("--batch-size", type=cli.positive_int, default=16, metavar="N", help="images at a time (default: 16)")
    flags.add_device_flags(group)
    add("--threads", type=flags.thread_count, metavar="N", help="CPU threads of the network (default: PyTorch's)")
    readers = "processes that read (default: one a core, at most 8; without a GPU 0: the network needs the cores)"
    add("--workers", type=flags.worker_count, metavar="N", help=readers)


def main(argv: Sequence[str] | None = None) -> None:
    """Check what can be checked without torch, then measure and print."""
    args = parse_args(argv)
    data, files = load_inputs(args)

    from utils.data.index import index

    pictures = index(getattr(data, args.split), data.names, strict=args.strict_data)  # before torch is loaded

    from utils.detection.evaluate import ONE_CLASS
    from utils.report.tables import benchmark_text, measurement_text

    if args.verbose or pictures.flaws():
        cli.log(pictures.summary())
    loaded, device = load_network(args, data, files)
    sizes = input_sizes(args.img_size, args.task, loaded.network, files)
    settings = list(product(sizes, BENCHMARK_IOUS if args.task == "benchmark" else (args.iou_thres,)))
    names = ONE_CLASS if args.single_class else data.names
    args.mode = args.mode or files.mode or "letterbox"
    with cli.memory_for(args.batch_size):
        evaluations = measure(args, loaded, device, pictures, names, settings)

    document = describe(args, files, loaded, settings, evaluations)
    if args.save_json:
        document["detections"] = str(save_detections(args, data, loaded.network, names, pictures, evaluations[0]))
        cli.log(f"detections: {document['detections']}")
    if args.json:
        cli.print_json(document)
    elif args.task == "benchmark":
        print(benchmark_text(document))
    else:
        print(measurement_text(document, evaluations[0].metrics, per_class=args.verbose))


def load_inputs(args: argparse.Namespace) -> tuple[DataConfig, RuntimeFiles]:
    """Read what describes the data and the network, and check that they go together as far as that can be told."""
    network = cfg_file.load(args.cfg) if args.cfg else None
    data = load_data(args.data)
    options = {"augment": args.augment, "half": args.half, "device": args.device}
    classes = None if args.single_class else data.classes
    files = choose_runtime(network, args.weights, args.runtime, classes=classes, **options)
    if files.suppressed and args.task == "benchmark":
        raise InputError(
            f"--task benchmark: takes several NMS thresholds, and {files.weights} has its own; leave it out"
        )
    vars(args).update(vars(files.thresholds(cli.settings_from(args, EvaluationSettings))))
    if getattr(data, args.split) is None:
        raise DataError(f"{data.path}: no {args.split} = …, the images that --split {args.split} asks for")
    if files.network is not None:
        input_sizes(args.img_size, args.task, files.network, files)
        if not files.is_checkpoint:
            check_classes(args, files.network, files, data)
    cli.log(*files.notes)
    return data, files


def check_classes(args: argparse.Namespace, network: Network, files: RuntimeFiles, data: DataConfig) -> None:
    """Refuse a network that takes no pictures, or of other classes than the data set's, unless all count as one."""
    picture_channels(network)
    if not args.single_class:
        files.check_classes(network, data, ", or --single-cls to count all classes as one")


def input_sizes(sides: Sequence[int] | None, task: str, network: Network, files: RuntimeFiles) -> tuple[Size, ...]:
    """Input sizes to measure at: one for the task test, one or more for benchmark.

    Raises:
        InputError: a side is no multiple of the network's stride, or the file takes another size.
        CfgError: the network cannot work on such an input.
    """
    stride, default = max_stride(network), (network.net.height, network.net.width)
    if task == "test":
        sizes = [cli.input_size(sides, stride, default)]
    elif sides:
        sizes = [cli.input_size((side,), stride, default) for side in sides]
    elif files.exported is not None:
        sizes = [default]
    else:
        scaled = ([max(stride, round(side * by / stride) * stride) for side in default] for by in BENCHMARK_SCALES)
        sizes = [(height, width) for height, width in scaled]
    for size in sizes:
        trace(network, *size)
        files.check_size(size)
    return tuple(dict.fromkeys(sizes))


def load_network(args: argparse.Namespace, data: DataConfig, files: RuntimeFiles) -> tuple[Loaded, torch.device]:
    """Import torch, choose the device and load the model."""
    import torch

    from utils.device import select_device
    from utils.runtime.engines import load

    device = select_device(args.device if files.runtime == "torch" else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load(files, device)
    cli.log(*loaded.notes)
    check_classes(args, loaded.network, files, data)
    if loaded.names not in (None, data.names) and not args.single_class:
        data.check_order(loaded.names, files.weights)
        cli.log(f"{files.weights}: trained with other class names than {data.path} has; the latter are used")
    return loaded, device


def measure(
    args: argparse.Namespace,
    loaded: Loaded,
    device: torch.device,
    pictures: Index,
    names: Names,
    settings: Sequence[Setting],
) -> list[Evaluation]:
    """Detect in all pictures once for each setting, and compare with the labels."""
    from utils.data.datasets import DetectionDataset, make_loader
    from utils.detection.evaluate import evaluate

    fit = {"mode": args.mode, "channels": loaded.network.net.channels, **flags.cache_choice(args)}
    few = len(pictures) < 2 * args.batch_size  # no length of a batch comes twice
    workers = args.workers if args.workers is not None else flags.default_workers() * (device.type == "cuda")
    detection = asdict(cli.settings_from(args, EvaluationSettings))
    datasets, evaluations = {}, []
    for size, iou_thres in settings:
        if size not in datasets:
            datasets[size] = DetectionDataset(pictures, size=size, **fit)
        loader = make_loader(datasets[size], args.batch_size, workers=0 if few else workers, device=device)
        options = detection | {"iou_thres": iou_thres, "warm": True, "keep_detections": args.save_json}
        evaluations.append(evaluate(loaded.model, loader, names, device=device, **options))
    return evaluations


def save_detections(
    args: argparse.Namespace, data: DataConfig, network: Network, names: Names, pictures: Index, evaluation: Evaluation
) -> Path:
    """Write the detections of all pictures in COCO's results format, in a run directory."""
    from utils.darknet.cfg import format_network
    from utils.detection.evaluate import category_ids, coco_results, image_id

    ids, paths = category_ids(names), pictures.images
    if len({image_id(path) for path in paths}) < len(paths):
        cli.log(f"{DETECTIONS}: images of the same file name have the same image_id")
    with RunDirectory.create(args.project, args.name, exist_ok=args.exist_ok).until() as directory:
        directory.describe(args=vars(args), cfg=format_network(network), data=data.document())
        rows = [row for image in evaluation.detections for row in coco_results(paths[image.position], *image[1:], ids)]
        return directory.write_text(DETECTIONS, json.dumps(rows))


def describe(
    args: argparse.Namespace,
    files: RuntimeFiles,
    loaded: Loaded,
    settings: Sequence[Setting],
    evaluations: Sequence[Evaluation],
) -> dict[str, Any]:
    """The document of --json: one measurement, or the list of them."""
    from utils.report.tables import measurement_document, network_cost

    rows = []
    for (size, iou_thres), evaluation in zip(settings, evaluations, strict=True):
        cost, ms = network_cost(loaded.network, *size), evaluation.times._asdict()
        rows.append(measurement_document(evaluation.metrics, ms, cost, size, iou_thres))
    shared = {"weights": str(files.weights), "data": args.data, "split": args.split, "batch_size": args.batch_size}
    return {**shared, "runtime": loaded.runtime, **({"benchmark": rows} if args.task == "benchmark" else rows[0])}


if __name__ == "__main__":
    cli.run(main)
