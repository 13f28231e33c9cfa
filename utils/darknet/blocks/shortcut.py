"""`[shortcut]`."""

from __future__ import annotations

from dataclasses import dataclass

from utils.darknet.blocks.block import ACTIVATION, LONGEST_READ, SOURCE, Block, Key, Place, Shape, Trail, Values, key
from utils.darknet.blocks.values import Choice, List

SHORTCUT_EPSILON = 1e-4
"""Added to the sum that normalised weights of a shortcut are divided by (src/blas.c, `shortcut_multilayer_cpu`)."""
WEIGHTS_TYPE = Choice(("none", "per_feature", "per_channel"), {"per_layer": "per_feature"})
NORMALIZATION = Choice(("none", "relu", "softmax"), {"avg_relu": "relu"})


@dataclass(frozen=True, kw_only=True)
class Shortcut(Block):
    """Sum of the previous block and `sources`; the common channels are added, the width is the previous block's."""

    from_ = Key(List(SOURCE, LONGEST_READ))
    sources: tuple[int, ...]
    """`from` in the cfg."""
    weights_type: str = key(WEIGHTS_TYPE, "none", optional=True)
    """none, per_feature (one weight an input) or per_channel (one weight an input and channel)."""
    weights_normalization: str = key(NORMALIZATION, "none", optional=True)
    """none, relu or softmax, over the inputs."""
    activation: str = key(ACTIVATION, "linear")

    @classmethod
    def read(cls, values: Values, place: Place) -> Block:
        """References become absolute."""
        return cls(sources=tuple(map(place.absolute, values.pop("from"))), **values)

    def written(self, place: Place) -> Values:
        """References become relative."""
        return vars(self) | {"from": [source - place.index for source in self.sources]}

    def reads(self, index: int) -> tuple[int, ...]:
        """The previous block, whose width wins, then the sources."""
        return (index - 1, *self.sources)

    def shape(self, trail: Trail) -> Shape:
        """That of the previous block."""
        trail.read(self.sources, "from")
        for source in self.sources:
            trail.check_cells(source, trail.before, "from")
        return trail.before

    def tensors(self, channels: int) -> list[tuple[str, tuple[int, ...]]]:
        """The weights, if it has some."""
        inputs = 1 + len(self.sources)
        shapes = {"per_feature": (inputs,), "per_channel": (inputs, channels)}
        return [("weights", shapes[self.weights_type])] if self.weights_type in shapes else []

    def operations(self, output: Shape) -> int:
        """One for each value that is added."""
        return len(self.sources) * output.channels * output.height * output.width
