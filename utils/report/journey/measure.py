"""All networks of a journey on the same pictures: accuracy with paired intervals, time in turn, what was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.cli import input_size, log
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import DataConfig
from utils.darknet.network import max_stride, picture_channels
from utils.data.datasets import DetectionDataset, make_loader
from utils.data.index import Index, index
from utils.detection.bootstrap import SHARE, Interval, Matches, bootstrap, matches
from utils.detection.evaluate import Evaluation, evaluate
from utils.device import select_device
from utils.errors import DataError, InputError
from utils.model_files import cfg_of
from utils.report.cost import network_cost
from utils.report.journey.baselines import Baseline, Named
from utils.report.journey.gather import Journey, exported
from utils.report.journey.lost import Comparison, most_changed
from utils.report.latency import Latency, interleaved
from utils.report.run_dir import environment
from utils.runtime.choice import RuntimeFiles, choose_runtime
from utils.runtime.load import Loaded, load

SECONDS, LEAST_SECONDS = 30.0, 10.0
"""Most time for all rounds of the timing, of each program at least the second."""


@dataclass(frozen=True)
class Measured:
    """One network on the pictures; fractions are 0…1."""

    map50: Interval
    map50_95: Interval
    gain50: Interval
    """AP50 less that of the first stage."""
    gain50_95: Interval
    ms: float
    """Median milliseconds of a forward pass of one picture."""
    p90: float
    runtime: str
    size: tuple[int, int]
    parameters: int
    macs: int


@dataclass(frozen=True)
class Measurement:
    """What was measured for a report."""

    data: str
    images: int
    draws: int
    seed: int
    rounds: int
    """Of the timing, at least."""
    machine: str
    stages: Mapping[int, Measured]
    """By the place of the stage."""
    others: Mapping[str, Measured]
    """Baselines by name."""
    comparison: Comparison | None
    """Two stages on the pictures where they differ most."""
    compared: tuple[int, int]
    """Places of these stages: the first, and where the journey led to."""
    share: float = SHARE
    """Of the draws, make an interval."""


class LoadedNetwork(NamedTuple):
    """A network that is ready to run."""

    name: str
    loaded: Loaded
    size: tuple[int, int]
    mode: str
    """How pictures are fitted."""


def measure(
    journey: Journey,
    data: DataConfig,
    others: Sequence[Named] = (),
    *,
    device: str = "",
    batch_size: int = 16,
    draws: int = 1000,
    seed: int = 0,
    pictures: int = 6,
) -> Journey:
    """The journey with what its networks do on the `valid` pictures of a data set.

    Args:
        journey: of `gather`.
        data: the data set.
        others: baselines, measured as the stages are.
        device: of PyTorch; files of other runtimes run on the CPU.
        batch_size: pictures at a time.
        draws: data sets drawn for the intervals.
        seed: of the draws.
        pictures: most pictures of the comparison.

    Raises:
        DataError: it names no `valid` pictures.
        InputError: a network of other classes, or a file that cannot be run.
    """
    if data.valid is None:
        raise DataError(f"--data {data.path}: no valid = …, the pictures that networks are measured on")
    chosen, found = select_device(device), index(data.valid, data.names)
    places = [place for place in journey.networks if _runs(journey, place)]
    if not places:
        raise InputError(f"--data {data.path}: no stage has a network that can be measured")
    networks = [_stage_network(journey, place, data, chosen) for place in places]
    networks += [load_network(other.name, _files(other.file), other.side, data, chosen) for other in others]
    compared = places[0], journey.goal if journey.goal in places else places[-1]
    hits, kept = [], {}
    for number, network in enumerate(networks):
        evaluation = evaluate_network(network, found, data.names, chosen, batch_size)
        hits.append(matched(evaluation))
        if number < len(places) and places[number] in compared:
            kept[places[number]] = evaluation
    times = network_times(networks, chosen)
    measured = _measured(networks, hits, times, draws, seed)
    pair = [kept[place] for place in compared]
    comparison = most_changed(*pair, found, data.names, pictures) if len(kept) == 2 else None
    where = environment()
    machine = ", ".join([where["cpu"], *where["gpus"], f"threads: {torch.get_num_threads()}"])
    measurement = Measurement(
        str(data.path), len(found), draws, seed, min(time.rounds for time in times), machine,
        stages=dict(zip(places, measured, strict=False)),
        others={other.name: row for other, row in zip(others, measured[len(places):], strict=True)},
        comparison=comparison, compared=compared,
    )  # fmt: skip
    baselines = [_as_baseline(name, row) for name, row in measurement.others.items()]
    return replace(journey, measurement=measurement, baselines=(*journey.baselines, *baselines))


def _runs(journey: Journey, place: int) -> bool:
    """Whether a stage made a network that can be compared; one that ends in NMS has thresholds of its own."""
    stage = journey.stages[place]
    if (file := exported(stage)) is not None:
        return file.metadata.output != "detections"
    return stage.weights is not None and stage.weights.suffix in (".pt", ".weights")


def _stage_network(journey: Journey, place: int, data: DataConfig, device: torch.device) -> LoadedNetwork:
    """The network of a stage at the size that its run worked at."""
    stage = journey.stages[place]
    return load_network(stage.name, _files(str(stage.weights)), stage.figures.size, data, device)


def _files(file: str) -> RuntimeFiles:
    """A file; the cfg of a .weights file is beside it."""
    cfg = cfg_of(Path(file))
    files = choose_runtime(cfg and cfg_file.load(cfg), file, None)
    for note in files.notes:
        log(note)
    return files


def load_network(
    name: str, files: RuntimeFiles, side: int | tuple[int, int] | None, data: DataConfig, device: torch.device
) -> LoadedNetwork:
    """A network, its input size and how pictures are fitted.

    Raises:
        InputError: it has another number of classes than the data set, or cannot work at that side.
    """
    loaded = load(files, device)
    net = loaded.network.net
    if loaded.network.classes != data.classes:
        raise InputError(f"--data {data.path}: has {data.classes} classes, but {files.weights} is a network of "
                         f"{loaded.network.classes}")  # fmt: skip
    own = files.exported.metadata.size if files.exported else (net.height, net.width)
    sides = list(side) if isinstance(side, tuple) else [side] if side else None
    size = own if files.exported else input_size(sides, max_stride(loaded.network), own)
    return LoadedNetwork(name, loaded, size, files.mode or "letterbox")


def matched(evaluation: Evaluation) -> Matches:
    """Which detections find an object."""
    rows = [np.column_stack([image.classes, image.boxes, image.scores]) for image in evaluation.detections]
    return matches(rows, evaluation.truth)


def evaluate_network(
    network: LoadedNetwork, found: Index, names: Sequence[str], device: torch.device, batch_size: int = 16
) -> Evaluation:
    """All that is found in the pictures."""
    loaded, size = network.loaded, network.size
    channels = picture_channels(loaded.network)
    dataset = DetectionDataset(found, size=size, mode=network.mode, channels=channels)
    loader = make_loader(dataset, batch_size, device=device)
    log(f"{network.name}: {len(found)} pictures at {size[0]} × {size[1]}")
    return evaluate(loaded.model, loader, names, device=device, by_size=False, keep_detections=True)


def network_times(networks: Sequence[LoadedNetwork], device: torch.device) -> list[Latency]:
    """Time of a picture: the networks of a program in turn, one program after the other.

    Threads of one program wait for work in a loop for a while, and would slow down the next one.
    """
    runs: dict[str, dict[int, Callable[[], None]]] = {}
    for number, network in enumerate(networks):
        runs.setdefault(network.loaded.runtime, {})[number] = _forward(network, device)
    found: dict[int, Latency] = {}
    with torch.inference_mode():
        for own in runs.values():
            seconds = max(LEAST_SECONDS, SECONDS / len(runs))
            found |= interleaved(own, seconds=seconds)
    return [found[number] for number in range(len(networks))]


def _forward(network: LoadedNetwork, device: torch.device) -> Callable[[], None]:
    """Looks at one picture."""
    model = network.loaded.model
    image = torch.rand(1, network.loaded.network.net.channels, *network.size)
    image = image.to(device, memory_format=torch.channels_last)

    def forward() -> None:
        model.rows(image) if getattr(model, "decodes", False) else model(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return forward


def _measured(
    networks: Sequence[LoadedNetwork], hits: Sequence[Matches], times: Sequence[Latency], draws: int, seed: int
) -> list[Measured]:
    rows = []
    for network, spread, time in zip(networks, bootstrap(hits, draws, seed), times, strict=True):
        cost = network_cost(network.loaded.network, *network.size)
        rows.append(Measured(spread.ap50, spread.ap50_95, spread.gain50, spread.gain50_95, time.median, time.p90,
                             network.loaded.runtime, network.size, cost.parameters, cost.macs))  # fmt: skip
    return rows


def _as_baseline(name: str, row: Measured) -> Baseline:
    return Baseline(name, *row.map50, row.map50_95.value, row.parameters, row.macs, row.ms, row.size)
