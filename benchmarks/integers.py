"""What 8 bits cost and gain: our ways and two peers on one float ONNX file, all of them run by onnxruntime.

The peers are calibrated with the pictures that quantize.py takes. Their settings are those that their documentation
gives for convolutional networks on x86.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks import goals
from benchmarks.compare import signed
from benchmarks.trainings import RUNS, TRAIN, Finished, python, shared, train
from utils.errors import InputError
from utils.files import atomic_write_bytes
from utils.report.tables import Column, markdown_table
from utils.runtime.exported import DIGEST
from utils.runtime.metadata import IMAGE
from utils.runtime.packages import require

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

CALIBRATED = {
    "quantize.py": (),
    "quantize.py, 8-bit weights": ("--target", "cpu-vnni"),
    "quantize.py, heads and two layers float": ("--quant-heads", "float", "--keep-float", "2"),
}
"""Flags of quantize.py. Boxes, objectness and classes share the tensor of a head and differ in range."""
TRAINED = "train.py --quantized 1"
AWARE = ("--quantized", "1", "--BN_Fold", "--KDstr", "4", "--epochs", "5", "--hyp", "data/hyp.quantize.yaml")
DIFFERENCES = ("map50_difference", "map50_95_difference")
ROWS = {f"{key}-int8": goals.ROWS[f"goal-{key}"] for key in goals.SETS}


def finish(name: str, row: goals.Goal) -> Finished:
    """Quantize in every way what is not quantized yet, then compare.

    Raises:
        InputError: the row of the float network, or a peer's package, is missing.
    """
    require(name, "onnx", "onnxruntime", "nncf")
    goal, folder = f"goal-{name.removesuffix('-int8')}", RUNS / name
    common = ["--data", row.data.format(shared=shared()), "--img_size", str(row.size)]
    teacher = RUNS / row.source / "weights" / "best.pt"
    tuned = sorted((RUNS / goal / "balanced").glob("tune*/weights/best.pt"))
    if not tuned or not teacher.is_file():
        raise InputError(f"{RUNS / goal / 'balanced'}: has no float network; run the row {goal} first")
    networks, commands = {"float": tuned[-1]}, []
    start = [*common, "--weights", str(tuned[-1]), "--project", str(folder), "--name"]
    for label, flags in CALIBRATED.items():
        networks[label] = folder / _slug(label) / "model.pt"
        commands.append(["quantize.py", *start, _slug(label), *flags])
        _once(networks[label], *commands[-1])
    commands.append(["train.py", *start, _slug(TRAINED), "--t_weights", str(teacher), *AWARE, *TRAIN])
    train(folder / _slug(TRAINED), commands[-1])
    networks[TRAINED] = folder / _slug(TRAINED) / "weights" / "best.pt"
    files = {label: folder / f"{_slug(label)}.onnx" for label in (*networks, *PEERS)}
    for label, weights in networks.items():
        flags = ["--weights", str(weights), *common, *([] if label == "float" else ["--int8"])]
        _once(files[label], "export.py", *flags, "--output", str(files[label]))
    if missing := [label for label in PEERS if not files[label].exists()]:
        images = calibration_images(common[1], tuned[-1], row.size)
        for label in missing:
            atomic_write_bytes(files[label], with_metadata(PEERS[label](files["float"], images), files["float"]))
    named = [f"{label}={path}" for label, path in files.items()]
    compared = json.loads(python("-m", "benchmarks.compare", *common, "--time", *named, "--json"))
    document = {
        "commands": [" ".join(["python", *command]).replace(shared(), "../shared") for command in commands],
        **compared,
        "data": row.data.format(shared="../shared"),
        "peers": {package: version(package) for package in ("onnxruntime", "nncf")},
        "vnni": has_vnni(),
    }
    return Finished(document)


def _once(made: Path, *command: str) -> None:
    if not made.exists():
        python(*command)


def _slug(label: str) -> str:
    return "-".join(label.replace(".py", "").replace(",", "").replace("--", "").split())


def has_vnni() -> bool:
    """Whether the processor sums 8-bit products in 32 bits; the others saturate in 16, so their weights get 7 bits."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "vnni" in flags.read_text()


def calibration_images(data: str, weights: Path, size: int) -> NDArray[np.float32]:
    """Images [N, 1, C, size, size], 0…1, that quantize.py calibrates with."""
    import torch

    from utils.darknet.data_file import load_data
    from utils.model_files import choose_model
    from utils.quantization.scheme import QuantSettings
    from utils.quantization.settings import QuantRequest
    from utils.quantization.workflow import calibration_pictures, load_float

    asked = QuantRequest(choose_model(None, str(weights)), load_data(data), QuantSettings(fold=True))
    pictures = calibration_pictures(asked, load_float(asked).model.network, (size, size), torch.device("cpu"))
    return torch.cat(list(pictures)).unsqueeze(1).numpy()


def with_metadata(model: onnx.ModelProto, source: Path) -> bytes:
    """A peer's file with the metadata of the float file, so that `benchmarks.compare` reads it."""
    import onnx

    from utils.runtime.onnx_file import digest

    properties = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    del properties["reference"]  # outputs of the float network, which 8 bits change by more than another runtime may
    onnx.helper.set_model_props(model, properties | {"precision": '"int8"', DIGEST: digest(model)})
    return model.SerializeToString()


def quantize_static(source: Path, images: NDArray[np.float32]) -> onnx.ModelProto:
    """Static quantization of onnxruntime: QDQ, U8 activations, S8 weights with a scale for each channel."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = ({IMAGE: image} for image in images)
    with TemporaryDirectory() as folder:
        prepared, made = Path(folder, "prepared.onnx"), Path(folder, "made.onnx")
        quant_pre_process(source, prepared)
        quantization.quantize_static(prepared, made, SimpleNamespace(get_next=lambda: next(feeds, None)),
                                     per_channel=True, activation_type=quantization.QuantType.QUInt8,
                                     reduce_range=not has_vnni())  # fmt: skip
        return onnx.load(made)


def quantize_nncf(source: Path, images: NDArray[np.float32]) -> onnx.ModelProto:
    """NNCF's quantization after training: asymmetric activations, as advised where not all of them are ReLU."""
    import nncf
    import onnx

    fix = nncf.OverflowFix.DISABLE if has_vnni() else nncf.OverflowFix.ENABLE
    return nncf.quantize(
        onnx.load(source),
        nncf.Dataset(images, lambda image: {IMAGE: image}),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(images),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )


PEERS = {"onnxruntime quantize_static": quantize_static, "nncf.quantize": quantize_nncf}


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """Lines of docs/results.md for a row."""
    columns = ("", Column("AP50", ".3f"), "to the first", Column("AP50-95", ".3f"), "to the first",
               Column("MB", ".2f"), Column("ms", ".1f"))  # fmt: skip
    rows = [
        (n["network"], n["map50"], signed(n["map50_difference"]) if number else None, n["map50_95"],
         signed(n["map50_95_difference"]) if number else None, n["bytes"] / 1e6, n["ms"])
        for number, n in enumerate(document["networks"])
    ]  # fmt: skip
    bits = "8-bit weights, as the processor has VNNI" if document.get("vnni") else "7-bit weights, without VNNI"
    peers = [f"{package} {number}" for package, number in document.get("peers", {}).items()]
    return [
        f"## {name}", "",
        f"{ROWS[name].what} @{ROWS[name].size}, pruned and distilled; the float network is --weights of the commands. "
        "8-bit activations, 7-bit weights (--target cpu) where nothing else is said.", "",
        markdown_table(columns, rows), "", *(f"    {command}" for command in document["commands"]), "",
        *([f"{' and '.join(peers)}: the same float file and calibration pictures; {bits}.", ""] if peers else []),
        f"{document['images']} pictures; {100 * document['share']:g} % intervals of a bootstrap over the pictures, "
        f"{document['draws']} draws, seed {document['seed']}. Milliseconds: median of forward passes of one picture, "
        f"all networks in turn. {document['machine']}, {document['threads']} threads, PyTorch {document['torch']}, "
        f"commit {(document['commit'] or 'unknown')[:9]}.", "",
    ]  # fmt: skip


def mean_section(stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of docs/results.md for the mean over the rows that compare the same networks as the first."""
    names = [name for name in ROWS if name in stored]
    labels = {name: [network["network"] for network in stored[name]["networks"]] for name in names}
    names = [name for name in names if labels[name] == labels[names[0]]]
    if len(names) < 2:
        return []
    rows = []
    for networks in zip(*(stored[name]["networks"] for name in names), strict=True):
        figures = [mean_difference([network[key] for network in networks]) for key in DIFFERENCES]
        rows.append((networks[0]["network"], *(signed(figure) if any(figure) else None for figure in figures)))
    what = (f"Differences to the float network, mean of {', '.join(names)}. Their bootstraps are independent: the "
            "distances from a mean to the ends of its interval are the roots of the sums of squares, over their "
            "number.")  # fmt: skip
    return ["## int8: mean of the data sets", "", what, "", markdown_table(("", "AP50", "AP50-95"), rows), ""]


def mean_difference(differences: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of independent figures [value, low, high], and its interval."""
    count = len(differences)
    value = sum(difference[0] for difference in differences) / count
    below, above = (
        math.hypot(*(difference[end] - difference[0] for difference in differences)) / count for end in (1, 2)
    )
    return value, value - below, value + above
