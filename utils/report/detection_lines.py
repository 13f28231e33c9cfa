"""What detect.py prints: a line a frame, or JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from utils.cli import one_line
from utils.data.sources import Frame
from utils.detection.settings import Times

Layout = Literal["text", "array", "lines"]
"""What stdout gets: lines for people, one JSON array, or a JSON object a line; with JSON the lines go to stderr."""


class DetectionReport:
    """Prints frames as they come. A context, since an array is closed when the run is interrupted, too.

    Args:
        names: names of the classes.
        layout: how results are printed.
    """

    def __init__(self, names: Sequence[str], layout: Layout) -> None:
        self._names = names
        self._layout = layout
        self._times: list[Times] = []

    def __enter__(self) -> DetectionReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._layout == "array" and (kind is None or self._times):
            print("\n]" if self._times else "[]", flush=True)

    def add(self, frame: Frame, detections: NDArray[np.floating], times: Times) -> None:
        """Print one frame.

        Args:
            frame: as it was read.
            detections: [n, 6], x1, y1, x2, y2 in pixels of the picture, confidence, class.
            times: what it took.
        """
        if self._layout == "array":
            print(",\n" if self._times else "[\n", self._json(frame, detections), sep="", end="", flush=True)
        elif self._layout == "lines":
            print(self._json(frame, detections), flush=True)
        self._times.append(times)
        self.say(self._line(frame, detections, times))

    def say(self, text: str) -> None:
        """Print a line for people."""
        print(one_line(text), file=sys.stdout if self._layout == "text" else sys.stderr, flush=True)

    def summary(self) -> str:
        """Number of frames and mean times."""
        mean = Times(*np.mean(self._times, axis=0))
        stages = ", ".join(f"{stage} {value:.1f}" for stage, value in mean._asdict().items())
        return f"{len(self._times)} frame{'s' * (len(self._times) > 1)}, {sum(mean):.1f} ms each ({stages})"

    def _json(self, frame: Frame, detections: NDArray[np.floating]) -> str:
        found: list[dict[str, Any]] = [
            {"class": int(label), "name": self._names[int(label)], "confidence": confidence, "box": box}
            for *box, confidence, label in detections.tolist()
        ]
        return json.dumps({"source": frame.source, "frame": frame.index, "detections": found}, allow_nan=False)

    def _line(self, frame: Frame, detections: NDArray[np.floating], times: Times) -> str:
        height, width = frame.image.shape[:2]
        position = "" if frame.kind == "picture" else f" frame {frame.index}"
        counts = sorted(Counter(detections[:, 5].astype(int).tolist()).items())
        found = ", ".join(f"{count} {self._names[label]}" for label, count in counts) or "nothing"
        return f"{frame.source}{position} {width}x{height}: {found} ({sum(times):.1f} ms)"
