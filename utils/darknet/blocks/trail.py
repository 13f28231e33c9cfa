"""What the blocks passed so far put out: shapes, and labels of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from utils.darknet.blocks.block import Block, Shape
from utils.darknet.blocks.values import SectionError

IMAGE = -1
"""Block number of the network's input."""


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
        self.classes = block.classes if block.IS_HEAD else self.classes

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
