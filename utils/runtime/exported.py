"""Files of export.py: their metadata, the outputs that runtimes are compared with, and how they are read. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from utils import files
from utils.cli import require
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.darknet.network import strides
from utils.errors import WeightsError
from utils.files import foreign_errors, read_json, regular_file, utf8, utf8_path
from utils.flags import MODES
from utils.quantization.scheme import QuantSettings

if TYPE_CHECKING:
    import onnx

PRODUCER = "darknet-compression"
SCHEMA = 1
NARROW_BITS = 7
"""Weights of more bits can make two products with 8-bit activations overflow 16 bits."""
IMAGE = "images"
"""Name of the input: [B, C, H, W], float32 0…1, RGB (or grey where the network has one channel)."""
OUTPUTS = {
    "heads": "raw heads head0, head1, …: [B, A · (5 + C), H, W]",
    "rows": "rows [B, N, 5 + C]: cx, cy, w, h in pixels of the input, objectness, class probabilities",
    "detections": "detections [K, 7]: image, x1, y1, x2, y2 in pixels of the input, confidence, class; best first",
}
Arrays = Sequence[NDArray[np.floating]]
VALUES = 256
"""Of each array that a file keeps."""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, are spread evenly, and in step with no side of an array."""
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "int8": 0.1}
"""Differences that always pass, by precision: as `distance` measures them.

Measured: 1e-6 in float32, 4e-4 to 6e-3 in float16. With integers of seven trained networks it was 0.02 to 0.16 in
onnxruntime, OpenVINO and OpenCV, because each layer carries on the roundings that fell differently before it."""
MOST = 3
"""So many times the difference that the file was written with passes, too.

Measured on these networks in int8: programs that compute right differ by up to 1.9 times as much as onnxruntime, where
every layer was proved; OpenCV 5.0's new engine, which computes wrong, by 4.3 to 24 times as much.
"""
DIGEST = "sha256"
"""Property with the digest of what was written."""
UNSTAMPED = hashlib.sha256(b"").hexdigest().encode()
"""Stands for the digest of a file while that is computed."""
OPENVINO_SECTION = "darknet"
"""Of rt_info, where the metadata are."""
CFG = "cfg"
"""The property that is no JSON, beside DIGEST."""
DOCUMENTS = ("schema", "names", "input", "output", "thresholds", "precision", "lineage", "quantization", "reference")
"""Properties that are read; all are JSON."""
LOOPS = frozenset({"If", "Loop", "Scan", "SequenceMap", "TensorIterator"})
"""Operators of ONNX and OpenVINO that run other graphs."""
LARGEST_ONNX = (1 << 31) - 1
"""Bytes that the readers of ONNX and TensorFlow Lite can take."""
HASHED = (".param", ".bin")
"""Files of ncnn whose digests are in the third, NAME.json."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of the network that a file was made of, for `picture`."""

    values: tuple[tuple[float, ...], ...]
    """VALUES of each array, as `sample` takes them."""
    gap: float
    """Difference of the program that the file was proved with."""

    def limit(self, precision: str) -> float:
        """Largest difference that passes."""
        return max(TOLERANCES[precision], MOST * self.gap)


@dataclass(frozen=True)
class Metadata:
    """The metadata of one file."""

    network: Network
    """As it was trained; `net` has the height and width of the file's input."""
    names: tuple[str, ...]
    """Of the classes."""
    output: str = "heads"
    """A key of OUTPUTS."""
    mode: Literal["letterbox", "stretch"] = "letterbox"
    """How pictures are fitted to the input: a key of `flags.MODES`."""
    precision: str = "float32"
    """Of weights and feature maps: float32, float16 or int8. Input and outputs are float32 (int8 TFLite: codes)."""
    conf_thres: float = 0.3
    iou_thres: float = 0.6
    """Those of `--nms`; of other files a proposal."""
    lineage: tuple[Mapping[str, Any], ...] = ()
    """What the file was made from, oldest first."""
    quantization: QuantSettings | None = None
    """How an int8 network was quantized."""
    reference: ReferenceOutputs | None = None
    """Outputs that runtimes are compared with; None in files of versions before."""
    channels_last: bool = False
    """The input is [1, H, W, C], and raw heads are [1, H, W, A · (5 + C)]."""

    @property
    def wide(self) -> bool:
        """Tell whether weights have so many bits that pairs of products may need more than 16."""
        settings = self.quantization
        return settings is not None and max(settings.weight_bits, settings.kernels.weight_bits) > NARROW_BITS

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.network.net.height, self.network.net.width

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the outputs."""
        heads = tuple(f"head{number}" for number in range(len(self.network.heads)))
        return heads if self.output == "heads" else (self.output,)

    @property
    def suppresses(self) -> bool:
        """Tell whether the file ends in NMS."""
        return self.output == "detections"

    @property
    def what(self) -> str:
        """The outputs in words."""
        text = OUTPUTS[self.output]
        return text.replace("[B, A · (5 + C), H, W]", "[B, H, W, A · (5 + C)]") if self.channels_last else text

    def properties(self) -> dict[str, str]:
        """As texts by name, for the file."""
        texts = {name: utf8(json.dumps(document, ensure_ascii=False)) for name, document in self.documents().items()}
        return {CFG: cfg_file.format_network(self.network), **texts}

    def documents(self) -> dict[str, Any]:
        """The properties but CFG."""
        net, network = self.network.net, self.network
        heads = []
        for stride, yolo in zip(strides(network), network.yolos, strict=True):
            keys = {key: getattr(yolo, key) for key in ("classes", "scale_x_y", "new_coords")}
            heads.append({"stride": stride, "anchors": yolo.head_anchors, **keys})
        sides = {"height": net.height, "width": net.width, "channels": net.channels}
        colours, layout = "grey" if net.channels == 1 else "RGB", "NHWC" if self.channels_last else "NCHW"
        return {
            "schema": SCHEMA,
            "names": self.names,
            "input": {**sides, "range": [0, 1], "colours": colours, "fit": self.mode, "layout": layout},
            "output": {"kind": self.output, "what": self.what},
            "heads": heads,
            "thresholds": {"conf": self.conf_thres, "iou": self.iou_thres},
            "precision": self.precision,
            "lineage": [dict(entry) for entry in self.lineage],
            "quantization": self.quantization and self.quantization.document(),
            "reference": self.reference and asdict(self.reference),
        }


def read_metadata(properties: Mapping[str, str], path: str) -> Metadata:
    """The metadata of a file.

    Raises:
        WeightsError: there are none of this suite, or they contradict themselves.
    """
    if CFG not in properties or "schema" not in properties:
        raise WeightsError(
            f"{path}: says neither its network nor its classes: another program made it; files of export.py can be "
            "used here"
        )

    with foreign_errors(path, "its metadata are damaged", WeightsError):
        stored = {key: json.loads(properties.get(key, "null")) for key in DOCUMENTS}
        if stored["schema"] != SCHEMA:
            raise WeightsError(f"{path}: its metadata are of version {stored['schema']}, and {SCHEMA} can be read")
        network = cfg_file.parse(properties[CFG], f"{path}!cfg")
        quantization, compared = stored["quantization"], stored["reference"]
        if quantization is not None:
            quantization = QuantSettings(**quantization | {"kept": tuple(quantization["kept"])})
        if compared is not None:
            values = tuple(tuple(map(float, array)) for array in compared["values"])
            compared = ReferenceOutputs(values, float(compared["gap"]))
        metadata = Metadata(
            network,
            tuple(map(str, stored["names"])),
            stored["output"]["kind"],
            stored["input"]["fit"],
            stored["precision"],
            float(stored["thresholds"]["conf"]),
            float(stored["thresholds"]["iou"]),
            tuple(map(dict, stored["lineage"])),
            quantization,
            compared,
            stored["input"].get("layout") == "NHWC",
        )
        known = metadata.output in OUTPUTS and metadata.mode in MODES and metadata.precision in TOLERANCES
    if not known or len(metadata.names) != network.classes:
        raise WeightsError(
            f"{path}: its metadata are damaged: {len(metadata.names)} names for {network.classes} classes, output "
            f"{metadata.output!r}, fit {metadata.mode!r}, precision {metadata.precision!r}"
        )
    return metadata


def reference(want: Arrays, outputs: Arrays, precision: str) -> ReferenceOutputs:
    """Values to keep of the first picture's arrays: those of the network, and those of a program that was proved."""
    kept, other = ([sample(array[:1]) for array in arrays] for arrays in (want, outputs))
    values = tuple(tuple(float(f"{value:.7g}") for value in array) for array in kept)
    return ReferenceOutputs(values, distance(kept, other, precision))


def picture(network: Network, count: int = 1) -> NDArray[np.float32]:
    """Random pictures [count, C, H, W], 0…1, the same every time and everywhere: NumPy keeps RandomState as it is."""
    net = network.net
    values = np.random.RandomState(0).random_sample((count, net.channels, net.height, net.width))
    return values.astype(np.float32)


def sample(array: NDArray[np.floating]) -> NDArray[np.float64]:
    """At most VALUES of an array, spread over all of it."""
    flat = array.ravel()
    places = np.arange(min(VALUES, flat.size)) * GOLDEN % 1 * flat.size
    return flat[places.astype(int)].astype(np.float64)


def parts(rows: NDArray[np.floating]) -> Arrays:
    """Boxes, and scores, which are much smaller numbers."""
    return rows[..., :4], rows[..., 4:]


def compare(want: Arrays, outputs: Arrays) -> tuple[float, float]:
    """max|a - b|, and the largest max|a - b| / max(1, max|a|) of one array; infinite where shapes differ."""
    if [array.shape for array in want] != [array.shape for array in outputs]:
        return float("inf"), float("inf")
    gaps = [np.abs(a - b).max(initial=0) for a, b in zip(want, outputs, strict=True)]
    errors = [gap / max(1, np.abs(a).max(initial=0)) for gap, a in zip(gaps, want, strict=True)]
    return float(np.max(gaps)), float(np.max(errors))  # NaN stays NaN


def distance(want: Arrays, outputs: Arrays, precision: str) -> float:
    """Distance of arrays from those wanted: `compare`'s error, or √(Σ(a − b)² / Σa²) of the worst array of integers.

    Single values of integers say little: a rounding that falls differently is carried on.
    """
    gap, error = compare(want, outputs)
    if precision != "int8" or not np.isfinite(gap):
        return error
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(want, outputs, strict=True)]
    least = np.finfo(np.float32).tiny
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(a), least)) for a, b in pairs)


@dataclass(frozen=True)
class ExportedFile:
    """A file that export.py made."""

    path: Path
    metadata: Metadata
    batch: int | None
    """Pictures it takes at a time; None: any number."""
    notes: tuple[str, ...] = ()
    """What is to be said of it."""


def sha256(path: Path) -> str:
    """Digest of a file.

    Raises:
        WeightsError: it is no regular file.
    """
    regular_file(path, WeightsError, files.LARGEST_MODEL)
    return files.sha256(path)


def graph_digest(model: onnx.ModelProto) -> str:
    """sha256 of the graph: nodes, weights, inputs and outputs."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


def _refuse_loops(path: Path, operators: Collection[str]) -> None:
    """Refuse operators that run a part of a file as often as the file says: 2 ** 60 times take some bytes."""
    if loops := sorted(LOOPS.intersection(operators)):
        raise WeightsError(f"{path}: has the operator {loops[0]}; files of export.py have no loops and branches")


def read_onnx(path: Path) -> ExportedFile:
    """An ONNX file; its metadata are compared with its inputs and outputs.

    Raises:
        InputError: the package onnx is missing.
        WeightsError: damaged, made by another program, or with tensors in other files.
    """
    if not regular_file(path, WeightsError, LARGEST_ONNX).st_size:
        raise WeightsError(f"{path}: is empty; take another copy")
    require(str(path), "onnx")
    import onnx

    with foreign_errors(path, "no ONNX file, or damaged; take another copy", WeightsError):
        model = onnx.load(path, load_external_data=False)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise WeightsError(f"{path}: keeps tensors in other files; files of export.py do not")
    _refuse_loops(path, {node.op_type for part in (model.graph, *model.functions) for node in part.node})
    properties = {entry.key: entry.value for entry in model.metadata_props}
    inputs = {}
    for value in model.graph.input:
        sides = value.type.tensor_type.shape.dim
        inputs[value.name] = [side.dim_value if side.HasField("dim_value") else None for side in sides]
    outputs = [value.name for value in model.graph.output]
    return _described(path, path, graph_digest(model), properties, inputs, outputs)


def read_openvino(path: Path) -> ExportedFile:
    """OpenVINO's NAME.xml, with the metadata in its rt_info, and its weights in NAME.bin.

    Raises:
        InputError: the package openvino is missing.
        WeightsError: damaged, made by another program, or without its weights.
    """
    regular_file(path, WeightsError, files.LARGEST_TEXT)
    weights = path.with_suffix(".bin")
    digest = sha256(weights)
    require(str(path), "openvino")
    import openvino

    problem = "no OpenVINO file, or damaged; take another copy"
    with foreign_errors(path, problem, WeightsError), utf8_path(path) as name:
        model = openvino.Core().read_model(name)
    _refuse_loops(path, {node.get_type_name() for node in model.get_ops()})
    section = model.get_rt_info([OPENVINO_SECTION]).value if model.has_rt_info([OPENVINO_SECTION]) else {}
    entries = section.items() if isinstance(section, dict) else ()
    properties = {key: str(getattr(value, "value", value)) for key, value in entries}
    inputs = {}
    for port in model.inputs:
        sides = port.partial_shape
        inputs[port.get_any_name()] = [side.get_length() if side.is_static else None for side in sides]
    outputs = [port.get_any_name() for port in model.outputs]
    return _described(path, weights, digest, properties, inputs, outputs)


def stamped(data: bytes) -> bytes:
    """A file with its digest in the place of UNSTAMPED, a text that nothing else in it has: no file is empty."""
    return data.replace(UNSTAMPED, hashlib.sha256(data).hexdigest().encode())


def read_tflite(path: Path) -> ExportedFile:
    """A TensorFlow Lite file, compared with its digest: LiteRT itself does not notice damage.

    Raises:
        InputError: the package ai_edge_litert is missing.
        WeightsError: damaged, changed, or made by another program.
    """
    regular_file(path, WeightsError, LARGEST_ONNX)
    require(str(path), "ai_edge_litert")
    from ai_edge_litert import schema_py_generated as schema

    data = path.read_bytes()
    with foreign_errors(path, "no TensorFlow Lite file, or damaged; take another copy", WeightsError):
        model = schema.ModelT.InitFromPackedBuf(data)
        [graph], properties = model.subgraphs, {}  # a loop is a graph of its own
        for entry in model.metadata or ():
            properties[entry.name.decode()] = bytes(model.buffers[entry.buffer].data).decode(errors="replace")
        shapes = {graph.tensors[number].name.decode(): list(graph.tensors[number].shape) for number in graph.inputs}
        inputs: dict[str, list[int | None]] = {
            name: [int(sides[axis]) for axis in (0, 3, 1, 2)] for name, sides in shapes.items()
        }
        outputs = [graph.tensors[number].name.decode() for number in graph.outputs]
    digest = properties.get(DIGEST, "").encode()
    whole = len(digest) == len(UNSTAMPED) and stamped(data.replace(digest, UNSTAMPED)) == data
    if CFG in properties and not whole:
        raise WeightsError(f"{path}: is not as export.py wrote it: changed, or damaged; export again")
    return _described(path, path, digest.decode(), properties, inputs, outputs)


def _described(
    path: Path,
    hashed: Path,
    digest: str,
    properties: Mapping[str, str],
    inputs: Mapping[str, list[int | None]],
    outputs: Collection[str],
) -> ExportedFile:
    """The file that its properties describe, compared with the sides of its inputs and the names of its outputs.

    Raises:
        WeightsError: they differ.
    """
    metadata = read_metadata(properties, str(path))
    batch, *sides = inputs.get(IMAGE) or [0]
    image = [metadata.network.net.channels, *metadata.size]
    fits = len(inputs) == 1 and sides == image and sorted(outputs) == sorted(metadata.tensors)
    if not fits or batch not in (None, 1):
        raise WeightsError(f"{path}: its inputs and outputs are not those its metadata describe; damaged or changed")
    note = f"{hashed}: is not as export.py wrote it: changed by another program, or damaged"
    return ExportedFile(path, metadata, batch, () if properties.get(DIGEST) == digest else (note,))


def ncnn_description(metadata: Metadata, param: Path) -> str:
    """Text of NAME.json: the metadata as one document, with the digests of NAME.param and NAME.bin."""
    cfg = cfg_file.format_network(metadata.network)
    digests = {suffix: sha256(param.with_suffix(suffix)) for suffix in HASHED}
    return utf8(json.dumps({CFG: cfg, **metadata.documents(), DIGEST: digests}, ensure_ascii=False, indent=1)) + "\n"


def read_ncnn(path: Path) -> ExportedFile:
    """Ncnn's NAME.param and NAME.bin, compared with NAME.json: ncnn itself does not notice damage.

    Raises:
        WeightsError: a file is missing, damaged, or another than was written.
    """
    regular_file(path, WeightsError)
    beside = path.with_suffix(".json")
    if not beside.exists():
        raise WeightsError(
            f"{beside}: no such file, and it says what {path.name} is: export.py --format ncnn writes three files "
            "that belong together"
        )
    with foreign_errors(beside, "damaged; export again", WeightsError):
        document = read_json(beside, WeightsError)
        digests = {suffix: document[DIGEST][suffix] for suffix in HASHED}
        properties = {key: value if key == CFG else json.dumps(value) for key, value in document.items()}
    for suffix, digest in digests.items():
        if sha256(file := path.with_suffix(suffix)) != digest:
            raise WeightsError(f"{file}: is not as export.py wrote it: changed, or damaged; export again")
    metadata = read_metadata(properties, str(beside))
    if metadata.output != "heads":
        raise WeightsError(f"{beside}: its metadata are damaged: ncnn files put out raw heads")
    return ExportedFile(path, metadata, 1)
