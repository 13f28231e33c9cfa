"""The terms of a distillation: each compares one batch of a student and its teacher, and is 0 where they agree.

z^s and z^t are raw outputs of the heads, b boxes, F features, T the temperature. Terms are means that neither more
pictures, larger grids nor more objects change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Darknet, Outputs, fuse, reduced
from utils.darknet.blocks import Network, Yolo
from utils.detection.decode import EPSILON, area, box_offsets, similarity, split_head
from utils.detection.losses import AT_LEAST_ONE, Divisor, Positives, assign
from utils.detection.settings import Assignment
from utils.device import constant, uploaded
from utils.distillation.strategies import ATTENTION, Distillation, HeadPair, Pairing, comparable, pair

TEMPERATURE = 3.0
"""T of the suites this one follows: class scores are softened by it."""
NEARNESS = 0.5
"""ψ: a cell counts whose best anchor overlaps an object by more than this share of the best overlap anywhere."""


class Teacher:
    """A trained network, its batch normalisations folded, in evaluation mode; no module, so that nothing trains it.

    Args:
        model: with its weights; it is left as it is.
        device: where it runs.
        dtype: of 16 bits, for its weights; None: float32, as always for a quantized network.
    """

    def __init__(self, model: Darknet, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._model = fuse(model)
        if dtype is not None and model.quantize_image is None:
            self._model = reduced(self._model, dtype)
        self._model.to(device).to(memory_format=torch.channels_last)
        self.network: Network = model.network
        """The blocks as they were before folding; their numbers are the same."""

    @torch.no_grad()
    def __call__(self, images: Tensor, maps: Collection[int] = ()) -> Outputs:
        """Return what `Darknet.forward` does for images [B, C, H, W], 0…1; its stride divides H and W."""
        return self._model(images, maps=maps)


class Distiller:
    """The weighted terms of a distillation.

    Args:
        student: network that is trained; only its blocks are read.
        teacher: it learns from.
        distillation: what is compared.
        rule: which predictions answer for which object, as in the loss.
        divisor: what sums over objects are divided by, from their number; of processes that share batches.

    Raises:
        InputError: the two networks have nothing of what is compared.
    """

    def __init__(
        self,
        student: Darknet,
        teacher: Teacher,
        distillation: Distillation,
        rule: Assignment,
        divisor: Divisor = AT_LEAST_ONE,
    ) -> None:
        networks = student.network, teacher.network
        self.yolos = student.network.yolos, teacher.network.yolos
        self.distillation, note = comparable(distillation, *networks)
        self.teacher, self.rule, self.divisor = teacher, rule, divisor
        self.pairing = pair(*networks, self.distillation)
        self.notes = (*note, *self.pairing.notes)
        """What could not be compared, for the log."""
        self.wanted = tuple(features.student for features in self.pairing.features)
        """Blocks of the student whose attention maps are compared."""

    def teach(self, images: Tensor) -> Outputs:
        """Return the teacher's outputs for images [B, C, H, W], without a gradient.

        Best called before the student sees them: what the student computes then is still at hand in its backward pass.
        """
        return self.teacher(images, [features.teacher for features in self.pairing.features])

    def __call__(self, teacher: Outputs, student: Outputs, targets: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the weighted terms of a batch, scalars in float32.

        Args:
            teacher: from `teach`.
            student: its outputs for the same images, with the maps in `wanted`.
            targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input; on the CPU.
            size: height and width of the network input, in pixels.
        """
        with torch.autocast(student.heads[0].device.type, enabled=False):
            batch = DistillationBatch(
                student, teacher, self.yolos, self.pairing, targets, size, self.rule, self.divisor
            )
            return {term: weight * TERMS[term](batch) for term, weight in self.distillation.terms.items()}


class Columns(NamedTuple):
    """Raw outputs of a head apart."""

    boxes: Tensor
    """[B, A, H, W, 4]."""
    objectness: Tensor
    """[B, A, H, W, 1]."""
    classes: Tensor
    """[B, A, H, W, C]."""


class PairedBoxes(NamedTuple):
    """The P positives of all paired heads; boxes cx, cy, w, h relative to their cell, in cells."""

    student: Tensor
    teacher: Tensor
    objects: Tensor


@dataclass
class DistillationBatch:
    """Outputs of student and teacher for one batch, and where its objects are. All is compared in float32."""

    student: Outputs
    teacher: Outputs
    yolos: tuple[Sequence[Yolo], Sequence[Yolo]]
    """Heads of the student and the teacher."""
    pairing: Pairing
    targets: Tensor
    """[N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input; on the CPU."""
    size: tuple[int, int]
    """Height and width of the network input, in pixels."""
    rule: Assignment
    divisor: Divisor = AT_LEAST_ONE
    """What a sum over this batch's objects or pictures is divided by, from their number; several processes that share a
    batch count those of all."""

    @cached_property
    def columns(self) -> list[tuple[Columns, Columns]]:
        """Raw outputs z^s and z^t of each pair of heads, paired anchors only."""
        pairs = []
        for heads in self.pairing.heads:
            mine, theirs = zip(*heads.anchors, strict=True)
            student = _columns(self.student.heads[heads.student], self.yolos[0][heads.student], mine)
            teacher = _columns(self.teacher.heads[heads.teacher], self.yolos[1][heads.teacher], theirs)
            pairs.append((student, teacher))
        return pairs

    def logits(self, part: str) -> list[tuple[Tensor, Tensor]]:
        """Return the logits of `objectness` or `classes` of each pair of heads."""
        pairs = []
        for heads, (student, teacher) in zip(self.pairing.heads, self.columns, strict=True):
            mine = _logits(getattr(student, part), self.yolos[0][heads.student])
            pairs.append((mine, _logits(getattr(teacher, part), self.yolos[1][heads.teacher])))
        return pairs

    @cached_property
    def certainty(self) -> list[Tensor]:
        """The teacher's objectness o^t [B, A, H, W] of each pair of heads."""
        return [teacher[..., 0].sigmoid() for _, teacher in self.logits("objectness")]

    @cached_property
    def objects_seen(self) -> Tensor:
        """The number of objects that the teacher sees: the sum of its objectness, at least 1."""
        return self.divisor(torch.stack([certainty.sum() for certainty in self.certainty]).sum())

    @cached_property
    def pictures(self) -> Tensor | int:
        """The number of pictures."""
        return self.divisor(len(self.student.heads[0]))

    @cached_property
    def grids(self) -> list[tuple[int, int]]:
        """Cells of the student's heads."""
        return [(head.shape[-2], head.shape[-1]) for head in self.student.heads]

    @cached_property
    def boxes(self) -> PairedBoxes:
        """PairedBoxes of the positives."""
        positives = assign(self.targets, self.yolos[0], self.grids, self.size, self.rule)
        parts = [
            self._head_boxes(columns, heads, positives[heads.student])
            for columns, heads in zip(self.columns, self.pairing.heads, strict=True)
        ]
        return PairedBoxes(*map(torch.cat, zip(*parts, strict=True)))

    def _head_boxes(self, columns: tuple[Columns, Columns], heads: HeadPair, positives: Positives) -> PairedBoxes:
        numbers = {anchor: number for number, (anchor, _) in enumerate(heads.anchors)}
        count = len(self.yolos[0][heads.student].mask)
        number = positives.anchor.new_tensor([numbers.get(anchor, -1) for anchor in range(count)])[positives.anchor]
        cells = torch.stack((positives.image, number, positives.row, positives.column), dim=1)[number >= 0]
        height, width = self.grids[heads.student]
        scale = self.targets.new_tensor((width / self.size[1], height / self.size[0]))
        yolos = self.yolos[0][heads.student], self.yolos[1][heads.teacher]
        shapes = [[yolo.head_anchors[match] for yolo, match in zip(yolos, pair, strict=True)] for pair in heads.anchors]
        anchors = (scale * scale.new_tensor(shapes))[cells[:, 1]]
        cells, anchors, objects = uploaded((cells, anchors, positives.boxes[number >= 0]), columns[0].boxes.device)
        values = [part.boxes[cells.unbind(1)] for part in columns]
        student, teacher = map(box_offsets, values, anchors.unbind(1), yolos)
        return PairedBoxes(student, teacher, objects)

    def maps(self, group: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield attention maps A^s and A^t [B, H, W] of all features, or of those of a group."""
        for features in self.pairing.features:
            if group in (None, features.group):
                yield self.student.maps[features.student], self.teacher.maps[features.teacher]

    @cached_property
    def masks(self) -> list[Tensor]:
        """Cells near objects, bool [B, H, W] for each head of the student."""
        return object_mask(self.targets, self.yolos[0], self.student.heads, self.size)


def objectness(batch: DistillationBatch) -> Tensor:
    """Σ KL of σ(z_o) at T = 1, for each object that the teacher sees."""
    divergences = (binary_kl(*pair, 1.0).sum() for pair in batch.logits("objectness"))
    return sum(divergences) / batch.objects_seen


def classes(batch: DistillationBatch) -> Tensor:
    """Σ o^t T² KL of σ(z_c / T) over cells, for each object the teacher sees; mean over classes, o^t its objectness."""
    return _per_object_seen(batch, binary_kl) / max(1, batch.yolos[0][0].classes)


def class_softmax(batch: DistillationBatch) -> Tensor:
    """As `classes`, with one softmax over the classes (Hinton et al., arXiv:1503.02531); 0 for a single class."""
    return _per_object_seen(batch, softmax_kl)


def box(batch: DistillationBatch, bounded: bool = False) -> Tensor:
    """Mean of 1 − CIoU(b^s, b^t) over the positives.

    `bounded` (Chen et al. 2017, section 3.3, with m = 0, and 1 − CIoU for the squared distance): of
    1 − CIoU(b^s, b), b the object, over those whose student is farther from it than the teacher; the others are 0.
    """
    student, teacher, objects = batch.boxes
    count = batch.divisor(len(objects))
    if not bounded:
        return (1 - similarity(student, teacher, "ciou")).sum() / count
    distance = 1 - similarity(student, objects, "ciou")
    return (distance * (distance > 1 - similarity(teacher, objects, "ciou"))).sum() / count


def attention(batch: DistillationBatch, group: str | None = None, masked: bool = False) -> Tensor:
    """Spatial attention transfer (Zagoruyko & Komodakis, arXiv:1612.03928). With A = Σ_c F_c².

        ‖ A^s / ‖A^s‖ − A^t / ‖A^t‖ ‖²,  mean over pictures and features: between 0 and 2.

    `masked`: A is 0 but near objects (Wang et al., arXiv:1906.03609).
    """
    distances = []
    for maps in map(list, batch.maps(group)):
        if masked:
            near = project(batch.masks, (maps[0].shape[1], maps[0].shape[2]))
            maps = [map_.masked_fill(~near, 0.0) for map_ in maps]
        student, teacher = (F.normalize(map_.flatten(1)) for map_ in maps)
        distances.append((student - teacher).square().sum() / batch.pictures)
    return _mean(distances, batch)


TERMS: dict[str, Callable[[DistillationBatch], Tensor]] = {
    "objectness": objectness,
    "classes": classes,
    "class_softmax": class_softmax,
    "box": box,
    "box_bounded": partial(box, bounded=True),
    **{name: partial(attention, group=group, masked=name.endswith("masked")) for name, group in ATTENTION.items()},
}


def softmax_kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """KL(softmax(z^t / T) ‖ softmax(z^s / T)) over the last dimension, which goes."""
    mine, theirs = (F.log_softmax(logits / t, dim=-1) for logits in (student, teacher))
    return F.kl_div(mine, theirs, reduction="none", log_target=True).sum(dim=-1)


def binary_kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """Σ KL(σ(z^t / T) ‖ σ(z^s / T)) over the last dimension, [..., C] to [...].

    That is the cross-entropy with soft targets, less what no student can avoid.
    """
    mine, theirs = student / t, teacher / t
    probability = theirs.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(theirs, probability, reduction="none")
    return (F.binary_cross_entropy_with_logits(mine, probability, reduction="none") - entropy).sum(dim=-1)


@torch.no_grad()
def object_mask(targets: Tensor, yolos: Sequence[Yolo], heads: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """Return the cells near objects in the grid of every head (Wang et al., arXiv:1906.03609, section 3.1).

    For each object the IoU with every anchor in every cell is taken; cells with one above ψ times the largest count.
    Here the anchors of all heads compete, so an object is looked at where its size is predicted.

    Args:
        targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input; on the CPU.
        yolos: head blocks.
        heads: raw outputs [B, A · (5 + C), H, W].
        size: height and width of the network input, in pixels.

    Returns:
        For each head bool [B, H, W]; all False for a picture without objects.
    """
    order = targets[:, 0].argsort(stable=True)
    boxes = targets[order, 2:6] * targets.new_tensor((size[1], size[0], size[1], size[0]))
    (boxes,) = uploaded((boxes,), heads[0].device)
    counts = targets[:, 0].long().bincount(minlength=len(heads[0])).tolist()
    masks = []
    for objects in boxes.split(counts):  # one picture at a time: the IoUs of a batch do not fit the memory
        overlaps = [_overlap(objects, yolo, head, size) for yolo, head in zip(yolos, heads, strict=True)]
        best = torch.stack([overlap.flatten(1).amax(dim=1) for overlap in overlaps]).amax(dim=0)
        masks.append([(overlap > NEARNESS * best[:, None, None]).any(dim=0) for overlap in overlaps])
    return [torch.stack(mask) for mask in zip(*masks, strict=True)]


def project(masks: Sequence[Tensor], cells: tuple[int, int]) -> Tensor:
    """Return masks of several grids in another one: bool [B, H, W]; a cell counts if it meets any that counts."""
    resized = [F.adaptive_max_pool2d(mask[:, None].float(), cells)[:, 0] > 0 for mask in masks]
    return torch.stack(resized).any(dim=0)


def _overlap(objects: Tensor, yolo: Yolo, head: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, H, W] the largest IoU of each object with an anchor in the middle of every cell.

    The area that two boxes share is the product of what their sides share, which needs no pairs of boxes.

    Args:
        objects: [N, 4] cx, cy, w, h in pixels.
        yolo: the head.
        head: its raw outputs [B, A · (5 + C), H, W].
        size: height and width of the network input, in pixels.
    """
    anchors = constant(yolo.head_anchors, objects.dtype, objects.device)
    columns = _shared(objects[:, 0], objects[:, 2], anchors[:, 0], head.shape[3], size[1])
    rows = _shared(objects[:, 1], objects[:, 3], anchors[:, 1], head.shape[2], size[0])
    shared = rows[..., None] * columns[:, :, None]  # [N, A, H, W]
    areas = area(objects[:, 2:])[:, None] + area(anchors)
    return (shared / (areas[..., None, None] - shared + EPSILON)).amax(dim=1)


def _shared(centres: Tensor, sides: Tensor, anchors: Tensor, count: int, length: int) -> Tensor:
    """[N, A, count] pixels that N intervals share with anchors [A] in the middle of `count` cells of the `length`."""
    middles = (torch.arange(count, dtype=centres.dtype, device=centres.device) + 0.5) * (length / count)
    half = anchors[:, None] / 2
    low, high = (centres - sides / 2)[:, None, None], (centres + sides / 2)[:, None, None]
    return (torch.minimum(high, middles + half) - torch.maximum(low, middles - half)).clamp(min=0)


def _columns(head: Tensor, yolo: Yolo, anchors: Sequence[int]) -> Columns:
    values = split_head(head.float(), yolo)
    if list(anchors) != list(range(values.shape[1])):
        values = values[:, list(anchors)]
    return Columns(*values.split((4, 1, yolo.classes), dim=-1))


def _logits(scores: Tensor, yolo: Yolo) -> Tensor:
    """What a sigmoid makes scores from; with new_coords the network has taken it already."""
    return torch.logit(scores, eps=1e-6) if yolo.new_coords else scores


def _per_object_seen(batch: DistillationBatch, divergence: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """T² Σ o^t D over all cells, for each object seen; D [B, A, H, W] is the divergence of class logits over T."""
    total = sum(
        (certainty * divergence(student, teacher, TEMPERATURE)).sum()
        for (student, teacher), certainty in zip(batch.logits("classes"), batch.certainty, strict=True)
    )
    return TEMPERATURE**2 * total / batch.objects_seen


def _mean(distances: Sequence[Tensor], batch: DistillationBatch) -> Tensor:
    """Return the mean over features; 0 where a group has none."""
    return torch.stack(list(distances)).mean() if distances else batch.student.heads[0].new_zeros(())
