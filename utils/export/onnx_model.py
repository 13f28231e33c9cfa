"""A network as an ONNX file: its blocks, and perhaps decoding and non-maximum suppression."""

from __future__ import annotations

import numpy as np
import onnx

from utils.darknet.blocks import Network, Shape
from utils.darknet.network import trace
from utils.errors import InfeasibleError
from utils.export.activations import activations
from utils.export.blocks import Arrays, emit
from utils.export.boxes import add_detections, add_rows
from utils.export.codes import Codes
from utils.export.graph import Graph
from utils.export.request import OnnxOptions
from utils.runtime.metadata import IMAGE, Metadata

BATCH = "batch"
"""Name of the batch side where it may vary."""


def onnx_model(
    fused: Network, arrays: Arrays, metadata: Metadata, options: OnnxOptions, codes: Codes | None = None
) -> onnx.ModelProto:
    """The file, with its metadata.

    Args:
        fused: the network without batch normalisation (`models.fuse`), with the size of the input.
        arrays: its state dict, float32.
        metadata: what the file says of itself; `output` and `precision` decide what it is.
        options: the rest.
        codes: the integers of a quantized network; None: it is float.

    Raises:
        InfeasibleError: a weight is too large for float16.
    """
    graph = Graph(options.opset, np.float16 if metadata.precision == "float16" else np.float32)
    half = graph.dtype == np.float16
    if half:
        check_half(fused, arrays)
    image = Shape(fused.net.channels, *metadata.size)
    heads = emit(graph, fused, arrays, graph.cast(IMAGE, "images/half", np.float16) if half else IMAGE,
                 activations(options.mish), codes)  # fmt: skip
    heads = [
        graph.cast(head, f"head{number}", np.float32) if half else graph.add("Identity", [head], f"head{number}")
        for number, head in enumerate(heads)
    ]
    batch = BATCH if options.dynamic_batch else 1
    shapes = trace(fused)
    if metadata.output == "heads":
        for head, block in zip(heads, fused.heads, strict=True):
            graph.give(head, (batch, *shapes[block]))
    else:
        _add_boxes(graph, fused, heads, metadata, options)
    return graph.model(IMAGE, (batch, *image), metadata.properties())


def _add_boxes(graph: Graph, network: Network, heads: list[str], metadata: Metadata, options: OnnxOptions) -> None:
    """Decoding, and suppression if the file puts out detections."""
    shapes = [trace(network)[head] for head in network.heads]
    image = Shape(network.net.channels, *metadata.size)
    rows = add_rows(graph, heads, network.yolos, shapes, image)
    count = sum(len(yolo.mask) * s.height * s.width for yolo, s in zip(network.yolos, shapes, strict=True))
    if metadata.output == "rows":
        graph.give(rows, (BATCH if options.dynamic_batch else 1, count, 5 + network.classes))
        return
    found = add_detections(
        graph,
        rows,
        network.classes,
        conf_thres=metadata.conf_thres,
        iou_thres=metadata.iou_thres,
        multi_label=options.multi_label,
        batch=None if options.dynamic_batch else 1,
    )
    graph.give(found, ("detections", 7))


def check_half(network: Network, arrays: Arrays) -> None:
    """Refuse weights that float16 cannot hold.

    Raises:
        InfeasibleError: names the block.
    """
    largest = float(np.finfo(np.float16).max)
    for key, array in arrays.items():
        if np.abs(array).max(initial=0) > largest:
            block = int(key.split(".")[1])
            raise InfeasibleError(
                f"--half: {network.where(block)} has the weight {np.abs(array).max():.4g} after its batch "
                f"normalisation was folded in, and float16 ends at {largest:g}; leave --half out"
            )
