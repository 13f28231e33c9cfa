"""Quantization after training: calibrate, measure, choose which blocks stay float, write."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import Darknet, fuse, network_input
from utils.checkpoint import LoadedModel, load_model, model_document, write_checkpoint
from utils.cli import input_size, log
from utils.darknet.blocks import Network
from utils.darknet.network import max_stride, picture_channels
from utils.darknet.targets import check
from utils.data.datasets import DetectionDataset, make_loader
from utils.data.index import index
from utils.detection.evaluate import Accuracy, measure_accuracy
from utils.device import select_device
from utils.errors import InfeasibleError, InputError
from utils.quantization.calibration import (
    COSTS,
    Cost,
    Statistics,
    block_noise,
    convolutions,
    correct_biases,
    head_noise,
    observe,
    whole_noise,
)
from utils.quantization.quantizers import Phase, quantize, set_phase
from utils.quantization.scheme import AUTO, PICTURES, QuantRequest, QuantSettings, notes, rounded_convolutions
from utils.report.plots import plot_noise
from utils.report.run_dir import RunDirectory
from utils.report.tables import Column, csv_table, text_table

LOOKED_AT = 16
"""Calibration pictures on which noise is measured and biases are corrected, the first ones."""
AT_ONCE = 2
"""Pictures whose outputs of all blocks are held at once."""
FLOAT_BITS = 32
MOST_LAYERS = 10
"""Convolutions that are printed, those with least SQNR; the files have all."""

Measure = Callable[[str, Darknet], Accuracy]
"""Measures a network; the name is for the progress."""


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


@dataclass(frozen=True, eq=False)
class FloatNetwork:
    """A float network and all that is known of it; it is quantized in one step, whatever is kept float."""

    model: Darknet
    """In evaluation mode; left as it is."""
    settings: QuantSettings
    statistics: Statistics
    cost: Cost | None = None
    """A value of COSTS."""
    corrected_with: Tensor | None = None
    """Pictures [B, C, H, W], 0…1, for the correction of biases; None: they are not corrected."""

    def keeping(self, kept: Iterable[int]) -> QuantSettings:
        """The settings with other blocks that stay float."""
        return replace(self.settings, kept=tuple(sorted(kept)))

    def quantized(self, kept: Sequence[int] = ()) -> Darknet:
        """The quantized network, in evaluation mode and rounding; the convolutions of `kept` stay float."""
        model = attached(self.model, self.keeping(kept))
        self.statistics.calibrate(model, self.cost)
        if self.corrected_with is not None:
            correct_biases(model, self.corrected_with)
        set_phase(model, Phase.FROZEN)
        return model


def attached(model: Darknet, settings: QuantSettings) -> Darknet:
    """A copy with quantizers, in evaluation mode, where the model is."""
    device = next(model.parameters()).device
    return quantize(copy.deepcopy(model), settings).to(device).eval().requires_grad_(False)


def prepare(
    model: Darknet, settings: QuantSettings, batches: Iterable[Tensor], corrected_with: Tensor | None = None
) -> FloatNetwork:
    """Look at a float model's activations.

    Args:
        model: left as it is.
        settings: how it will be quantized.
        batches: calibration pictures as of `calibration.observe`.
        corrected_with: of `FloatNetwork`.

    Raises:
        InputError: the target cannot compute the network.
        NumericsError: an activation is not finite.
    """
    model = copy.deepcopy(model).eval()
    return FloatNetwork(model, settings, observe(attached(model, settings), batches), corrected_with=corrected_with)


def quantize_network(request: QuantRequest, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the checkpoint of the quantized network, and the document of --json without the paths of the files.

    Args:
        request: the network, and how it is quantized.
        command: that is noted in the lineage.

    Raises:
        InputError: no such device, a quantized network, one of other classes or with these in another order, or that
            the target cannot compute, too few pictures, more convolutions to keep than there are.
        InfeasibleError: --max-drop is exceeded with every convolution float.
        NumericsError: the network puts out what is not finite.
    """
    device = select_device(request.device)
    loaded = load_float(request)
    lineage = loaded.lineage(command=command)
    network = loaded.model.network
    size = input_size(request.sides, max_stride(network), (network.net.height, network.net.width))
    pictures = calibration_pictures(request, network, size, device)
    measure = accuracy_on(request, network, size, device) if request.test else None
    before = measure("float", loaded.model) if measure else None
    model = copy.deepcopy(loaded.model).to(device).to(memory_format=torch.channels_last)
    corrected_with = torch.cat(pictures.first(LOOKED_AT, LOOKED_AT)) if request.bias_correction else None
    float_network = prepare(model, request.scheme, pictures, corrected_with)
    observer, float_network = choose_observer(request.observer, float_network, pictures.first(LOOKED_AT, LOOKED_AT))
    alone: dict[int, float | None] = {}
    if request.ranks:
        alone = head_noise(float_network.quantized(), pictures.first(LOOKED_AT, request.batch_size))
    kept, after = choose_kept(request, float_network, ranking(alone), measure, before)
    model = float_network.quantized(kept)
    calibration = {
        "observer": observer,
        "pictures": len(pictures.images),
        "seed": request.seed,
        "size": list(size),
        "mode": request.mode,
        "bias_correction": request.bias_correction,
    }
    document = {
        "from": str(request.files.weights),
        "target": request.scheme.target,
        "calibration": calibration,
        "kept": sorted(kept),
        "layers": layer_entries(model, block_noise(model, pictures.first(LOOKED_AT, AT_ONCE)), alone),
        "before": before and before._asdict(),
        "after": after and after._asdict(),
        "map50": {"before": before and before.map50, "after": after and after.map50},
    }
    checkpoint = model_document(
        {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
        network,
        loaded.names or request.data.names,
        lineage,
        quantization=float_network.keeping(kept).document(),
        calibration=calibration,
    )
    return checkpoint, document


def load_float(request: QuantRequest) -> LoadedModel:
    """The network that is to be quantized.

    Raises:
        InputError: it is quantized, has other classes or these in another order, fewer convolutions than --keep-float
            says, or the target cannot compute it.
    """
    loaded = load_model(request.files)
    if loaded.quantization is not None:
        raise InputError(f"{request.files.weights}: is quantized already; give the float weights it was made from")
    network = loaded.model.network
    request.files.check_classes(network, request.data)
    request.data.check_order(loaded.names, request.files.weights)
    count = len(rounded_convolutions(network, request.scheme))
    if request.keep_float > count:
        allowed = f"{count} convolutions are rounded; allowed is 1 to {count}"
        raise InputError(f"--keep-float {request.keep_float}: {allowed}")
    log(*loaded.notes, *notes(request.scheme), *check(network, request.scheme.target))
    return loaded


def calibration_pictures(
    request: QuantRequest, network: Network, size: tuple[int, int], device: torch.device
) -> Pictures:
    """Some train pictures, fitted as for an evaluation; which ones follows from the seed.

    Raises:
        InputError: there are fewer than --calib says.
    """
    assert request.data.train is not None, "QuantRequest refuses such data"
    pictures = index(request.data.train, request.data.names)
    if request.calib is not None and request.calib > len(pictures):
        raise InputError(
            f"--calib {request.calib}: {request.data.path} has {len(pictures)} train images; ask for no more"
        )
    count = min(request.calib or PICTURES, len(pictures))
    if request.calib is None and count < PICTURES:
        log(f"--calib: the calibration takes all {count} train images")
    chosen = pictures.subset(np.random.default_rng(request.seed).permutation(len(pictures))[:count].tolist())
    dataset = DetectionDataset(chosen, size=size, mode=request.mode, channels=picture_channels(network))
    images = torch.cat([batch.images for batch in make_loader(dataset, request.batch_size)])
    return Pictures(images, request.batch_size, device)


def accuracy_on(request: QuantRequest, network: Network, size: tuple[int, int], device: torch.device) -> Measure:
    """A function that measures networks on the validation pictures."""
    assert request.data.valid is not None, "QuantRequest refuses such data"
    pictures, names = index(request.data.valid, request.data.names), request.data.names
    dataset = DetectionDataset(pictures, size=size, mode=request.mode, channels=picture_channels(network))
    loader = make_loader(dataset, request.batch_size, device=device)

    def measure(name: str, model: Darknet) -> Accuracy:
        fused = fuse(model).to(device).to(memory_format=torch.channels_last)
        return measure_accuracy(name, fused, loader, names, device)

    return measure


def choose_observer(name: str, float_network: FloatNetwork, images: Sequence[Tensor]) -> tuple[str, FloatNetwork]:
    """The observer of that name, or the one that leaves least noise in the heads, and the network with it."""
    if name != AUTO:
        return name, replace(float_network, cost=COSTS[name])
    noise = {key: whole_noise(replace(float_network, cost=cost).quantized(), images) for key, cost in COSTS.items()}
    best, _ = max(noise.items(), key=lambda item: math.inf if item[1] is None else item[1])
    text = ", ".join(f"{key} {decibels:.1f}" for key, decibels in noise.items() if decibels is not None)
    log(f"--observer auto: takes {best}; signal to noise in the heads, dB: {text}")
    return best, replace(float_network, cost=COSTS[best])


def ranking(decibels: Mapping[int, float | None]) -> tuple[int, ...]:
    """Blocks from the one that does most harm; what does none comes last."""
    return tuple(sorted(decibels, key=lambda index: (math.inf if decibels[index] is None else decibels[index], index)))


def choose_kept(
    request: QuantRequest,
    float_network: FloatNetwork,
    ranked: Sequence[int],
    measure: Measure | None,
    before: Accuracy | None,
) -> tuple[Sequence[int], Accuracy | None]:
    """Blocks that stay float, those that do most harm first, and the accuracy then: a number, or as many as it takes.

    Raises:
        InfeasibleError: all of them are too few.
    """
    kept = ranked[: request.keep_float]
    after = measure("rounded", float_network.quantized(kept)) if measure else None
    most = math.inf if request.max_drop is None else request.max_drop
    while measure and before and after and (lost := 100 * (before.map50 - after.map50)) > most:
        if len(kept) == len(ranked):
            raise InfeasibleError(
                f"--max-drop {most:g}: {lost:.2f} points of AP50 are lost even with every convolution "
                "float; take more --a_bit, or a larger drop"
            )
        kept = ranked[: len(kept) + 1]
        after = measure(f"blocks {', '.join(map(str, kept))} float", float_network.quantized(kept))
    return kept, after


def layer_entries(
    model: Darknet, decibels: Mapping[int, float | None], alone: Mapping[int, float | None]
) -> list[dict[str, Any]]:
    """Rows of the convolutions of a quantized network, in its order.

    Args:
        model: the network.
        decibels: of `calibration.block_noise`.
        alone: of `calibration.head_noise`; empty if it was not measured.
    """
    entries = []
    for number, layer in convolutions(model):
        block: Any = model.blocks[number]
        entry = {"block": number, "name": f"{number} convolutional", "line": block.line, "activation": block.activation}
        for key, slot in (("bits", layer.quantize_weight), ("activation_bits", layer.quantize_output)):
            entry[key] = FLOAT_BITS if slot is None else slot.grid.bits
        entry |= {"sqnr_db": decibels[number], "alone_db": alone.get(number)}
        entries.append(entry)
    return entries


def write(run: RunDirectory, checkpoint: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Write what `quantize_network` returned; model.cfg comes last, a cfg is never without its weights.

    Returns:
        The document with the paths of the files.
    """
    files = {"weights": str(run.file("model.pt")), "cfg": str(run.file("model.cfg")), "run_dir": str(run.path)}
    document = {**files, **document}
    entries = document["layers"]
    run.write_json("quantize.json", document)
    run.write_text("layers.csv", csv_table(list(entries[0]), [list(entry.values()) for entry in entries]))
    plot_noise(entries, run.file("sqnr.png"))
    run.file("model.cfg").unlink(missing_ok=True)  # of an earlier quantization, with --exist-ok
    write_checkpoint(run.file("model.pt"), checkpoint)
    run.write_text("model.cfg", checkpoint["cfg"])
    return document


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the document for people."""
    worst = sorted((row for row in document["layers"] if row["sqnr_db"] is not None), key=lambda row: row["sqnr_db"])
    columns: list[Column | str] = ["worst layers", "weights", "outputs", Column("SQNR, dB", ".1f")]
    keys = ["name", "bits", "activation_bits", "sqnr_db"]
    if any(entry["alone_db"] is not None for entry in worst):
        columns.append(Column("alone, dB", ".1f"))
        keys.append("alone_db")
    rows = [[_cell(key, entry[key]) for key in keys] for entry in worst[:MOST_LAYERS]]
    yield text_table(columns, rows) + "\n"
    if document["before"] is not None:
        pairs = (("float", document["before"]), ("rounded", document["after"]))
        yield text_table(("", "AP50", "AP50-95"), [(name, ap["map50"], ap["map50_95"]) for name, ap in pairs]) + "\n"
        gain = 100 * (document["map50"]["after"] - document["map50"]["before"])
        way_out = "; --max-drop P keeps convolutions float until at most P points are lost"
        yield f"AP50 changes by {gain:+.2f} points{way_out if gain < 0 and document['target'] != 'fpga' else ''}"
    if document["kept"]:
        yield f"float: blocks {', '.join(map(str, document['kept']))}"
    yield f"written: {document['weights']}"
    yield f"next: {document['next']}"


def _cell(key: str, value: Any) -> Any:
    if not key.endswith("bits"):
        return value
    return "float" if value == FLOAT_BITS else f"{value} bits"
