"""Settings of assignment, loss, detection and evaluation; no torch, so that flags and a hyp file are checked first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from utils.cli import flag, non_negative_int, positive_int, threshold

LEAST_CONFIDENCE = "least confidence of a detection"
MAX_CANDIDATES = 3000
"""Boxes of a picture that enter suppression, best first; AP does not see the difference."""
SIMILARITIES = ("iou", "giou", "diou", "ciou")


@dataclass(frozen=True)
class Assignment:
    """A rule of target assignment: which anchors answer for an object.

    Widths and heights of an object and of the anchors are compared, centres aligned.
    """

    similarity: str
    """"iou": shape IoU.  "ratio": the smallest of w/w', w'/w, h/h', h'/h."""
    threshold: float | None
    """Anchors whose similarity exceeds this are positive; None: `iou_thresh` of the head."""
    best: bool
    """The best anchor number is positive whatever the threshold, in every head whose mask holds it."""
    neighbours: bool
    """A cell beside the object's is positive as well if the centre is within its reach."""
    ignore: bool
    """A prediction that overlaps any object by more than `ignore_thresh` of its head is not a negative."""


ASSIGNMENTS = {
    "darknet": Assignment("iou", threshold=None, best=True, neighbours=False, ignore=True),
    "ratio": Assignment("ratio", threshold=0.25, best=False, neighbours=True, ignore=False),
}
"""darknet: AlexeyAB/darknet `process_batch`.  ratio: a box within 4 × an anchor's sides, as in YOLOv5 and its heirs."""


@dataclass(frozen=True)
class LossSettings:
    """Weights and shapes of the loss terms."""

    box_gain: float = 5.0
    objectness_gain: float = 1.0
    class_gain: float = 1.0
    iou_loss: str = "ciou"
    """Similarity s of the box term 1 − s."""
    assignment: str = "darknet"
    """A key of ASSIGNMENTS."""
    label_smoothing: float = 0.0
    """ε: class targets become y (1 − ε) + ε / 2, as Darknet's label_smooth_eps."""
    focal_gamma: float = 0.0
    """γ of the focal factor |p − y|^γ on the objectness term (arXiv:1708.02002, for soft targets arXiv:2006.04388)."""

    def __post_init__(self) -> None:
        choices = {"iou_loss": SIMILARITIES, "assignment": tuple(ASSIGNMENTS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        for name in ("box_gain", "objectness_gain", "class_gain", "focal_gamma"):
            if not 0 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} {getattr(self, name)}: allowed is 0 <= value <= 1000")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing}: allowed is 0 <= value < 1")


@dataclass(frozen=True)
class DetectionSettings:
    """From decoded rows to the detections of a picture; its fields are flags."""

    conf_thres: float = flag(0.3, LEAST_CONFIDENCE, type=threshold, metavar="C")
    iou_thres: float = flag(
        0.6, "a box that overlaps a better one of its class by more is dropped", type=threshold, metavar="T"
    )
    augment: bool = flag(False, "merge what is found in three views: as it is, flipped, smaller")
    max_nms: int = flag(
        MAX_CANDIDATES, "boxes of an image that enter suppression, the best ones", type=positive_int, metavar="N"
    )


@dataclass(frozen=True)
class DetectorSettings(DetectionSettings):
    """As detect.py detects."""

    classes: Sequence[int] | None = flag(
        None, "keep these classes only, by number", type=non_negative_int, nargs="+", metavar="N"
    )
    agnostic: bool = flag(False, "boxes drop one another across classes", "--agnostic-nms")


@dataclass(frozen=True)
class EvaluationSettings(DetectionSettings):
    """As AP is measured: COCO's needs a low confidence."""

    conf_thres: float = flag(0.001, LEAST_CONFIDENCE, type=threshold, metavar="C")
    multi_label: bool = flag(
        True, "only the best class of a box (default: all above --conf-thres)", "--single-label", action="store_false"
    )
    single_class: bool = flag(False, "all classes count as one, in labels and detections", "--single-cls")


class Times(NamedTuple):
    """Milliseconds an image."""

    preprocess: float
    """Until a batch is there: reading, decoding, fitting (what the loader's workers do not hide), to the device."""
    inference: float
    """Forward and decoding."""
    nms: float
