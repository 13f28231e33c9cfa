"""Flags that several scripts have, each in one place, so that they mean and say the same everywhere."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from utils.cli import bounded, image_side, integer
from utils.device import why_no_device
from utils.errors import InputError

MOST_PARALLEL = 256
"""Most threads and most workers that a flag may ask for; with very many PyTorch crashes."""
MOST_DEFAULT_WORKERS = 8
parallel = bounded(integer, lambda value: value <= MOST_PARALLEL, f" is above {MOST_PARALLEL}, the most allowed")
worker_count = bounded(parallel, lambda value: value >= 0, " is below 0, the smallest allowed")
thread_count = bounded(parallel, lambda value: value >= 1, " is below 1, the smallest allowed")
Group = argparse._ArgumentGroup
MODES = {"letterbox": "keep an image's aspect ratio and fill with grey (default)", "stretch": "fill the input"}


def default_workers() -> int:
    """Processes that read pictures: one a core, shared by the processes that torchrun started here, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MOST_DEFAULT_WORKERS), 1)


def add_model_flags(group: Group, readable: str = ".pt or .weights") -> None:
    """--cfg and --weights of a trained network, as `model_files.choose_model` takes them; `readable` are its kinds."""
    add = group.add_argument
    add("--cfg", metavar="FILE", help="Darknet network description (default: the one inside a .pt)")
    add("--weights", metavar="FILE", help=f"{readable} (default: the newest best.pt in runs/ that fits --cfg)")


def add_picture_flags(group: Group, more: str = "") -> None:
    """--img_size, --letterbox and --stretch; `more` is added to the help of the first."""
    size = f"network input: N, or H W (default: that of the .pt, else the cfg's){more}"
    group.add_argument("--img_size", type=image_side, nargs="+", metavar="N", help=size)
    modes = group.add_mutually_exclusive_group()
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="letterbox", help=text)


def add_cache_flags(group: Group) -> None:
    """--cache and --cache-dir; `cache_choice` reads them."""
    add = group.add_argument
    kept = "decode images once: ram keeps them for this run, disk in a file for later ones, too (default: every time)"
    add("--cache", choices=("ram", "disk"), help=kept)
    add("--cache-dir", metavar="DIR", help="folder of --cache disk (default: the user's cache folder)")


def cache_choice(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords `cache` and `cache_dir` of a data set.

    Raises:
        InputError: --cache-dir without --cache disk, or it is no folder.
    """
    folder = args.cache_dir
    if folder is not None and args.cache != "disk":
        raise InputError("--cache-dir: goes with --cache disk")
    if folder is not None and os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"--cache-dir {folder}: is a file; name a folder")
    return {"cache": args.cache, "cache_dir": None if folder is None else Path(folder)}


def add_device_flags(group: Group, *, half: bool = True) -> None:
    """--device and, where a network only runs, --half."""
    text = "cpu, cuda, or the number of a GPU, as 1 or cuda:1 (default: a GPU if there is one)"
    group.add_argument("--device", type=device_name, default="", metavar="D", help=text)
    if half:
        group.add_argument("--half", action="store_true", help="float16, on a GPU or in ncnn")


def device_name(text: str) -> str:
    """What --device may say; whether the machine has it is seen when PyTorch is loaded. Argparse type."""
    if reason := why_no_device(text):
        raise argparse.ArgumentTypeError(reason)
    return text


def add_run_flags(group: Group, project: str) -> None:
    """--project, --name and --exist-ok: where a run is kept."""
    add = group.add_argument
    add("--project", default=project, metavar="DIR", help="folder of the run directory (default: %(default)s)")
    add("--name", default="exp", metavar="NAME", help="name of the run directory, numbered if taken (default: exp)")
    add("--exist-ok", action="store_true", help="use the run directory even if it exists")
