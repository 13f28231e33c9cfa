"""Whether an exported network computes what it computes in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from models import Darknet
from utils.detection.decode import MAX_DETECTIONS, decode, non_max_suppression
from utils.errors import InfeasibleError, NumericsError
from utils.export import integers
from utils.export.codes import Codes
from utils.export.request import OnnxOptions
from utils.runtime import reference as references
from utils.runtime.engines import onnxruntime_engine
from utils.runtime.metadata import Metadata
from utils.runtime.reference import Arrays, Reference, compare, parts, reference

if TYPE_CHECKING:
    import onnx

TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "int8": None}
"""Largest max|a - b| / max(1, max|a|) of a head. The 11 bits of float16 leave 4e-4 to 6e-3.

Integers are compared layer by layer (`integers.layer_gaps`): a step in one layer is carried on to the next."""
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
    reference: Reference | None = None
    """What the file keeps of it."""

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
    """`reference.picture` of a file's size: [count, C, H, W]."""
    return torch.from_numpy(references.picture(metadata.network, count))


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
    want, tolerance = raw_heads(model, images), TOLERANCES[metadata.precision]
    kept = reference(want, heads, metadata.precision)
    agreement = Agreement(*compare(want, heads), tolerance, engine.name, gap, kept)
    agreement.check("--format onnx")
    if metadata.output == "heads":
        return agreement
    agreement = replace(agreement, reference=rows_reference(want, found["rows"], metadata))
    rows = decode([torch.from_numpy(head) for head in heads], metadata.network.yolos, metadata.size).numpy()
    _check_rows(rows, found["rows"], engine.name)
    last = onnxruntime_engine(made.SerializeToString(), metadata.tensors, batch, threads, wide=metadata.wide)
    final = last.run(images.numpy())[0]
    if metadata.output == "rows":
        _check_rows(rows, final, engine.name)
    else:
        _check_detections(torch.from_numpy(found["rows"]), final, metadata, options)
    return agreement


def rows_reference(want: Arrays, rows: NDArray[np.floating], metadata: Metadata) -> Reference:
    """The reference of a file of decoded rows, from the heads in PyTorch and the rows of a program."""
    decoded = decode([torch.from_numpy(head) for head in want], metadata.network.yolos, metadata.size).numpy()
    return reference(parts(decoded), parts(rows), metadata.precision)


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
