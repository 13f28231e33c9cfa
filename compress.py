"""Compress a detector by a recipe: train, train sparse, prune, fine-tune, quantize, export, and a page about all of it.

A recipe is a YAML file that names the scripts and their flags; data/recipes has some. Kill it whenever you like: the
same command goes on where it was, and what is finished is not run again. It ends with a page that shows what each stage
cost and gained (`python -m utils.report`). A stage that loses more AP50 than its `allow` ends it with status 6.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.cli import Parser, image_side, input_size, log, print_json, require, run, typed
from utils.compress.journey import Journey, made_by, python
from utils.compress.recipe import ALL, Recipe, RecipeLoader, read_recipe
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.data_file import load_data
from utils.darknet.network import adapt_classes, file_bytes, max_stride, picture_channels
from utils.darknet.targets import check
from utils.darknet.weights import Header
from utils.data.index import list_images
from utils.errors import InputError, SuiteError
from utils.export.settings import PACKAGES
from utils.files import ROOT, foreign_errors, regular_file
from utils.flags import add_device_flags, choose_model, worker_count
from utils.pruning.command import make_parser as make_prune_parser
from utils.pruning.command import make_settings as prune_settings
from utils.report.run_dir import check_run
from utils.runtime.choice import KINDS, check_device, runtime_of

EXAMPLE = "python compress.py --cfg cfg/demo.cfg --data runs/demo/data/toy.data --recipe data/recipes/demo.yaml"
PROJECT = "runs/compress"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE)
    add = parser.add_argument_group("what is compressed").add_argument
    add("--cfg", metavar="FILE", help="Darknet network description (default: the one inside a .pt)")
    add("--data", metavar="FILE", required=True, help="data set: .data or data.yaml")
    start = "trained network, .pt, or .weights of --cfg; it takes the place of the recipe's first training, and is the "
    start += "first row of the page (default: train it)"
    add("--weights", metavar="FILE", help=start)
    public = "weights of other classes, such as COCO's, that the recipe's first training starts from, with new heads"
    add("--pretrained", metavar="FILE", help=public)
    size = "side of the network input, the same in all stages (default: the cfg's width and height)"
    add("--img_size", type=image_side, metavar="N", help=size)
    group = parser.add_argument_group("how")
    add = group.add_argument
    recipe = "YAML file with the stages; data/recipes has four (default: balanced.yaml)"
    add("--recipe", metavar="FILE", default=str(ROOT / "data/recipes/balanced.yaml"), help=recipe)
    change = "another value of a flag in the recipe, e.g. prune.target-macs=0.3, tune.epochs=40, tune.allow=15 for the "
    change += f"points of AP50 that it may lose, or {ALL}.batch-size=8 for all stages whose script has the flag"
    add("--set", type=change_of, nargs="+", action="extend", default=[], metavar="STAGE.FLAG=VALUE", help=change)
    add_device_flags(group, half=False)
    workers = "processes that read images, in every stage whose script has the flag (default: the recipe's)"
    add("--workers", type=worker_count, metavar="N", help=workers)
    add("--dry-run", action="store_true", help="print the commands of the stages and their epochs; do nothing")
    add = parser.add_argument_group("run").add_argument
    add("--project", default=PROJECT, metavar="DIR", help="folder of the journey's folder (default: %(default)s)")
    add("--name", metavar="NAME", help="its name; a journey of that name goes on (default: RECIPE-DATA)")
    add("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


def change_of(text: str) -> tuple[str, str, Any]:
    """STAGE.FLAG=VALUE; argparse type."""
    place, equals, value = text.partition("=")
    stage, dot, flag = place.partition(".")
    with foreign_errors(text, "the value is not valid YAML", argparse.ArgumentTypeError):
        content = RecipeLoader(value).get_single_data()
    if not (equals and dot and stage and flag) or content is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not STAGE.FLAG=VALUE")
    return stage, flag, content


def main(argv: Sequence[str] | None = None) -> None:
    """Check the recipe, run its stages, write the page."""
    args = parse_args(argv)
    everywhere = {key: value for key in ("device", "workers") if (value := getattr(args, key)) not in ("", None)}
    recipe = read_recipe(Path(args.recipe), first_spelling, args.set, **everywhere)
    if args.weights:
        whole, recipe = recipe, recipe.started()
        if whole.stages[0].name not in (stage.name for stage in recipe.stages):
            log(f"stage {whole.stages[0].name}: is left out, its network is {args.weights}")
    network = check_inputs(args, recipe)
    name = args.name or f"{Path(args.recipe).stem}-{Path(args.data).stem}"
    check_run(Path(args.project), name)
    place = Path(args.project) / name
    journey = Journey(recipe, place, args.data, args.cfg, args.weights, args.img_size, args.pretrained)
    check_stages(journey, network)
    if args.dry_run:
        print("\n".join(typed(*command) for command in journey.planned()))
        epochs = {stage.name: stage.epochs for stage in recipe.stages if stage.epochs}
        each = ", ".join(f"{name} {count}" for name, count in epochs.items()) or "none"
        log(f"epochs: {each}; {sum(epochs.values())} in all")
        return
    done = journey.finish(python)
    page = write_page(journey, done, args.device)
    document = {"run_dir": str(journey.folder), "stages": done, "report": str(page)}
    print_json(document) if args.json else print(text(document))


def check_inputs(args: argparse.Namespace, recipe: Recipe) -> Network:
    """The network to begin with, of as many classes as the data set has; files that cannot be used are refused.

    Raises:
        InputError: names the file.
    """
    if args.weights and args.pretrained:
        raise InputError("--pretrained: not allowed with --weights, a network that knows the classes of --data already")
    if args.cfg is None and args.weights is None:
        raise InputError("--cfg: is needed, unless --weights is a .pt, which brings its network with it")
    if args.weights is None and recipe.stages[0].script != "train":
        raise InputError(
            f"{args.recipe}: begins with {recipe.stages[0].script}, which needs a trained network; give --weights, or "
            "put a stage `train: {script: train, epochs: 100}` before it"
        )
    data = load_data(args.data)
    for key, source in (("train", data.train), ("valid", data.valid)):
        if source is None:
            raise InputError(f"{data.path}: no {key} = …; a journey needs images to train with and to measure on")
        for part in [source] if isinstance(source, Path) else source:
            list_images(part)
    cfg = cfg_file.load(args.cfg) if args.cfg is not None else None
    network = adapt_classes(cfg, data.classes) if cfg and args.weights is None else trained_network(cfg, args.weights)
    if network.classes != data.classes:
        raise InputError(
            f"--weights {args.weights}: a network of {network.classes} classes, but {data.path} has "
            f"{data.classes}; give it as --pretrained, and the recipe trains it on these images first"
        )
    picture_channels(network)
    if args.img_size is not None:
        input_size([args.img_size], max_stride(network), (network.net.height, network.net.width))
    return network


def trained_network(network: Network | None, weights: str) -> Network:
    """The network of --weights, which fits --cfg and is float.

    Args:
        network: of --cfg.
        weights: of --weights.

    Raises:
        InputError: it is quantized.
        WeightsError: it cannot be read, or does not fit.
    """
    regular_file(weights)
    files = choose_model(network, weights)
    if files.network and not files.is_checkpoint:
        return files.network
    from utils.checkpoint import load_model  # torch

    loaded = load_model(files)
    if loaded.quantization is not None:
        raise InputError(f"--weights {weights}: is quantized already; give the float weights it was made from")
    return loaded.model.network


def check_stages(journey: Journey, network: Network) -> None:
    """Let the script of every stage check its flags and files; stand-ins take the place of files not made yet.

    Args:
        journey: whose stages are checked.
        network: the one that it begins with.

    Raises:
        InputError: names the recipe, the stage, and what its script says.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        weights = Path(folder) / "network.weights"
        weights.with_suffix(".cfg").write_text(format_network(network))
        weights.write_bytes(Header().pack())
        os.truncate(weights, file_bytes(network))
        made: dict[str, Path] = {}
        for stage in journey.recipe.stages:
            _, *flags = journey.command(stage, made)
            try:
                check_stage(stage.script, flags)
            except SuiteError as failure:
                own, stand_in = (str(path.with_suffix("")) for path in (Path(network.path), weights))
                told = str(failure).replace(stand_in, own)
                raise InputError(f"{journey.recipe.path}: stage {stage.name}: {told}") from None
            file = made_by(stage, Path(folder))
            made[stage.name] = file if file and stage.script == "export" and file.suffix in KINDS else weights
    targets = dict.fromkeys(stage.target for stage in journey.recipe.stages if stage.quantizes)
    log(*(line for target in targets for line in check(network, target)))


def check_stage(script: str, flags: Sequence[str]) -> None:
    """Let one script check its flags and files, as far as it does so without loading the network.

    Raises:
        SuiteError: as of the script.
    """
    module, prunes = script_module(script), script.endswith("_prune")
    args = script_parser(script).parse_args(flags) if prunes else module.parse_args(flags)
    if getattr(args, "device", "") not in ("", "cpu"):
        from utils.device import named_device  # imports torch, which few recipes need for it

        named_device(args.device)
    if prunes:
        prune_settings(module.STRATEGY, args)
    elif script == "train":
        module.planned(args)
    elif script == "quantize":
        module.make_request(args)
    elif script == "export":
        require(f"--format {args.format}", *PACKAGES.get(args.format, ()))
        module.check_files(args)
    elif Path(args.weights).suffix in KINDS:
        check_device(runtime_of(Path(args.weights), args.runtime), args.device)
    else:
        module.load_inputs(args)


def first_spelling(script: str, flag: str) -> str:
    """The first spelling of a flag of a script; empty if the script has no such flag."""
    return script_parser(script).first_spelling(flag)


def script_parser(script: str) -> Parser:
    """The parser of one of the suite's scripts."""
    module = script_module(script)
    if script.endswith("_prune"):
        return make_prune_parser(module.STRATEGY, module.__doc__ or "")
    return module.make_parser()


def script_module(script: str) -> ModuleType:
    """Return a script of the suite as a module of another name: the standard library has a `test`."""
    name = f"script_{script}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{script}.py")
        assert spec is not None and spec.loader is not None, "the script is there"
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def write_page(journey: Journey, done: Sequence[dict[str, Any]], device: str = "") -> Path:
    """The page about the journey; its first network is the one that was given, or else trained."""
    from utils.compress.page import write_report

    runs = [journey.folder / entry["name"] for entry in done if (journey.folder / entry["name"]).is_dir()]
    baselines = smaller_picture(Path(done[0]["made"]), runs[0] / "model.cfg", journey.side)
    out = journey.folder / "report"
    return write_report(runs, out, journey.data, baselines=baselines, exist_ok=True, device=device)


def smaller_picture(weights: Path, cfg: Path, side: int | None) -> list[str]:
    """The cheapest way to half of the multiply-adds: a network as it is, on smaller pictures.

    Args:
        weights: of the network.
        cfg: of the network.
        side: of the input; None: the one of its cfg, if it is square.
    """
    network = cfg_file.load(cfg)
    side, stride = side or network.net.width, max_stride(network)
    smaller = round(side * math.sqrt(0.5) / stride) * stride
    square = side == network.net.height or network.net.width == network.net.height
    return [f"first @{smaller}={weights}@{smaller}"] if square and 0 < smaller < side else []


def text(document: dict[str, Any]) -> str:
    """The document for people: what was made, and what the page begins with, without the signs of Markdown."""
    lines = [f"{entry['name']}: {entry['made']}" for entry in document["stages"] if entry["made"]]
    page = Path(document["report"])
    start = page.with_suffix(".md").read_text(encoding="utf-8").partition("\n\n## Every stage")[0]
    top = re.sub(r"^(    .*)|\\(.)|^#+ ", r"\1\2", start, flags=re.MULTILINE)  # a command is as it is
    return "\n".join([*lines, "", top, "", f"all of it on one page: {page}"])


if __name__ == "__main__":
    run(main)
