"""Train the detector of a Darknet cfg on your images.

One cfg serves every data set: its heads are adapted to the number of classes. Results are in runs/train/exp.
best.pt and best.weights have the averaged weights of the best fitness, 0.1 · AP50 + 0.9 · AP50-95.
--resume continues from last.pt. results.csv and images show the progress.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.cli import Parser, leads, log, print_json, processes, require, run, settings_from
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network
from utils.darknet.data_file import DataConfig, load_data
from utils.darknet.network import adapt_classes, max_stride, picture_channels, same_network, tensors
from utils.distillation.strategies import AT, DEFAULT, KD
from utils.errors import InputError
from utils.flags import ModelFiles, adaptation, choose_model, is_checkpoint, other_classes, with_own_anchors
from utils.report.run_dir import check_run
from utils.training.evolve import run_search, search_summary
from utils.training.hyperparameters import Hyperparameters, hyperparameters, load_hyperparameters
from utils.training.settings import (
    AUTO,
    GROUPS,
    PATHS,
    START,
    TrainPlan,
    TrainSettings,
    changed_flags,
    check_flags,
    input_sizes,
    is_search,
    newest_run,
    quantization,
    stored_flags,
)

EXAMPLE = "python train.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --hyp data/hyp.demo.yaml --epochs 20"


def make_parser() -> Parser:
    """Return the parser of the script's flags."""
    parser = Parser(__doc__, EXAMPLE)
    for title, kind in GROUPS.items():
        parser.add_settings(title, kind)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags, after the checks that need no file."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_run(Path(args.project), args.name)
    if args.resume is None:
        check_flags(args, parser.given(argv))
    args.prune = args.prune or 0
    if args.tensorboard:
        require("--tensorboard", "tensorboard")
    if args.evolve:
        require("--evolve", "optuna")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, train, print the result."""
    args = parse_args(argv)
    folder = _interrupted(args)
    plan = planned(args) if folder is None else _resumed(folder, make_parser().given(argv))
    if is_search(folder) if folder else args.evolve:
        document, summary = run_search(plan), search_summary
    else:
        from utils.training.workflow import run_training

        document, summary = run_training(plan), _summary
    if leads():
        print_json(document) if args.json else print(summary(document))


def planned(args: argparse.Namespace, *, resumed: bool = False) -> TrainPlan:
    """Return what the flags ask for; a run that goes on may have a --patience that once was not refused."""
    if args.data is None:
        raise InputError("--data: is needed; it names a .data or data.yaml file")
    network = cfg_file.load(args.cfg) if args.cfg else None
    data = load_data(args.data)
    patience = None if resumed else args.patience
    measured = {"--patience": patience, "--evolve": args.evolve, f"--s {AUTO}": args.sr and args.s == AUTO}
    if data.valid is None and (flag := next(filter(measured.get, measured), None)):
        raise InputError(f"{flag}: needs AP50 of valid images, and {data.path} names none; name some, or leave it out")
    flip = _flip(args, network)
    hyp = _hyperparameters(args.hyp, flip)
    files = _model_files(args, network, 1 if args.single_cls else data.classes, data)
    assert files.network is not None  # adapted to the data
    picture_channels(files.network)
    teacher = _teacher(args)
    settings = _settings(args, files.network)
    stored = {key: value for key, value in vars(args).items() if key not in ("debug", "json")}
    stored |= {key: str(Path(stored[key]).absolute()) for key in PATHS if stored[key]} | {"flip": flip}
    return TrainPlan(settings, files, data, hyp, stored, teacher)


def _flip(args: argparse.Namespace, network: Network | None) -> bool:
    """Return whether pictures are mirrored: as the flags say, else as in the training of a .pt of --weights."""
    weights = None if args.weights is None or args.pretrain else Path(args.weights)
    if args.flip is not None or weights is None or not is_checkpoint(weights):
        return args.flip is not False
    from utils.checkpoint import read_checkpoint, without_flips

    unmirrored = without_flips(read_checkpoint(weights, network))
    if unmirrored:
        log(f"--no-flip: taken over from the training of {weights}; --flip mirrors images")
    return not unmirrored


def _hyperparameters(path: str | None, flip: bool) -> Hyperparameters:
    hyp = load_hyperparameters(path) if path else Hyperparameters()
    return hyp if flip else hyperparameters({"flip_lr": 0.0, "flip_ud": 0.0}, "--no-flip", hyp)


def _model_files(args: argparse.Namespace, network: Network | None, classes: int, data: DataConfig) -> ModelFiles:
    """Return the network adapted to the data, and the weights, as far as their size tells."""
    weights = Path(args.weights) if args.weights else None
    checkpoint = weights is not None and is_checkpoint(weights)
    if network is None and not checkpoint:
        raise InputError("--cfg: is needed; only a .pt brings its network with it")
    if weights is not None and checkpoint:
        from utils.checkpoint import stored_network

        stored = stored_network(weights, network)
        network = network or stored
        if stored.classes == classes and same_network(stored, network):  # else its heads are not loaded
            network, notes = with_own_anchors(network, stored, weights)
            log(*notes)
    assert network is not None  # of --cfg or in the .pt
    adapted = adapt_classes(network, classes)
    log(*adaptation(network, adapted, f"the classes in {data.path}"))
    if weights is not None and not checkpoint:
        fitting = weights_file.fitting_classes(weights, adapted)
        if fitting not in (None, classes) and not args.pretrain:
            raise other_classes(weights, fitting, classes)
        weights_file.check(weights, adapted, partial=args.pretrain)
    return ModelFiles(adapted, weights, checkpoint)


def _teacher(args: argparse.Namespace) -> ModelFiles | None:
    """Return the files of the teacher; without a strategy, the one that measured best is entered into `args`."""
    if args.t_weights is None:
        return None
    path = Path(args.t_weights)
    if not is_checkpoint(path) and args.t_cfg is None:
        raise InputError(f"--t_weights {path}: a Darknet .weights file does not say its network; add --t_cfg")
    files = choose_model(args.t_cfg, args.t_weights)
    log(*files.notes)
    if args.KDstr is None and args.AT_str is None:
        args.KDstr = DEFAULT
        others = f"--KDstr {', '.join(KD)} and --AT_str {', '.join(AT)}"
        log(f"--KDstr left out: taking {DEFAULT}, which measured best ({KD[DEFAULT].what}); there are {others}")
    return files


def _settings(args: argparse.Namespace, network: Network) -> TrainSettings:
    sizes = input_sizes(args, (network.net.height, network.net.width), max_stride(network))
    last, quant = tensors(network)[-1].block, quantization(args, network)
    if args.freeze > last:
        raise InputError(f"--freeze {args.freeze}: nothing would be left to train; at most {last}")
    if args.sync_bn and processes() == 1:
        raise InputError("--sync-bn: goes with several processes; start train.py with torchrun, or leave it out")
    if args.sync_bn and quant is not None and quant.fold:
        raise InputError(
            "--sync-bn: with --BN_Fold and --FPGA each process folds the statistics of its own images; leave it out"
        )
    return settings_from(args, TrainSettings, **sizes, quant=quant)


def _interrupted(args: argparse.Namespace) -> Path | None:
    """Return the folder to go on in: that of --resume, or of a search that is started again; None: a new one."""
    if args.resume is not None:
        return Path(args.resume) if args.resume else newest_run(Path(args.project))
    folder = Path(args.project) / args.name
    if not (args.exist_ok and is_search(folder)):
        return None
    if not args.evolve:
        raise InputError(f"--exist-ok: {folder} has a search; choose another --name")
    return folder


def _resumed(folder: Path, given: Mapping[str, Any]) -> TrainPlan:
    """Return the plan that an interrupted run had, from its args.yaml, hyp.yaml and model.cfg."""
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    flags = defaults | stored_flags(folder, defaults, parser.refusal)
    flags |= changed_flags(folder, flags, given)
    changes = {"resume": None, "cfg": f"{folder}/model.cfg", "hyp": f"{folder}/hyp.yaml", "flip": True}
    if is_search(folder):
        changes["hyp"] = f"{folder}/{START}"
    else:
        changes |= {"weights": None, "auto_anchors": False}
    plan = planned(argparse.Namespace(**{**flags, **changes}), resumed=True)
    stored = {key: value for key, value in flags.items() if key not in ("debug", "json")}
    return dataclasses.replace(plan, resume=folder, args=stored)


def _summary(document: Mapping[str, Any]) -> str:
    if document["map50"] is None:
        return f"{document['epochs']} epochs, none evaluated\n{document['best']}\nnext: {document['next']}"
    score = f"AP50 {document['map50']:.4f}, AP50-95 {document['map50_95']:.4f}"
    lines = [f"best of {document['epochs']} epochs is {document['best_epoch']}: {score}"]
    if document["map50"] < (start := document["start_map50"] or 0.0):
        lines.append(f"warning: the weights that it started from have AP50 {start:.4f}, more than the best epoch")
    if count := document["median_epochs"]:
        values = document["median_map50"], document["median_map50_95"]
        lines.append("median of the last {}: AP50 {:.4f}, AP50-95 {:.4f}".format(count, *values))
    return "\n".join([*lines, document["best"], f"next: {document['next']}"])


if __name__ == "__main__":
    run(main)
