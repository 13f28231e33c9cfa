"""Attention maps that a network puts out beside its features."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from models import Darknet, attended
from tests.nets import one_head, tiny
from utils.darknet.blocks import Shortcut
from utils.distillation.matching import features

ADDS = """[convolutional]
filters=4
size=3
pad=1
activation=mish

[convolutional]
filters=4
size=3
pad=1
activation=leaky

[shortcut]
from=-2
activation=linear
"""


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_that_of_both(fresh, memory_format):
    torch.manual_seed(0)
    given = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    passed, maps = attended(given, fresh)
    assert torch.equal(passed, given)
    assert torch.allclose(maps, given.square().sum(dim=1))
    weight, slope = torch.randn_like(given), torch.randn(2, 4, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((passed * weight).sum() + (maps * slope).sum(), given, retain_graph=True)
    assert torch.allclose(gradient, weight + 2 * given * slope[:, None])
    (alone,) = torch.autograd.grad((maps * slope).sum(), given, retain_graph=True)
    assert torch.allclose(alone, 2 * given * slope[:, None])
    (without,) = torch.autograd.grad((passed * weight).sum(), given)
    assert torch.equal(without, weight)


def test_half_precision_is_squared_and_multiplied_in_single():
    given = torch.full((1, 2, 1, 1), 300.0, dtype=torch.float16, requires_grad=True)
    passed, maps = attended(given)
    assert maps.item() == 2 * 300**2 > torch.finfo(torch.float16).max
    (passed.sum() + maps.sum() / 1e3).backward()
    assert given.grad.flatten().tolist() == pytest.approx([1.6, 1.6], rel=1e-3)


@pytest.mark.parametrize("network", [tiny(), one_head(ADDS)], ids=["tiny", "an addition"])
def test_maps_of_any_block_leave_every_gradient_as_it_is(network):
    """Of all blocks, whatever reads them: an addition hands on one gradient to both of its terms."""
    torch.manual_seed(0)
    model = Darknet(network).double().train()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    blocks = range(len(network.blocks) - 1)
    slopes = {i: torch.randn_like(x[:, 0]) for i, x in model(images, blocks).features.items()}

    def gradients(maps: Mapping[int, torch.Tensor], heads: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        total = sum(head.square().sum() for head in heads) + sum((maps[i] * slopes[i]).sum() for i in maps)
        return torch.autograd.grad(total, [p for p in model.parameters()])

    plain = model(images, blocks)
    wanted = gradients({i: x.square().sum(dim=1) for i, x in plain.features.items()}, plain.heads)
    seen = model(images, (), blocks)
    found = gradients(seen.maps, seen.heads)
    assert seen.maps.keys() == plain.features.keys()
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


def test_only_a_gradient_that_nobody_else_holds_is_written_into():
    network = one_head(ADDS)
    added = next(i for i, block in enumerate(network.blocks) if isinstance(block, Shortcut))
    read = network.blocks[added].reads(added)
    assert not {*read} & Darknet(network)._fresh
    assert added in Darknet(network)._fresh
    strided = features(tiny())[0].block
    assert strided in Darknet(tiny())._fresh


def test_who_asks_for_no_map_gets_none():
    assert dict(Darknet(tiny())(torch.rand(1, 3, 64, 64)).maps) == {}
