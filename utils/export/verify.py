"""The proof of a file: its network computes what the model computes in PyTorch. The package onnx may be missing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet, network_input
from utils.darknet.network import picture_channels
from utils.data.images import fit, read_image
from utils.detection.decode import MAX_DETECTIONS, candidates, decode
from utils.errors import InfeasibleError, NumericsError, WeightsError
from utils.export.integers import Codes, Gap, layer_gaps, stages
from utils.export.settings import ExportSettings
from utils.files import foreign_errors
from utils.runtime.engines import Engine, litert_engine, onnxruntime_engine, with_outputs
from utils.runtime.exported import TOLERANCES, Arrays, Metadata, ReferenceOutputs, compare, parts, reference
from utils.runtime.exported import picture as random_pictures

if TYPE_CHECKING:
    import onnx

MOST_OTHER = 0.01
"""Share of detections that may differ: two programs round an overlap at the threshold each in its way."""


class Subject(NamedTuple):
    """A network that is exported."""

    model: Darknet
    """On the network of `metadata`, not folded, in evaluation mode."""
    metadata: Metadata


@dataclass(frozen=True)
class Agreement:
    """Distance of a file from PyTorch."""

    max_abs_error: float = 0.0
    """max|a - b| over all raw heads, or over all rows."""
    error: float = 0.0
    """max|a - b| / max(1, max|a|), of the worst head."""
    tolerance: float | None = 0.0
    """None: layers with integers are compared one by one, as a step in one is carried on to the next."""
    runtime: str = f"PyTorch {torch.__version__}"
    """What ran it."""
    reference: ReferenceOutputs | None = None
    """Values that the file keeps."""

    def check(self, what: str) -> None:
        """Refuse a file that is too far off.

        Raises:
            InfeasibleError: says how far.
        """
        limit = sys.float_info.max if self.tolerance is None else self.tolerance
        if not self.error <= limit:  # NaN, too
            raise InfeasibleError(
                f"{what}: its outputs differ from PyTorch's by {self.error:.3g} of the largest value, more than the "
                f"{limit:g} that rounding explains ({self.runtime}); nothing is written"
            )


def picture(metadata: Metadata, count: int = 1, sample: Path | None = None) -> Tensor:
    """Random pictures of a file's size, or the one of a file as the network sees it, [count, C, H, W], 0…1.

    Raises:
        DataError, CfgError: the file cannot be read, or not as the network takes it.
    """
    if sample is None:
        return torch.from_numpy(random_pictures(metadata.network, count))
    pixels, _ = fit(read_image(sample, picture_channels(metadata.network)), metadata.size, metadata.mode)
    return network_input(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()), torch.device("cpu"))


@torch.inference_mode()
def raw_heads(model: Darknet, images: Tensor) -> Arrays:
    """Heads of the model in PyTorch.

    Raises:
        NumericsError: they are not finite, so that nothing can be compared.
    """
    heads = model(images).heads
    if not all(head.isfinite().all() for head in heads):
        raise NumericsError("the network puts out NaN or infinity; its weights overflow, take other ones")
    return [head.numpy() for head in heads]


def decoded(heads: Arrays, metadata: Metadata) -> Arrays:
    """Boxes and scores of the rows that raw heads stand for."""
    rows = decode([torch.from_numpy(head) for head in heads], metadata.network.yolos, metadata.size)
    return parts(rows.numpy())


def agreement(want: Arrays, outputs: Arrays, metadata: Metadata, runtime: str) -> Agreement:
    """Distance of outputs from those of PyTorch, with the tolerance of the file's precision."""
    tolerance = None if metadata.precision == "int8" else TOLERANCES[metadata.precision]
    kept = reference(want, outputs, metadata.precision)
    return Agreement(*compare(want, outputs), tolerance, runtime, kept)


def verify(what: str, subject: Subject, engine: Engine) -> Agreement:
    """Compare the raw heads or rows of a program with PyTorch.

    Args:
        what: flag that asked for the file.
        subject: the network.
        engine: the program with the file.

    Raises:
        InfeasibleError: they differ.
    """
    metadata = subject.metadata
    images = picture(metadata, engine.batch or 2)
    want, outputs = raw_heads(subject.model, images), engine(images.numpy())
    if metadata.output == "rows":
        want, outputs = decoded(want, metadata), parts(outputs[0])
    proof = agreement(want, outputs, metadata, engine.name)
    proof.check(what)
    return proof


def check_same(what: str, written: Mapping[str, NDArray[Any]], read: Mapping[str, NDArray[Any]]) -> None:
    """Refuse a file that does not give back what was put in.

    Raises:
        InfeasibleError: names the tensor.
    """
    for key, array in read.items():
        if not np.array_equal(array, written[key]):
            raise InfeasibleError(f"{what}: {key} comes back with other values; nothing is written")


def prove_onnx(
    made: onnx.ModelProto, subject: Subject, settings: ExportSettings, codes: Codes | None
) -> tuple[Agreement, Gap | None]:
    """Run a file in onnxruntime and compare it with PyTorch stage by stage: layers, heads, rows, detections.

    A stage after the heads is compared with what PyTorch makes of the stage before it in the file.

    Args:
        made: the file.
        subject: what it was made of.
        settings: of the file.
        codes: the integers of the model; None: it is float.

    Raises:
        InfeasibleError: it differs, or the checker of ONNX or onnxruntime refuses it.
    """
    import onnx

    model, metadata = subject.model, subject.metadata
    with foreign_errors("--format onnx", "the checker refuses the file", InfeasibleError):
        onnx.checker.check_model(made, full_check=True)
    images = picture(metadata, settings.batch or 2)
    heads = [f"head{number}" for number in range(len(metadata.network.heads))]
    inner = [] if codes is None else stages(model, codes, {node.output[0] for node in made.graph.node})
    names = tuple(dict.fromkeys((*heads, *inner, *(() if metadata.output == "heads" else ("rows", metadata.output)))))
    try:
        for wanted in dict.fromkeys((metadata.tensors, names)):  # onnxruntime fuses less where more is put out
            file = with_outputs(made.SerializeToString(), wanted)
            engine = onnxruntime_engine(file, wanted, settings.batch, wide=metadata.wide)
    except WeightsError as failure:
        raise InfeasibleError(f"--opset {settings.opset}: {failure}; take another one; nothing is written") from None
    tensors = dict(zip(names, engine.run(images.numpy()), strict=True))
    gap = None if codes is None else layer_gaps(model, codes, tensors)
    want, outputs = raw_heads(model, images), [tensors[head] for head in heads]
    proof = agreement(want, outputs, metadata, engine.name)
    proof.check("--format onnx")
    if metadata.output == "heads":
        return proof, gap
    rows = parts(tensors["rows"])
    kept = reference(decoded(want, metadata), rows, metadata.precision)
    gaps = compare(decoded(outputs, metadata), rows)
    Agreement(*gaps, TOLERANCES["float32"], engine.name).check("--decode")
    if metadata.suppresses:
        _check_detections(torch.from_numpy(tensors["rows"]), tensors["detections"], metadata, settings)
    return replace(proof, reference=kept), gap


def prove_tflite(
    made: onnx.ModelProto, subject: Subject, settings: ExportSettings, codes: Codes | None
) -> tuple[Agreement, Gap | None]:
    """Run a TensorFlow Lite file in LiteRT and compare it with PyTorch.

    Heads or rows are compared as LiteRT runs the file, layers with integers one by one, in its reference kernels and
    in those it takes by default, which are XNNPACK's.

    Args:
        made: ONNX nodes that the file is made of.
        subject: the network.
        settings: of the file.
        codes: the integers of the model; None: it is float.

    Raises:
        InfeasibleError: they differ.
    """
    from utils.export.tflite import SHIFT, tflite_file

    metadata, gap = subject.metadata, None
    proof = verify("--format tflite", subject, litert_engine(tflite_file(made, metadata)))
    if codes is not None:
        names = stages(subject.model, codes, {node.output[0] for node in made.graph.node})
        images, probe = picture(metadata, sample=settings.sample).numpy(), tflite_file(made, metadata, names)
        gaps = []
        for plain in (True, False):
            arrays = litert_engine(probe, plain=plain, integers=True).run(images)
            if not codes.slots[-1].grid.signed:
                arrays = [array + np.int16(SHIFT) if array.dtype == np.int8 else array for array in arrays]
            gaps.append(layer_gaps(subject.model, codes, dict(zip(names, arrays, strict=True))))
        gap = max(gaps)
    return proof, gap


def _check_detections(
    rows: Tensor, detections: NDArray[np.floating], metadata: Metadata, settings: ExportSettings
) -> None:
    """Refuse a file whose detections are not those that suppression leaves of its own rows.

    Overlaps are compared in float32, as in the file: equal boxes a few cells apart may overlap by the threshold itself.
    """
    from torchvision.ops import nms

    want = set()
    for number, row in enumerate(rows):
        above = candidates(row, metadata.conf_thres, settings.multi_label)
        for label in above[:, 5].unique():
            boxes = above[above[:, 5] == label]
            kept = nms(boxes[:, :4], boxes[:, 4], float(np.float32(metadata.iou_thres)))[:MAX_DETECTIONS]
            want |= {_key(number, box) for box in boxes[kept].tolist()}
    have = {_key(int(row[0]), row[1:]) for row in detections.tolist()}
    if len(detections) >= MAX_DETECTIONS:  # which of several equal confidences the limit keeps is left to a program
        least = min(key[2] for key in have)
        want, have = ({key for key in keys if key[2] > least} for keys in (want, have))
    if len(want ^ have) > max(2, MOST_OTHER * len(want)):
        raise InfeasibleError(
            f"--nms: {len(want - have)} of {len(want)} detections are missing in the file, {len(have - want)} are "
            "surplus; nothing is written"
        )


def _key(picture: int, row: Sequence[float]) -> tuple[int, ...]:
    """A detection in whole pixels and thousandths."""
    return (picture, int(row[5]), round(1000 * row[4]), *(round(side) for side in row[:4]))
