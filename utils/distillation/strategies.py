"""What a student learns from its teacher: every strategy is a table of terms and their weights; no torch.

The numbers are those of the suites this one follows (SpursLipu, chumingqian: `--KDstr`, `--AT_str`). The weights are
ours: no term depends on the size of a batch, a grid or the number of objects. A term is a key of
`utils.distillation.terms.TERMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, auto

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
