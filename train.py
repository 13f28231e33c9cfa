"""Train the detector of a Darknet cfg on your pictures.

One cfg serves every data set: its heads are adapted to the data's class count. The run is kept in runs/train/exp:
best.pt and best.weights (fitness 0.1 · AP50 + 0.9 · AP50-95, of the averaged weights), last.pt, which --resume goes on
from, results.csv and pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.cli import (
    Parser,
    image_side,
    leads,
    log,
    memory_for,
    non_negative_int,
    positive_int,
    print_json,
    processes,
    random_seed,
    run,
)
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network
from utils.darknet.data_file import DataConfig, load_data
from utils.darknet.network import adapt_classes, max_stride, picture_channels, tensors
from utils.device import AMP
from utils.errors import InputError
from utils.flags import (
    EVALUATOR_GONE,
    MOST_PARALLEL,
    add_cache_flags,
    add_device_flags,
    add_run_flags,
    cache_choice,
)
from utils.model_files import ModelFiles, adaptation, is_checkpoint, other_classes
from utils.report.run_dir import check_run
from utils.report.scalars import require_tensorboard
from utils.training.distil_flags import add_distil_flags, distillation_plan
from utils.training.evolve import run_search, search_summary
from utils.training.quant_flags import add_quant_flags, quant_plan
from utils.training.resumed import PATHS, START, changed_flags, is_search, newest_run, stored_flags
from utils.training.search import require_optuna
from utils.training.settings import Hyperparameters, TrainSettings, hyperparameters, load_hyperparameters
from utils.training.sizes import input_sizes
from utils.training.sparse_flags import add_sparse_flags, sparse_settings

EXAMPLE = "python train.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --hyp data/hyp.demo.yaml --epochs 20"
PROJECT = "runs/train"
TRIALS = 30
GONE = {
    "kd_temperature": "it is 3, always",
    "kd_weighting": "the weights are those that measured best, see docs/distillation.md",
    "kd_mask": "--KDstr 5 looks at features near objects only",
    **EVALUATOR_GONE,
    "bucket": "nothing is uploaded. Copy the run directory when the training is over",
    "memory_format": "tensors are channels-last, always",
    "s_coach": "--s auto measures AP50 after every epoch itself, see --s-drop",
    "s_enough": "--s auto stops pressing on channels once --s-share of them are weak",
}
"""Flags of older versions, and what to know instead."""


def make_parser() -> Parser:
    """The flags that the script takes."""
    parser = Parser(__doc__, EXAMPLE, gone=GONE)
    for add in (_add_input_flags, _add_schedule_flags, add_sparse_flags, add_distil_flags, add_quant_flags):
        add(parser)
    for add in (_add_picture_flags, _add_run_flags):
        add(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    args = make_parser().parse_args(argv)
    check_run(Path(args.project), args.name)
    if args.workers > MOST_PARALLEL:
        raise InputError(f"--workers {args.workers}: at most {MOST_PARALLEL} are allowed")
    if args.nosave and args.patience:
        raise InputError("--patience: needs the best weights kept; leave out --nosave")
    if args.resume is None:
        cache_choice(args)
        sparse_settings(args)
        if args.pretrain and args.weights is None:
            raise InputError("-pt: goes with --weights, whose heads may start anew")
    if args.tensorboard:
        require_tensorboard()
    if args.evolve:
        require_optuna()
    return args


def _add_input_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument("--cfg", metavar="FILE", help="Darknet network description")
    group.add_argument("--data", metavar="FILE", help="data set: .data or data.yaml")
    group.add_argument("--weights", metavar="FILE", help="weights to start from, .pt or .weights (default: new ones)")
    group.add_argument(
        "-pt",
        "--pretrain",
        action="store_true",
        help="accept a backbone file (.conv.N), and weights of another class count, whose heads start anew",
    )
    group.add_argument("--single-cls", action="store_true", help="all labels are one class")
    group.add_argument("--strict-data", action="store_true", help="stop if anything is wrong with a picture or label")


def _add_schedule_flags(parser: Parser) -> None:
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--epochs", type=positive_int, default=300, metavar="N", help="passes over the pictures (default: %(default)s)"
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="pictures in a batch of a process (default: %(default)s)",
    )
    group.add_argument(
        "--nominal-batch",
        type=positive_int,
        default=64,
        metavar="N",
        help="pictures in an optimizer step: batches are accumulated up to it, less if the run would have fewer than "
        "1000 steps (default: %(default)s)",
    )
    group.add_argument(
        "--hyp", metavar="FILE", help="hyper-parameters, YAML (default: the built-in ones; hyp.yaml of a run shows all)"
    )
    group.add_argument(
        "--evolve",
        type=positive_int,
        nargs="?",
        const=TRIALS,
        metavar="N",
        help=f"search hyper-parameters in N trainings of --epochs each (default: {TRIALS}); --hyp is the first",
    )
    group.add_argument("--adam", action="store_true", help="Adam (decoupled decay) in place of SGD")
    group.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="evaluate and keep averaged weights"
    )
    group.add_argument("--freeze", type=non_negative_int, default=0, metavar="N", help="leave blocks 0…N-1 as they are")
    group.add_argument(
        "--patience",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="stop after N epochs without a better fitness (default: never)",
    )
    seed = "all that is random follows from it (default: %(default)s)"
    group.add_argument("--seed", type=random_seed, default=0, metavar="N", help=seed)


def _add_picture_flags(parser: Parser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--img_size",
        type=image_side,
        nargs="+",
        metavar="N",
        help="side of the input: N, or MIN MAX [TEST] to vary it (default: the cfg's width and height)",
    )
    group.add_argument("--multi-scale", action="store_true", help="vary the side between 0.67 and 1.5 times --img_size")
    group.add_argument("--rect", action="store_true", help="batches of one shape each, as narrow as their pictures")
    mirrored = "no mirrored pictures, where left and right differ (default: as in the training of a .pt of --weights, "
    mirrored += "unless -pt is given)"
    group.add_argument("--no-flip", action="store_true", default=None, help=mirrored)
    again = "mirrored pictures, also for weights that were trained without"
    group.add_argument("--flip", dest="no_flip", action="store_false", help=again)
    add_cache_flags(group)
    group.add_argument("--cache-images", action="store_true", help="the same as --cache ram")
    group.add_argument("--auto-anchors", action="store_true", help="cluster the anchors anew from the data's boxes")


def _add_run_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="go on with a run that was interrupted (default: the newest in --project); flags are those it had",
    )
    add_run_flags(group, PROJECT)
    group.add_argument("--nosave", action="store_true", help="write checkpoints after the last epoch only")
    group.add_argument("--notest", action="store_true", help="evaluate after the last epoch only")
    group.add_argument(
        "--save-period",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="keep epochN.pt every N epochs (default: none)",
    )
    add_device_flags(group, half=False)
    together = "batch normalisation over the pictures of all processes, with torchrun on GPUs"
    group.add_argument("--sync-bn", action="store_true", help=together)
    group.add_argument(
        "--amp",
        choices=AMP,
        default="auto",
        help="type that the network computes in: auto is bf16 where a GPU has it, else fp16, and float32 on a CPU. "
        "bf16 works on a CPU, too, in half the time where it has AMX. off is float32, as always with --quantized and "
        "in front of heads (default: %(default)s)",
    )
    group.add_argument(
        "--workers", type=non_negative_int, default=2, metavar="N", help="processes that read (default: %(default)s)"
    )
    group.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard into the run directory")
    group.add_argument("--json", action="store_true", help="print one JSON document")


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, train, print the result."""
    args = parse_args(argv)
    folder = _interrupted(args)
    plan = planned(args) if folder is None else _resumed(folder, args, make_parser().given(argv))
    with memory_for(plan["batch_size"], resumed=folder is not None):
        if is_search(folder) if folder else args.evolve:
            document, summary = run_search(plan), search_summary
        else:
            from utils.training.workflow import TrainPlan, run_training

            document, summary = run_training(TrainPlan(**plan)), _summary
    if not leads():
        return
    if args.json:
        print_json(document)
    else:
        print(summary(document))


def planned(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags ask for, as the fields of TrainPlan."""
    if args.data is None:
        raise InputError("--data: is needed; it names a .data or data.yaml file")
    given = cfg_file.load(args.cfg) if args.cfg else None
    data = load_data(args.data)
    no_flip = _no_flip(args)
    hyp = _hyperparameters(args.hyp, no_flip)
    files = _model_files(args, given, 1 if args.single_cls else data.classes, data)
    picture_channels(files.network)
    distillation = distillation_plan(args)
    return {
        "files": files,
        "data": data,
        "hyp": hyp,
        "settings": _settings(args, files.network),
        "batch_size": args.batch_size,
        "nominal_batch": args.nominal_batch,
        "args": {key: value for key, value in vars(args).items() if key not in ("debug", "json")}
        | {key: str(Path(vars(args)[key]).absolute()) for key in PATHS if vars(args)[key]}
        | {"no_flip": no_flip},
        "resume": None,
        "project": Path(args.project),
        "name": args.name,
        "exist_ok": args.exist_ok,
        "pretrained": args.pretrain,
        "single_class": args.single_cls,
        "rect": args.rect,
        **cache_choice(args),
        "workers": args.workers,
        "device": args.device,
        "strict": args.strict_data,
        "anchors": args.auto_anchors,
        "tensorboard": args.tensorboard,
        "distillation": distillation,
    }


def _no_flip(args: argparse.Namespace) -> bool:
    """Whether no picture is mirrored: as the flags say, else as in the training of a .pt of --weights."""
    weights = None if args.weights is None or args.pretrain else Path(args.weights)
    if args.no_flip is not None or weights is None or not is_checkpoint(weights):
        return bool(args.no_flip)
    from utils.checkpoint import read_checkpoint, without_flips

    if found := without_flips(read_checkpoint(weights)):
        log(f"--no-flip: taken over from the training of {weights}; --flip mirrors pictures")
    return found


def _hyperparameters(hyp: str | None, no_flip: bool) -> Hyperparameters:
    found = load_hyperparameters(hyp) if hyp else Hyperparameters()
    return hyperparameters({"flip_lr": 0.0, "flip_ud": 0.0}, "--no-flip", found) if no_flip else found


def _model_files(args: argparse.Namespace, given: Network | None, classes: int, data: DataConfig) -> ModelFiles:
    """The network adapted to the data, and the weights, as far as their size tells."""
    weights = Path(args.weights) if args.weights else None
    checkpoint = weights is not None and is_checkpoint(weights)
    if given is None and not checkpoint:
        raise InputError("--cfg: is needed; only a .pt brings its network with it")
    if given is None:
        from utils.checkpoint import stored_network

        given = stored_network(weights)
    network = adapt_classes(given, classes)
    for note in adaptation(given, network, f"the classes in {data.path}"):
        log(note)
    if weights is not None and not checkpoint:
        found = weights_file.fitting_classes(weights, network)
        if found not in (None, classes) and not args.pretrain:
            raise other_classes(weights, found, classes)
        weights_file.check(weights, network, partial=args.pretrain)
    return ModelFiles(network, weights, checkpoint)


def _settings(args: argparse.Namespace, network: Network) -> TrainSettings:
    stride = max_stride(network)
    size, test_size, sizes = input_sizes(args, (network.net.height, network.net.width), stride)
    last, quant = tensors(network)[-1].block, quant_plan(args, network)
    if args.freeze > last:
        raise InputError(f"--freeze {args.freeze}: nothing would be left to train; at most {last}")
    if args.sync_bn and processes() == 1:
        raise InputError("--sync-bn: goes with several processes; start train.py with torchrun, or leave it out")
    if args.sync_bn and quant is not None and quant.settings.fold:
        raise InputError(
            "--sync-bn: with --BN_Fold and --FPGA each process folds the statistics of its own pictures; leave it out"
        )
    return TrainSettings(
        epochs=args.epochs,
        size=size,
        test_size=test_size,
        sizes=sizes,
        seed=args.seed,
        adam=args.adam,
        average=args.ema,
        freeze=args.freeze,
        patience=args.patience,
        test=not args.notest,
        save=not args.nosave,
        save_period=args.save_period,
        amp=args.amp,
        sync_bn=args.sync_bn,
        sparse=sparse_settings(args),
        quant=quant,
    )


def _interrupted(args: argparse.Namespace) -> Path | None:
    """The folder to go on in: that of --resume, or that of a search which is started again; None: a new one."""
    if args.resume is not None:
        return Path(args.resume) if args.resume else newest_run(Path(args.project))
    folder = Path(args.project) / args.name
    return folder if args.evolve and args.exist_ok and is_search(folder) else None


def _resumed(folder: Path, args: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """The plan that an interrupted run had, from its args.yaml, hyp.yaml and model.cfg."""
    stored = stored_flags(folder, vars(args), GONE)
    stored |= changed_flags(folder, stored, given)
    own = {"resume": None, "cfg": f"{folder}/model.cfg", "hyp": f"{folder}/hyp.yaml", "no_flip": False}
    own |= {"hyp": f"{folder}/{START}"} if is_search(folder) else {"weights": None, "auto_anchors": False}
    return planned(argparse.Namespace(**{**vars(args), **stored, **own})) | {"resume": folder, "args": stored}


def _summary(document: dict[str, Any]) -> str:
    if document["map50"] is None:
        return f"{document['epochs']} epochs, none evaluated\n{document['best']}"
    score = f"AP50 {document['map50']:.4f}, AP50-95 {document['map50_95']:.4f}"
    lines = [f"best of {document['epochs']} epochs is {document['best_epoch']}: {score}"]
    if count := document["median_epochs"]:
        values = document["median_map50"], document["median_map50_95"]
        lines.append("median of the last {}: AP50 {:.4f}, AP50-95 {:.4f}".format(count, *values))
    return "\n".join([*lines, document["best"]])


if __name__ == "__main__":
    run(main)
