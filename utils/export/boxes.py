"""What follows the raw heads in a file of `--decode` or `--nms`, as ONNX nodes; always in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.darknet.blocks import Shape, Yolo
from utils.detection.decode import LARGEST_EXPONENT, MAX_DETECTIONS
from utils.export.graph import Graph


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
        _columns(graph, x, first, last, f"{name}/{what}")
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


def _columns(graph: Graph, rows: str, first: int, last: int, output: str) -> str:
    """Columns first, …, last - 1 of the last axis of [B, N, columns]."""
    bounds = [
        graph.integers(f"{output}/{key}", [value]) for key, value in (("first", first), ("last", last), ("axis", 2))
    ]
    return graph.add("Slice", [rows, *bounds], output)


def add_detections(
    graph: Graph,
    rows: str,
    classes: int,
    *,
    conf_thres: float,
    iou_thres: float,
    multi_label: bool,
    batch: int | None,
) -> str:
    """Add non-maximum suppression: `detections` [K, 7], best first.

    The columns are picture, x1, y1, x2, y2 in pixels of the network input, confidence, class. Detections are those of
    `utils.detection.decode.non_max_suppression` with the same thresholds, with two differences: all candidates enter
    suppression, not the best 3000 of a picture; and where the batch may vary the best 300 of every class of a picture
    stay, not the best 300 of a picture.

    Args:
        graph: what the nodes are added to.
        rows: of `add_rows`.
        classes: their number.
        conf_thres: least confidence, objectness · class probability.
        iou_thres: a box that overlaps a better one of its class by more is dropped.
        multi_label: a row may give a detection of every class, not only of its best.
        batch: pictures at a time; None if that may vary.
    """
    corners = _corners(graph, rows)
    scores = _scores(graph, rows, classes, multi_label)
    limits = [
        graph.integers("most", [MAX_DETECTIONS]),
        graph.constant("iou_thres", [iou_thres], np.float32),
        graph.constant("conf_thres", [conf_thres], np.float32),
    ]
    found = graph.add("NonMaxSuppression", [corners, scores, *limits], "found")
    picture, label, row = (_index(graph, found, axis, name) for axis, name in enumerate(("picture", "label", "row")))
    confidence = graph.add("GatherND", [scores, found], "confidence")
    box = graph.add("GatherND", [corners, graph.add("Concat", [picture, row], "place", axis=1)], "box")
    axis = graph.integers("column", [1])
    columns = [
        graph.cast(picture, "picture_column", np.float32),
        box,
        graph.add("Unsqueeze", [confidence, axis], "confidence_column"),
        graph.cast(label, "label_column", np.float32),
    ]
    unsorted = graph.add("Concat", columns, "unsorted", axis=1)
    return graph.add("Gather", [unsorted, _best_first(graph, confidence, batch)], "detections", axis=0)


def _corners(graph: Graph, rows: str) -> str:
    """x1, y1, x2, y2 [B, N, 4] of centres and sizes."""
    centre = _columns(graph, rows, 0, 2, "centre")
    half = graph.add("Mul", [_columns(graph, rows, 2, 4, "extent"), graph.constant("half", 0.5, np.float32)], "reach")
    low, high = graph.add("Sub", [centre, half], "low"), graph.add("Add", [centre, half], "high")
    return graph.add("Concat", [low, high], "corners", axis=2)


def _scores(graph: Graph, rows: str, classes: int, multi_label: bool) -> str:
    """Confidences [B, C, N]; 0 but for the best class of a row unless several may count."""
    probabilities = _columns(graph, rows, 5, 5 + classes, "probabilities")
    scores = graph.add("Mul", [probabilities, _columns(graph, rows, 4, 5, "objectness")], "products")
    if not multi_label and classes > 1:
        best = graph.add("ArgMax", [scores], "best", axis=2, keepdims=1)
        own = graph.add("Equal", [best, graph.integers("numbers", np.arange(classes)[None, None])], "own")
        scores = graph.add("Where", [own, scores, graph.constant("none", 0.0, np.float32)], "best_only")
    return graph.add("Transpose", [scores], "scores", perm=[0, 2, 1])


def _index(graph: Graph, found: str, axis: int, name: str) -> str:
    """One column [K, 1] of what NonMaxSuppression selected."""
    return graph.add("Gather", [found, graph.integers(f"{name}_axis", [axis])], name, axis=1)


def _best_first(graph: Graph, confidence: str, batch: int | None) -> str:
    """Places of the detections in falling confidence; of one picture, the best MAX_DETECTIONS."""
    count = graph.add("Shape", [confidence], "count")
    if batch == 1:
        count = graph.add("Min", [count, graph.integers("limit", [MAX_DETECTIONS])], "kept")
    graph.add_many("TopK", [confidence, count], ["sorted", "order"], axis=0, largest=1, sorted=1)
    return "order"
