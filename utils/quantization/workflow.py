"""A quantization after training, from checked flags to the written network: calibrate, measure, choose, write."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import Darknet, fuse
from utils.checkpoint import LoadedModel, load_model
from utils.cli import input_size, log, print_json
from utils.darknet.blocks import Network
from utils.darknet.shapes import max_stride
from utils.data.datasets import DetectionDataset, Loader, make_loader
from utils.data.index import index
from utils.device import select_device
from utils.errors import InfeasibleError, InputError
from utils.evaluation import evaluate, network_input
from utils.quantization import record
from utils.quantization.equalize import Pairs, equalize
from utils.quantization.observers import OBSERVERS
from utils.quantization.recipe import Recipe, prepare
from utils.quantization.request import AUTO, PICTURES, QuantRequest
from utils.quantization.scheme import check, notes, rounded_convolutions
from utils.quantization.sensitivity import block_noise, head_noise, ranking, whole_noise
from utils.report.run_dir import RunDirectory

LOOKED_AT = 16
"""Calibration pictures on which noise is measured and biases are corrected, the first ones."""
AT_ONCE = 2
"""Pictures whose outputs of all blocks are held at once."""


class Accuracy(NamedTuple):
    """Average precisions, 0…1."""

    map50: float
    map50_95: float


@dataclass(frozen=True, eq=False)
class Pictures:
    """Calibration pictures, read once."""

    images: Tensor
    """uint8 [N, C, H, W]."""
    batch_size: int
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        """Float images [B, C, H, W], 0…1, on the device."""
        return (network_input(part, self.device) for part in self.images.split(self.batch_size))

    def first(self, count: int, at_once: int) -> list[Tensor]:
        """The first ones, in small batches."""
        return list(replace(self, images=self.images[:count], batch_size=at_once))


@dataclass(frozen=True)
class Bench:
    """The pictures that networks are measured with."""

    loader: Loader
    names: tuple[str, ...]
    device: torch.device

    def accuracy(self, name: str, model: Darknet) -> Accuracy:
        """AP over all pictures; `name` for the progress."""
        fused = fuse(model).to(self.device, memory_format=torch.channels_last)
        found = evaluate(fused, self.loader, self.names, device=self.device, by_size=False).metrics
        log(f"{name}: AP50 {found.map50:.3f}, AP50-95 {found.map50_95:.3f}")
        return Accuracy(found.map50, found.map50_95)


class Chosen(NamedTuple):
    """Which blocks stay float, and what is known of the network then."""

    kept: tuple[int, ...]
    accuracy: Accuracy | None


def carry_out(asked: QuantRequest) -> None:
    """Carry out a request and print what came of it.

    Raises:
        InputError: no such device, a quantized network, one of other classes or that the target cannot compute, too
            few pictures, nothing to equalize, more convolutions to keep than there are.
        InfeasibleError: --max-drop is exceeded with every convolution float; nothing is written.
        NumericsError: the network puts out what is not finite.
    """
    device = select_device(asked.device)
    loaded = load_float(asked)
    lineage = list(loaded.lineage())
    lineage[-1] = {**lineage[-1], "command": asked.command}
    network = loaded.model.network
    size = input_size(asked.sides, max_stride(network), (network.net.height, network.net.width))
    pictures = calibration_pictures(asked, network, size, device)
    model = copy.deepcopy(loaded.model).eval().to(device, memory_format=torch.channels_last)
    pairs = equalized(asked, model)
    bench = make_bench(asked, network, size, device) if asked.test else None
    before = bench.accuracy("float", loaded.model) if bench else None
    corrected_with = torch.cat(pictures.first(LOOKED_AT, LOOKED_AT)) if asked.correct else None
    observer, recipe = observed(asked, prepare(model, asked.settings, pictures, OBSERVERS["minmax"], corrected_with),
                                pictures)  # fmt: skip
    alone = head_noise(recipe.made(), pictures.first(LOOKED_AT, asked.batch_size)) if asked.ranks else {}
    chosen = choose(asked, recipe, ranking(alone), bench, before)
    made = recipe.made(chosen.kept)
    decibels = block_noise(made, pictures.first(LOOKED_AT, AT_ONCE))
    calibration = {"observer": observer, "pictures": len(pictures.images), "seed": asked.seed,
                   "size": list(size), "mode": asked.mode, "equalized": [list(pair) for pair in pairs.usable],
                   "bias_correction": asked.correct}  # fmt: skip
    with RunDirectory.create(asked.project, asked.name, exist_ok=asked.exist_ok).until("model.cfg") as run:
        document = {
            "weights": str(run.file("model.pt")), "cfg": str(run.file("model.cfg")), "run_dir": str(run.path),
            "from": str(asked.files.weights), "target": asked.settings.target, "calibration": calibration,
            "kept": sorted(chosen.kept), "layers": record.layer_entries(made, decibels, alone),
            **_accuracies(before, chosen.accuracy)}  # fmt: skip
        run.describe(args=asked.flags)
        names = loaded.names or asked.data.names
        record.write(run, made, recipe.keeping(chosen.kept), loaded, names, lineage, document)
    print_json(document) if asked.as_json else print("\n".join(record.lines(document)))


def observed(asked: QuantRequest, recipe: Recipe, pictures: Pictures) -> tuple[str, Recipe]:
    """The observer that was asked for, or the one that leaves least noise in the heads, and the recipe with it."""
    if asked.observer != AUTO:
        return asked.observer, replace(recipe, observer=OBSERVERS[asked.observer])
    images = pictures.first(LOOKED_AT, LOOKED_AT)
    recipes = {name: replace(recipe, observer=observer) for name, observer in OBSERVERS.items()}
    noise = {name: whole_noise(one.made(), images) for name, one in recipes.items()}
    best = max(noise, key=lambda name: math.inf if noise[name] is None else noise[name])
    told = ", ".join(f"{name} {decibels:.1f}" for name, decibels in noise.items() if decibels is not None)
    log(f"--observer auto: takes {best}; signal to noise in the heads, dB: {told}")
    return best, recipes[best]


def _accuracies(before: Accuracy | None, after: Accuracy | None) -> dict[str, Any]:
    """The parts of the document that say what is found; None where nothing was measured."""
    found = {"before": before and before._asdict(), "after": after and after._asdict()}
    return found | {"map50": {when: values and values["map50"] for when, values in found.items()}}


def load_float(asked: QuantRequest) -> LoadedModel:
    """The network that is to be quantized.

    Raises:
        InputError: it is quantized, has other classes, fewer convolutions than --keep-float says, or the target cannot
            compute it.
    """
    loaded = load_model(asked.files)
    if loaded.quantization is not None:
        raise InputError(f"{asked.files.weights}: is quantized already; give the float weights it was made from")
    for note in loaded.notes:
        log(note)
    network = loaded.model.network
    asked.check_classes(network)
    check(network, asked.settings)
    blocks = rounded_convolutions(network, asked.settings)
    if asked.keep_float > len(blocks):
        raise InputError(f"--keep-float {asked.keep_float}: {len(blocks)} convolutions are rounded; allowed is 1 to "
                         f"{len(blocks)}")  # fmt: skip
    for note in notes(asked.settings):
        log(note)
    return loaded


def calibration_pictures(
    asked: QuantRequest, network: Network, size: tuple[int, int], device: torch.device
) -> Pictures:
    """Some train pictures, fitted as for an evaluation; which ones follows from the seed.

    Raises:
        InputError: there are fewer than were asked for.
    """
    found = index(asked.data.train, asked.data.names)
    if asked.pictures is not None and asked.pictures > len(found):
        raise InputError(f"--calib {asked.pictures}: {asked.data.path} has {len(found)} train pictures; ask for no "
                         "more")  # fmt: skip
    count = min(asked.pictures or PICTURES, len(found))
    if asked.pictures is None and count < PICTURES:
        log(f"--calib: the calibration takes all {count} train pictures")
    places = np.random.default_rng(asked.seed).permutation(len(found))[:count].tolist()
    dataset = DetectionDataset(found.subset(places), size=size, mode=asked.mode, channels=network.net.channels)
    batches = list(make_loader(dataset, asked.batch_size))
    return Pictures(torch.cat([batch.images for batch in batches]), asked.batch_size, device)


def equalized(asked: QuantRequest, model: Darknet) -> Pairs:
    """The pairs of a model that were equalized, if that was asked for; the model is changed."""
    if not asked.equalize:
        return Pairs((), ())
    pairs = equalize(model)
    curves = ", ".join(sorted({model.blocks[pair.maker].activation for pair in pairs.curved}))
    left = f"; {len(pairs.curved)} left as they are, as {curves} does not scale" if curves else ""
    log(f"--equalize: {len(pairs.usable)} pairs of convolutions{left}")
    return pairs


def make_bench(asked: QuantRequest, network: Network, size: tuple[int, int], device: torch.device) -> Bench:
    """The validation pictures."""
    pictures = index(asked.data.valid, asked.data.names)
    dataset = DetectionDataset(pictures, size=size, mode=asked.mode, channels=network.net.channels)
    return Bench(make_loader(dataset, asked.batch_size, device=device), asked.data.names, device)


def choose(
    asked: QuantRequest, recipe: Recipe, ranked: tuple[int, ...], bench: Bench | None, before: Accuracy | None
) -> Chosen:
    """Which blocks stay float: a number, or as many as it takes, those that do most harm first.

    Raises:
        InfeasibleError: all of them are too few.
    """
    kept = ranked[: asked.keep_float]
    after = bench.accuracy("rounded", recipe.made(kept)) if bench else None
    while asked.max_drop is not None and 100 * (before.map50 - after.map50) > asked.max_drop:
        if len(kept) == len(ranked):
            raise InfeasibleError(f"--max-drop {asked.max_drop:g}: {100 * (before.map50 - after.map50):.2f} points of "
                                  "AP50 are lost even with every convolution float; take more --a_bit, or a larger "
                                  "drop")  # fmt: skip
        kept = ranked[: len(kept) + 1]
        after = bench.accuracy(f"blocks {', '.join(map(str, kept))} float", recipe.made(kept))
    return Chosen(kept, after)
