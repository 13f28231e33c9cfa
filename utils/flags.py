"""Flags that several scripts have, each in one place, and the files that --cfg and --weights name; no torch."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.cli import bounded, image_side, integer
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network, Yolo
from utils.darknet.data_file import DataConfig
from utils.darknet.network import adapt_classes, parameter_count, picture_channels, same_network
from utils.device import why_no_device
from utils.errors import CfgError, InputError, WeightsError
from utils.files import LARGEST_MODEL, foreign_errors, regular_file

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
    """--cfg and --weights of a trained network, as `choose_model` takes them; `readable` are its kinds."""
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


ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""Head of what torch.save wrote before 1.6: a pickle of its magic number."""
FOREIGN_MAGICS = {
    b"\x80": "a pickle that torch.save did not write",
    b"\x1f\x8b": "a gzip archive",
    b"7z": "a 7z archive",
    b"\x89HDF": "an HDF5 file",
    b"ustar": "a tar archive",
}
NOT_FETCHED = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file; run git lfs pull",
    b"<!doctype html": "is a web page, not the file; download it again",
    b"<html": "is a web page, not the file; download it again",
}
"""Heads, in lower case, of what stands in place of a file that was not fetched."""
EXPORTED = (".onnx", ".param", ".xml", ".tflite", ".torchscript")
"""How files of export.py end that are no weights."""
PARTS = {".bin": (".param", ".xml"), ".json": (".param",)}
"""How files end that belong to an exported file, and how that ends."""
MOST_ENTRIES, LARGEST_STRUCTURE = 20_000, 1 << 24
"""Of an archive; the last.pt of yolov4-tiny has 303 entries, and 41 kB say how its tensors belong together."""
_ENTRY = re.compile(
    r"[^/\\]+/(data\.pkl|version|byteorder|data/[0-9]+|\.format_version|\.storage_alignment|\.data/serialization_id)\Z"
)
WAY_OUT = "in the program that made it, write torch.save(model.state_dict(), FILE), and give FILE with --cfg"


def cfg_of(weights: Path) -> Path | None:
    """The cfg that goes with a Darknet .weights file, beside it; None for a file that holds its network."""
    return weights.with_suffix(".cfg") if weights.suffix.lower() == ".weights" else None


@dataclass(frozen=True)
class ModelFiles:
    """A cfg and weights that were found to fit as far as their sizes tell."""

    network: Network | None
    """The network of `--cfg`; None when the cfg inside the .pt is to be used."""
    weights: Path | None
    """None: new weights are drawn."""
    is_checkpoint: bool = False
    """True for a .pt, False for Darknet's .weights."""
    notes: tuple[str, ...] = ()
    """What was chosen or adapted, to be said."""

    def check_classes(self, network: Network, data: DataConfig, way_out: str = "") -> None:
        """Refuse weights of another class count than the data set's, or of other channels than its pictures have.

        Raises:
            InputError, CfgError: says both numbers, and the way out with `way_out` behind.
        """
        picture_channels(network)
        if network.classes != data.classes:
            raise InputError(
                f"{self.weights}: a network of {network.classes} classes, but {data.path} has {data.classes}; "
                f"give the data set it was trained with{way_out}"
            )


def choose_model(
    cfg: str | Network | None, weights: str | None, runs: Path | str = "runs", *, classes: int | None = None
) -> ModelFiles:
    """The files that `--cfg` and `--weights` name; the newest fitting `best.pt` of a run when `--weights` is left out.

    Args:
        cfg: file, or the network already read from it.
        weights: file.
        runs: folder of the stages' runs.
        classes: how many classes a run's network must have; None: any number.

    Raises:
        CfgError, WeightsError: a file cannot be read, or the two do not fit.
        InputError: neither flag was given, or no run fits the cfg.
    """
    network = cfg_file.load(cfg) if isinstance(cfg, str) else cfg
    if weights is None:
        path = newest_best(network, Path(runs), classes)
        note = f"--weights left out: taking {path}, the newest that fits" + (f" {network.path}" if network else "")
        return ModelFiles(network, path, True, (note,))
    path = Path(weights)
    if is_checkpoint(path):
        return ModelFiles(network, path, True)
    if network is None:
        raise InputError(f"--weights {path}: a Darknet .weights file does not say its network; give --cfg")
    fitted = fit_classes(network, path)
    return ModelFiles(fitted, path, False, adaptation(network, fitted, f"the classes in {path}"))


def newest_best(network: Network | None, runs: Path, classes: int | None = None) -> Path:
    """The newest `weights/best.pt` of a run, or of a stage of a run, whose model.cfg is `network` up to the classes.

    Raises:
        InputError: there is none, or none of `classes` classes.
    """
    checkpoints = [path for depth in ("*/*", "*/*/*") for path in runs.glob(f"{depth}/weights/best.pt")]
    checkpoints.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in checkpoints:
        cfg = path.parent.parent / "model.cfg"
        stored = _readable(cfg)
        if stored and classes in (None, stored.classes) and (network is None or same_network(stored, network)):
            return path
    wanted = f"fits {network.path}" if network else "has a best.pt"
    wanted += "" if classes is None else f" with {classes} classes"
    raise InputError(f"--weights left out, and no run in {runs} {wanted}; train first or give --weights")


def _readable(cfg: Path) -> Network | None:
    """The network of a run's model.cfg; None where there is none that can be read."""
    try:
        return cfg_file.load(cfg) if cfg.is_file() else None
    except CfgError:
        return None


def other_network(path: Path, stored: Network, wanted: Network) -> WeightsError:
    """The error of a file that holds another network than --cfg."""
    return WeightsError(
        f"{path}: made for another network ({_size(stored)}) than {wanted.path} ({_size(wanted)}); "
        "leave the cfg out to use the one inside"
    )


def _size(network: Network) -> str:
    return f"{len(network.blocks)} blocks, {parameter_count(network)} parameters"


def with_own_anchors(network: Network, stored: Network, weights: Path) -> tuple[Network, tuple[str, ...]]:
    """The network of --cfg with the anchors that its weights were trained with, and the note that says so.

    Args:
        network: of --cfg.
        stored: of as many blocks, in the file of the weights.
        weights: that file.
    """
    blocks = tuple(
        replace(block, anchors=theirs.anchors) if isinstance(block, Yolo) and isinstance(theirs, Yolo) else block
        for block, theirs in zip(network.blocks, stored.blocks, strict=True)
    )
    if blocks == network.blocks:
        return network, ()
    note = f"{weights}: its own anchors are taken in place of those in {network.path}"
    return replace(network, blocks=blocks), (note,)


def is_checkpoint(path: Path) -> bool:
    """Whether torch.save wrote a weights file; the whole archive is checked then.

    Raises:
        WeightsError: not a regular file, empty, another container, a damaged archive, or no header of Darknet either.
    """
    regular_file(path, WeightsError, LARGEST_MODEL)
    _refuse_exported(path)
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(ZIP_MAGIC):
        check_archive(path)
        return True
    if head.startswith(LEGACY_MAGIC):
        return True
    for start, reason in NOT_FETCHED.items():
        if head.lstrip().lower().startswith(start):
            raise WeightsError(f"{path}: {reason}")
    for magic, name in FOREIGN_MAGICS.items():
        if head.startswith(magic) or (magic == b"ustar" and head[257:262] == magic):
            raise WeightsError(f"{path}: {name}; only tensors are read; {WAY_OUT}")
    if not head:
        raise WeightsError(f"{path}: is empty; take another copy")
    try:
        weights_file.read_header(path)
    except WeightsError as failure:
        raise WeightsError(f"{failure}; and no archive of torch.save either") from None
    return False


def _refuse_exported(path: Path) -> None:
    """Refuse a file of export.py that is no weights, or a part of one.

    Raises:
        WeightsError: says what runs it.
    """
    if path.suffix.lower() in EXPORTED:
        readers = "libtorch runs" if path.suffix.lower() == ".torchscript" else "test.py and detect.py run"
        raise WeightsError(
            f"{path}: is an exported file, which {readers}; give the .pt or .weights file it was made from"
        )
    for whole in map(path.with_suffix, PARTS.get(path.suffix.lower(), ())):
        if whole.is_file():
            raise WeightsError(
                f"{path}: is part of {whole}, which test.py and detect.py run; give that file, or "
                "the .pt or .weights file it was made from"
            )


def is_legacy(path: Path) -> bool:
    """Whether a file is what torch.save wrote before 1.6, which is no archive."""
    with path.open("rb") as file:
        return file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC


def check_archive(path: Path) -> None:
    """Refuse a zip that torch.save did not write or whose bytes changed since: torch.load checks neither.

    Raises:
        WeightsError: names what is wrong.
    """
    with (
        foreign_errors(path, "damaged or cut short; take another copy", WeightsError),
        zipfile.ZipFile(path) as archive,
    ):
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        strange = next((name for name in names if not _ENTRY.match(name)), None)
        if strange is not None:
            raise WeightsError(f"{path}: archive entry {strange!r} is not one of torch.save's; {WAY_OUT}")
        if len(set(names)) != len(names):
            raise WeightsError(f"{path}: an archive entry occurs twice; {WAY_OUT}")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x61 for entry in entries):
            raise WeightsError(f"{path}: compressed or encrypted archive; {WAY_OUT}")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise WeightsError(f"{path}: the archive's entries are larger than the file; it is damaged")
        structure = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
        if len(entries) > MOST_ENTRIES or structure > LARGEST_STRUCTURE:
            limits = f"at most {MOST_ENTRIES} with {LARGEST_STRUCTURE} bytes of structure are read"
            raise WeightsError(f"{path}: {len(entries)} archive entries, {structure} bytes of structure; {limits}")
        damaged = archive.testzip()
    if damaged is not None:
        raise WeightsError(f"{path}: {damaged} is damaged (its checksum is wrong); take another copy")


def fit_classes(network: Network, weights: Path) -> Network:
    """`network` with the class count that the size of a .weights file implies.

    Raises:
        WeightsError: the file fits with no class count.
    """
    classes = weights_file.fitting_classes(weights, network)
    if classes is None:
        weights_file.check(weights, network)
        return network
    return adapt_classes(network, classes)


def other_classes(weights: Path, stored: int, wanted: int) -> WeightsError:
    """The error of weights whose heads are made for another class count than a training needs."""
    return WeightsError(f"{weights}: made for {stored} classes, {wanted} are wanted; add -pt to start its heads anew")


def adaptation(before: Network, after: Network, reason: str) -> tuple[str, ...]:
    """The note that says a class count was adapted; empty when it was not."""
    if before.classes == after.classes:
        return ()
    return (f"{before.path}: adapted from {before.classes} to {after.classes} classes, {reason}",)
