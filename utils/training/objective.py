"""What a training minimises: the detection loss, and what a distillation from a teacher adds to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import Darknet
from utils.checkpoint import load_model, origin
from utils.cli import log
from utils.darknet.cfg import format_network
from utils.darknet.network import max_stride
from utils.detection.losses import detection_loss
from utils.detection.settings import ASSIGNMENTS, LossSettings
from utils.device import training_type
from utils.distillation.matching import Kept, rebased
from utils.distillation.strategies import Quantity, distillation
from utils.distillation.terms import Distiller, Teacher
from utils.errors import InputError
from utils.training.distributed import Team
from utils.training.settings import TrainPlan, TrainSettings

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
        self.yolos, self.settings, self.dtype, self.team = model.network.yolos, settings, dtype, team
        # Bounds of activations, and folded statistics, are read: with its own each process would train another network.
        self._parallel = team.parallel(model, buffers=model.quantize_image is not None)
        self._wanted = () if distiller is None else distiller.wanted
        self._distiller, self._exchanging = distiller, [self._parallel]
        self._distil: nn.Module | None = distiller
        if distiller is not None and len(distiller.adapters):
            self._distil = team.parallel(distiller)
            self._exchanging.append(self._distil)
        terms = () if distiller is None else distiller.distillation.terms
        self.columns: Mapping[str, str] = COLUMNS | {f"kd_{term}": f"kd_{term}_loss" for term in terms}
        """Column of results.csv for every term."""

    def __call__(self, images: Tensor, targets: Tensor, ignored: Tensor | None = None) -> dict[str, Tensor]:
        """Return `total`, which is minimised, and its terms: those of `detection_loss`, and weighted `kd_…` terms.

        Args:
            images: [B, C, H, W], 0…1.
            targets: [N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input.
            ignored: the same of the ignored boxes, see `detection_loss`.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        teacher = None if self._distiller is None else self._distiller.teach(images)
        with torch.autocast(self.team.device.type, self.dtype, enabled=self.dtype is not None):
            outputs = self._parallel(images, *self._wanted)
        size = (images.shape[-2], images.shape[-1])
        options = (self.settings, self.team.positives, ignored)
        terms = detection_loss(outputs.heads, targets, self.yolos, size, *options)._asdict()
        if self._distil is not None:
            learnt = self._distil(teacher, outputs, targets, size)
            terms["total"] = terms["total"] + sum(learnt.values())
            terms |= {f"kd_{term}": value for term, value in learnt.items()}
        return terms

    @contextmanager
    def unsynchronised(self, alone: bool) -> Iterator[None]:
        """A context for a batch whose gradient is only added up (`alone`); the last of a step exchanges them."""
        with ExitStack() as contexts:
            for module in self._exchanging:
                contexts.enter_context(self.team.unsynchronised(module, alone))
            yield


class LoadedTeacher(NamedTuple):
    """A distillation that is ready."""

    distiller: Distiller
    origin: Mapping[str, Any]
    """Path and sha256 of the teacher's file, and the strategy; an entry of the lineage."""
    digest: str
    """Of the teacher's file and its network, which may be that of another file."""


def load_teacher(plan: TrainPlan, student: Darknet, kept: Kept | None, team: Team) -> LoadedTeacher:
    """Load the teacher and pair it with the student.

    Args:
        plan: of a run with a teacher.
        student: model that is trained.
        kept: where its convolutions come from, if it was pruned.
        team: on whose device the teacher runs.

    Raises:
        WeightsError: the teacher's file cannot be used.
        InputError: teacher and student have nothing in common that is compared, or other input sizes.
    """
    assert plan.teacher is not None and plan.teacher.weights is not None  # choose_model has found them
    settings, loaded = plan.settings, load_model(plan.teacher)
    for note in loaded.notes:
        log(note)
    _check_sizes(student, loaded.model, settings, str(loaded.path))
    teacher = Teacher(loaded.model, team.device, training_type(settings.precision, team.device))
    if kept is not None and loaded.kept is not None:
        kept = rebased(kept, loaded.kept)
    chosen = distillation(settings.KDstr, settings.AT_str, settings.kd_weight)
    rule = ASSIGNMENTS[plan.hyp.loss.assignment]
    distiller = Distiller(student, teacher, chosen, rule, kept, team.positives).to(team.device)
    for note in distiller.notes:
        log(f"{loaded.path}: {note}")
    terms = ", ".join(f"{weight:g} · {term}" for term, weight in distiller.distillation.terms.items())
    log(f"{chosen.name}: learns {terms} from {loaded.path} ({_comparison(distiller)})")
    entry = {**origin(plan.teacher.weights), "teacher": chosen.name}
    network = format_network(teacher.network)
    return LoadedTeacher(distiller, entry, hashlib.sha256(f"{entry['sha256']}\n{network}".encode()).hexdigest())


def _comparison(distiller: Distiller) -> str:
    """Return what is compared, for the log."""
    heads, features = distiller.pairing.heads, distiller.pairing.features
    parts = [f"{len(heads)} heads"] if heads else []
    if features:
        parts.append(f"features of blocks {', '.join(str(feature.student) for feature in features)}")
    if distiller.distillation.compares(Quantity.CHANNELS):
        kept = sum(feature.compares_channels and feature.channels is not None for feature in features)
        parts.append(f"{kept} against the channels that were kept, {len(distiller.adapters)} through an adapter")
    return "; ".join(parts)


def _check_sizes(student: Darknet, teacher: Darknet, settings: TrainSettings, path: str) -> None:
    mine, theirs = max_stride(student.network), max_stride(teacher.network)
    varied = settings.rect or settings.sizes is not None
    sides = (*settings.size, mine) if varied else settings.size
    if bad := next((side for side in sides if side % theirs), None):
        what = f"sides are multiples of {mine}" if varied else f"a side is {bad}"
        raise InputError(f"{path}: needs an input with sides that are multiples of {theirs}; {what} here")
