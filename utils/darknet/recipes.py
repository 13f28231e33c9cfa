"""The networks of cfg/ as recipes: each function gives one architecture.

Widths, anchors and training values are those of the papers and of AlexeyAB/darknet where it has the network, so that
its public `.weights` fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from utils.darknet.blocks import Network
from utils.darknet.builder import Builder, Detection

ANCHORS_V3 = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
ANCHORS_V4 = ((12, 16), (19, 36), (40, 28), (36, 75), (76, 55), (72, 146), (142, 110), (192, 243), (459, 401))
ANCHORS_TINY = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
ANCHORS_FASTEST = ((12, 18), (37, 49), (52, 132), (115, 73), (119, 199), (242, 238))

CIOU = {"iou_loss": "ciou", "iou_normalizer": 0.07, "cls_normalizer": 1.0, "nms_kind": "greedynms", "beta_nms": 0.6}


def training(**changes: str) -> dict[str, str]:
    """Keys of `[net]` for training in Darknet: the values of YOLOv3, with `changes`."""
    values = {
        "batch": "64",
        "subdivisions": "16",
        "momentum": "0.9",
        "decay": "0.0005",
        "angle": "0",
        "saturation": "1.5",
        "exposure": "1.5",
        "hue": ".1",
        "learning_rate": "0.001",
        "burn_in": "1000",
        "max_batches": "500200",
        "policy": "steps",
        "steps": "400000,450000",
        "scales": ".1,.1",
    }
    return values | changes


def head_keys(random: int | None = 1, jitter: str = ".3", **changes: str) -> dict[str, str]:
    """Keys of `[yolo]` that only Darknet's own training reads; no `random` if None."""
    values = {"jitter": jitter, "truth_thresh": "1"}
    return values | ({} if random is None else {"random": str(random)}) | changes


def yolov3(size: int, pools: Sequence[int] = ()) -> Network:
    """Darknet-53 and three heads, at strides 32, 16 and 8; with `pools`, SPP before the first."""
    net = Builder("leaky", Detection(ANCHORS_V3, values={"ignore_thresh": 0.7}))
    net.conv(32, 3)
    stages = []
    for filters, units in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        net.conv(filters, 3, 2)
        for _ in range(units):
            net.residual(filters // 2, filters)
        stages.append(net.last)
    for filters, mask, skip in ((512, (6, 7, 8), stages[3]), (256, (3, 4, 5), stages[2]), (128, (0, 1, 2), None)):
        if pools and filters == 512:
            net.bottleneck(filters, 3)
            net.spp(pools)
            neck = net.bottleneck(filters, 3)
        else:
            neck = net.bottleneck(filters, 5)
        net.conv(filters * 2, 3)
        net.head(*mask, extra=head_keys())
        if skip is not None:
            net.route(neck)
            net.conv(filters // 2)
            net.route(net.upsample(), skip)
    return net.network(size, training())


def two_heads(net: Builder, filters: int, skip: int, masks: Sequence[tuple[int, ...]], extra: dict[str, str]) -> None:
    """The heads of the tiny networks: one on the last block, one on it upsampled and joined with `skip`.

    Args:
        net: what they are added to.
        filters: width of the neck they share.
        skip: a block at half the stride of the last one.
        masks: anchors of the coarse head and of the fine one.
        extra: further keys of both.
    """
    neck = net.conv(filters)
    net.conv(filters * 2, 3)
    net.head(*masks[0], extra=extra)
    net.route(neck)
    net.conv(filters // 2)
    net.route(net.upsample(), skip)
    net.conv(filters, 3)
    net.head(*masks[1], extra=extra)


def yolov3_tiny() -> Network:
    """Seven convolutions with pools between them, and two heads."""
    net = Builder("leaky", Detection(ANCHORS_TINY, values={"ignore_thresh": 0.7}))
    for filters in (16, 32, 64, 128):
        net.conv(filters, 3)
        net.maxpool(2, 2)
    skip = net.conv(256, 3)
    net.maxpool(2, 2)
    net.conv(512, 3)
    net.maxpool(2, 1)
    net.conv(1024, 3)
    two_heads(net, 256, skip, ((3, 4, 5), (0, 1, 2)), head_keys())
    return net.network(416, training(subdivisions="2"))


def csp_darknet53(net: Builder) -> tuple[int, int]:
    """The stages of CSPDarknet-53 from stride 4 on; the last blocks at strides 8 and 16."""
    ends = []
    for filters, units in ((128, 2), (256, 8), (512, 8), (1024, 4)):
        net.conv(filters, 3, 2)
        ends.append(net.csp(filters, filters // 2, units))
    return ends[1], ends[2]


class Level(NamedTuple):
    """One head of a path aggregation network."""

    filters: int
    mask: tuple[int, ...]
    extra: dict[str, str]
    values: dict[str, object]


def path_aggregation(net: Builder, skips: tuple[int, int], body: Callable[[int], int], levels: Sequence[Level]) -> None:
    """PANet (arXiv:1803.01534) as YOLOv4 has it, on top of the last block, which is at stride 32.

    Args:
        net: what it is added to.
        skips: the backbone's last blocks at strides 8 and 16.
        body: adds the convolutions after a concatenation, given their width; returns the last.
        levels: heads at strides 8, 16 and 32.
    """
    necks = [net.last]
    for level, skip in zip(levels[1::-1], skips[::-1], strict=True):
        net.conv(level.filters)
        above = net.upsample()
        net.route(skip)
        net.route(net.conv(level.filters), above)
        necks.append(body(level.filters))
    below = None
    for level in levels:
        neck = necks.pop()
        if below is not None:
            net.route(below)
            net.route(net.conv(level.filters, 3, 2), neck)
            neck = body(level.filters)
        net.conv(level.filters * 2, 3)
        net.head(*level.mask, extra=level.extra, **level.values)
        below = neck


def yolov4(activation: str = "mish", pools: Sequence[int] = (5, 9, 13)) -> Network:
    """CSPDarknet-53, SPP and path aggregation; heads at strides 8, 16 and 32.

    Args:
        activation: of the backbone; neck and heads are leaky.
        pools: sizes of the SPP.
    """
    values = CIOU | {"ignore_thresh": 0.7, "iou_thresh": 0.213, "max_delta": 5.0}
    net = Builder(activation, Detection(ANCHORS_V4, values=values))
    net.conv(32, 3)
    net.conv(64, 3, 2)
    net.csp(64, 64, 1, hidden=32)
    skips = csp_darknet53(net)
    net.activation = "leaky"
    net.bottleneck(512, 3)
    net.spp(pools)
    net.bottleneck(512, 3)
    levels = (
        Level(128, (0, 1, 2), head_keys(None), {"scale_x_y": 1.2}),
        Level(256, (3, 4, 5), head_keys(None), {"scale_x_y": 1.1}),
        Level(512, (6, 7, 8), head_keys(), {"scale_x_y": 1.05}),
    )
    path_aggregation(net, skips, lambda filters: net.bottleneck(filters, 5), levels)
    changes = {"subdivisions": "8", "momentum": "0.949", "learning_rate": "0.0013", "max_batches": "500500"}
    return net.network(608, training(**changes, mosaic="1"))


def yolov4_tiny() -> Network:
    """Three cross-stage partial stages whose split is a route over half of the channels, and two heads."""
    net = Builder("leaky", Detection(ANCHORS_TINY, values=CIOU | {"ignore_thresh": 0.7, "scale_x_y": 1.05}))
    net.conv(32, 3, 2)
    net.conv(64, 3, 2)
    skip = 0
    for filters in (64, 128, 256):
        source = net.conv(filters, 3)
        net.route(source, groups=2, group_id=1)
        first = net.conv(filters // 2, 3)
        net.route(net.conv(filters // 2, 3), first)
        skip = net.conv(filters)
        net.route(source, skip)
        net.maxpool(2, 2)
    net.conv(512, 3)
    two_heads(net, 256, skip, ((3, 4, 5), (1, 2, 3)), head_keys(0, resize="1.5"))
    changes = {"subdivisions": "1", "learning_rate": "0.00261", "max_batches": "2000200", "steps": "1600000,1800000"}
    return net.network(416, training(**changes))


def yolov4_csp() -> Network:
    """YOLOv4 with cross-stage partial SPP and path aggregation, and heads that are logistic throughout."""
    values = {"ignore_thresh": 0.7, "iou_thresh": 0.2, "iou_loss": "ciou", "iou_normalizer": 0.05, "beta_nms": 0.6}
    values |= {"cls_normalizer": 0.5, "nms_kind": "diounms", "scale_x_y": 2.0, "new_coords": True}
    net = Builder("mish", Detection(ANCHORS_V4, values=values, activation="logistic"))
    net.conv(32, 3)
    net.conv(64, 3, 2)
    net.residual(32, 64)
    skips = csp_darknet53(net)

    source = net.last
    by = net.conv(512)
    net.route(source)
    net.conv(512)
    net.conv(512, 3)
    net.conv(512)
    net.spp((5, 9, 13))
    net.conv(512)
    net.route(net.conv(512, 3), by)
    net.conv(512)

    def body(filters: int) -> int:
        source = net.conv(filters)
        by = net.conv(filters)
        net.route(source)
        for _ in range(2):
            net.conv(filters)
            net.conv(filters, 3)
        net.route(net.last, by)
        return net.conv(filters)

    heads = ((128, (0, 1, 2), 4.0, "0"), (256, (3, 4, 5), 1.0, "1"), (512, (6, 7, 8), 0.4, "1"))
    levels = [
        Level(filters, mask, head_keys(0, ".1", resize="1.5", objectness_smooth=smooth), {"obj_normalizer": weight})
        for filters, mask, weight, smooth in heads
    ]
    path_aggregation(net, skips, body, levels)
    changes = {"subdivisions": "8", "momentum": "0.949", "max_batches": "500500"}
    return net.network(512, training(**changes, mosaic="1", letter_box="1", ema_alpha="0.9998"))


def mobilenetv2_yolov3() -> Network:
    """MobileNetV2 of width 1.0 and the three heads of YOLOv3 with depthwise 3×3 convolutions."""
    values = CIOU | {"ignore_thresh": 0.7, "iou_thresh": 0.213}
    net = Builder("relu", Detection(ANCHORS_V3, values=values))
    net.conv(32, 3, 2)
    net.separable(32, 16, 3, activation="linear")
    ends, before = {}, 16
    for filters, units, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for unit in range(units):
            net.inverted(before * 6, filters, 1 if unit else stride, add=unit > 0)
            before = filters
        ends[filters] = net.last
    for filters, mask, scale, skip in (
        (256, (6, 7, 8), 1.05, ends[96]),
        (128, (3, 4, 5), 1.1, ends[32]),
        (64, (0, 1, 2), 1.2, None),
    ):
        neck = net.conv(filters)
        for _ in range(2):
            net.separable(filters, filters * 2, 3)
            neck = net.conv(filters)
        net.separable(filters, filters * 2, 3)
        net.head(*mask, extra=head_keys(0, ".2"), scale_x_y=scale)
        if skip is not None:
            net.route(neck)
            net.conv(filters // 2)
            net.route(net.upsample(), skip)
    return net.network(416, training(subdivisions="4", momentum="0.949", burn_in="4000"))


def yolo_fastest() -> Network:
    """Narrow inverted residuals, a small SPP and two heads of depthwise 5×5 convolutions."""
    values = CIOU | {"ignore_thresh": 0.5, "iou_thresh": 0.213}
    net = Builder("leaky", Detection(ANCHORS_FASTEST, values=values))
    net.conv(8, 3, 2)
    ends = []
    stages = ((8, 4, 1, 8, 1), (24, 8, 2, 32, 2), (32, 8, 2, 48, 2), (48, 16, 1, 96, 4), (96, 24, 2, 136, 4))
    for first, filters, stride, expanded, units in (*stages, (136, 48, 2, 224, 5)):
        net.inverted(first, filters, stride)
        for _ in range(units):
            net.inverted(expanded, filters, drop=0.15, add=True)
        ends.append(net.last)
    net.spp((3, 5, 9))
    neck = net.conv(96)
    for filters, mask in ((96, (3, 4, 5)), (120, (0, 1, 2))):
        for _ in range(2):
            net.separable(filters, filters, 5, activation="linear")
        net.head(*mask, extra=head_keys(0, ".15"))
        if filters == 96:
            net.route(neck)
            net.route(net.upsample(), ends[4])
    changes = {"batch": "32", "subdivisions": "1", "momentum": "0.949", "burn_in": "4000", "max_batches": "500000"}
    return net.network(320, training(**changes))


def demo() -> Network:
    """A few residual units and heads at strides 16 and 8: trains in minutes on a CPU."""
    anchors = ((22, 24), (26, 28), (32, 32), (38, 40), (47, 48), (58, 58))  # k-means over utils/data/toy.py's boxes
    values = CIOU | {"ignore_thresh": 0.7, "iou_thresh": 0.213, "scale_x_y": 1.05}
    net = Builder("leaky", Detection(anchors, classes=12, values=values))
    net.conv(16, 3, 2)
    ends = []
    for filters, units in ((32, 1), (64, 1), (128, 2)):
        net.conv(filters, 3, 2)
        for _ in range(units):
            net.residual(filters // 2, filters)
        ends.append(net.last)
    two_heads(net, 64, ends[1], ((3, 4, 5), (0, 1, 2)), head_keys(0))
    changes = {"batch": "16", "subdivisions": "1", "burn_in": "100", "max_batches": "4000", "steps": "3200,3600"}
    return net.network(160, training(**changes))
