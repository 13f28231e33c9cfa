"""What of a student answers to what of its teacher: heads by stride and anchors, features by their role; no torch.

The suites this one follows take features by their place in a list, which holds for networks with equal blocks only.
Here the roles are told from the cfg, so that pruned, layer-pruned and quite different students can be taught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from utils.darknet.blocks import Avgpool, Convolutional, Network, Reorg, Upsample, Yolo
from utils.darknet.shapes import trace
from utils.distillation.strategies import SEES, Lesson, See
from utils.errors import InputError

LEAST_ANCHOR_IOU = 0.5
"""Two anchors whose shapes overlap less say nothing of each other's boxes."""
BACKBONE, DEEP, NECK = "backbone", "deep", "neck"
"""Groups of features: Chu et al. (arXiv:2306.01526) weight the backbone, what is at the largest stride, and the rest
before the heads apart."""
SPREAD = See.MAPS | See.MAGNITUDES
"""Where a feature is strong."""
Kept = Mapping[str, Mapping[str, Any]]
"""Where the convolutions of a pruned network come from; see `pruning.record.kept`."""


class Feature(NamedTuple):
    """The output of a block that has a role in every network of the family."""

    role: str
    """`stage`: what the backbone's next downsampling reads; `upsampled`: what an upsampling reads; `head`: what the
    last convolution of a head reads."""
    stride: float
    block: int
    group: str


@dataclass(frozen=True)
class FeaturePair:
    """A feature of the student and the teacher's."""

    name: str
    group: str
    student: int
    teacher: int
    """Blocks."""
    widths: tuple[int, int]
    """Channels of both."""
    channels: tuple[int, ...] | None
    """The teacher's channels that the student's were made from, in its order; None: not known."""

    @property
    def key(self) -> str:
        """Name of its adapter; that of a module has no points, and not every stride is a whole number."""
        return self.name.replace(".", "_")

    @property
    def compares_channels(self) -> bool:
        """Whether its channels can be compared one by one: those of the backbone are concatenations and sums."""
        return self.group != BACKBONE

    @property
    def needs_adapter(self) -> bool:
        """Whether the student's channels must be mapped onto the teacher's first."""
        return self.compares_channels and self.channels is None and self.widths[0] != self.widths[1]


@dataclass(frozen=True)
class HeadPair:
    """A head of the student and the teacher's, by their places among the heads."""

    student: int
    teacher: int
    anchors: tuple[tuple[int, int], ...]
    """Places of an anchor in the student's head and of the one in the teacher's that is most like it."""


@dataclass(frozen=True)
class Pairing:
    """All that a strategy compares."""

    heads: tuple[HeadPair, ...]
    features: tuple[FeaturePair, ...]
    notes: tuple[str, ...]
    """What could not be paired, to be said."""


def rebased(kept: Kept, teacher: Kept) -> Kept:
    """Where a pruned student comes from in a teacher that was pruned before, too, and not in what both come from.

    Args:
        kept: of the student.
        teacher: of the teacher, from the same network.

    Returns:
        `kept` by the teacher's numbers of blocks and channels, without convolutions that have what the teacher lacks.
    """
    blocks = {origin["block"]: (int(number), origin["channels"]) for number, origin in teacher.items()}
    found = {}
    for number, origin in kept.items():
        block, channels = blocks.get(origin["block"], (None, ()))
        place = {channel: i for i, channel in enumerate(channels)}
        if place.keys() >= set(origin["channels"]):
            found[number] = {"block": block, "channels": [place[channel] for channel in origin["channels"]]}
    return found


def features(network: Network) -> tuple[Feature, ...]:
    """The features of a network that have a role, in the order of its blocks.

    In YOLOv4 these are the transition convolutions of the backbone, the convolutions before the two upsamplings and
    those before the detection convolutions: the nine that Chu et al. list by number.
    """
    strides = [network.net.height / shape.height for shape in trace(network)]
    blocks = network.blocks
    first = next((i for i, block in enumerate(blocks) if isinstance(block, Upsample)), len(blocks))
    stages = {}
    for i, block in enumerate(blocks[:first]):
        if not isinstance(block, Avgpool | Reorg):
            sources = [source for source in block.reads(i) if source >= 0]
            stages |= {strides[source]: source for source in sources if 1 < strides[source] < strides[i]}
    heads = [blocks[i - 1].reads(i - 1)[0] for i in network.heads]
    deepest = max(strides[i - 1] for i in network.heads)
    upsampled = [block.reads(i)[0] for i, block in enumerate(blocks) if isinstance(block, Upsample)]
    found = [Feature("stage", stride, block, BACKBONE) for stride, block in stages.items() if stride < deepest]
    for role, members in (("upsampled", upsampled), ("head", heads)):
        found += [Feature(role, strides[i], i, DEEP if strides[i] >= deepest else NECK) for i in members if i >= 0]
    return tuple(sorted(found, key=lambda feature: feature.block))


def understood(lesson: Lesson, student: Network, teacher: Network) -> tuple[Lesson, tuple[str, ...]]:
    """What a student can learn of a lesson from a teacher of other classes, whose objects are others, too.

    Returns:
        The lesson without scores, if the class counts differ, and what is left out, to be said.

    Raises:
        InputError: nothing is left.
    """
    if student.classes == teacher.classes:
        return lesson, ()
    left = {term: weight for term, weight in lesson.terms.items() if not SEES[term] & See.SCORES}
    counts = f"{teacher.path or 'the teacher'} has {teacher.classes} classes and the student {student.classes}"
    if not left:
        raise InputError(f"{lesson.name}: compares scores, but {counts}; boxes and features can be learnt from it: "
                         "--KDstr 3, 4 or 5, cwd or pkd, or --AT_str")  # fmt: skip
    gone = ", ".join(term for term in lesson.terms if term not in left)
    notes = (f"{counts}: {gone} left out",) if gone else ()
    return replace(lesson, terms=left), notes


def pair(student: Network, teacher: Network, lesson: Lesson, kept: Kept | None = None) -> Pairing:
    """What a lesson can compare.

    Args:
        student: network that is trained.
        teacher: network it learns from.
        lesson: tells whether heads, features or both are wanted.
        kept: of a student that was pruned.

    Raises:
        InputError: the inputs differ, or nothing can be compared.
    """
    if student.net.channels != teacher.net.channels:
        raise InputError(f"{teacher.path or 'the teacher'}: takes pictures of {teacher.net.channels} channels, the "
                         f"student of {student.net.channels}")  # fmt: skip
    heads, notes = _head_pairs(student, teacher, lesson) if lesson.sees(See.SCORES | See.BOXES) else ((), [])
    wanted = lesson.sees(SPREAD | See.CHANNELS)
    pairs, more = _feature_pairs(student, teacher, lesson, kept) if wanted else ((), [])
    return Pairing(heads, pairs, tuple(notes + more))


def _head_pairs(student: Network, teacher: Network, lesson: Lesson) -> tuple[tuple[HeadPair, ...], list[str]]:
    strides = [_head_strides(network) for network in (student, teacher)]
    pairs, notes = [], []
    for place, stride in enumerate(strides[0]):
        yolo = student.yolos[place]
        number = strides[0][:place].count(stride)
        same = [i for i, other in enumerate(strides[1]) if other == stride]
        if number >= len(same):
            notes.append(f"the student's head at stride {stride:g} has none in the teacher and learns from the data")
            continue
        other = same[number]
        anchors = _anchor_pairs(yolo.head_anchors, teacher.yolos[other].head_anchors)
        if len(anchors) < len(yolo.head_anchors):
            notes.append(f"head at stride {stride:g}: {len(anchors)} of {len(yolo.head_anchors)} anchors are like one "
                         "of the teacher's; the others learn from the data")  # fmt: skip
        if "vector" in lesson.terms and not _decoded_alike(yolo, teacher.yolos[other], anchors):
            raise InputError(f"{lesson.name}: compares raw boxes, which need the teacher's anchors and scale_x_y; take "
                             "--kd-weighting normalised, or another strategy")  # fmt: skip
        if anchors:
            pairs.append(HeadPair(place, other, anchors))
    used = {pair.teacher for pair in pairs}
    notes += [f"the teacher's head at stride {stride:g} has none in the student and teaches nothing"
              for place, stride in enumerate(strides[1]) if place not in used]  # fmt: skip
    if not pairs:
        raise InputError(f"{lesson.name}: no head of the student has stride and anchors like one of the teacher")
    return tuple(pairs), notes


def _decoded_alike(mine: Yolo, theirs: Yolo, anchors: Sequence[tuple[int, int]]) -> bool:
    """Whether equal raw outputs mean equal boxes."""
    return (mine.scale_x_y, mine.new_coords) == (theirs.scale_x_y, theirs.new_coords) and all(
        mine.head_anchors[a] == theirs.head_anchors[b] for a, b in anchors
    )


def _head_strides(network: Network) -> list[float]:
    shapes = trace(network)
    return [network.net.height / shapes[i].height for i in network.heads]


def _anchor_pairs(
    mine: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]
) -> tuple[tuple[int, int], ...]:
    """One to one, the most alike first."""
    alike = sorted(
        ((-_shape_iou(a, b), i, j) for i, a in enumerate(mine) for j, b in enumerate(theirs)),
    )
    taken: dict[int, int] = {}
    for negative, i, j in alike:
        if -negative >= LEAST_ANCHOR_IOU and i not in taken and j not in taken.values():
            taken[i] = j
    return tuple(sorted(taken.items()))


def _shape_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    overlap = min(a[0], b[0]) * min(a[1], b[1])
    return overlap / (a[0] * a[1] + b[0] * b[1] - overlap)


def _feature_pairs(
    student: Network, teacher: Network, lesson: Lesson, kept: Kept | None
) -> tuple[tuple[FeaturePair, ...], list[str]]:
    theirs = {key: feature for key, feature in _keyed(teacher)}
    shapes = trace(student), trace(teacher)
    pairs, missing = [], []
    for key, feature in _keyed(student):
        if key not in theirs:
            missing.append(key)
            continue
        block = theirs[key].block
        widths = shapes[0][feature.block].channels, shapes[1][block].channels
        channels = None if kept is None else _kept_channels(student, teacher, feature.block, block, kept)
        pairs.append(FeaturePair(key, feature.group, feature.block, block, widths, channels))
    if not lesson.sees(SPREAD):
        pairs = [pair for pair in pairs if pair.group != BACKBONE]
        missing = [key for key in missing if not key.startswith("stage")]
    if not pairs:
        raise InputError(f"{lesson.name}: the student has no features at the strides of the teacher's")
    notes = [f"the teacher has no features like the student's {', '.join(missing)}"] if missing else []
    return tuple(pairs), notes


def _keyed(network: Network) -> list[tuple[str, Feature]]:
    """The features under names that are theirs in every network: role, stride, and which of several."""
    found: list[tuple[str, Feature]] = []
    for feature in features(network):
        stem = f"{feature.role} at {feature.stride:g}"
        count = sum(other.role == feature.role and other.stride == feature.stride for _, other in found)
        found.append((stem if not count else f"{stem} #{count + 1}", feature))
    return found


def _kept_channels(student: Network, teacher: Network, mine: int, theirs: int, kept: Kept) -> tuple[int, ...] | None:
    """The teacher's channels that a block of the student has; None where the teacher is not what it was pruned from."""
    origin, block = kept.get(str(mine)), teacher.blocks[theirs]
    if origin is None or origin["block"] != theirs or not isinstance(block, Convolutional):
        return None
    channels = tuple(origin["channels"])
    fits = len(channels) == trace(student)[mine].channels and max(channels) < trace(teacher)[theirs].channels
    return channels if fits else None
