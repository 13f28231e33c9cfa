"""Peers that rows compare with: torch-pruning, and quantizers of the float file of export.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export
from benchmarks import criteria, peers
from models import Darknet
from tests.nets import tiny
from tests.test_checkpoint import contents
from utils.checkpoint import write_checkpoint
from utils.data.datasets import Batch
from utils.data.images import read_image
from utils.errors import InfeasibleError
from utils.report.cost import network_cost
from utils.runtime.engines import onnxruntime_engine
from utils.runtime.exported import read_onnx

SIZE = (64, 64)


def model_of_new() -> Darknet:
    """A network whose γ differ, with gradients."""
    torch.manual_seed(0)
    model = Darknet(tiny())
    for name, parameter in model.named_parameters():
        if name.endswith("bn.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.grad = torch.rand_like(parameter)
    return model


@pytest.mark.parametrize("criterion", criteria.PEERS)
def test_a_peer_cuts_to_the_share_and_leaves_heads_and_the_model(criterion):
    """Outputs are proved by `prune` itself, the halves of the grouped route included."""
    pytest.importorskip("torch_pruning")
    model = model_of_new()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = peers.prune(model, criterion, 0.6, SIZE, multiple=2)
    most = 0.6 * network_cost(model.network, *SIZE).macs
    assert 0.4 * most < network_cost(pruned.network, *SIZE).macs <= most
    assert [pruned.blocks[head - 1].filters for head in pruned.network.heads] == [21, 21]
    assert all(block.filters % 2 == 0 for block in pruned.blocks[:-1] if getattr(block, "filters", 21) != 21)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_share_that_no_cut_reaches_is_said():
    pytest.importorskip("torch_pruning")
    with pytest.raises(InfeasibleError, match=r"torch-pruning LAMP: no pruning ratio leaves 0\.001 of"):
        peers.prune(model_of_new(), "LAMP", 0.001, SIZE)


def test_a_module_that_computes_something_else_is_refused(monkeypatch):
    model = model_of_new()
    monkeypatch.setattr(peers, "_network", lambda module: replace(module.network, blocks=module.blocks))
    handle = model.layers[0].register_forward_hook(lambda _, __, output: output + 1)
    with pytest.raises(InfeasibleError, match="outputs differ by"):
        peers._rebuilt(model.eval(), SIZE)
    handle.remove()
    assert peers._rebuilt(model, SIZE).network == model.network


def test_gradients_add_up_over_batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 2, 3, *SIZE), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 0.4, 0.4, 0.2, 0.3], [1, 1, 0.6, 0.5, 0.4, 0.2]])
    batches = [Batch(pictures, boxes, boxes[:0], torch.arange(2), ()) for pictures in images]
    model, sums = model_of_new(), []
    for part in (batches[:1], batches[1:], batches):
        peers.gradients(model, part)
        sums.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other, both in zip(*sums, strict=True):
        torch.testing.assert_close(one + other, both)
    assert any(both.any() for both in sums[2])


@pytest.fixture
def source(files, tmp_path):
    """The float file of a small network."""
    export.main([*files, "--output", str(tmp_path / "float.onnx")])
    return tmp_path / "float.onnx"


@pytest.mark.parametrize(("vnni", "bits"), [(True, 8), (False, 7)], ids=["vnni", "no-vnni"])
@pytest.mark.parametrize("peer", peers.QUANTIZERS)
def test_a_peers_file_opens_as_one_of_export_and_is_near_the_float_one(peer, vnni, bits, source, tmp_path, monkeypatch):
    if "nncf" in peer:
        pytest.importorskip("nncf")
    monkeypatch.setattr(peers, "has_vnni", lambda: vnni)
    images = np.random.default_rng(0).random((4, 1, 3, 64, 64), dtype=np.float32)
    path = tmp_path / "peer.onnx"
    path.write_bytes(peers.with_metadata(peers.QUANTIZERS[peer](source, images), source))
    file, float_file = read_onnx(path), read_onnx(source)
    assert not file.notes and file.metadata.precision == "int8" and file.metadata.reference is None
    assert file.metadata.network == float_file.metadata.network
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4]
    assert {weight.dtype for weight in weights} == {np.dtype(np.int8)}
    largest = max(np.abs(weight.astype(int)).max() for weight in weights)
    assert 2 ** (bits - 2) < largest <= 2 ** (bits - 1)
    heads, wanted = (
        onnxruntime_engine(one.path, one.metadata.tensors, one.batch)(images[0]) for one in (file, float_file)
    )
    for head, other in zip(heads, wanted, strict=True):
        assert 0 < np.linalg.norm(head - other) < 0.1 * np.linalg.norm(other)


def test_peers_get_the_pictures_of_quantize(folder, tmp_path):
    """quantize.py calibrates with train pictures: all nine, once each, as there are fewer than 128."""
    write_checkpoint(tmp_path / "n.pt", contents(Darknet(tiny())))
    found = peers.calibration_images(str(folder / "d.data"), tmp_path / "n.pt", 64)
    assert found.shape == (9, 1, 3, 64, 64) and len({image.tobytes() for image in found}) == 9
    images = [read_image(folder / "images" / f"{number}.png") for number in range(9)]
    assert found.mean() == pytest.approx(np.mean(images) / 255)
