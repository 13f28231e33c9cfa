"""Shared by the tests of pruning: policies of the scripts, networks whose channels matter, what goes from them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from models import Darknet, load_arrays
from tests import nets
from utils.darknet.blocks import Convolutional
from utils.darknet.cfg import parse
from utils.darknet.network import trace
from utils.errors import InfeasibleError
from utils.pruning.channel_graph import ChannelGraph, Removal, channel_graph, choose_units
from utils.pruning.policy import ChannelPolicy, candidates, choose
from utils.pruning.surgery import arrays_of, difference, fold_constants, gammas_of, masked, prune_network

SCRIPTS = ("normal", "regular", "shortcut", "slim", "group", "layer", "layer_channel")
STRATEGIES = {name: importlib.import_module(f"{name}_prune").STRATEGY for name in SCRIPTS}
POLICIES = {name: strategy.channels for name, strategy in STRATEGIES.items() if not strategy.units}
"""Of the scripts that remove channels only; nothing goes."""
conv = partial(nets.conv, pad=1)
CONV = conv(8, 3)
GATE = ("[avgpool]\n", conv(4), conv(8), "[scale_channels]\nfrom=-4\n")
"""Squeeze and excitation of a block of 8 channels."""
HEAD = "[convolutional]\nfilters=21\nactivation=linear\n[yolo]\nmask=0,1,2\nnum=3\nanchors=9,9,18,18,36,36\nclasses=2\n"
SHORTCUT = "[shortcut]\nfrom=-2\nactivation=linear\n"


def graph_of(*sections: str) -> ChannelGraph:
    """Of a network that ends in one head behind the given sections."""
    return channel_graph(parse("[net]\nwidth=64\nheight=64\n" + "".join(sections) + HEAD, "test.cfg"))


def policy(name: str, percent: float | None) -> ChannelPolicy | None:
    """Policy of a script with a percentage; None for one that removes no channels."""
    channels = STRATEGIES[name].channels
    return channels and replace(channels, percent=percent)


def randomised(network, dtype=torch.float64) -> Darknet:
    """A model whose channels all matter and whose constants are not small (γ in 0..1, β and μ normal)."""
    model = Darknet(network).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            value.copy_(torch.rand(value.shape, generator=generator) + name.endswith("var") * 0.5)
        elif name.endswith(("bn.bias", "running_mean")):
            value.copy_(torch.randn(value.shape, generator=generator))
        elif name.endswith("conv.weight"):
            value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
    return model


def varied_arrays(network) -> dict[str, np.ndarray]:
    """Tensors of a new network whose γ, β and variances differ."""
    torch.manual_seed(0)
    model = Darknet(network)
    for name, value in model.state_dict().items():
        if name.endswith(("bn.weight", "bn.bias", "running_var")):
            value.copy_(0.5 + torch.rand(value.shape))
    return arrays_of(model)


def model_of(network, arrays) -> Darknet:
    model = load_arrays(network, {name: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval().to(torch.float64)


@torch.no_grad()
def heads(model: Darknet, side: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(1, model.network.net.channels, side, side, generator=generator, dtype=torch.float64)
    return list(model(images).heads)


def assert_compact_equals_silenced(graph: ChannelGraph, arrays, removal: Removal, side: int) -> None:
    """At every pixel, in float64, with and without the constants; and the widths are those of the kept labels."""
    widths = graph.widths(removal.keep)
    for taken in (arrays, fold_constants(graph, arrays, removal)):
        full, (narrow, sliced) = model_of(graph.network, taken), prune_network(graph, taken, removal)
        assert [shape.channels for shape in trace(narrow)] == [
            width for block, width in enumerate(widths) if block not in removal.blocks
        ]
        with masked(full, graph, removal):
            assert difference(heads(model_of(narrow, sliced), side), heads(full, side)) < 1e-9


def normalised(graph: ChannelGraph) -> list[int]:
    """Blocks that have a γ."""
    return [i for i, b in enumerate(graph.network.blocks) if isinstance(b, Convolutional) and b.batch_normalize]


def random_gammas(graph: ChannelGraph, seed: int, levels: int = 0) -> dict[int, np.ndarray]:
    """γ of either sign, below 1; of so many different sizes only, so that many are equal and some are 0."""
    rng = np.random.default_rng(seed)
    gammas = {i: rng.uniform(-1, 1, len(graph.labels[i])) for i in normalised(graph)}
    return {i: np.trunc(gamma * levels) / levels for i, gamma in gammas.items()} if levels else gammas


def emptied(graph: ChannelGraph, keep: np.ndarray) -> list[int]:
    """Blocks that have no channel left."""
    return [i for i, labels in enumerate(graph.labels) if not keep[labels].any()]


def works(failure: Exception) -> float:
    """What a refusal says would work; it ends with it."""
    return float(str(failure).split()[-1])


def removal_of(graph: ChannelGraph, arrays, policy: ChannelPolicy | None, units: int = 0) -> Removal:
    """What a policy removes, or the most it can; and up to so many residual units."""
    gammas, keep = gammas_of(graph.network, arrays), np.ones(graph.count, np.bool_)
    if policy is not None and candidates(graph, policy.prune, policy.all_convs):
        try:
            keep = choose(graph, gammas, policy).keep
        except InfeasibleError as refused:
            keep = choose(graph, gammas, replace(policy, percent=works(refused))).keep
    try:
        return Removal(keep, choose_units(graph, gammas, keep, units))
    except InfeasibleError as refused:
        return Removal(keep, choose_units(graph, gammas, keep, int(works(refused))))
