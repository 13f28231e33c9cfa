"""What every block has: its keys in a cfg, and how channels, shapes and tensors pass through it.

Blocks are numbered as Darknet numbers layers: `[net]` is not counted, `[dropout]` is. References between blocks
(`Route.layers`, `Shortcut.sources`, …) are absolute block numbers in memory, whatever the file wrote.
Semantics follow AlexeyAB/darknet, `src/parser.c`; only the SpursLipu suite has `[depthwise]` and `[se]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from utils.darknet.blocks.values import Choice, Integer, Kind, SectionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.floating]"
Vector: TypeAlias = "NDArray[np.float64]"
Keep: TypeAlias = "NDArray[np.bool_]"
"""[C], whether a channel stays."""
Arrays: TypeAlias = "Mapping[str, Array]"
"""Tensors by their names."""

ACTIVATIONS = ("linear", "leaky", "relu", "relu6", "mish", "swish", "logistic", "h_swish", "hardsigmoid")
SAME_ACTIVATIONS = {"silu": "swish", "sigmoid": "logistic", "hardswish": "h_swish"}
"""Names of other forks and of PyTorch."""
ACTIVATION = Choice(ACTIVATIONS, SAME_ACTIVATIONS)
PLAIN_ACTIVATION = Choice(tuple(word for word in ACTIVATIONS if word not in ("mish", "swish")), SAME_ACTIVATIONS)
"""Darknet has no mish and swish after `[scale_channels]` and `[sam]`."""
REQUIRED = object()
IMAGE = -1
"""Number that stands for the input, and for `[net]`."""
EVERYWHERE = "burnin_update clip dont_update learning_rate onlyforward stopbackward train_only_bn"
"""Training keys that any section may have."""
FIXED_EVERYWHERE = "dontload=0 dontloadscales=0"
"""They change the layout of the .weights file."""

Values = dict[str, Any]


def words(text: str) -> frozenset[str]:
    """Words between blanks."""
    return frozenset(text.split())


class Key(NamedTuple):
    """A key of a section; one that is not a field of the block is an attribute of the class body."""

    kind: Kind
    default: Any = REQUIRED
    optional: bool = False
    """Not written when the value is the default."""
    told: bool = False
    """If the key is missing, it was probably forgotten, so a warning names its default."""


def key(
    kind: Kind, absent: Any = REQUIRED, *, default: Any = MISSING, optional: bool = False, told: bool = False
) -> Any:
    """A field that a cfg has as a key of the same name.

    Args:
        kind: of the value.
        absent: value of a key that is not in the cfg; None where it depends on other keys.
        default: of the field, where that is not the same.
        optional: as in `Key`.
        told: as in `Key`.
    """
    if default is MISSING and absent is not REQUIRED and absent is not None:
        default = absent
    return field(default=default, metadata={"key": Key(kind, absent, optional, told)})


class Shape(NamedTuple):
    """Size of a feature map, in cells."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        """Channels x height x width."""
        return f"{self.channels} x {self.height} x {self.width}"

    def check_sides(self, stride: int) -> None:
        """Refuse an input with a side that is no multiple of `stride`."""
        for name, side in (("width", self.width), ("height", self.height)):
            if side % stride:
                near = max(1, round(side / stride)) * stride
                raise SectionError(
                    f"multiples of {stride}, the largest stride of the network, are allowed, e.g. {near}", name, IMAGE
                )


class Position(NamedTuple):
    """Where a block stands."""

    number: int
    """Its number; -1 for `[net]`."""
    channels: int
    """What the block before it puts out."""

    def absolute(self, reference: int) -> int:
        """Number of a block that a cfg names."""
        return self.number + reference if reference < 0 else reference


@dataclass(frozen=True, kw_only=True)
class Block:
    """What every section has, and what holds for most kinds."""

    extra: tuple[tuple[str, str], ...] = ()
    """Keys the suite does not use, as written, in file order."""
    line: int = field(default=0, compare=False)
    """Line of the section's header in its cfg; 0 for a block that was not read from a file."""

    SECTION: ClassVar[str]
    IS_HEAD: ClassVar[bool] = False
    KEYS: ClassVar[Mapping[str, Key]] = {}
    """In the order they are written."""
    SILENT: ClassVar[str] = ""
    """Keys that Darknet knows and this suite does not use: kept without a warning."""
    FIXED: ClassVar[str] = ""
    """`key=value` with the one value that is supported; `key` alone where no value is."""

    def __init_subclass__(cls) -> None:
        """Name the section, and take its keys from the class body."""
        cls.SECTION = re.sub(r"\B(?=[A-Z])", "_", cls.__name__).lower()
        keys = {}
        for name, value in list(vars(cls).items()):
            if isinstance(value, Field):
                keys[name] = value.metadata["key"]
            elif isinstance(value, Key):
                keys[name.rstrip("_")] = value
                delattr(cls, name)
        cls.KEYS = {**cls.KEYS, **keys}

    @classmethod
    def silent(cls) -> frozenset[str]:
        """Keys that are kept without a warning."""
        return words(EVERYWHERE) | words(cls.SILENT)

    @classmethod
    def fixed(cls) -> Mapping[str, float | None]:
        """Keys and the one value that is supported; None where no value is."""
        pairs = (word.partition("=") for word in words(FIXED_EVERYWHERE) | words(cls.FIXED))
        return {name: float(value) if value else None for name, _, value in pairs}

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """The block of a section.

        Args:
            values: of all its keys, defaults filled in, None for a key that has none; `extra` and `line` as well.
            position: where it stands.
        """
        return cls(**values)

    def key_values(self, position: Position) -> Values:
        """Values of the keys that `read` makes an equal block of; None and keys left out are not written."""
        return vars(self)

    def reads(self, index: int) -> tuple[int, ...]:
        """Numbers of the blocks whose outputs this one reads when it stands at `index`; -1 is the image."""
        return (index - 1,)

    def basis(self, index: int) -> int:
        """The block it reads whose cells and channels it hands on."""
        return self.reads(index)[0]

    def step(self) -> tuple[Fraction | int, Fraction | int]:
        """Cells of the input for one of the output, x and y; 1 for global pooling, which has no fixed ratio."""
        return 1, 1

    def shape(self, trail: Trail) -> Shape:
        """Shape that the block puts out after `trail`.

        Raises:
            SectionError: it cannot work there.
        """
        return trail.before

    def tensors(self, channels: int) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of its tensors in file order when it follows `channels` channels."""
        return []

    def depthwise(self, channels: int) -> bool:
        """Whether each channel of the output is made from the same channel of the `channels` inputs, by weights."""
        return False

    def label(self, index: int, labels: Labeling) -> list[int]:
        """Labels of its output channels when it stands at `index`; see `utils.pruning.channel_graph`."""
        return labels.output(self.basis(index))

    def pruned(self, width: int, channels: int, moved: Callable[[int], int]) -> Block:
        """The block in a network with fewer channels and blocks.

        Args:
            width: of its output there.
            channels: of its input here.
            moved: new number of a block. What a block reads as the one before it needs none.
        """
        return self

    def sliced(self, name: str, array: Array, keep: Keep, read: Keep) -> Array:
        """A tensor without the channels that go.

        Args:
            name: of the tensor.
            array: its values.
            keep: [C], the channels of the output that stay.
            read: [C_in], the same of the input.
        """
        return array[keep]

    def constant(self, arrays: Arrays, sources: Sequence[Vector], width: int) -> Vector:
        """Values of its `width` channels when all it reads is constant and γ is 0; 0 where they are no constants.

        Args:
            arrays: its tensors.
            sources: the constants it reads, one vector a source.
            width: of its output.
        """
        import numpy as np

        return np.zeros(width)

    def hands_on(self) -> bool:
        """Whether a constant channel that it reads adds a constant to its output, whatever its other channels are."""
        return getattr(self, "activation", "linear") == "linear"

    def take_up(self, arrays: Arrays, read: Vector) -> Arrays:
        """The tensors that change so that the block adds what the constants `read` [C_in] would have added."""
        return {}

    def macs(self, channels: int, output: Shape) -> int:
        """Multiply-adds."""
        return 0

    def operations(self, output: Shape) -> int:
        """What AlexeyAB/darknet counts beside multiply-adds."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Net(Block):
    """`[net]` or `[network]`: the input."""

    width: int = key(Integer(1, 65536), default=416)
    height: int = key(Integer(1, 65536), default=416)
    channels: int = key(Integer(1, 1024), 3)

    SILENT = (
        "B1 B2 adam adversarial_lr angle aspect attention augment_speed badlabels_rejection_percentage batch blur "
        "burn_in contrastive contrastive_color contrastive_jit_flip cutmix decay dynamic_minibatch ema_alpha eps "
        "equidistant_point exposure flip gamma gaussian_noise hue inputs label_smooth_eps learning_rate "
        "learning_rate_min letter_box loss_scale max_batches max_chart_loss max_crop min_crop mixup momentum mosaic "
        "mosaic_bound num_sigmas_reject_badlabels optimized_memory policy power resize_step saturation scale scales "
        "seq_scales sequential_subdivisions sgdr_cycle sgdr_mult show_receptive_field step steps subdivisions "
        "time_steps track try_fix_nan unsupervised use_cuda_graph weights_reject_freq workspace_size_limit_MB"
    )


@dataclass(frozen=True)
class Network:
    """A parsed cfg: the input and the blocks."""

    net: Net
    blocks: tuple[Block, ...]
    path: str = field(default="", compare=False)
    """File the blocks were read from, for messages."""

    @property
    def image(self) -> Shape:
        """Shape of the input."""
        return Shape(self.net.channels, self.net.height, self.net.width)

    @property
    def heads(self) -> tuple[int, ...]:
        """Block numbers of the `[yolo]` blocks, in the order of the cfg."""
        return tuple(i for i, block in enumerate(self.blocks) if block.IS_HEAD)

    @property
    def yolos(self) -> tuple[Any, ...]:
        """The `[yolo]` blocks, in the order of the cfg."""
        return tuple(block for block in self.blocks if block.IS_HEAD)

    @property
    def classes(self) -> int:
        """Number of classes; the same in every head."""
        return self.yolos[0].classes

    def where(self, block: int) -> str:
        """Place of a block for a message: `block 84 (cfg/tiny.cfg:512)`."""
        line = self.blocks[block].line
        return f"block {block} ({self.path}:{line})" if self.path and line else f"block {block}"


def activated(activation: str, x: Vector) -> Vector:
    """An activation on numbers."""
    import numpy as np

    def logistic(x: Vector) -> Vector:
        return np.exp(-np.logaddexp(0, -x))

    functions: Mapping[str, Callable[[Vector], Vector]] = {
        "linear": lambda x: x,
        "leaky": lambda x: np.where(x > 0, x, 0.1 * x),
        "relu": lambda x: np.maximum(x, 0),
        "relu6": lambda x: np.clip(x, 0, 6),
        "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
        "swish": lambda x: x * logistic(x),
        "logistic": logistic,
        "h_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
        "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    }
    return functions[activation](x)


def windows(block: Any, image: Shape, padding: int, reach: int) -> Iterator[int]:
    """Positions, down and across, of a window that reaches over `reach` of the cells with `padding` more."""
    for side, stride in ((image.height, block.stride_y), (image.width, block.stride_x)):
        cells = side + padding
        if cells < reach:
            text = f"the window reaches over {reach} cells, but the input has {cells} with its padding"
            raise SectionError(text, "size")
        yield (cells - reach) // stride + 1


def written_strides(block: Any) -> Values:
    """`stride` for both where they are equal."""
    if block.stride_x == block.stride_y:
        return {"stride": block.stride_x, "stride_x": None, "stride_y": None}
    return {}


class Trail:
    """The blocks passed so far and the shapes they put out."""

    def __init__(self, image: Shape) -> None:
        self.image = image
        self.blocks: list[Block] = []
        self.shapes: list[Shape] = []
        self.classes: int | None = None
        """Of the heads passed so far."""

    @property
    def before(self) -> Shape:
        """What the next block reads unless it names its sources."""
        return self.shapes[-1] if self.shapes else self.image

    def add(self, block: Block) -> None:
        """Pass a block.

        Raises:
            SectionError: it cannot work on what it reads.
        """
        if self.blocks and self.blocks[-1].IS_HEAD and block.SECTION != "route":
            raise SectionError(f"block {len(self.blocks)} follows a [yolo], which ends a branch; go on from a [route]")
        self.shapes.append(block.shape(self))
        self.blocks.append(block)
        self.classes = getattr(block, "classes", self.classes)

    def read(self, sources: Sequence[int], key: str) -> list[Shape]:
        """Shapes of the blocks that the next block names in `key`; one that it cannot read is refused."""
        index = len(self.blocks)
        for source in sources:
            if not 0 <= source < index:
                allowed = f"blocks 0..{index - 1} can be read" if index else "the first block has none to read"
                what = "the block itself" if source == index else "a later block" if source > index else "no block"
                raise SectionError(f"block {index} reads block {source}, which is {what}; {allowed}", key)
            if self.blocks[source].IS_HEAD:
                raise SectionError(f"block {source} is a [yolo], which ends a branch; read the block before it", key)
        return [self.shapes[source] for source in sources]

    def check_cells(self, source: int, want: Shape, key: str) -> None:
        """Refuse a source of another height and width than `want`; blame the input's size where that explains it."""
        shape = self.shapes[source]
        if shape[1:] == want[1:]:
            return
        self.image.check_sides(round(max(map(max, steps(self.blocks)))))
        raise SectionError(
            f"block {source} has {shape.height} x {shape.width} cells, but {want.height} x {want.width} are needed, "
            "as only maps of one size go together",
            key,
        )


def steps(blocks: Sequence[Block]) -> list[tuple[Fraction | int, Fraction | int]]:
    """Pixels of the network input per cell of every block, x and y."""
    passed: list[tuple[Fraction | int, Fraction | int]] = []
    for index, block in enumerate(blocks):
        basis = block.basis(index)
        x, y = (1, 1) if basis < 0 else passed[basis]
        step_x, step_y = block.step()
        passed.append((x * step_x, y * step_y))
    return passed


@dataclass(frozen=True)
class Tie:
    """Channels of two blocks that go together because of a third."""

    reason: str
    at: int
    """The block that ties."""
    one: int
    other: int
    """The blocks whose outputs it reads; the same for a split."""


@dataclass(frozen=True)
class Pin:
    """Channels that stay, whatever is pruned."""

    block: int
    """The block whose output they are."""
    reason: str


class Labeling:
    """The labels so far, as a forest: channels with one root have one label.

    Args:
        channels: of the image.
    """

    def __init__(self, channels: int) -> None:
        self.parents: list[int] = []
        self.outputs: list[list[int]] = []
        self.image = self.new(channels)
        self.ties: list[Tie] = []
        self.pins: list[Pin] = [Pin(IMAGE, "is the image")]
        self.residual: list[int] = []
        """Labels that shortcuts tie."""

    def output(self, index: int) -> list[int]:
        """Labels of a block's output; of the image for -1."""
        return self.image if index == IMAGE else self.outputs[index]

    def new(self, channels: int) -> list[int]:
        """Labels that are nobody else's."""
        start = len(self.parents)
        self.parents += range(start, start + channels)
        return list(range(start, start + channels))

    def pin(self, block: int, reason: str) -> None:
        """Keep the channels of a block."""
        self.pins.append(Pin(block, reason))

    def tie(self, reason: str, at: int, one: int, other: int) -> list[int]:
        """Tie the channels that two blocks have in common: all, or those of the narrower one, which are returned."""
        self.ties.append(Tie(reason, at, one, other))
        self.join(self.output(one), self.output(other))
        return self.output(one)[: len(self.output(other))]

    def join(self, ones: Sequence[int], others: Sequence[int]) -> None:
        """Make labels equal, one by one."""
        for one, other in zip(ones, others, strict=False):
            one, other = self.root(one), self.root(other)
            self.parents[max(one, other)] = min(one, other)

    def root(self, label: int) -> int:
        """The label that all equal ones lead to."""
        while self.parents[label] != label:
            self.parents[label] = self.parents[self.parents[label]]
            label = self.parents[label]
        return label
