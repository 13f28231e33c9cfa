"""A network that detects: measured on the pictures of a loader, or asked for one picture after the other.

`evaluate` is for test.py and for train.py after every epoch, `Detector` for detect.py. Detections are written as COCO
has them.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models import network_input
from utils.cli import ProgressBar, log
from utils.darknet.network import max_stride
from utils.data.images import GREY, Fit, FitMode, Image, fit, unfit
from utils.detection.average_precision import Evaluator, Metrics
from utils.detection.decode import decode, non_max_suppression, to_corners
from utils.detection.settings import DetectorSettings, EvaluationSettings, Times
from utils.device import constant
from utils.files import ROOT, read_text

if TYPE_CHECKING:
    from utils.data.datasets import Batch, Loader

Model: TypeAlias = Any
"""A `Darknet`, or what stands in for one: it has `network`, and returns `Outputs` or has `decodes` and `rows`."""
T = TypeVar("T")
COCO_GAPS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""Ids between 1 and 90 that COCO gives to no class of its detection task."""
DARKNET_SPELLINGS = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""Names in data/coco.names that COCO writes otherwise."""
_COCO_FILE = re.compile(r"(?:COCO_[a-z0-9]+_)?([0-9]{1,18})", re.ASCII)
ONE_CLASS = ("object",)
"""Names when all classes count as one."""


class View(NamedTuple):
    """One of the pictures that test-time augmentation makes of a picture."""

    scale: float
    flip: bool


VIEWS = (View(1.0, False), View(0.83, True), View(0.67, False))
"""Views of `--augment`: the scales and the flip are those of the suites this one follows."""


class Accuracy(NamedTuple):
    """Average precisions, 0…1."""

    map50: float
    map50_95: float


class ImageDetections(NamedTuple):
    """What was found in one picture."""

    position: int
    """Number of the picture in the data set."""
    boxes: np.ndarray
    """[n, 4], x1, y1, x2, y2 in pixels of the original picture, clipped to it."""
    scores: np.ndarray
    """[n], falling."""
    classes: np.ndarray
    """[n], indices."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns."""

    metrics: Metrics
    times: Times
    detections: tuple[ImageDetections, ...]
    """One a picture, if they were asked for."""
    truth: tuple[np.ndarray, ...] = ()
    """[m, 6] a picture, as `Evaluator.add` takes it; with the detections."""


def evaluate(
    model: Model,
    loader: Loader,
    names: Sequence[str],
    *,
    device: torch.device | str,
    by_size: bool = True,
    keep_detections: bool = False,
    warm: bool = False,
    on_batch: Callable[[int, Batch, list[Tensor]], None] | None = None,
    gather: Callable[[list], list[list]] = lambda part: [part],
    **options: Any,
) -> Evaluation:
    """Detect in every picture and compare with its labels. No parameter, buffer or training flag of the model changes.

    Args:
        model: on `device`.
        loader: of `utils.data.datasets`, without augmentation.
        names: of the classes, by index.
        device: where the pictures go.
        by_size: measure small, medium and large objects too.
        keep_detections: return them, and the objects they were compared with.
        warm: measure times: pass blank batches first, since the first batch of each length is slow, and wait for a GPU
            after each stage.
        on_batch: called with the number of a batch, the batch, and its detections as `suppressed` returns them.
        gather: takes the list of this process and returns those of all processes that share the pictures, so that all
            return the same evaluation.
        options: fields of EvaluationSettings.

    Raises:
        NumericsError: the network returns NaN.
    """
    settings, clock = EvaluationSettings(**options), _Clock(device, exact=warm)
    compared: list[tuple[ImageDetections, np.ndarray]] = []
    with _evaluation_mode(model):
        if warm:
            _warm_up(settings, model, loader, device)
        clock.restart()
        for number, batch in enumerate(ProgressBar("test", loader, unit="batches")):
            images = clock.timed("preprocess", network_input, batch.images, device)
            rows = clock.timed("inference", decoded_rows, model, images, settings)
            detections = clock.timed("nms", suppressed, rows, settings)
            compared += _compared(batch, detections, settings.single_class)
            if on_batch is not None:
                on_batch(number, batch, detections)
            clock.restart()
    times = clock.times(len(compared))
    # In the order of the data set: between equal scores of two pictures COCO's protocol takes the earlier one first.
    compared = sorted(itertools.chain(*gather(compared)), key=lambda pair: pair[0].position)
    scores = Evaluator(ONE_CLASS if settings.single_class else names, by_size=by_size)
    for image, truth in compared:
        scores.add(image.boxes, image.scores, image.classes, truth)
    kept, truths = zip(*compared, strict=True) if keep_detections and compared else ((), ())
    return Evaluation(scores.result(), times, kept, truths)


def measure_accuracy(
    name: str,
    model: Model,
    loader: Loader,
    names: Sequence[str],
    device: torch.device,
    on_batch: Callable[[int, Batch, list[Tensor]], None] | None = None,
) -> Accuracy:
    """AP over all pictures, which is logged under a name; arguments as of `evaluate`."""
    metrics = evaluate(model, loader, names, device=device, by_size=False, on_batch=on_batch).metrics
    log(f"{name}: AP50 {metrics.map50:.3f}, AP50-95 {metrics.map50_95:.3f}")
    return Accuracy(metrics.map50, metrics.map50_95)


def decoded_rows(model: Model, images: Tensor, settings: EvaluationSettings) -> Tensor:
    """Decoded rows [B, N, 5 + C], or [B, N, 6] if all classes are one; images [B, C, H, W]."""
    rows = detect_views(model, images) if settings.augment else detect(model, images)
    return torch.cat((rows[..., :5], rows[..., 5:].amax(-1, keepdim=True)), -1) if settings.single_class else rows


def suppressed(rows: Tensor, settings: EvaluationSettings) -> list[Tensor]:
    """One [n, 6] CPU tensor a picture: x1, y1, x2, y2 in pixels of the network input, confidence, class."""
    options: dict[str, Any] = {"multi_label": settings.multi_label, "max_nms": settings.max_nms}
    return non_max_suppression(rows, settings.conf_thres, settings.iou_thres, **options)


def _warm_up(settings: EvaluationSettings, model: Model, loader: Loader, device: torch.device | str) -> None:
    """Pass a blank batch of every length through the whole chain, with boxes for the suppression."""
    channels = loader.dataset.channels
    for shape in {(len(requests), channels, *requests[0].size) for requests in loader.batch_sampler}:
        blank = torch.zeros(shape, dtype=torch.uint8, device=device)
        rows = decoded_rows(model, network_input(blank, device), settings)
        suppressed(torch.ones_like(rows[:, :2]), settings)


def detect(model: Model, images: Tensor) -> Tensor:
    """Decoded rows [B, N, 5 + C] of images [B, C, H, W], as `utils.detection.decode.decode` returns them."""
    if getattr(model, "decodes", False):  # a file that is read by another program
        return model.rows(images)
    heads = [head.float() for head in model(images).heads]
    return decode(heads, model.network.yolos, (images.shape[2], images.shape[3]))


def detect_views(model: Model, images: Tensor, views: Sequence[View] = VIEWS) -> Tensor:
    """The rows of all views of the images, in pixels of the images: [B, ΣN, 5 + C]."""
    width, stride, rows = images.shape[3], max_stride(model.network), []
    for view in views:
        shown, (scale_x, scale_y) = _shrunk(images.flip(3) if view.flip else images, view.scale, stride)
        view_rows = detect(model, shown)
        view_rows[..., :4] /= constant((scale_x, scale_y, scale_x, scale_y), view_rows.dtype, view_rows.device)
        if view.flip:
            view_rows[..., 0] = width - view_rows[..., 0]
        rows.append(view_rows)
    return torch.cat(rows, dim=1)


def _shrunk(images: Tensor, scale: float, stride: int) -> tuple[Tensor, tuple[float, float]]:
    """Images resized by about `scale` and filled up to multiples of `stride`, and the exact scales of x and y."""
    if scale == 1:
        return images, (1.0, 1.0)
    height, width = images.shape[2:]
    size = round(height * scale), round(width * scale)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    images = F.pad(images, (0, -size[1] % stride, 0, -size[0] % stride), value=GREY / 255)
    return images, (size[1] / width, size[0] / height)


def _compared(
    batch: Batch, detections: Sequence[Tensor], single_class: bool
) -> Iterator[tuple[ImageDetections, np.ndarray]]:
    """Detections and labels of each picture of a batch, in pixels of the original.

    Labels are [m, 6]: class, x1, y1, x2, y2, 1 if the box is ignored; detections come as [n, 6] in pixels of the
    network input.
    """
    targets = torch.cat((F.pad(batch.targets, (0, 1)), F.pad(batch.ignored, (0, 1), value=1))).double()
    height, width = batch.images.shape[2:]
    boxes = (to_corners(targets[:, 2:6]) * targets.new_tensor([width, height, width, height])).numpy()
    images, classes, ignored = targets.numpy()[:, [0, 1, 6]].T
    classes = classes * (not single_class)
    for number, (position, placement) in enumerate(zip(batch.positions.tolist(), batch.fits, strict=True)):
        assert placement is not None  # evaluation does not augment
        rows, labels = detections[number].double().numpy(), images == number
        image = ImageDetections(position, unfit(rows[:, :4], placement), rows[:, 4], rows[:, 5].astype(int))
        yield image, np.column_stack([classes[labels], unfit(boxes[labels], placement), ignored[labels]])


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; afterwards every module gets the training flag it had."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags:
            module.training = training


class _Clock:
    """Sums the time of the stages of every batch; `exact`: a GPU is waited for after each."""

    def __init__(self, device: torch.device | str, *, exact: bool = True) -> None:
        self._device, self._seconds = torch.device(device), dict.fromkeys(Times._fields, 0.0)
        self._waits = exact and self._device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last stage."""
        self._start = time.perf_counter()

    def timed(self, stage: str, function: Callable[..., T], *arguments: Any) -> T:
        """Call a stage of a batch; its time counts from the end of the stage before."""
        result = function(*arguments)
        if self._waits:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[stage] += now - self._start
        self._start = now
        return result

    def times(self, images: int = 1) -> Times:
        """Milliseconds an image."""
        return Times(*(1000 * seconds / max(1, images) for seconds in self._seconds.values()))


@dataclass(frozen=True)
class Detector:
    """A network and its settings."""

    model: Model
    """In evaluation mode, where it is to run; with its batch normalisations folded it is faster."""
    size: tuple[int, int]
    """Height and width of the network input."""
    mode: FitMode
    settings: DetectorSettings

    @property
    def device(self) -> torch.device:
        """Where pictures go: the CPU, unless the network has parameters elsewhere."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def detect(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float64], Times]:
        """Detections in a picture, best first, each of the best class of its row only.

        Args:
            image: uint8 [H, W, 3], RGB.

        Returns:
            [n, 6]: x1, y1, x2, y2 in pixels of the picture, clipped to it, confidence, class; and the time it took.

        Raises:
            NumericsError: the network returns NaN.
        """
        clock = _Clock(self.device)
        images, placed = clock.timed("preprocess", self._fitted, image)
        with torch.inference_mode():
            rows = clock.timed("inference", detect_views if self.settings.augment else detect, self.model, images)
        return clock.timed("nms", self._detections, rows, placed), clock.times()

    def _fitted(self, image: NDArray[np.uint8]) -> tuple[Tensor, Fit]:
        """The input of the network, and the position of the picture in it."""
        if self.model.network.net.channels == 1:
            image = cast("Image", cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[..., None]
        fitted, placed = fit(image, self.size, self.mode)
        pixels = torch.from_numpy(np.ascontiguousarray(fitted.transpose(2, 0, 1)))
        return network_input(pixels[None], self.device), placed

    def _detections(self, rows: Tensor, placed: Fit) -> NDArray[np.float64]:
        """What `detect` returns."""
        settings = self.settings
        nms: dict[str, Any] = {"agnostic": settings.agnostic, "classes": settings.classes, "max_nms": settings.max_nms}
        (suppressed,) = non_max_suppression(rows, settings.conf_thres, settings.iou_thres, **nms)
        detections = suppressed.double().numpy()
        detections[:, :4] = unfit(detections[:, :4], placed)
        return detections

    def warm_up(self) -> None:
        """Pass a blank picture and two boxes through the whole chain: first passes import, allocate and compile."""
        height, width = self.size
        self.detect(np.zeros((2 * height, 2 * width, 3), np.uint8))
        non_max_suppression(torch.ones(1, 2, 6, device=self.device), 0.5, 0.5)


def category_ids(names: Sequence[str]) -> tuple[int, ...]:
    """COCO's ids (1..90) if the names are COCO's 80 in its order, in either spelling; otherwise the indices."""
    known = read_text(ROOT / "data" / "coco.names").splitlines()
    if [DARKNET_SPELLINGS.get(name, name) for name in names] == [DARKNET_SPELLINGS.get(name, name) for name in known]:
        return tuple(number for number in range(1, 91) if number not in COCO_GAPS)
    return tuple(range(len(names)))


def image_id(path: Path | str) -> int | str:
    """The number that is the file's name, also behind COCO's 2014 prefix (`COCO_val2014_`); otherwise the stem."""
    stem = Path(path).stem
    match = _COCO_FILE.fullmatch(stem)
    return int(match[1]) if match else stem


def coco_results(
    path: Path | str, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections of one picture as COCO has them: boxes are left, top, width, height in pixels of the picture.

    Args:
        path: of the picture.
        boxes: [n, 4], x1, y1, x2, y2 in pixels of the picture.
        scores: [n].
        classes: [n], indices into `ids`.
        ids: of the categories, see `category_ids`.
    """
    image = image_id(path)
    xywh = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    return [
        {"image_id": image, "category_id": ids[index], "bbox": [round(v, 3) for v in box], "score": round(score, 5)}
        for box, score, index in zip(xywh.tolist(), scores.tolist(), classes.tolist(), strict=True)
    ]
