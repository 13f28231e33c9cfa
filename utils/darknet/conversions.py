"""Between the keys of a section and the fields of its block, where they are not the same thing.

Each pair of functions is the inverse of each other: `*_fields` makes the fields of a block from the values of all its
keys (defaults filled in, None for a key that has none), `*_values` makes the values to write; None is not written.
Neither changes its arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from utils.darknet.blocks import Block, Convolutional, Maxpool, Route, Sam, ScaleChannels, Se, Shortcut, Yolo
from utils.darknet.values import SectionError

Values = dict[str, Any]
NEAR = 16
"""A route to one of the last 16 blocks is written relative (`-4`), one further back absolute (`61`)."""


class Place(NamedTuple):
    """Where a block stands."""

    index: int
    """Its number; -1 for `[net]`."""
    channels: int
    """What the block before it puts out."""


def same_fields(values: Values, place: Place) -> Values:
    """Keys named as the fields."""
    return values


def same_values(block: Block, place: Place) -> Values:
    """Fields named as the keys."""
    return vars(block)


def conv_fields(values: Values, place: Place) -> Values:
    """`pad=1` means size // 2; a 1 × 1 kernel has no dilation."""
    size = values["size"]
    return _without(values, "pad", "stride") | {
        "padding": size // 2 if values["pad"] else values["padding"],
        "dilation": values["dilation"] if size > 1 else 1,
        "stride_x": values["stride_x"] or values["stride"],
        "stride_y": values["stride_y"] or values["stride"],
    }


def conv_values(block: Convolutional, place: Place) -> Values:
    """`pad=1` where it says the same as `padding`."""
    return vars(block) | _strides(block) | _pad(block.padding, block.size // 2)


def depthwise_fields(values: Values, place: Place) -> Values:
    """`[depthwise]` is a convolution with one filter a channel; `pad=1` means (size - 1) // 2 in that suite."""
    channels = place.channels
    for key in ("filters", "groups"):
        if values[key] not in (None, channels):
            raise SectionError(f"one filter a channel is allowed, and the block before has {channels}", key)
    padding = (values["size"] - 1) // 2 if values["pad"] else values["padding"]
    return conv_fields(values | {"filters": channels, "groups": channels, "pad": False, "padding": padding}, place)


def se_fields(values: Values, place: Place) -> Values:
    """`filters` names the channels, `reduction` divides them; `squeeze`, a key of our own, gives any width."""
    if values["filters"] not in (None, place.channels):
        raise SectionError(f"{place.channels} is allowed, the channels of the block before", "filters")
    width = values["squeeze"] or place.channels // values["reduction"]
    if not width:
        raise SectionError(f"at most {place.channels} is allowed, the channels of the block before", "reduction")
    return {"filters": width}


def se_values(block: Se, place: Place) -> Values:
    """`reduction` where one gives the width, `squeeze` otherwise."""
    reduction = max(1, place.channels // block.filters)
    if place.channels // reduction == block.filters:
        return {"filters": place.channels, "reduction": reduction}
    return {"filters": place.channels, "squeeze": block.filters}


def maxpool_fields(values: Values, place: Place) -> Values:
    """The size is the stride by default, the padding size - 1."""
    size = values["size"] or values["stride"]
    return {
        "size": size,
        "stride_x": values["stride_x"] or values["stride"],
        "stride_y": values["stride_y"] or values["stride"],
        "padding": size - 1 if values["padding"] is None else values["padding"],
    }


def maxpool_values(block: Maxpool, place: Place) -> Values:
    """`padding` only where it is not the default."""
    padding = None if block.padding == block.size - 1 else block.padding
    return vars(block) | _strides(block) | {"padding": padding}


def route_fields(values: Values, place: Place) -> Values:
    """References become absolute."""
    return values | {"layers": tuple(_absolute(layer, place) for layer in values["layers"])}


def route_values(block: Route, place: Place) -> Values:
    """References to near blocks become relative."""
    near = [layer - place.index if layer >= place.index - NEAR else layer for layer in block.layers]
    return vars(block) | {"layers": tuple(near)}


def shortcut_fields(values: Values, place: Place) -> Values:
    """References become absolute."""
    sources = tuple(_absolute(source, place) for source in values["from"])
    return _without(values, "from") | {"sources": sources}


def shortcut_values(block: Shortcut, place: Place) -> Values:
    """References become relative."""
    return vars(block) | {"from": tuple(source - place.index for source in block.sources)}


def source_fields(values: Values, place: Place) -> Values:
    """Like `shortcut_fields`, for one reference."""
    return _without(values, "from") | {"source": _absolute(values["from"], place)}


def source_values(block: ScaleChannels | Sam, place: Place) -> Values:
    """Like `shortcut_values`, for one reference."""
    return vars(block) | {"from": block.source - place.index}


def yolo_fields(values: Values, place: Place) -> Values:
    """`num` counts the anchors; without `mask` a head predicts with all of them."""
    count = values["num"]
    if len(values["anchors"]) != count:
        raise SectionError(f"{len(values['anchors'])} pairs, but num is {count}; they must agree", "anchors")
    mask = values["mask"] or tuple(range(count))
    for position, anchor in enumerate(mask):
        if anchor >= count:
            raise SectionError(f"there is no anchor {anchor}; 0..{count - 1} is allowed", "mask")
        if anchor in mask[:position]:
            raise SectionError(f"anchor {anchor} is named twice; once is allowed", "mask")
    return _without(values, "num") | {"mask": mask}


def yolo_values(block: Yolo, place: Place) -> Values:
    """`num` counts the anchors."""
    return vars(block) | {"num": len(block.anchors)}


def _without(values: Values, *names: str) -> Values:
    return {name: value for name, value in values.items() if name not in names}


def _strides(block: Convolutional | Maxpool) -> Values:
    if block.stride_x == block.stride_y:
        return {"stride": block.stride_x, "stride_x": None, "stride_y": None}
    return {}


def _pad(padding: int, same: int) -> Values:
    return {"pad": True, "padding": None} if padding == same else {"pad": False}


def _absolute(reference: int, place: Place) -> int:
    return place.index + reference if reference < 0 else reference
