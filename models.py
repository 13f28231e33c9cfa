"""A detector built from the blocks of a Darknet cfg: one module for each kind of block, and the network of them.

network = cfg.load("cfg/yolov4-tiny.cfg")
model = Darknet(network)
rows = decode(model(images).heads, network.yolos, (416, 416))

A module takes the outputs of the blocks it reads, in the order of `Block.reads`, each [B, C, H, W].
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
import torch.nn.functional as F
from torch import Tensor, nn

from utils.darknet import blocks
from utils.darknet.blocks import (
    BN_EPSILON,
    SHORTCUT_EPSILON,
    Block,
    Convolutional,
    Maxpool,
    Network,
    Shape,
    Upsample,
    Yolo,
)
from utils.darknet.network import trace
from utils.errors import NumericsError

BN_MOMENTUM = 0.03
"""Share of a batch in the running statistics. Darknet's GPU code uses 0.01, its CPU code 0.1."""
LEAKY_SLOPE = 0.1

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "leaky": lambda: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "mish": nn.Mish,
    "swish": nn.SiLU,
    "logistic": nn.Sigmoid,
    "h_swish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
}


class Computing(nn.Module):
    """A layer that computes new values, which a quantized network rounds.

    `quantize_output` is a slot: None, or a module that rounds the output. Its class is in `utils.quantization`, which
    imports this module, so it is not named here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quantize_output: Any = None

    def put_out(self, x: Tensor) -> Tensor:
        """The output as it is handed on."""
        return x if self.quantize_output is None else self.quantize_output(x)


class ConvBlock(Computing):
    """Convolution, batch normalisation (or a bias) and activation.

    A quantized network has `quantize_weight` in its slot, which maps a weight to the values it may take, and perhaps
    `fold` of `utils.quantization`, which takes the place of convolution and batch normalisation.

    Args:
        block: the section.
        channels: width of the input.
    """

    def __init__(self, block: blocks.Convolutional, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels,
            block.filters,
            block.size,
            stride=(block.stride_y, block.stride_x),
            padding=block.padding * block.dilation,
            dilation=block.dilation,
            groups=block.groups,
            bias=block.bias and not block.batch_normalize,
        )
        self.bn = nn.BatchNorm2d(block.filters, BN_EPSILON, BN_MOMENTUM) if block.batch_normalize else None
        self.activation = ACTIVATIONS[block.activation]()
        self.quantize_weight: Any = None
        self.fold: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, filters, H', W']."""
        x = self.sums(x)
        if self.quantize_output is None:
            return self.activation(x)
        return self.quantize_output(self.activation(self.quantize_output.before(x)))

    def sums(self, x: Tensor) -> Tensor:
        """What the activation function gets."""
        if self.fold is not None:
            return self.fold(x, self.conv, self.bn, self.quantize_weight)
        if self.quantize_weight is None:
            x = self.conv(x)
        else:
            # The convolution keeps its float weight, which is trained; it computes with the rounded one.
            x = self.conv._conv_forward(x, self.quantize_weight(self.conv.weight), self.conv.bias)
        return x if self.bn is None else self.bn(x)

    def fused(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one convolution that does the same in evaluation mode.

        W' = gain · W and b' = offset of the `normalisation`. A quantized weight is rounded before folding, or after it
        if the layer has a `fold`.
        """
        weight, bias = self.conv.weight, self.conv.bias
        if self.fold is not None:
            weight, bias, *_ = self.fold.folded(self.conv, self.bn, self.quantize_weight)
        elif self.quantize_weight is not None:
            weight = self.quantize_weight(weight)
        if self.fold is None and self.bn is not None:
            gain, bias = normalisation(self.bn)
            weight = weight * gain.view(-1, 1, 1, 1)
        return weight.detach(), None if bias is None else bias.detach()


def normalisation(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Gain and offset [C] of a batch normalisation with running statistics: γ / √(σ² + ε) and β − μ · gain."""
    assert bn.running_mean is not None and bn.running_var is not None  # `ConvBlock` keeps statistics
    gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return gain, bn.bias - bn.running_mean * gain


class SqueezeExcite(Computing):
    """Channel attention (Hu et al., arXiv:1709.01507) with a hard sigmoid and no biases, as the old suites have it."""

    def __init__(self, block: blocks.Se, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, block.filters, bias=False)
        self.fc2 = nn.Linear(block.filters, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        scale = F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3))))))
        return self.put_out(x * scale[:, :, None, None])


class MaxPool(nn.Module):
    """Max pooling over windows padded as Darknet pads them: `padding // 2` before, the rest after."""

    def __init__(self, block: blocks.Maxpool, channels: int) -> None:
        super().__init__()
        self.size, self.stride, self.padding = block.size, (block.stride_y, block.stride_x), block.padding
        self.before = block.padding // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, (H + padding - size) // stride + 1, …]."""
        after = self.padding - self.before
        if self.before == after and 2 * self.before <= self.size:
            return F.max_pool2d(x, self.size, self.stride, self.before)
        x = F.pad(x, (self.before, after, self.before, after), value=float("-inf"))
        return F.max_pool2d(x, self.size, self.stride)


class GlobalAveragePool(Computing):
    """Mean over all cells."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 1, 1]."""
        return self.put_out(x.mean(dim=(2, 3), keepdim=True))


class Concatenation(Computing):
    """`[route]`: the chosen channel group of every source, concatenated."""

    def __init__(self, block: blocks.Route, channels: int) -> None:
        super().__init__()
        self.groups, self.group = block.groups, block.group_id

    def forward(self, *sources: Tensor) -> Tensor:
        """Each [B, C_i, H, W] to [B, Σ C_i / groups, H, W]."""
        if self.groups > 1:
            sources = tuple(source.chunk(self.groups, dim=1)[self.group] for source in sources)
        return sources[0] if len(sources) == 1 else self.put_out(torch.cat(sources, dim=1))


class Addition(Computing):
    """`[shortcut]`: the (weighted) sum of its inputs over the channels they have in common with the first.

    Weighted sums follow AlexeyAB's `shortcut_multilayer_cpu` (src/blas.c): relu normalisation divides the positive
    parts by their sum plus 1e-4, softmax the exponentials of w − max w by theirs plus 1e-4.
    """

    def __init__(self, block: blocks.Shortcut, channels: int) -> None:
        super().__init__()
        inputs = 1 + len(block.sources)
        self.normalization = block.weights_normalization
        self.activation = ACTIVATIONS[block.activation]()
        shape = {"none": None, "per_feature": (inputs,), "per_channel": (inputs, channels)}[block.weights_type]
        self.weights = None if shape is None else nn.Parameter(torch.ones(shape))

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """[B, C, H, W] and others [B, C_i, H, W] to [B, C, H, W]."""
        scales = None if self.weights is None else self._scales(self.weights)
        total = first if scales is None else first * scales[0]
        for number, other in enumerate(others, 1):
            common = other[:, : total.shape[1]]
            if scales is not None:
                common = common * scales[number, : common.shape[1]]
            total = _add_common(total, common)
        return self.put_out(self.activation(total))

    def _scales(self, weights: Tensor) -> Tensor:
        """Normalised weights, [inputs, C or 1, 1, 1]."""
        weights = weights.view(len(weights), -1, 1, 1)
        if self.normalization == "none":
            return weights
        if self.normalization == "relu":
            weights = weights.relu()
        else:
            weights = (weights - weights.amax(dim=0, keepdim=True)).exp()
        return weights / (weights.sum(dim=0, keepdim=True) + SHORTCUT_EPSILON)


def _add_common(total: Tensor, common: Tensor) -> Tensor:
    """`total` plus what is added to its first channels; the width is that of `total`."""
    width = common.shape[1]
    if width == total.shape[1]:
        return total + common
    return torch.cat((total[:, :width] + common, total[:, width:]), dim=1)


class Product(Computing):
    """`[scale_channels]` and `[sam]`: the source times the previous block, which is [B, C, 1, 1] or of equal shape."""

    def __init__(self, block: blocks.ScaleChannels | blocks.Sam, channels: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[block.activation]()

    def forward(self, scale: Tensor, source: Tensor) -> Tensor:
        """[B, C, 1 or H, 1 or W] and [B, C, H, W] to [B, C, H, W]."""
        return self.put_out(self.activation(source * scale))


class SpaceToDepth(nn.Module):
    """`[reorg]` in the memory order of Darknet's `reorg_cpu`, which OpenCV reproduces."""

    def __init__(self, block: blocks.Reorg, channels: int) -> None:
        super().__init__()
        self.stride = block.stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C · s², H / s, W / s]."""
        batch, channels, height, width = x.shape
        s = self.stride
        cells = x.reshape(batch, channels // s**2, height, s, width, s).permute(0, 3, 5, 1, 2, 4)
        return cells.reshape(batch, channels * s**2, height // s, width // s)


LAYERS: dict[type[Block], Callable[[Any, int], nn.Module]] = {
    blocks.Convolutional: ConvBlock,
    blocks.Se: SqueezeExcite,
    blocks.Maxpool: MaxPool,
    blocks.Avgpool: lambda block, channels: GlobalAveragePool(),
    blocks.Upsample: lambda block, channels: nn.Upsample(scale_factor=block.stride, mode="nearest"),
    blocks.Route: Concatenation,
    blocks.Shortcut: Addition,
    blocks.ScaleChannels: Product,
    blocks.Sam: Product,
    blocks.Dropout: lambda block, channels: nn.Dropout(block.probability),
    blocks.Reorg: SpaceToDepth,
    blocks.Yolo: nn.Identity,  # hands on its input; `utils.detection.decode` decodes it
}
"""Makers of the modules, from a block and the channels that it reads."""


def build_layer(block: Block, shape: Shape) -> nn.Module:
    """The module of a block whose first input has the given shape."""
    return LAYERS[type(block)](block, shape.channels)


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
        """Draw weights from He's normal distribution; the heads predict their prior probabilities."""
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
    """Start a head at its priors: OBJECT_PRIOR for objectness, 1 / classes, at most 0.99, for a class."""
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
