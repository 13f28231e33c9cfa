"""quantize.py: what it prints and writes, and that the other scripts go on from it."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml

import quantize
import train
from models import fuse
from tests.nets import TINY
from utils.checkpoint import load_model, read_checkpoint
from utils.cli import run as run_script
from utils.darknet import cfg as cfg_file
from utils.data.images import read_image
from utils.errors import DataError, InfeasibleError, InputError
from utils.model_files import choose_model
from utils.quantization import workflow
from utils.quantization.scheme import QuantSettings
from utils.runtime.choice import choose_runtime
from utils.runtime.engines import load

FILES = {"args.yaml", "env.json", "layers.csv", "model.cfg", "model.pt", "quantize.json", "sqnr.png"}
CONVOLUTIONS = [0, 1, 2, 3, 6, 8, 11, 14]


@pytest.fixture
def call(files, folder, tmp_path, capsys, monkeypatch):
    """Call quantize.py on the network of tests/nets.py; returns its JSON document. Plots are left out."""
    monkeypatch.setattr(workflow, "plot_noise", lambda *_: None)

    def call(*flags: str) -> dict:
        capsys.readouterr()
        given = [*([] if "--weights" in flags else files), "--data", str(folder / "d.data"), "--device", "cpu"]
        quantize.main([*given, "--project", str(tmp_path / "runs"), *flags, "--json"])
        return json.loads(capsys.readouterr().out)

    return call


def loaded(path: str | Path):
    return load_model(choose_model(None, str(path)))


def test_a_quantized_network_is_written_and_can_be_used(files, folder, tmp_path, capsys, script):
    flags = ["--data", str(folder / "d.data"), "--device", "cpu"]
    quantize.main([*files, *flags, "--calib", "8", "--keep-float", "1", "--project", str(tmp_path / "runs"), "--json"])
    document = json.loads(capsys.readouterr().out)
    run = Path(document["run_dir"])
    assert {path.name for path in run.iterdir()} == FILES
    assert document == {"schema": 1, **json.loads((run / "quantize.json").read_text())}
    assert document["map50"] == {when: document[when]["map50"] for when in ("before", "after")}
    assert [entry["block"] for entry in document["layers"]] == CONVOLUTIONS
    assert all({"name", "sqnr_db", "bits", "alone_db"} <= set(entry) for entry in document["layers"])
    assert all(entry["sqnr_db"] > 5 and entry["alone_db"] for entry in document["layers"])
    assert sorted(entry["bits"] for entry in document["layers"]) == [7] * 7 + [32]
    with (run / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sqnr_db"]) for row in rows] == [entry["sqnr_db"] for entry in document["layers"]]
    assert read_image(run / "sqnr.png").shape[0] > 300
    assert yaml.safe_load((run / "args.yaml").read_text())["calib"] == 8
    network = loaded(document["weights"]).model.network
    assert network == cfg_file.load(document["cfg"]) == cfg_file.parse(TINY)
    script.main(["--weights", document["weights"], *flags, "--project", str(tmp_path / "tests"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["map50"] == pytest.approx(document["map50"]["after"], abs=1e-12)


def test_the_checkpoint_says_where_it_comes_from(call, files):
    document = call("--calib", "5", "--seed", "3", "--observer", "cosine", "--bias-correction", "--no-test")
    checkpoint = read_checkpoint(Path(document["weights"]))
    entry = checkpoint["lineage"][-1]
    assert entry["sha256"] == hashlib.sha256(Path(files[3]).read_bytes()).hexdigest()
    assert entry["command"].startswith("python quantize.py --cfg ") and "--observer cosine" in entry["command"]
    assert checkpoint["calibration"] == document["calibration"]
    assert {"observer": "cosine", "pictures": 5, "seed": 3, "bias_correction": True}.items() <= (
        document["calibration"].items()
    )
    assert QuantSettings(**checkpoint["quantization"]) == QuantSettings(fold=True)
    assert document["before"] is document["map50"]["after"] is None


def test_float16_of_a_quantized_network_is_refused(call):
    files = choose_runtime(None, call("--no-test")["weights"], None, half=True)
    with pytest.raises(InputError, match=r"--half: .* is quantized, and float16 has other values"):
        load(files, torch.device("cuda"))


def test_the_seed_chooses_the_pictures_and_nothing_else_is_random(call):
    weights = [Path(call("--calib", "3", "--seed", seed, "--no-test")["weights"]) for seed in ("1", "1", "2")]
    states = [read_checkpoint(path)["model"] for path in weights]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())
    assert all(torch.equal(value, states[2][key]) for key, value in states[0].items() if "quantize_" not in key)


def test_all_pictures_are_taken_if_there_are_too_few_for_the_default(call, capsys):
    assert call("--no-test")["calibration"]["pictures"] == 9


def test_what_does_most_harm_alone_stays_float(call):
    document = call("--keep-float", "2", "--no-test")
    alone = {entry["block"]: entry["alone_db"] for entry in document["layers"]}
    assert document["kept"] == sorted(sorted(alone, key=alone.get)[:2])
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
    """Let every block that is kept float be worth 2 points of AP50; returns how many were, each time."""
    seen = []

    def accuracy(name, model):
        convolutions = [layer for layer in model.layers if hasattr(layer, "conv")]
        seen.append(sum(layer.quantize_weight is None for layer in convolutions))
        return workflow.Accuracy(0.9 if name == "float" else 0.8 + 0.02 * seen[-1], 0.5)

    monkeypatch.setattr(workflow, "accuracy_on", lambda *_: accuracy)
    return seen


def test_blocks_become_float_until_no_more_is_lost(call, accuracies):
    document = call("--max-drop", "5")
    assert len(document["kept"]) == 3 and accuracies[1:] == [0, 1, 2, 3]
    assert document["map50"] == {"before": 0.9, "after": pytest.approx(0.86)}
    assert call("--max-drop", "10.1")["kept"] == []


def test_a_drop_that_cannot_be_met_is_infeasible_and_nothing_is_written(call, monkeypatch, tmp_path):
    accuracy = {"float": workflow.Accuracy(0.9, 0.1)}
    monkeypatch.setattr(
        workflow, "accuracy_on", lambda *_: lambda name, _: accuracy.get(name, workflow.Accuracy(0.5, 0.1))
    )
    with pytest.raises(InfeasibleError, match=r"--max-drop 5: 40\.00 points .*every convolution float"):
        call("--max-drop", "5")
    assert not (tmp_path / "runs").exists()


def test_training_goes_on_from_it(call, folder, tmp_path, no_plots, capsys):
    weights = call("--no-test")["weights"]
    capsys.readouterr()
    flags = ["--quantized", "1", "--BN_Fold", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--json"]
    files = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), "--project", str(tmp_path / "t")]
    train.main(["--weights", weights, *files, *flags])
    checkpoint = read_checkpoint(Path(json.loads(capsys.readouterr().out)["best"]))
    assert [Path(entry["path"]).name for entry in checkpoint["lineage"]] == ["n.weights", "model.pt"]
    assert checkpoint["quantization"]["fold"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--calib", "10"), r"--calib 10: .*d\.data has 9 train pictures"),
        (("--calib", "0"), r"--calib: 0 is below 1"),
        (("--observer", "guess"), r"--observer: invalid choice: 'guess'"),
        (("--FPGA", "--keep-float", "1"), r"--keep-float: --target fpga has no float arithmetic"),
        (("--FPGA", "--max-drop", "1"), r"--max-drop: --target fpga has no float arithmetic"),
        (("--keep-float", "1", "--max-drop", "1"), r"--max-drop: not allowed with"),
        (("--keep-float", "9"), r"--keep-float 9: 8 convolutions are rounded; allowed is 1 to 8"),
        (("--max-drop", "1", "--no-test"), r"--max-drop: has to measure"),
        (("--equalize",), r"--equalize: is gone; .*--bias-correction"),
        (("--sensitivity",), r"--sensitivity: is gone; .*--keep-float"),
        (("--max-drop", "0"), r"--max-drop: 0 is outside 0 < value <= 100"),
        (("--FPGA",), r"block 1 .*mish needs more than shifts"),
        (("--FPGA", "--target", "arm"), r"--target arm: contradicts --FPGA"),
        (("--target", "rknn"), r"--target rknn: RKNN-Toolkit2 quantizes for it; export a float file"),
        (("--a_bit", "1"), r"--a_bit: 1: allowed are 2 to 16 bits"),
        (("--img_size", "33"), r"--img_size 33: not a multiple of 8"),
        (("--name", "a/b"), r"--name 'a/b': not a plain folder name"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(call, flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        call(*flags)
    assert not (tmp_path / "runs").exists()


def test_a_quantized_network_is_not_quantized_again(call, capsys):
    weights = call("--no-test")["weights"]
    with pytest.raises(InputError, match=r"model\.pt: is quantized already; give the float weights"):
        call("--weights", weights)
    with pytest.raises(SystemExit) as left:
        run_script(lambda: call("--weights", weights))
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("keys", "flags", "message"),
    [
        ("valid=val.txt", (), r"names no train pictures, which the calibration needs"),
        ("train=train.txt", (), r"names no valid pictures to measure on; --no-test works without"),
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
