"""`[route]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.darknet.blocks.block import Arrays, Block, Key, Labeling, Position, Shape, Trail, Values, Vector, key
from utils.darknet.blocks.values import COUNT, LONGEST_READ, Integer, List, Reference, SectionError

NEAR = 16
"""A route to one of the last 16 blocks is written relative (`-4`), one further back absolute (`61`)."""


@dataclass(frozen=True, kw_only=True)
class Route(Block):
    """Concatenation of the `group_id`-th of `groups` channel slices of each source."""

    layers: tuple[int, ...] = key(List(Reference(), LONGEST_READ))
    groups: int = key(COUNT, 1, optional=True)
    group_id: int = key(Integer(), 0, optional=True)

    SILENT = "stream wait_stream"

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """References become absolute."""
        return cls(**values | {"layers": tuple(map(position.absolute, values["layers"]))})

    def key_values(self, position: Position) -> Values:
        """References to near blocks become relative."""
        near = [layer - position.number if layer >= position.number - NEAR else layer for layer in self.layers]
        return vars(self) | {"layers": near}

    def reads(self, index: int) -> tuple[int, ...]:
        """The concatenated blocks, in order."""
        return self.layers

    def shape(self, trail: Trail) -> Shape:
        """The slices one after the other."""
        shapes = trail.read(self.layers, "layers")
        if self.group_id >= self.groups:
            raise SectionError(f"0..{self.groups - 1} is allowed, as groups is {self.groups}", "group_id")
        for layer, shape in zip(self.layers, shapes, strict=True):
            trail.check_cells(layer, shapes[0], "layers")
            if shape.channels % self.groups:
                raise SectionError(
                    f"the {shape.channels} channels of block {layer} cannot be split into {self.groups} equal groups",
                    "groups",
                )
        return Shape(sum(shape.channels for shape in shapes) // self.groups, *shapes[0][1:])

    def label(self, index: int, labels: Labeling) -> list[int]:
        """Those of the slices, one after the other."""
        return [label for source in self.layers for label in self._slice(index, source, labels)]

    def _slice(self, index: int, source: int, labels: Labeling) -> list[int]:
        """What it takes of a source. Parts of equal width stay so: their channels go together, one of each."""
        output = labels.output(source)
        if self.groups == 1:
            return output
        width = len(output) // self.groups
        parts = [output[start : start + width] for start in range(0, width * self.groups, width)]
        labels.tie("split into equal parts by the route", index, source, source)
        for other in parts[1:]:
            labels.join(parts[0], other)
        return parts[self.group_id]

    def pruned(self, width: int, channels: int, moved: Callable[[int], int]) -> Block:
        """The same of the blocks that stay."""
        return replace(self, layers=tuple(map(moved, self.layers)))

    def constant(self, arrays: Arrays, sources: Sequence[Vector], width: int) -> Vector:
        """Those of the slices."""
        import numpy as np

        return np.concatenate([np.split(source, self.groups)[self.group_id] for source in sources])


class RouteLhalf(Route):
    """`[route_lhalf]` of WongKinYiu's PyTorch_YOLOv4, as it is read: a `Route` of the first half of each source."""

    groups: Any = Key(Integer(2, 2), 2)
    group_id: Any = Key(Integer(0, 0), 0)

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """A `Route`."""
        return Route.read(values, position)
