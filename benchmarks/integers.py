"""What 8 bits cost and gain: our ways and two peers on one float ONNX file, all of them run by onnxruntime.

The peers are calibrated with the pictures that quantize.py takes. Their settings are those that their documentation
gives for convolutional networks on x86.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING

from benchmarks import goals, suite
from benchmarks.compare import table
from benchmarks.suite import RUNS, TRAIN, Document, Finished, Section
from utils.files import atomic_write_bytes
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


@dataclass(frozen=True)
class Integers:
    """A float network that is quantized in all ways."""

    goal: goals.Goal

    @property
    def what(self) -> str:
        """Its data set and network."""
        return f"{self.goal.what}, 8 bits"

    def finish(self, name: str) -> Finished:
        """Quantize in every way what is not quantized yet, then compare.

        Raises:
            InputError: the row of the float network, or a peer's package, is missing.
        """
        require(name, "onnx", "onnxruntime", "nncf")
        goal, folder = self.goal, RUNS / name
        common = ["--data", goal.data.file, "--img_size", str(goal.size)]
        weights = suite.tuned(f"goal-{goal.data.key}")
        networks, commands = {"float": weights}, []
        start = [*common, "--weights", str(weights), "--project", str(folder), "--name"]
        for label, flags in CALIBRATED.items():
            networks[label] = folder / _slug(label) / "model.pt"
            commands.append(["quantize.py", *start, _slug(label), *flags])
            suite.once(networks[label], *commands[-1])
        teacher = ["--t_weights", str(suite.weights_of(goal.source))]
        commands.append(["train.py", *start, _slug(TRAINED), *teacher, *AWARE, *TRAIN])
        suite.train(folder / _slug(TRAINED), *commands[-1])
        networks[TRAINED] = folder / _slug(TRAINED) / "weights" / "best.pt"
        files = {label: folder / f"{_slug(label)}.onnx" for label in (*networks, *PEERS)}
        for label, path in networks.items():
            precision = [] if label == "float" else ["--int8"]
            suite.once(
                files[label], "export.py", "--weights", str(path), *common, *precision, "--output", str(files[label])
            )
        if missing := [label for label in PEERS if not files[label].exists()]:
            images = calibration_images(suite.shared(goal.data.file), weights, goal.size)
            for label in missing:
                atomic_write_bytes(files[label], with_metadata(PEERS[label](files["float"], images), files["float"]))
        document = {
            "commands": [suite.shown(command) for command in commands],
            **suite.compare(common, files, "--time"),
            "peers": {package: version(package) for package in ("onnxruntime", "nncf")},
            "vnni": has_vnni(),
        }
        return Finished(document)


ROWS = {f"{goal.data.key}-int8": Integers(goal) for goal in goals.GOALS}


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
        quantization.quantize_static(
            prepared,
            made,
            SimpleNamespace(get_next=lambda: next(feeds, None)),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            reduce_range=not has_vnni(),
        )
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


def sections(stored: Mapping[str, Document]) -> Iterator[Section]:
    """A section for each float network."""
    for name in [name for name in ROWS if name in stored]:
        document = stored[name]
        yield Section(
            name,
            f"{ROWS[name].goal.what}, pruned and distilled; the float network is --weights of the commands. 8-bit "
            "activations, 7-bit weights (--target cpu) where nothing else is said.",
            *table(document),
            commands=document["commands"],
            note=f"{_peers(document)}{document['images']} pictures; {100 * document['share']:g} % intervals of a "
            f"bootstrap over the pictures, {document['draws']} draws, seed {document['seed']}. Milliseconds: median "
            f"of forward passes of one picture, all networks in turn. {suite.place(document)}",
        )


def _peers(document: Document) -> str:
    """The settings of the peers; empty for rows of older code, which had none."""
    if "peers" not in document:
        return ""
    bits = "8-bit weights, as the processor has VNNI" if document["vnni"] else "7-bit weights, without VNNI"
    peers = " and ".join(f"{package} {number}" for package, number in document["peers"].items())
    return f"{peers}: the same float file and calibration pictures; {bits}. "
