"""The terms of a distillation: each compares one batch of a student and its teacher, and is 0 where they agree.

z^s and z^t are raw outputs of the heads, b boxes, F features, T the temperature, B pictures in a batch. Terms of the
normalised weighting are means that neither more pictures, larger grids nor more objects change; those of the original
weighting, whose names say `sum`, `mean`, `vector`, `joint` or `energy`, are taken over as they were published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import Outputs
from utils.boxes import similarity
from utils.darknet.blocks import Network, Yolo
from utils.detection.assign import Positives, assign
from utils.detection.decode import box_offsets, split_head
from utils.detection.losses import AT_LEAST_ONE
from utils.detection.settings import Assignment
from utils.distillation import kernels
from utils.distillation.focus import object_mask, project
from utils.distillation.kernels import attention_distance, binary_kl, magnitude, softmax_kl
from utils.distillation.pair import FeaturePair, HeadPair, Pairing
from utils.distillation.strategies import ATTENTION

CONSTANT = 1e-12
"""A channel whose variance is not above it is constant."""


class Boxes(NamedTuple):
    """The P positives of all paired heads; boxes cx, cy, w, h relative to their cell, in cells."""

    student: Tensor
    teacher: Tensor
    objects: Tensor


@dataclass
class Lecture:
    """One batch: what student and teacher put out, and where the objects are. Everything is compared in float32."""

    student: Outputs
    teacher: Outputs
    networks: tuple[Network, Network]
    """The student's and the teacher's."""
    pairing: Pairing
    targets: Tensor
    """[N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input."""
    size: tuple[int, int]
    """Height and width of the network input, in pixels."""
    rule: Assignment
    temperature: float
    divisor: Callable[[float], float] = AT_LEAST_ONE
    """What a sum over this batch's objects is divided by, from their number; several processes that share a batch count
    the objects of all."""
    adapters: Mapping[str, nn.Module] = field(default_factory=dict)
    """Convolutions from the student's width to the teacher's, by the key of a feature pair."""
    _near: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def raw(self) -> list[tuple[Tensor, Tensor]]:
        """For each pair of heads z^s and z^t [B, A, H, W, 5 + C], paired anchors only."""
        return [
            (
                _anchors(self.student.heads[pair.student], self.networks[0].yolos[pair.student], pair, 0),
                _anchors(self.teacher.heads[pair.teacher], self.networks[1].yolos[pair.teacher], pair, 1),
            )
            for pair in self.pairing.heads
        ]

    @cached_property
    def columns(self) -> list[tuple[kernels.Columns, kernels.Columns]]:
        """The same apart."""
        return [(kernels.columns(student), kernels.columns(teacher)) for student, teacher in self.raw]

    def logits(self, part: str) -> list[tuple[Tensor, Tensor]]:
        """Logits of a part of the columns: `objectness`, `classes`, or both, `scores`."""
        return [
            tuple(
                _logits(getattr(values, part), network.yolos[place])
                for values, network, place in zip(pair, self.networks, (heads.student, heads.teacher), strict=True)
            )
            for pair, heads in zip(self.columns, self.pairing.heads, strict=True)
        ]

    @cached_property
    def scores(self) -> list[tuple[Tensor, Tensor]]:
        """Logits of objectness and classes [B, A, H, W, 1 + C], the student's and the teacher's."""
        return self.logits("scores")

    @cached_property
    def seen(self) -> list[Tensor]:
        """The teacher's objectness o^t [B, A, H, W] of each pair of heads."""
        return [teacher[..., 0].sigmoid() for _, teacher in self.logits("objectness")]

    @cached_property
    def attended(self) -> float:
        """How many objects the teacher sees: the sum of its objectness, at least 1."""
        return self.divisor(float(sum(seen.sum() for seen in self.seen)))

    @property
    def batch(self) -> int:
        """Pictures."""
        return len(self.student.heads[0])

    @cached_property
    def grids(self) -> list[tuple[int, int]]:
        """Cells of the student's heads."""
        return [tuple(head.shape[-2:]) for head in self.student.heads]

    @cached_property
    def boxes(self) -> Boxes:
        """Boxes of the positives."""
        found = assign(self.targets, self.networks[0].yolos, self.grids, self.size, self.rule)
        parts = [
            self._head_boxes(values, pair, found[pair.student])
            for values, pair in zip(self.columns, self.pairing.heads, strict=True)
        ]
        return Boxes(*map(torch.cat, zip(*parts, strict=True)))

    def _head_boxes(self, values: tuple[kernels.Columns, kernels.Columns], pair: HeadPair, found: Positives) -> Boxes:
        place = {anchor: number for number, (anchor, _) in enumerate(pair.anchors)}
        anchors = range(len(self.networks[0].yolos[pair.student].mask))
        number = found.anchor.new_tensor([place.get(anchor, -1) for anchor in anchors])[found.anchor]
        mine = number >= 0
        at = found.image[mine], number[mine], found.row[mine], found.column[mine]
        height, width = self.grids[pair.student]
        scale = self.targets.new_tensor((width / self.size[1], height / self.size[0]))
        boxes = []
        for side, (rows, network) in enumerate(zip(values, self.networks, strict=True)):
            yolo = network.yolos[(pair.student, pair.teacher)[side]]
            anchors = scale * scale.new_tensor([yolo.head_anchors[match[side]] for match in pair.anchors])
            boxes.append(box_offsets(rows.boxes[at], anchors[at[1]], yolo))
        return Boxes(*boxes, found.boxes[mine])

    @cached_property
    def masks(self) -> list[Tensor]:
        """Cells near objects, bool [B, H, W] for each head."""
        return object_mask(self.targets, self.networks[0].yolos, self.grids, self.size, self.batch)

    def _features(self, pair: FeaturePair) -> tuple[Tensor, Tensor]:
        """F^s and F^t of a pair."""
        return self.student.features[pair.student].float(), self.teacher.features[pair.teacher].float()

    def maps(self, group: str | None = None) -> list[tuple[Tensor, Tensor]]:
        """Attention maps A^s and A^t [B, H, W] of all features, or of those of a group."""
        pairs = (pair for pair in self.pairing.features if group in (None, pair.group))
        return [(self.student.maps[pair.student], self.teacher.maps[pair.teacher]) for pair in pairs]

    def magnitudes(self) -> list[tuple[Tensor, Tensor]]:
        """Σ_c |F_c| of the features, the student's and the teacher's [B, H, W], 0 but near objects."""
        found = [tuple(map(magnitude, self._features(pair))) for pair in self.pairing.features]
        return [tuple(torch.where(self.near(values), values, 0.0) for values in pair) for pair in found]

    def near(self, maps: Tensor) -> Tensor:
        """Which cells of maps [B, H, W] are near objects."""
        cells = tuple(maps.shape[1:])
        if cells not in self._near:
            self._near[cells] = project(self.masks, cells)
        return self._near[cells]

    def channels(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features with equal channels: the teacher's kept ones, or the student's through its adapter."""
        for pair in self.pairing.features:
            if not pair.compares_channels:
                continue
            student, teacher = self._features(pair)
            if pair.channels is not None:
                yield student, teacher[:, list(pair.channels)]
            else:
                yield self.adapters[pair.key](student) if pair.needs_adapter else student, teacher

    def nothing(self) -> Tensor:
        """0, where there is nothing to compare."""
        return self.targets.new_zeros(())


Term = Callable[[Lecture], Tensor]


def vector(lecture: Lecture) -> Tensor:
    """T² / B Σ KL of the softmax over all of (x, y, w, h, objectness, classes), as published."""
    return _kl_sum(lecture.raw, lecture.temperature) / lecture.batch


def joint(lecture: Lecture, mean: bool = False) -> Tensor:
    """T² / B Σ KL of the softmax over objectness and classes, as published; `mean`: of each head over its logits."""
    return _kl_sum(lecture.scores, lecture.temperature, mean) / lecture.batch


def objectness(lecture: Lecture) -> Tensor:
    """Σ KL of σ(z_o) at T = 1, for each object that the teacher sees."""
    total = sum(binary_kl(student, teacher, 1.0).sum() for student, teacher in lecture.logits("objectness"))
    return total / lecture.attended


def classes(lecture: Lecture) -> Tensor:
    """Σ o^t T² KL of σ(z_c / T) over cells, for each object the teacher sees; mean over classes, o^t its objectness."""
    return _attended(lecture, binary_kl) / max(1, lecture.networks[0].classes)


def class_softmax(lecture: Lecture) -> Tensor:
    """As `classes`, with one softmax over the classes (Hinton et al., arXiv:1503.02531); 0 for a single class."""
    return _attended(lecture, softmax_kl)


def box(lecture: Lecture, bounded: bool = False) -> Tensor:
    """Mean of 1 − CIoU(b^s, b^t) over the positives.

    `bounded` (Chen et al. 2017, section 3.3, with m = 0, and 1 − CIoU for the squared distance): of
    1 − CIoU(b^s, b), b the object, over those whose student is farther from it than the teacher; the others are 0.
    """
    student, teacher, objects = lecture.boxes
    count = lecture.divisor(len(objects))
    if not bounded:
        return (1 - similarity(student, teacher, "ciou")).sum() / count
    apart = 1 - similarity(student, objects, "ciou")
    return (apart * (apart > 1 - similarity(teacher, objects, "ciou"))).sum() / count


def box_sum(lecture: Lecture, bounded: bool = False) -> Tensor:
    """Σ ‖b^s − b^t‖² over the positives, in cells, as published; or Σ ‖b^s − b‖² where that exceeds ‖b^t − b‖²."""
    student, teacher, objects = lecture.boxes
    if not bounded:
        return (student - teacher).square().sum()
    apart = (student - objects).square().sum(dim=-1)
    return (apart * (apart > (teacher - objects).square().sum(dim=-1))).sum()


def attention(lecture: Lecture, group: str | None = None, mean: bool = False, masked: bool = False) -> Tensor:
    """Spatial attention transfer (Zagoruyko & Komodakis, arXiv:1612.03928). With A = Σ_c F_c².

        ‖ A^s / ‖A^s‖ − A^t / ‖A^t‖ ‖²,  mean over pictures and features: between 0 and 2.

    As published (`mean`) the squares are averaged over the cells, too, which makes them H · W times smaller, and the
    features of a group are summed. `masked`: A is 0 but near objects (Wang et al., arXiv:1906.03609).
    """
    apart = []
    for student, teacher in lecture.maps(group):
        near = lecture.near(student) if masked else None
        apart.append(attention_distance(student, teacher, near) / (student.numel() if mean else len(student)))
    return _combined(apart, mean, lecture)


def energy(lecture: Lecture, masked: bool = False) -> Tensor:
    """T² / B · mean KL of the softmax over the cells of Σ_c F_c² / T, as published but for the softmax's dimension.

    `masked`: of Σ_c |F_c| / T, 0 but near objects. The original's softmax runs over the batch: its dimension is left to
    PyTorch's default for three dimensions.
    """
    t, total = lecture.temperature, lecture.nothing()
    for student, teacher in lecture.magnitudes() if masked else lecture.maps():
        mine, theirs = student.flatten(1), teacher.flatten(1)
        total = total + t**2 * softmax_kl(mine, theirs, t).sum() / mine.numel() / lecture.batch
    return total


def cwd(lecture: Lecture) -> Tensor:
    """Channel-wise distillation (Shu et al., arXiv:2011.13256), τ = 1: KL of the softmax over the cells of a channel.

    Mean over channels, pictures and features.
    """
    apart = []
    for pair in lecture.channels():
        mine, theirs = (features.flatten(2).transpose(1, 2) for features in pair)  # dense, as they are channels-last
        apart.append(softmax_kl(mine, theirs, 1.0, dim=1).mean())
    return _combined(apart, False, lecture)


def pkd(lecture: Lecture) -> Tensor:
    """1 − Pearson's correlation of the features of a channel (Cao et al., arXiv:2207.02039).

    Over the cells of all pictures of the batch; mean over channels and features. A channel that is constant in one of
    the networks has no correlation: it counts 0 and gets no gradient, which would be that of a division by its spread.
    """
    apart = []
    for pair in lecture.channels():
        (mine, varies), (theirs, moves) = map(_standard, pair)
        apart.append(((mine - theirs) * (varies & moves)).square().mean() / 2)
    return _combined(apart, False, lecture)


TERMS: dict[str, Term] = {
    "vector": vector,
    "joint": joint,
    "joint_mean": partial(joint, mean=True),
    "objectness": objectness,
    "classes": classes,
    "class_softmax": class_softmax,
    "box": box,
    "box_bounded": partial(box, bounded=True),
    "box_sum": box_sum,
    "box_bounded_sum": partial(box_sum, bounded=True),
    "energy": energy,
    "energy_masked": partial(energy, masked=True),
    "cwd": cwd,
    "pkd": pkd,
    **{name: partial(attention, **how) for name, how in ATTENTION.items()},
}


def _anchors(head: Tensor, yolo: Yolo, pair: HeadPair, side: int) -> Tensor:
    values = split_head(head.float(), yolo)
    chosen = [match[side] for match in pair.anchors]
    return values if chosen == list(range(values.shape[1])) else values[:, chosen]


def _logits(scores: Tensor, yolo: Yolo) -> Tensor:
    """What a sigmoid makes scores from; with new_coords the network has taken it already."""
    return torch.logit(scores, eps=1e-6) if yolo.new_coords else scores


def _attended(lecture: Lecture, divergence: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """T² times a divergence [B, A, H, W] of class logits over T, weighted with the teacher's objectness."""
    t, total = lecture.temperature, lecture.nothing()
    for (student, teacher), seen in zip(lecture.logits("classes"), lecture.seen, strict=True):
        total = total + (seen * divergence(student, teacher, t)).sum()
    return t**2 * total / lecture.attended


def _kl_sum(pairs: Sequence[tuple[Tensor, Tensor]], t: float, mean: bool = False) -> Tensor:
    """T² Σ KL over all heads; `mean`: of each divided by the number of its logits."""
    found = (softmax_kl(student, teacher, t).sum() / (teacher.numel() if mean else 1) for student, teacher in pairs)
    return t**2 * sum(found)


def _standard(values: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] with mean 0 and (biased) variance 1 in each channel; and which channels vary [1, C, 1, 1]."""
    variance, mean = torch.var_mean(values, dim=(0, 2, 3), keepdim=True, correction=0)
    return (values - mean) * torch.rsqrt(variance + CONSTANT), variance > CONSTANT


def _combined(apart: Sequence[Tensor], published: bool, lecture: Lecture) -> Tensor:
    """The sum over features, as published, or their mean."""
    if not apart:
        return lecture.nothing()
    return torch.stack(list(apart)).sum() if published else torch.stack(list(apart)).mean()
