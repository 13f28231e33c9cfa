"""A network that looks at one picture after the other, as detect.py uses it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from utils.data.images import FitMode, Image, fit, unfit
from utils.detection.decode import non_max_suppression
from utils.detection.evaluate import Model, detect, detect_views, network_input
from utils.detection.settings import DetectorSettings, Times
from utils.errors import NumericsError


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
        moments = [time.perf_counter()]
        device = self.device
        if self.model.network.net.channels == 1:
            image = cast("Image", cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[..., None]
        fitted, placed = fit(image, self.size, self.mode)
        images = network_input(torch.from_numpy(np.ascontiguousarray(fitted.transpose(2, 0, 1)))[None], device)
        _lap(moments, device)
        with torch.inference_mode():
            rows = (detect_views if self.settings.augment else detect)(self.model, images)
        if rows.isnan().any():
            raise NumericsError("the network returns NaN; its weights are damaged or its training diverged")
        _lap(moments, device)
        settings = self.settings
        nms: dict[str, Any] = {"agnostic": settings.agnostic, "classes": settings.classes, "max_nms": settings.max_nms}
        found = non_max_suppression(rows, settings.conf_thres, settings.iou_thres, **nms)[0]
        detections = found.double().cpu().numpy()
        detections[:, :4] = unfit(detections[:, :4], placed)
        _lap(moments, device)
        return detections, Times(*(1000 * np.diff(moments)))

    def warm_up(self) -> None:
        """Pass a blank picture and two boxes through the whole chain: first passes import, allocate and compile."""
        height, width = self.size
        self.detect(np.zeros((2 * height, 2 * width, 3), np.uint8))
        non_max_suppression(torch.ones(1, 2, 6, device=self.device), 0.5, 0.5)


def _lap(moments: list[float], device: torch.device) -> None:
    """Add the moment at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    moments.append(time.perf_counter())
