"""A detector built from the blocks of a Darknet cfg.

network = cfg.load("cfg/yolov4-tiny.cfg")
model = Darknet(network)
rows = decode(model(images).heads, network.yolos, (416, 416))
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.darknet.blocks import Block, Convolutional, Maxpool, Network, Upsample, Yolo
from utils.darknet.network import trace
from utils.errors import NumericsError
from utils.layers import Computing, ConvBlock, build_layer

_SPECIAL = re.compile(r"(^|\.)(bn|quantize_\w+)\.")
"""Tensors that folding takes in, or that belong to a quantizer."""
OBJECT_PRIOR = 0.01
"""Probability of an object that a new head predicts everywhere (Lin et al., arXiv:1708.02002, section 4.1)."""


class Outputs(NamedTuple):
    """What a network returns, in training and evaluation alike."""

    heads: tuple[Tensor, ...]
    """Raw outputs [B, anchors · (5 + classes), H, W], one a `[yolo]`, in the order of the cfg."""
    features: Mapping[int, Tensor]
    """Outputs [B, C, H, W] of the blocks that were asked for."""
    maps: Mapping[int, Tensor] = MappingProxyType({})
    """Attention maps [B, H, W] of the requested blocks; see `attended`."""


class Darknet(nn.Module):
    """The network a cfg describes. `layers[i]` is the module of block i.

    Args:
        network: parsed cfg; any width and height that its strides divide can be fed.
        initialize: draw new weights; False leaves them to be loaded.
    """

    def __init__(self, network: Network, *, initialize: bool = True) -> None:
        super().__init__()
        self.network = network
        shapes = (*trace(network), network.image)  # the image is at -1, the number that stands for it
        inputs = [block.reads(i) for i, block in enumerate(network.blocks)]
        self.layers = nn.ModuleList(
            build_layer(block, shapes[reads[0]]) for block, reads in zip(network.blocks, inputs, strict=True)
        )
        self.quantize_image: Any = None
        """Slot of a quantized network: maps pictures to the values they may take."""
        self.input_type: torch.dtype | None = None
        """Type that pictures are cast to if the weights have 16 bits, see `reduced`; None: they are not cast."""
        self._inputs = inputs
        self._before_heads = {inputs[head][0] for head in network.heads}
        self._last_reader = {source: i for i, reads in enumerate(inputs) for source in reads}
        self._fresh = {i for i in self._last_reader if self._computes_gradient(i)}
        if initialize:
            self.initialize()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks the model was built from."""
        return self.network.blocks

    def _computes_gradient(self, source: int) -> bool:
        """Whether every reader of a block returns a new gradient; a sum returns the one it got, which others hold."""
        readers = [block for block, reads in zip(self.blocks, self._inputs, strict=True) if source in reads]
        return all(isinstance(block, Convolutional | Maxpool | Upsample) for block in readers)

    def forward(self, images: Tensor, features: Collection[int] = (), maps: Collection[int] = ()) -> Outputs:
        """Raw head outputs.

        Args:
            images: [B, C, H, W], 0…1.
            features: numbers of the blocks whose outputs are wanted beside the heads.
            maps: numbers of the blocks whose attention maps are wanted.
        """
        images = images if self.input_type is None else images.to(self.input_type)
        alive: dict[int, Tensor] = {-1: images if self.quantize_image is None else self.quantize_image(images)}
        heads, outputs, attention = [], {}, {}
        for i in range(len(self.layers)):
            x = self._output(i, [alive[source] for source in self._inputs[i]])
            if isinstance(self.blocks[i], Yolo):
                heads.append(x)
            if i in maps:
                x, attention[i] = attended(x, i in self._fresh)
            if i in features:
                outputs[i] = x
            for source in self._inputs[i]:
                if self._last_reader[source] == i:
                    alive.pop(source, None)
            if i in self._last_reader:
                alive[i] = x
        return Outputs(tuple(heads), outputs, attention)

    def _output(self, i: int, sources: list[Tensor]) -> Tensor:
        """Output of block i, which reads `sources`; in float32 in front of a head."""
        if i in self._before_heads:
            return _in_float32(self.layers[i], *sources)
        if self.input_type is not None and not isinstance(self.blocks[i], Yolo):  # others may read what a head reads
            sources = [source.to(self.input_type) for source in sources]
        return self.layers[i](*sources)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw weights: He's normal distribution, as Darknet; the heads predict their prior probabilities."""
        for i, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            if isinstance(layer, ConvBlock):
                nn.init.kaiming_normal_(layer.conv.weight, nonlinearity="relu")
            if isinstance(block, Yolo) and isinstance(before := self.layers[i - 1], ConvBlock):
                _initialize_head(before.conv, block)


def _in_float32(layer: nn.Module, *sources: Tensor) -> Tensor:
    """The output of a layer without autocast: 11 or 8 bits of a logit or an offset would move boxes by pixels."""
    with torch.autocast(sources[0].device.type, enabled=False):
        return layer(*(source.float() if source.element_size() < 4 else source for source in sources))


def _initialize_head(conv: nn.Conv2d, yolo: Yolo) -> None:
    """Start a head at its priors: OBJECT_PRIOR for objectness, 1 / classes for a class."""
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is None:
        return
    bias = conv.bias.view(len(yolo.mask), 5 + yolo.classes)
    bias.zero_()
    bias[:, 4] = _logit(OBJECT_PRIOR)
    bias[:, 5:] = _logit(min(0.99, 1 / yolo.classes))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def attended(features: Tensor, fresh: bool = False) -> tuple[Tensor, Tensor]:
    """The features [B, C, H, W], to go on with, and their map Σ_c F_c² [B, H, W], in float32 at least.

    The map is F_sum with p = 2 of Zagoruyko & Komodakis (arXiv:1612.03928, section 3.1). Its gradient is added to that
    of the features in one pass over memory. Plain operations of autograd would take several.

    Args:
        features: F.
        fresh: the gradient of the features is not shared, so it may be overwritten; see `Darknet._computes_gradient`.
    """
    return _Attended.apply(features, fresh)


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, fresh: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.fresh = fresh
        ctx.save_for_backward(features)
        precision = torch.promote_types(features.dtype, torch.float32)
        return features, torch.linalg.vector_norm(features, dim=1, dtype=precision).square_()

    @staticmethod
    def backward(ctx: Any, of_features: Tensor | None, of_map: Tensor | None) -> tuple[Tensor | None, None]:
        """Sum of the gradient of the features and 2 F_c times the gradient of the map; None stands for 0."""
        if of_map is None:
            return of_features, None
        (features,) = ctx.saved_tensors
        twice = (2 * of_map)[:, None]
        if of_features is None:
            return (features * twice).to(features.dtype), None
        if of_features.dtype != twice.dtype:
            return (of_features + features * twice).to(of_features.dtype), None  # the product in float32
        return torch.addcmul(of_features, features, twice, out=of_features if ctx.fresh else None), None


def load_arrays(
    network: Network, arrays: Mapping[str, Tensor], prepare: Callable[[Darknet], object] | None = None
) -> Darknet:
    """A model over tensors that already exist (a state dict, or the memory map of a .weights file), without copying.

    Args:
        network: what the model is built from.
        arrays: its tensors by their keys in the state dict.
        prepare: called with the model before its tensors are set, e.g. to fill the slots of a quantized one.

    Raises:
        RuntimeError: keys or shapes differ from the network's.
    """
    with torch.device("meta"):
        model = Darknet(network, initialize=False)
        if prepare is not None:
            prepare(model)
    state = dict(arrays)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros((), dtype=value.dtype))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_()


def fuse(model: Darknet) -> Darknet:
    """The same function for inference: every batch normalisation folded into its convolution (`ConvBlock.fused`).

    The weights of a quantized model are replaced by the rounded ones. Copies of its quantizers round its outputs.

    Returns:
        A new model on the blocks without batch_normalize, in evaluation mode; `model` is left as it is.
    """
    state = {key: value.detach() for key, value in model.state_dict().items() if not _SPECIAL.search(key)}
    blocks = []
    for i, (block, layer) in enumerate(zip(model.blocks, model.layers, strict=True)):
        if isinstance(block, Convolutional) and isinstance(layer, ConvBlock):
            tensors = zip(("weight", "bias"), layer.fused(), strict=True)
            state |= {f"layers.{i}.conv.{name}": value for name, value in tensors if value is not None}
            block = dataclasses.replace(block, batch_normalize=False, bias=block.bias or block.batch_normalize)
        blocks.append(block)
    fused = load_arrays(dataclasses.replace(model.network, blocks=tuple(blocks)), state)
    fused.quantize_image = copy.deepcopy(model.quantize_image)
    for layer, copied in zip(model.layers, fused.layers, strict=True):
        if isinstance(layer, Computing) and isinstance(copied, Computing):
            copied.quantize_output = copy.deepcopy(layer.quantize_output)
        if hasattr(layer, "activation"):  # a quantized network may have another slope
            copied.activation = copy.deepcopy(layer.activation)
    return fused.eval().requires_grad_(False)


def oversized(model: Darknet, dtype: torch.dtype) -> str | None:
    """Text on a weight that is too large for a type; None without one."""
    most, kind = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
    for key, value in model.state_dict().items():
        if (largest := value.abs().amax()) > most:
            block = model.network.where(int(key.split(".")[1]))
            return f"{block}: {key} has the value {largest:.4g}, and {kind} ends at {most:g}"
    return None


def reduced(model: Darknet, dtype: torch.dtype) -> Darknet:
    """Give a model weights and feature maps of 16 bits, for inference; returns the model itself.

    The convolutions in front of heads stay in float32, as under autocast.

    Raises:
        NumericsError: a weight is too large for the type.
    """
    if fault := oversized(model, dtype):
        raise NumericsError(fault)
    for block, layer in enumerate(model.layers):
        if block not in model._before_heads:
            layer.to(dtype)
    model.input_type = dtype
    return model


def network_input(images: Tensor, device: torch.device | str) -> Tensor:
    """Return uint8 pictures [B, C, H, W] as float32 0…1 on the device, channels-last."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images.float().div_(255)
