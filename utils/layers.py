"""The modules a network is built from: one class for each kind of block, one table from block to module.

Every layer takes the outputs of the blocks it reads, in the order of `Block.reads`, each [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.darknet import blocks
from utils.darknet.blocks import BN_EPSILON, SHORTCUT_EPSILON, Block, Shape

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
