"""Programs that run a network outside PyTorch: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.errors import NumericsError, WeightsError
from utils.runtime.metadata import IMAGE

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Engine:
    """A network that is ready to run."""

    run: Callable[[Array], list[Array]]
    """From pictures [B, C, H, W], 0…1, to the outputs."""
    batch: int | None
    """Pictures it takes at a time; None: any number."""
    name: str
    """What runs it, with version and threads."""

    def __call__(self, images: Array) -> list[Array]:
        """The outputs for any number of pictures."""
        if self.batch is None or len(images) == self.batch:
            return self.run(images)
        parts = [self.run(images[start : start + self.batch]) for start in range(0, len(images), self.batch)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def onnxruntime_engine(model: Path | bytes, outputs: Sequence[str], batch: int | None, threads: int) -> Engine:
    """An ONNX file in onnxruntime, on the CPU.

    Args:
        model: the file, or its bytes.
        outputs: names of the tensors wanted.
        batch: pictures it takes at a time; None: any number.
        threads: of the network.

    Raises:
        WeightsError: onnxruntime cannot read the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what goes wrong is an exception, too
    place = "the file" if isinstance(model, bytes) else str(model)
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as failure:  # onnxruntime has a kind of its own for every status
        raise WeightsError(f"{place}: onnxruntime cannot read it: {_line(failure)}") from None

    def run(images: Array) -> list[Array]:
        try:
            return session.run(list(outputs), {IMAGE: images})
        except Exception as failure:
            raise NumericsError(f"{place}: onnxruntime failed: {_line(failure)}") from None

    return Engine(run, batch, f"onnxruntime {onnxruntime.__version__}, CPU, threads: {threads}")


def opencv_onnx_engine(path: Path, outputs: Sequence[str], threads: int) -> Engine:
    """An ONNX file in OpenCV's dnn, on the CPU, picture by picture.

    Raises:
        WeightsError: OpenCV cannot read the file.
    """
    return _opencv(lambda: cv2.dnn.readNetFromONNX(str(path)), outputs, threads, str(path))


def opencv_darknet_engine(network: Network, weights: Path, size: tuple[int, int], threads: int) -> Engine:
    """A Darknet network in OpenCV 4's dnn, on the CPU, picture by picture.

    Args:
        network: one that OpenCV reads as Darknet does (`darknet.opencv`).
        weights: its .weights file.
        size: height and width of the input.
        threads: of the network.

    Raises:
        WeightsError: OpenCV cannot read the files.
    """
    sized = replace(network, net=replace(network.net, height=size[0], width=size[1]))
    cfg = np.frombuffer(format_network(sized).encode(), np.uint8)
    read = cv2.dnn.readNetFromDarknet
    return _opencv(lambda: read(cfg, np.fromfile(weights, np.uint8)), darknet_heads(network), threads, str(weights))


def darknet_heads(network: Network) -> list[str]:
    """Names of the raw heads in OpenCV's reader of Darknet files, where an activation is a layer of its own."""
    convolutions = [(head, network.blocks[head - 1].activation) for head in network.heads]
    return [f"conv_{head - 1}" if curve == "linear" else f"{curve}_{head}" for head, curve in convolutions]


def _opencv(read: Callable[[], cv2.dnn.Net], outputs: Sequence[str], threads: int, place: str) -> Engine:
    cv2.setNumThreads(threads)
    try:
        net = read()
        net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
        net.setPreferableTarget(cv2.dnn.DNN_TARGET_CPU)
    except cv2.error as failure:
        raise WeightsError(f"{place}: OpenCV {cv2.__version__} cannot read it: {_line(failure)}") from None

    def run(images: Array) -> list[Array]:
        try:
            net.setInput(images)
            return [np.array(output) for output in net.forward(list(outputs))]
        except cv2.error as failure:
            raise WeightsError(f"{place}: OpenCV {cv2.__version__} cannot run it: {_line(failure)}") from None

    return Engine(run, 1, f"OpenCV {cv2.__version__}, CPU, threads: {threads}")


def _line(failure: Exception) -> str:
    """The first line of a message that says something."""
    lines = (line.strip() for line in str(failure).splitlines())
    return next((line[:200] for line in lines if line), type(failure).__name__)
