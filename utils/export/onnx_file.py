"""export.py --format onnx and tensorrt: a network as an ONNX file, with decoding and suppression if asked for.

What follows the raw heads is always in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from models import Darknet, fuse, oversized
from utils.darknet.blocks import Shape, Yolo
from utils.darknet.network import trace
from utils.detection.decode import LARGEST_EXPONENT, MAX_DETECTIONS, non_max_suppression
from utils.errors import InfeasibleError
from utils.export.integers import Codes, Gap, codes_of, layer_gaps, stages
from utils.export.onnx_graph import Graph, emit
from utils.export.settings import ExportSettings
from utils.export.verify import Agreement, Subject, agreement, decoded, picture, raw_heads
from utils.runtime.engines import onnxruntime_engine
from utils.runtime.exported import DIGEST, IMAGE, TOLERANCES, Metadata, compare, graph_digest, parts, reference

BATCH = "batch"
"""Name of the batch side where it may vary."""
MOST_OTHER = 0.01
"""Share of detections that may differ: two programs round an overlap at the threshold each in its way."""
EVERYTHING = 10**9


def make_onnx(subject: Subject, settings: ExportSettings, folder: Path) -> tuple[Agreement, dict[str, Any]]:
    """NAME.onnx, for onnxruntime and its like, or with explicit integers for TensorRT."""
    data, proof, facts = emit_onnx(subject, settings)
    (folder / "model.onnx").write_bytes(data)
    return proof, facts


def emit_whole(subject: Subject, settings: ExportSettings) -> tuple[bytes, Agreement, dict[str, Any]]:
    """An ONNX file for a converter: weights in float16 are rounded last."""
    metadata = subject.metadata
    plain = replace(metadata, precision="float32") if settings.half else metadata
    return emit_onnx(subject._replace(metadata=plain), settings)


def emit_onnx(subject: Subject, settings: ExportSettings) -> tuple[bytes, Agreement, dict[str, Any]]:
    """An ONNX file, its distance from PyTorch in onnxruntime, and facts for --json.

    Raises:
        InfeasibleError: it differs, the checker of ONNX refuses it, or a weight is too large for float16.
    """
    model, metadata = subject.model, subject.metadata
    codes = codes_of(model, explicit=settings.format == "tensorrt") if settings.integers else None
    made = onnx_model(model, metadata, settings, codes)
    proof, gap = prove_onnx(made, model, metadata, settings, codes)
    metadata = replace(metadata, reference=proof.reference)
    onnx.helper.set_model_props(made, {**metadata.properties(), DIGEST: graph_digest(made)})
    facts = {"opset": settings.opset, "batch": settings.batch, "mish": settings.mish}
    return made.SerializeToString(), proof, facts | (gap._asdict() if gap else {})


def onnx_model(
    model: Darknet, metadata: Metadata, settings: ExportSettings, codes: Codes | None = None
) -> onnx.ModelProto:
    """The file, with its metadata.

    Args:
        model: in evaluation mode; its batch normalisations are folded in.
        metadata: of the file; `output` and `precision` decide what it is.
        settings: the rest.
        codes: the integers of a quantized network; None: it is float.

    Raises:
        InfeasibleError: a weight is too large for float16.
    """
    fused, half = fuse(model), metadata.precision == "float16"
    if half and (fault := oversized(fused, torch.float16)):
        raise InfeasibleError(f"--half: {fault}; leave --half out")
    network = fused.network
    arrays = {key: value.numpy() for key, value in fused.state_dict().items()}
    graph = Graph(settings.opset, np.float16 if half else np.float32, settings.mish)
    pictures = graph.cast(IMAGE, "images/half", np.float16) if half else IMAGE
    heads = []
    for number, head in enumerate(emit(graph, network, arrays, pictures, codes)):
        name = f"head{number}"
        heads.append(graph.cast(head, name, np.float32) if half else graph.add("Identity", [head], name))
    batch = BATCH if settings.dynamic_batch else 1
    image = Shape(network.net.channels, *metadata.size)
    shapes = trace(network)
    if metadata.output == "heads":
        for head, block in zip(heads, network.heads, strict=True):
            graph.give(head, (batch, *shapes[block]))
    else:
        rows = add_rows(graph, heads, network.yolos, [shapes[head] for head in network.heads], image)
        if metadata.output == "rows":
            cells = [shapes[head].height * shapes[head].width for head in network.heads]
            count = sum(len(yolo.mask) * number for yolo, number in zip(network.yolos, cells, strict=True))
            graph.give(rows, (batch, count, 5 + network.classes))
        else:
            graph.give(add_detections(graph, rows, network.classes, metadata, settings), ("detections", 7))
    return graph.model(IMAGE, (batch, *image), metadata.properties())


def add_rows(graph: Graph, heads: Sequence[str], yolos: Sequence[Yolo], shapes: Sequence[Shape], image: Shape) -> str:
    """Add the decoding of all heads: the tensor `rows` [B, N, 5 + C], as `utils.detection.decode.decode` returns it.

    Args:
        graph: what the nodes are added to.
        heads: float32 tensors [B, A · (5 + C), H, W].
        yolos: the head blocks, in the same order.
        shapes: of the heads.
        image: of the network input.
    """
    parts = [
        _add_head(graph, head, yolo, shape, image, f"rows{number}")
        for number, (head, yolo, shape) in enumerate(zip(heads, yolos, shapes, strict=True))
    ]
    return graph.add("Concat", parts, "rows", axis=1)


def _add_head(graph: Graph, head: str, yolo: Yolo, shape: Shape, image: Shape, name: str) -> str:
    """Rows [B, A · H · W, 5 + C] of one head."""
    anchors, columns, cells = len(yolo.mask), 5 + yolo.classes, shape.height * shape.width
    split = graph.integers(f"{name}/split", [0, anchors, columns, cells])
    flat = graph.integers(f"{name}/flat", [0, anchors * cells, columns])
    x = graph.add("Reshape", [head, split], f"{name}/planes")
    x = graph.add("Transpose", [x], f"{name}/cells", perm=[0, 1, 3, 2])
    x = graph.add("Reshape", [x, flat], f"{name}/values")
    place, size, scores = (
        graph.slice(x, first, last, 2, f"{name}/{what}")
        for what, first, last in (("place", 0, 2), ("size", 2, 4), ("scores", 4, columns))
    )
    if not yolo.new_coords:
        place = graph.add("Sigmoid", [place], f"{name}/position")
        scores = graph.add("Sigmoid", [scores], f"{name}/probabilities")
    parts = [_centres(graph, place, yolo, shape, image, name), _sizes(graph, size, yolo, cells, name), scores]
    return graph.add("Concat", parts, name, axis=2)


def _centres(graph: Graph, position: str, yolo: Yolo, shape: Shape, image: Shape, name: str) -> str:
    """(s · position - (s - 1) / 2 + cell) · stride, as position · factor + offset."""
    stride = np.array((image.width / shape.width, image.height / shape.height))
    rows, columns = np.divmod(np.arange(shape.height * shape.width), shape.width)
    offsets = (np.stack((columns, rows), axis=1) - (yolo.scale_x_y - 1) / 2) * stride
    factor = graph.constant(f"{name}/factor", yolo.scale_x_y * stride, np.float32)
    offset = graph.constant(f"{name}/offset", np.tile(offsets, (len(yolo.mask), 1))[None], np.float32)
    return graph.add("Add", [graph.add("Mul", [position, factor], f"{name}/scaled"), offset], f"{name}/centres")


def _sizes(graph: Graph, size: str, yolo: Yolo, cells: int, name: str) -> str:
    """Anchor · exp(size), or with new_coords anchor · (2 size)²."""
    anchors = np.repeat(np.array(yolo.head_anchors), cells, axis=0)[None]
    if yolo.new_coords:
        factor = graph.add("Mul", [size, size], f"{name}/square")
        anchors = 4 * anchors
    else:
        most = graph.constant(f"{name}/most", LARGEST_EXPONENT, np.float32)
        factor = graph.add("Exp", [graph.add("Min", [size, most], f"{name}/exponent")], f"{name}/power")
    return graph.add("Mul", [factor, graph.constant(f"{name}/anchors", anchors, np.float32)], f"{name}/sizes")


def add_detections(graph: Graph, rows: str, classes: int, metadata: Metadata, settings: ExportSettings) -> str:
    """Add non-maximum suppression: `detections` [K, 7], best first.

    The columns are picture, x1, y1, x2, y2 in pixels of the network input, confidence, class. Detections are those of
    `utils.detection.decode.non_max_suppression` with the same thresholds, with two differences: all candidates enter
    suppression, not the best 3000 of a picture; and where the batch may vary the best 300 of every class of a picture
    stay, not the best 300 of a picture.

    Args:
        graph: what the nodes are added to.
        rows: of `add_rows`.
        classes: their number.
        metadata: its thresholds.
        settings: its `multi_label` and batch.
    """
    corners = _corners(graph, rows)
    scores = _scores(graph, rows, classes, settings.multi_label)
    limits = [
        graph.integers("most", [MAX_DETECTIONS]),
        graph.constant("iou_thres", [metadata.iou_thres], np.float32),
        graph.constant("conf_thres", [metadata.conf_thres], np.float32),
    ]
    selected = graph.add("NonMaxSuppression", [corners, scores, *limits], "found")
    picture, label, row = (_index(graph, selected, axis, name) for axis, name in enumerate(("picture", "label", "row")))
    confidence = graph.add("GatherND", [scores, selected], "confidence")
    box = graph.add("GatherND", [corners, graph.add("Concat", [picture, row], "place", axis=1)], "box")
    axis = graph.integers("column", [1])
    columns = [
        graph.cast(picture, "picture_column", np.float32),
        box,
        graph.add("Unsqueeze", [confidence, axis], "confidence_column"),
        graph.cast(label, "label_column", np.float32),
    ]
    unsorted = graph.add("Concat", columns, "unsorted", axis=1)
    return graph.add("Gather", [unsorted, _best_first(graph, confidence, settings.batch)], "detections", axis=0)


def _corners(graph: Graph, rows: str) -> str:
    """x1, y1, x2, y2 [B, N, 4] of centres and sizes."""
    centre = graph.slice(rows, 0, 2, 2, "centre")
    half = graph.add("Mul", [graph.slice(rows, 2, 4, 2, "extent"), graph.constant("half", 0.5, np.float32)], "reach")
    low, high = graph.add("Sub", [centre, half], "low"), graph.add("Add", [centre, half], "high")
    return graph.add("Concat", [low, high], "corners", axis=2)


def _scores(graph: Graph, rows: str, classes: int, multi_label: bool) -> str:
    """Confidences [B, C, N]; 0 but for the best class of a row unless several may count."""
    probabilities = graph.slice(rows, 5, 5 + classes, 2, "probabilities")
    scores = graph.add("Mul", [probabilities, graph.slice(rows, 4, 5, 2, "objectness")], "products")
    if not multi_label and classes > 1:
        best = graph.add("ArgMax", [scores], "best", axis=2, keepdims=1)
        is_best = graph.add("Equal", [best, graph.integers("numbers", np.arange(classes)[None, None])], "own")
        scores = graph.add("Where", [is_best, scores, graph.constant("none", 0.0, np.float32)], "best_only")
    return graph.add("Transpose", [scores], "scores", perm=[0, 2, 1])


def _index(graph: Graph, selected: str, axis: int, name: str) -> str:
    """One column [K, 1] of what NonMaxSuppression selected."""
    return graph.add("Gather", [selected, graph.integers(f"{name}_axis", [axis])], name, axis=1)


def _best_first(graph: Graph, confidence: str, batch: int | None) -> str:
    """Places of the detections in falling confidence; of one picture, the best MAX_DETECTIONS."""
    count = graph.add("Shape", [confidence], "count")
    if batch == 1:
        count = graph.add("Min", [count, graph.integers("limit", [MAX_DETECTIONS])], "kept")
    graph.add("TopK", [confidence, count], "sorted", "order", axis=0, largest=1, sorted=1)
    return "order"


def prove_onnx(
    made: onnx.ModelProto,
    model: Darknet,
    metadata: Metadata,
    settings: ExportSettings,
    codes: Codes | None = None,
) -> tuple[Agreement, Gap | None]:
    """Run a file in onnxruntime and compare it with PyTorch stage by stage: layers, heads, rows, detections.

    A stage after the heads is compared with what PyTorch makes of the stage before it in the file.

    Args:
        made: the file.
        model: what it was made of, not folded.
        metadata: of the file.
        settings: of the file.
        codes: the integers of the model; None: it is float.

    Raises:
        InfeasibleError: it differs, or the checker of ONNX refuses it.
    """
    try:
        onnx.checker.check_model(made, full_check=True)
    except Exception as failure:  # of the checker or of shape inference
        raise InfeasibleError(f"--format onnx: the checker refuses the file: {str(failure).splitlines()[0]}") from None
    images = picture(metadata, settings.batch or 2)
    heads = [f"head{number}" for number in range(len(metadata.network.heads))]
    inner = [] if codes is None else stages(model, codes, {node.output[0] for node in made.graph.node})
    names = list(dict.fromkeys((*heads, *inner, *(() if metadata.output == "heads" else ("rows", metadata.output)))))
    engine = onnxruntime_engine(
        with_outputs(made, names), names, settings.batch, torch.get_num_threads(), wide=metadata.wide
    )
    tensors = dict(zip(names, engine.run(images.numpy()), strict=True))
    gap = None if codes is None else layer_gaps(model, codes, tensors)
    want, outputs = raw_heads(model, images), [tensors[head] for head in heads]
    proof = agreement(want, outputs, metadata, engine.name)
    proof.check("--format onnx")
    if metadata.output == "heads":
        return proof, gap
    rows = parts(tensors["rows"])
    kept = reference(decoded(want, metadata), rows, metadata.precision)
    gaps = compare(decoded(outputs, metadata), rows)
    Agreement(*gaps, TOLERANCES["float32"], engine.name).check("--decode")
    if metadata.output == "detections":
        _check_detections(torch.from_numpy(tensors["rows"]), tensors["detections"], metadata, settings)
    return replace(proof, reference=kept), gap


def with_outputs(model: onnx.ModelProto, names: Collection[str]) -> bytes:
    """A file that puts out these tensors, too."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return probe.SerializeToString()


def _check_detections(
    rows: torch.Tensor, detections: NDArray[np.floating], metadata: Metadata, settings: ExportSettings
) -> None:
    """Refuse a file whose detections are not those of `non_max_suppression` on its own rows."""
    most = EVERYTHING if settings.dynamic_batch else MAX_DETECTIONS
    suppressed = non_max_suppression(
        rows,
        metadata.conf_thres,
        metadata.iou_thres,
        multi_label=settings.multi_label,
        max_nms=EVERYTHING,
        max_det=most,
    )
    want = set()
    for number, boxes in enumerate(suppressed):
        for label in boxes[:, 5].unique():
            want |= {_key(number, box) for box in boxes[boxes[:, 5] == label][:MAX_DETECTIONS].tolist()}
    have = {_key(int(row[0]), row[1:]) for row in detections.tolist()}
    if len(want ^ have) > max(2, MOST_OTHER * len(want)):
        raise InfeasibleError(
            f"--nms: {len(want - have)} of {len(want)} detections are missing in the file, {len(have - want)} are "
            "surplus; nothing is written"
        )


def _key(picture: int, row: Sequence[float]) -> tuple[int, ...]:
    """A detection in whole pixels and thousandths."""
    return (picture, int(row[5]), round(1000 * row[4]), *(round(side) for side in row[:4]))
