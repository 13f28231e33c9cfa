"""Trainings with rounded weights and activations, through train.py."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
import torch

import slim_prune
import train
from models import Darknet, fuse
from tests.nets import TINY, tiny
from tests.test_resume import assert_same, at_call, state
from utils.checkpoint import load_model, read_checkpoint, write_checkpoint
from utils.errors import InputError, Interrupted, WeightsError
from utils.layers import ConvBlock
from utils.model_files import ModelFiles
from utils.quantization.quantizers import ActivationQuantizer, quantize
from utils.quantization.scheme import QuantSettings
from utils.report.run_dir import read_results
from utils.training import checkpointing
from utils.training.loop import BITS_MORE, Rounding, surplus_bits
from utils.training.settings import quantization

pytestmark = pytest.mark.usefixtures("no_plots")
FLAGS = ("--epochs", "3", "--seed", "3", "--quantized", "1")


def loaded(path: str):
    return load_model(ModelFiles(None, Path(path), True)).model


@pytest.mark.parametrize("flags", [("--quantized", "1"), ("--quantized", "2", "--BN_Fold", "--w_bit", "4")])
def test_a_quantized_network_is_kept_with_its_grids_and_means_the_same_when_loaded(run, flags):
    document = run("--epochs", "3", *flags)
    checkpoint = read_checkpoint(Path(document["best"]))
    assert checkpoint["quantization"]["scheme"] == ("google" if flags[1] == "1" else "dorefa")
    model = loaded(document["best"]).eval()
    found = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    assert found and all(module.rounding and not module.observing and module.seen > 0 for module in found)
    images = torch.rand(1, 3, 64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        heads, fused = model(images).heads, fuse(model)(images).heads
    for mine, theirs, module in zip(heads, fused, [model.layers[i - 1] for i in model.network.heads], strict=True):
        step = float(module.quantize_output.scale().scale)
        assert (mine - theirs).abs().max() <= 2.01 * step
        codes = mine / step
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture
def leaky(folder):
    """A network that shifts compute, as flags."""
    (folder / "leaky.cfg").write_text(TINY.replace("mish", "leaky"))
    return ("--cfg", str(folder / "leaky.cfg"))


GRADUAL = ("--FPGA", "--a_bit", "4", "--bit-warmup", "0.6")


@pytest.mark.parametrize(
    ("place", "flags"),
    [
        ("detection_loss:5", ()),
        ("evaluate:2", ()),
        *((place, GRADUAL) for place in ("detection_loss:1", "detection_loss:5", "detection_loss:10", "evaluate:2")),
    ],
)
def test_interrupted_and_resumed_is_bit_identical(run, leaky, monkeypatch, flags, place):
    """While bounds are found (1 of 12 steps), while all is rounded with more bits (5), frozen (10), and evaluated."""
    name, _, number = place.partition(":")
    flags = (*FLAGS, *leaky, *flags, "--batch-size", "2")
    straight = run(*flags, "--name", "straight")
    at_call(monkeypatch, int(number), lambda: signal.raise_signal(signal.SIGTERM), name)
    with pytest.raises(Interrupted) as stopped:
        run(*flags, "--name", "cut")
    monkeypatch.undo()
    folder = str(stopped.value).partition("--resume ")[2].split()[0]
    resumed = run("--resume", folder)
    assert_same(state(Path(resumed["last"])), state(Path(straight["last"])))
    assert {key: resumed[key] for key in ("best_epoch", "map50")} == {
        key: straight[key] for key in ("best_epoch", "map50")
    }


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_bits_fall_one_at_a_time_to_those_asked_for(steps, share):
    bits = [surplus_bits(share, step, steps) for step in range(steps)]
    assert bits == sorted(bits, reverse=True) and bits[-1] == 0
    assert bits[0] == (BITS_MORE if round(share * steps) > 0 and steps > 1 else 0)
    if steps == 100 and share:
        assert set(bits) == {0, 1, 2, 3, 4}
        assert bits.index(0) == round(share * steps)


def test_a_network_is_kept_with_the_bits_asked_for(run, leaky):
    document = run(*FLAGS, *leaky, "--w_bit", "3", "--a_bit", "4", "--bit-warmup", "0.5")
    assert document["best_epoch"] > 1
    layer = loaded(document["best"]).layers[2]
    assert (layer.quantize_weight.grid.bits, layer.quantize_output.grid.bits) == (3, 4)
    with pytest.raises(InputError, match=r"--bit-warmup.* 0 <= value < 1"):
        run("--quantized", "1", "--bit-warmup", "1")


def test_more_bits_are_in_force_while_they_are_warmed_up():
    settings = QuantSettings(weight_bits=2, activation_bits=14)
    model = quantize(Darknet(tiny()), settings)
    rounding = Rounding([model], 8, warmup=0.5)
    seen = []
    for step in range(8):
        rounding.begin(step)
        layer = model.layers[2]
        seen.append((layer.quantize_weight.grid.bits, layer.quantize_output.grid.bits, rounding.complete))
    assert seen == [(6, 16, False), (5, 16, False), (4, 16, False), (3, 15, False), *[(2, 14, True)] * 4]


def test_frozen_blocks_have_bounds_and_keep_all_else(run, leaky):
    document = run("--epochs", "2", *leaky, "--quantized", "1", "--freeze", "2")
    model = loaded(document["best"])
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    assert all(module.seen > 0 and module.high > 0 for module in quantizers)
    assert model.layers[1].bn.num_batches_tracked == 0 < model.layers[2].bn.num_batches_tracked


@pytest.mark.parametrize("more", [(), ("--FPGA",)], ids=["cpu", "fpga"])
@pytest.mark.parametrize("kind", ["distilled", "sparse"])
def test_quantized_training_goes_with_distillation_and_pressure(run, leaky, kind, more):
    quantized = ("--epochs", "2", *leaky, "--quantized", "1", *more)
    if kind == "sparse":
        gammas = [load_gamma(run(*quantized, *flags)["last"]) for flags in ((), ("-sr", "--prune", "1", "--s", "0.1"))]
        assert gammas[1] < gammas[0]
        return
    teacher = run("--epochs", "1", *leaky)["best"]
    taught = ("--t_weights", teacher, "--KDstr", "4", "--AT_str", "2")
    document = run(*quantized, "--t_cfg", leaky[1], *taught)
    columns = read_results(Path(document["run_dir"]) / "results.csv")
    learnt = [value for name, values in columns.items() if name.startswith("kd_") for value in values]
    assert len(learnt) == 2 * 7 and all(math.isfinite(value) and value >= 0 for value in learnt)
    assert read_checkpoint(Path(teacher))["quantization"] is None
    assert read_checkpoint(Path(document["best"]))["quantization"] is not None


def load_gamma(path: str) -> float:
    layers = [layer for layer in loaded(path).layers[:4] if isinstance(layer, ConvBlock)]
    return float(sum(layer.bn.weight.detach().abs().sum() for layer in layers))


def test_float_and_quantized_weights_start_one_another(run, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(checkpointing, "log", said.append)
    quantized = run("--epochs", "1", "--quantized", "1", "--target", "arm")["best"]
    assert not any("was quantized" in line for line in said)
    again = run("--epochs", "1", "--weights", run("--epochs", "1", "--weights", quantized)["best"], "--quantized", "1")
    assert read_checkpoint(Path(again["best"]))["quantization"] is not None
    assert sum("was quantized with --target arm: its weights before rounding are taken" in line for line in said) == 1


def test_bounds_of_the_averaged_network_are_those_of_the_trained_one(run):
    checkpoint = read_checkpoint(Path(run("--epochs", "2", "--quantized", "1")["last"]))
    bounds = [key for key in checkpoint["model"] if key.endswith((".low", ".high"))]
    assert len(bounds) > 10
    assert all(torch.equal(checkpoint["model"][key], checkpoint["ema"][key]) for key in bounds)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--w_bit", "4"), r"--w_bit: says how to quantize; add --quantized"),
        (("--quantized", "1", "--FPGA", "--target", "arm"), r"--target arm: contradicts --FPGA"),
        (("--quantized", "2", "--dorefa-grid"), r"--dorefa-grid: is gone; --quantized 2 rounds to levels with a 0"),
        (("--quantized", "1", "--b_bit", "8"), r"--b_bit: goes with --FPGA"),
        (("--bit-warmup", "0.5"), r"--bit-warmup: says how to quantize"),
        (("--quantized", "4"), r"--quantized.*4"),
        (("--quantized", "1", "--a_bit", "1"), r"--a_bit.*2 to 16 bits"),
        (("--quantized", "1", "--FPGA"), r"block 1 .*mish needs more than shifts"),
    ],
)
def test_flags_that_mean_nothing_are_refused(run, flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run("--epochs", "1", *flags)
    assert not (tmp_path / "runs").exists()


def test_three_is_taken_for_google_and_said(capsys):
    args = train.parse_args(["--quantized", "3"])
    assert quantization(args, tiny()).scheme == "google"
    assert "--quantized 3: is taken for 1" in capsys.readouterr().err


def test_a_quantized_network_is_not_pruned(run, folder, tmp_path):
    weights = run("--epochs", "1", "--quantized", "1")["best"]
    with pytest.raises(InputError, match="is quantized, which comes after pruning"):
        files = ["--weights", weights, "--data", f"{folder}/d.data", "--project", str(tmp_path / "pruned")]
        slim_prune.main([*files, "--percent", "0.2"])
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("change", [{"target": "abacus"}, {"weight_bits": 99}, {"surprise": 1}])
def test_a_quantization_that_is_not_understood_is_refused(run, change, tmp_path):
    checkpoint = read_checkpoint(Path(run("--epochs", "1", "--quantized", "1")["best"]))
    checkpoint["quantization"] = {**checkpoint["quantization"], **change}
    write_checkpoint(tmp_path / "odd.pt", checkpoint)
    with pytest.raises(WeightsError, match=r"odd\.pt: is quantized in a way that is not understood"):
        loaded(str(tmp_path / "odd.pt"))
