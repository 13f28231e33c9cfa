"""Writes networks block by block, so that an architecture is a page of code and not a thousand lines of cfg."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.darknet.blocks import Block, Convolutional, Dropout, Maxpool, Net, Network, Route, Shortcut, Upsample, Yolo


@dataclass(frozen=True)
class Detection:
    """What the heads of one network share."""

    anchors: tuple[tuple[float, float], ...]
    """Width and height in pixels of the network input."""
    classes: int = 80
    values: dict[str, object] = field(default_factory=dict)
    """Further fields of `Yolo`, e.g. `ignore_thresh`."""
    activation: str = "linear"
    """Of the convolution before `[yolo]`; logistic where `new_coords` is set."""


class Builder:
    """Collects blocks in the order they are added.

    Every method that adds blocks returns the number of the last one, for a later `route` or `shortcut`.
    """

    def __init__(self, activation: str, detection: Detection) -> None:
        self.activation = activation
        self.detection = detection
        self.blocks: list[Block] = []

    @property
    def last(self) -> int:
        """Number of the block added last."""
        return len(self.blocks) - 1

    def network(self, size: int, training: dict[str, str]) -> Network:
        """The finished network with an input of `size` × `size`; `training` are the further keys of `[net]`."""
        return Network(Net(width=size, height=size, extra=tuple(training.items())), tuple(self.blocks))

    def add(self, block: Block) -> int:
        """Append any block."""
        self.blocks.append(block)
        return self.last

    def conv(self, filters: int, size: int = 1, stride: int = 1, *, groups: int = 1, activation: str = "") -> int:
        """Convolution with batch normalisation, padded to keep the size at stride 1."""
        return self.add(
            Convolutional(
                filters=filters,
                size=size,
                stride_x=stride,
                stride_y=stride,
                padding=size // 2,
                groups=groups,
                batch_normalize=True,
                activation=activation or self.activation,
            )
        )

    def route(self, *layers: int, groups: int = 1, group_id: int = 0) -> int:
        """Concatenation of blocks, or of a slice of each."""
        return self.add(Route(layers=layers, groups=groups, group_id=group_id))

    def shortcut(self, source: int) -> int:
        """Sum of the last block and `source`."""
        return self.add(Shortcut(sources=(source,)))

    def maxpool(self, size: int, stride: int) -> int:
        """Max pooling as Darknet pads it: the size is divided by the stride."""
        return self.add(Maxpool(size=size, stride_x=stride, stride_y=stride, padding=size - 1))

    def upsample(self) -> int:
        """Twice the height and width."""
        return self.add(Upsample(stride=2))

    def bottleneck(self, filters: int, count: int) -> int:
        """`count` convolutions, 1×1 with `filters` and 3×3 with twice as many in turn."""
        for index in range(count):
            self.conv(filters << index % 2, 3 if index % 2 else 1)
        return self.last

    def residual(self, inner: int, filters: int) -> int:
        """Unit of Darknet-53 (arXiv:1804.02767): 1×1 to `inner`, 3×3 to `filters`, added to what came in."""
        source = self.last
        self.conv(inner)
        self.conv(filters, 3)
        return self.shortcut(source)

    def csp(self, filters: int, inner: int, units: int, *, hidden: int = 0) -> int:
        """Cross-stage partial stage (arXiv:1911.11929): one branch goes through `units` residual units, one by.

        Args:
            filters: width of the stage's output; it takes whatever comes in.
            inner: width of either branch.
            units: residual units of the first branch.
            hidden: width inside a residual unit; `inner` if 0.
        """
        source = self.last
        by = self.conv(inner)
        self.route(source)
        self.conv(inner)
        for _ in range(units):
            self.residual(hidden or inner, inner)
        self.route(self.conv(inner), by)
        return self.conv(filters)

    def spp(self, sizes: Sequence[int]) -> int:
        """Spatial pyramid pooling: the last block beside its max pools of several sizes at stride 1."""
        source = self.last
        pools = []
        for size in sizes:
            if pools:
                self.route(source)
            pools.append(self.maxpool(size, 1))
        return self.route(*reversed(pools), source)

    def inverted(self, expanded: int, filters: int, stride: int = 1, *, drop: float = 0.0, add: bool = False) -> int:
        """Inverted residual of MobileNetV2 (arXiv:1801.04381): widen, 3×3 depthwise, narrow without activation.

        Args:
            expanded: width of the depthwise convolution.
            filters: width of the output.
            stride: of the depthwise convolution.
            drop: probability of a dropout before the sum; none if 0.
            add: add what came in, which must have the same shape.
        """
        source = self.last
        self.conv(expanded)
        self.conv(expanded, 3, stride, groups=expanded)
        self.conv(filters, activation="linear")
        if drop and add:
            self.add(Dropout(probability=drop))
        return self.shortcut(source) if add else self.last

    def separable(self, expanded: int, filters: int, size: int, *, activation: str = "") -> int:
        """Depthwise convolution over `expanded` channels, the width that comes in, then 1×1 to `filters`."""
        self.conv(expanded, size, groups=expanded)
        return self.conv(filters, activation=activation)

    def head(self, *mask: int, extra: dict[str, str] | None = None, **values: object) -> int:
        """1×1 convolution to the head's channels and `[yolo]`.

        Args:
            mask: the anchors of this head, in the order of its channels.
            extra: keys the suite keeps but does not use.
            values: fields of `Yolo` of this head alone.
        """
        detection = self.detection
        yolo = Yolo(
            mask=mask,
            anchors=detection.anchors,
            classes=detection.classes,
            extra=tuple((extra or {}).items()),
            **{**detection.values, **values},
        )
        self.add(Convolutional(filters=yolo.channels, activation=detection.activation))
        return self.add(yolo)
