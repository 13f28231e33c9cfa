"""Programs that run a network outside PyTorch: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.errors import NumericsError, SuiteError, WeightsError
from utils.runtime.metadata import IMAGE, Arrays

Array = NDArray[np.float32]

ROUNDS_FLOATS = "WeightBiasQuantization"
"""Lets onnxruntime round float weights between integers, where a convolution was kept float."""
CPU_INFO = Path("/proc/cpuinfo")
VNNI = {"avx512_vnni", "avx_vnni"}
"""Names of the instructions in CPU_INFO."""
NCNN_HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")
"""Options that let ncnn round feature maps to 16 bits where a processor has instructions for them."""
OPENVINO = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
"""One picture at a time; without the last OpenVINO rounds to bfloat16 on processors that have it."""
OPENVINO_PLACES = ("Exception from", "Check '")
"""How lines of its messages begin that name places in its own code."""
MESSAGE = 200
"""Characters of another program's message that are shown."""


@dataclass(frozen=True)
class Engine:
    """A network that is ready to run."""

    run: Callable[[Array], list[Array]]
    """From pictures [B, C, H, W], 0…1, to the outputs."""
    batch: int | None
    """Pictures it takes at a time; None: any number."""
    name: str
    """What runs it, with version and threads."""

    def __call__(self, images: Array) -> Arrays:
        """The outputs for any number of pictures."""
        if self.batch is None or len(images) == self.batch:
            return self.run(images)
        parts = [self.run(images[start : start + self.batch]) for start in range(0, len(images), self.batch)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


@contextmanager
def told_as(error: type[SuiteError], what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Context in which an exception of a library becomes an error of one line: the first that says something."""
    try:
        yield
    except MemoryError:
        raise
    except kind as failure:
        lines = [line for line in map(str.strip, str(failure).splitlines()) if line]
        line = next((line for line in lines if not line.startswith(OPENVINO_PLACES)), type(failure).__name__)
        raise error(f"{what}: {line[:MESSAGE]}") from None


def onnxruntime_engine(
    model: Path | bytes, outputs: Sequence[str], batch: int | None, threads: int, *, wide: bool = False
) -> Engine:
    """An ONNX file in onnxruntime, on the CPU.

    Args:
        model: the file, or its bytes.
        outputs: names of the tensors wanted.
        batch: pictures it takes at a time; None: any number.
        threads: of the network.
        wide: pairs of products of 8-bit weights do not saturate in 16 bits on an x86 without VNNI; slower there.

    Raises:
        WeightsError: onnxruntime cannot read the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.use_deterministic_compute = True
    if wide and not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4  # what goes wrong is an exception, too
    source, name = (model, "the file") if isinstance(model, bytes) else (str(model), str(model))
    optimizers = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": [ROUNDS_FLOATS]}
    # onnxruntime has a kind of exception of its own for every status.
    with told_as(WeightsError, f"{name}: onnxruntime cannot read it"):
        session = onnxruntime.InferenceSession(source, options, **optimizers)

    def run(images: Array) -> list[Array]:
        with told_as(NumericsError, f"{name}: onnxruntime failed"):
            return session.run(list(outputs), {IMAGE: images})

    return Engine(run, batch, f"onnxruntime {onnxruntime.__version__}, CPU, threads: {threads}")


def has_vnni() -> bool:
    """Tell whether an x86 adds products of 8 bits in 32 bits, so that no pair of them saturates.

    Linux lists the instructions of its processor. Elsewhere the answer is False, which costs time and is always right.
    """
    try:
        return bool(set(CPU_INFO.read_text().split()) & VNNI)
    except OSError:
        return False


def opencv_onnx_engine(path: Path, outputs: Sequence[str], threads: int, *, integers: bool = False) -> Engine:
    """An ONNX file in OpenCV's dnn, on the CPU, picture by picture.

    Args:
        path: the file.
        outputs: names of the tensors wanted.
        threads: of the network.
        integers: the file is int8, which the new engine of OpenCV 5.0 computes wrong: the classic one gets it.

    Raises:
        WeightsError: OpenCV cannot read the file.
    """
    classic = getattr(cv2.dnn, "ENGINE_CLASSIC", None) if integers else None  # OpenCV 4 has no other engine
    options = {} if classic is None else {"engine": classic}
    return _opencv(lambda: cv2.dnn.readNetFromONNX(str(path), **options), outputs, threads, path)


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
    return _opencv(lambda: read(cfg, np.fromfile(weights, np.uint8)), darknet_heads(network), threads, weights)


def darknet_heads(network: Network) -> list[str]:
    """Names of the raw heads in OpenCV's reader of Darknet files, where an activation is a layer of its own."""
    convolutions = [(head, getattr(network.blocks[head - 1], "activation", "linear")) for head in network.heads]
    return [f"conv_{head - 1}" if curve == "linear" else f"{curve}_{head}" for head, curve in convolutions]


def _opencv(read: Callable[[], cv2.dnn.Net], outputs: Sequence[str], threads: int, path: Path) -> Engine:
    cv2.setNumThreads(threads)
    program = f"OpenCV {cv2.__version__}"
    with told_as(WeightsError, f"{path}: {program} cannot read it", cv2.error):
        net = read()
        net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
        net.setPreferableTarget(cv2.dnn.DNN_TARGET_CPU)

    def run(images: Array) -> list[Array]:
        with told_as(WeightsError, f"{path}: {program} cannot run it", cv2.error):
            net.setInput(images)
            return [np.array(output) for output in net.forward(list(outputs))]

    return Engine(run, 1, f"{program}, CPU, threads: {threads}")


def ncnn_engine(param: Path, outputs: Sequence[str], threads: int, *, half: bool = False) -> Engine:
    """An ncnn network on the CPU, picture by picture, in float32 whatever its weights are stored in.

    Args:
        param: its .param file; the .bin file is beside it.
        outputs: names of the blobs wanted.
        threads: of the network.
        half: let ncnn compute in float16 where the processor can, such as an ARM from v8.2 on.

    Raises:
        WeightsError: ncnn cannot read the files.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    for name in NCNN_HALF:
        setattr(net.opt, name, half and "fp16" in name)
    weights = param.with_suffix(".bin")
    for path, read in ((param, net.load_param), (weights, net.load_model)):
        if read(str(path)):
            raise WeightsError(f"{path}: ncnn {ncnn.__version__} cannot read it")

    def run(images: Array) -> list[Array]:
        picture = np.ascontiguousarray(images[0])
        extractor = net.create_extractor()
        extractor.input(IMAGE, ncnn.Mat(picture).clone())
        heads = []
        for name in outputs:
            failed, blob = extractor.extract(name)
            if failed:
                raise NumericsError(f"{param}: ncnn failed at {name}")
            heads.append(np.array(blob)[None])
        return heads

    return Engine(run, 1, f"ncnn {ncnn.__version__}, CPU, threads: {threads}")


def openvino_engine(model: Path | bytes, outputs: Sequence[str], batch: int | None, threads: int) -> Engine:
    """An OpenVINO or ONNX file in OpenVINO, on the CPU, in float32 where the file has no integers.

    Args:
        model: the file, or the bytes of an ONNX file.
        outputs: names of the tensors wanted.
        batch: pictures it takes at a time; None: any number.
        threads: of the network.

    Raises:
        WeightsError: OpenVINO cannot read the file.
    """
    import openvino

    source, name = (model, "the file") if isinstance(model, bytes) else (str(model), str(model))
    with told_as(WeightsError, f"{name}: OpenVINO cannot read it", RuntimeError):
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(source), "CPU", {**OPENVINO, "INFERENCE_NUM_THREADS": threads})
        request = compiled.create_infer_request()

    def run(images: Array) -> list[Array]:
        with told_as(NumericsError, f"{name}: OpenVINO failed", RuntimeError):
            tensors = request.infer({IMAGE: images}, share_inputs=True)
        return [np.array(tensors[output]) for output in outputs]

    return Engine(run, batch, f"OpenVINO {openvino.__version__.partition('-')[0]}, CPU, threads: {threads}")
