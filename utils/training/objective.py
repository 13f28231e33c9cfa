"""What a training minimises: the detection loss, and what a distillation adds to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from models import Darknet
from utils.detection.losses import detection_loss
from utils.detection.settings import LossSettings
from utils.distillation.distiller import Distiller
from utils.training.team import Team

COLUMNS = {"box": "box_loss", "objectness": "objectness_loss", "classes": "class_loss"}
"""Columns in results.csv of the terms of the detection loss."""


class Objective:
    """The loss of a batch and its terms.

    Args:
        model: on the team's device; what is frozen of it is frozen already, as processes exchange the rest only.
        settings: of the detection loss.
        dtype: of 16 bits, that autocast computes in; None: float32 throughout.
        team: the processes that train together.
        distiller: what else is learnt; None: nothing.
    """

    def __init__(
        self,
        model: Darknet,
        settings: LossSettings,
        dtype: torch.dtype | None,
        team: Team,
        distiller: Distiller | None = None,
    ) -> None:
        self.network, self.settings, self.dtype, self.team = model.network, settings, dtype, team
        # Bounds of activations, and folded statistics, are read: with its own each process would train another network.
        self._parallel = team.parallel(model, buffers=model.quantize_image is not None)
        self._wanted = () if distiller is None else distiller.wanted
        trains = distiller is not None and len(distiller.adapters)
        self._distiller, self._distil = distiller, team.parallel(distiller) if trains else distiller
        self._exchanging = (self._parallel, self._distil) if trains else (self._parallel,)
        taught = () if distiller is None else distiller.lesson.terms
        self.columns: Mapping[str, str] = COLUMNS | {_learnt(term): f"{_learnt(term)}_loss" for term in taught}
        """Column of results.csv for every term."""

    def __call__(self, images: Tensor, targets: Tensor, ignored: Tensor | None = None) -> dict[str, Tensor]:
        """`total`, which is minimised, and its terms: those of `detection_loss`, and weighted ones of a distillation.

        Args:
            images: [B, C, H, W], 0…1.
            targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input.
            ignored: the same of the ignored boxes, see `detection_loss`.
        """
        device = self.team.device.type
        images = images.contiguous(memory_format=torch.channels_last)
        taught = None if self._distiller is None else self._distiller.teach(images)
        with torch.autocast(device, self.dtype, enabled=self.dtype is not None):
            outputs = self._parallel(images, *self._wanted)
        size = (images.shape[-2], images.shape[-1])
        network, positives = self.network, self.team.positives
        terms = detection_loss(outputs.heads, targets, network.yolos, size, self.settings, positives, ignored)
        found = terms._asdict()
        if taught is None:
            return found
        learnt = self._distil(taught, outputs, targets, size)
        found["total"] = found["total"] + sum(learnt.values())
        return found | {_learnt(term): value for term, value in learnt.items()}

    @contextmanager
    def unsynchronised(self, alone: bool) -> Iterator[None]:
        """A context for a batch whose gradient is only added up (`alone`); the last of a step exchanges them."""
        with ExitStack() as contexts:
            for module in self._exchanging:
                contexts.enter_context(self.team.unsynchronised(module, alone))
            yield


def _learnt(term: str) -> str:
    """A term's name beside those of the detection loss."""
    return f"kd_{term}"
