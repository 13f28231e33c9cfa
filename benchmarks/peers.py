"""Peers to compare with: torch-pruning, and quantizers of one float ONNX file that onnxruntime runs.

torch-pruning (github.com/VainF/Torch-Pruning, arXiv:2301.12900): its MetaPruner ranks the channels of the whole
network, rounds widths to multiples and leaves the heads whole. It drops the constants of removed channels. The
quantizers have the settings that their documentation gives for convolutional networks on x86.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from models import Darknet, load_arrays, network_input
from utils.darknet.blocks import Convolutional, Network, Route
from utils.darknet.data_file import load_data
from utils.data.datasets import Batch
from utils.detection.losses import detection_loss
from utils.detection.settings import LossSettings
from utils.errors import InfeasibleError
from utils.flags import choose_model
from utils.pruning.channel_graph import channel_graph
from utils.quantization.scheme import QuantRequest, QuantSettings
from utils.quantization.workflow import calibration_pictures, load_float
from utils.report.tables import network_cost
from utils.runtime.exported import DIGEST, IMAGE, graph_digest

if TYPE_CHECKING:
    import onnx

GRADIENT = "GroupTaylor"
"""The criterion that needs gradients."""
STEPS = 10
"""Halvings of the interval of pruning ratios."""
TOLERANCE = 1e-4
"""Of the outputs, between the module that the peer pruned and the network that is made from its widths."""


def gradients(model: Darknet, batches: Iterable[Batch]) -> None:
    """Add up the gradients of the training loss over the batches in the model, batch statistics frozen.

    The pictures come as they are: of chess-yolov3-tiny GroupTaylor kept AP50 0.62 at half of the multiply-adds, and
    0.18 with pictures that vary as in training.
    """
    model.eval().zero_grad()
    for batch in batches:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        heads = model(network_input(batch.images, "cpu")).heads
        boxes = (batch.targets, model.network.yolos, size, LossSettings())
        detection_loss(heads, *boxes, ignored=batch.ignored).total.backward()


def prune(model: Darknet, criterion: str, share: float, size: tuple[int, int], multiple: int = 8) -> Darknet:
    """The largest network found whose share of multiply-adds is at most `share`; `model` is left as it is.

    It is one cut; its pruning ratio is found by halving an interval. Cuts of 2 % each, which the peer offers as well,
    gave AP50 up to 0.16 lower and at most 0.012 higher (chess and bccd at 0.5, bccd at 0.33 of the multiply-adds).

    Args:
        model: with the sums of `gradients`, if the criterion is GRADIENT.
        criterion: an importance of torch-pruning, e.g. `LAMP` for its LAMPImportance.
        share: of the multiply-adds, 0 < share < 1.
        size: of the network input.
        multiple: widths are rounded to its multiples.

    Raises:
        InfeasibleError: no ratio reaches the share, or the outputs are not those of the peer's module.
    """
    most = share * network_cost(model.network, *size).macs
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        module = _cut(model, criterion, middle, size, multiple)
        if network_cost(_network(module), *size).macs <= most:
            best, high = module, middle
        else:
            low = middle
    if best is None:
        raise InfeasibleError(f"torch-pruning {criterion}: no pruning ratio leaves {share:g} of the multiply-adds")
    return _rebuilt(best, size)


def _cut(model: Darknet, criterion: str, ratio: float, size: tuple[int, int], multiple: int) -> Darknet:
    """A copy that torch-pruning has cut; its blocks still say the widths before."""
    import torch_pruning

    module = copy.deepcopy(model).eval()
    for own, parameter in zip(model.parameters(), module.parameters(), strict=True):
        parameter.grad = None if own.grad is None else own.grad.clone()  # deepcopy leaves gradients out
    network, layers = module.network, module.layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensors that belong to no layer; an empty layer is left whole
        torch_pruning.pruner.MetaPruner(
            module,
            torch.rand(1, network.net.channels, *size, generator=torch.Generator().manual_seed(0)),
            getattr(torch_pruning.importance, f"{criterion}Importance")(),
            global_pruning=True,
            pruning_ratio=ratio,
            round_to=multiple,
            ignored_layers=[layers[head - 1].conv for head in network.heads],
            in_channel_groups={},
            out_channel_groups=_parts(module),
            output_transform=lambda outputs: outputs.heads,
        ).step()
    return module


def _parts(module: Darknet) -> dict[torch.nn.Module, int]:
    """Convolutions whose channels a grouped route parts, and in how many: all parts must lose the same channels."""
    graph = channel_graph(module.network)
    return {
        module.layers[maker].conv: block.groups
        for block in module.blocks
        if isinstance(block, Route) and block.groups > 1
        for source in block.layers
        for maker in graph.makers()
        if set(graph.labels[maker]) & set(graph.output(source))
    }


def _network(module: Darknet) -> Network:
    """The blocks with the widths of the module's convolutions."""
    blocks = tuple(
        dataclasses.replace(block, filters=layer.conv.out_channels, groups=layer.conv.groups)
        if isinstance(block, Convolutional)
        else block
        for block, layer in zip(module.blocks, module.layers, strict=True)
    )
    return dataclasses.replace(module.network, blocks=blocks)


def _rebuilt(module: Darknet, size: tuple[int, int]) -> Darknet:
    """A network of its own with the widths and tensors of the module, proved on a random picture."""
    network = _network(module)
    model = load_arrays(network, {key: value.contiguous() for key, value in module.state_dict().items()}).eval()
    image = torch.rand(1, network.net.channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(module(image).heads, model(image).heads, strict=True)
        difference = max(float((ours - theirs).abs().max()) for theirs, ours in pairs)
    if not difference <= TOLERANCE:
        raise InfeasibleError(f"torch-pruning: outputs differ by {difference:g} from those of the module it pruned")
    return model


def has_vnni() -> bool:
    """Whether the processor sums 8-bit products in 32 bits; the others saturate in 16, so their weights get 7 bits."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "vnni" in flags.read_text()


def calibration_images(data: str, weights: Path, size: int) -> NDArray[np.float32]:
    """Images [N, 1, C, size, size], 0…1, that quantize.py calibrates with."""
    asked = QuantRequest(choose_model(None, str(weights)), load_data(data), QuantSettings(fold=True))
    pictures = calibration_pictures(asked, load_float(asked).model.network, (size, size), torch.device("cpu"))
    return torch.cat(list(pictures)).unsqueeze(1).numpy()


def with_metadata(model: onnx.ModelProto, source: Path) -> bytes:
    """A peer's file with the metadata of the float file, so that `benchmarks.compare` reads it."""
    import onnx

    properties = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    del properties["reference"]  # outputs of the float network, which 8 bits change by more than another runtime may
    onnx.helper.set_model_props(model, properties | {"precision": '"int8"', DIGEST: graph_digest(model)})
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


QUANTIZERS = {"onnxruntime quantize_static": quantize_static, "nncf.quantize": quantize_nncf}
