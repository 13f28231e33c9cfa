"""`[yolo]`, a detection head."""

from __future__ import annotations

from dataclasses import dataclass

from utils.darknet.blocks.block import Block, Key, Labeling, Position, Shape, Trail, Values, key
from utils.darknet.blocks.convolutional import Convolutional
from utils.darknet.blocks.values import Choice, Flag, Integer, List, Number, Pairs, SectionError

SHARE = Number(0, 1)
WEIGHT = Number(0)


@dataclass(frozen=True, kw_only=True)
class Yolo(Block):
    """A detection head; its input has len(mask) · (5 + classes) channels."""

    mask: tuple[int, ...] = key(List(Integer(0, 999)), None)
    anchors: tuple[tuple[float, float], ...] = key(Pairs(List(Number(0, 65536, above=True))))
    """All `num` anchors, width and height in pixels of the network input."""
    classes: int = key(Integer(1, 100_000), 20, told=True)
    num = Key(Integer(1, 1000), 1)
    ignore_thresh: float = key(SHARE, 0.5)
    scale_x_y: float = key(Number(0, 100, above=True), 1.0, optional=True)
    new_coords: bool = key(Flag(), False, optional=True)
    iou_thresh: float = key(SHARE, 1.0, optional=True)
    iou_loss: str = key(Choice(("mse", "iou", "giou", "diou", "ciou")), "mse", optional=True)
    iou_normalizer: float = key(WEIGHT, 0.75, optional=True)
    cls_normalizer: float = key(WEIGHT, 1.0, optional=True)
    obj_normalizer: float = key(WEIGHT, 1.0, optional=True)
    label_smooth_eps: float = key(SHARE, 0.0, optional=True)
    max_delta: float | None = key(Number(0, above=True), None, default=None)
    nms_kind: str = key(Choice(("default", "greedynms", "diounms", "cornersnms")), "default", optional=True)
    beta_nms: float = key(WEIGHT, 0.6, optional=True)

    IS_HEAD = True
    SILENT = (
        "counters_per_class delta_normalizer dets_for_show dets_for_track embedding_layer focal_loss iou_thresh_kind "
        "jitter map max objectness_smooth random resize show_details sim_thresh track_ciou_norm track_history_size "
        "truth_thresh"
    )

    @classmethod
    def read(cls, values: Values, position: Position) -> Block:
        """Without `mask` a head predicts with `num` anchors; otherwise `num` does not matter."""
        count, pairs = values.pop("num"), len(values["anchors"])
        mask = values["mask"] or tuple(range(count))
        for place, anchor in enumerate(mask):
            if anchor >= pairs and not values["mask"]:
                raise SectionError(f"{pairs} pairs, but num is {count}", "anchors")
            if anchor >= pairs:
                raise SectionError(f"there is no anchor {anchor}; anchors has {pairs} pairs, 0..{pairs - 1}", "mask")
            if anchor in mask[:place]:
                raise SectionError(f"anchor {anchor} is named twice; once is allowed", "mask")
        return cls(**values | {"mask": mask})

    def key_values(self, position: Position) -> Values:
        """`num` counts the anchors."""
        return vars(self) | {"num": len(self.anchors)}

    @property
    def head_anchors(self) -> tuple[tuple[float, float], ...]:
        """The anchors this head predicts with, in the order of its channels."""
        return tuple(self.anchors[index] for index in self.mask)

    @property
    def channels(self) -> int:
        """Channels the block before must have."""
        return len(self.mask) * (5 + self.classes)

    def shape(self, trail: Trail) -> Shape:
        """That of the convolution before."""
        index = len(trail.blocks)
        if not index:
            raise SectionError("a head cannot be the first block; it needs a [convolutional] before it")
        if not isinstance(trail.blocks[-1], Convolutional):
            raise SectionError(
                "a head reads the block before it, which must be a [convolutional]; put one between them"
            )
        if trail.classes not in (None, self.classes):
            raise SectionError(f"the head before has {trail.classes}; all heads have the same classes", "classes")
        if trail.before.channels != self.channels:
            raise SectionError(
                f"the [yolo] after it needs {self.channels} = {len(self.mask)} * (5 + {self.classes}), for each anchor "
                "of its mask 4 box values, objectness and the classes",
                "filters",
                index - 1,
            )
        return trail.before

    def label(self, index: int, labels: Labeling) -> list[int]:
        """Those of the convolution before, which stay."""
        labels.pin(index - 1, f"is the head, block {index}")
        return labels.output(index - 1)
