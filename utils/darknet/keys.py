"""The sections a cfg may have and the keys of each: kind, default, order of writing.

One table says how blocks are read and written. Defaults and meanings are those of AlexeyAB/darknet, `src/parser.c`,
except for `[depthwise]` and `[se]`, which only the SpursLipu suite has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from utils.darknet import blocks
from utils.darknet.blocks import ACTIVATIONS, Block, Shape
from utils.darknet.values import Choice, Fault, Flag, Integer, Kind, List, Number, Pairs, Reference

REQUIRED = object()
NEAR = 16
"""A route to one of the last 16 blocks is written relative (`-4`), one further back absolute (`61`)."""


class Key(NamedTuple):
    """A key the suite uses."""

    name: str
    kind: Kind
    default: Any = REQUIRED
    optional: bool = False
    """Left out of a written cfg when the value is the default."""
    told: bool = False
    """Missing, it is probably forgotten: its default is told in a warning."""


class Place(NamedTuple):
    """Where a block stands: its number and what the block before it puts out."""

    index: int
    before: Shape


Values = dict[str, Any]


@dataclass(frozen=True)
class SectionKind:
    """A section: the block it becomes and its keys in the order they are written."""

    name: str
    block: type[Block]
    keys: tuple[Key, ...] = ()
    silent: frozenset[str] = frozenset()
    """Keys Darknet knows and this suite does not use: kept without a word."""
    fixed: Mapping[str, float | None] = field(default_factory=dict)
    """Keys with the one value that is supported; None where the key itself is not."""
    fields: Callable[[Values, Place], Values] = lambda values, place: values
    """Values of the keys → fields of the block."""
    values: Callable[[Any, Place], Values] = lambda block, place: vars(block)
    """The reverse; keys it leaves out or gives None are not written."""

    def key(self, name: str) -> Key | None:
        """The key of that name that the suite uses."""
        return next((key for key in self.keys if key.name == name), None)

    @property
    def known(self) -> frozenset[str]:
        """Every key that may stand in the section."""
        return self.silent | self.fixed.keys() | {key.name for key in self.keys} | EVERYWHERE | FIXED_EVERYWHERE.keys()


EVERYWHERE = frozenset(
    ("burnin_update", "clip", "dont_update", "learning_rate", "onlyforward", "stopbackward", "train_only_bn")
)
FIXED_EVERYWHERE = {"dontload": 0, "dontloadscales": 0}
COUNT = Integer(1)
SIZE = Integer(1, 1024)
"""Of kernels, strides, dilations."""
ACTIVATION = Choice(ACTIVATIONS)
PLAIN_ACTIVATION = Choice(tuple(word for word in ACTIVATIONS if word not in ("mish", "swish")))
"""Darknet has no mish and swish after `[scale_channels]` and `[sam]`."""
SHARE = Number(0, 1)
WEIGHT = Number(0)


def _conv_fields(values: Values, place: Place) -> Values:
    pad, stride = values.pop("pad"), values.pop("stride")
    if pad:
        values["padding"] = values["size"] // 2
    if values["size"] == 1:
        values["dilation"] = 1
    values["stride_x"] = values["stride_x"] or stride
    values["stride_y"] = values["stride_y"] or stride
    return values


def _conv_values(block: blocks.Convolutional, place: Place) -> Values:
    pad = block.padding == block.size // 2
    return vars(block) | _stride(block) | {"pad": pad, "padding": 0 if pad else block.padding}


def _stride(block: blocks.Convolutional | blocks.Maxpool) -> Values:
    if block.stride_x == block.stride_y:
        return {"stride": block.stride_x, "stride_x": None, "stride_y": None}
    return {"stride": None, "stride_x": block.stride_x, "stride_y": block.stride_y}


def _depthwise_fields(values: Values, place: Place) -> Values:
    pad = values.pop("pad")
    for key in ("filters", "groups"):
        if values.pop(key) not in (None, place.before.channels):
            raise Fault(f"one filter a channel is allowed, and the block before has {place.before.channels}", key)
    if pad:
        values["padding"] = (values["size"] - 1) // 2
    return values


def _depthwise_values(block: blocks.Depthwise, place: Place) -> Values:
    pad = block.padding == (block.size - 1) // 2
    return vars(block) | {"filters": place.before.channels, "pad": pad, "padding": 0 if pad else block.padding}


def _se_fields(values: Values, place: Place) -> Values:
    channels = place.before.channels
    if values["filters"] not in (None, channels):
        raise Fault(f"the block before has {channels} channels; its number is allowed", "filters")
    if values["reduction"] > channels:
        raise Fault(f"the block before has {channels} channels; 1..{channels} is allowed", "reduction")
    return {"filters": values["squeeze"] or channels // values["reduction"]}


def _se_values(block: blocks.Se, place: Place) -> Values:
    channels = place.before.channels
    reduction = max(1, channels // block.filters)
    if channels // reduction == block.filters:
        return {"filters": channels, "reduction": reduction}
    return {"filters": channels, "squeeze": block.filters}


def _maxpool_fields(values: Values, place: Place) -> Values:
    stride = values.pop("stride")
    size = values["size"] or stride
    padding = size - 1 if values["padding"] is None else values["padding"]
    return {
        "size": size,
        "stride_x": values["stride_x"] or stride,
        "stride_y": values["stride_y"] or stride,
        "padding": padding,
    }


def _maxpool_values(block: blocks.Maxpool, place: Place) -> Values:
    return vars(block) | _stride(block) | {"padding": None if block.padding == block.size - 1 else block.padding}


def _absolute(reference: int, place: Place) -> int:
    return place.index + reference if reference < 0 else reference


def _route_fields(values: Values, place: Place) -> Values:
    return values | {"layers": tuple(_absolute(layer, place) for layer in values["layers"])}


def _route_values(block: blocks.Route, place: Place) -> Values:
    back = [layer - place.index for layer in block.layers]
    near = [step if step >= -NEAR else step + place.index for step in back]
    return vars(block) | {"layers": tuple(near)}


def _shortcut_fields(values: Values, place: Place) -> Values:
    return values | {"sources": tuple(_absolute(source, place) for source in values.pop("from"))}


def _shortcut_values(block: blocks.Shortcut, place: Place) -> Values:
    return vars(block) | {"from": tuple(source - place.index for source in block.sources)}


def _source_fields(values: Values, place: Place) -> Values:
    return values | {"source": _absolute(values.pop("from"), place)}


def _source_values(block: blocks.ScaleChannels | blocks.Sam, place: Place) -> Values:
    return vars(block) | {"from": block.source - place.index}


def _yolo_fields(values: Values, place: Place) -> Values:
    count = values.pop("num")
    if len(values["anchors"]) != count:
        raise Fault(f"{len(values['anchors'])} pairs, but num={count}; they must agree", "anchors")
    mask = values["mask"] = values["mask"] or tuple(range(count))
    for position, anchor in enumerate(mask):
        if anchor >= count:
            raise Fault(f"{anchor} is no anchor of the {count}; 0..{count - 1} is allowed", "mask")
        if anchor in mask[:position]:
            raise Fault(f"{anchor} is named twice; each anchor once is allowed", "mask")
    return values


def _yolo_values(block: blocks.Yolo, place: Place) -> Values:
    return vars(block) | {"num": len(block.anchors)}


NET = SectionKind(
    "net",
    blocks.Net,
    keys=(
        Key("width", Integer(1, 65536)),
        Key("height", Integer(1, 65536)),
        Key("channels", Integer(1, 1024), default=3),
    ),
    silent=frozenset(
        (
            "B1 B2 adam adversarial_lr angle aspect attention augment_speed badlabels_rejection_percentage batch blur "
            "burn_in contrastive contrastive_color contrastive_jit_flip cutmix decay dynamic_minibatch ema_alpha eps "
            "equidistant_point exposure flip gamma gaussian_noise hue inputs label_smooth_eps learning_rate "
            "learning_rate_min letter_box loss_scale max_batches max_chart_loss max_crop min_crop mixup momentum mosaic "
            "mosaic_bound num_sigmas_reject_badlabels optimized_memory policy power resize_step saturation scale scales "
            "seq_scales sequential_subdivisions sgdr_cycle sgdr_mult show_receptive_field step steps subdivisions "
            "time_steps track try_fix_nan unsupervised use_cuda_graph weights_reject_freq workspace_size_limit_MB"
        ).split()
    ),
)

SECTIONS = (
    SectionKind(
        "convolutional",
        blocks.Convolutional,
        keys=(
            Key("batch_normalize", Flag(), default=False, optional=True),
            Key("filters", COUNT, default=1, told=True),
            Key("size", SIZE, default=1),
            Key("stride", SIZE, default=1),
            Key("stride_x", SIZE, default=None),
            Key("stride_y", SIZE, default=None),
            Key("pad", Flag(any_number=True), default=False),
            Key("padding", Integer(0, 1024), default=0, optional=True),
            Key("groups", COUNT, default=1, optional=True),
            Key("dilation", SIZE, default=1, optional=True),
            Key("activation", ACTIVATION, default="logistic", told=True),
            Key("bias", Flag(), default=True, optional=True),
        ),
        silent=frozenset(("angle", "assisted_excitation", "dot", "grad_centr", "reverse", "stream", "wait_stream")),
        fixed={
            "antialiasing": 0,
            "bin_output": 0,
            "binary": 0,
            "cbn": 0,
            "coordconv": 0,
            "flipped": 0,
            "rotate": 0,
            "share_index": None,
            "stretch": 0,
            "stretch_sway": 0,
            "sway": 0,
            "xnor": 0,
        },
        fields=_conv_fields,
        values=_conv_values,
    ),
    SectionKind(
        "depthwise",
        blocks.Depthwise,
        keys=(
            Key("batch_normalize", Flag(), default=False, optional=True),
            Key("filters", COUNT, default=None),
            Key("groups", COUNT, default=None),
            Key("size", SIZE, default=3),
            Key("stride", SIZE, default=1),
            Key("pad", Flag(any_number=True), default=False),
            Key("padding", Integer(0, 1024), default=0, optional=True),
            Key("activation", ACTIVATION, default="linear"),
        ),
        fields=_depthwise_fields,
        values=_depthwise_values,
    ),
    SectionKind(
        "se",
        blocks.Se,
        keys=(
            Key("filters", COUNT, default=None),
            Key("reduction", COUNT, default=4),
            Key("squeeze", COUNT, default=None),
        ),
        fields=_se_fields,
        values=_se_values,
    ),
    SectionKind(
        "maxpool",
        blocks.Maxpool,
        keys=(
            Key("size", SIZE, default=None),
            Key("stride", SIZE, default=1),
            Key("stride_x", SIZE, default=None),
            Key("stride_y", SIZE, default=None),
            Key("padding", Integer(0, 1024), default=None),
        ),
        silent=frozenset(("out_channels",)),
        fixed={"antialiasing": 0, "maxpool_depth": 0, "maxpool_zero_nonmax": 0},
        fields=_maxpool_fields,
        values=_maxpool_values,
    ),
    SectionKind("avgpool", blocks.Avgpool),
    SectionKind("upsample", blocks.Upsample, keys=(Key("stride", SIZE, default=2),), fixed={"scale": 1}),
    SectionKind(
        "route",
        blocks.Route,
        keys=(
            Key("layers", List(Reference(), longest=256)),
            Key("groups", COUNT, default=1, optional=True),
            Key("group_id", Integer(), default=0, optional=True),
        ),
        silent=frozenset(("stream", "wait_stream")),
        fields=_route_fields,
        values=_route_values,
    ),
    SectionKind(
        "shortcut",
        blocks.Shortcut,
        keys=(
            Key("from", List(Reference(allow_zero=False), longest=256)),
            Key(
                "weights_type",
                Choice(("none", "per_feature", "per_channel"), (("per_layer", "per_feature"),)),
                default="none",
                optional=True,
            ),
            Key(
                "weights_normalization",
                Choice(("none", "relu", "softmax"), (("avg_relu", "relu"),)),
                default="none",
                optional=True,
            ),
            Key("activation", ACTIVATION, default="linear"),
        ),
        fields=_shortcut_fields,
        values=_shortcut_values,
    ),
    SectionKind(
        "scale_channels",
        blocks.ScaleChannels,
        keys=(
            Key("from", Reference(allow_zero=False)),
            Key("activation", PLAIN_ACTIVATION, default="linear", optional=True),
        ),
        fixed={"scale_wh": 0},
        fields=_source_fields,
        values=_source_values,
    ),
    SectionKind(
        "sam",
        blocks.Sam,
        keys=(
            Key("from", Reference(allow_zero=False)),
            Key("activation", PLAIN_ACTIVATION, default="linear", optional=True),
        ),
        fields=_source_fields,
        values=_source_values,
    ),
    SectionKind(
        "dropout",
        blocks.Dropout,
        keys=(Key("probability", Number(0, 0.999), default=0.2),),
        silent=frozenset(("dropblock", "dropblock_size_abs", "dropblock_size_rel")),
    ),
    SectionKind("reorg", blocks.Reorg, keys=(Key("stride", SIZE, default=1),), fixed={"reverse": 0}),
    SectionKind(
        "yolo",
        blocks.Yolo,
        keys=(
            Key("mask", List(Integer(0, 999)), default=None),
            Key("anchors", Pairs(List(Number(0, 65536, above=True)))),
            Key("classes", Integer(1, 100_000), default=20, told=True),
            Key("num", Integer(1, 1000), default=1),
            Key("scale_x_y", Number(0, 100, above=True), default=1.0, optional=True),
            Key("new_coords", Flag(), default=False, optional=True),
            Key("iou_loss", Choice(("mse", "iou", "giou", "diou", "ciou")), default="mse", optional=True),
            Key("iou_thresh", SHARE, default=1.0, optional=True),
            Key("ignore_thresh", SHARE, default=0.5),
            Key("iou_normalizer", WEIGHT, default=0.75, optional=True),
            Key("cls_normalizer", WEIGHT, default=1.0, optional=True),
            Key("obj_normalizer", WEIGHT, default=1.0, optional=True),
            Key("label_smooth_eps", SHARE, default=0.0, optional=True),
            Key("max_delta", Number(0, above=True), default=None),
            Key("nms_kind", Choice(("default", "greedynms", "diounms", "cornersnms")), default="default", optional=True),
            Key("beta_nms", Number(0), default=0.6, optional=True),
        ),
        silent=frozenset(
            (
                "counters_per_class delta_normalizer dets_for_show dets_for_track embedding_layer focal_loss "
                "iou_thresh_kind jitter map max objectness_smooth random resize show_details sim_thresh "
                "track_ciou_norm track_history_size truth_thresh"
            ).split()
        ),
        fields=_yolo_fields,
        values=_yolo_values,
    ),
)

BY_NAME = {kind.name: kind for kind in SECTIONS}
ALIASES = {"conv": "convolutional", "max": "maxpool", "avg": "avgpool"}
"""Short names Darknet takes, too."""
NET_NAMES = ("net", "network")
BY_BLOCK = {kind.block: kind for kind in (NET, *SECTIONS)}
UNSUPPORTED = frozenset(
    (
        "Gaussian_yolo activation batchnorm conn connected contrastive conv_lstm cost crnn crop detection empty gru "
        "history implicit local local_avg local_avgpool lrn lstm normalization region reorg3d rnn silence soft softmax"
    ).split()
)
"""Sections Darknet knows and this suite does not."""
