"""A lesson at work: what is added to the loss of a student in every batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import Darknet, Outputs
from utils.detection.settings import Assignment
from utils.distillation.pair import Kept, pair
from utils.distillation.strategies import Lesson
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

    Raises:
        InputError: the two networks have nothing of what the lesson compares.
    """

    def __init__(
        self, student: Darknet, teacher: Teacher, lesson: Lesson, rule: Assignment, kept: Kept | None = None
    ) -> None:
        super().__init__()
        self.teacher, self.lesson, self.rule = teacher, lesson, rule
        self.networks = student.network, teacher.network
        self.pairing = pair(*self.networks, lesson, kept)
        self.wanted = self.pairing.blocks("student")
        """Blocks of the student whose outputs `forward` needs."""
        self.adapters = nn.ModuleDict(
            {
                feature.key: nn.Conv2d(*feature.widths, 1, bias=False)
                for feature in self.pairing.features
                if lesson.channels and feature.needs_adapter
            }
        )

    def forward(self, images: Tensor, student: Outputs, targets: Tensor) -> dict[str, Tensor]:
        """The weighted terms of a batch, scalars in float32.

        Args:
            images: [B, C, H, W] as the student saw them.
            student: its outputs, with the features in `wanted`.
            targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input.
        """
        device = images.device.type
        with torch.autocast(device, torch.float16, enabled=device == "cuda"):
            taught = self.teacher(images, self.pairing.blocks("teacher"))
        with torch.autocast(device, enabled=False):
            lecture = Lecture(
                student,
                taught,
                self.networks,
                self.pairing,
                targets,
                (images.shape[-2], images.shape[-1]),
                self.rule,
                self.lesson.temperature,
                self.adapters,
            )
            return {term: weight * TERMS[term](lecture) for term, weight in self.lesson.terms.items()}
