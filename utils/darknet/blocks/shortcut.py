"""`[shortcut]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from utils.darknet.blocks.block import (
    ACTIVATION,
    Array,
    Arrays,
    Block,
    Keep,
    Key,
    Labeling,
    Position,
    Shape,
    Trail,
    Values,
    Vector,
    activated,
    key,
)
from utils.darknet.blocks.values import LONGEST_READ, SOURCE, Choice, List

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
    def read(cls, values: Values, position: Position) -> Block:
        """References become absolute."""
        return cls(sources=tuple(map(position.absolute, values.pop("from"))), **values)

    def key_values(self, position: Position) -> Values:
        """References become relative."""
        return vars(self) | {"from": [source - position.number for source in self.sources]}

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
        """One for each value that is added, two with weights."""
        each = 1 if self.weights_type == "none" else 2
        return each * len(self.sources) * output.channels * output.height * output.width

    def label(self, index: int, labels: Labeling) -> list[int]:
        """Those of the previous block, tied to the sources' as far as both have channels."""
        for source in self.sources:
            labels.residual += labels.tie("added by the shortcut", index, index - 1, source)
        return labels.output(index - 1)

    def pruned(self, width: int, channels: int, moved: Callable[[int], int]) -> Block:
        """The sum of the blocks that stay."""
        return replace(self, sources=tuple(map(moved, self.sources)))

    def sliced(self, name: str, array: Array, keep: Keep, read: Keep) -> Array:
        """One weight a channel, or one for all."""
        return array[..., keep] if array.ndim > 1 else array

    def constant(self, arrays: Arrays, sources: Sequence[Vector], width: int) -> Vector:
        """The weighted sum."""
        import numpy as np

        scales = self.scales(arrays.get("weights"))
        scales = np.broadcast_to(1.0 if scales is None else scales, (len(sources), width))
        total = np.zeros(width)
        for source, scale in zip(sources, scales, strict=True):
            common = min(width, len(source))
            total[:common] += scale[:common] * source[:common]
        return activated(self.activation, total)

    def scales(self, weights: Array | None) -> Array | None:
        """Normalised weights [inputs, C or 1], as `models.Addition` computes them; None without weights."""
        import numpy as np

        if weights is None:
            return None
        weights = weights.reshape(len(weights), -1)
        if self.weights_normalization == "none":
            return weights
        softmax = self.weights_normalization == "softmax"
        weights = np.exp(weights - weights.max(axis=0)) if softmax else np.maximum(weights, 0)
        return weights / (weights.sum(axis=0) + SHORTCUT_EPSILON)
