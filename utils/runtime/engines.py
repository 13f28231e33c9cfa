"""Programs that run a network, PyTorch among them, and the network of `--weights` in one of them, ready to use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from models import Darknet, Outputs, fuse, reduced
from utils.checkpoint import load_model
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.network import OPENCV_EPSILON
from utils.errors import InfeasibleError, InputError, NumericsError, WeightsError
from utils.files import foreign_errors, utf8_path
from utils.runtime.choice import RuntimeFiles
from utils.runtime.exported import (
    IMAGE,
    Arrays,
    ExportedFile,
    Metadata,
    distance,
    parts,
    picture,
    reference,
    sample,
)

Array = NDArray[np.float32]
OPENCV = f"OpenCV {cv2.__version__}"

ROUNDS_FLOATS = "WeightBiasQuantization"
"""Lets onnxruntime round float weights between integers, where a convolution was kept float."""
CPU_INFO = Path("/proc/cpuinfo")
VNNI = {"avx512_vnni", "avx_vnni"}
"""Names of the instructions in CPU_INFO."""
NCNN_HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")
"""Options that let ncnn round feature maps to 16 bits where a processor has instructions for them."""
OPENVINO = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
"""One picture at a time; without the last OpenVINO rounds to bfloat16 on processors that have it."""


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


def on_cpu(program: str) -> str:
    """Name of an engine: a program, and the threads that it has, as many as PyTorch."""
    return f"{program}, CPU, threads: {torch.get_num_threads()}"


def onnxruntime_engine(model: Path | bytes, outputs: Sequence[str], batch: int | None, *, wide: bool = False) -> Engine:
    """An ONNX file in onnxruntime, on the CPU.

    Args:
        model: the file, or its bytes.
        outputs: names of the tensors wanted.
        batch: pictures it takes at a time; None: any number.
        wide: pairs of products of 8-bit weights do not saturate in 16 bits on an x86 without VNNI; slower there.

    Raises:
        WeightsError: onnxruntime cannot read the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.use_deterministic_compute = True
    if wide and not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4  # what goes wrong is an exception, too
    source, name = (nullcontext(model), "the file") if isinstance(model, bytes) else (utf8_path(model), str(model))
    optimizers = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": [ROUNDS_FLOATS]}
    with foreign_errors(name, "onnxruntime cannot read it", WeightsError), source as readable:
        session = onnxruntime.InferenceSession(readable, options, **optimizers)

    def run(images: Array) -> list[Array]:
        with foreign_errors(name, "onnxruntime failed", NumericsError):
            return session.run(list(outputs), {IMAGE: images})

    return Engine(run, batch, on_cpu(f"onnxruntime {onnxruntime.__version__}"))


def has_vnni() -> bool:
    """Tell whether an x86 adds products of 8 bits in 32 bits, so that no pair of them saturates.

    Linux lists the instructions of its processor. Elsewhere the answer is False, which costs time and is always right.
    """
    try:
        return bool(set(CPU_INFO.read_text().split()) & VNNI)
    except OSError:
        return False


def opencv_onnx_engine(path: Path, outputs: Sequence[str], *, integers: bool = False) -> Engine:
    """An ONNX file in OpenCV's dnn, on the CPU, picture by picture.

    Args:
        path: the file.
        outputs: names of the tensors wanted.
        integers: the file is int8, which the new engine of OpenCV 5.0 computes wrong: the classic one gets it.

    Raises:
        WeightsError: OpenCV cannot read the file.
    """
    classic = getattr(cv2.dnn, "ENGINE_CLASSIC", None) if integers else None  # OpenCV 4 has no other engine
    options = {} if classic is None else {"engine": classic}
    with foreign_errors(path, f"{OPENCV} cannot read it", WeightsError), utf8_path(path) as name:
        return _opencv(cv2.dnn.readNetFromONNX(name, **options), outputs, path)


def opencv_darknet_engine(network: Network, weights: Path, size: tuple[int, int]) -> Engine:
    """A Darknet network in OpenCV 4's dnn, on the CPU, picture by picture.

    Args:
        network: one that OpenCV reads as Darknet does: it has no `opencv_warning`.
        weights: its .weights file.
        size: height and width of the input.

    Raises:
        WeightsError: OpenCV cannot read the files.
    """
    sized = replace(network, net=replace(network.net, height=size[0], width=size[1]))
    cfg = np.frombuffer(format_network(sized).encode(), np.uint8)
    with foreign_errors(weights, f"{OPENCV} cannot read it", WeightsError):
        net = cv2.dnn.readNetFromDarknet(cfg, np.fromfile(weights, np.uint8))
        return _opencv(net, darknet_heads(network), weights)


def darknet_heads(network: Network) -> list[str]:
    """Names of the raw heads in OpenCV's reader of Darknet files, where an activation is a layer of its own."""
    convolutions = [(head, getattr(network.blocks[head - 1], "activation", "linear")) for head in network.heads]
    return [f"conv_{head - 1}" if curve == "linear" else f"{curve}_{head}" for head, curve in convolutions]


def _opencv(net: cv2.dnn.Net, outputs: Sequence[str], path: Path) -> Engine:
    cv2.setNumThreads(torch.get_num_threads())
    net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    net.setPreferableTarget(cv2.dnn.DNN_TARGET_CPU)

    def run(images: Array) -> list[Array]:
        with foreign_errors(path, f"{OPENCV} cannot run it", WeightsError):
            net.setInput(images)
            return [np.array(output) for output in net.forward(list(outputs))]

    return Engine(run, 1, on_cpu(OPENCV))


def ncnn_engine(param: Path, outputs: Sequence[str], *, half: bool = False) -> Engine:
    """An ncnn network on the CPU, picture by picture, in float32 whatever its weights are stored in.

    Args:
        param: its .param file; the .bin file is beside it.
        outputs: names of the blobs wanted.
        half: let ncnn compute in float16 where the processor can, such as an ARM from v8.2 on.

    Raises:
        WeightsError: ncnn cannot read the files.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_vulkan_compute = False
    for name in NCNN_HALF:
        setattr(net.opt, name, half and "fp16" in name)
    with foreign_errors(param, "ncnn cannot read it", WeightsError), utf8_path(param) as name:
        for suffix, read in ((".param", net.load_param), (".bin", net.load_model)):
            if read(str(Path(name).with_suffix(suffix))):
                raise WeightsError(f"{param.with_suffix(suffix)}: ncnn {ncnn.__version__} cannot read it")

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

    return Engine(run, 1, on_cpu(f"ncnn {ncnn.__version__}"))


def openvino_engine(model: Path | bytes, outputs: Sequence[str], batch: int | None) -> Engine:
    """An OpenVINO or ONNX file in OpenVINO, on the CPU, in float32 where the file has no integers.

    Args:
        model: the file, or the bytes of an ONNX file.
        outputs: names of the tensors wanted.
        batch: pictures it takes at a time; None: any number.

    Raises:
        WeightsError: OpenVINO cannot read the file.
    """
    import openvino

    source, name = (nullcontext(model), "the file") if isinstance(model, bytes) else (utf8_path(model), str(model))
    with foreign_errors(name, "OpenVINO cannot read it", WeightsError), source as readable:
        core = openvino.Core()
        options = {**OPENVINO, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = core.compile_model(core.read_model(readable), "CPU", options)
        request = compiled.create_infer_request()

    def run(images: Array) -> list[Array]:
        with foreign_errors(name, "OpenVINO failed", NumericsError):
            tensors = request.infer({IMAGE: images}, share_inputs=True)
        return [np.array(tensors[output]) for output in outputs]

    return Engine(run, batch, on_cpu(f"OpenVINO {openvino.__version__.partition('-')[0]}"))


def litert_engine(model: Path | bytes, *, plain: bool = False, integers: bool = False) -> Engine:
    """A TensorFlow Lite file in LiteRT, on the CPU, picture by picture; outputs come in the order of the file.

    Args:
        model: the file, or its bytes.
        plain: take the reference kernels, which are slow, in place of XNNPACK's.
        integers: put out codes as they are, not the values that they stand for.

    Raises:
        WeightsError: LiteRT cannot read the file.
    """
    import ai_edge_litert
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    data, name = (model, "the file") if isinstance(model, bytes) else (model.read_bytes(), str(model))
    kernels = OpResolverType.BUILTIN_REF if plain else OpResolverType.AUTO
    options = {"num_threads": torch.get_num_threads(), "experimental_op_resolver_type": kernels}
    with foreign_errors(name, "LiteRT cannot read it", WeightsError):
        interpreter = Interpreter(model_content=data, **options)
        interpreter.allocate_tensors()
    (image,), outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: Array) -> list[Array]:
        pictures = images.transpose(0, 2, 3, 1)
        if image["dtype"] is np.int8:
            scale, zero = image["quantization"]
            pictures = np.clip(np.rint(pictures / np.float32(scale)) + zero, -128, 127).astype(np.int8)
        with foreign_errors(name, "LiteRT failed", NumericsError):
            interpreter.set_tensor(image["index"], pictures)
            interpreter.invoke()
            arrays = [interpreter.get_tensor(output["index"]) for output in outputs]
        if not integers:
            arrays = [
                _dequantized(array, *output["quantization"]) for array, output in zip(arrays, outputs, strict=True)
            ]
        return [np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array for array in arrays]

    return Engine(run, 1, on_cpu(f"LiteRT {ai_edge_litert.__version__}"))


def _dequantized(array: NDArray[Any], scale: float, zero: int) -> Array:
    """The values that codes stand for; floats as they are."""
    return array if array.dtype == np.float32 else (array.astype(np.float32) - zero) * np.float32(scale)


class ForeignModel(nn.Module):
    """A network that another program than PyTorch runs; it has no parameters and stands in for a `Darknet`.

    Args:
        network: its blocks.
        engine: what runs it.
        output: what the engine puts out, a key of `exported.OUTPUTS`.
    """

    def __init__(self, network: Network, engine: Engine, output: str = "heads") -> None:
        super().__init__()
        self.network, self.engine, self.output = network, engine, output

    @property
    def decodes(self) -> bool:
        """Tell whether there are rows in place of raw heads."""
        return self.output != "heads"

    def forward(self, images: Tensor, features: Collection[int] = ()) -> Outputs:
        """Raw head outputs of images [B, C, H, W], 0…1."""
        assert not self.decodes and not features, "there are raw heads only"
        heads = self._run(images)
        if len(heads) != len(self.network.heads):
            raise WeightsError(f"{self.engine.name}: {len(heads)} heads came out of {len(self.network.heads)}")
        return Outputs(tuple(heads), {})

    def rows(self, images: Tensor) -> Tensor:
        """Decoded rows [B, N, 5 + C], as `utils.detection.decode.decode` returns them."""
        assert self.decodes, "there are raw heads only"
        if self.output == "rows":
            return self._run(images)[0]
        classes = self.network.classes
        return pad_sequence([detected_rows(self._run(image[None])[0], classes) for image in images], batch_first=True)

    def _run(self, images: Tensor) -> list[Tensor]:
        outputs = self.engine(np.ascontiguousarray(images.cpu().numpy()))
        return [torch.from_numpy(output) for output in outputs]


def detected_rows(detections: Tensor, classes: int) -> Tensor:
    """Rows [n, 5 + C] of a picture's detections [n, 7]. NMS with the same thresholds leaves these detections.

    The objectness is the confidence, and the probability of the class is 1.
    """
    low, high = detections[:, 1:3], detections[:, 3:5]
    probabilities = one_hot(detections[:, 6].long(), classes).to(detections.dtype)
    return torch.cat(((low + high) / 2, high - low, detections[:, 5:6], probabilities), dim=1)


@dataclass(frozen=True)
class Loaded:
    """A network that is ready to run."""

    model: Darknet | ForeignModel
    """In evaluation mode; a `Darknet` with its batch normalisations folded."""
    network: Network
    """As the cfg has it."""
    names: tuple[str, ...] | None
    """Class names; None where the file has none."""
    runtime: str
    """What runs it, for people."""
    notes: tuple[str, ...] = ()
    """What was adapted, to be said."""
    simulates: bool = False
    """It computes in float what integers would, so that its time says nothing."""


def load(files: RuntimeFiles, device: torch.device, size: tuple[int, int] | None = None) -> Loaded:
    """The network of checked files.

    Args:
        files: of `choose_runtime`.
        device: of PyTorch; other programs run on the CPU with as many threads as PyTorch.
        size: height and width of the input; the network's own by default.

    Raises:
        WeightsError: damaged, or the runtime cannot read it.
        InputError: --half on a CPU, or of a quantized network.
        InfeasibleError: the runtime computes something else than the file was written with.
    """
    if files.runtime == "torch":
        if files.half and device.type == "cpu":
            raise InputError("--half: float16 needs a GPU, and the network runs on the CPU; leave --half out")
        loaded = load_model(files)
        if files.half and loaded.quantization is not None:
            raise InputError(
                f"--half: {files.weights} is quantized, and float16 has other values than its grids; leave --half out"
            )
        model = fuse(loaded.model)
        if files.half:
            model = reduced(model, torch.float16)
        model.to(device).to(memory_format=torch.channels_last)
        program = f"PyTorch {torch.__version__}"
        gpu = device.type == "cuda"
        name = f"{program}, {torch.cuda.get_device_name(device)}" if gpu else on_cpu(program)
        rounds = loaded.quantization is not None
        return Loaded(model, loaded.model.network, loaded.names, name, loaded.notes, rounds)
    network, file = files.network, files.exported
    assert network is not None, "only a .pt is read without its cfg"
    if file is None:
        size = size or (network.net.height, network.net.width)
        engine = opencv_darknet_engine(network, files.weights, size)
        check_engine(engine, _darknet_files(files, network, size))
    else:
        engine = ENGINES[files.runtime](files, file)
        check_engine(engine, file, half=files.half)
    foreign = ForeignModel(network, engine, file.metadata.output if file else "heads")
    return Loaded(foreign.eval(), network, files.names, engine.name)


def check_engine(engine: Engine, file: ExportedFile, *, half: bool = False) -> None:
    """Run an engine once and compare it with the reference of its file; files of versions before have none.

    Args:
        engine: of the file.
        file: what is known of it.
        half: the engine may compute in float16.

    Raises:
        InfeasibleError: it computes something else; names it, the file and the difference.
    """
    metadata, wanted = file.metadata, file.metadata.reference
    if wanted is None:
        return
    precision = "float16" if half else metadata.precision
    outputs = engine(picture(metadata.network))
    arrays = outputs if metadata.output == "heads" else parts(outputs[-1])
    gap = distance([np.array(values) for values in wanted.values], [sample(array) for array in arrays], precision)
    limit = wanted.limit(precision)
    if not gap <= limit:  # NaN, too
        raise InfeasibleError(
            f"{file.path}: {engine.name} computes another network than the file was made of: its outputs differ by "
            f"{gap:.3g}, allowed is {limit:.3g}; take another --runtime, or another version of it"
        )


@torch.inference_mode()
def _darknet_files(files: RuntimeFiles, network: Network, size: tuple[int, int]) -> ExportedFile:
    """Darknet files with what PyTorch puts out for them, computed with OpenCV's epsilon, as their reference."""
    network = replace(network, net=replace(network.net, height=size[0], width=size[1]))
    model = load_model(files).model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = OPENCV_EPSILON
    heads = [head.numpy() for head in model(torch.from_numpy(picture(network))).heads]
    return ExportedFile(files.weights, Metadata(network, (), reference=reference(heads, heads, "float32")), 1)


def with_outputs(file: bytes, names: Collection[str]) -> bytes:
    """Return an ONNX file that puts out these tensors, too."""
    import onnx

    with foreign_errors("the ONNX file", "damaged", WeightsError):
        model = onnx.load_from_string(file)
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return model.SerializeToString()


def outputs_of(file: ExportedFile) -> tuple[Path | bytes, tuple[str, ...]]:
    """A file, and the outputs to ask for. Before NMS there are rows, which are compared with the file's reference."""
    names = file.metadata.tensors
    if not file.metadata.suppresses:
        return file.path, names
    return with_outputs(file.path.read_bytes(), ["rows"]), (*names, "rows")


ENGINES: dict[str, Callable[[RuntimeFiles, ExportedFile], Engine]] = {
    "onnxruntime": lambda _, file: onnxruntime_engine(*outputs_of(file), file.batch, wide=file.metadata.wide),
    "opencv": lambda _, file: opencv_onnx_engine(
        file.path, file.metadata.tensors, integers=file.metadata.precision == "int8"
    ),
    "ncnn": lambda files, file: ncnn_engine(file.path, file.metadata.tensors, half=files.half),
    "openvino": lambda _, file: openvino_engine(*outputs_of(file), file.batch),
    "litert": lambda _, file: litert_engine(file.path),
}
"""What runs files of export.py."""
