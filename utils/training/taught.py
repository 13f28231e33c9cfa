"""The teacher of a run, loaded and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from models import Darknet
from utils.checkpoint import load_model, origin
from utils.cli import log
from utils.darknet.cfg import format_network
from utils.darknet.shapes import max_stride
from utils.detection.settings import ASSIGNMENTS
from utils.device import training_type
from utils.distillation.distiller import Distiller
from utils.distillation.pair import Kept, rebased
from utils.distillation.strategies import See
from utils.distillation.teacher import Teacher
from utils.errors import InputError
from utils.training.distil_flags import Distillation
from utils.training.settings import Hyperparameters, TrainSettings
from utils.training.team import Team


class Taught(NamedTuple):
    """A distillation that is ready."""

    distiller: Distiller | None
    origin: Mapping[str, Any] | None
    """Path and sha256 of the teacher's file, and the lesson; an entry of the lineage."""
    digest: str | None = None
    """Of the teacher's file and its network, which may be that of another file."""


def taught(
    asked: Distillation | None,
    student: Darknet,
    kept: Kept | None,
    settings: TrainSettings,
    hyp: Hyperparameters,
    team: Team,
    rect: bool = False,
) -> Taught:
    """Load the teacher and pair it with the student.

    Args:
        asked: what train.py was asked for; None: no distillation.
        student: model that is trained.
        kept: where its convolutions come from, if it was pruned.
        settings: of the run; the teacher must be able to work at its sizes.
        hyp: whose assignment tells which predictions answer for an object.
        team: on whose device the teacher runs.
        rect: batches have the shapes of their pictures.

    Raises:
        WeightsError: the teacher's file cannot be used.
        InputError: teacher and student have nothing in common that the lesson compares, or other input sizes.
    """
    if asked is None:
        return Taught(None, None)
    loaded = load_model(asked.teacher)
    for note in loaded.notes:
        log(note)
    _check_sizes(student, loaded.model, settings, rect, str(loaded.path))
    teacher = Teacher(loaded.model, team.device, training_type(settings.precision, team.device))
    if kept is not None and loaded.kept is not None:
        kept = rebased(kept, loaded.kept)
    distiller = Distiller(student, teacher, asked.lesson, ASSIGNMENTS[hyp.loss.assignment], kept, team.positives)
    distiller = distiller.to(team.device)
    for note in distiller.notes:
        log(f"{loaded.path}: {note}")
    log(f"{asked.lesson.name}: learns {_told(distiller.lesson.terms)} from {loaded.path}{_comparison(distiller)}")
    entry = {**origin(loaded.path), "teacher": asked.lesson.name}
    network = format_network(teacher.network)
    return Taught(distiller, entry, hashlib.sha256(f"{entry['sha256']}\n{network}".encode()).hexdigest())


def _told(terms: Mapping[str, float]) -> str:
    return ", ".join(f"{weight:g} · {term}" for term, weight in terms.items())


def _comparison(distiller: Distiller) -> str:
    """What is compared, for the log."""
    heads, features = distiller.pairing.heads, distiller.pairing.features
    parts = [f"{len(heads)} heads"] if heads else []
    if features:
        parts.append(f"features of blocks {', '.join(str(feature.student) for feature in features)}")
    if distiller.lesson.sees(See.CHANNELS):
        kept = sum(feature.compares_channels and feature.channels is not None for feature in features)
        parts.append(f"{kept} against the channels that were kept, {len(distiller.adapters)} through an adapter")
    return f" ({'; '.join(parts)})"


def _check_sizes(student: Darknet, teacher: Darknet, settings: TrainSettings, rect: bool, path: str) -> None:
    mine, theirs = max_stride(student.network), max_stride(teacher.network)
    varied = rect or settings.sizes is not None
    if bad := next((side for side in (*settings.size, *((mine,) if varied else ())) if side % theirs), None):
        what = f"sides are multiples of {mine}" if varied else f"a side is {bad}"
        raise InputError(f"{path}: needs an input with sides that are multiples of {theirs}; {what} here")
