"""What a student learns from its teacher: every strategy is a table of terms and their weights; no torch.

The numbers are those of the suites this one follows (SpursLipu, chumingqian: `--KDstr`, `--AT_str`); cwd and pkd are
later methods. A term is a key of `utils.distillation.terms.TERMS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, auto
from types import MappingProxyType
from typing import Any

from utils.errors import InputError

TEMPERATURE = 3.0
"""T of the suites this one follows."""
LARGEST_WEIGHT = 1e6
LARGEST_TEMPERATURE = 100.0


@dataclass(frozen=True)
class Strategy:
    """One way to teach."""

    what: str
    normalised: Mapping[str, float]
    """Weights of terms whose size depends on neither batch, grid nor number of objects."""
    original: Mapping[str, float]
    """Terms and weights as they were published, whatever they depend on."""


def _strategy(what: str, normalised: Mapping[str, float], original: Mapping[str, float]) -> Strategy:
    return Strategy(what, MappingProxyType(dict(normalised)), MappingProxyType(dict(original)))


class See(Flag):
    """What a term looks at."""

    SCORES = auto()
    """Objectness or classes."""
    BOXES = auto()
    MAPS = auto()
    """Attention maps, Σ_c F_c² of every feature."""
    MAGNITUDES = auto()
    """Σ_c |F_c| of every feature, which takes the features themselves."""
    CHANNELS = auto()
    """Features channel by channel."""


ATTENTION: Mapping[str, Mapping[str, Any]] = {
    f"attention{'_mean' * mean}{f'_{group}' if group else ''}{'_masked' * masked}": {
        "group": group, "mean": mean, "masked": masked,
    }
    for group in (None, "backbone", "deep", "neck")
    for mean in (False, True)
    for masked in (False, True)
}  # fmt: skip
"""The ways to compare attention maps: of a group of features or of all; squares averaged over the cells, as published;
near objects only."""
SEES: Mapping[str, See] = {
    "vector": See.SCORES | See.BOXES,
    **dict.fromkeys(("joint", "joint_mean", "objectness", "classes", "class_softmax"), See.SCORES),
    **dict.fromkeys(("box", "box_bounded", "box_sum", "box_bounded_sum"), See.BOXES),
    **dict.fromkeys(("energy", *ATTENTION), See.MAPS),
    "energy_masked": See.MAGNITUDES,
    **dict.fromkeys(("cwd", "pkd"), See.CHANNELS),
}
"""What each term looks at; `terms.TERMS` has the same keys."""


OUTPUTS = {"objectness": 1.0, "classes": 3.0, "box": 2.5}
GROUPED = {"attention_backbone": 2.0, "attention_deep": 0.2, "attention_neck": 0.2}
GROUPED_ORIGINAL = {"attention_mean_backbone": 1e6, "attention_mean_deep": 1e3, "attention_mean_neck": 1e4}
EVEN_ORIGINAL = dict.fromkeys(GROUPED_ORIGINAL, 1e3)

KD: dict[str, Strategy] = {
    "1": _strategy(
        "outputs: softmax over the classes, soft objectness",
        {"objectness": 1.0, "class_softmax": 1.0},
        {"vector": 1e-3},
    ),
    "2": _strategy(
        "boxes and classes apart; boxes towards the objects, where the teacher is nearer to them",
        {"objectness": 1.0, "classes": 3.0, "box_bounded": 2.5},
        {"joint": 1e-4, "box_bounded_sum": 1e-3},
    ),
    "3": _strategy("boxes and classes apart, both from the teacher", OUTPUTS, {"joint": 1e-4, "box_sum": 1e-3}),
    "4": _strategy(
        "3, and where the features are strong",
        OUTPUTS | {"attention": 0.4},
        {"joint": 1e-2, "box_sum": 1e-2, "energy": 0.08},
    ),
    "5": _strategy(
        "4 with the features near objects only",
        OUTPUTS | {"attention_masked": 0.4},
        {"joint_mean": 0.1, "box_sum": 1e-3, "energy_masked": 0.1},
    ),
    "cwd": _strategy("channel-wise distillation of the features before heads and upsamplings",
                     {"cwd": 4.0}, {"cwd": 50.0}),
    "pkd": _strategy("Pearson correlation with the features before heads and upsamplings",
                     {"pkd": 1.0}, {"pkd": 10.0}),
}  # fmt: skip
"""--KDstr."""
AT: dict[str, Strategy] = {
    "1": _strategy("attention maps, one weight", {"attention": 0.4}, dict.fromkeys(GROUPED_ORIGINAL, 1e4)),
    "2": _strategy("attention maps, a weight for each group of them", GROUPED, GROUPED_ORIGINAL),
    "3": _strategy("2, and the outputs of --KDstr 3",
                   GROUPED | OUTPUTS, GROUPED_ORIGINAL | {"joint": 1e-3, "box_sum": 1e-3}),
    "4": _strategy("3 with the weights for a MobileNet: the groups alike",
                   {"attention": 0.4} | OUTPUTS, EVEN_ORIGINAL | {"joint": 1e-3, "box_sum": 1e-3}),
    "5": _strategy("3 with the weights for Darknet-53: the groups alike, the outputs tenfold",
                   {"attention": 0.4} | {term: 10 * weight for term, weight in OUTPUTS.items()},
                   EVEN_ORIGINAL | {"joint": 1e-2, "box_sum": 1e-2}),
}  # fmt: skip
"""--AT_str."""
WEIGHTINGS = ("normalised", "original")
DEFAULT = "4"
"""The --KDstr that measured best (docs/distillation.md)."""


@dataclass(frozen=True)
class Lesson:
    """What is asked of a distillation."""

    name: str
    """The flags that chose it, e.g. `--KDstr 3`."""
    terms: Mapping[str, float]
    """Weight of every term."""
    temperature: float = TEMPERATURE

    def sees(self, what: See) -> bool:
        """Whether a term looks at any of it."""
        return any(SEES[term] & what for term in self.terms)


def lesson(
    kd: str | None,
    at: str | None,
    *,
    weighting: str = "normalised",
    weight: float = 1.0,
    temperature: float = TEMPERATURE,
    masked: bool = False,
) -> Lesson:
    """The terms of a `--KDstr`, of an `--AT_str`, or of both; the weights of a term they share are added.

    Args:
        kd: key of KD, or None.
        at: key of AT, or None; one of both is needed.
        weighting: one of WEIGHTINGS.
        weight: of everything.
        temperature: T.
        masked: attention near objects only.

    Raises:
        InputError: `masked` without attention maps.
    """
    chosen = [(f"--KDstr {kd}", KD[kd])] if kd else []
    chosen += [(f"--AT_str {at}", AT[at])] if at else []
    terms: dict[str, float] = {}
    for _, strategy in chosen:
        for term, share in getattr(strategy, weighting).items():
            terms[term] = terms.get(term, 0.0) + weight * share
    others = (("weighting", weighting, WEIGHTINGS[0]), ("weight", f"{weight:g}", "1"),
              ("temperature", f"{temperature:g}", f"{TEMPERATURE:g}"))  # fmt: skip
    flags = [flag for flag, _ in chosen] + [f"--kd-{name} {value}" for name, value, usual in others if value != usual]
    found = Lesson(" ".join(flags), terms, temperature)
    if not masked:
        return found
    if not terms.keys() & ATTENTION.keys():
        raise InputError(f"--kd-mask: is for attention maps, which {found.name} does not compare; leave it out")
    near: dict[str, float] = {}
    for term, share in terms.items():
        if term in ATTENTION and not ATTENTION[term]["masked"]:
            term = f"{term}_masked"
        near[term] = near.get(term, 0.0) + share
    return dataclasses.replace(found, name=f"{found.name} --kd-mask", terms=near)
