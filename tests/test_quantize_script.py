"""quantize.py: what it prints and writes, and that the other scripts go on from it; train.py with rounded values."""

from __future__ import annotations

import hashlib
import json
import math
import signal
from pathlib import Path

import pytest
import torch
import yaml

import quantize
import slim_prune
import train
from models import ConvBlock, Darknet, fuse
from tests.nets import TINY, csv_rows, printed, tiny
from tests.test_resume import assert_same, at_call, state
from utils.checkpoint import load_model, read_checkpoint, write_checkpoint
from utils.darknet import cfg as cfg_file
from utils.data.images import read_image
from utils.errors import DataError, InfeasibleError, InputError, Interrupted, WeightsError
from utils.flags import choose_model
from utils.quantization import quantizers, workflow
from utils.quantization.quantizers import ActivationQuantizer
from utils.quantization.scheme import QuantSettings
from utils.report.run_dir import read_results
from utils.runtime.choice import choose_runtime
from utils.runtime.engines import load
from utils.training import loop
from utils.training.loop import Rounding
from utils.training.settings import quantization

pytestmark = pytest.mark.usefixtures("no_plots")
FLAGS = ("--epochs", "3", "--seed", "3", "--quantized", "1")
FILES = {"args.yaml", "env.json", "layers.csv", "model.cfg", "model.pt", "quantize.json", "sqnr.png"}
CONVOLUTIONS = [0, 1, 2, 3, 6, 8, 11, 14]


@pytest.fixture
def call(files, folder, tmp_path, capsys, monkeypatch):
    """Call quantize.py on the network of tests/nets.py; returns its JSON document. Plots are left out."""
    monkeypatch.setattr(workflow, "plot_noise", lambda *_: None)

    def call(*flags: str) -> dict:
        weights = [] if "--weights" in flags else files
        data = ["--data", str(folder / "d.data"), "--device", "cpu", "--project", str(tmp_path / "runs")]
        return printed(capsys, quantize.main, *weights, *data, *flags)

    return call


def loaded(path: str | Path):
    return load_model(choose_model(None, str(path)))


def test_a_quantized_network_is_written_says_where_it_comes_from_and_can_be_used(
    files, folder, tmp_path, capsys, script
):
    flags = ["--data", str(folder / "d.data"), "--device", "cpu"]
    how = ["--calib", "8", "--keep-float", "1", "--seed", "3", "--observer", "cosine", "--bias-correction"]
    document = printed(capsys, quantize.main, *files, *flags, *how, "--project", str(tmp_path / "runs"))
    run = Path(document["run_dir"])
    assert {path.name for path in run.iterdir()} == FILES
    assert document == {"schema": 1, **json.loads((run / "quantize.json").read_text())}
    assert document["map50"] == {when: document[when]["map50"] for when in ("before", "after")}
    assert [entry["block"] for entry in document["layers"]] == CONVOLUTIONS
    assert all({"name", "sqnr_db", "bits", "alone_db"} <= set(entry) for entry in document["layers"])
    assert all(entry["sqnr_db"] > 5 and entry["alone_db"] for entry in document["layers"])
    assert sorted(entry["bits"] for entry in document["layers"]) == [7] * 7 + [32]
    assert [float(row["sqnr_db"]) for row in csv_rows(run / "layers.csv")] == [
        entry["sqnr_db"] for entry in document["layers"]
    ]
    assert read_image(run / "sqnr.png").shape[0] > 300
    assert yaml.safe_load((run / "args.yaml").read_text())["calib"] == 8
    checkpoint = read_checkpoint(Path(document["weights"]))
    entry = checkpoint["lineage"][-1]
    assert entry["sha256"] == hashlib.sha256(Path(files[3]).read_bytes()).hexdigest()
    assert entry["command"].startswith("python quantize.py --cfg ") and "--observer cosine" in entry["command"]
    assert checkpoint["calibration"] == document["calibration"]
    wanted = {"observer": "cosine", "pictures": 8, "seed": 3, "bias_correction": True}
    assert wanted.items() <= document["calibration"].items()
    assert QuantSettings(**checkpoint["quantization"]) == QuantSettings(fold=True, kept=tuple(document["kept"]))
    network = loaded(document["weights"]).model.network
    assert network == cfg_file.load(document["cfg"]) == cfg_file.parse(TINY)
    found = printed(capsys, script.main, "--weights", document["weights"], *flags, "--project", str(tmp_path / "tests"))
    assert found["map50"] == pytest.approx(document["map50"]["after"], abs=1e-12)


def test_the_seed_chooses_the_pictures_and_nothing_else_is_random(call):
    weights = [Path(call("--calib", "3", "--seed", seed, "--no-test")["weights"]) for seed in ("1", "1", "2")]
    states = [read_checkpoint(path)["model"] for path in weights]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())
    assert all(torch.equal(value, states[2][key]) for key, value in states[0].items() if "quantize_" not in key)


def test_what_does_most_harm_alone_stays_float(call):
    document = call("--keep-float", "2", "--no-test")
    alone = {entry["block"]: entry["alone_db"] for entry in document["layers"]}
    assert document["kept"] == sorted(sorted(alone, key=alone.get)[:2])
    assert document["calibration"]["pictures"] == 9  # all there are
    bits = {entry["block"]: entry["bits"] for entry in document["layers"]}
    assert {block for block, count in bits.items() if count == 32} == set(document["kept"])
    model = loaded(document["weights"])
    assert model.quantization.kept == tuple(document["kept"])
    assert model.model.layers[document["kept"][0]].quantize_weight is None


def test_corrected_networks_are_nearly_the_float_one(call, files):
    fine = ("--a_bit", "16", "--w_bit", "16", "--target", "cpu-vnni", "--observer", "minmax")
    document = call("--bias-correction", *fine, "--no-test")
    before = load_model(choose_model(files[1], files[3])).model.eval()
    after = fuse(loaded(document["weights"]).model)
    image = torch.rand(1, 3, 64, 64)
    image = (image * 255).round() / 255
    with torch.no_grad():
        for one, other in zip(before(image).heads, after(image).heads, strict=True):
            assert (one - other).abs().amax() < 2e-3 * max(1.0, float(one.abs().amax()))


@pytest.fixture
def accuracies(monkeypatch):
    """Let every block that is kept float be worth a point of AP50, of ten; returns how many were, each time."""
    seen = []

    def accuracy(name, model):
        convolutions = [layer for layer in model.layers if hasattr(layer, "conv")]
        seen.append(sum(layer.quantize_weight is None for layer in convolutions))
        return workflow.Accuracy(0.9 if name == "float" else 0.8 + 0.01 * seen[-1], 0.5)

    monkeypatch.setattr(workflow, "accuracy_on", lambda *_: accuracy)
    return seen


def test_blocks_become_float_until_no_more_is_lost(call, accuracies):
    document = call("--max-drop", "7.5")
    assert len(document["kept"]) == 3 and accuracies[1:] == [0, 1, 2, 3]
    assert document["map50"] == {"before": 0.9, "after": pytest.approx(0.83)}
    assert call("--max-drop", "10.1")["kept"] == []


def test_a_drop_that_cannot_be_met_is_infeasible_and_nothing_is_written(call, accuracies, tmp_path):
    with pytest.raises(InfeasibleError, match=r"--max-drop 1: 2\.00 points .*every convolution float"):
        call("--max-drop", "1")
    assert not (tmp_path / "runs").exists()


def test_training_goes_on_from_it(call, folder, tmp_path, no_plots, capsys):
    weights = call("--no-test")["weights"]
    flags = ["--quantized", "1", "--BN_Fold", "--epochs", "1", "--batch-size", "4", "--workers", "0"]
    files = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), "--project", str(tmp_path / "t")]
    document = printed(capsys, train.main, "--weights", weights, *files, *flags)
    checkpoint = read_checkpoint(Path(document["best"]))
    assert [Path(entry["path"]).name for entry in checkpoint["lineage"]] == ["n.weights", "model.pt"]
    assert checkpoint["quantization"]["fold"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--calib", "10"), r"--calib 10: .*d\.data has 9 train images"),
        (("--calib", "0"), r"--calib: 0 is below 1"),
        (("--FPGA", "--keep-float", "1"), r"--keep-float: --target fpga has no float arithmetic"),
        (("--FPGA", "--max-drop", "1"), r"--max-drop: --target fpga has no float arithmetic"),
        (("--keep-float", "1", "--max-drop", "1"), r"--max-drop: not allowed with"),
        (("--keep-float", "9"), r"--keep-float 9: 8 convolutions are rounded; allowed is 1 to 8"),
        (("--max-drop", "1", "--no-test"), r"--max-drop: has to measure"),
        (("--equalize",), r"--equalize: is no flag here; .*--bias-correction"),
        (("--sensitivity",), r"--sensitivity: is no flag here; .*--keep-float"),
        (("--FPGA",), r"block 1 .*mish needs more than shifts"),
        (("--FPGA", "--target", "arm"), r"--target arm: contradicts --FPGA"),
        (("--target", "rknn"), r"--target rknn: RKNN-Toolkit2 quantizes for it; export a float file"),
        (("--a_bit", "1"), r"--a_bit: 1: allowed are 2 to 16 bits"),
        (("--img_size", "33"), r"--img_size 33: not a multiple of 8"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(call, flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        call(*flags)
    assert not (tmp_path / "runs").exists()


def test_a_quantized_network_is_neither_quantized_again_nor_run_in_float16(call):
    weights = call("--no-test")["weights"]
    with pytest.raises(InputError, match=r"model\.pt: is quantized already; give the float weights"):
        call("--weights", weights)
    with pytest.raises(InputError, match=r"--half: .* is quantized, and float16 has other values"):
        load(choose_runtime(None, weights, None, half=True), torch.device("cuda"))


@pytest.mark.parametrize(
    ("keys", "flags", "message"),
    [
        ("valid=val.txt", (), r"names no train images, which the calibration needs"),
        ("train=train.txt", (), r"names no valid images to measure on; --no-test works without"),
        ("train=nowhere.txt\nvalid=val.txt", ("--no-test",), r"nowhere\.txt"),
    ],
)
def test_pictures_that_are_missing_are_said(call, folder, keys, flags, message, tmp_path):
    (folder / "odd.data").write_text(f"classes=2\n{keys}\nnames=d.names\n")
    with pytest.raises(DataError, match=message):
        call("--data", str(folder / "odd.data"), *flags)
    assert not (tmp_path / "runs").exists()


def test_the_table_for_people_names_the_worst_layers(files, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workflow, "plot_noise", lambda *_: None)
    quantize.main([*files, "--data", str(folder / "d.data"), "--project", str(tmp_path / "runs"), "--keep-float", "1"])
    out = capsys.readouterr().out
    assert "worst layers" in out and "AP50-95" in out and "alone, dB" in out
    *_, written, coming = out.splitlines()
    assert written.startswith("written: ") and "float: blocks " in out and "AP50 changes by " in out
    assert coming == f"next: python export.py --weights {written.split()[1]} --int8"


def model_in(path: str) -> Darknet:
    return loaded(path).model


def activations(model: Darknet) -> list[ActivationQuantizer]:
    """The quantizers of activations, of which there are some."""
    found = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    assert found
    return found


@pytest.mark.parametrize("flags", [("--quantized", "1"), ("--quantized", "2", "--BN_Fold", "--w_bit", "4")])
def test_a_quantized_network_is_kept_with_its_grids_and_means_the_same_when_loaded(run, flags):
    document = run("--epochs", "3", *flags)
    checkpoint = read_checkpoint(Path(document["best"]))
    assert checkpoint["quantization"]["scheme"] == ("google" if flags[1] == "1" else "dorefa")
    model = model_in(document["best"]).eval()
    assert all(module.rounding and not module.observing and module.seen > 0 for module in activations(model))
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


def test_a_network_is_kept_with_the_bits_asked_for(run, leaky):
    document = run(*FLAGS, *leaky, "--w_bit", "3", "--a_bit", "4", "--bit-warmup", "0.5")
    assert document["best_epoch"] > 1
    layer = model_in(document["best"]).layers[2]
    assert (layer.quantize_weight.grid.bits, layer.quantize_output.grid.bits) == (3, 4)


def test_more_bits_are_in_force_while_they_are_warmed_up():
    settings = QuantSettings(weight_bits=2, activation_bits=14)
    model = quantizers.quantize(Darknet(tiny()), settings)
    rounding = Rounding([model], 8, warmup=0.5)
    seen = []
    for step in range(8):
        rounding.begin(step)
        layer = model.layers[2]
        seen.append((layer.quantize_weight.grid.bits, layer.quantize_output.grid.bits, rounding.complete))
    assert seen == [(6, 16, False), (5, 16, False), (4, 16, False), (3, 15, False), *[(2, 14, True)] * 4]


def test_a_run_of_one_step_finds_bounds_and_measures_its_weights_before_activations_are_rounded(
    run, leaky, monkeypatch
):
    """Before the first batch all bounds are 0, so little would be left of the activations."""
    weights, evaluate, rounds = run("--epochs", "1", *leaky)["best"], loop.evaluate, []

    def watched(model, *args, **more):
        rounds.append(model.quantize_image.rounding)
        return evaluate(model, *args, **more)

    monkeypatch.setattr(loop, "evaluate", watched)
    document = run("--epochs", "1", *leaky, "--weights", weights, "--quantized", "1", "--batch-size", "16")
    assert rounds == [False, True]
    assert all(module.seen > 0 and module.high > module.low for module in activations(model_in(document["best"])))


def test_frozen_blocks_have_bounds_and_keep_all_else(run, leaky):
    document = run("--epochs", "2", *leaky, "--quantized", "1", "--freeze", "2")
    model = model_in(document["best"])
    assert all(module.seen > 0 and module.high > 0 for module in activations(model))
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
    layers = [layer for layer in model_in(path).layers[:4] if isinstance(layer, ConvBlock)]
    return float(sum(layer.bn.weight.detach().abs().sum() for layer in layers))


def test_float_and_quantized_weights_start_one_another(run, lines):
    quantized = run("--epochs", "1", "--quantized", "1", "--target", "arm")["best"]
    assert not any("was quantized" in line for line in lines)
    again = run("--epochs", "1", "--weights", run("--epochs", "1", "--weights", quantized)["best"], "--quantized", "1")
    assert read_checkpoint(Path(again["best"]))["quantization"] is not None
    assert sum("was quantized with --target arm: its weights before rounding are taken" in line for line in lines) == 1


def test_bounds_of_the_averaged_network_are_those_of_the_trained_one(run):
    checkpoint = read_checkpoint(Path(run("--epochs", "2", "--quantized", "1")["last"]))
    bounds = [key for key in checkpoint["model"] if key.endswith((".low", ".high"))]
    assert len(bounds) > 10
    assert all(torch.equal(checkpoint["model"][key], checkpoint["ema"][key]) for key in bounds)


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
        model_in(str(tmp_path / "odd.pt"))
