"""How a picture of any size is fitted to the input of the network, and how boxes find their way back."""

from __future__ import annotations

from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

FitMode = Literal["letterbox", "stretch"]
GREY = 114
"""Value of the border of a letterbox, the field's convention for nets of this family."""


class Fit(NamedTuple):
    """Where a picture lies in the input of the network: x_input = x * scale_x + left, y_input = y * scale_y + top."""

    original: tuple[int, int]
    """Height and width of the picture."""
    size: tuple[int, int]
    """Height and width of the input."""
    scale_x: float
    scale_y: float
    left: int
    top: int


def place(original: tuple[int, int], size: tuple[int, int], mode: FitMode = "letterbox") -> Fit:
    """Where `fit` puts a picture of `original` height and width in an input of `size` height and width.

    "letterbox" keeps the aspect ratio and centres the picture, "stretch" fills the input. The scales are those of the
    whole pixels that the picture covers, so boxes follow exactly.
    """
    (height, width), (input_height, input_width) = original, size
    if mode == "stretch":
        return Fit(original, size, input_width / width, input_height / height, 0, 0)
    if mode != "letterbox":
        raise ValueError(f"a picture is fitted by letterbox or stretch, not {mode!r}")
    scale = min(input_height / height, input_width / width)
    inner_height, inner_width = max(round(height * scale), 1), max(round(width * scale), 1)
    left, top = (input_width - inner_width) // 2, (input_height - inner_height) // 2
    return Fit(original, size, inner_width / width, inner_height / height, left, top)


def fit(image: NDArray[np.uint8], size: tuple[int, int], mode: FitMode = "letterbox") -> tuple[NDArray[np.uint8], Fit]:
    """Fit a picture to the input of the network by bilinear interpolation.

    Args:
        image: uint8 [H, W, C].
        size: height and width of the input.
        mode: "letterbox" (border 114) or "stretch".

    Returns:
        uint8 [h, w, C], and where the picture lies in it.
    """
    placed = place(image.shape[:2], size, mode)
    return paste(image, placed), placed


def paste(image: NDArray[np.uint8], placed: Fit) -> NDArray[np.uint8]:
    """The input of the network with a picture where `placed` says.

    Args:
        image: uint8 [H, W, C], at any resolution.
        placed: of `place`.

    Returns:
        uint8 [h, w, C]; the picture itself if it needs no change.
    """
    channels, inner = image.shape[2], inner_size(placed)
    if inner != image.shape[:2]:
        resized = cv2.resize(image, inner[::-1], interpolation=cv2.INTER_LINEAR)
        image = resized.reshape(*inner, channels)  # OpenCV drops a single channel
    if inner == placed.size:
        return image
    canvas = np.full((*placed.size, channels), GREY, np.uint8)
    canvas[placed.top : placed.top + inner[0], placed.left : placed.left + inner[1]] = image
    return canvas


def inner_size(placed: Fit) -> tuple[int, int]:
    """Height and width of the picture inside the input."""
    return round(placed.original[0] * placed.scale_y), round(placed.original[1] * placed.scale_x)


def unfit(boxes: NDArray[np.floating], fit: Fit) -> NDArray[np.floating]:
    """Boxes in pixels of the input → boxes in pixels of the original picture, clipped to it.

    Args:
        boxes: [n, 4], x1, y1, x2, y2.
        fit: what `fit` or `place` returned.

    Returns:
        [n, 4], same format and type.
    """
    height, width = fit.original
    moved = (boxes - (fit.left, fit.top) * 2) / ((fit.scale_x, fit.scale_y) * 2)
    return np.clip(moved, 0, (width, height) * 2).astype(boxes.dtype)
