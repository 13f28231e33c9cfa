"""What a pruned network still finds and how fast it is, beside the network it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet, fuse, load_arrays
from utils.darknet.blocks import Network
from utils.darknet.shapes import picture_channels
from utils.data.augment import Augmentation
from utils.data.datasets import Batch, DetectionDataset, Loader, make_loader
from utils.data.index import index
from utils.detection.evaluate import Accuracy, measure_accuracy
from utils.graph import ChannelGraph
from utils.pruning.certificate import silenced
from utils.pruning.removal import Removal
from utils.pruning.request import PruneRequest
from utils.pruning.surgery import Arrays, Compacted
from utils.report.latency import Latency, interleaved

DRAWN_CONFIDENCE = 0.25
DRAWN_PICTURES = 4
Size = tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """The network before, the two of full size that explain the difference, and the one that is left."""

    accuracy: dict[str, Accuracy]
    """Of `original`, `silenced`, `absorbed` (unless constants are not absorbed) and `compact`."""
    latency: dict[str, Latency]
    """Of `original` and `compact`: a forward pass of one picture, batch normalisation folded."""
    runtime: str
    """Where it was measured."""
    pictures: NDArray[np.uint8]
    """[n, C, H, W], the first ones that were looked at."""
    before: list[NDArray[np.floating]]
    after: list[NDArray[np.floating]]
    """What is found in each [k, 6]: x1, y1, x2, y2 in pixels of the network input, confidence, class."""
    names: tuple[str, ...]
    """Of the classes."""


@dataclass(frozen=True)
class Clock:
    """The device and the input size that all networks are timed with."""

    device: torch.device
    size: Size

    def model(self, network: Network, arrays: Arrays) -> Darknet:
        """A network with its batch normalisations folded, where it runs."""
        tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        return fuse(load_arrays(network, tensors)).to(self.device, memory_format=torch.channels_last)

    def latency(self, models: Mapping[str, Darknet], **pace: int) -> dict[str, Latency]:
        """Time of a forward pass of one picture, the models in turn; `pace` as of `latency.interleaved`."""
        channels = next(iter(models.values())).network.net.channels
        image = torch.rand(1, channels, *self.size, generator=torch.Generator().manual_seed(0))
        image = image.to(self.device, memory_format=torch.channels_last)

        def forward(model: Darknet) -> None:
            model(image)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        with torch.inference_mode():
            return interleaved({name: lambda model=model: forward(model) for name, model in models.items()}, **pace)

    def runtime(self) -> str:
        """The device as a reader knows it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, threads: {torch.get_num_threads()}"


@dataclass(frozen=True)
class Bench(Clock):
    """The pictures, too, that all networks are measured with."""

    loader: Loader
    names: tuple[str, ...]

    def accuracy(self, name: str, model: Darknet) -> tuple[Accuracy, list[tuple[NDArray, NDArray]]]:
        """AP over all pictures; of some from the first to the last, each one and what is found in it surely enough."""
        drawn: list[tuple[NDArray, NDArray]] = []
        shown = set(np.linspace(0, len(self.loader.dataset) - 1, DRAWN_PICTURES).round().tolist())

        def keep(number: int, batch: Batch, found: list[Tensor]) -> None:
            for position, image, rows in zip(batch.positions.tolist(), batch.images, found, strict=True):
                if position in shown:
                    drawn.append((image.numpy(), rows[rows[:, 4] >= DRAWN_CONFIDENCE].numpy()))

        return measure_accuracy(name, model, self.loader, self.names, self.device, keep), drawn


def make_bench(asked: PruneRequest, network: Network, size: Size, device: torch.device) -> Bench:
    """The validation pictures of a request as a network takes them."""
    channels = picture_channels(network)
    pictures = index(asked.data.valid, asked.data.names)
    dataset = DetectionDataset(pictures, size=size, mode=asked.mode, channels=channels)
    return Bench(device, size, make_loader(dataset, asked.batch_size, device=device), asked.data.names)


def compare(
    bench: Bench, graph: ChannelGraph, arrays: Arrays, absorbed: Arrays | None, removal: Removal, written: Compacted
) -> Comparison:
    """Measure one network after the other; two are held at once at most.

    Args:
        bench: the pictures.
        graph: of the network before.
        arrays: its tensors.
        absorbed: its tensors with the constants of what goes taken up; None if that is not done.
        removal: what goes.
        written: what is left.
    """
    accuracy = {}
    before = bench.model(graph.network, arrays)
    accuracy["original"], drawn_before = bench.accuracy("original", before)
    with silenced(before, graph, removal):
        accuracy["silenced"], _ = bench.accuracy("silenced", before)
    if absorbed is not None:
        full = bench.model(graph.network, absorbed)
        with silenced(full, graph, removal):
            accuracy["absorbed"], _ = bench.accuracy("absorbed", full)
        del full
    after = bench.model(*written)
    accuracy["compact"], drawn_after = bench.accuracy("compact", after)
    latency = bench.latency({"original": before, "compact": after})
    found = [[rows for _, rows in drawn] for drawn in (drawn_before, drawn_after)]
    pictures = np.stack([image for image, _ in drawn_before])
    return Comparison(accuracy, latency, bench.runtime(), pictures, *found, bench.names)


def training_batches(
    asked: PruneRequest, network: Network, size: Size, device: torch.device, augment: Augmentation | None, most: int
) -> Iterator[Batch]:
    """Batches of training pictures, in an order and with an augmentation that follow from the seed of the request.

    Args:
        asked: whose data, batch size and seed hold.
        network: that reads the pictures.
        size: of its input.
        device: where they go.
        augment: how they vary; None: not at all.
        most: batches; fewer come if the pictures do not make so many.
    """
    pictures = index(asked.data.train, asked.data.names)
    options = {"augment": augment, "seed": asked.seed, "channels": picture_channels(network)}
    dataset = DetectionDataset(pictures, size=size, mode=asked.mode, **options)
    return islice(make_loader(dataset, asked.batch_size, shuffle=True, device=device), most)
