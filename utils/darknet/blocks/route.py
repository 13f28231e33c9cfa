"""`[route]`."""

from __future__ import annotations

from dataclasses import dataclass

from utils.darknet.blocks.block import COUNT, LONGEST_READ, Block, Place, Shape, Trail, Values, key
from utils.darknet.blocks.values import Integer, List, Reference, SectionError

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
    def read(cls, values: Values, place: Place) -> Block:
        """References become absolute."""
        return cls(**values | {"layers": tuple(map(place.absolute, values["layers"]))})

    def written(self, place: Place) -> Values:
        """References to near blocks become relative."""
        near = [layer - place.index if layer >= place.index - NEAR else layer for layer in self.layers]
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
