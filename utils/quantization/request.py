"""What a quantization after training is asked to do; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.darknet.blocks import Network
from utils.darknet.data_file import DataConfig
from utils.darknet.shapes import picture_channels
from utils.errors import DataError, InputError
from utils.model_files import ModelFiles
from utils.quantization.scheme import QuantSettings

PICTURES = 128
"""Calibration pictures unless --calib says how many, if there are as many."""
OBSERVED: Mapping[str, str] = {
    "minmax": "the whole range",
    "percentile": "all but a hundred-thousandth of the values at either end",
    "mse": "least square error of what is handed on",
    "entropy": "least Kullback-Leibler divergence, as TensorRT",
    "cosine": "smallest angle between what is handed on and what is in float",
}
"""--observer; `observers.OBSERVERS` has the functions."""
AUTO = "auto"
"""The one of OBSERVED that leaves least noise in the heads."""


@dataclass(frozen=True)
class QuantRequest:
    """What quantize.py was asked for, checked as far as it can be without torch."""

    files: ModelFiles
    data: DataConfig
    settings: QuantSettings
    flags: Mapping[str, Any]
    """Every flag and its value, for args.yaml."""
    command: str = ""
    """As it was typed."""
    observer: str = AUTO
    """A key of OBSERVED, or AUTO."""
    pictures: int | None = None
    """For the calibration; None: PICTURES, or all if there are fewer."""
    seed: int = 0
    """Of their choice."""
    equalize: bool = False
    correct: bool = False
    """Correct biases."""
    keep_float: int = 0
    """Convolutions that stay float, those that do most harm."""
    max_drop: float | None = None
    """Points of AP50 that may be lost; convolutions become float again until no more are."""
    sensitivity: bool = False
    """Measure what each convolution does alone."""
    sides: tuple[int, ...] | None = None
    """Of the network input, as `cli.input_size` takes them."""
    mode: Literal["letterbox", "stretch"] = "letterbox"
    batch_size: int = 16
    device: str = ""
    test: bool = True
    """Measure accuracy before and after."""
    as_json: bool = False
    project: Path = Path("runs/quantize")
    name: str = "exp"
    exist_ok: bool = False

    def __post_init__(self) -> None:
        if self.data.train is None:
            raise DataError(f"{self.data.path}: names no train pictures, which the calibration needs")
        if self.settings.target == "fpga" and (self.keep_float or self.max_drop is not None):
            flag = "--keep-float" if self.keep_float else "--max-drop"
            raise InputError(f"{flag}: --target fpga has no float arithmetic; leave one of them out")
        if self.max_drop is not None and not self.test:
            raise InputError("--max-drop: has to measure; leave out --no-test")
        if self.test and self.data.valid is None:
            raise DataError(f"{self.data.path}: names no valid pictures to measure on; --no-test works without")

    @property
    def ranks(self) -> bool:
        """Whether it has to be known what each convolution does alone."""
        return self.sensitivity or self.keep_float > 0 or self.max_drop is not None

    def check_classes(self, network: Network) -> None:
        """Refuse weights of another class count than the data set's, or of other channels than its pictures have.

        Raises:
            InputError, CfgError: says both numbers.
        """
        picture_channels(network)
        if network.classes != self.data.classes:
            raise InputError(
                f"{self.files.weights}: a network of {network.classes} classes, but {self.data.path} has "
                f"{self.data.classes}; give the data set it was trained with"
            )
