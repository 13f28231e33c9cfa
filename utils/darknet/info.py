"""What a Darknet cfg describes: a table of its layers, then parameters, bytes, multiply-adds and BFLOPs.

Shapes are channels x height x width. BFLOPs are Darknet's count for one image (see utils/report/tables.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.cli import Parser, image_side, input_size, print_json, run
from utils.darknet.blocks import Block, Convolutional, Maxpool, Network, Reorg, Route, Shape, Upsample
from utils.darknet.cfg import load
from utils.darknet.network import file_bytes, grouped, max_stride, strides, trace
from utils.darknet.targets import HARDWARE, rewrite_command, support_of
from utils.report.tables import block_costs, network_cost, text_table

EXAMPLE = "python -m utils.darknet.info cfg/yolov4-tiny.cfg --img_size 416"
_COLUMNS = ("layer", "type", "filters", "size/stride", "input", "output", "parameters", "BFLOPs", "reads")
_RIGHT = ("layer", "filters", "parameters", "BFLOPs")
"""Columns of numbers, aligned to the right."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, EXAMPLE, "python -m utils.darknet.info")
    parser.add_argument("cfg", metavar="CFG", help="Darknet network description")
    parser.add_argument(
        "--img_size",
        type=image_side,
        nargs="+",
        metavar="N",
        help="input of N x N pixels, or of H x W when two numbers are given (default: the size in the cfg)",
    )
    parser.add_argument("--target", choices=tuple(HARDWARE), help="print which blocks this hardware computes, instead")
    parser.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what the cfg describes."""
    args = parse_args(argv)
    network = load(args.cfg)
    height, width = input_size(args.img_size, max_stride(network), (network.net.height, network.net.width))
    target = {"target": target_document(network, args.target)} if args.target else {}
    if args.json:
        print_json(summary(network, height, width) | target)
    elif target:
        print("\n".join(target_lines(target["target"])))
    else:
        print("\n".join([*table(network, height, width), "", *totals(network, height, width)]))


def summary(network: Network, height: int, width: int) -> dict[str, Any]:
    """What `--json` prints about a network with an input of height × width pixels."""
    cost = network_cost(network, height, width)
    return {
        "layers": len(network.blocks),
        "parameters": cost.parameters,
        "weights_bytes": file_bytes(network),
        "macs": cost.macs,
        "bflops": cost.bflops,
        "heads": [
            {"stride": stride, "anchors": yolo.head_anchors, "classes": yolo.classes}
            for stride, yolo in zip(strides(network), network.yolos, strict=True)
        ],
    }


def table(network: Network, height: int, width: int) -> list[str]:
    """Lines of the layer table: a heading, then a line a block."""
    shapes = (Shape(network.net.channels, height, width), *trace(network, height, width))  # [0] is the image
    costs = block_costs(network, height, width)
    lines = [_COLUMNS]
    for index, (block, cost) in enumerate(zip(network.blocks, costs, strict=True)):
        reads = [_shape(shapes[source + 1]) for source in block.reads(index)]
        read = " + ".join(reads) if len(reads) < 3 else f"{len(reads)} blocks"
        parameters = grouped(cost.parameters) if cost.parameters else ""
        bflops = f"{cost.bflops:.3f}" if cost.flops else ""
        made = (str(getattr(block, "filters", "")), _kernel(block), read, _shape(shapes[index + 1]))
        lines.append((str(index), block.SECTION, *made, parameters, bflops, _references(block, index)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(_aligned, row, _COLUMNS, widths)).rstrip() for row in lines]


def target_document(network: Network, target: str) -> dict[str, Any]:
    """What `--json` prints about a piece of hardware: what it does not compute first, equal operations together."""
    row, groups = HARDWARE[target], support_of(network, target)
    operations = [group._asdict() | {"operation": str(group.operation)} for group in groups]
    document = {"name": target, "hardware": row.what, "source": row.source, "note": row.note}
    return document | {"operations": operations, "next": rewrite_command(network, groups)}


def target_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"{document['name']}: {document['hardware']}\nsource: {document['source']}"
    if document["note"]:
        yield f"note: {document['note']}"
    lines = [
        (verdict, operation, len(blocks), " … ".join(map(str, dict.fromkeys((blocks[0], blocks[-1])))), why, flag)
        for operation, verdict, why, blocks, flag in map(dict.values, document["operations"])
    ]
    yield "\n" + text_table((document["name"], "operation", "blocks", "which", "why", "rewrite"), lines)
    if document["next"]:
        yield f"\nnext: {document['next']}"


def totals(network: Network, height: int, width: int) -> list[str]:
    """Lines below the table: what the network costs, and its heads."""
    cost = network_cost(network, height, width)
    lines = [
        f"{len(network.blocks)} layers, {grouped(cost.parameters)} parameters, "
        f"{grouped(file_bytes(network))} bytes of weights",
        f"{grouped(cost.macs)} multiply-adds, {cost.bflops:.3f} BFLOPs "
        f"({2 * cost.macs / 1e9:.3f} without max pooling and shortcuts) at {height} x {width}",
    ]
    for index, yolo, stride in zip(network.heads, network.yolos, strides(network), strict=True):
        anchors = " ".join(f"{width:g},{height:g}" for width, height in yolo.head_anchors)
        lines.append(f"head {index}: stride {stride}, {yolo.classes} classes, anchors {anchors}")
    return lines


def _kernel(block: Block) -> str:
    """Size and stride of a block that has them: 3/1, or 3/2x1 for strides over width and height that differ."""
    match block:
        case Convolutional() | Maxpool():
            stride = f"{block.stride_x}" + (f"x{block.stride_y}" if block.stride_y != block.stride_x else "")
            groups = getattr(block, "groups", 1)
            return f"{block.size}/{stride}" + (f" groups {groups}" if groups > 1 else "")
        case Upsample() | Reorg():
            return f"/{block.stride}"
    return ""


def _references(block: Block, index: int) -> str:
    """Blocks that a block names, and the slice of their channels that it takes."""
    named = [str(source) for source in block.reads(index) if isinstance(block, Route) or source != index - 1]
    part = f" ({block.group_id + 1} of {block.groups})" if isinstance(block, Route) and block.groups > 1 else ""
    return ", ".join(named) + part


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _aligned(cell: str, column: str, width: int) -> str:
    return cell.rjust(width) if column in _RIGHT else cell.ljust(width)


if __name__ == "__main__":
    run(main)
