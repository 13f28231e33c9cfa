"""Whether an exported network computes what it computes in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from models import Darknet
from utils.detection.decode import decode
from utils.detection.nms import MAX_DETECTIONS, non_max_suppression
from utils.errors import InfeasibleError, NumericsError
from utils.export import integers
from utils.export.codes import Codes
from utils.export.request import OnnxOptions
from utils.runtime.engines import onnxruntime_engine
from utils.runtime.metadata import Metadata

if TYPE_CHECKING:
    import onnx

Arrays = Sequence[NDArray[np.floating]]
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "int8": None}
"""Largest max|a - b| / max(1, max|a|) of a head. The 11 bits of float16 leave 4e-4 to 6e-3.

Integers are compared layer by layer (`integers.layer_gaps`): a step in one layer is carried on to the next."""
BOX_COLUMNS = 4
MOST_OTHER = 0.01
"""Share of detections that may differ: two programs round an overlap at the threshold each in its way."""
EVERYTHING = 10**9


@dataclass(frozen=True)
class Agreement:
    """How far a file is from PyTorch."""

    max_abs_error: float
    """max|a - b| over all raw heads, or over all rows."""
    error: float
    """max|a - b| / max(1, max|a|), of the worst head."""
    tolerance: float | None
    """None: the layers are compared one by one."""
    runtime: str
    """What ran it."""
    layers: integers.Gap | None = None
    """Of a file with integers."""

    def check(self, what: str) -> None:
        """Refuse a file that is too far off.

        Raises:
            InfeasibleError: says how far.
        """
        limit = sys.float_info.max if self.tolerance is None else self.tolerance
        if not self.error <= limit:  # NaN, too
            raise InfeasibleError(f"{what}: differs from PyTorch by {self.error:.3g} of the largest value, more than "
                                  f"{limit:g} ({self.runtime}); nothing is written")  # fmt: skip


def picture(metadata: Metadata, count: int) -> torch.Tensor:
    """Random pictures [count, C, H, W], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((count, metadata.network.net.channels, *metadata.size), generator=generator)


def compare(want: Arrays, found: Arrays) -> tuple[float, float]:
    """max|a - b|, and the largest max|a - b| / max(1, max|a|) of one array; infinite where shapes differ."""
    if [array.shape for array in want] != [array.shape for array in found]:
        return float("inf"), float("inf")
    gaps = [np.abs(a - b).max(initial=0) for a, b in zip(want, found, strict=True)]
    errors = [gap / max(1, np.abs(a).max(initial=0)) for gap, a in zip(gaps, want, strict=True)]
    return float(np.max(gaps)), float(np.max(errors))  # NaN stays NaN


def parts(rows: NDArray[np.floating]) -> Arrays:
    """Boxes, and scores, which are much smaller numbers."""
    return rows[..., :BOX_COLUMNS], rows[..., BOX_COLUMNS:]


@torch.inference_mode()
def raw_heads(model: Darknet, images: torch.Tensor) -> Arrays:
    """Heads of the model in PyTorch.

    Raises:
        NumericsError: they are not finite, so that nothing can be compared.
    """
    heads = model(images).heads
    if not all(head.isfinite().all() for head in heads):
        raise NumericsError("the network puts out NaN or infinity; its weights overflow, take other ones")
    return [head.numpy() for head in heads]


def onnx_agreement(
    made: onnx.ModelProto, model: Darknet, metadata: Metadata, options: OnnxOptions, codes: Codes | None = None
) -> Agreement:
    """Run a file in onnxruntime and compare it with PyTorch stage by stage: heads, rows, detections.

    A stage after the heads is compared with what PyTorch makes of the stage before it in the file.

    Args:
        made: the file.
        model: what it was made of, not folded.
        metadata: of the file.
        options: of the file.
        codes: the integers of the model; None: it is float.

    Raises:
        InfeasibleError: it differs, or the checker of ONNX refuses it.
    """
    import onnx

    try:
        onnx.checker.check_model(made, full_check=True)
    except Exception as failure:  # of the checker or of shape inference
        raise InfeasibleError(f"--format onnx: the checker refuses the file: {str(failure).splitlines()[0]}") from None
    count = 2 if options.dynamic_batch else 1
    images = picture(metadata, count)
    outputs = [f"head{number}" for number in range(len(metadata.network.heads))]
    outputs += [] if metadata.output == "heads" else ["rows"]
    inner = [] if codes is None else integers.stages(model, codes, [node.output[0] for node in made.graph.node])
    probe = with_outputs(made, [*outputs, *inner], codes and integers.types(inner, codes)).SerializeToString()
    batch, threads = None if options.dynamic_batch else 1, torch.get_num_threads()
    engine = onnxruntime_engine(probe, [*outputs, *inner], batch, threads, wide=metadata.wide)
    found = dict(zip([*outputs, *inner], engine.run(images.numpy()), strict=True))
    gap = None if codes is None else integers.layer_gaps(model, codes, {name: found[name] for name in inner})
    heads = [found[name] for name in outputs if name.startswith("head")]
    gaps, tolerance = compare(raw_heads(model, images), heads), TOLERANCES[metadata.precision]
    agreement = Agreement(*gaps, tolerance, engine.name, gap)
    agreement.check("--format onnx")
    if metadata.output == "heads":
        return agreement
    rows = decode([torch.from_numpy(head) for head in heads], metadata.network.yolos, metadata.size).numpy()
    _check_rows(rows, found["rows"], engine.name)
    last = onnxruntime_engine(made.SerializeToString(), metadata.tensors, batch, threads, wide=metadata.wide)
    final = last.run(images.numpy())[0]
    if metadata.output == "rows":
        _check_rows(rows, final, engine.name)
    else:
        _check_detections(torch.from_numpy(found["rows"]), final, metadata, options)
    return agreement


def _check_rows(want: NDArray[np.floating], found: NDArray[np.floating], runtime: str) -> None:
    """Refuse a file whose rows are not those of `decode` on its own heads."""
    Agreement(*compare(parts(want), parts(found)), TOLERANCES["float32"], runtime).check("--decode")


def with_outputs(
    model: onnx.ModelProto, names: Sequence[str], types: Mapping[str, int] | None = None
) -> onnx.ModelProto:
    """A file that puts out these tensors, too: a copy, unless it does already; float32 unless `types` say another."""
    known = {value.name for value in model.graph.output}
    more = [name for name in names if name not in known]
    if not more:
        return model
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    kinds = types or {}
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), None) for name in more
    )
    return probe


def _check_detections(
    rows: torch.Tensor, found: NDArray[np.floating], metadata: Metadata, options: OnnxOptions
) -> None:
    """Refuse a file whose detections are not those of `non_max_suppression` on its own rows."""
    limits = {"max_nms": EVERYTHING, "max_det": EVERYTHING if options.dynamic_batch else MAX_DETECTIONS}
    suppressed = non_max_suppression(
        rows, metadata.conf_thres, metadata.iou_thres, multi_label=options.multi_label, **limits
    )
    want = {
        _key(number, row)
        for number, own in enumerate(suppressed)
        for label in own[:, 5].unique()
        for row in own[own[:, 5] == label][:MAX_DETECTIONS].tolist()
    }
    have = {_key(int(row[0]), row[1:]) for row in found.tolist()}
    if len(want ^ have) > max(2, MOST_OTHER * len(want)):
        raise InfeasibleError(f"--nms: {len(want - have)} of {len(want)} detections are missing in the file, "
                              f"{len(have - want)} are surplus; nothing is written")  # fmt: skip


def _key(picture: int, row: Sequence[float]) -> tuple[int, ...]:
    """A detection in whole pixels and thousandths."""
    return (picture, int(row[5]), round(1000 * row[4]), *(round(side) for side in row[:4]))
