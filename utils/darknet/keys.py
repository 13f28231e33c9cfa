"""The sections a cfg may have and the keys of each: kind, default, order of writing.

One table says how blocks are read and written. Defaults and meanings are those of AlexeyAB/darknet, `src/parser.c`,
except for `[depthwise]` and `[se]`, which only the SpursLipu suite has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.darknet import blocks, conversions
from utils.darknet.blocks import ACTIVATIONS, Block
from utils.darknet.conversions import Place, Values
from utils.darknet.values import Choice, Flag, Integer, Kind, List, Number, Pairs, Reference


def words(text: str) -> frozenset[str]:
    """Words between blanks."""
    return frozenset(text.split())


REQUIRED = object()
EVERYWHERE = words("burnin_update clip dont_update learning_rate onlyforward stopbackward train_only_bn")
"""Training keys that any section may have."""
FIXED_EVERYWHERE = {"dontload": 0, "dontloadscales": 0}
"""They change the layout of the .weights file."""


class Key(NamedTuple):
    """A key the suite uses."""

    name: str
    kind: Kind
    default: Any = REQUIRED
    optional: bool = False
    """Not written when the value is the default."""
    told: bool = False
    """Missing, it was probably forgotten: its default is told in a warning."""


@dataclass(frozen=True)
class SectionKind:
    """A section: the block it becomes and its keys in the order they are written."""

    name: str
    block: type[Block]
    keys: tuple[Key, ...]
    used: frozenset[str]
    """Names of `keys`."""
    silent: frozenset[str]
    """Keys Darknet knows and this suite does not use: kept without a word."""
    fixed: Mapping[str, float | None]
    """Keys with the one value that is supported; None where the key itself is not."""
    fields: Callable[[Values, Place], Values]
    """Values of the keys → fields of the block."""
    values: Callable[[Any, Place], Values]
    """Block → values of the keys; None and keys left out are not written."""

    @property
    def known(self) -> frozenset[str]:
        """Every key that may stand in the section."""
        return self.used | self.silent | self.fixed.keys()


def section(
    name: str,
    block: type[Block],
    *keys: Key,
    silent: str = "",
    fixed: Mapping[str, float | None] | None = None,
    fields: Callable[[Values, Place], Values] = conversions.same_fields,
    values: Callable[[Any, Place], Values] = conversions.same_values,
) -> SectionKind:
    """A section; `silent` and `fixed` come on top of what every section may have."""
    used = frozenset(key.name for key in keys)
    fixed = {**FIXED_EVERYWHERE, **(fixed or {})}
    return SectionKind(name, block, keys, used, words(silent) | EVERYWHERE, fixed, fields, values)


COUNT = Integer(1, 65536)
"""Of channels and groups."""
SIZE = Integer(1, 1024)
"""Of kernels, strides, dilations."""
PADDING = Integer(0, 1024)
ACTIVATION = Choice(ACTIVATIONS)
PLAIN_ACTIVATION = Choice(tuple(word for word in ACTIVATIONS if word not in ("mish", "swish")))
"""Darknet has no mish and swish after `[scale_channels]` and `[sam]`."""
SHARE = Number(0, 1)
WEIGHT = Number(0)
SOURCE = Reference(allow_zero=False)
LONGEST_READ = 256
"""Most blocks that one block reads."""

NET = section(
    "net",
    blocks.Net,
    Key("width", Integer(1, 65536)),
    Key("height", Integer(1, 65536)),
    Key("channels", Integer(1, 1024), default=3),
    silent="B1 B2 adam adversarial_lr angle aspect attention augment_speed badlabels_rejection_percentage batch blur "
    "burn_in contrastive contrastive_color contrastive_jit_flip cutmix decay dynamic_minibatch ema_alpha eps "
    "equidistant_point exposure flip gamma gaussian_noise hue inputs label_smooth_eps learning_rate learning_rate_min "
    "letter_box loss_scale max_batches max_chart_loss max_crop min_crop mixup momentum mosaic mosaic_bound "
    "num_sigmas_reject_badlabels optimized_memory policy power resize_step saturation scale scales seq_scales "
    "sequential_subdivisions sgdr_cycle sgdr_mult show_receptive_field step steps subdivisions time_steps track "
    "try_fix_nan unsupervised use_cuda_graph weights_reject_freq workspace_size_limit_MB",
)

SECTIONS = (
    section(
        "convolutional",
        blocks.Convolutional,
        Key("batch_normalize", Flag(), default=False, optional=True),
        Key("filters", COUNT, default=1, told=True),
        Key("size", SIZE, default=1),
        Key("stride", SIZE, default=1),
        Key("stride_x", SIZE, default=None),
        Key("stride_y", SIZE, default=None),
        Key("pad", Flag(any_number=True), default=False),
        Key("padding", PADDING, default=0, optional=True),
        Key("groups", COUNT, default=1, optional=True),
        Key("dilation", SIZE, default=1, optional=True),
        Key("activation", ACTIVATION, default="logistic", told=True),
        Key("bias", Flag(), default=True, optional=True),
        silent="angle assisted_excitation dot grad_centr reverse stream wait_stream",
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
        fields=conversions.conv_fields,
        values=conversions.conv_values,
    ),
    section(
        "depthwise",
        blocks.Convolutional,
        Key("batch_normalize", Flag(), default=False),
        Key("filters", COUNT, default=None),
        Key("size", SIZE, default=3),
        Key("stride", SIZE, default=1),
        Key("stride_x", SIZE, default=None),
        Key("stride_y", SIZE, default=None),
        Key("pad", Flag(any_number=True), default=False),
        Key("padding", PADDING, default=0),
        Key("groups", COUNT, default=None),
        Key("dilation", SIZE, default=1),
        Key("activation", ACTIVATION, default="linear"),
        Key("bias", Flag(), default=True),
        fields=conversions.depthwise_fields,
    ),
    section(
        "se",
        blocks.Se,
        Key("filters", COUNT, default=None),
        Key("reduction", COUNT, default=4),
        Key("squeeze", COUNT, default=None),
        fields=conversions.se_fields,
        values=conversions.se_values,
    ),
    section(
        "maxpool",
        blocks.Maxpool,
        Key("size", SIZE, default=None),
        Key("stride", SIZE, default=1),
        Key("stride_x", SIZE, default=None),
        Key("stride_y", SIZE, default=None),
        Key("padding", PADDING, default=None),
        silent="out_channels",
        fixed={"antialiasing": 0, "maxpool_depth": 0, "maxpool_zero_nonmax": 0},
        fields=conversions.maxpool_fields,
        values=conversions.maxpool_values,
    ),
    section("avgpool", blocks.Avgpool),
    section("upsample", blocks.Upsample, Key("stride", SIZE, default=2), fixed={"scale": 1}),
    section(
        "route",
        blocks.Route,
        Key("layers", List(Reference(), LONGEST_READ)),
        Key("groups", COUNT, default=1, optional=True),
        Key("group_id", Integer(), default=0, optional=True),
        silent="stream wait_stream",
        fields=conversions.route_fields,
        values=conversions.route_values,
    ),
    section(
        "shortcut",
        blocks.Shortcut,
        Key("from", List(SOURCE, LONGEST_READ)),
        Key(
            "weights_type",
            Choice(("none", "per_feature", "per_channel"), {"per_layer": "per_feature"}),
            default="none",
            optional=True,
        ),
        Key(
            "weights_normalization",
            Choice(("none", "relu", "softmax"), {"avg_relu": "relu"}),
            default="none",
            optional=True,
        ),
        Key("activation", ACTIVATION, default="linear"),
        fields=conversions.shortcut_fields,
        values=conversions.shortcut_values,
    ),
    section(
        "scale_channels",
        blocks.ScaleChannels,
        Key("from", SOURCE),
        Key("activation", PLAIN_ACTIVATION, default="linear", optional=True),
        fixed={"scale_wh": 0},
        fields=conversions.source_fields,
        values=conversions.source_values,
    ),
    section(
        "sam",
        blocks.Sam,
        Key("from", SOURCE),
        Key("activation", PLAIN_ACTIVATION, default="linear", optional=True),
        fields=conversions.source_fields,
        values=conversions.source_values,
    ),
    section(
        "dropout",
        blocks.Dropout,
        Key("probability", Number(0, 0.999), default=0.2),
        silent="dropblock dropblock_size_abs dropblock_size_rel",
    ),
    section("reorg", blocks.Reorg, Key("stride", SIZE, default=1), fixed={"reverse": 0}),
    section(
        "yolo",
        blocks.Yolo,
        Key("mask", List(Integer(0, 999)), default=None),
        Key("anchors", Pairs(List(Number(0, 65536, above=True)))),
        Key("classes", Integer(1, 100_000), default=20, told=True),
        Key("num", Integer(1, 1000), default=1),
        Key("ignore_thresh", SHARE, default=0.5),
        Key("scale_x_y", Number(0, 100, above=True), default=1.0, optional=True),
        Key("new_coords", Flag(), default=False, optional=True),
        Key("iou_thresh", SHARE, default=1.0, optional=True),
        Key("iou_loss", Choice(("mse", "iou", "giou", "diou", "ciou")), default="mse", optional=True),
        Key("iou_normalizer", WEIGHT, default=0.75, optional=True),
        Key("cls_normalizer", WEIGHT, default=1.0, optional=True),
        Key("obj_normalizer", WEIGHT, default=1.0, optional=True),
        Key("label_smooth_eps", SHARE, default=0.0, optional=True),
        Key("max_delta", Number(0, above=True), default=None),
        Key("nms_kind", Choice(("default", "greedynms", "diounms", "cornersnms")), default="default", optional=True),
        Key("beta_nms", WEIGHT, default=0.6, optional=True),
        silent="counters_per_class delta_normalizer dets_for_show dets_for_track embedding_layer focal_loss "
        "iou_thresh_kind jitter map max objectness_smooth random resize show_details sim_thresh track_ciou_norm "
        "track_history_size truth_thresh",
        fields=conversions.yolo_fields,
        values=conversions.yolo_values,
    ),
)

BY_NAME = {kind.name: kind for kind in SECTIONS}
BY_BLOCK = {kind.block: kind for kind in (NET, *SECTIONS) if kind.name != "depthwise"}
ALIASES = {"conv": "convolutional", "max": "maxpool", "avg": "avgpool"}
"""Short names Darknet takes, too."""
NET_NAMES = ("net", "network")
UNSUPPORTED = words(
    "Gaussian_yolo activation batchnorm conn connected contrastive conv_lstm cost crnn crop detection empty gru "
    "history implicit local local_avg local_avgpool lrn lstm normalization region reorg3d rnn silence soft softmax"
)
"""Sections Darknet knows and this suite does not."""
