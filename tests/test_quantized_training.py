"""Trainings with rounded weights and activations, through train.py."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import slim_prune
import train
from models import fuse
from tests.test_resume import assert_same, at_call, state
from utils.checkpoint import load_model, read_checkpoint, write_checkpoint
from utils.errors import InputError, Interrupted, WeightsError
from utils.model_files import ModelFiles
from utils.quantization.quantizers import ActivationQuantizer
from utils.training import optim
from utils.training.quant_flags import quant_plan

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


def test_interrupted_and_resumed_is_bit_identical(run, monkeypatch):
    monkeypatch.setattr(optim, "LEAST_STEPS", 1)
    straight = state(Path(run(*FLAGS, "--name", "straight")["last"]))
    at_call(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted) as stopped:
        run(*FLAGS, "--name", "cut")
    monkeypatch.undo()
    monkeypatch.setattr(optim, "LEAST_STEPS", 1)
    folder = str(stopped.value).partition("--resume ")[2].split()[0]
    assert_same(state(Path(run("--resume", folder)["last"])), straight)


def test_float_and_quantized_weights_start_one_another(run):
    quantized = run("--epochs", "1", "--quantized", "1")["best"]
    again = run("--epochs", "1", "--weights", run("--epochs", "1", "--weights", quantized)["best"], "--quantized", "1")
    assert read_checkpoint(Path(again["best"]))["quantization"] is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--w_bit", "4"), r"--w_bit: says how to quantize; add --quantized"),
        (("--quantized", "1", "--FPGA", "--target", "arm"), r"--target arm: contradicts --FPGA"),
        (("--quantized", "1", "--dorefa-grid"), r"--dorefa-grid: goes with --quantized 2"),
        (("--quantized", "4"), r"--quantized.*4"),
        (("--quantized", "1", "--a_bit", "1"), r"--a_bit.*2 to 16 bits"),
        (("--quantized", "1", "--FPGA"), r"block 1 .*mish has no form in shifts"),
    ],
)
def test_flags_that_mean_nothing_are_refused(run, flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run("--epochs", "1", *flags)
    assert not (tmp_path / "runs").exists()


def test_three_is_taken_for_google_and_said(capsys):
    args = train.parse_args(["--quantized", "3"])
    assert quant_plan(args).settings.scheme == "google"
    assert "--quantized 3: is taken for 1" in capsys.readouterr().err


def test_a_quantized_network_is_not_pruned(run, folder, tmp_path):
    weights = run("--epochs", "1", "--quantized", "1")["best"]
    with pytest.raises(InputError, match="is quantized, which comes after pruning"):
        slim_prune.main(["--weights", weights, "--data", f"{folder}/d.data", "--percent", "0.2",
                         "--project", str(tmp_path / "pruned")])  # fmt: skip
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("change", [{"target": "abacus"}, {"weight_bits": 99}, {"surprise": 1}])
def test_a_quantization_that_is_not_understood_is_refused(run, change, tmp_path):
    checkpoint = read_checkpoint(Path(run("--epochs", "1", "--quantized", "1")["best"]))
    checkpoint["quantization"] = {**checkpoint["quantization"], **change}
    write_checkpoint(tmp_path / "odd.pt", checkpoint)
    with pytest.raises(WeightsError, match=r"odd\.pt: is quantized in a way that is not understood"):
        loaded(str(tmp_path / "odd.pt"))
