"""The blocks of a Darknet network as frozen dataclasses, each named as its cfg section.

Blocks are numbered as Darknet numbers layers: `[net]` is not counted, `[dropout]` is. References between blocks
(`Route.layers`, `Shortcut.sources`, …) are absolute block numbers in memory, whatever the file wrote.
Semantics follow AlexeyAB/darknet, `src/parser.c`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

ACTIVATIONS = ("linear", "leaky", "relu", "relu6", "mish", "swish", "logistic", "h_swish", "hardsigmoid")


BN_EPSILON = 1e-5
"""Added to the variance, as AlexeyAB/darknet does (src/blas.c, `normalize_cpu`). OpenCV's Darknet importer adds 1e-6,
which moves raw heads of public weights by up to 8e-3 of their scale; folded, the two agree."""
SHORTCUT_EPSILON = 1e-4
"""Added to the sum that normalised weights of a shortcut are divided by (src/blas.c, `shortcut_multilayer_cpu`)."""


class Shape(NamedTuple):
    """Size of a feature map, in cells."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """What every section has."""

    extra: tuple[tuple[str, str], ...] = ()
    """Keys the suite does not use, as written, in file order."""
    line: int = field(default=0, compare=False)
    """Line of the section's header in its cfg; 0 for a block that was not read from a file."""

    def reads(self, index: int) -> tuple[int, ...]:
        """Numbers of the blocks whose outputs this one reads when it stands at `index`; -1 is the image."""
        return (index - 1,)


@dataclass(frozen=True, kw_only=True)
class Net(Block):
    """`[net]` or `[network]`: the input."""

    width: int = 416
    height: int = 416
    channels: int = 3


@dataclass(frozen=True, kw_only=True)
class Convolutional(Block):
    """Convolution, optional batch normalisation, activation. `[depthwise]` of the SpursLipu suite is read as one."""

    filters: int
    size: int = 1
    stride_x: int = 1
    stride_y: int = 1
    padding: int = 0
    """Zeros on each side; `pad=1` in a cfg means size // 2. Multiplied by `dilation`, as Darknet does."""
    groups: int = 1
    dilation: int = 1
    batch_normalize: bool = False
    bias: bool = True
    """Only looked at without batch normalisation, whose β is the bias otherwise."""
    activation: str = "logistic"


@dataclass(frozen=True, kw_only=True)
class Se(Block):
    """Squeeze and excite (`[se]` of the SpursLipu suite): pool, fc, relu, fc, hard sigmoid, scale; no biases."""

    filters: int
    """Width of the squeezed vector."""


@dataclass(frozen=True, kw_only=True)
class Maxpool(Block):
    """Max pooling; Darknet pads `padding` cells in all, `padding // 2` of them before."""

    size: int
    stride_x: int
    stride_y: int
    padding: int


@dataclass(frozen=True, kw_only=True)
class Avgpool(Block):
    """Global average pooling to 1 × 1."""


@dataclass(frozen=True, kw_only=True)
class Upsample(Block):
    """Nearest-neighbour upsampling."""

    stride: int = 2


@dataclass(frozen=True, kw_only=True)
class Route(Block):
    """Concatenation of the `group_id`-th of `groups` channel slices of each source."""

    layers: tuple[int, ...]
    groups: int = 1
    group_id: int = 0

    def reads(self, index: int) -> tuple[int, ...]:
        """The concatenated blocks, in order."""
        return self.layers


@dataclass(frozen=True, kw_only=True)
class Shortcut(Block):
    """Sum of the previous block and `sources`; the common channels are added, the width is the previous block's."""

    sources: tuple[int, ...]
    """`from` in the cfg."""
    weights_type: str = "none"
    """none, per_feature (one weight an input) or per_channel (one weight an input and channel)."""
    weights_normalization: str = "none"
    """none, relu or softmax, over the inputs."""
    activation: str = "linear"

    def reads(self, index: int) -> tuple[int, ...]:
        """The previous block, whose width wins, then the sources."""
        return (index - 1, *self.sources)


@dataclass(frozen=True, kw_only=True)
class ScaleChannels(Block):
    """`source` scaled channel by channel with the previous block, which is 1 × 1 (`[scale_channels]`)."""

    source: int
    activation: str = "linear"

    def reads(self, index: int) -> tuple[int, ...]:
        """The previous block, which scales, then the scaled source."""
        return (index - 1, self.source)


@dataclass(frozen=True, kw_only=True)
class Sam(Block):
    """`source` times the previous block, cell by cell (spatial attention module)."""

    source: int
    activation: str = "linear"

    def reads(self, index: int) -> tuple[int, ...]:
        """The previous block, which scales, then the scaled source."""
        return (index - 1, self.source)


@dataclass(frozen=True, kw_only=True)
class Dropout(Block):
    """Dropout; the identity outside training, but counted as a block."""

    probability: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Reorg(Block):
    """Space to depth in the memory order of Darknet's `[reorg]`."""

    stride: int = 1


@dataclass(frozen=True, kw_only=True)
class Yolo(Block):
    """A detection head; its input has len(mask) · (5 + classes) channels."""

    mask: tuple[int, ...]
    anchors: tuple[tuple[float, float], ...]
    """All `num` anchors, width and height in pixels of the network input."""
    classes: int
    scale_x_y: float = 1.0
    new_coords: bool = False
    iou_loss: str = "mse"
    """mse, iou, giou, diou or ciou."""
    iou_thresh: float = 1.0
    ignore_thresh: float = 0.5
    iou_normalizer: float = 0.75
    cls_normalizer: float = 1.0
    obj_normalizer: float = 1.0
    label_smooth_eps: float = 0.0
    max_delta: float | None = None
    nms_kind: str = "default"
    beta_nms: float = 0.6

    @property
    def head_anchors(self) -> tuple[tuple[float, float], ...]:
        """The anchors this head predicts with, in the order of its channels."""
        return tuple(self.anchors[index] for index in self.mask)

    @property
    def channels(self) -> int:
        """Channels the block before must have."""
        return len(self.mask) * (5 + self.classes)


@dataclass(frozen=True)
class Network:
    """A parsed cfg: the input and the blocks."""

    net: Net
    blocks: tuple[Block, ...]
    path: str = field(default="", compare=False)
    """File the blocks were read from, for messages."""

    @property
    def heads(self) -> tuple[int, ...]:
        """Block numbers of the `[yolo]` blocks, in the order of the cfg."""
        return tuple(i for i, block in enumerate(self.blocks) if isinstance(block, Yolo))

    @property
    def yolos(self) -> tuple[Yolo, ...]:
        """The `[yolo]` blocks, in the order of the cfg."""
        return tuple(block for block in self.blocks if isinstance(block, Yolo))

    @property
    def classes(self) -> int:
        """Number of classes; the same in every head."""
        return self.yolos[0].classes

    def where(self, block: int) -> str:
        """Place of a block for a message: `block 84 (cfg/tiny.cfg:512)`."""
        line = self.blocks[block].line
        return f"block {block} ({self.path}:{line})" if self.path and line else f"block {block}"
