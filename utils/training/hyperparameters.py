"""Hyper-parameters of a training, read from a flat YAML file (`--hyp`); no torch.

Every key is a field of one of three dataclasses: the optimizer's below, `LossSettings`, `Augmentation`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.darknet.blocks import Network, Yolo
from utils.data.augment import Augmentation
from utils.detection.settings import LossSettings
from utils.errors import InputError
from utils.files import read_yaml

LARGEST_HYP = 1 << 20
INSTEAD = {
    "iou_loss": "iou_loss",
    "iou_normalizer": "box_gain",
    "cls_normalizer": "class_gain",
    "obj_normalizer": "objectness_gain",
    "label_smooth_eps": "label_smoothing",
    "max_delta": "clip_norm",
    "nms_kind": None,
    "beta_nms": None,
}
"""Keys of `[yolo]` that Darknet uses and a training here does not, and those of --hyp in their place."""


def unused_keys(network: Network) -> str | None:
    """Return a line on keys of the heads that a training does not use, with their values; None if all are defaults."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(Yolo)}
    unused, instead = [], []
    for key, substitute in INSTEAD.items():
        values = [getattr(yolo, key) for yolo in network.yolos]
        if any(value != defaults[key] for value in values):
            unused.append(f"{key}={'/'.join(dict.fromkeys(map(str, values)))}")
            instead += [substitute] if substitute else []
    if not unused:
        return None
    way = f"in their place --hyp has {', '.join(instead)}" if instead else "suppression is the same for all networks"
    return f"{network.path}: training does not use {', '.join(unused)}; {way}"


def fitness(map50: float, map50_95: float) -> float:
    """Return the score that best.pt is chosen by: 0.1 · AP50 + 0.9 · AP50-95."""
    return 0.1 * map50 + 0.9 * map50_95


@dataclass(frozen=True)
class OptimizerSettings:
    """Step sizes and their schedule."""

    lr0: float = 0.03
    """Learning rate that the half cosine falls from, for SGD; Adam takes a thirtieth."""
    lrf: float = 0.01
    """Learning rate that the half cosine falls to, as a share of lr0; see `Schedule.rate`."""
    momentum: float = 0.937
    """Of SGD (Nesterov); β₁ of Adam."""
    weight_decay: float = 5e-4
    """On the weights of convolutions and of [se], never on γ, β or biases."""
    warmup: float = 0.05
    """Share of the optimizer steps in which the learning rate and the momentum of SGD rise to their values."""
    warmup_momentum: float = 0.8
    """Momentum that the rise starts from; the first step has a little more."""
    clip_norm: float = 10.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    ema_horizon: float = 0.02
    """Share of the optimizer steps over which the averaged weights remember."""
    plain_end: float = 0.1
    """Last share of the epochs, trained without mosaic and mixup (arXiv:2107.08430, section 2.1)."""

    def __post_init__(self) -> None:
        for name in ("momentum", "warmup", "warmup_momentum", "ema_horizon", "plain_end", "lrf"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: allowed is 0 <= value <= 1")
        for name in ("momentum", "warmup_momentum"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} 1: allowed is 0 <= value < 1")
        if not 0 < self.lr0 <= 10:
            raise ValueError(f"lr0 {self.lr0}: allowed is 0 < value <= 10")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) <= 1e6:
                raise ValueError(f"{name} {getattr(self, name)}: allowed is 0 <= value <= 1e6")


@dataclass(frozen=True)
class Hyperparameters:
    """All that `--hyp` can set."""

    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def flat(self) -> dict[str, Any]:
        """The values by their keys, as the file has them."""
        return {key: value for part in dataclasses.asdict(self).values() for key, value in part.items()}


def hyperparameters(
    values: Mapping[str, Any], where: str = "hyp", base: Hyperparameters | None = None
) -> Hyperparameters:
    """Defaults (or `base`) with some keys changed.

    Raises:
        InputError: an unknown key, a value of the wrong type or outside its range; `where` names the place.
    """
    base = base or Hyperparameters()
    known, changes = base.flat, {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise InputError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        changes[key] = _cast(value, known[key])
        if changes[key] is None:
            raise InputError(f"{where}: {key} is {value!r}; a {type(known[key]).__name__} is needed")
    parts = {}
    for part in dataclasses.fields(base):
        section = getattr(base, part.name)
        changed = {key: value for key, value in changes.items() if hasattr(section, key)}
        try:
            parts[part.name] = dataclasses.replace(section, **changed)
        except ValueError as failure:
            raise InputError(f"{where}: {failure}") from None
    return Hyperparameters(**parts)


def load_hyperparameters(path: str | Path) -> Hyperparameters:
    """Hyper-parameters of a YAML file; keys it leaves out keep their defaults.

    Raises:
        InputError: the file cannot be read, is no flat mapping, or `hyperparameters` refuses a value.
    """
    values = read_yaml(path, max_bytes=LARGEST_HYP)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a mapping 'key: value' is needed, found {type(values).__name__}")
    return hyperparameters(values, str(path))


def _cast(value: Any, like: Any) -> Any:
    """A value in the type of `like`; None if it has another. PyYAML reads 1e-3, without a point, as a text."""
    if not isinstance(like, float):
        return value if isinstance(value, type(like)) else None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
