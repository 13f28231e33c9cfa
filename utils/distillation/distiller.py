"""A lesson at work: what is added to the loss of a student in every batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import Darknet, Outputs
from utils.detection.losses import AT_LEAST_ONE
from utils.detection.settings import Assignment
from utils.distillation.pair import Kept, pair, understood
from utils.distillation.strategies import Lesson, See
from utils.distillation.teacher import Teacher
from utils.distillation.terms import TERMS, Lecture


class Distiller(nn.Module):
    """The weighted terms of a lesson, and the adapters that some of them train.

    An adapter is a 1 × 1 convolution from a student's feature to the width of the teacher's, where the two differ and
    the teacher's channels that the student kept are not known. It belongs to the loss: it is trained and saved with the
    run, and never part of the student.

    Args:
        student: network that is trained; only its blocks are looked at.
        teacher: it learns from.
        lesson: what is compared.
        rule: which predictions answer for which object, as in the loss.
        kept: where the convolutions of a pruned student come from.
        divisor: what sums over objects are divided by, from their number; of a team that shares batches.

    Raises:
        InputError: the two networks have nothing of what the lesson compares.
    """

    def __init__(
        self,
        student: Darknet,
        teacher: Teacher,
        lesson: Lesson,
        rule: Assignment,
        kept: Kept | None = None,
        divisor: Callable[[float], float] = AT_LEAST_ONE,
    ) -> None:
        super().__init__()
        self.networks = student.network, teacher.network
        self.lesson, note = understood(lesson, *self.networks)
        self.teacher, self.rule, self.divisor = teacher, rule, divisor
        self.pairing = pair(*self.networks, self.lesson, kept)
        self.notes = (*note, *self.pairing.notes)
        """What could not be compared, to be said."""
        self.wanted = self._wanted("student")
        """Blocks of the student whose outputs `forward` needs, and those whose attention maps."""
        self.adapters = nn.ModuleDict(
            {
                feature.key: nn.Conv2d(*feature.widths, 1, bias=False)
                for feature in self.pairing.features
                if self.lesson.sees(See.CHANNELS) and feature.needs_adapter
            }
        )

    def teach(self, images: Tensor) -> Outputs:
        """What the teacher puts out for images [B, C, H, W], without a gradient.

        Best called before the student sees them: what the student computes then is still at hand in its backward pass.
        """
        return self.teacher(images, *self._wanted("teacher"))

    def forward(self, taught: Outputs, student: Outputs, targets: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """The weighted terms of a batch, scalars in float32.

        Args:
            taught: from `teach`.
            student: its outputs for the same images, with the features and maps in `wanted`.
            targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input.
            size: height and width of the network input, in pixels.
        """
        with torch.autocast(targets.device.type, enabled=False):
            lecture = Lecture(
                student,
                taught,
                self.networks,
                self.pairing,
                targets,
                size,
                self.rule,
                self.lesson.temperature,
                self.divisor,
                self.adapters,
            )
            return {term: weight * TERMS[term](lecture) for term, weight in self.lesson.terms.items()}

    def _wanted(self, side: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks of a side whose outputs the terms compare, and those whose attention maps."""
        lesson, features = self.lesson, self.pairing.features
        whole, channels = lesson.sees(See.MAGNITUDES), lesson.sees(See.CHANNELS)
        compared = [pair for pair in features if whole or (channels and pair.compares_channels)]
        seen = features if lesson.sees(See.MAPS) else ()
        return tuple(getattr(pair, side) for pair in compared), tuple(getattr(pair, side) for pair in seen)
