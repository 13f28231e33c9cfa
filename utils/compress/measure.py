"""Networks of a report on the same pictures: accuracy with paired intervals, time in turn, objects lost and gained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from utils.cli import input_size, log
from utils.compress.page import MeasureSettings, deployment, exported
from utils.darknet import cfg as cfg_file
from utils.darknet.data_file import DataConfig
from utils.darknet.network import max_stride, picture_channels
from utils.data.datasets import DetectionDataset, make_loader
from utils.data.draw import GAINED, LOST, Image, draw_grid
from utils.data.images import read_image
from utils.data.index import Index, index
from utils.detection.average_precision import detected
from utils.detection.bootstrap import SHARE, Matches, Spread, bootstrap, matches
from utils.detection.evaluate import Evaluation, evaluate
from utils.device import select_device
from utils.errors import DataError, InputError, SuiteError
from utils.export.settings import SUFFIXES, ExportSettings
from utils.export.workflow import export
from utils.files import sha256
from utils.flags import cfg_of
from utils.report.run_dir import environment
from utils.report.tables import Latency, interleaved, network_cost
from utils.runtime.choice import KINDS, Named, RuntimeFiles, choose_runtime
from utils.runtime.engines import ForeignModel, Loaded, load

Rows = NDArray[np.float64]
"""[n, 6]: x1, y1, x2, y2 in pixels of the picture, confidence (NaN for objects), class."""
SECONDS, LEAST_SECONDS = 30.0, 10.0
"""Most time for all rounds of the timing, of each program at least the second."""
CONFIDENCE = 0.25
"""Least confidence of a box that is drawn or counted, as in the confusion matrix."""
QUALITY = 80
"""Of JPEG."""


class LoadedNetwork(NamedTuple):
    """A network that is ready to be measured."""

    name: str
    loaded: Loaded
    size: tuple[int, int]
    files: RuntimeFiles


def measure(
    document: dict[str, Any],
    data: DataConfig,
    baselines: Sequence[Named] = (),
    device: str = "",
    settings: MeasureSettings | None = None,
) -> list[ComparedPicture]:
    """Add to the document of a journey what its networks do on the `valid` pictures of a data set.

    Args:
        document: of `page.gather`.
        data: the data set.
        baselines: networks that are measured as the runs are.
        device: of PyTorch; files of other runtimes run on the CPU.
        settings: how they are measured.

    Returns:
        The pictures in which most changed between the first network and the one to deploy, else the last.

    Raises:
        DataError: it names no `valid` pictures.
        InputError: a network of other classes, or a file that cannot be run.
    """
    if data.valid is None:
        raise DataError(f"--data {data.path}: no valid = …, the images that networks are measured on")
    settings = settings or MeasureSettings()
    chosen, images = select_device(device), index(data.valid, data.names)
    runs = [run for run in document["runs"] if _can_run(run)]
    if not runs:
        raise InputError(f"--data {data.path}: no stage has a network that can be measured")
    files = [*((run["name"], run["weights"], run["figures"]["size"]) for run in runs), *baselines]
    networks = [load_network(name, _files(file), side, data, chosen) for name, file, side in files]
    evaluations = [evaluate_network(network, images, data.names, chosen, settings.batch_size) for network in networks]
    times = program_times(networks, chosen)
    spreads = bootstrap([matched(evaluation) for evaluation in evaluations], settings.draws, settings.seed)
    ran = [network.loaded.runtime for network in networks[: len(runs)] if network.files.exported]
    program = ran[-1] if ran else networks[0].loaded.runtime
    rows = [_measured(*values, program) for values in zip(networks, spreads, times, strict=True)]
    for run, row in zip(runs, rows, strict=False):
        run |= {"measured": row["measured"], "figures": run["figures"] | row["figures"]}
    document["baselines"] += map(_baseline, networks[len(runs) :], rows[len(runs) :])
    where = environment()
    document["measurement"] = {
        "data": str(data.path),
        "images": len(images),
        "draws": settings.draws,
        "seed": settings.seed,
        "share": SHARE,
        "rounds": min((time.rounds for of_one in times for time in of_one.values()), default=0),
        "machine": ", ".join([where["cpu"], *where["gpus"], f"threads: {torch.get_num_threads()}"]),
        "objects": None,
    }
    document["deploy"] = deployment(document)
    goal = (document["deploy"] or {"run": document["goal"]})["run"]
    last = next((number for number, run in enumerate(runs) if run["name"] == goal), len(runs) - 1)
    if not last:
        return []
    compared = compare(evaluations[0], evaluations[last], images)
    document["measurement"] |= {"objects": _counts(compared), "compared": runs[last]["name"]}
    return sorted(compared, key=_most_changed)[: settings.pictures]


def _can_run(run: Mapping[str, Any]) -> bool:
    """Return whether a run made a network that can be compared; one that ends in NMS has thresholds of its own."""
    if (file := exported(run["weights"])) is not None:
        return not file.metadata.suppresses
    return run["weights"] is not None and Path(run["weights"]).suffix in (".pt", ".weights")


def _files(file: str) -> RuntimeFiles:
    """Return the files of a network; the cfg of a .weights file is beside it."""
    cfg = cfg_of(Path(file))
    files = choose_runtime(cfg_file.load(cfg) if cfg else None, file, None)
    log(*files.notes)
    return files


def load_network(
    name: str, files: RuntimeFiles, side: int | Sequence[int] | None, data: DataConfig, device: torch.device
) -> LoadedNetwork:
    """Return a network and its input size.

    Raises:
        InputError: it has another number of classes than the data set, or cannot work at that side.
    """
    loaded = load(files, device)
    network = loaded.network
    if network.classes != data.classes:
        raise InputError(
            f"--data {data.path}: has {data.classes} classes, but {files.weights} is a network of {network.classes}"
        )
    if files.exported:
        return LoadedNetwork(name, loaded, files.exported.metadata.size, files)
    sides = [side] if isinstance(side, int) else side
    size = input_size(sides, max_stride(network), (network.net.height, network.net.width))
    return LoadedNetwork(name, loaded, size, files)


def evaluate_network(
    network: LoadedNetwork, images: Index, names: Sequence[str], device: torch.device, batch_size: int = 16
) -> Evaluation:
    """Return what a network detects in the pictures."""
    channels = picture_channels(network.loaded.network)
    mode = network.files.mode or "letterbox"
    dataset = DetectionDataset(images, size=network.size, mode=mode, channels=channels)
    loader = make_loader(dataset, batch_size, device=device)
    log(f"{network.name}: {len(images)} images at {network.size[0]} × {network.size[1]}")
    return evaluate(network.loaded.model, loader, names, device=device, by_size=False, keep_detections=True)


def program_times(networks: Sequence[LoadedNetwork], device: torch.device) -> list[dict[str, Latency]]:
    """Return the times of a picture of each network, by program.

    Times compare in one program only. So where there are exported files, each float network is exported for their
    programs as well, to a temporary folder, unless one of the files is its export. PyTorch is timed where there are no
    such files, or on a GPU. A simulation of integers has no time.
    """
    files = [network.files.weights for network in networks if network.files.exported]
    formats = list(dict.fromkeys(KINDS[file.suffix.lower()].format for file in files))
    timed: list[tuple[int, LoadedNetwork]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, network in enumerate(networks):
            if network.files.exported or not (network.loaded.simulates or (formats and device.type == "cpu")):
                timed.append((number, network))
            if not (network.files.exported or network.loaded.simulates):
                made = [_in_format(network, kind, networks, Path(folder, str(number))) for kind in formats]
                timed += [(number, other) for other in made if other]
        once = {id(other): other for _, other in timed}
        laps = dict(zip(once, network_times(list(once.values()), device), strict=True))
    times: list[dict[str, Latency]] = [{} for _ in networks]
    for number, other in timed:
        times[number][other.loaded.runtime] = laps[id(other)]
    return times


def _in_format(
    network: LoadedNetwork, kind: str, networks: Sequence[LoadedNetwork], folder: Path
) -> LoadedNetwork | None:
    """Return a float network as a file of a format: one of `networks`, or written to a folder; None: it cannot be."""
    digest = sha256(network.files.weights)
    for other in networks:
        if (file := other.files.exported) and other.size == network.size:
            makers = [entry["sha256"] for entry in file.metadata.lineage if entry.get("teacher") is None]
            facts = KINDS[file.path.suffix.lower()].format, file.metadata.precision, makers[-1:]
            if facts == (kind, "float32", [digest]):
                return other
    path = folder / f"model{SUFFIXES[kind]}"
    try:
        export(network.files, ExportSettings(format=kind, sides=network.size, path=path))
        files = choose_runtime(None, str(path), None)
        return network._replace(loaded=load(files, torch.device("cpu")), files=files)
    except SuiteError as failure:
        log(f"{network.name}: has no time as {kind}: {failure}")
        return None


def network_times(networks: Sequence[LoadedNetwork], device: torch.device) -> list[Latency]:
    """Return the time of a picture: the networks of a program in turn, one program after the other.

    Threads of one program wait for work in a loop for a while, and would slow down the next one.
    """
    programs: dict[str, dict[str, Callable[[], None]]] = {}
    for number, network in enumerate(networks):
        programs.setdefault(network.loaded.runtime, {})[str(number)] = forward(network, device)
    times: dict[str, Latency] = {}
    with torch.inference_mode():
        for runs in programs.values():
            times |= interleaved(runs, seconds=max(LEAST_SECONDS, SECONDS / len(programs)))
    return [times[str(number)] for number in range(len(networks))]


def forward(network: LoadedNetwork, device: torch.device) -> Callable[[], None]:
    """Return a function that runs a network on one picture and waits for the result."""
    loaded, model = network.loaded, network.loaded.model
    if isinstance(model, ForeignModel):  # a picture on a GPU would be copied to the CPU in every run that is timed
        device = torch.device("cpu")
    image = torch.rand(1, loaded.network.net.channels, *network.size).to(device, memory_format=torch.channels_last)
    call = model.rows if isinstance(model, ForeignModel) and model.decodes else model

    def run() -> None:
        call(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def matched(evaluation: Evaluation) -> Matches:
    """Return which detections find an object."""
    boxes = [np.column_stack([image.classes, image.boxes, image.scores]) for image in evaluation.detections]
    return matches(boxes, evaluation.truth)


def _measured(network: LoadedNetwork, spread: Spread, laps: Mapping[str, Latency], program: str) -> dict[str, Any]:
    """Return accuracy, with differences to the first network and intervals, [value, low, high], times and costs.

    `ms` is the time in one program; `figures` has those in all.
    """
    time, cost = laps.get(program), network_cost(network.loaded.network, *network.size)
    measured = {
        "map50": list(spread.ap50),
        "map50_95": list(spread.ap50_95),
        "map50_difference": list(spread.gain50),
        "map50_95_difference": list(spread.gain50_95),
        "ms": time and time.median,
        "ms_p90": time and time.p90,
        "runtime": program if time else network.loaded.runtime,
        "size": list(network.size),
    }
    figures = {"map50": spread.ap50.value, "map50_95": spread.ap50_95.value, "size": list(network.size)}
    figures |= {"parameters": cost.parameters, "macs": cost.macs}
    return {"measured": measured, "figures": figures | {"ms": {name: lap.median for name, lap in laps.items()}}}


def _baseline(network: LoadedNetwork, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of `baselines` in the document, from what `_measured` returns."""
    _, low, high = row["measured"]["map50"]
    more = {"name": network.name, "low": low, "high": high, "ms": row["measured"]["ms"]}
    return row["measured"] | row["figures"] | more


class ComparedPicture(NamedTuple):
    """A picture: its objects, and the detections of two networks."""

    path: str
    truth: Rows
    before: Rows
    after: Rows
    common: Rows
    """Objects that both networks find."""
    lost: Rows
    """Objects that only the first network finds."""
    gained: Rows
    """Objects that only the second network finds."""


def compare(before: Evaluation, after: Evaluation, images: Index) -> list[ComparedPicture]:
    """Return every picture with the detections of two networks that are sure enough."""
    compared = []
    for *pair, truth in zip(before.detections, after.detections, before.truth, strict=True):
        rows = (np.column_stack([image.boxes, image.scores, image.classes]).astype(np.float64) for image in pair)
        sure = (boxes[boxes[:, 4] >= CONFIDENCE] for boxes in rows)
        compared.append(compare_picture(str(images.images[pair[0].position]), truth, *sure))
    return compared


def compare_picture(path: str, truth: NDArray[np.floating], before: Rows, after: Rows) -> ComparedPicture:
    """Return one picture; `truth` is [m, 5 or 6]: class, x1, y1, x2, y2, 1 if the box is ignored and so no object."""
    truth = truth[~truth[:, 5:].any(axis=1)]
    objects = np.column_stack([truth[:, 1:5], np.full(len(truth), np.nan), truth[:, 0]])
    first, second = detected(objects, before), detected(objects, after)
    return ComparedPicture(
        path, objects, before, after, objects[first & second], objects[first & ~second], objects[second & ~first]
    )


def _counts(compared: Sequence[ComparedPicture]) -> dict[str, int]:
    """Return how many objects both networks find, and each of them."""
    objects, common, lost, gained = (
        sum(len(getattr(picture, kind)) for picture in compared) for kind in ("truth", "common", "lost", "gained")
    )
    return {"objects": objects, "before": common + lost, "after": common + gained, "lost": lost, "gained": gained}


def _most_changed(picture: ComparedPicture) -> tuple[int, bool, int]:
    """Return the order of pictures: most lost and gained, then fewer objects, but not none."""
    return -len(picture.lost) - len(picture.gained), len(picture.truth) == 0, len(picture.truth)


def panels(picture: ComparedPicture, names: Sequence[str], titles: Sequence[str]) -> Image:
    """Return the picture with its objects, with the boxes before, and after, where lost and gained are marked."""
    images = np.repeat(read_image(picture.path).transpose(2, 0, 1)[None], len(titles), axis=0)
    marks = [(picture.lost, "lost", LOST), (picture.gained, "gained", GAINED)]
    boxes = (picture.truth, picture.before, picture.after)
    return draw_grid(images, boxes, names, titles, ((), (), marks))


def jpeg(image: Image) -> bytes:
    """Return a picture as JPEG."""
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()
