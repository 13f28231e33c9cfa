"""What a student learns from its teacher: every strategy is a table of terms and their weights; no torch.

The numbers are those of the suites this one follows (SpursLipu, chumingqian: `--KDstr`, `--AT_str`). The weights are
ours: no term depends on the size of a batch, a grid or the number of objects. A term is a key of
`utils.distillation.terms.TERMS`.

Student and teacher are paired: heads by stride and anchors, features by their role. Those suites pair features by their
numbers in a list, which holds for networks with equal blocks only. Here the roles are told from the cfg, so that
pruned, layer-pruned and quite different students have partners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import NamedTuple

import numpy as np

from utils.darknet.blocks import Avgpool, Network, Reorg, Upsample
from utils.darknet.network import trace
from utils.data.anchors import shape_ious
from utils.errors import InputError

LARGEST_WEIGHT = 1e6
"""Of --kd-weight."""


class Quantity(Flag):
    """Outputs of the networks that a term compares."""

    SCORES = auto()
    """Objectness or classes."""
    BOXES = auto()
    MAPS = auto()
    """Attention maps, Σ_c F_c² of every feature."""


ATTENTION = {
    "attention": None,
    "attention_masked": None,
    "attention_backbone": "backbone",
    "attention_deep": "deep",
    "attention_neck": "neck",
}
"""Terms of attention maps, and the group of features that each compares; None: all."""
QUANTITIES: Mapping[str, Quantity] = {
    **dict.fromkeys(("objectness", "classes", "class_softmax"), Quantity.SCORES),
    **dict.fromkeys(("box", "box_bounded"), Quantity.BOXES),
    **dict.fromkeys(ATTENTION, Quantity.MAPS),
}
"""Quantity that each term compares; `terms.TERMS` has the same keys."""


@dataclass(frozen=True)
class Strategy:
    """A value of --KDstr or --AT_str."""

    what: str
    terms: Mapping[str, float]
    """Weight of every term."""


OUTPUTS = {"objectness": 1.0, "classes": 3.0, "box": 2.5}
GROUPS = {"attention_backbone": 2.0, "attention_deep": 0.2, "attention_neck": 0.2}
TENFOLD = {term: 10 * weight for term, weight in OUTPUTS.items()}

KD = {
    "1": Strategy("outputs: softmax over the classes, soft objectness", {"objectness": 1.0, "class_softmax": 1.0}),
    "2": Strategy(
        "boxes and classes apart; boxes towards the objects, where the teacher is nearer to them",
        {"objectness": 1.0, "classes": 3.0, "box_bounded": 2.5},
    ),
    "3": Strategy("boxes and classes apart, both from the teacher", OUTPUTS),
    "4": Strategy("3, and where the features are strong", OUTPUTS | {"attention": 0.4}),
    "5": Strategy("4 with the features near objects only", OUTPUTS | {"attention_masked": 0.4}),
}
"""--KDstr."""
AT = {
    "1": Strategy("attention maps, one weight", {"attention": 0.4}),
    "2": Strategy("attention maps, a weight for each group of them", GROUPS),
    "3": Strategy("2, and the outputs of --KDstr 3", GROUPS | OUTPUTS),
    "4": Strategy("3 with the weights for a MobileNet: the groups alike", {"attention": 0.4} | OUTPUTS),
    "5": Strategy(
        "3 with the weights for Darknet-53: the groups alike, the outputs tenfold", {"attention": 0.4} | TENFOLD
    ),
}
"""--AT_str."""
DEFAULT = "4"
"""The --KDstr that measured best (docs/distillation.md)."""


@dataclass(frozen=True)
class Distillation:
    """Terms that a training adds to its loss."""

    name: str
    """Flags that chose them, e.g. `--KDstr 3`."""
    terms: Mapping[str, float]
    """Weight of every term."""

    def compares(self, what: Quantity) -> bool:
        """Return whether a term compares any of these quantities."""
        return any(QUANTITIES[term] & what for term in self.terms)


def distillation(kd: str | None, at: str | None, weight: float = 1.0) -> Distillation:
    """Return the terms of a `--KDstr`, an `--AT_str`, or both; the weights of a term they share are added.

    Args:
        kd: key of KD, or None.
        at: key of AT, or None; one of both is needed.
        weight: factor on all terms.
    """
    chosen = [(f"--KDstr {kd}", KD[kd])] if kd else []
    chosen += [(f"--AT_str {at}", AT[at])] if at else []
    terms: dict[str, float] = {}
    for _, strategy in chosen:
        for term, factor in strategy.terms.items():
            terms[term] = terms.get(term, 0.0) + weight * factor
    flags = [flag for flag, _ in chosen]
    if weight != 1:
        flags.append(f"--kd-weight {weight:g}")
    return Distillation(" ".join(flags), terms)


LEAST_ANCHOR_IOU = 0.5
"""Two anchors whose shapes overlap less say nothing of each other's boxes."""
Anchors = Sequence[tuple[float, float]]
"""Width and height of each."""
BACKBONE, DEEP, NECK = "backbone", "deep", "neck"
"""Groups of features: Chu et al. (arXiv:2306.01526) weight the backbone, what is at the largest stride, and the rest
before the heads apart."""


class Feature(NamedTuple):
    """The output of a block that has a role in every network of the family."""

    role: str
    """`stage`: what the backbone's next downsampling reads; `upsampled`: what an upsampling reads; `head`: what the
    last convolution of a head reads."""
    stride: float
    block: int
    group: str


class FeaturePair(NamedTuple):
    """A feature of the student and the teacher's."""

    group: str
    student: int
    """Its block."""
    teacher: int


class HeadPair(NamedTuple):
    """A head of the student and the teacher's, by their numbers among the heads."""

    student: int
    teacher: int
    anchors: tuple[tuple[int, int], ...]
    """Number of an anchor in the student's head and of the one in the teacher's that is most like it."""


class Pairing(NamedTuple):
    """All that a distillation compares."""

    heads: tuple[HeadPair, ...]
    features: tuple[FeaturePair, ...]
    notes: tuple[str, ...]
    """What could not be paired, for the log."""


def features(network: Network) -> tuple[Feature, ...]:
    """Return the features of a network that have a role, in the order of its blocks.

    In YOLOv4 these are the transition convolutions of the backbone, the convolutions before the two upsamplings and
    those before the detection convolutions: the nine that Chu et al. list by number.
    """
    strides = [network.net.height / shape.height for shape in trace(network)]
    blocks = network.blocks
    upsamplings = [i for i, block in enumerate(blocks) if isinstance(block, Upsample)]
    stages = {}
    for i, block in enumerate(blocks[: min(upsamplings, default=len(blocks))]):
        if isinstance(block, Avgpool | Reorg):
            continue
        for source in block.reads(i):
            if source >= 0 and 1 < strides[source] < strides[i]:
                stages[strides[source]] = source
    deepest = max(strides[i - 1] for i in network.heads)
    result = [Feature("stage", stride, block, BACKBONE) for stride, block in stages.items() if stride < deepest]
    readers = {"upsampled": upsamplings, "head": [i - 1 for i in network.heads]}
    for role, numbers in readers.items():
        for source in (blocks[i].reads(i)[0] for i in numbers):
            if source >= 0:
                group = DEEP if strides[source] >= deepest else NECK
                result.append(Feature(role, strides[source], source, group))
    return tuple(sorted(result, key=lambda feature: feature.block))


def comparable(distillation: Distillation, student: Network, teacher: Network) -> tuple[Distillation, tuple[str, ...]]:
    """Return the terms that a teacher of other classes, which sees other objects, leaves, and a note for the log.

    Raises:
        InputError: no term is left.
    """
    if student.classes == teacher.classes:
        return distillation, ()
    terms = {term: weight for term, weight in distillation.terms.items() if QUANTITIES[term] != Quantity.SCORES}
    counts = f"{teacher.path or 'the teacher'} has {teacher.classes} classes and the student {student.classes}"
    if not terms:
        raise InputError(
            f"{distillation.name}: compares scores, but {counts}; boxes and features can be learnt from it: "
            "--KDstr 3, 4 or 5, or --AT_str"
        )
    gone = ", ".join(term for term in distillation.terms if term not in terms)
    return replace(distillation, terms=terms), (f"{counts}: {gone} left out",) if gone else ()


def pair(student: Network, teacher: Network, distillation: Distillation) -> Pairing:
    """Return what a distillation can compare.

    Args:
        student: network that is trained.
        teacher: network it learns from; it sees the same images, so its strides are those at the student's input.
        distillation: tells whether heads, features or both are compared.

    Raises:
        InputError: the inputs differ, or nothing can be compared.
    """
    if student.net.channels != teacher.net.channels:
        raise InputError(
            f"{teacher.path or 'the teacher'}: takes images of {teacher.net.channels} channels, the student of "
            f"{student.net.channels}"
        )
    teacher = replace(teacher, net=student.net)
    notes: list[str] = []
    heads: list[HeadPair] = []
    pairs: list[FeaturePair] = []
    if distillation.compares(Quantity.SCORES | Quantity.BOXES):
        heads = _head_pairs(student, teacher, notes)
        if not heads:
            raise InputError(
                f"{distillation.name}: no head of the student has stride and anchors like one of the teacher"
            )
    if distillation.compares(Quantity.MAPS):
        pairs = _feature_pairs(student, teacher, notes)
        if not pairs:
            raise InputError(f"{distillation.name}: the student has no features at the strides of the teacher's")
    return Pairing(tuple(heads), tuple(pairs), tuple(notes))


def _head_pairs(student: Network, teacher: Network, notes: list[str]) -> list[HeadPair]:
    mine, theirs = _head_strides(student), _head_strides(teacher)
    pairs: list[HeadPair] = []
    for number, stride in enumerate(mine):
        partners = [i for i, other in enumerate(theirs) if other == stride]
        earlier = mine[:number].count(stride)
        if earlier >= len(partners):
            notes.append(f"the student's head at stride {stride:g} has none in the teacher and learns from the data")
            continue
        partner, count = partners[earlier], len(student.yolos[number].head_anchors)
        anchors = _anchor_pairs(student.yolos[number].head_anchors, teacher.yolos[partner].head_anchors)
        if len(anchors) < count:
            notes.append(
                f"head at stride {stride:g}: {len(anchors)} of {count} anchors are like one of the teacher's; the "
                "others learn from the data"
            )
        if anchors:
            pairs.append(HeadPair(number, partner, anchors))
    used = {pair.teacher for pair in pairs}
    for number, stride in enumerate(theirs):
        if number not in used:
            notes.append(f"the teacher's head at stride {stride:g} has none in the student and teaches nothing")
    return pairs


def _head_strides(network: Network) -> list[float]:
    shapes = trace(network)
    return [network.net.height / shapes[i].height for i in network.heads]


def _anchor_pairs(mine: Anchors, theirs: Anchors) -> tuple[tuple[int, int], ...]:
    """Pair anchors one to one, the most alike first."""
    overlaps = shape_ious(np.array(mine), np.array(theirs))
    pairs: dict[int, int] = {}
    for i, j in sorted(np.ndindex(*overlaps.shape), key=lambda ij: -overlaps[ij]):  # stable: ties by number
        if overlaps[i, j] >= LEAST_ANCHOR_IOU and i not in pairs and j not in pairs.values():
            pairs[i] = j
    return tuple(sorted(pairs.items()))


def _feature_pairs(student: Network, teacher: Network, notes: list[str]) -> list[FeaturePair]:
    mine, theirs = _named(student), _named(teacher)
    common = [name for name in mine if name in theirs]
    if common and (missing := [name for name in mine if name not in theirs]):
        notes.append(f"the teacher has no features like the student's {', '.join(missing)}")
    return [FeaturePair(mine[name].group, mine[name].block, theirs[name].block) for name in common]


def _named(network: Network) -> dict[str, Feature]:
    """Return the features by names that are theirs in every network: role, stride, and which of several."""
    named: dict[str, Feature] = {}
    for feature in features(network):
        count = sum((other.role, other.stride) == (feature.role, feature.stride) for other in named.values())
        stem = f"{feature.role} at {feature.stride:g}"
        named[f"{stem} #{count + 1}" if count else stem] = feature
    return named
