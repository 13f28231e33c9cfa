"""Random Darknet networks as cfg text: a hypothesis strategy for the laws of the channel graph and of pruning."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from utils.darknet.blocks import ACTIVATIONS, Network
from utils.darknet.blocks.block import PLAIN_ACTIVATION
from utils.darknet.cfg import parse
from utils.darknet.targets import HARDWARE

SHIFTABLE = tuple(name for name in ACTIVATIONS if name not in HARDWARE["fpga"].lacks)
"""Activations that an FPGA computes with shifts and additions."""
WIDTHS = (1, 2, 3, 4, 4, 5, 6, 6, 8, 8, 8, 9, 12, 12)
"""Of convolutions."""
WIDEST_ROUTE = 24
HEAD = "[convolutional]\nfilters={}\nactivation=linear\n[yolo]\nmask={}\nnum=3\nanchors=4,4,8,8,12,10\nclasses=1\n"
EXACT_PIECES = (
    *("convolution", "depthwise", "shortcut", "shortcut", "unit", "unit", "units"),
    *("route", "pyramid", "upsample", "pool", "dropout", "branch", "head"),
)
SHIFT_PIECES = (*EXACT_PIECES, "narrowing", "sam", "reorg")
PIECES = (*EXACT_PIECES, "narrowing", "squeeze", "scale", "sam", "reorg")


@st.composite
def networks(draw: st.DrawFn, exact: bool = False, shifts: bool = False) -> Network:
    """A network of at most 26 blocks, whose convolutions have at most 12 channels.

    Args:
        draw: of hypothesis.
        exact: draw only what hands a constant on exactly: 1 × 1 kernels with a bias or batch normalisation, sums
            without a curve, no gates and no reorg.
        shifts: draw only what an FPGA computes.
    """
    sketch = _Sketch(draw, exact, SHIFTABLE if shifts else ACTIVATIONS)
    sketch.convolution()
    wanted = draw(st.integers(4, 14))
    while len(sketch.maps) < wanted:
        getattr(sketch, draw(st.sampled_from(EXACT_PIECES if exact else SHIFT_PIECES if shifts else PIECES)))()
    sketch.final_head()
    return parse("\n".join(sketch.sections), "random.cfg", warn=lambda text: None)


class _Sketch:
    """The sections so far, and what every block puts out."""

    def __init__(self, draw: st.DrawFn, exact: bool, activations: Sequence[str]) -> None:
        self.draw, self.exact, self.activations = draw, exact, activations
        side = draw(st.sampled_from((32, 32, 48, 64)))
        channels = draw(st.sampled_from((3, 3, 1)))
        self.sections = [f"[net]\nwidth={side}\nheight={side}\nchannels={channels}\n"]
        self.image = (channels, side)
        self.maps: list[tuple[int, int] | None] = []
        """Channels and side; None for a head."""

    @property
    def last(self) -> tuple[int, int]:
        return self.maps[-1] if self.maps else self.image

    def add(self, section: str, channels: int | None = None, side: int | None = None) -> None:
        """Of the shape of the block before unless another one is given."""
        self.sections.append(section)
        self.maps.append((channels or self.last[0], side or self.last[1]))

    def any_of(self, *values: object) -> object:
        return self.draw(st.sampled_from(values))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def sources(self, side: int, channels: int | None = None) -> list[int]:
        """Blocks with maps of this side, and of this width if one is given."""
        fits = (
            self.maps[i] is not None and self.maps[i][1] == side and channels in (None, self.maps[i][0])
            for i in range(len(self.maps))
        )
        return [i for i, fit in enumerate(fits) if fit]

    def reference(self, block: int) -> str:
        """A block as a cfg names it: relative, or by its number."""
        return str(block - len(self.maps) if block == 0 or self.draw(st.booleans()) else block)

    def references(self, blocks: Sequence[int]) -> str:
        return ",".join(map(self.reference, blocks))

    def convolution(self, filters: int | None = None, **keys: object) -> None:
        """Any convolution that leaves the side, unless `keys` say more."""
        channels, side = self.last
        filters = filters or self.any_of(*WIDTHS)
        size = 1 if self.exact else self.any_of(1, 3)
        drawn: dict[str, object] = {"size": size, "pad": 1, "activation": self.any_of(*self.activations)}
        groups = [g for g in range(2, channels + 1) if channels % g == filters % g == 0]
        if groups and self.number(0, 11) == 0:
            drawn["groups"] = self.any_of(*groups)
        if self.number(0, 9):
            drawn["batch_normalize"] = 1
        elif not self.exact and self.number(0, 3) == 0:
            drawn["bias"] = 0
        drawn |= keys
        lines = "".join(f"{key}={value}\n" for key, value in drawn.items())
        padding = int(drawn["size"]) // 2 if drawn["pad"] else 0
        side = (side + 2 * padding - int(drawn["size"])) // int(drawn.get("stride", 1)) + 1
        self.add(f"[convolutional]\nfilters={filters}\n{lines}", filters, side)

    def depthwise(self) -> None:
        """One filter a channel: as a grouped convolution, or as a section of its own."""
        channels, size = self.last[0], 1 if self.exact else 3
        if self.draw(st.booleans()) and channels > 1:
            self.convolution(channels, groups=channels, size=size, batch_normalize=self.number(0, 1))
            return
        keys = f"size={size}\npad=1\nbatch_normalize={self.number(0, 1)}\n"
        self.add(f"[depthwise]\n{keys}activation={self.any_of(*self.activations)}\n")

    def narrowing(self) -> None:
        """A convolution of stride 2, or without padding."""
        side = self.last[1]
        if side % 2 == 0 and side >= 8:
            self.convolution(size=3, stride=2)
        elif side >= 5:
            self.convolution(size=3, pad=0)

    def pool(self) -> None:
        """A max pool of stride 2."""
        side = self.last[1]
        if side % 2 == 0 and side >= 8:
            self.add("[maxpool]\nsize=2\nstride=2\n", side=side // 2)

    def shortcut(self) -> None:
        """To one or several blocks of any width; weighted or behind a curve, too."""
        others = [block for block in self.sources(self.last[1]) if block != len(self.maps) - 1]
        if not others:
            return
        chosen = self.draw(st.lists(st.sampled_from(others), min_size=1, max_size=3, unique=True))
        keys = f"from={self.references(chosen)}\n"
        if not self.exact:
            keys += f"activation={self.any_of('linear', 'linear', *self.activations)}\n"
        weighted = () if self.activations is SHIFTABLE else ("per_feature", "per_channel")
        keys += f"weights_type={self.any_of('none', 'none', 'none', *weighted)}\n"
        keys += f"weights_normalization={self.any_of('none', 'relu', 'softmax')}\n"
        self.add(f"[shortcut]\n{keys}")

    def unit(self, inner: bool = False) -> None:
        """A residual unit of up to three blocks, perhaps with another one in it; behind a curve it is none."""
        source, channels = len(self.maps) - 1, self.last[0]
        for _ in range(self.number(0, 2)):
            kind = self.number(0, 2 if inner else 3)
            if kind == 3:
                self.unit(inner=True)
            else:
                (self.convolution, self.convolution, self.depthwise)[kind]()
        groups = channels if self.last[0] == channels > 1 and self.number(0, 2) == 0 else 1
        self.convolution(channels, batch_normalize=1, groups=groups)
        if self.number(0, 5) == 0:
            self.dropout()
        curve = "leaky" if not self.exact and self.number(0, 5) == 0 else "linear"
        self.add(f"[shortcut]\nfrom={self.reference(source)}\nactivation={curve}\n")

    def units(self) -> None:
        """Two residual units in a row, and their sum read from afar."""
        self.unit(inner=True)
        self.unit(inner=True)
        both = len(self.maps) - 1
        self.convolution()
        layers = self.references([len(self.maps) - 1, both])
        self.add(f"[route]\nlayers={layers}\n", self.last[0] + self.maps[both][0])

    def route(self) -> None:
        """Of one to four blocks, or of a part of each."""
        chosen = self.draw(st.lists(st.sampled_from(self.sources(self.last[1])), min_size=1, max_size=4))
        while sum(self.maps[block][0] for block in chosen) > WIDEST_ROUTE and len(chosen) > 1:
            chosen.pop()
        total = sum(self.maps[block][0] for block in chosen)
        groups = self.any_of(1, *(g for g in (2, 3, 4) if all(self.maps[block][0] % g == 0 for block in chosen)))
        split = f"groups={groups}\ngroup_id={self.number(0, groups - 1)}\n" if groups > 1 else ""
        self.add(f"[route]\nlayers={self.references(chosen)}\n{split}", total // groups)

    def branch(self) -> None:
        """Go on from any block."""
        block = self.any_of(*(i for i, shape in enumerate(self.maps) if shape))
        self.add(f"[route]\nlayers={self.reference(block)}\n", *self.maps[block])

    def pyramid(self) -> None:
        """Max pools of stride 1 beside what they pool."""
        channels, start = self.last[0], len(self.maps) - 1
        pools = []
        for size in self.any_of((2,), (5,), (3, 5)):
            if pools:
                self.add(f"[route]\nlayers={self.reference(start)}\n")
            pools.append(len(self.maps))
            self.add(f"[maxpool]\nsize={size}\nstride=1\n")
        self.add(f"[route]\nlayers={self.references([*reversed(pools), start])}\n", channels * (1 + len(pools)))
        self.convolution()

    def upsample(self) -> None:
        """Back to the size before, beside an earlier map if there is one."""
        if 2 * self.last[1] > self.image[1]:
            self.pool()
        channels, side = self.last
        if 2 * side > self.image[1]:
            return
        others = self.sources(2 * side)
        self.add("[upsample]\nstride=2\n", channels, 2 * side)
        if others:
            other = self.any_of(*others)
            layers = self.references([len(self.maps) - 1, other])
            self.add(f"[route]\nlayers={layers}\n", channels + self.maps[other][0], 2 * side)

    def dropout(self) -> None:
        """The identity."""
        self.add("[dropout]\nprobability=.3\n")

    def squeeze(self) -> None:
        """[se]."""
        self.add(f"[se]\nreduction={self.number(1, self.last[0])}\n")

    def scale(self) -> None:
        """The channel attention of EfficientNet: an average, two convolutions, a product."""
        source, (channels, side) = len(self.maps) - 1, self.last
        self.add("[avgpool]\n", side=1)
        if self.number(0, 3):
            self.convolution(self.number(1, 4), size=1)
            self.convolution(channels, size=1)
            if self.number(0, 5) == 0:
                self.dropout()
        curve = self.any_of(*PLAIN_ACTIVATION.words)
        self.add(f"[scale_channels]\nfrom={self.reference(source)}\nactivation={curve}\n", side=side)

    def sam(self) -> None:
        """A product of two maps of one shape."""
        source, (channels, side) = len(self.maps) - 1, self.last
        self.convolution(channels)
        source = self.any_of(source, source, *self.sources(side, channels))
        self.add(f"[sam]\nfrom={self.reference(source)}\n")

    def reorg(self) -> None:
        """Space to depth."""
        channels, side = self.last
        if side % 2 == 0 and side >= 8:
            if channels % 4 or channels > 12:
                channels = self.any_of(4, 8)
                self.convolution(channels)
            self.add("[reorg]\nstride=2\n", 4 * channels, side // 2)
            self.convolution()

    def head(self) -> None:
        """A head, at most one before the last, and on from anywhere."""
        if None not in self.maps:
            self.final_head()
            self.branch()

    def final_head(self) -> None:
        """A head of one or two anchors."""
        mask = self.any_of((0,), (1, 2))
        self.add(HEAD.format(6 * len(mask), ",".join(map(str, mask))), 6 * len(mask))
        self.maps.append(None)
